"""What a callback receives, by what it may rely on: joined pieces are the text, whatever the tokens and the
stop strings are; nothing that was given is taken back, and nothing is held back but half a stop string or
half a character."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scripted import ScriptedModel
from small import small_config

from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.decode import stream
from qwen3_model.text import Text

TEXT = Text(EMBEDDED)
PROMPT = [1, 2]


class Teller(ScriptedModel):
    """Tells tokens one after the other, and its drafter knows them all."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__(small_config(vocab_size=2048, mask_token_id=2047, eos_token_ids=()), skill=1.0)
        self.told, self.text = tokens, TEXT

    def target(self, text: list[int]) -> torch.Tensor:
        at = len(text) - len(PROMPT)
        logits = torch.zeros(2048)
        logits[self.told[at] if at < len(self.told) else 5] = 9.0
        return logits


def ended(tokens: list[int], stops: list[str]) -> str:
    """The text of tokens up to the first at which a stop string is there."""
    for n in range(1, len(tokens) + 1):
        text = TEXT.decode(tokens[:n])
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)]
    return TEXT.decode(tokens)


WORDS = st.text("aab \n<é🙂", min_size=1, max_size=14)


@given(words=WORDS, stops=st.lists(WORDS.map(lambda w: w[:4]), max_size=3), by_character=st.booleans(),
       limit=st.integers(1, 40), block=st.integers(2, 8),
       strategy=st.sampled_from(["two-pass", "one-pass"]))  # fmt: skip
@example("aaab b", ["aab"], True, 40, 2, "two-pass")  # half of it again behind half of it
@example("a<<<a", ["<<a", "<<<<"], True, 40, 2, "two-pass")  # the shorter half must not win
@example("abab", ["bab", "ba"], False, 40, 8, "two-pass")  # two in one token or run: the first one counts
@example("b🙂", [], True, 3, 2, "two-pass")  # ends within a character
@example("ab a", ["ab a<"], True, 40, 2, "one-pass")  # half a stop string is the end
def test_pieces_are_the_text(words, stops, by_character, limit, block, strategy):
    tokens = [t for part in (words if by_character else [words]) for t in TEXT.encode(part)]
    tokens, given_so_far, taken = tokens[:limit], "", []
    seen = []

    def on_tokens(ids, piece):
        nonlocal given_so_far
        given_so_far += piece
        taken.extend(ids)
        seen.append((given_so_far, TEXT.decode(taken)))

    block = max(block, 3) if strategy == "one-pass" else block
    result = Teller(tokens).generate(
        PROMPT,
        max_new_tokens=len(tokens),
        stop=stops,
        strategy=strategy,
        block_size=block,
        on_tokens=on_tokens,
    )
    assert given_so_far == result.text == ended(tokens, stops) and taken == result.token_ids
    for text, decoded in seen[:-1]:
        assert result.text.startswith(text), "nothing is taken back"
        held = decoded.rstrip("\ufffd")[len(text) :]
        assert not held or any(stop.startswith(held) for stop in stops), "no more is held back"


@pytest.mark.parametrize("stop", ["end", "nd", "d"])
def test_a_run_that_holds_a_stop_string(stop):
    """One run of tokens completes it and goes on."""
    tokens, pieces = [t for c in "the end of it" for t in TEXT.encode(c)], []
    result = Teller(tokens).generate(
        PROMPT, max_new_tokens=len(tokens), stop=[stop], tree_nodes=0, strategy="two-pass",
        on_tokens=lambda ids, piece: pieces.append(piece),
    )  # fmt: skip
    assert "".join(pieces) == result.text == "the end"[: 7 - len(stop)]
    assert result.stats.finish_reason == "stop_string" and len(result.token_ids) == 7


@given(pieces=st.lists(st.text("ab", max_size=6), max_size=8), stop=st.text("ab", min_size=1, max_size=9))
def test_what_is_held_back_is_the_longest_beginning_of_a_stop_string(pieces, stop):
    held, text = stream._Held(stop), ""
    for piece in pieces:
        held.push(piece)
        text += piece
        longest = max(n for n in range(min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        assert held.length == longest


def test_a_long_stop_string_costs_a_few_steps_a_character():
    """Of 1000 characters, where every end of the text is half of it."""
    steps = 0

    class Counted(str):
        def __getitem__(self, at):
            nonlocal steps
            steps += 1
            return super().__getitem__(at)

    held = stream._Held(Counted("a" * 999 + "b"))
    steps = 0
    held.push("a" * 5000)
    assert held.length == 998 + 1 and steps < 4 * 5000
