"""The packed form of a pass says what `visible` says, and sends every (row, key segment) to one program."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import mixed_passes

from orthrus_kernels import Rows, key_segments, pack, unpack, visible

CUTS = ((0, 16), (64, 32))


def batches():
    return st.tuples(mixed_passes(sequence=0, max_start=90), mixed_passes(sequence=1, max_start=90)).map(
        Rows.batch
    )


@given(rows=st.one_of(mixed_passes(max_start=90), batches()), height=st.integers(1, 9))
def test_unpacked_tables_equal_the_definition(rows, height):
    packed = pack(rows, height, cuts=CUTS)
    assert torch.equal(unpack(packed), visible(rows))
    for tile, (sequence, context, end, first_slot, _, chain, chain_row, lowest) in enumerate(
        packed.tiles.tolist()
    ):
        mine = [i for i in packed.rows[tile].tolist() if i >= 0]
        assert {rows.sequences[i] for i in mine} == {sequence} and context == rows.contexts[sequence]
        used = packed.limits[tile][packed.rows[tile] >= 0]
        assert end == used.max() and lowest == used.min()
        slots = packed.slots[first_slot : first_slot + end - context].tolist()
        inside = slots[chain - context :]
        assert inside == list(range(chain_row, chain_row + len(inside)))
        assert chain == context or slots[chain - context - 1] + 1 != chain_row, "the chain could be longer"


@given(rows=st.one_of(mixed_passes(max_start=90), batches()), height=st.integers(1, 9))
def test_every_segment_of_a_row_has_one_program(rows, height):
    """And a program whose tile mixes paths has only keys of the committed context."""
    packed = pack(rows, height, cuts=CUTS)
    written: list[list[int]] = [[] for _ in range(len(rows))]
    for tile, segment in packed.items.tolist():
        if tile >= packed.path_tiles:
            assert packed.segments[segment + 1] <= packed.tiles[tile, 1]
        for row in packed.rows[tile].tolist():
            if row >= 0:
                written[row].append(segment)
    seen = visible(rows).sum(1)
    for row, segments in enumerate(written):
        assert len(set(segments)) == len(segments), "two programs would write one partial"
        needed = list(key_segments(rows.contexts[rows.sequences[row]] + int(seen[row]), CUTS))
        assert packed.row_segments[row] == len(needed) and set(range(len(needed))) <= set(segments)


def test_tables_are_aligned_and_int32():
    packed = pack(Rows.tree([1] * 5, [-1, 0, 0, 1, 3], 300), 3)
    tables = [t for t in packed.__dict__.values() if isinstance(t, torch.Tensor)]
    assert all(t.dtype == torch.int32 and t.storage_offset() % 4 == 0 for t in tables)


def test_context_tiles_mix_paths():
    """33 AR rows and 24 blocks of 6: full tiles where all rows see the same keys."""
    rows = Rows.tree_with_blocks([1] * 33, [-1, *(i // 2 for i in range(32))], 5000, range(9, 33), 6, 96)
    packed = pack(rows, 16)
    assert len(packed.tiles) - packed.path_tiles == 12 and packed.path_tiles > 36


def test_an_empty_pass_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        pack(Rows([], [], [], [], [], {}), 16)
