"""The fused gate and up projections: the bits of the two kernels they replace, for any rows and tile."""

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, examples, given_rows
from limits import assert_close
from strategies import KINDS, hard

from orthrus_kernels import tables
from orthrus_kernels.backends import backend_ops
from orthrus_kernels.linear import linear, linear_triton
from orthrus_kernels.linear_swiglu import linear_swiglu, linear_swiglu_triton, swiglu_entry
from orthrus_kernels.swiglu import swiglu, swiglu_triton
from orthrus_kernels.tables import LinearEntry, LinearTile
from orthrus_kernels.weight import Weight

module = sys.modules["orthrus_kernels.linear_swiglu"]  # as an attribute of the package it is the twin

# K = 200 in segments of 3, 3 and 1 blocks, the last block ragged; F is odd and ragged in every tile.
F, K = 45, 200
POINTERS = LinearEntry(
    32, 3, (LinearTile(4, 16, 32, False, 4, 3), LinearTile(40, 32, 64, False, 4, 3),
            LinearTile(None, 64, 128, False, 8, 3)),
)  # fmt: skip
TMA = LinearEntry(
    32, 3, (LinearTile(4, 16, 32, False, 4, 3, tma=True), LinearTile(40, 32, 128, False, 4, 3, tma=True),
            LinearTile(None, 128, 128, False, 8, 3, tma=True)),
)  # fmt: skip


def weight(dtype, device, f=F, k=K):
    """Gates and ups of a few units, so that no silu is all of its gate."""
    return Weight((hard("normal", 2 * f, k, seed=1) / 8).to(device, dtype))


def separate(x, w, entry):
    """The two kernels in turn, with the reduction class of `entry` and a tile of their own."""
    own = replace(entry, tiles=(LinearTile(None, 32, 64, True, 4, 3),))
    return swiglu_triton(linear_triton(x, w, entry=own))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 37, 70])
