"""The linear kernel: right against fp64, and the same bits for a row in every form, tile and company."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, examples, given_rows
from limits import assert_close
from strategies import KINDS, hard

from orthrus_kernels import tables
from orthrus_kernels.descriptors import describable, described
from orthrus_kernels.embedding import embedding_triton
from orthrus_kernels.linear import linear_triton
from orthrus_kernels.linear_swiglu import linear_swiglu_triton, swiglu_entry
from orthrus_kernels.rows import SPARE_ROWS, new_rows
from orthrus_kernels.swiglu import swiglu_triton
from orthrus_kernels.tables import LinearEntry, LinearTile
from orthrus_kernels.weight import Weight
from orthrus_kernels.workspace import Workspace

# K = 200 in segments of 3, 3 and 1 blocks, the last block ragged; few rows split, many one after another.
TILES = (
    LinearTile(4, 16, 64, True, 4, 3),
    LinearTile(40, 32, 128, True, 4, 3),
    LinearTile(None, 64, 64, False, 4, 3),
)
ENTRY = LinearEntry(32, 3, TILES)
# The same class through descriptors; 48 and 96 rows are a dot of 32 or 64 and one of half of that.
TMA = LinearEntry(
    32,
    3,
    (
        LinearTile(4, 16, 64, True, 4, 3, tma=True),
        LinearTile(50, 48, 128, True, 4, 3, tma=True),
        LinearTile(None, 96, 64, False, 4, 3, tma=True),
    ),
)
N, K = 70, 200


def weights(dtype, device):
    return tuple(Weight(hard("normal", N, K, seed=s).to(device, dtype)) for s in (1, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [3, 37, 70])
@pytest.mark.parametrize("entry", [ENTRY, TMA], ids=["pointers", "tma"])
def test_against_fp64(entry, rows, kind, dtype, device):
    x, (w, w2) = given_rows(kind, rows, K, dtype=dtype, device=device), weights(dtype, device)
    assert_close(linear_triton(x, w, entry=entry), x.double() @ w.dense().double().T)
    mixed = torch.cat([x[:2].double() @ w.dense().double().T, x[2:].double() @ w2.dense().double().T])
    got = linear_triton(x, w, w2, 2, torch.float32, entry=entry)
    assert_close(got, mixed)


@pytest.mark.parametrize("n,k", [(1, 1), (33, 17), (129, 704), (64, 1100)])
def test_odd_sizes_with_the_table(n, k, device):
    x, w = hard("normal", 5, k).to(device), Weight(hard("normal", n, k, seed=1).to(device))
    assert_close(linear_triton(x, w), x.double() @ w.dense().double().T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(12)
@given(rows=st.integers(2, 70), index=st.integers(0, 69), kind=st.sampled_from(KINDS), seed=st.integers(0, 9))
def test_a_row_has_the_same_bits_anywhere(dtype, device, rows, index, kind, seed):
    """Alone in the split form by pointers, and among rows of any form, of either view, by either copy."""
    index %= rows
    x, (w, w2) = given_rows(kind, rows, K, dtype=dtype, device=device, seed=seed), weights(dtype, device)
    one = x[index : index + 1]
    alone, alone2 = linear_triton(one, w, entry=ENTRY)[0], linear_triton(one, w2, entry=ENTRY)[0]
    for entry in (ENTRY, TMA):
        assert torch.equal(linear_triton(one, w, entry=entry)[0], alone)
        assert torch.equal(linear_triton(x, w, entry=entry)[index], alone)
        assert torch.equal(linear_triton(x, w, w2, index, entry=entry)[index], alone2)
        assert torch.equal(linear_triton(x, w, w2, index + 1, entry=entry)[index], alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(8)
@given(rows=st.integers(1, 130), block_t=st.sampled_from([16, 48, 64, 96, 128]), split=st.booleans(),
       block_n=st.sampled_from([32, 64, 128]), tma=st.booleans(), warps=st.sampled_from([4, 8]),
       n_ar=st.integers(0, 130))  # fmt: skip
def test_any_tile_gives_the_same_bits(dtype, device, rows, block_t, split, block_n, tma, warps, n_ar):
    """Every tile a table could hold, for every number of rows of both views."""
    tma |= block_t % 3 == 0
    tile = LinearTile(None, block_t, block_n, split, warps, 3, tma)
    x, (w, w2) = given_rows("heavy", rows, K, dtype=dtype, device=device), weights(dtype, device)
    n_ar = min(n_ar, rows)
    got = linear_triton(x, w, w2, n_ar, entry=replace(ENTRY, tiles=(tile,)))
    assert torch.equal(got, linear_triton(x, w, w2, n_ar, entry=ENTRY))


def test_operands_that_descriptors_do_not_take_go_by_pointers(device):
    """Rows that start at odd addresses: the same bits from the next narrower tile of a power of two."""
    x, (w, _) = hard("heavy", 70, K).to(device), weights(torch.float32, device)
    wide = torch.zeros(70, K + 1, device=device)[:, 1:]
    wide.copy_(x)
    assert torch.equal(linear_triton(wide, w, entry=TMA), linear_triton(x, w, entry=TMA))
    repeated = x[:1].expand(70, K)  # rows in one place
    assert not describable((repeated, 0))
    assert torch.equal(linear_triton(repeated, w, entry=TMA), linear_triton(repeated.clone(), w, entry=TMA))


def test_a_wide_tile_without_descriptors_is_refused(device):
    x, (w, _) = hard("normal", 3, K).to(device), weights(torch.float32, device)
    with pytest.raises(AssertionError):
        linear_triton(x, w, entry=LinearEntry(32, 3, (LinearTile(None, 48, 64, False, 4, 3),)))


def entries():
    """The committed entries, and the defaults of every number of segments."""
    committed = [pytest.param(e, dtype, id=f"{n}x{k}-{dtype}-{device}")
                 for (n, k, dtype, device), e in tables.linear_entries().items()]  # fmt: skip
    shapes = [(16384, 4096), (6144, 4096), (4096, 4096), (512, 4096)]
    return committed + [
        pytest.param(tables.default_entry(n, k, dtype, of), dtype, id=f"default-{n}x{k}-{dtype}-{of}")
        for n, k in shapes
        for dtype, of in ((torch.float32, ""), (torch.bfloat16, ""), (torch.bfloat16, "sm_90"))
    ]


def test_the_defaults_have_every_number_of_segments():
    assert {entry.values[0].segments for entry in entries()} >= {1, 2, 4, 8}


@pytest.mark.parametrize("entry,dtype", entries())
def test_every_tile_of_an_entry_gives_the_same_bits(entry, dtype, device):
    """On a small weight: a row's bits depend on the reduction class, which the sizes here keep."""
    k = entry.block_k * entry.segments + 24
    x, w = hard("heavy", 130, k).to(device, dtype), Weight(hard("normal", 70, k, seed=1).to(device, dtype))
    alone = linear_triton(x[:1], w, entry=entry)
    for tile in entry.tiles:
        for rows in {1, min(tile.rows or 130, 130)}:
            one_tile = replace(entry, tiles=(replace(tile, rows=None),))
            assert torch.equal(linear_triton(x[:rows], w, entry=one_tile)[:1], alone), (tile, rows)
            assert torch.equal(linear_triton(x[:rows], w, entry=entry)[:1], alone), (tile, rows)


