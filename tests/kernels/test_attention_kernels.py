"""The attention kernels: right against an fp64 softmax under `visible`, and a row's bits its own."""

from dataclasses import replace

import pytest
import test_attention as twin
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE
from paged import committed, paged
from plans import laid, moved, padded
from strategies import KINDS, hard, mixed_passes

from orthrus_kernels import PAGE, PassPlan, PassShape, PassTables, Rows, backend_ops
from orthrus_kernels import attention_triton as module
from orthrus_kernels.attention_triton import attention_triton, new_tables_triton, tile_rows, workspace_size
from orthrus_kernels.layout import Tile
from orthrus_kernels.workspace import Workspace

HEADS, GROUPS, DIM = twin.HEADS, twin.GROUPS, twin.DIM
# Of the largest output: fp32 in blocks of sums; otherwise rounded probabilities and a rounded output.
LIMIT = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
SCALE = 0.25


TRITON = backend_ops("triton")


FORMS = ("partial", "whole", "shared")  # of tables


def tables_of(rows, q, k, form="partial", capacity=None):
    """Tables on the device under test; "fused" takes partial ones."""
    whole = form == "whole"
    height = tile_rows(q.shape[1], k.shape[1], q.shape[2], q.dtype, whole)
    how = {"capacity": capacity or max(rows.positions) + 1, "shared": form == "shared"}
    return laid(rows, q.to(DEVICE), k, TRITON, tile_rows=height, whole=whole, **how)


def run(q, k, v, k_cache, v_cache, rows, form="auto", tables=None, **settings):
    """The kernel on the device it is tested on, its output on the CPU; "whole" and "shared" are forms of the
    tables. Caches [B, G, S, D], whose pages lie in any order."""
    if tables is None and form == "auto":
        tables = laid(rows, q.to(DEVICE), k, TRITON)
    elif tables is None:
        tables = tables_of(rows, q, k, form)
    args = on_device(q, k, v, *paged(k_cache, v_cache, rows.contexts))
    form = form if form in ("partial", "fused") else "auto"
    return attention_triton(*args, tables, SCALE, form=form, **settings).cpu()


def on_device(*tensors):
    return [t.to(DEVICE) for t in tensors]


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@settings(max_examples=30 if DEVICE == "cuda" else 4)
@given(rows=mixed_passes(max_start=300), seed=st.integers(0, 99), form=st.sampled_from(FORMS))
def test_against_dense_fp64_and_the_twin(dtype, rows, seed, form):
    args = twin.inputs(rows, dtype, seed=seed)
    want = twin.dense(rows, *args, SCALE)
    got = run(*args, rows, form=form)
    for other in (want, twin.attention(*args, rows, SCALE).double()):
        assert ((got.double() - other).abs().max() / want.abs().max()).item() < LIMIT[dtype]


@settings(max_examples=8)
@given(rows=mixed_passes(max_start=300), dtype=st.sampled_from(list(LIMIT)[::2]), kind=st.sampled_from(KINDS))
def test_all_forms_give_the_same_bits(rows, dtype, kind):
    args = twin.inputs(rows, dtype, kind)
    want = run(*args, rows, form="partial")
    for form in FORMS[1:]:
        assert torch.equal(run(*args, rows, form=form), want)


# Around the edges of pages and of key segments.
ENDS = (0, 1, 63, 64, 65, 127, 128, 250, 255, 256, 257, 319, 320, 321, 511, 1023, 1024, 1025, 1087, 1088)