@pytest.mark.parametrize("entry", [POINTERS, TMA], ids=["pointers", "tma"])
def test_it_has_the_bits_of_the_two_kernels(entry, rows, dtype, device):
    x, w = given_rows("normal", rows, K, dtype=dtype, device=device), weight(dtype, device)
    got = linear_swiglu_triton(x, w, entry=entry)
    assert torch.equal(got, separate(x, w, entry))
    assert_close(got, linear_swiglu(x, w).double())
    gate, up = linear(x, w).double().chunk(2, -1)  # rounded: limits.py has room for two roundings more
    assert_close(got, gate * gate.sigmoid() * up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(5)
@given(rows=st.integers(1, 200), block_t=st.sampled_from([16, 32, 64, 128]), f=st.integers(1, 70),
       block_n=st.sampled_from([32, 64, 128]), tma=st.booleans(), warps=st.sampled_from([4, 8]),
       segments=st.integers(1, 3), kind=st.sampled_from(KINDS))  # fmt: skip
def test_any_tile_gives_the_same_bits(
    dtype, device, rows, block_t, f, block_n, tma, warps, segments, kind
):  # fmt: skip
    tile = LinearTile(None, block_t, block_n, False, warps, 3, tma)
    x, w = given_rows(kind, rows, K, dtype=dtype, device=device), weight(dtype, device, f)
    entry = LinearEntry(32, segments, (tile,))
    got, wanted = linear_swiglu_triton(x, w, entry=entry), separate(x, w, entry)
    assert torch.equal(got.isnan(), wanted.isnan())  # 0 times infinity, in fp16
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(8)
@given(rows=st.integers(2, 200), index=st.integers(0, 199), seed=st.integers(0, 9))
def test_a_row_has_the_same_bits_anywhere(dtype, device, rows, index, seed):
    """Alone by pointers, and among any rows by either copy."""
    index %= rows
    x, w = given_rows("normal", rows, K, dtype=dtype, device=device, seed=seed), weight(dtype, device)
    alone = linear_swiglu_triton(x[index : index + 1], w, entry=POINTERS)[0]
    for entry in (POINTERS, TMA):
        assert torch.equal(linear_swiglu_triton(x, w, entry=entry)[index], alone)


def test_another_class_gives_other_bits(device):
    """The equalities above can fail."""
    x, w = hard("heavy", 8, K).to(device), weight(torch.float32, device)
    got = [linear_swiglu_triton(x, w, entry=replace(POINTERS, segments=s)) for s in (2, 3)]
    assert not torch.equal(*got)


def test_gate_and_up_are_rounded_first(device):
    """Sums in fp32 up to the product would give other numbers in bf16, and so would an unrounded silu."""
    x, w = hard("normal", 37, K).to(device, torch.bfloat16), weight(torch.bfloat16, device)
    sums = linear_triton(
        x, w, out_dtype=torch.float32, entry=replace(POINTERS, tiles=(LinearTile(None, 32, 64, True, 4, 3),))
    )
    got = linear_swiglu_triton(x, w, entry=POINTERS)
    gate, up = sums.bfloat16().float().chunk(2, -1)
    assert not torch.equal(got, swiglu(sums).bfloat16())
    assert not torch.equal(got, (gate * gate.sigmoid() * up).bfloat16())


@pytest.mark.parametrize("f,k", [(1, 1), (33, 17), (150, 1100)])
def test_odd_sizes_with_the_table(f, k, device):
    """The class that `linear` has for the weight, 2 segments of the largest."""
    x, w = hard("normal", 5, k).to(device), Weight(hard("normal", 2 * f, k, seed=1).to(device))
    assert torch.equal(linear_swiglu_triton(x, w), swiglu_triton(linear_triton(x, w)))


@pytest.mark.parametrize("shape", [(24576, 4096), (19456, 2560), (12288, 2048), (6144, 1024)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device_key", ["sm_80", "sm_90", "gfx942"])
def test_the_entry_keeps_the_class_of_the_weight(shape, dtype, device_key):
    entry, of = swiglu_entry(*shape, dtype, device_key), tables.linear_entry(*shape, dtype, device_key)
    assert (entry.block_k, entry.segments) == (of.block_k, of.segments)
    for tile in entry.tiles:
        assert not tile.split and tile.block_t & (tile.block_t - 1) == 0
        assert tile.block_n >= (128 if tile.tma else 32) and tile.stages >= 1


def test_several_segments_leave_registers_for_two_accumulators(monkeypatch):
    wide = LinearEntry(64, 2, (LinearTile(None, 192, 256, True, 8, 4, tma=True),))
    monkeypatch.setattr(tables, "linear_entry", lambda *of: wide)
    (tile,) = swiglu_entry(24576, 4096, torch.bfloat16, "sm_100").tiles
    assert (tile.block_t, tile.block_n, tile.split) == (64, 256, False)
    assert swiglu_entry(24576, 4096, torch.bfloat16, "sm_90").tiles[-1].block_t == 64


@pytest.mark.parametrize("rows,fused", [(128, True), (129, False)])
def test_many_rows_take_the_two_kernels(rows, fused, device, monkeypatch):
    x, w = hard("normal", rows, 32).to(device), Weight(hard("normal", 16, 32, seed=1).to(device))
    wanted = separate(x, w, swiglu_entry(16, 32, torch.float32, "cpu"))
    calls = []
    monkeypatch.setattr(
        module, "linear_triton", lambda *of, **how: calls.append(of) or linear_triton(*of, **how)
    )
    assert torch.equal(linear_swiglu_triton(x, w), wanted) and bool(calls) is not fused


def test_reads_and_writes_nothing_else(device):
    """Operands are slices of NaN buffers; neighbours of the output stay NaN."""
    nan = float("nan")
    for entry in (POINTERS, TMA):
        for rows in (3, 70):
            x, w, y = (torch.full((n + 7, k + 8 + -k % 4), nan, device=device)[3 : n + 3, 4 : k + 4]
                       for n, k in ((rows, K), (2 * F, K), (rows, F)))  # fmt: skip
            x.copy_(hard("normal", rows, K))
            w.copy_(weight(torch.float32, device).dense())
            w, packed = Weight(w), Weight(w.contiguous())
            assert linear_swiglu_triton(x, w, out=y, entry=entry) is y
            assert torch.equal(y, separate(x.contiguous(), packed, entry))
            assert y._base.isnan().sum() == y._base.numel() - y.numel()


def test_operands_that_descriptors_do_not_take_go_by_pointers(device):
    """Rows that start at odd addresses: the same bits."""
    x, w = hard("normal", 70, K).to(device), weight(torch.float32, device)
    wide = torch.zeros(70, K + 1, device=device)[:, 1:]
    wide.copy_(x)
    assert torch.equal(linear_swiglu_triton(wide, w, entry=TMA), linear_swiglu_triton(x, w, entry=TMA))


def test_no_rows_and_what_does_not_fit(device):
    x, w = hard("normal", 3, K).to(device), weight(torch.float32, device)
    for op in (linear_swiglu, linear_swiglu_triton, backend_ops("torch").linear_swiglu):
        assert op(x[:0], w).shape == (0, F)
    for op in (linear_swiglu, linear_swiglu_triton):
        with pytest.raises(ValueError, match="do not fit together"):
            op(x[:, 1:], w)
        with pytest.raises(ValueError, match="as many gate as up rows"):
            op(x, Weight(w.dense()[1:]))
    with pytest.raises(AssertionError):
        linear_swiglu_triton(x, Weight(w.dense().bfloat16()))