def test_the_number_of_segments_is_part_of_the_class(device):
    """Another cut of K gives other bits: the equalities above can fail."""
    x, (w, _) = hard("heavy", 8, K).to(device), weights(torch.float32, device)
    other = replace(ENTRY, segments=2)
    assert not torch.equal(linear_triton(x, w, entry=ENTRY), linear_triton(x, w, entry=other))


@pytest.mark.parametrize("rows", [3, 37, 70])
@pytest.mark.parametrize("entry", [ENTRY, TMA], ids=["pointers", "tma"])
def test_reads_and_writes_nothing_else(entry, rows, device):
    """Operands are slices of NaN buffers; neighbours of the output stay NaN, counters return to zero."""
    nan = float("nan")
    x, w, w2, y = (torch.full((n + 7, k + 8 + k % 4), nan, device=device)[3 : n + 3, 4 : k + 4]
                   for n, k in ((rows, K), (N, K), (N, K), (rows, N)))  # fmt: skip
    x.copy_(hard("normal", rows, K))
    w.copy_(hard("normal", N, K, seed=1))
    w2.copy_(hard("normal", N, K, seed=2))
    w, w2 = Weight(w), Weight(w2)
    space = Workspace.new(device, 1 << 16, 64)
    space.partials.fill_(nan)
    n_ar = rows // 2
    assert linear_triton(x, w, w2, n_ar, out=y, entry=entry, space=space) is y
    exact = torch.cat([x[:n_ar].double() @ w.dense().double().T, x[n_ar:].double() @ w2.dense().double().T])
    assert_close(y, exact)
    whole = y._base
    assert whole.isnan().sum() == whole.numel() - y.numel()
    assert not space.counters.any()