@st.composite
def branching(draw) -> Rows:
    """Up to three sequences, each on a context of ENDS: a tree with blocks, a deep one that crosses pages or
    a cut, a row or a chain, or a block alone."""
    passes = []
    for s in draw(st.permutations(range(4)))[: draw(st.integers(1, 3))]:
        kind, start = draw(st.sampled_from(["tree", "deep", "chain", "block"])), draw(st.sampled_from(ENDS))
        if kind == "tree":
            passes.append(moved(draw(mixed_passes(s)), start))
        elif kind == "deep":
            trunk, twigs = draw(st.integers(20, 90)), draw(st.lists(st.integers(0, 19), max_size=4))
            parents = [*range(-1, trunk), *twigs]
            passes.append(Rows.tree_with_blocks([1] * len(parents), parents, start, [trunk], 3, 96, s))
        elif kind == "chain":
            passes.append(Rows.chain([1] * draw(st.integers(1, 3) | st.integers(60, 80)), start, s))
        else:
            passes.append(Rows.block(1, draw(st.integers(2, 9)), start, 96, s))
    return Rows.batch(passes)


@settings(max_examples=200 if DEVICE == "cuda" else 12)
@given(
    rows=branching(),
    dtype=st.sampled_from(list(LIMIT)[::2]),
    kind=st.sampled_from(KINDS),
    programs=st.integers(1, 9),
)
def test_whole_pages_of_the_context_are_shared(rows, dtype, kind, programs):
    """Tiles of all rows of a sequence take them, path tiles go on from the states: the bits of the partial
    form, out of memory full of NaN."""
    args = twin.inputs(rows, dtype, kind, room=0)
    tables = tables_of(rows, *args[:2], "shared", max(rows.positions) + 300)
    space = torch.full((workspace_size(tables, HEADS, DIM),), float("nan"), device=DEVICE)
    got = run(*args, rows, tables=tables, workspace=space, programs=programs)
    assert torch.equal(got, run(*args, rows, "partial"))
    if kind == "normal":
        want = twin.dense(rows, *args, SCALE)
        assert ((got.double() - want).abs().max() / want.abs().max()).item() < LIMIT[dtype]


