"""The head: its logits are the linear's, its summary is theirs, and a row has the same bits in every tile."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, examples, given_rows
from strategies import KINDS, hard

from orthrus_kernels.head import head, head_entry, head_triton
from orthrus_kernels.linear import linear_triton
from orthrus_kernels.logit_summary import summary_of_logits
from orthrus_kernels.tables import LinearEntry, LinearTile
from orthrus_kernels.weight import Weight

V, E = 150, 72  # ragged in tiles of 64 and 128 and in groups of 64; K in segments of a block, the last ragged
TILES = (
    LinearTile(4, 16, 64, False, 4, 3),
    LinearTile(40, 32, 128, False, 4, 3),
    LinearTile(None, 64, 64, False, 4, 3),
)
# 64 roundings of 2^-25 against a sum of at least 1; logits here are up to 2^5, where fp32 steps are 2^-19.
LOG_SUM_EXP_LIMIT = 2**-19 + 2**-19


def weight(dtype, device, v=V, e=E):
    return Weight((hard("normal", v, e, seed=1) / 8).to(device, dtype))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_summarises(got, logits, k):
    """k likeliest by a stable sort of these logits, ties to the lowest id, and their log-sum-exp in fp64."""
    values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    assert torch.equal(got[0], values[:, :k]) and torch.equal(got[1], ids[:, :k])
    assert (got[2].double() - torch.logsumexp(logits.double(), -1)).abs().max() <= LOG_SUM_EXP_LIMIT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,segments", [(3, 3), (33, 1), (65, 3)])
def test_it_is_the_summary_of_the_linears_logits(rows, segments, dtype, device):
    """In every tile: logits, ids and log-sum-exp have the bits of written logits, described by the twin."""
    x, w = hard("normal", rows, E).to(device, dtype), weight(dtype, device)
    entry = LinearEntry(32, segments, TILES)
    logits = linear_triton(x, w, out_dtype=torch.float32, entry=entry)
    got = head_triton(x, w, 3, entry=entry)
    assert_summarises(got, logits, 3)
    assert same([part[-9:] for part in got], summary_of_logits(logits[-9:], 3))
    twin = head(x, w, 3)
    assert (got[0] - twin[0]).abs().max() <= 1e-5 and (got[2] - twin[2]).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(3)
@given(rows=st.integers(2, 45), index=st.integers(0, 44), kind=st.sampled_from(KINDS), k=st.integers(1, 4))
def test_a_row_has_the_same_bits_anywhere(dtype, device, rows, index, kind, k):
    index %= rows
    x, w = given_rows(kind, rows, E, dtype=dtype, device=device), weight(dtype, device)
    entry = LinearEntry(32, 3, TILES)
    alone = head_triton(x[index : index + 1], w, k, entry=entry)
    assert same([part[index : index + 1] for part in head_triton(x, w, k, entry=entry)], alone)


def test_with_the_tables_class(device):
    """Without `entry` its logits are still those of `linear`: one class for a weight, other tiles."""
    for v, e in ((1000, 64), (70, 1100)):
        x, w = hard("heavy", 3, e).to(device), weight(torch.float32, device, v, e)
        assert same(head_triton(x, w, 2), summary_of_logits(linear_triton(x, w), 2))
    assert head_entry(70, 1100, torch.float32, "cpu").segments > 1


@examples(8)
@given(
    v=st.integers(1, 700), low=st.integers(0, 3), k=st.integers(1, 16), seed=st.integers(0, 99),
    banned=st.booleans(),
)  # fmt: skip
def test_ties_and_bans_in_written_logits(v, low, k, seed, banned, device):
    """Few whole numbers tie in every place; of equal ones the lowest id comes first, banned ones last."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(-low, low + 1, (2, v), generator=g).float()
    logits[0] *= -0.0 if seed % 2 else 1.0
    if banned:
        logits[1:, torch.randperm(v, generator=g)[: v - 1]] = float("-inf")
    logits, k = logits.to(device), min(k, v)
    assert_summarises(summary_of_logits(logits, k), logits, k)


def test_a_vocabulary_of_several_tiles(device):
    logits = hard("normal", 2, 9001).to(device) * 4
    logits[:, 5000] = logits[:, 8500] = 30.0
    assert_summarises(summary_of_logits(logits, 16), logits, 16)
    assert summary_of_logits(logits, 2)[1].tolist() == [[5000, 8500]] * 2


def test_what_is_not_finite(device):
    """NaN is above all, as torch.sort has it, and shows in the log-sum-exp, as infinity does."""
    nan, inf = float("nan"), float("inf")
    logits = hard("normal", 5, 200).to(device)
    logits[0, 7], logits[1, 150], logits[2, 3], logits[3, 5] = nan, inf, -inf, -nan
    logits[4] = -inf
    values, ids, log_sum_exp = summary_of_logits(logits, 2)
    assert ids[:2, 0].tolist() == [7, 150] and ids[3, 0] == 5 and values[0, 0].isnan()
    assert log_sum_exp[0].isnan() and log_sum_exp[3].isnan()
    assert log_sum_exp[1] == inf and log_sum_exp[2].isfinite() and log_sum_exp[4] == -inf
    assert values[4].tolist() == [-inf, -inf] and ids[4].tolist() == [0, 1]


def test_reads_and_writes_nothing_else(device):
    """Operands are slices of NaN buffers; what lies beside the results stays."""
    nan = float("nan")
    x, w = (torch.full((n + 7, E + 9), nan, device=device)[3 : n + 3, 5 : E + 5] for n in (37, V))
    x.copy_(hard("normal", 37, E))
    w.copy_(weight(torch.float32, device).dense())
    w = Weight(w)
    buffers = (torch.full((39, 4), nan, device=device), torch.full((39, 4), -5, device=device),
               torch.full((39,), nan, device=device))  # fmt: skip
    out = tuple(b[1:38] for b in buffers)
    got = head_triton(x, w, 4, out=out, entry=LinearEntry(32, 3, TILES))
    assert all(a is b for a, b in zip(got, out, strict=True))
    assert_summarises(out, linear_triton(x, w, entry=LinearEntry(32, 3, TILES)), 4)
    assert buffers[0].isnan().sum() == 8 and buffers[2].isnan().sum() == 2
    assert (buffers[1] == -5).sum() == 8


def test_no_rows_and_what_does_not_fit(device):
    w = weight(torch.float32, device)
    x = w.dense()
    assert [tuple(t.shape) for t in head_triton(x[:0], w, 3)] == [(0, 3), (0, 3), (0,)]
    assert [tuple(t.shape) for t in head(x[:0], w, 3)] == [(0, 3), (0, 3), (0,)]
    for op in (head, head_triton):
        with pytest.raises(ValueError, match="do not fit together"):
            op(x[:2, 1:], w)
        for k in (0, V + 1):
            with pytest.raises(ValueError):
                op(x[:2], w, k)
    with pytest.raises(ValueError, match="128"):
        head_triton(x[:2], w, 129)
