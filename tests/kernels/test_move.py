"""Tables moved along a sequence, by the twin and by the kernel, equal those packed there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE
from strategies import mixed_passes

from orthrus_kernels import Rows, pack
from orthrus_kernels.move_triton import move_triton
from orthrus_kernels.packed import move, unpack

CUTS = ((0, 16), (64, 32))
ROOM = 200


def at(rows: Rows, start: int) -> Rows:
    """The same rows on another context."""
    delta = start - rows.contexts[0]
    positions = [position + delta for position in rows.positions]
    return Rows(rows.tokens, rows.parents, rows.blocks, positions, rows.sequences, {0: start})


@settings(max_examples=40)
@given(
    rows=mixed_passes(max_start=100),
    height=st.integers(1, 9),
    starts=st.lists(st.integers(0, 150), min_size=1),
)
def test_the_twin(rows, height, starts):
    packed = pack(rows, height, cuts=CUTS, room=ROOM)
    for start in starts[:3]:
        move(packed, torch.tensor([start], dtype=torch.int32))
        want = pack(at(rows, start), height, cuts=CUTS, room=ROOM)
        assert torch.equal(packed.table, want.table)
        assert torch.equal(unpack(packed), unpack(pack(rows, height, cuts=CUTS)))


@settings(max_examples=20 if DEVICE == "cuda" else 6)
@given(rows=mixed_passes(max_start=100), height=st.integers(1, 9), start=st.integers(0, 150))
def test_the_kernel(rows, height, start):
    packed = pack(rows, height, DEVICE, CUTS, ROOM)
    ids = torch.tensor([rows.tokens, rows.positions]).to(DEVICE)
    depths = ids[1] - rows.contexts[0]
    for begin in (start, start // 2):
        place = torch.tensor([begin], dtype=torch.int32, device=DEVICE)
        move_triton(packed, place, place + 7, ids, depths)
        want = pack(at(rows, begin), height, cuts=CUTS, room=ROOM)
        assert torch.equal(packed.table.cpu(), want.table)
        assert ids[1].tolist() == at(rows, begin).positions and ids[0].tolist() == [
            begin + 7,
            *rows.tokens[1:],
        ]


@given(rows=mixed_passes(max_start=100), height=st.integers(1, 9))
def test_room_adds_only_pairs_without_keys(rows, height):
    tight, roomy = pack(rows, height, cuts=CUTS), pack(rows, height, cuts=CUTS, room=ROOM)
    has_keys = [tuple(item) for item in roomy.items.tolist() if item[0] >= 0]
    assert sorted(has_keys) == sorted(map(tuple, tight.items.tolist()))
    assert torch.equal(tight.row_segments, roomy.row_segments)


def test_what_room_cannot_be_for():
    two = Rows.batch([Rows.chain([1], 3, 0), Rows.chain([1], 3, 1)])
    with pytest.raises(ValueError, match="one sequence"):
        pack(two, 4, room=100)
    with pytest.raises(ValueError, match="at least 10 positions"):
        pack(Rows.chain([1], 9), 4, room=9)
