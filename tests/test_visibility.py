"""Visibility: exactly the ancestors, exactly the context, exactly the own block; no leak across blocks,
branches or sequences.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import mixed_passes, parent_lists

from orthrus_kernels import Rows, visible
from orthrus_kernels.visibility import row_above, row_limit


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


def test_bad_rows_are_refused():
    with pytest.raises(ValueError, match="parents must come before"):
        Rows.tree([1, 2], [1, -1], 0)
    with pytest.raises(ValueError, match="appear in two passes"):
        Rows.batch([Rows.chain([1], 0), Rows.chain([2], 0)])
