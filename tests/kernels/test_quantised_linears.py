"""Linears and fused projections of quantised weights: right against fp64 and the twin, every code exact, and
the same bits for a row in every form, tile and company."""

import sys
from dataclasses import replace

import pytest
import torch
from codes import SCHEMES, Coding, exact, fold, name_of, numbers_of, random_weight
from hypothesis import example, given
from hypothesis import strategies as st
from inputs import examples, given_rows
from limits import assert_close
from strategies import KINDS, hard

from orthrus_kernels import Weight, backend_ops, tables
from orthrus_kernels.linear import linear, linear_triton
from orthrus_kernels.linear_swiglu import linear_swiglu, linear_swiglu_triton, swiglu_entry
from orthrus_kernels.quantised import Format, QuantisedWeight
from orthrus_kernels.quantised_triton import groups_at_once
from orthrus_kernels.swiglu import swiglu_triton
from orthrus_kernels.tables import LinearEntry, LinearTile
from orthrus_kernels.workspace import Workspace

BF16 = torch.bfloat16
N, SEGMENTS = 70, 3  # ragged in every tile


def width(scheme) -> int:
    """Columns of a weight: 11 groups of 64 as in the embedded checkpoint, or 7 others; the last segment is
    shorter."""
    return 704 if scheme[1] == 64 else 7 * scheme[1]


def entry(scheme, *tiles: LinearTile) -> LinearEntry:
    """Few rows split, many one after another."""
    few, some = LinearTile(4, 16, 64, True, 4, 3), LinearTile(40, 32, 128, True, 4, 3)
    return LinearEntry(scheme[1], SEGMENTS, tiles or (few, some, LinearTile(None, 64, 64, False, 4, 3)))


def weights(scheme, device, n: int = N):
    return tuple(random_weight(scheme, n, width(scheme), device, seed) for seed in (1, 2))


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
@pytest.mark.parametrize("rows", [3, 37, 70])
def test_against_fp64_and_the_twin(scheme, rows, device):
    w, w2 = weights(scheme, device)
    x = given_rows("heavy", rows, width(scheme), dtype=BF16, device=device)
    got = linear_triton(x, w, w2, 2, torch.float32, entry=entry(scheme))
    assert_close(got, torch.cat([x[:2].double() @ exact(w).T, x[2:].double() @ exact(w2).T]))
    assert_close(got, linear(x, w, w2, 2, torch.float32).double())
    assert_close(linear_triton(x, w), x.double() @ exact(w).T)  # by the table


@pytest.mark.parametrize("zeros", [None, False, True])
def test_every_code_is_exact(zeros, device):
    """Each code at every place of a group, with every zero point: rows with one 1 pick them."""
    format = Format.E4M3 if zeros is None else Format.INT4
    codes, k = numbers_of(format), 32
    n = len(codes) if zeros is None else len(codes) * (17 if zeros else 1)
    w = QuantisedWeight.new(n, k, format, k, zeros=bool(zeros), scale=BF16, dtype=BF16, device=device)
    place = torch.arange(n)[:, None] + torch.arange(k)
    zero = torch.arange(n)[:, None] // len(codes) if zeros else None
    w.put(0, codes[place % len(codes)], torch.ones(n, 1), zero if zero is None else zero.to(torch.uint8))
    got = linear_triton(torch.eye(k, dtype=BF16, device=device), w)
    assert torch.equal(got.float(), w.values().t())
    assert len(got.unique()) == (len(codes) - 1 if zeros is None else 32 if zeros else 16)  # two zeros


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
@examples(3)
@given(rows=st.integers(2, 70), index=st.integers(0, 69), kind=st.sampled_from(KINDS))
def test_a_row_has_the_same_bits_anywhere(scheme, device, rows, index, kind):
    """Alone in the split form, and among rows of any form, of either view."""
    index %= rows
    w, w2 = weights(scheme, device)
    x, of = given_rows(kind, rows, width(scheme), dtype=BF16, device=device), entry(scheme)
    one = x[index : index + 1]
    alone, alone2 = linear_triton(one, w, entry=of)[0], linear_triton(one, w2, entry=of)[0]
    assert torch.equal(linear_triton(x, w, entry=of)[index], alone)
    assert torch.equal(linear_triton(x, w, w2, index, entry=of)[index], alone2)
    assert torch.equal(linear_triton(x, w, w2, index + 1, entry=of)[index], alone)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
@examples(3)
@given(rows=st.integers(1, 130), block_t=st.sampled_from([16, 64, 128]), split=st.booleans(),
       block_n=st.sampled_from([64, 128]), warps=st.sampled_from([4, 8]), n_ar=st.integers(0, 130),
       tma=st.booleans(), apart=st.sampled_from([None, 20]), at_once=st.sampled_from([1, 2]))  # fmt: skip