@pytest.mark.parametrize("tall", [False, True])
def test_path_tiles_read_the_last_page_alone(tall, monkeypatch):
    """Between the two launches all whole pages of the context become NaN; context tiles may be as tall as
    Gluon's, twice as tall as path tiles."""
    rows = Rows.tree_with_blocks([1] * 9, [-1, 0, 0, 1, 1, 3, 2, 5, 7], 330, [2, 5], 4, 96)
    q, k, v, *caches = twin.inputs(rows, torch.bfloat16, room=0)
    want = run(q, k, v, *caches, rows, "partial")
    short, height = (tile_rows(HEADS, GROUPS, DIM, torch.bfloat16, of) for of in (False, tall))
    how = {"tile_rows": height, "path_rows": short, "whole": False, "shared": True}
    tables = laid(rows, q.to(DEVICE), k, TRITON, **how)
    q, k, v, k_cache, v_cache, pages = on_device(q, k, v, *paged(*caches, rows.contexts))
    go_on = module.go_on

    def without_pages(*given):
        for cache in (k_cache, v_cache):
            cache[pages[0, : 330 // PAGE].long()] = float("nan")
        go_on(*given)

    monkeypatch.setattr(module, "go_on", without_pages)
    monkeypatch.setattr(module, "_check", lambda *given: None)  # of heights
    assert torch.equal(attention_triton(q, k, v, k_cache, v_cache, pages, tables, SCALE).cpu(), want)
    assert k_cache[pages[0, 4].long()].isnan().all()


@pytest.mark.parametrize("block", [16, 64])
@settings(max_examples=20 if DEVICE == "cuda" else 3)
@given(rows=mixed_passes(max_start=300), form=st.sampled_from(FORMS))
def test_where_pages_lie_changes_no_bit(block, rows, form):
    """One behind the other, or in any order among foreign pages, which hold NaN; a page is a block of keys,
    or several."""
    q, k, v, *caches = twin.inputs(rows, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DEFAULT_LAUNCH", (64, block, 4, 2))
        tables = tables_of(rows, q, k, form)
        apart = on_device(q, k, v, *paged(*caches, rows.contexts, shuffled=False))
        want = attention_triton(*apart, tables, SCALE).cpu()
        assert torch.equal(run(q, k, v, *caches, rows, tables=tables), want)
    assert ((want - twin.attention(q, k, v, *caches, rows, SCALE)).abs().max() / want.abs().max()) < 1.5e-2


@settings(max_examples=30 if DEVICE == "cuda" else 4)
@given(st.data())
def test_several_sequences_in_one_pass(data):
    """Beside rows of another sequence, in a batch slot of its own, a row has the bits it has alone."""
    alone = [data.draw(mixed_passes(sequence=s, max_start=270)) for s in range(2)]
    rows = Rows.batch(alone)
    args = twin.inputs(rows, torch.bfloat16, room=64)
    got = run(*args, rows)
    for s, single in enumerate(alone):
        mine = [i for i in range(len(rows)) if rows.sequences[i] == s]
        assert torch.equal(got[mine], run(*(a[mine] for a in args[:3]), *args[3:], single))


@settings(max_examples=12)
@given(
    rows=mixed_passes(max_start=270),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kind=st.sampled_from(KINDS),
    data=st.data(),
)
def test_tree_node_equals_decoding_its_path_alone(rows, dtype, kind, data):
    """Commit a node's ancestors and run it as the only row: the bits it has inside the pass."""
    q, k, v, k_cache, v_cache = twin.inputs(rows, dtype, kind)
    node = data.draw(st.integers(0, rows.n_ar - 1))
    inside = run(q, k, v, k_cache, v_cache, rows)[node]
    above, start = rows.ancestors(node), rows.contexts[0]
    caches = committed(k_cache, v_cache, k, v, above, start)
    alone = Rows.chain([1], start + len(above))
    assert torch.equal(run(q[[node]], k[[node]], v[[node]], *caches, alone)[0], inside)


@settings(max_examples=8)
@given(
    rows=mixed_passes(max_start=270).filter(lambda rows: rows.n_ar < len(rows)),
    kind=st.sampled_from(KINDS),
    data=st.data(),
)
def test_block_equals_drafting_it_alone(rows, kind, data):
    """Commit the strict ancestors of a block's anchor and run the block alone: the bits of the mixed pass."""
    q, k, v, k_cache, v_cache = twin.inputs(rows, torch.bfloat16, kind)
    block = data.draw(st.integers(0, rows.blocks[-1]))
    mine = [i for i, b in enumerate(rows.blocks) if b == block]
    inside = run(q, k, v, k_cache, v_cache, rows)[mine]
    above, start = rows.ancestors(mine[0]), rows.contexts[0]
    caches = committed(k_cache, v_cache, k, v, above, start)
    alone = Rows.block(1, len(mine), start + len(above), 96)
    assert torch.equal(run(q[mine], k[mine], v[mine], *caches, alone), inside)


def row_after_split(q, k, v, row, cached, extra=3, form="auto"):
    """Output of `row` when positions below `cached` are committed and a chain from there is in flight."""
    total = len(q)
    k_cache, v_cache = (k.new_full((1, k.shape[1], total, k.shape[2]), float("nan")) for _ in "kv")
    k_cache[0, :, :cached], v_cache[0, :, :cached] = k[:cached].transpose(0, 1), v[:cached].transpose(0, 1)
    flight = slice(cached, min(row + 1 + extra, total))
    chain = Rows.chain([1] * len(q[flight]), cached)
    return run(q[flight], k[flight], v[flight], k_cache, v_cache, chain, form=form)[row - cached]


CONTEXTS = (0, 1, 127, 128, 255, 256, 257)


# the order of sums, which inputs of every kind are for, is a GPU's: the interpreter takes each context once
@pytest.mark.parametrize(
    ("context", "kind"),
    [(c, kind) for i, c in enumerate(CONTEXTS) for kind in (KINDS if DEVICE == "cuda" else [KINDS[i % 3]])],
)
def test_row_bits_do_not_depend_on_the_split(context, kind):
    """A row alone on its context, or with 1, 9, 40 of those keys still in flight."""
    dtype, total = torch.bfloat16, context + 40
    q = hard(kind, total, HEADS, DIM, seed=7).to(dtype)
    k, v = (hard(kind, total, GROUPS, DIM, seed=s).to(dtype) for s in (8, 9))
    for row in (context, context + 35):
        alone = row_after_split(q, k, v, row, row, extra=0)
        for cached in {max(row - 1, 0), max(row - 9, 0), max(row - 40, 0)}:
            assert torch.equal(row_after_split(q, k, v, row, cached), alone), (row, cached)


@pytest.mark.parametrize("row", [1023, 1024, 4095, 4096])
def test_row_bits_across_the_wider_cuts(row):
    """Where segments grow wider, one key head: alone, and with 5 keys in flight in both forms."""
    q = hard("normal", row + 1, 2, DIM, seed=1)
    k, v = (hard("normal", row + 1, 1, DIM, seed=s) for s in (2, 3))
    alone = row_after_split(q, k, v, row, row)
    for form in ("partial", "fused", "whole"):
        assert torch.equal(row_after_split(q, k, v, row, row - 5, form=form), alone)


@pytest.mark.parametrize("heads, groups", [(5, 1), (8, 8), (16, 2)])
def test_other_head_groupings_and_split_qkv(heads, groups):
    """A group that does not divide the tile, none, 8 to one; q, k, v as views of one projection."""
    rows = Rows.tree_with_blocks([1] * 9, [-1, 0, 0, 1, 1, 3, 2, 5, 7], 130, [2, 5], 4, 96)
    qkv = hard("normal", len(rows), heads + 2 * groups, DIM).bfloat16()
    q, k, v = qkv.split([heads, groups, groups], 1)
    k_cache, v_cache = (hard("normal", 1, groups, 140, DIM, seed=s).bfloat16() for s in (1, 2))
    got, want = run(q, k, v, k_cache, v_cache, rows), twin.attention(q, k, v, k_cache, v_cache, rows, SCALE)
    assert ((got - want).abs().max() / want.abs().max()).item() < LIMIT[torch.bfloat16]
    for node in (0, 8):
        above = rows.ancestors(node)
        caches = committed(k_cache, v_cache, k, v, above, 130)
        alone = Rows.chain([1], 130 + len(above))
        part = run(q[[node]], k[[node]], v[[node]], *caches, alone)[0]
        assert torch.equal(part, got[node])


def gathered(tables):
    """The same tables, the chains in flight left unsaid: every key of them goes through its slot."""
    tiles = tables.tiles.clone()
    tiles[:, Tile.CHAIN] = 2**30
    return replace(tables, tiles=tiles)


@pytest.mark.parametrize(
    "dtype, context", [(torch.bfloat16, c) for c in (0, 101, 250)] + [(torch.float32, 64)]
)
def test_chain_in_place_equals_the_gathered_one(dtype, context):
    """A prompt of several key blocks, in both forms and tile heights: from no context, from a block's edge,
    from inside one, and across a segment's end. One key head, which is cheaper.
    """
    rows = Rows.chain([1] * 140, context)
    q, k, v, k_cache, v_cache = twin.inputs(rows, dtype, "heavy", room=0)
    args = q[:, :2], k[:, :1], v[:, :1], k_cache[:, :1], v_cache[:, :1], rows
    tables = tables_of(rows, *args[:2])
    line = tables.tiles[0].tolist()
    assert [line[c] for c in (Tile.CHAIN, Tile.CHAIN_ROW, Tile.LOWEST)] == [context, 0, context + 1], (
        "a chain from its first row on"
    )
    want = run(*args, "partial", gathered(tables))
    assert torch.equal(run(*args, "partial", tables), want)
    assert torch.equal(run(*args, "whole"), want)


def test_chain_in_place_is_what_is_read():
    """With a wrong row for the chain's start the output changes: the tests above reach that path."""
    rows = Rows.chain([1] * 130, 10)
    args = *twin.inputs(rows, torch.bfloat16), rows
    tables = tables_of(rows, *args[:2])
    tiles = tables.tiles.clone()
    tiles[:, Tile.CHAIN_ROW] += 1
    got = run(*args, "partial", replace(tables, tiles=tiles))
    same = (got == run(*args, "partial", tables)).flatten(1).all(1)
    assert same[:96].all() and not same[-1], "one block of the chain is seen whole, by the last tile alone"


def test_tables_of_another_height_are_refused():
    rows = Rows.chain([1] * 5, 9)
    q, k, *_ = args = *twin.inputs(rows, torch.bfloat16), rows
    height = tile_rows(HEADS, GROUPS, DIM, torch.bfloat16)
    assert tile_rows(HEADS, GROUPS, DIM, torch.bfloat16, whole=True) == module.TALL * height
    for whole, wrong in ((False, module.TALL * height), (True, height)):
        tables = laid(rows, q.to(DEVICE), k, TRITON, tile_rows=wrong, whole=whole)
        with pytest.raises(AssertionError):
            run(*args, tables=tables)


@settings(max_examples=12)
@given(
    rows=mixed_passes(max_start=270), kind=st.sampled_from(KINDS), programs=st.integers(1, 9),
    extra=st.integers(0, 900), places=st.lists(st.integers(0, 30), max_size=3), shared=st.booleans(),
)  # fmt: skip
def test_a_rows_bits_depend_on_neither_programs_nor_padding_nor_capacity(
    rows, kind, programs, extra, places, shared
):
    """Few programs take many items each, rows of padding are in no tile and get zeros, and items behind the
    count, which name tiles and segments that there are none of, are not read."""
    q, k, v, k_cache, v_cache = args = twin.inputs(rows, torch.bfloat16, kind)
    want = run(*args, rows, "partial")
    plan = padded(PassPlan.of(rows), places)
    used = (plan.sequences >= 0).nonzero().flatten()
    wide = [t.new_full((plan.shape.n_rows, *t.shape[1:]), float("nan")) for t in (q, k, v)]
    for t, of in zip(wide, (q, k, v), strict=True):
        t[used] = of
    height = tile_rows(HEADS, GROUPS, DIM, torch.bfloat16)
    capacity = max(rows.positions) + 1 + extra
    tables = PassTables.new(plan.shape, capacity, height, False, DEVICE, shared=shared)
    tables.items.fill_(2**30)
    TRITON.lay(plan.on(DEVICE), tables)
    got = run(*wide, k_cache, v_cache, rows, "partial", tables, programs=programs)
    assert torch.equal(got[used], want)
    assert torch.equal(got[plan.sequences < 0], torch.zeros(len(got) - len(used), HEADS, DIM).bfloat16())


@pytest.fixture
def arrivals(monkeypatch):
    """Counters of a workspace of the test's own, to be read after a launch."""
    space = Workspace.new(torch.device(DEVICE), 1, 64)
    monkeypatch.setattr(module, "shared_workspace", lambda device: space)
    return space.counters


@pytest.mark.parametrize("context", [0, 256, 1100])
@pytest.mark.parametrize("dtype, n", [(torch.bfloat16, 1), (torch.bfloat16, 7), (torch.float32, 2)])
def test_the_last_program_folds_as_the_combine_does(dtype, n, context, arrivals):
    """Fused: the same bits from partials in poisoned memory, and arrivals back at zero."""
    rows = Rows.chain([1] * n, context)
    args = *twin.inputs(rows, dtype, "heavy"), rows
    tables = tables_of(rows, *args[:2], capacity=context + 600)
    want = run(*args, "partial", tables)
    space = torch.full((workspace_size(tables, HEADS, DIM),), float("nan"), device=DEVICE)
    for programs in (module.PROGRAMS, 2 * GROUPS, 1):
        poisoned = space.fill_(float("nan"))
        got = run(*args, "fused", tables, workspace=poisoned, programs=programs)
        assert torch.equal(got, want) and not arrivals.any()


def test_fused_rows_of_a_block_and_odd_groups(arrivals):
    """A diffusion block; 5 query heads to a key head, whose fold has spare places; a strided output."""
    rows = Rows.block(1, 3, 530, 96)
    q, k, v, k_cache, v_cache = (t.to(DEVICE) for t in twin.inputs(rows, torch.bfloat16, "massive"))
    q = hard("heavy", 3, 5, DIM).bfloat16().to(DEVICE)
    args = q, k[:, :1], v[:, :1], *paged(k_cache[:, :1], v_cache[:, :1], rows.contexts)
    args = *args, tables_of(rows, *args[:2]), SCALE
    out = torch.full((3, 8, DIM), 7.0, dtype=torch.bfloat16, device=DEVICE)
    attention_triton(*args, out=out[:, 1:6], form="fused")
    assert torch.equal(out[:, 1:6], attention_triton(*args, form="partial"))
    assert (out[:, 0] == 7).all() and (out[:, 6:] == 7).all()


def test_an_item_that_does_not_arrive_leaves_the_output_alone(arrivals):
    """The fold waits for every segment: with an arrival less nobody folds."""
    rows = Rows.chain([1], 600)
    q, k, v, *caches = twin.inputs(rows)
    tables = tables_of(rows, q, k)
    arrivals[:GROUPS] = -1
    out = torch.full_like(q, 7.0, device=DEVICE)
    attention_triton(*on_device(q, k, v, *paged(*caches)), tables, SCALE, out=out, form="fused")
    assert (out == 7).all() and (arrivals[:GROUPS] == tables.n_segments - 1).all()


def test_blocks_on_long_paths_read_their_chain_in_place():
    """Diffusion blocks of 70 rows at two nodes of a tree whose trunk is longer than a key block: their own
    rows are a chain; the block alone after its ancestors' commit has the same bits.
    """
    parents = [*range(-1, 79), 40]
    rows = Rows.tree_with_blocks([1] * 81, parents, 33, [79, 80], 70, 96)
    q, k, v, k_cache, v_cache = twin.inputs(rows, torch.bfloat16, "heavy", room=160)
    q, k, v, k_cache, v_cache = q[:, :2], k[:, :1], v[:, :1], k_cache[:, :1], v_cache[:, :1]
    tables = tables_of(rows, q, k)
    got = run(q, k, v, k_cache, v_cache, rows, "partial", tables)
    assert torch.equal(run(q, k, v, k_cache, v_cache, rows, "partial", gathered(tables)), got)
    for block in range(2):
        mine = [i for i, b in enumerate(rows.blocks) if b == block]
        above = rows.ancestors(mine[0])
        caches = committed(k_cache, v_cache, k, v, above, 33)
        alone = Rows.block(1, 70, 33 + len(above), 96)
        assert torch.equal(run(q[mine], k[mine], v[mine], *caches, alone), got[mine])


def test_tables_workspace_and_output_of_a_captured_pass():
    """Tables made once, memory given."""
    rows = Rows.tree([1] * 5, [-1, 0, 0, 1, 3], 300)
    q, k, v, *caches = twin.inputs(rows)
    tables = tables_of(rows, q, k)
    space = torch.full((workspace_size(tables, HEADS, DIM),), float("nan"), device=DEVICE)
    out = torch.empty_like(q, device=DEVICE)
    args = on_device(q, k, v, *paged(*caches))
    got = attention_triton(*args, tables, SCALE, out=out, workspace=space)
    assert got is out and torch.equal(got.cpu(), run(q, k, v, *caches, rows))


def form_of(shape, capacity, dtype=torch.bfloat16):
    """(tile height, form) that a pass of Qwen3-8B's heads takes."""
    tables = new_tables_triton(shape, capacity, 32, 8, 128, dtype, "meta")
    of_tables = "whole" if tables.whole else "shared" if tables.shared else ""
    return tables.tile_rows, of_tables or module.form_of(tables, 4, 128)


def test_the_form_of_a_pass():
    for shape, capacity, form in (
        (chain(1), 256, (16, "fused")), (chain(1), 40960, (16, "fused")),
        (chain(4), 1024, (16, "fused")), (chain(4), 40960, (16, "partial")),
        (chain(5), 256, (16, "partial")), (PassShape(3, 3, 2, 2, 1), 256, (16, "shared")),
        (PassShape(2, 2, 2, 1, 2), 256, (16, "partial")),
        (chain(128), 40000, (16, "partial")), (chain(129), 256, (32, "whole")),
        (PassShape(512, 512, 512, 30, 1), 4096, (16, "shared")),
        (PassShape(512, 512, 4, 512, 4), 4096, (32, "whole")),
        (PassShape(304, 304, 64, 256, 64), 4096, (16, "shared")),  # prompts beside texts that decode
        (PassShape(64, 64, 64, 1, 64), 4096, (16, "partial")),
        (PassShape(64, 64, 8, 8, 8), 4096, (16, "partial")),
    ):  # fmt: skip
        assert form_of(shape, capacity) == form, (shape, capacity)
    assert form_of(chain(600), 1024, torch.float32) == (4, "partial"), "products of fp32 have no tall tile"


def chain(n: int) -> PassShape:
    return PassShape(n, n, 1, n, 1)


def test_fused_is_for_one_path_tile():
    rows = Rows.tree([1] * 3, [-1, 0, 0], 10)
    with pytest.raises(AssertionError, match="one path tile"):
        run(*twin.inputs(rows), rows, "fused")


def test_partials_in_flight_do_not_touch_the_bits(monkeypatch):
    rows = Rows.chain([1] * 4, 600)
    args = twin.inputs(rows, torch.bfloat16, "heavy")
    want = run(*args, rows, form="partial")
    monkeypatch.setattr(module, "COMBINE_UNROLL", 8)
    monkeypatch.setattr(module, "FUSED_UNROLL", 16)
    monkeypatch.setattr(module, "PATH_NUMBERS", 16)
    for form in ("partial", "fused", "shared"):
        assert torch.equal(run(*args, rows, form=form), want)


def test_what_does_not_fit_is_refused():
    rows = Rows.chain([1, 2], 3)
    q, k, v, *caches = on_device(*twin.inputs(rows))
    pools, tables = paged(*caches), tables_of(rows, q, k)
    with pytest.raises(AssertionError):
        attention_triton(q, k, v, *pools, tables_of(Rows.chain([1], 3), q, k), SCALE)
    with pytest.raises(AssertionError):
        attention_triton(q, k, v, *pools, tables, -1.0)
    with pytest.raises(AssertionError):
        attention_triton(q, k.bfloat16(), v, *pools, tables, SCALE)
    with pytest.raises(AssertionError, match="laid out alike"):
        attention_triton(q, k, v.transpose(0, 1).contiguous().transpose(0, 1), *pools, tables, SCALE)
    with pytest.raises(AssertionError):
        attention_triton(q, k, v, *caches, pools[2], tables, SCALE)


def test_a_block_of_keys_lies_in_one_page(monkeypatch):
    assert all(PAGE % block == 0 for _, block, *_ in [*module.LAUNCH.values(), module.DEFAULT_LAUNCH])
    monkeypatch.setattr(module, "DEFAULT_LAUNCH", (64, 128, 4, 2))
    rows = Rows.chain([1], 3)
    with pytest.raises(AssertionError, match="two pages"):
        run(*twin.inputs(rows), rows)
