"""Visibility: exactly the ancestors, exactly the context, exactly the own block; no leak across blocks,
branches or sequences; and nothing but visibility.py says so.
"""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged import paged
from plans import laid
from strategies import hard, mixed_passes, parent_lists

from orthrus_kernels import Rows, attention, unpack, visibility, visible
from orthrus_kernels.visibility import row_above, row_limit
from qwen3_model.training.network import diffusion_blocks


def literal(rows: Rows) -> torch.Tensor:
    """Visibility from the written rules, one pair at a time, by a breadth-first walk instead of the library's
    parent walk.
    """
    t = len(rows)
    above = [{i} for i in range(t)]
    for i in range(rows.n_ar):  # parents come first
        if rows.parents[i] >= 0:
            above[i] |= above[rows.parents[i]]
    seen = torch.zeros(t, t, dtype=torch.bool)
    for i in range(t):
        for j in range(t):
            if rows.sequences[i] != rows.sequences[j]:
                continue
            if rows.blocks[i] < 0:
                seen[i, j] = rows.blocks[j] < 0 and j in above[i]
            elif rows.blocks[j] < 0:
                seen[i, j] = rows.parents[i] >= 0 and j in above[rows.parents[i]]
            else:
                seen[i, j] = rows.blocks[i] == rows.blocks[j]
    return seen


@given(mixed_passes())
def test_visible_is_the_written_rule(rows):
    assert torch.equal(visible(rows), literal(rows))


@given(st.lists(st.integers(0, 30), min_size=2, max_size=3), st.data())
def test_nothing_crosses_sequences(starts, data):
    alone = [data.draw(mixed_passes(sequence=s)) for s in range(len(starts))]
    rows = Rows.batch(alone)
    seen = visible(rows)
    assert torch.equal(seen, literal(rows))
    sequences = torch.tensor(rows.sequences)
    assert not seen[sequences[:, None] != sequences].any()
    assert rows.blocks[: rows.n_ar] == [-1] * rows.n_ar and min(rows.blocks[rows.n_ar :], default=0) >= 0
    for s, single in enumerate(alone):  # each sequence keeps its own pattern
        mine = [i for i in range(len(rows)) if rows.sequences[i] == s]
        assert torch.equal(seen[mine][:, mine], visible(single))
        assert [rows.tokens[i] for i in mine] == single.tokens and [
            rows.positions[i] for i in mine
        ] == single.positions


@given(mixed_passes())
def test_the_rules_say_the_same_as_visible(rows):
    """Of a path that goes on below a row, it sees what lies below its limit."""
    seen = visible(rows)
    for i, block in enumerate(rows.blocks):
        end = max(p for p, of in zip(rows.positions, rows.blocks, strict=True) if of == block) + 1
        above, last = [], i
        while below := [
            j for j in range(last + 1, len(rows)) if rows.blocks[j] == block
            and (block >= 0 or rows.parents[j] == last)
        ]:  # fmt: skip
            last = below[0]
        while last >= 0:
            above.append(last)
            before = rows.blocks[last - 1] if last else -1
            last = row_above(last, rows.parents[last], rows.blocks[last], before)
        limit = row_limit(rows.positions[i], block, end)
        shown = [row for row in above if rows.positions[row] < limit]
        assert sorted(shown) == seen[i].nonzero().flatten().tolist()
        positions = [rows.positions[row] for row in reversed(shown)]
        assert positions == list(range(rows.contexts[0], rows.contexts[0] + len(shown))), (
            "logical order is position order"
        )


@given(parent_lists())
def test_later_and_sibling_rows_are_hidden(parents):
    rows = Rows.tree(range(len(parents)), parents, 5)
    seen = visible(rows)
    assert not seen.triu(1).any()
    depth = [p - 5 for p in rows.positions]
    assert seen.sum(1).tolist() == [d + 1 for d in depth], "a node sees one row a level: siblings stay hidden"


def test_block_sees_itself_both_ways_but_not_its_anchors_ar_row():
    rows = Rows.tree_with_blocks([7, 8], [-1, 0], 3, [1], 4, 96)
    assert rows.tokens == [7, 8, 8, 96, 96, 96] and rows.positions == [3, 4, 4, 5, 6, 7] and rows.n_ar == 2
    assert visible(rows)[2:].tolist() == [[True, False, True, True, True, True]] * 4
    assert Rows.block(7, 3, 5, 96).positions == [5, 6, 7]


def test_bad_rows_are_refused():
    with pytest.raises(ValueError, match="parents must come before"):
        Rows.tree([1, 2], [1, -1], 0)
    with pytest.raises(ValueError, match="appear in two passes"):
        Rows.batch([Rows.chain([1], 0), Rows.chain([2], 0)])


WIDTH = 20
RULES = {
    "as it is": {},
    "a causal block": {"row_limit": lambda position, block, block_end: position + 1},
    "a window": {
        "row_begin": lambda limit: max(limit - WIDTH, 0),
        "row_sees": lambda position, limit: (position < limit) & (position >= limit - WIDTH),
    },
}


@pytest.fixture(params=RULES)
def changed(request, monkeypatch) -> str:
    """With other rules in all modules that ask for them."""
    for name, rule in RULES[request.param].items():
        old = getattr(visibility, name)
        for module in [m for m in list(sys.modules.values()) if getattr(m, name, None) is old]:
            monkeypatch.setattr(module, name, rule)
    return request.param


@pytest.mark.parametrize("context", [0, 7, 300])
def test_what_a_row_sees_is_said_here_alone(changed, context):
    """The twin's attention against sums over keys that are picked one by one, behind other rules."""
    rows = Rows.tree_with_blocks([1] * 9, [-1, 0, 0, 1, 1, 3, 5, 6, 7], context, [0, 4, 8], 30, 96)
    q, k, v = (hard("normal", len(rows), heads, 16, seed=heads) for heads in (2, 1, 1))
    k_cache, v_cache = (hard("normal", 1, 1, context + 40, 16, seed=seed) for seed in (3, 4))
    got = attention(q, k, v, *paged(k_cache, v_cache, rows.contexts), laid(rows, q, k), 0.25)
    for i, path in enumerate(visible(rows)):
        above = sorted(path.nonzero().flatten().tolist(), key=lambda j: rows.positions[j])
        keys, values = (
            torch.cat([cache[0, 0, :context], flight[above, 0]]).double()
            for cache, flight in ((k_cache, k), (v_cache, v))
        )
        end = rows.positions[i] + 1 if changed == "a causal block" else len(keys)
        begin = max(end - WIDTH, 0) if changed == "a window" else 0
        shares = (q[i].double() @ keys[begin:end].T * 0.25).softmax(-1)
        torch.testing.assert_close(got[i].double(), shares @ values[begin:end], rtol=0, atol=1e-5)


@pytest.mark.parametrize("changed", ["as it is", "a causal block"], indirect=True)
def test_training_sees_what_a_pass_sees(changed):
    anchors, texts = torch.tensor([[0, 5, 14], [9, 7, 6]]), torch.arange(40).view(2, 20)
    ids, positions, mask = diffusion_blocks(texts, anchors, 4, 96)
    for b, text in enumerate(texts.tolist()):
        rows = Rows.tree_with_blocks(text, range(-1, 19), 0, anchors[b].tolist(), 4, 96)
        empty = torch.zeros(len(rows), 1, 16)
        assert torch.equal(mask[b, 0], unpack(laid(rows, empty, empty))[20:])
        assert (ids[b].tolist(), positions[b].tolist()) == (rows.tokens[20:], rows.positions[20:])