@example(rows=97, block_t=64, split=False, block_n=64, warps=8, n_ar=47, tma=True, apart=20, at_once=1)
@example(rows=33, block_t=16, split=True, block_n=64, warps=4, n_ar=20, tma=False, apart=None, at_once=2)
def test_any_tile_gives_the_same_bits(
    scheme, device, rows, block_t, split, block_n, warps, n_ar, tma, apart, at_once
):
    """Also one that asks for descriptors, which words do not have, and one launch a view."""
    columns = 12 * scheme[1] if at_once == 2 else width(scheme)  # of three segments each has an even number
    w, w2 = (random_weight(scheme, N, columns, device, seed) for seed in (1, 2))
    x, n_ar = given_rows("heavy", rows, columns, dtype=BF16, device=device), min(n_ar, rows)
    of = entry(scheme, LinearTile(None, block_t, block_n, split, warps, 3, tma, at_once=at_once))
    assert groups_at_once(w, of, of.tiles[0]) == at_once
    got = linear_triton(x, w, w2, n_ar, entry=replace(of, apart=apart))
    assert torch.equal(got, linear_triton(x, w, w2, n_ar, entry=entry(scheme)))


def test_a_tile_of_few_weight_rows_is_no_tile_of_codes(device):
    narrow = LinearEntry(64, 1, (LinearTile(None, 16, 32, False, 4, 3),))
    x, w = torch.ones(3, 704, dtype=BF16, device=device), random_weight(SCHEMES[2], 64, 704, device)
    for kernel in (linear_triton, linear_swiglu_triton):
        with pytest.raises(AssertionError):
            kernel(x, w, entry=narrow)


def test_a_round_takes_what_divides_every_segment(device):
    two = LinearTile(None, 16, 64, True, 4, 3, at_once=2)
    w = random_weight(SCHEMES[0], N, 12 * 128, device)
    assert [groups_at_once(w, LinearEntry(128, s, (two,)), two) for s in (1, 2, 3, 4, 6)] == [2, 2, 2, 1, 2]
    odd = random_weight(SCHEMES[0], N, 7 * 128, device)
    assert [groups_at_once(odd, LinearEntry(128, s, (two,)), two) for s in (1, 2)] == [1, 1], (
        "the last one is shorter"
    )
    assert groups_at_once(Weight(torch.ones(64, 128)), LinearEntry(64, 1, (two,)), two) == 1


def test_a_zero_point_is_no_part_of_the_scale(device):
    """They lie in one word. One number times one scale of 16 bits is exact in fp32."""
    for scheme in SCHEMES:
        w = random_weight(scheme, N, scheme[1], device)
        got = linear_triton(torch.eye(scheme[1], dtype=BF16, device=device), w, out_dtype=torch.float32)
        assert torch.equal(got, exact(w).float().t())


def of_its_own(w: QuantisedWeight) -> QuantisedWeight:
    """The same numbers with a factor for each row."""
    (n, k), device = w.shape, w.words.device
    own = QuantisedWeight.new(
        n, k, w.format, w.group, zeros=False, scale=w.scale_dtype, dtype=w.dtype, device=device
    )
    own.put(0, w.codes(), w.scale.t())
    return own


@pytest.mark.parametrize("block_n", [64, 128])
def test_a_factor_of_many_rows_has_the_bits_of_one_for_each(block_n, device):
    """In every form of both kernels and the twin. 300 rows are two blocks and a part of one; of gate and up
    the second begins in the middle of a block."""
    scheme = SCHEMES[0]
    shared = weights(scheme, device, 300)
    own = [of_its_own(w) for w in shared]
    assert [len(w.factors[0]) for w in (*shared, *own)] == [3, 3, 300, 300]
    x = given_rows("heavy", 21, width(scheme), dtype=BF16, device=device)
    for split in (True, False):
        of = entry(scheme, LinearTile(None, 16, block_n, split, 4, 3))
        got, wanted = (linear_triton(x, *both, 13, torch.float32, entry=of) for both in (shared, own))
        assert torch.equal(got, wanted)
    of = LinearEntry(scheme[1], SEGMENTS, (LinearTile(None, 16, block_n, False, 4, 3),))
    assert torch.equal(*(linear_swiglu_triton(x / 64, w, entry=of) for w in (shared[0], own[0])))
    assert torch.equal(linear(x, *shared, 13), linear(x, *own, 13))


def test_factors_of_one_row_and_of_many_have_launches_of_their_own(device):
    shared, x = random_weight(SCHEMES[0], 200, 256, device), hard("normal", 9, 256).to(device, BF16)
    own = of_its_own(shared)
    assert own.scheme != shared.scheme
    assert torch.equal(linear_triton(x, shared, own, 4), linear_triton(x, own))


def test_a_fold_is_rounded_once(device):
    x, w, product = fold(device)
    assert linear_triton(x, w).tolist() == [[product]]


