"""The tables of a pass say what `visible` says, and send every (row, key segment) to one item."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plans import CUTS, padded, plans, tables_for

from orthrus_kernels import PAGE, Rows, key_segments, visible
from orthrus_kernels.lay import lay
from orthrus_kernels.layout import Tile
from orthrus_kernels.pass_tables import PassTables, unpack
from orthrus_kernels.plan import PassPlan, PassShape


def laid(plan, height, **form):
    tables = tables_for(plan.shape, height, **form)
    lay(plan, tables)
    return tables


# of tables; path tiles may have fewer rows than others
FORMS = ({}, {"whole": True}, {"shared": True}, {"shared": True, "path_rows": 2})


@given(plan=plans(), height=st.integers(2, 9), form=st.sampled_from(FORMS))
def test_unpacked_tables_equal_the_definition(plan, height, form):
    tables = laid(plan, height, **form)
    rows, used = plan.rows(), [i for i, s in enumerate(plan.sequences.tolist()) if s >= 0]
    seen = unpack(tables)
    assert torch.equal(seen[used][:, used], visible(rows)) and seen.sum() == visible(rows).sum()
    slots = tables.slots.flatten().tolist()
    for tile, line in enumerate(tables.tiles.tolist()):
        mine = [i for i in tables.rows[tile].tolist() if i >= 0]
        if not mine:
            assert line == [0] * len(Tile), "no keys, no segments"
            continue
        context, end, chain = line[Tile.CONTEXT], line[Tile.END], line[Tile.CHAIN]
        assert {int(plan.sequences[i]) for i in mine} == {line[Tile.SEQUENCE]}
        start = plan.start[line[Tile.SEQUENCE]]
        assert context == (start // PAGE * PAGE if tables.shared and tile >= tables.path_tiles else start)
        limits = tables.limits[tile][: len(mine)]
        assert (tables.limits[tile][len(mine) :] == 0).all()
        bounds = (context, context) if tile >= tables.path_tiles else (limits.max(), limits.min())
        assert (end, line[Tile.LOWEST]) == bounds
        path = slots[line[Tile.FIRST_SLOT] :][: end - context]
        inside = path[chain - context :]
        first = line[Tile.CHAIN_ROW]
        assert inside == list(range(first, first + len(inside)))
        assert chain == context or path[chain - context - 1] + 1 != first, "the chain could be longer"


@given(plan=plans(), height=st.integers(1, 9))
def test_every_segment_of_a_row_has_one_item(plan, height):
    """And an item whose tile mixes lines has only keys of the committed context."""
    tables = laid(plan, height)
    edges, items = tables.segments.tolist(), tables.items[: tables.count].tolist()
    takes: dict[int, list[int]] = {i: [] for i in range(plan.shape.n_rows)}
    for tile, segment in items:
        line = tables.tiles[tile].tolist()
        if tile >= tables.path_tiles:
            assert edges[segment + 1] <= line[Tile.CONTEXT]
        else:
            assert edges[segment] < line[Tile.END], "an item without a key"
        for row in tables.rows[tile].tolist():
            if row >= 0:
                takes[row].append(segment)
    for tile in {tile for tile, _ in items}:
        mine, last = [s for t, s in items if t == tile], int(tables.tiles[tile, Tile.REACH]) - 1
        assert [s for s in mine if s != last] == sorted(set(mine) - {last}, reverse=True), "long ones first"
        assert mine.index(last) == int(tables.tiles[tile, Tile.SEQUENCE]) % ((len(mine) + 1) // 2), "its turn"
    seen = unpack(tables).sum(1)
    for row, (sequence, segments) in enumerate(zip(plan.sequences.tolist(), takes.values(), strict=True)):
        assert len(set(segments)) == len(segments), "two items would write one partial"
        needed = []
        if sequence >= 0:
            needed = list(key_segments(int(plan.start[sequence]) + int(seen[row]), CUTS))
        assert tables.row_segments[row].tolist() == [0, len(needed)]
        assert set(range(len(needed))) <= set(segments)
        assert sequence >= 0 or not segments, "padding is in no item"


@given(plan=plans(), height=st.integers(1, 9), path_rows=st.integers(1, 9))
def test_the_shared_form_has_an_item_for_each_segment_of_whole_pages(plan, height, path_rows):
    """Of context tiles alone, for every row once; path tiles take the segments from the ragged one on."""
    path_rows = min(path_rows, height)
    tables = laid(plan, height, shared=True, path_rows=path_rows)
    assert (tables.rows[: tables.path_tiles, path_rows:] == -1).all()
    edges, items = tables.segments.tolist(), tables.items[: tables.count].tolist()
    takes: dict[int, list[int]] = {i: [] for i in range(plan.shape.n_rows)}
    for tile, segment in items:
        assert tile >= tables.path_tiles
        assert edges[segment] < tables.tiles[tile, Tile.END] and tables.tiles[tile, Tile.END] % PAGE == 0
        for row in tables.rows[tile].tolist():
            if row >= 0:
                takes[row].append(segment)
    for sequence, segments in zip(plan.sequences.tolist(), takes.values(), strict=True):
        context = int(plan.start[sequence]) if sequence >= 0 else 0
        assert sorted(segments) == list(range(len(list(key_segments(context // PAGE * PAGE, CUTS)))))
    for tile in range(tables.path_tiles):
        line, (first, *_) = tables.tiles[tile].tolist(), tables.rows[tile].tolist()
        if first >= 0:
            begin, reach = line[Tile.BEGIN], line[Tile.REACH]
            assert edges[begin] <= line[Tile.CONTEXT] < edges[begin + 1], "the ragged one"
            assert edges[reach - 1] < line[Tile.END] <= edges[reach]
    assert plan.shape.n_rows <= tables.path_tiles * path_rows, "every row of padding has a program"


@given(plan=plans(), height=st.integers(1, 9))
def test_whole_items_are_the_path_tiles_once(plan, height):
    tables = laid(plan, height, whole=True)
    used = [tile for tile in range(tables.path_tiles) if tables.rows[tile, 0] >= 0]
    assert tables.items[: tables.count].tolist() == [[tile, 0] for tile in reversed(used)]
    assert len(tables.rows) == tables.path_tiles and not tables.tiles[:, Tile.BEGIN].any()


@given(plan=plans(), height=st.integers(2, 9), data=st.data())
def test_tables_of_a_larger_shape_hold_the_pass(plan, height, data):
    """Lines and depth are bounds: more of them changes no item."""
    larger = replace(plan, shape=replace(
        plan.shape, lines=plan.shape.lines + data.draw(st.integers(0, 9)),
        depth=plan.shape.depth + data.draw(st.integers(0, 9)),
    ))  # fmt: skip
    form = data.draw(st.sampled_from([form for form in FORMS if "whole" not in form]))
    tight, roomy = laid(plan, height, **form), laid(larger, height, **form)

    def work(tables):
        names = [tuple(sorted(i for i in tile if i >= 0)) for tile in tables.rows.tolist()]
        return sorted((names[tile], s) for tile, s in tables.items[: tables.count].tolist())

    assert work(tight) == work(roomy) and torch.equal(unpack(tight), unpack(roomy))


def test_rows_at_the_root():
    """A chain of one sequence and a block of another, behind wherever each has got to."""
    rows = Rows.batch([Rows.chain([1, 2, 3], 0), Rows.block(4, 3, 0, 96, sequence=2)])
    plan = PassPlan.of(rows)
    state = torch.tensor([[40, 11, 0], [0, 0, 0], [17, 12, 0]], dtype=torch.int32)
    plan, tables = replace(plan, start=state[:, 0]), tables_for(plan.shape, 4)
    lay(plan, tables, root=state[:, 1])
    assert plan.tokens.tolist() == [11, 2, 3, 12, 96, 96]
    assert plan.positions.tolist() == [40, 41, 42, 17, 18, 19]
    assert torch.equal(unpack(tables), visible(rows)) and tables.tiles[:2, Tile.END].tolist() == [43, 20]


def test_context_tiles_mix_lines():
    """33 AR rows and 24 blocks of 6: full tiles where all rows see the same keys."""
    rows = Rows.tree_with_blocks([1] * 33, [-1, *(i // 2 for i in range(32))], 5000, range(9, 33), 6, 96)
    plan = PassPlan.of(rows)
    tables = PassTables.new(plan.shape, 6000, 16, False, "cpu")
    lay(plan, tables)
    mixed = [tile for tile, _ in tables.items[: tables.count].tolist() if tile >= tables.path_tiles]
    assert len(set(mixed)) == 12 and int((tables.rows[: tables.path_tiles, 0] >= 0).sum()) > 36


def test_shapes():
    tree = Rows.tree_with_blocks([1] * 5, [-1, 0, 0, 1, 3], 9, [4, 2], 4, 96)
    assert PassShape.of(tree) == PassShape(n_rows=13, n_ar=5, lines=4, depth=7, sequences=1)
    chains = Rows.batch([Rows.chain([1] * 3, 5, 0), Rows.chain([1] * 2, 8, 3)])
    assert PassShape.of(chains) == PassShape(n_rows=5, n_ar=5, lines=2, depth=3, sequences=4)


@given(plan=plans())
def test_a_plan_read_back(plan):
    rows = plan.rows()
    assert PassPlan.of(rows).rows() == rows
    assert padded(PassPlan.of(rows), [0, len(rows) + 1]).rows() == rows


def test_which_shapes_branch():
    """Those of passes whose rows may lie on several lines of a sequence, where slots are few and many."""
    tree, deep = PassShape(64, 64, 64, 16, 1), PassShape(8, 8, 8, 8, 1)
    for shape in (tree, deep, replace(tree, sequences=64), PassShape(177, 33, 57, 14, 64)):
        assert shape.branches, shape
    for shape in (
        PassShape(1, 1, 1, 1, 1), PassShape(9, 9, 1, 9, 4), PassShape(64, 64, 64, 1, 64),
        PassShape(24, 0, 3, 8, 4), PassShape(512, 512, 16, 512, 64),
    ):  # fmt: skip
        assert not shape.branches, shape


def test_segments_of_less_than_a_page_are_not_shared():
    with pytest.raises(AssertionError, match="whole pages"):
        PassTables.new(PassShape(3, 3, 2, 2, 1), 100, 4, False, "cpu", ((0, 16),), shared=True)


def test_an_empty_pass_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        PassPlan.of(Rows([], [], [], [], [], {}))
