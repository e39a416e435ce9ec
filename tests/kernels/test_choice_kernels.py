"""The choice in Triton: the twin's choices on the same seed, edges by definition, noise against fp64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import examples
from strategies import hard

from orthrus_kernels import Sampling, alike, choose, log_sum_exp
from orthrus_kernels._triton import tl, triton
from orthrus_kernels.choice import candidates, gumbel, random_bits
from orthrus_kernels.choice_triton import candidates_triton, choose_triton, log_sum_exp_triton
from orthrus_kernels.head import head_triton
from orthrus_kernels.sampling_table import signed32
from orthrus_kernels.scores_triton import gumbel_at, gumbel_from, minus_log1p_minus
from orthrus_kernels.weight import Weight

INF = float("inf")


@triton.jit
def _noise_kernel(y, seed_low, seed_high, position, AT: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    o = first + tl.arange(0, BLOCK)
    if AT:
        noise = gumbel_at(seed_low, seed_high, position, o)
    else:
        noise = gumbel_from(seed_low, seed_high, position, first, BLOCK)
    tl.store(y + o, noise)


@triton.jit
def _log1p_kernel(u, y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(y + o, minus_log1p_minus(tl.load(u + o)))


@pytest.mark.parametrize("at", [False, True])
@pytest.mark.parametrize("seed", [0, 7, 2**33 + 5, 2**64 - 1])
def test_noise_is_the_twins(seed, at, device):
    """Of the same random bits: other bits would be other numbers altogether. Errors in units of 2^-23, of the
    number or of 1 where the logarithm passes 0."""
    position, n = 31_000, 4096
    got = torch.empty(n, device=device)
    _noise_kernel[(4,)](y=got, seed_low=signed32(seed), seed_high=signed32(seed >> 32), position=position,
                        AT=at, BLOCK=1024, enable_fp_fusion=False)  # fmt: skip
    place = torch.tensor([position])
    bits = random_bits(seed, place, torch.arange(n)).numpy()[0]
    u = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2**-32)
    exact = torch.from_numpy(-np.log(-np.log1p(-np.minimum(u, 1 - 2**-24).astype(np.float64))))
    unit = 2**-23 * exact.abs().clamp(min=1)
    assert ((got.cpu().double() - exact).abs() / unit).max() <= 3
    assert ((gumbel(seed, place, n)[0].double() - exact).abs() / unit).max() <= 3


def test_logarithm_of_the_whole_range_of_u(device):
    """Small, middling and largest u, relative error in units of 2^-24."""
    u = torch.cat([torch.logspace(-33, 0, 4000, base=2, dtype=torch.float64).float().clamp(max=1 - 2**-24),
                   torch.tensor([2**-33, 2**-25, 2**-24, 0.5, 1 - 2**-24]).expand(19, 5).flatten(),
                   torch.tensor([2**-24 + 2**-30])])  # fmt: skip
    assert len(u) == 4096
    got = torch.empty(4096, device=device)
    _log1p_kernel[(1,)](u=u.to(device), y=got, BLOCK=4096, enable_fp_fusion=False)
    exact = -np.log1p(-u.double().numpy())
    assert (np.abs(got.cpu().double().numpy() / exact - 1) * 2**24).max() <= 4


def seen_of(rows, v, g):
    """What penalties see: of most tokens nothing."""
    held = torch.rand(rows, v, generator=g) < 0.3
    return torch.randint(0, 12, (rows, v), generator=g, dtype=torch.int32) * held


@st.composite
def samplings(draw):
    """Settings in every combination; top_p where few tokens' masses do not add up to it exactly."""
    return Sampling(
        temperature=draw(st.sampled_from([0.0, 0.6, 1.0, 1.7])), top_k=draw(st.sampled_from([0, 1, 6, 200])),
        top_p=draw(st.sampled_from([1.0, 0.973, 0.731, 0.0317])), min_p=draw(st.sampled_from([0.0, 0.0137])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.3, -1.1])),
        presence_penalty=draw(st.sampled_from([0.0, 0.7])),
        logit_bias=draw(st.sampled_from([{}, {3: 2.5, 0: -INF, 11: -1.0}])),
        seed=draw(st.integers(0, 2**64 - 1)),
    )  # fmt: skip


@examples(12)
@given(
    sampling=samplings(), v=st.sampled_from([12, 300, 1111]), whole=st.booleans(), seed=st.integers(0, 99),
    spread=st.sampled_from([0.5, 3.0, 12.0]),
)  # fmt: skip
def test_the_twins_choices(sampling, v, whole, seed, spread, device):
    """Whole logits tie at every edge. Three rows at random places, of which one is alone as well."""
    logits = hard("normal", 3, v, seed=seed) * spread
    logits = logits.round() if whole else logits
    g = torch.Generator().manual_seed(seed)
    logits[1, torch.randperm(v, generator=g)[: v // 2]] = -INF
    seen = seen_of(3, v, g).to(device)
    positions = torch.randint(0, 40_000, (3,), generator=g).to(device)
    logits = logits.to(device)
    table, slots = alike(sampling, logits)
    got = choose_triton(logits, positions, table, slots, seen)
    assert got.tolist() == choose(logits, positions, table, slots, seen).tolist()
    assert torch.equal(got[2:], choose_triton(logits[2:], positions[2:], table, slots[2:], seen[2:]))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 17}, 17),
        ({"top_p": 0.3717}, 112),  # 111.5 of 300
        ({"top_k": 40, "top_p": 0.26}, 11),  # 10.4 of 40
        ({"top_p": 1e-9}, 1),
        ({"min_p": 1.0}, 300),
    ],
)
def test_ties_at_the_edge_keep_the_lowest_ids(settings, kept, device):
    """A flat row: the tokens kept are the first ones, so the choice is the largest noise among them."""
    positions = torch.arange(30, 40)
    want = gumbel(5, positions, 300)[:, :kept].argmax(-1)
    assert want.max() > kept // 2 or kept == 1, "the edge matters"
    logits = torch.full((10, 300), -2.5, device=device)
    sampling = Sampling(temperature=0.9, seed=5, **settings)
    got = choose_triton(logits, positions.to(device), *alike(sampling, logits))
    assert got.tolist() == want.tolist()


