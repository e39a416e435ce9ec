"""Rejection sampling: tokens distributed as plain samples of the target, by chi-square tests at fixed seeds
that reject every bias planted here; and that it stays a comparison.
"""

import json

import pytest
import torch
from exact import by_definition, p_value
from scripted import ScriptedModel
from small import small_config, small_model

from orthrus_kernels import Rows, Sampling, alike, choose, log_sum_exp, rejection
from orthrus_kernels.choice import random_bits
from orthrus_kernels.rejection import accepts, filtered_probabilities, residual, sample
from qwen3_model import InputError
from qwen3_model.cli import main
from qwen3_model.decode import rejection as decode_rejection

UNLIKELY = 1e-4  # of the statistic, were the tokens distributed as claimed
LOGITS = torch.tensor([1.5, 0.0, 2.0, -1.0, 1.0, 0.5, 2.0, -3.0, 0.25])
FILTERS = [
    ({}, {"temperature": 1.05}), ({"top_k": 5}, {"top_k": 6}), ({"top_k": 5}, {"top_k": 4}),
    ({"top_p": 0.7}, {"top_p": 0.9}), ({"min_p": 0.2}, {"min_p": 0.1}),
    ({"top_k": 6, "top_p": 0.8, "min_p": 0.05}, {"top_k": 5, "top_p": 0.8, "min_p": 0.05}),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "planted"), FILTERS, ids=str)
def test_the_coupled_choice_and_filters_that_are_off_by_one(settings, planted):
    """`choose` of 2000 rows; a filter that keeps a token more or less, a temperature off by a twentieth."""
    wanted = by_definition(LOGITS.tolist(), Sampling(temperature=1.0, **settings))
    for given, right in ((settings, True), (settings | planted, False)):
        n = 2000 if settings else 40_000
        sampling = Sampling(seed=2, **({"temperature": 1.0} | given))
        logits = LOGITS.expand(n, -1)
        got = choose(logits, torch.arange(n), *alike(sampling, logits))
        counts = torch.bincount(got, minlength=len(LOGITS)).double()
        assert (p_value(counts[None], wanted[None]) > UNLIKELY) == right
        assert torch.allclose(filtered_probabilities(LOGITS[None], sampling)[0], wanted, atol=1e-6) == right


def test_streams_are_independent_and_the_choice_has_the_first():
    positions, ids = torch.arange(300), torch.arange(40)
    streams = [random_bits(3, positions, ids, stream).flatten() for stream in range(4)]
    assert torch.equal(streams[0], random_bits(3, positions, ids).flatten())
    together = torch.stack(streams).double()
    assert len(torch.cat(streams).unique()) > 4 * 12_000 - 5
    off_diagonal = together.corrcoef() - torch.eye(4)
    assert off_diagonal.abs().max() < 4 / 12_000**0.5, "4 standard errors"


# Target and draft probabilities of a first and a second token.
PAIRS = {
    "equal": ([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]),
    "apart": ([0.5, 0.3, 0.2, 0.0], [0.0, 0.1, 0.2, 0.7]),
    "peaked": ([0.4, 0.3, 0.2, 0.1], [0.05, 0.05, 0.05, 0.85]),
    "flat": ([0.7, 0.2, 0.06, 0.04], [0.25, 0.25, 0.25, 0.25]),
    "crossed": ([0.1, 0.4, 0.1, 0.4], [0.4, 0.1, 0.3, 0.2]),
    "sure": ([0.0, 0.0, 1.0, 0.0], [0.3, 0.3, 0.1, 0.3]),
}
SECOND = torch.tensor(  # the target's behind each first token
    [[0.1, 0.2, 0.3, 0.4], [0.6, 0.2, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.0, 0.5, 0.5, 0.0]],
    dtype=torch.float64,
)
GUESS = torch.tensor([0.2, 0.5, 0.2, 0.1], dtype=torch.float64)  # the drafter's second, one for all


