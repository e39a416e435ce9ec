"""Each text has its own end tokens: the checkpoint's unless it ignores them, and those that it names."""

import pytest
from scripted import ScriptedModel
from small import small_config

from qwen3_model import Engine, InputError, Request

ENDS = tuple(range(0, 30, 2))
WAYS = (
    {"strategy": "autoregressive"}, {"strategy": "two-pass", "tree_nodes": 0},
    {"strategy": "two-pass", "tree_nodes": 7}, {"strategy": "one-pass", "tree_nodes": 5},
)  # fmt: skip
OWN = (
    {}, {"ignore_eos": True}, {"stop_token_ids": range(1, 31, 2)},
    {"ignore_eos": True, "stop_token_ids": [*range(40, 48)] * 2}, {"stop_token_ids": [40, 2]},
    {"ignore_eos": True, "stop_token_ids": range(0, 30, 2), "min_tokens": 9},
    {"stop_token_ids": range(60, 76), "min_tokens": 9}, {"ignore_eos": True, "min_tokens": 20},
)  # fmt: skip


def ends_of(ignore_eos=False, stop_token_ids=(), **_):
    return {*(() if ignore_eos else ENDS), *stop_token_ids}


def by_hand(model, prompt, ends, most, least=0):
    """The greedy text: no end token among the first `least`."""
    told: list[int] = []
    while len(told) < most and not {*told[-1:]} & ends:
        scores = model.target([*prompt, *told]).tolist()
        for token in ends if len(told) < least else ():
            scores[token] = float("-inf")
        told.append(max(range(len(scores)), key=scores.__getitem__))
    return told


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_each_text_has_its_own(way):
    """Side by side, and in turn in the same slots."""
    model = ScriptedModel(small_config(eos_token_ids=ENDS), 0.8)
    engine = Engine(model, 3, 640)
    texts = [engine.submit([3, nth], Request(max_new_tokens=24, **own, **way)) for nth, own in enumerate(OWN)]
    while any(not text.finished for text in texts):
        engine.step()
    reasons = set()
    for nth, (text, own) in enumerate(zip(texts, OWN, strict=True)):
        result, ends = text.result(), ends_of(**own)
        assert result.token_ids == by_hand(model, [3, nth], ends, 24, own.get("min_tokens", 0)), own
        ended = result.token_ids[-1] in ends
        assert result.stats.finish_reason == ("end_token" if ended else "length"), own
        reasons.add(result.stats.finish_reason)
    assert len(reasons) == 2


@pytest.mark.parametrize("token", [-1, 97, 2**63])
def test_a_token_that_is_none_is_refused(token):
    with pytest.raises(InputError, match="stop_token_ids names token"):
        ScriptedModel(small_config()).generate([5], stop_token_ids=[token])