def test_an_edge_between_neighbouring_numbers(device):
    """Scores one step of fp32 apart, around 0 too: values cannot be halved further, their images can."""
    steps = torch.arange(-60, 60, dtype=torch.int32)
    tiny = torch.where(steps < 0, (-steps) | -(1 << 31), steps).view(torch.float32)
    near = (steps + 0x41200000).view(torch.float32)  # around 10
    logits = torch.cat([torch.stack([tiny, near]), torch.tensor([[-80.0], [-90.0]])], 1)
    logits = logits.repeat(2, 1).to(device)
    positions = torch.arange(4).to(device)
    for k in (1, 59, 61, 119):
        sampling = Sampling(temperature=1.0, top_k=k, seed=k)
        given = logits, positions, *alike(sampling, logits)
        assert torch.equal(choose_triton(*given), choose(*given))


def test_several_blocks(device):
    """More tokens than one step takes, with winners and ties in all of them."""
    v = 9_001
    logits = hard("normal", 2, v).to(device)
    logits[:, [70, 8191, 9_000]] = 9.0
    positions = torch.tensor([3, 4], device=device)
    for sampling in (
        Sampling(),
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=1.0, top_k=2, seed=3),
        Sampling(temperature=1.5, top_p=0.6, seed=4),
    ):
        given = logits, positions, *alike(sampling, logits)
        assert torch.equal(choose_triton(*given), choose(*given))


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1}]
)
def test_what_is_not_finite_is_chosen_as_the_twin_does(settings, device):
    logits = hard("normal", 4, 100).to(device)
    logits[0, [40, 60]], logits[1, [7, 60]], logits[2, :99] = math.nan, INF, -INF
    logits[3] = -INF
    positions, sampling = torch.arange(4, device=device), Sampling(**settings)
    given = logits, positions, *alike(sampling, logits)
    want = choose(*given).tolist()
    assert want == [40, 7, 99, 0]
    assert choose_triton(*given).tolist() == want


@examples(5)
@given(rows=st.integers(1, 4), v=st.integers(1, 700), seed=st.integers(0, 9))
def test_log_sum_exp_is_the_twins_and_the_heads(rows, v, seed, device):
    logits = hard("normal", rows, v, seed=seed).to(device) * 3
    got = log_sum_exp_triton(logits)
    assert (got - log_sum_exp(logits)).abs().max() <= 2**-18
    assert torch.equal(log_sum_exp_triton(logits[-1:]), got[-1:])
    weight = Weight(logits.T.clone(memory_format=torch.contiguous_format))
    assert torch.equal(got, head_triton(torch.eye(rows, device=device), weight)[2])


def test_no_rows(device):
    logits, positions = torch.zeros(0, 50, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    assert choose_triton(logits, positions, *alike(Sampling(), logits)).shape == (0,)
    out = torch.full((1,), -1, device=device)
    one = torch.zeros(1, 50, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    assert choose_triton(*one, *alike(Sampling(), one[0]), out=out) is out and out.tolist() == [0]
    assert log_sum_exp_triton(logits).shape == (0,)


@examples(10)
@given(
    sampling=samplings(), v=st.sampled_from([20, 300, 1111]), k=st.sampled_from([1, 5, 16]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_twins_candidates(sampling, v, k, seed, device):
    """In the order of their scores, which noise keeps apart; log-probabilities to the noise's rounding."""
    logits = hard("normal", 3, v, seed=seed) * 3
    seen = seen_of(3, v, torch.Generator().manual_seed(seed)).to(device)
    positions, logits = torch.tensor([0, 7, 40_000], device=device), logits.to(device)
    table, slots = alike(sampling, logits)
    want, want_ids = candidates(logits, positions, table, slots, k, seen)
    got, ids = candidates_triton(logits, positions, table, slots, k, seen)
    possible = want > -INF
    assert torch.equal(possible, got > -INF) and possible[:, 0].all()
    assert torch.equal(ids[possible], want_ids[possible])
    assert (got[possible] - want[possible]).abs().max() <= 2**-16
    alone, ids_alone = candidates_triton(logits[1:2], positions[1:2], table, slots[:1], k, seen[1:2])
    assert torch.equal(ids_alone, ids[1:2]) and torch.equal(alone, got[1:2])


def test_candidates_past_the_vocabulary_are_refused(device):
    with pytest.raises(ValueError, match="k is 9"):
        logits = torch.zeros(1, 8, device=device)
        candidates_triton(logits, torch.zeros(1, dtype=torch.int64), *alike(Sampling(), logits), 9)
