"""top_logprobs: the likeliest tokens of the model at each token, before any setting, the same whatever drafts
the text and whoever runs beside it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import examples
from interpreter import DEVICE
from scripted import ScriptedModel
from small import small_config
from strategies import hard

from orthrus_kernels import PAGE, backend_ops
from qwen3_model import Engine, InputError, Request

WAYS = (
    {"strategy": "autoregressive"}, {"strategy": "two-pass", "tree_nodes": 0}, {"strategy": "auto"},
    {"strategy": "two-pass", "tree_nodes": 7}, {"strategy": "one-pass", "tree_nodes": 5},
)  # fmt: skip
SETTINGS = ({}, {"temperature": 0.9, "top_p": 0.8}, {"repetition_penalty": 1.4, "logit_bias": {5: 30.0}})


@examples(15)
@given(
    prompt=st.lists(st.integers(0, 95), min_size=1, max_size=9), way=st.sampled_from(WAYS),
    settings=st.sampled_from(SETTINGS), n=st.integers(1, 20), new=st.integers(1, 12),
    skill=st.sampled_from([0.3, 1.0]),
)  # fmt: skip
def test_they_are_the_models_own(prompt, way, settings, n, new, skill):
    model = ScriptedModel(small_config(eos_token_ids=()), skill)
    found = model.generate(prompt, max_new_tokens=new, top_logprobs=n, min_tokens=1, seed=7, **settings | way)
    assert len(found.top_logprobs) == len(found.token_ids) == new
    for at, told in enumerate(found.top_logprobs):
        logits = model.target([*prompt, *found.token_ids[:at]])
        values, ids = torch.sort(logits, descending=True, stable=True)
        assert [token for token, _ in told] == ids[:n].tolist()
        want = (values[:n] - torch.logsumexp(logits, -1)).tolist()
        assert [logprob for _, logprob in told] == pytest.approx(want, abs=1e-5)
        assert dict(told).get(found.token_ids[at], found.logprobs[at]) == found.logprobs[at], "to the bit"


def test_texts_side_by_side_have_those_that_they_asked_for():
    """Few pages, so that some are preempted; some ask for none; cycles before them had no such tokens."""
    model = ScriptedModel(small_config(eos_token_ids=(), max_position_embeddings=400), 0.8)
    asked = [
        {"top_logprobs": n, "max_new_tokens": 100, "temperature": t, "seed": n, "strategy": s}
        for n, t, s in ((0, 0.0, "auto"), (3, 0.0, "two-pass"), (20, 0.9, "auto"), (1, 0.0, "one-pass"),
                        (0, 0.9, "two-pass"), (5, 0.0, "autoregressive"))
    ]  # fmt: skip
    prompt = [3] * 50
    alone = [model.generate(prompt, **how | {"strategy": "autoregressive"}) for how in asked]
    engine = Engine(model, 4, PAGE * 6)
    texts = [engine.submit(prompt, Request(**how)) for how in asked]
    while engine.step():
        pass
    assert engine.load.preemptions
    for text, how, own in zip(texts, asked, alone, strict=True):
        found = text.result()
        assert (found.token_ids, found.logprobs) == (own.token_ids, own.logprobs)
        assert found.top_logprobs == own.top_logprobs
        assert {len(told) for told in found.top_logprobs} <= {how["top_logprobs"]}
        assert len(found.top_logprobs) == (len(found.token_ids) if how["top_logprobs"] else 0)


def test_held_back_ends_are_told():
    """min_tokens holds ends back from the choice alone."""
    model = ScriptedModel(small_config(eos_token_ids=tuple(range(0, 97, 2))))
    found = model.generate([3], max_new_tokens=6, min_tokens=6, top_logprobs=5)
    assert all(token % 2 for token in found.token_ids)
    assert any(token % 2 == 0 for told in found.top_logprobs for token, _ in told)


def test_a_small_vocabulary_has_no_more():
    model = ScriptedModel(small_config(vocab_size=12, mask_token_id=11, eos_token_ids=()))
    (told,) = model.generate([3], max_new_tokens=1, top_logprobs=20).top_logprobs
    assert sorted(token for token, _ in told) == list(range(12))
    assert sum(math.exp(logprob) for _, logprob in told) == pytest.approx(1)


@pytest.mark.parametrize("k", [1, 20])
def test_the_kernel_finds_the_twins(k):
    """Ties, infinities and numbers that are none; of a row alone as among others, with the sums of a pass
    without."""
    logits = hard("normal", 5, 700)
    logits[1] = logits[1].round()
    logits[2, 30:], logits[3, [5, 650]], logits[4, 7] = -math.inf, math.inf, math.nan
    logits = logits.to(DEVICE)
    twin, kernel = (backend_ops(backend) for backend in ("reference", "triton"))
    values, ids, sums = kernel.likeliest(logits, k)
    want, want_ids, _ = twin.likeliest(logits, k)
    torch.testing.assert_close(values, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(sums, kernel.log_sum_exp(logits), rtol=0, atol=0, equal_nan=True)
    alone, alone_ids, _ = kernel.likeliest(logits[1:2], k)
    assert torch.equal(alone, values[1:2]) and torch.equal(alone_ids, ids[1:2])
    with pytest.raises(ValueError, match="7"):
        twin.likeliest(logits[:, :6], 7)


def test_rejection_sampling_has_none():
    model = ScriptedModel(small_config())
    with pytest.raises(InputError, match="takes no top_logprobs"):
        model.generate([3], temperature=1.0, verify="rejection", top_logprobs=2)