def two_tokens(p, q, n=40_000, seed=0):
    """The first two tokens of n texts, each at three positions of its own."""
    at = 3 * torch.arange(n)[:, None] + torch.arange(3)
    draft = torch.stack([q, GUESS]).expand(n, -1, -1)
    proposals = torch.stack([sample(draft[:, i], at[:, i], seed, rejection.DRAFT) for i in range(2)], 1)
    target = torch.stack([p.expand(n, -1), SECOND[proposals[:, 0]], SECOND[proposals[:, 1]]], 1)
    kept, last = rejection.reject(proposals, target, draft, at, seed)
    first = torch.where(kept > 0, proposals[:, 0], last)
    # where the first proposal fell, the next cycle has the second place, with the same draws
    target = torch.stack([SECOND[first], SECOND[proposals[:, 1]]], 1)
    again, other = rejection.reject(proposals[:, 1:], target, draft[:, 1:], at[:, 1:], seed)
    kept, last = torch.where(kept > 0, kept, again + 1), torch.where(kept > 0, last, other)
    return first, torch.where(kept > 1, proposals[:, 1], last)


def fit(name, seed=0):
    """p-values of the first token and of both together."""
    p, q = (torch.tensor(of, dtype=torch.float64) for of in PAIRS[name])
    first, second = two_tokens(p, q, seed=seed)
    counts = torch.bincount(4 * first + second, minlength=16).double()
    joint = p_value(counts[None], (p[:, None] * SECOND).flatten()[None])
    return p_value(counts.view(4, 4).sum(1)[None], p[None]), joint


@pytest.mark.parametrize("name", PAIRS)
def test_the_first_two_tokens_are_distributed_as_the_targets(name):
    for seed in range(3):
        assert min(fit(name, seed)) > UNLIKELY


def undivided(proposals, target, draft, positions, seed):
    """Accepts with p(x) in place of p(x) / q(x)."""
    return accepts(proposals, target, torch.ones_like(draft), positions, seed)


PLANTED = {
    "the ratio without q": {"accepts": undivided},
    "the rest is all of p": {"residual": lambda target, draft: target},
    "the rest is p where it is above q": {"residual": lambda p, q: p * (p > q)},
    "the number that decides is the proposal's": {"ACCEPT": rejection.DRAFT},
    "the rest is drawn like the proposal": {"REST": rejection.DRAFT},
    "coupled noise for all": {"DRAFT": 0, "ACCEPT": 0, "REST": 0},
    "everything is accepted": {"accepts": lambda proposals, *_: torch.ones_like(proposals, dtype=torch.bool)},
}


@pytest.mark.parametrize("bias", PLANTED)
def test_a_planted_bias_shows(bias, monkeypatch):
    for name, value in PLANTED[bias].items():
        monkeypatch.setattr(rejection, name, value)
    first, joint = fit("crossed")
    assert first < UNLIKELY and joint < UNLIKELY


@pytest.mark.parametrize("name", PAIRS)
def test_acceptance_is_the_overlap_of_both(name):
    """sum min(p, q), within 4 standard errors."""
    p, q = (torch.tensor(of, dtype=torch.float64) for of in PAIRS[name])
    n = 40_000
    at = torch.arange(n)
    x = sample(q.expand(n, -1), at, 5, rejection.DRAFT)
    rate = accepts(x[:, None], p.expand(n, 1, -1), q.expand(n, 1, -1), at[:, None], 5).double().mean()
    overlap = torch.minimum(p, q).sum()
    assert abs(rate - overlap) <= 4 * (overlap * (1 - overlap) / n).sqrt() + 1e-12


def test_what_rounding_leaves_of_equal_distributions():
    p = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    assert residual(p, q).tolist() == [[0.0, 0.25], [0.5, 0.5]]


class Markov(ScriptedModel):
    """The target knows the last token only, the drafter the anchor and the offset."""

    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    guesses = 1.5 * torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(2))

    def target(self, text):
        return self.table[text[-1]]

    def _row(self, rows, i, context):
        return self.guesses[rows.tokens[0], i] if rows.blocks[i] >= 0 else super()._row(rows, i, context)


