"""The choice: known random numbers, exact distributions, filters by definition, and nothing but (seed,
position, token) in the noise.
"""

import math

import pytest
import torch
from exact import by_definition
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from orthrus_kernels import Sampling, alike, choose, log_sum_exp
from orthrus_kernels.choice import _philox, filter_logits, gumbel, penalise, random_bits
from orthrus_kernels.seen import GENERATED, PROMPT, counts_of


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers published with the generator (Random123 1.x, philox4x32 with 10 rounds)
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    got = _philox(key, tuple(torch.tensor([c]) for c in counter))
    assert tuple(int(w) for w in got) == words


def test_noise_depends_on_seed_position_and_token_alone():
    bits = random_bits(5, torch.tensor([3, 9, 3]), torch.arange(50))
    assert torch.equal(bits[0], bits[2]) and not torch.equal(bits[0], bits[1])
    assert torch.equal(bits[1:2, 17:18], random_bits(5, torch.tensor([9]), torch.tensor([17])))
    assert not torch.equal(bits, random_bits(6, torch.tensor([3, 9, 3]), torch.arange(50)))
    assert len(bits[:2].unique()) == 100


def test_gumbel_is_gumbel():
    noise = gumbel(1, torch.arange(200), 500).flatten()
    assert noise.isfinite().all()
    assert stats.kstest(noise.double().numpy(), stats.gumbel_r.cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 6, "top_p": 0.8, "min_p": 0.05}]
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_sampled_distribution_is_exact(settings, temperature):
    """Chi-square of 40000 choices at as many positions against probabilities by definition in fp64."""
    logits = torch.tensor([1.5, 0.0, 2.0, -1.0, 1.0, 0.5, 2.0, -3.0, 0.25])
    n, sampling = 40_000, Sampling(temperature=temperature, seed=11, **settings)
    counts = torch.bincount(_choose_many(logits, n, sampling), minlength=9).double()
    expected = by_definition((logits / temperature).tolist(), sampling) * n
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert stats.chisquare(counts[kept], expected[kept]).pvalue > 1e-3


def _choose_many(logits, n, sampling):
    scaled = filter_logits(logits[None] / sampling.temperature, sampling)
    got = (scaled + gumbel(sampling.seed, torch.arange(n), len(logits))).argmax(-1)
    some = logits.expand(50, -1)
    few = choose(some, torch.arange(50), *alike(sampling, some))
    assert torch.equal(few, got[:50]), "choose is filter, noise, argmax"
    return got


@given(
    st.lists(st.integers(-3, 3), min_size=2, max_size=12),
    st.integers(0, 13),
    st.sampled_from([1.0, 0.9, 0.5, 0.05]),
    st.sampled_from([0.0, 0.2, 0.9, 1.0]),
)
def test_filters_by_definition_with_ties(logits, k, p, min_p):
    """Small whole logits tie often: at the edge of top-k and top-p the lowest id stays."""
    sampling = Sampling(temperature=1.0, top_k=k, top_p=p, min_p=min_p)
    got = filter_logits(torch.tensor([logits], dtype=torch.float32), sampling)[0]
    want = by_definition([float(x) for x in logits], sampling)
    assert (got > -math.inf).tolist() == (want > 0).tolist()


def test_greedy_takes_the_lowest_id_and_ignores_filters():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert choose(logits, torch.tensor([0]), *alike(Sampling(top_k=1, top_p=0.1), logits)).tolist() == [1]
    assert choose(
        logits, torch.tensor([0]), *alike(Sampling(logit_bias={1: -math.inf}), logits)
    ).tolist() == [2]


def test_penalty_by_sign_on_seen_tokens_after_the_bias():
    sampling = Sampling(repetition_penalty=2.0, logit_bias={0: 1.0})
    seen = torch.tensor([[PROMPT, GENERATED, 0]])
    assert penalise(torch.tensor([[3.0, -1.0, 5.0]]), sampling, seen).tolist() == [[2.0, -2.0, 5.0]]


@given(
    prompt=st.lists(st.integers(0, 5), max_size=6), generated=st.lists(st.integers(0, 5), max_size=9),
    repetition=st.sampled_from([1.0, 0.5, 2.0]), frequency=st.sampled_from([0.0, -2.0, 0.25, 1.5]),
    presence=st.sampled_from([0.0, 2.0, -0.75]),
)  # fmt: skip
def test_penalties_by_definition(prompt, generated, repetition, frequency, presence):
    """Token by token in Python; all numbers are sums of few powers of 2, exact. Prompts count for the
    repetition penalty alone."""
    logits = [3.0, -1.0, 0.0, 2.5, -math.inf, -4.0]
    sampling = Sampling(
        repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence,
        logit_bias={1: 2.0},
    )  # fmt: skip
    wanted = []
    for token, x in enumerate(logits):
        x += 2.0 * (token == 1)
        if token in prompt or token in generated:
            x = x / repetition if x > 0 else x * repetition
        x -= frequency * generated.count(token)
        x -= presence if token in generated else 0
        wanted.append(x)
    seen = counts_of([*prompt, *generated], len(prompt), 6)
    assert penalise(torch.tensor([logits]), sampling, seen[None])[0].tolist() == wanted


@given(st.integers(1, 40), st.integers(0, 39), st.integers(0, 20))
def test_a_rows_choice_does_not_depend_on_its_neighbours(n, i, seed):
    i %= n
    logits = torch.randn(n, 64, generator=torch.Generator().manual_seed(seed))
    sampling = Sampling(temperature=0.9, top_p=0.9, seed=seed)
    positions = torch.arange(100, 100 + n)
    table, slots = alike(sampling, logits)
    alone = choose(logits[i : i + 1], positions[i : i + 1], table, slots[:1])
    assert torch.equal(choose(logits, positions, table, slots)[i : i + 1], alone)
    assert torch.equal(log_sum_exp(logits)[i], log_sum_exp(logits[i : i + 1])[0])


def test_log_sum_exp_by_definition():
    logits = torch.randn(4, 30)
    want = logits.double().exp().sum(-1).log()
    assert torch.allclose(log_sum_exp(logits).double(), want, atol=1e-6)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"frequency_penalty": 2.1},
        {"frequency_penalty": math.nan},
        {"presence_penalty": -2.1},
        {"seed": -1},
        {"seed": 2**64},
        {"logit_bias": {3: math.nan}},
    ],
    ids=str,
)
def test_impossible_settings(bad):
    with pytest.raises(ValueError, match="must be") as caught:
        Sampling(**bad)
    assert "\n" not in str(caught.value)
