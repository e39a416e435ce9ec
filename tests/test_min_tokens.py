"""min_tokens: neither end tokens nor stop strings end a text before it has so many, whatever drafts it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inputs import examples
from scripted import ScriptedModel
from small import small_config, small_model

from qwen3_model import Engine, InputError, Request
from qwen3_model.decode.stream import TokenStream

ENDS = tuple(range(0, 60, 2))  # so many that most texts would end at once
WAYS = (
    {"strategy": "autoregressive"}, {"strategy": "two-pass", "tree_nodes": 0}, {"strategy": "auto"},
    {"strategy": "two-pass", "tree_nodes": 7}, {"strategy": "one-pass", "tree_nodes": 5},
)  # fmt: skip
SETTINGS = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**32)},
    optional={
        "temperature": st.sampled_from([0.0, 0.8]), "top_k": st.sampled_from([0, 9]),
        "top_p": st.sampled_from([1.0, 0.7]), "repetition_penalty": st.sampled_from([1.0, 1.4]),
        "logit_bias": st.sampled_from([{}, {2: 30.0, 3: -2.0}]),
    },
)  # fmt: skip


def in_two_parts(model, prompt, settings, least, most):
    """What min_tokens means: end tokens are banned for the first `least` tokens, and then no longer."""
    how = {"strategy": "autoregressive", **settings}
    banned = how.get("logit_bias", {}) | dict.fromkeys(ENDS, float("-inf"))
    first = model.generate(prompt, max_new_tokens=least, **how | {"logit_bias": banned})
    assert first.stats.finish_reason == "length" and not {*first.token_ids} & {*ENDS}
    if least == most:
        return first.token_ids, first.logprobs
    rest = model.generate([*prompt, *first.token_ids], max_new_tokens=most - least, **how)
    return first.token_ids + rest.token_ids, first.logprobs + rest.logprobs


@examples(25)
@given(
    prompt=st.lists(st.integers(0, 95), min_size=1, max_size=9), settings=SETTINGS, way=st.sampled_from(WAYS),
    least=st.integers(1, 12), more=st.integers(0, 9), skill=st.sampled_from([0.3, 1.0]),
)  # fmt: skip
def test_it_is_a_ban_of_the_end_tokens_that_is_lifted(prompt, settings, way, least, more, skill):
    model = ScriptedModel(small_config(eos_token_ids=ENDS), skill)
    found = model.generate(prompt, max_new_tokens=least + more, min_tokens=least, **settings | way)
    assert (found.token_ids, found.logprobs) == in_two_parts(model, prompt, settings, least, least + more)


def test_texts_side_by_side_have_their_own():
    """Beside each other, one of them without; greedy in one graph with the others' ends held back."""
    model = small_model("float32", eos_token_ids=ENDS)
    asked = [{"min_tokens": n, "max_new_tokens": 14, "seed": n, "temperature": t, "strategy": "two-pass"}
             for n, t in ((0, 0.0), (9, 0.0), (5, 0.9), (14, 0.0))]  # fmt: skip
    alone = [model.generate([3, 5], **how) for how in asked]
    engine = Engine(model, 4, 512)
    texts = [engine.submit([3, 5], Request(**how)) for how in asked]
    while engine.step():
        pass
    for text, want, how in zip(texts, alone, asked, strict=True):
        got = text.result()
        assert (got.token_ids, got.logprobs) == (want.token_ids, want.logprobs)
        assert len(got.token_ids) >= how["min_tokens"]
    assert len(alone[0].token_ids) < 5, "without it a text ends early"


def test_an_accepted_draft_does_not_end_the_text_either():
    """A perfect drafter proposes no end token, so its drafts are kept whole."""
    model = ScriptedModel(small_config(eos_token_ids=ENDS), 1.0)
    found = model.generate([7], "two-pass", max_new_tokens=16, min_tokens=16, tree_nodes=0, block_size=4)
    assert len(found.token_ids) == 16 and found.stats.cycles <= 5


class Letters:
    """A token is a character."""

    def __init__(self, text):
        self.push = chr

    def flush(self):
        return ""


STOPPED = (0, "xx"), (3, "xx"), (4, "xxabxx"), (7, "xxabxx"), (8, "xxabxxabxx")


@pytest.mark.parametrize(("least", "text"), STOPPED)
def test_a_stop_string_counts_that_a_token_behind_the_first_ones_completes(least, text, monkeypatch):
    monkeypatch.setattr("qwen3_model.decode.stream.Detokenizer", Letters)
    stream = TokenStream("text", (), ("ab",), 12, None, least)
    stream.push([ord(letter) for letter in "xxabxxabxxab"])
    assert (stream.text, stream.finish_reason) == (text, "stop_string")


def test_a_stop_string_among_the_first_tokens_stays_beside_a_longer_one(monkeypatch):
    """The longer one may begin far back, the shorter one may not; and what a callback got is the text."""
    monkeypatch.setattr("qwen3_model.decode.stream.Detokenizer", Letters)
    pieces: list[str] = []
    stream = TokenStream("text", (), ("a", "bcdef"), 9, lambda _, piece: pieces.append(piece), 2)
    for letter in "xaxxa":
        stream.push([ord(letter)])
        stream.release()
    assert (stream.text, "".join(pieces), stream.finish_reason) == ("xaxx", "xaxx", "stop_string")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_tokens": 5, "max_new_tokens": 4}, "min_tokens is 5, but the text has 4 new tokens at most"),
        ({"min_tokens": 10**6}, "min_tokens is 1000000"),
        ({"min_tokens": 2, "verify": "rejection", "temperature": 1.0}, "no min_tokens"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        ScriptedModel(small_config()).generate([1], **settings)