def markov(**changes):
    shape = {"vocab_size": 4, "mask_token_id": 3, "block_size": 4, "eos_token_ids": ()}
    return Markov(small_config(max_position_embeddings=10_000, **shape | changes))


SETTINGS = {"temperature": 0.8, "top_k": 3, "top_p": 0.97, "logit_bias": {3: 1.0}}


@pytest.mark.parametrize(
    "bias, tokens", [(None, 1500), ("the rest is all of p", 500), ("the ratio without q", 1500)]
)
def test_a_whole_generation(bias, tokens, monkeypatch):
    """Each token given the one before it, over one long text."""
    for name, value in PLANTED.get(bias, {}).items():
        monkeypatch.setattr(rejection, name, value)
    result = markov().generate([0], max_new_tokens=tokens, verify="rejection", seed=3, **SETTINGS)
    text = torch.tensor([0, *result.token_ids])
    counts = torch.bincount(4 * text[:-1] + text[1:], minlength=16).double().view(4, 4)
    scaled = (Markov.table + torch.tensor([0.0, 0.0, 0.0, 1.0])) / SETTINGS["temperature"]
    wanted = torch.stack([by_definition(row.tolist(), Sampling(**SETTINGS)) for row in scaled])
    assert (p_value(counts, wanted) > UNLIKELY) == (bias is None)
    assert result.stats.verify == "rejection" and 1.3 < result.stats.tokens_per_cycle < 3


@pytest.mark.parametrize(
    "penalties", [{}, {"repetition_penalty": 1.5}, {"frequency_penalty": 0.6, "presence_penalty": -0.4}],
    ids=str,
)  # fmt: skip
def test_both_distributions_are_those_of_the_settings(penalties, monkeypatch):
    """And with a penalty what has been seen follows the path, in both views."""
    calls, reject = [], rejection.reject
    monkeypatch.setattr(decode_rejection, "reject", lambda *of: calls.append(of) or reject(*of))
    settings = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 5} | penalties
    model = ScriptedModel(small_config(eos_token_ids=()), skill=0.7)
    text = [1, *model.generate([1], max_new_tokens=40, verify="rejection", **settings).token_ids]
    assert len(calls) > 5
    for proposals, target, draft, positions, seed in calls:
        assert seed == 5
        start = int(positions[0, 0])
        rows = Rows.block(text[start - 1], 8, start - 1, 96)
        for i in range(target.shape[1]):
            path = text[:start] + proposals[0, :i].tolist()
            wanted = distribution(model.target(path), path, Sampling(**settings))
            assert torch.allclose(target[0, i], wanted, atol=1e-6) and positions[0, i] == len(path)
            if i < proposals.shape[1]:
                wanted = distribution(model._row(rows, i, text[: start - 1]), path, Sampling(**settings))
                assert torch.allclose(draft[0, i], wanted, atol=1e-6) and wanted[proposals[0, i]] > 0


def distribution(logits, path, sampling):
    """Of a text whose prompt is its first token."""
    x = [v * sampling.repetition_penalty ** (-1 if v > 0 else 1) if token in path else v
         for token, v in enumerate(logits.tolist())]  # fmt: skip
    for token in path[1:]:
        x[token] -= sampling.frequency_penalty
    for token in set(path[1:]):
        x[token] -= sampling.presence_penalty
    return by_definition([v / sampling.temperature for v in x], sampling)


def test_log_probabilities_are_the_models_own():
    model = small_model("bfloat16", eos_token_ids=())
    prompt, settings = [5, 6, 7], {"temperature": 1.3, "repetition_penalty": 1.2, "logit_bias": {9: 1.0}}
    result = model.generate(prompt, max_new_tokens=40, verify="rejection", seed=1, **settings)
    cache = model.new_cache(50)
    first = model.prefill(prompt, cache)[None]
    rest = model.forward(Rows.chain(result.token_ids[:-1], len(prompt)), cache).logits
    logits, tokens = torch.cat([first, rest]), torch.tensor(result.token_ids)
    wanted = logits.gather(1, tokens[:, None])[:, 0] - log_sum_exp(logits)
    assert result.logprobs == wanted.tolist() and result.stats.forwards > 10


