"""Rare cases, pinned: hypothesis meets them now and then, and then remembers them for a while."""

import math
from itertools import permutations

import pytest
import torch
from exact import by_definition
from scripted import ScriptedModel, Stutter
from small import small_config

from orthrus_kernels import Sampling, alike, choose, inverse_frequencies
from orthrus_kernels.choice import filtered_scores
from qwen3_model.config import YarnScaling


class Sequel(ScriptedModel):
    """Tells 10, 11, 12, ...; its drafter knows."""

    def target(self, text):
        return torch.nn.functional.one_hot(torch.tensor(min(text[-1] + 1, 90)), 97).float() * 9


@pytest.mark.parametrize(
    "settings", [{"tree_nodes": 0}, {"tree_nodes": 9}, {"strategy": "one-pass"}], ids=str
)
@pytest.mark.parametrize("ends", [*permutations((14, 16, 60)), (60, 61, 62, 16), (60, 15)], ids=str)
def test_any_end_token_of_the_list_ends_the_text(ends, settings):
    """Several in one accepted run: the first of them to come."""
    model = Sequel(small_config(eos_token_ids=ends), skill=1.0)
    result = model.generate([9], max_new_tokens=40, **{"strategy": "two-pass"} | settings)
    last = min(ends)
    assert result.token_ids == list(range(10, last + 1)) and result.stats.finish_reason == "end_token"
    assert len(result.logprobs) == len(result.token_ids) and max(result.stats.accepted_histogram) > 0


def test_an_end_token_at_the_limit_is_an_end_token():
    model = Sequel(small_config(eos_token_ids=(60, 15)), skill=1.0)
    assert model.generate([9], max_new_tokens=6, strategy="two-pass").stats.finish_reason == "end_token"
    assert model.generate([9], max_new_tokens=5, strategy="two-pass").stats.finish_reason == "length"


@pytest.mark.parametrize(
    "settings", [{"tree_nodes": 0}, {"tree_nodes": 9}, {"strategy": "one-pass", "tree_nodes": 6}], ids=str
)
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_the_penalty_sees_a_rows_own_last_token(settings, temperature):
    how = {"max_new_tokens": 30, "temperature": temperature, "seed": 1, "repetition_penalty": 2.0}
    plain = Stutter(small_config(eos_token_ids=()), 0.9).generate([5], strategy="autoregressive", **how)
    drafted = Stutter(small_config(eos_token_ids=()), 0.9).generate(
        [5], **{"strategy": "two-pass"} | settings | how
    )
    assert drafted.token_ids == plain.token_ids and drafted.stats.cycles < plain.stats.cycles
    free = Stutter(small_config(eos_token_ids=())).generate([5], strategy="autoregressive", max_new_tokens=30)
    assert len(set(free.token_ids)) == 1, "without a penalty it stutters"


TIED = [1.0, 3.0, -2.0, 3.0, 3.0, 2.0]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({"min_p": 1.0}, [1, 3, 4]), ({"min_p": 1.0, "top_k": 2}, [1, 3]),
     ({"min_p": 1.0, "top_p": 0.5}, [1, 3]), ({"min_p": 0.3, "top_k": 4}, [1, 3, 4, 5]),
     ({"top_p": 1e-6}, [1]), ({"top_k": 1}, [1])],
    ids=str,
)  # fmt: skip
def test_tied_tops(settings, kept):
    """Equal tops are all as likely as the top: min-p keeps every one; counts and masses the lowest ids."""
    sampling = Sampling(temperature=1.0, seed=5, **settings)
    logits = torch.tensor([TIED])
    assert filtered_scores(logits, sampling)[0].isfinite().nonzero().flatten().tolist() == kept
    assert by_definition(TIED, sampling).nonzero().flatten().tolist() == kept
    many = logits.expand(200, -1)
    chosen = choose(many, torch.arange(200), *alike(sampling, many))
    assert sorted(set(chosen.tolist())) == kept


def hugging_face_yarn(dim, base, scaling):
    """`_compute_yarn_parameters` of transformers, written out."""

    def correction(rotations):
        turned = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turned) / (2 * math.log(base))

    low, high = math.floor(correction(scaling.beta_fast)), math.ceil(correction(scaling.beta_slow))
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = base ** (torch.arange(0, dim, 2).float() / dim)
    extrapolated, interpolated = 1 / frequencies, 1 / (scaling.factor * frequencies)
    return interpolated * ramp + extrapolated * (1 - ramp), (low, high)


@pytest.mark.parametrize(
    ("dim", "base", "original", "wanted"),
    [(16, 100.0, 4096, (5, 12)), (16, 100.0, 100_000, (10, 15)), (32, 50.0, 65536, (23, 31)),
     (128, 1e6, 32768, (23, 40)), (16, 10_000.0, 40, (0, 2))],
)  # fmt: skip
def test_yarn_whose_ramp_ends_past_half_the_head(dim, base, original, wanted):
    """There are dim / 2 pairs, and the ramp may go up to dim - 1: its end is not at the last pair."""
    scaling = YarnScaling(4.0, original)
    want, ramp = hugging_face_yarn(dim, base, scaling)
    got, factor = inverse_frequencies(dim, base, scaling)
    assert ramp == wanted and factor == pytest.approx(0.1 * math.log(4.0) + 1)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
