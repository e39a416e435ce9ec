"""The stream of tokens: the same text and end however tokens come in runs; no stop string is left in it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import ScriptedModel
from small import small_config

from qwen3_model import checkpoint
from qwen3_model.decode.stream import TokenStream
from qwen3_model.text import Text

END = 1
PIECES = ["\ufffd", "x\ufffd", "\ufffd\ufffd", "é", "日", "a", "\n", "🙂"]


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(checkpoint.EMBEDDED)


@pytest.fixture(scope="module")
def halves(text) -> list[int]:
    """A letter, and tokens that are parts of characters."""
    return [*text.encode("a"), *text.encode("x"), *text.encode("é"), *text.encode("日"), *text.encode("🙂")]


def streamed(text, tokens, stop, limit, runs=None) -> tuple[str, str, list[int], str]:
    """Text, finish reason, kept tokens and what the callback was given, the tokens coming in runs."""
    given = []
    stream = TokenStream(text, [END], stop, limit, lambda ids, piece: given.append(piece) is None)
    at = 0
    for length in [*(runs or []), len(tokens)]:
        if stream.finish_reason:
            break
        stream.push(tokens[at : at + length])
        stream.release()
        at += length
    return stream.text, stream.finish_reason, stream.token_ids, "".join(given)


@pytest.mark.parametrize(("last", "reason"), [([], "length"), ([END], "end_token")])
def test_a_stop_string_that_the_last_half_character_completes_ends_the_text(text, last, reason):
    letter, half = text.encode("a")[0], text.encode("é")[0]
    assert text.decode([letter, half]) == "a\ufffd"
    tokens = [letter, half, *last]
    assert streamed(text, tokens, [], len(tokens)) == ("a\ufffd", reason, tokens, "a\ufffd")
    assert streamed(text, tokens, ["\ufffd"], len(tokens)) == ("a", "stop_string", tokens, "a")
    assert streamed(text, tokens, ["a\ufffd"], len(tokens)) == ("", "stop_string", tokens, "")


@pytest.mark.parametrize("end", [5, 6])
def test_any_end_token_of_the_list_ends_a_stream(end):
    stream = TokenStream(None, (5, 6), (), 9, None)
    assert stream.push([1, end, 2]) == 2
    assert (stream.token_ids, stream.finish_reason) == ([1, end], "end_token")


@pytest.mark.parametrize("reason", ["callback", "interrupted"])
def test_an_end_from_outside_keeps_its_name(text, reason):
    stream = TokenStream(text, [END], ["\ufffd"], 9, None)
    stream.push(text.encode("é")[:1])
    stream.finish(reason)
    assert (stream.text, stream.finish_reason) == ("", reason)


@given(st.data())
def test_runs_change_nothing_and_no_stop_string_stays(text, halves, data):
    tokens = data.draw(
        st.lists(st.sampled_from([*halves, END]) | st.integers(2, 40), min_size=1, max_size=12)
    )
    stop = data.draw(st.lists(st.sampled_from(PIECES), max_size=2))
    limit = data.draw(st.integers(1, len(tokens)))
    one_by_one = streamed(text, tokens, stop, limit, [1] * len(tokens))
    runs = data.draw(st.lists(st.integers(1, 4), max_size=6))
    assert streamed(text, tokens, stop, limit, runs) == one_by_one
    assert not any(string in one_by_one[0] for string in stop) and one_by_one[3] == one_by_one[0]


class HalfCharacters:
    """A text of 97 tokens, every third of which is the first half of a character."""

    def is_visible(self, token: int) -> bool:
        return True

    def decode(self, ids) -> str:
        return b"".join(b"\xc3" if token % 3 == 0 else bytes([65 + token % 26]) for token in ids).decode(
            "utf-8", "replace"
        )


@given(
    n=st.integers(1, 12),
    world=st.integers(0, 50),
    stop=st.sampled_from(["\ufffd", "\ufffd\ufffd", "A\ufffd"]),
)
def test_every_strategy_ends_at_the_same_stop_string(n, world, stop):
    config = small_config(eos_token_ids=())
    found = set()
    for strategy in ("autoregressive", "two-pass", "one-pass", "auto"):
        model = ScriptedModel(config, 0.9, HalfCharacters(), world)
        result = model.generate([1], strategy=strategy, max_new_tokens=n, stop=stop)
        assert stop not in result.text
        found.add((result.text, tuple(result.token_ids), result.stats.finish_reason))
    assert len(found) == 1