def test_a_seed_is_a_text_and_another_than_coupled():
    model = ScriptedModel(small_config(eos_token_ids=()))
    how = {"max_new_tokens": 30, "temperature": 1.0, "seed": 8}
    hows = "rejection", "rejection", "coupled"
    texts = [model.generate([1], verify=verify, **how).token_ids for verify in hows]
    assert texts[0] == texts[1] != texts[2] and texts[0][0] == texts[2][0], "the prefill's token is coupled"


@pytest.mark.parametrize("skill", [0.0, 1.0])
def test_end_tokens_limits_and_counts(skill):
    how = {"temperature": 0.5, "seed": 2, "verify": "rejection"}
    free = ScriptedModel(small_config(eos_token_ids=()), skill).generate([1], max_new_tokens=34, **how)
    stats = free.stats
    assert stats.finish_reason == "length" and len(free.token_ids) == len(free.logprobs) == 34
    assert stats.cycle_tokens == 33 == sum((n + 1) * of for n, of in enumerate(stats.accepted_histogram))
    assert stats.cycles == sum(stats.accepted_histogram) and stats.forwards <= 1 + 2 * stats.cycles
    end = free.token_ids[20]
    ended = ScriptedModel(small_config(eos_token_ids=(end,)), skill).generate([1], max_new_tokens=34, **how)
    assert ended.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert ended.stats.finish_reason == "end_token" and len(ended.logprobs) == len(ended.token_ids)


def test_one_token_left_is_decoded_plainly():
    model = ScriptedModel(small_config(eos_token_ids=()))
    model.generate([1], max_new_tokens=2, temperature=1.0, verify="rejection")
    assert [(len(p), p.n_ar) for p in model.passes] == [(1, 1)] * 2, "the prompt's and one more"


def test_stop_strings_and_the_command_line(capsys):
    line = ["generate", "def f(x):", "--device", "cpu", "--temperature", "1", "--seed", "3",
            "--max-new-tokens", "40", "--verify", "rejection"]  # fmt: skip
    assert main([*line, "--json"]) == 0
    whole, said = capsys.readouterr()
    whole = json.loads(whole)
    assert "two-pass, rejection: 40 tokens" in said and whole["stats"]["verify"] == "rejection"
    stop = whole["text"][25:28]
    assert main([*line, "--stop", stop]) == 0
    text, said = capsys.readouterr()
    assert text == whole["text"][: whole["text"].index(stop)] + "\n" and "stop_string" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verify": "typical"}, "verify is 'typical'; use coupled or rejection"),
        ({"verify": None}, "verify is None"),
        ({"temperature": 0.0}, "takes a temperature above 0"),
        ({"tree_nodes": 8}, "takes a chain, not a tree: tree_nodes is 8"),
        ({"strategy": "autoregressive"}, "takes strategy two-pass of an Orthrus, not auto"),
    ],
    ids=str,
)
def test_what_it_does_not_go_with(settings, message):
    with pytest.raises(InputError, match=message) as caught:
        ScriptedModel(small_config()).generate(
            [1], **({"verify": "rejection", "temperature": 1.0} | settings)
        )
    assert "\n" not in str(caught.value)


def test_a_plain_qwen3_and_damaged_logits_are_refused(monkeypatch):
    plain = ScriptedModel(small_config(block_size=0, mask_token_id=-1))
    with pytest.raises(InputError, match="of an Orthrus, not auto"):
        plain.generate([1], max_new_tokens=3, temperature=1.0, verify="rejection")
    model = ScriptedModel(small_config())
    monkeypatch.setattr(model, "_row", lambda *_: torch.full((97,), float("nan")))
    with pytest.raises(InputError, match="NaN or infinite"):
        model.generate([1], max_new_tokens=4, temperature=1.0, verify="rejection")