@pytest.mark.parametrize("rows, n_ar", [(3, 0), (37, 20), (70, 70)])
def test_memory_behind_an_operand_changes_no_bits(rows, n_ar, device):
    """Tiles by descriptors read on behind x where there is memory, whatever it holds, and end with x else."""
    x, (w, w2) = hard("heavy", rows, K).to(device), weights(torch.float32, device)
    followed = new_rows(x, rows, K)
    followed._base.fill_(float("nan"))
    followed.copy_(x)
    got = linear_triton(followed, w, w2, n_ar, entry=TMA)
    assert torch.equal(got, linear_triton(x, w, w2, n_ar, entry=TMA))


def test_descriptors_end_with_memory(device):
    """Never behind it, and no row that it holds in part."""
    of = torch.zeros(10 * 64, device=device).view(10, 64)
    strided = torch.zeros(640, device=device).as_strided((5, 16), (64, 1), 8)
    cut = torch.zeros(9 * 64 + 63, device=device).as_strided((4, 64), (64, 1))
    for matrix, rows in [
        (of, 10), (of[:4], 10), (of[4:6], 6), (of[:4, 32:], 10), (strided, 10), (cut, 9),
        (new_rows(of, 3, 64), 3 + SPARE_ROWS), (torch.zeros(3 * SPARE_ROWS, 64)[:5], 5 + SPARE_ROWS),
    ]:  # fmt: skip
        assert list(described(matrix, 64, 16, 16).shape) == [rows, matrix.shape[1]]
        end = matrix.storage_offset() + (rows - 1) * 64 + matrix.shape[1]
        assert end <= matrix.untyped_storage().nbytes() // matrix.element_size()


def test_memory_goes_on_by_the_tallest_tile():
    """A tile begins at one of x's rows, so it ends that far behind them at most."""
    linears = [*tables.linear_entries().values(), *(entry.values[0] for entry in entries())]
    fused = [swiglu_entry(n, k, torch.bfloat16, "sm_90") for n, k, *_ in tables.linear_entries()]
    assert max(tile.block_t for entry in linears + fused for tile in entry.tiles) <= SPARE_ROWS


def room_behind(x):
    """Rows that x's memory holds behind it."""
    return (x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()) // x.stride(0) - len(x)


@pytest.mark.parametrize("rows", [5, 130], ids=["fused", "two kernels"])
def test_outputs_have_memory_behind_them(rows, device):
    """Of what may stand in front of a linear; whole passes: test_model_kernels.py."""
    x, w = hard("normal", rows, 32).to(device), Weight(hard("normal", 64, 32, seed=1).to(device))
    for out in (
        swiglu_triton(x),
        linear_swiglu_triton(x, w),
        embedding_triton(x, torch.arange(rows - 1, device=device)),
    ):
        assert room_behind(out) == SPARE_ROWS


def test_a_full_workspace_changes_no_bits(device):
    x, (w, _) = hard("heavy", 4, K).to(device), weights(torch.float32, device)
    small = Workspace.new(device, 16, 1)
    assert torch.equal(linear_triton(x, w, entry=ENTRY, space=small), linear_triton(x, w, entry=ENTRY))


@pytest.mark.parametrize("n_ar", [0, 1, 30, 50, 69, 70])
def test_views_apart_give_the_same_bits(n_ar, device):
    """One launch a view from 45 rows of one on: each takes its own tile."""
    x, (w, w2) = hard("heavy", 70, K).to(device), weights(torch.float32, device)
    out = torch.full((70, N), float("nan"), device=device)
    got = linear_triton(x, w, w2, n_ar, out=out, entry=replace(TMA, apart=44))
    assert got is out
    assert torch.equal(got, linear_triton(x, w, w2, n_ar, entry=TMA))


def test_no_rows_and_one_view(device):
    x, (w, w2) = hard("normal", 3, K).to(device), weights(torch.float32, device)
    assert linear_triton(x[:0], w).shape == (0, N)
    assert torch.equal(linear_triton(x, w, w2, 3, entry=ENTRY), linear_triton(x, w, entry=ENTRY))
    assert torch.equal(linear_triton(x, w, w2, 0, entry=ENTRY), linear_triton(x, w2, entry=ENTRY))


def test_refuses_what_does_not_fit(device):
    x, (w, _) = hard("normal", 3, K).to(device), weights(torch.float32, device)
    with pytest.raises(ValueError, match="do not fit together"):
        linear_triton(x[:, 1:], w)
    with pytest.raises(AssertionError):
        linear_triton(x, Weight(w.dense().bfloat16()))
    with pytest.raises(AssertionError):
        Weight(w.dense().T.contiguous().T)
