"""Contexts that YaRN stretches, beside short texts, in pools that just hold them."""

from __future__ import annotations

import pytest
import torch
from small import small_model

from orthrus_kernels import PAGE, pages_for
from qwen3_model import Engine, InputError, Request
from qwen3_model.rope_config import YarnScaling

STRETCHED = {"max_position_embeddings": 100, "yarn": YarnScaling(4.0, 64), "eos_token_ids": ()}
# prompt, new tokens: the last one ends at the last position
TEXTS = ((9, 16), (200, 9), (3, 24), (248, 8))


@pytest.fixture(scope="module")
def model():
    return small_model("bfloat16", **STRETCHED)


def prompt(length: int) -> list[int]:
    return torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def request(nth: int, most: int) -> Request:
    strategy, heat = ("autoregressive", "two-pass", "one-pass", "two-pass")[nth], 0.8 * (nth % 2)
    return Request(strategy=strategy, temperature=heat, max_new_tokens=most, seed=nth)


@pytest.mark.parametrize("pages", ["for all", "for the longest"])
def test_long_texts_beside_short_ones(model, pages):
    """Bits as alone; with pages for the longest text only, younger ones wait or are read again."""
    assert model.config.context_length == 256
    limits = [pages_for(length + most) for length, most in TEXTS]
    assert limits[-1] * PAGE == 256
    engine = Engine(model, 3, PAGE * (sum(limits) if pages == "for all" else limits[-1]))
    texts = [engine.submit(prompt(length), request(nth, most)) for nth, (length, most) in enumerate(TEXTS)]
    while engine.step():
        pass
    for nth, (text, (length, most)) in enumerate(zip(texts, TEXTS, strict=True)):
        result, alone = text.result(), model.engine.generate(prompt(length), request(nth, most))
        assert len(result.token_ids) == most
        assert (result.token_ids, result.logprobs) == (alone.token_ids, alone.logprobs), nth


def test_no_text_is_longer_than_the_context(model):
    """Whatever the cache holds: there are no angles behind the context."""
    engine = Engine(model, 2, 1 << 12)
    for length, most, said in ((256, 1, "the context only 256"), (250, 7, "at most 6 new tokens")):
        with pytest.raises(InputError, match=said):
            engine.submit([1] * length, Request(max_new_tokens=most))
    assert engine.runner_for(1).cache.capacity == 256
