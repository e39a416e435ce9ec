"""Penalties on what was generated, against a plain loop in Python: in trees whose paths repeat a token,
beside other texts, and where a text is read again."""

import pytest
from scripted import Stutter
from small import small_config

from orthrus_kernels import PAGE
from qwen3_model import Engine, Request

PENALTIES = [
    {"frequency_penalty": 0.4}, {"presence_penalty": 1.5},
    {"frequency_penalty": -0.3, "presence_penalty": 1.5},
    {"frequency_penalty": 0.3, "presence_penalty": -0.7, "repetition_penalty": 1.1},
]  # fmt: skip
WAYS = [
    {"strategy": "autoregressive"}, {"strategy": "two-pass", "tree_nodes": 0},
    {"strategy": "two-pass", "tree_nodes": 20}, {"strategy": "one-pass", "tree_nodes": 6},
]  # fmt: skip


def model_of(seed=0):
    return Stutter(small_config(eos_token_ids=()), 0.9, seed=seed)


def by_hand(model, prompt, count, frequency_penalty=0.0, presence_penalty=0.0, repetition_penalty=1.0):
    """The greedy text, in the order of the twin: repetition, frequency, presence."""
    told: list[int] = []
    while len(told) < count:
        text = [*prompt, *told]
        scores = model.target(text).tolist()
        for token in set(text):
            x = scores[token]
            scores[token] = x / repetition_penalty if x > 0 else x * repetition_penalty
        for token in told:
            scores[token] -= frequency_penalty
        for token in set(told):
            scores[token] -= presence_penalty
        told.append(max(range(len(scores)), key=scores.__getitem__))
    return told


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
def test_every_strategy_tells_the_text_of_a_plain_loop(penalties, way):
    """The prompt holds the token that would be said again, which is nothing generated."""
    model = model_of()
    wanted = by_hand(model, [5, 6, 6], 30, **penalties)
    assert wanted != by_hand(model, [5, 6, 6], 30) and max(map(wanted.count, wanted)) > 1
    result = model.generate([5, 6, 6], max_new_tokens=30, **way, **penalties)
    assert result.token_ids == wanted
    if way["strategy"] != "autoregressive":
        assert result.stats.cycles < 29, "drafts were accepted"


def test_texts_side_by_side_and_read_again():
    """On pages for less than two, texts give up their slots and come back with what they have told."""
    model = model_of(3)
    engine = Engine(model, 4, 4 * PAGE)
    texts = [
        ([5, nth], Request(max_new_tokens=140, **penalties, **way))
        for nth, (penalties, way) in enumerate(zip(PENALTIES, WAYS, strict=True))
    ]
    running = [engine.submit(prompt, request) for prompt, request in texts]
    while any(not text.finished for text in running):
        engine.step()
    assert engine.load.preemptions > 0
    for text, (prompt, _), penalties in zip(running, texts, PENALTIES, strict=True):
        assert text.result().token_ids == by_hand(model, prompt, 140, **penalties), penalties