def test_segments_are_part_of_the_class(device):
    """The equalities above can fail."""
    (w, _), x = weights(SCHEMES[0], device), hard("heavy", 8, width(SCHEMES[0])).to(device, BF16)
    got = [
        linear_triton(x, w, out_dtype=torch.float32, entry=replace(entry(SCHEMES[0]), segments=s))
        for s in (1, 3)
    ]
    assert not torch.equal(*got)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_gate_and_up_have_the_bits_of_the_two_kernels(scheme, device):
    (w, _), x = weights(scheme, device, 50), hard("normal", 37, width(scheme)).to(device, BF16) / 64
    wanted = swiglu_triton(linear_triton(x, w, entry=entry(scheme)))
    for height, block_n, segments in ((16, 64, SEGMENTS), (64, 128, SEGMENTS)):
        own = LinearEntry(scheme[1], segments, (LinearTile(None, height, block_n, False, 4, 3),))
        assert torch.equal(linear_swiglu_triton(x, w, entry=own), wanted)
    got = linear_swiglu_triton(x, w)
    assert torch.equal(got, swiglu_triton(linear_triton(x, w)))
    assert_close(got, linear_swiglu(x, w).double())


def test_many_rows_take_the_two_kernels(device):
    w, x = random_weight(SCHEMES[2], 50, 128, device), hard("normal", 130, 128).to(device, BF16) / 64
    assert torch.equal(linear_swiglu_triton(x, w)[:1], linear_swiglu_triton(x[:1], w))


def test_every_tile_of_the_defaults_gives_the_same_bits(device):
    """On a small weight; a default is cut at groups and fits its device."""
    for scheme in SCHEMES[1:4]:
        w = random_weight(scheme, N, 3 * scheme[1], device)
        x = given_rows("heavy", 70, 3 * scheme[1], dtype=BF16, device=device)
        for key in ("sm_80", "sm_90", "gfx942"):
            of = tables.linear_entry(512, 4096, BF16, key, w.scheme)
            assert of.block_k == scheme[1] and of.segments == tables.default_entry(512, 4096, BF16).segments
            fused = swiglu_entry(512, 4096, BF16, key, w.scheme)
            assert (fused.block_k, fused.segments) == (of.block_k, of.segments)
            assert all(tile.stages >= 1 and not tile.tma for tile in of.tiles + fused.tiles)
        alone = linear_triton(x[:1], w, entry=of)
        for tile in dict.fromkeys(replace(tile, rows=None) for tile in of.tiles):
            assert torch.equal(linear_triton(x, w, entry=replace(of, tiles=(tile,)))[:1], alone), tile


def test_a_format_of_each_view(device):
    """Two launches; each takes the entry of its weight."""
    fp8, int4 = random_weight(SCHEMES[0], N, 256, device), random_weight(SCHEMES[2], N, 256, device)
    dense, x = Weight(int4.dense()), hard("normal", 9, 256).to(device, BF16)
    other_zeros = random_weight(Coding(Format.INT4, 64, False, torch.float16), N, 256, device)
    for first, second in ((fp8, int4), (int4, dense), (dense, fp8), (int4, other_zeros)):
        apart = torch.cat([linear_triton(x[:4], first), linear_triton(x[4:], second)])
        assert torch.equal(backend_ops("triton").linear(x, first, second, 4), apart)


@pytest.mark.parametrize("rows", [3, 37, 70])
def test_reads_and_writes_nothing_else(rows, device):
    """Rows and results are slices of NaN buffers; neighbours of the output stay NaN, counters return to
    zero."""
    scheme, nan = SCHEMES[2], float("nan")
    w, w2 = weights(scheme, device)
    x, y = (torch.full((n + 7, k + 8), nan, device=device, dtype=BF16)[3 : n + 3, 4 : k + 4]
            for n, k in ((rows, width(scheme)), (rows, N)))  # fmt: skip
    x.copy_(hard("normal", rows, width(scheme)))
    space = Workspace.new(device, 1 << 16, 64)
    space.partials.fill_(nan)
    assert linear_triton(x, w, w2, rows // 2, out=y, entry=entry(scheme), space=space) is y
    small = Workspace.new(device, 16, 1)
    assert torch.equal(y, linear_triton(x, w, w2, rows // 2, entry=entry(scheme), space=small))
    assert y._base.isnan().sum() == y._base.numel() - y.numel() and not space.counters.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rows_of_other_dtypes_are_refused(dtype, device):
    w, x = (
        random_weight(SCHEMES[0], 64, 128, device, dtype=dtype),
        torch.zeros(3, 128, dtype=dtype, device=device),
    )
    for op in (linear_triton, linear_swiglu_triton):
        with pytest.raises(ValueError, match="bfloat16 rows, not for"):
            op(x, w)
    assert linear(x, w).dtype == dtype
    with pytest.raises(ValueError, match="do not fit together"):
        linear_triton(x[:, 1:], w)


def test_gluon_is_not_asked_without_tiles(monkeypatch, device):
    """Codes of weights that its table lacks run in Triton."""
    either = sys.modules["orthrus_kernels.linear_either"]
    for name, value in (
        ("triton_interprets", lambda: False),
        ("takes", lambda *of: True),
        ("HAS_GLUON", True),
    ):
        monkeypatch.setattr(either, name, value)
    monkeypatch.setattr(tables, "device_key", lambda device: "sm_90")
    w, x = random_weight(SCHEMES[0], 2048, 256), torch.zeros(3, 256, dtype=BF16)
    for views in ((w, None), (w, w), (Weight(w.dense()), w)):
        assert either.launches_of(x, views, 1, False, None) == []
