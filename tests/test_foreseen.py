"""What lookup would keep of a text, walked along on the host: exactly what lookup finds."""

import gc
import weakref
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import ScriptedModel
from small import small_config

from bench.trace import looked_up
from qwen3_model import Engine, Request
from qwen3_model.decode import cycles
from qwen3_model.decode.cycle import LOOKUP_ROWS
from qwen3_model.decode.foreseen import Foreseen

TEXTS = st.one_of(
    st.lists(st.integers(0, 2), min_size=1, max_size=60),  # repeats itself soon
    st.lists(st.integers(0, 150_000), min_size=1, max_size=20),
    st.builds(list.__mul__, st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 6)),
    st.builds(
        lambda part, other: [*part, *other, *part, *other[::-1], *part, *part],
        st.lists(st.integers(0, 9), min_size=1, max_size=9),
        st.lists(st.integers(0, 9), max_size=9),
    ),
)


def by_lookup(text, first, rows):
    """Cycle behind cycle from the first token on, as far as the ends of cycles are known; of those whose root
    is not in front of token `first`."""
    kept, root, found = looked_up(text, 0), 0, []
    while root < len(text) - 1:
        end = root + min(kept[root], rows)
        if end == len(text):
            break
        found += [end - root] * (root >= first)
        root = end
    return found


STEPS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)))


@given(text=TEXTS, rows=st.sampled_from([2, 3, 8, LOOKUP_ROWS]), steps=STEPS, known=st.integers(1, 60))
def test_it_is_what_lookup_keeps(text, rows, steps, known):
    """However many tokens come at a time, and however few of them are walked over."""
    known = min(known, len(text))
    tokens, found, walked = text[:known], [], 0
    walk = Foreseen(tokens)
    for more, most in (*steps, (len(text), len(text))):
        tokens += text[len(tokens) :][:more]
        kept, at_least, count = walk.follow(rows, most)
        assert count == min(most, len(tokens) - walked)
        found, walked = found + kept, walked + count
        assert walk.unread == len(tokens) - walked
        if walked:  # as if the next token were a wrong one
            cut = by_lookup([*text[:walked], -1], known - 1, rows)
            assert cut == ([*found, at_least] if at_least else []), (cut, found, at_least)
    assert walked == len(text) and found == by_lookup(text, known - 1, rows)


def test_by_hand():
    """The latest of equal places; round and round; a draft that is right to its end; a prompt's cycles do not
    count."""
    tokens = [1, 2, 3, 1, 2, 4, 1]
    walk = Foreseen(tokens)
    assert walk.follow(16, 5) == ([], 0, 5) and walk.follow(16, 99) == ([], 1, 2)
    tokens += [2, 4, 1, 2]  # what stood behind the last 1
    assert walk.follow(16, 99) == ([], 5, 4)
    tokens += [3]
    assert walk.unread == 1 and walk.follow(16, 99) == ([5], 1, 1), "in place of a 4"
    tokens += [1, 2, 4, *[7] * 40]  # as behind the first 3; then what never was, of which a draft repeats it
    assert walk.follow(16, 99) == ([4, 16, 16], 8, 43)
    assert walk.follow(16, 99) == ([], 8, 0)


class Counting(ScriptedModel):
    """Its text counts to seven again and again, and its diffusion view never gets it."""

    def target(self, text):
        logits = super().target(text) * 0
        logits[(text[-1] + 1) % 7] = 1.0
        return logits


@pytest.mark.parametrize("slots", [1, 3])
def test_auto_looks_up_what_repeats_itself(slots):
    """Each text by its own tokens, beside others too. Strategy two-pass does not, nor does a text that says
    how large its trees are."""
    model = Counting(small_config(eos_token_ids=()), skill=0.0)
    for how, wanted in (({}, True), ({"strategy": "two-pass"}, False), ({"tree_nodes": 0}, False)):
        engine = Engine(model, slots, 1024)
        submit = partial(engine.submit, request=Request(max_new_tokens=60, **how))
        texts = [submit([n, 9]) for n in range(slots)]
        while engine.step():
            pass
        for text in texts:
            result = text.result()
            assert result.token_ids == [n % 7 for n in range(result.token_ids[0], result.token_ids[0] + 60)]
            assert (result.stats.cycles_of.get("lookup", 0) > 2) == wanted, result.stats.cycles_of
            assert not wanted or result.stats.tokens_per_forward > 2


def test_lookup_is_foreseen_in_cycles_of_as_many_rows_as_it_has(monkeypatch):
    """Of each text fewer beside many others, which end one after another."""
    asked = []

    class Asked(Foreseen):
        def follow(self, rows, most):
            asked.append(rows)
            return super().follow(rows, most)

    monkeypatch.setattr(cycles, "Foreseen", Asked)
    engine = Engine(Counting(small_config(eos_token_ids=()), skill=0.0), 17, 17 * 128)
    for n in range(17):
        engine.submit([n % 7, 9], Request(max_new_tokens=20 + 4 * n))
    while engine.step():
        pass
    assert set(asked) == {4, 8, LOOKUP_ROWS}, "of 32 seats, of 16, of 8 and fewer"


def test_nothing_is_kept_of_texts_that_ended(monkeypatch):
    """Nor in what cycles of so many seats have learnt, which change here as texts end."""
    made = []

    def noted(tokens):
        walk = Foreseen(tokens)
        made.append(weakref.ref(walk))
        return walk

    monkeypatch.setattr(cycles, "Foreseen", noted)
    engine = Engine(Counting(small_config(eos_token_ids=()), skill=0.0), 3, 1024)
    texts = [engine.submit([n, 9], Request(max_new_tokens=20 + 20 * n)) for n in range(3)]
    while engine.step():
        pass
    assert len(made) == 3 and all(text.result().stats.tokens == 20 + 20 * n for n, text in enumerate(texts))
    assert len(engine.runner.cycles.controllers) == 3, "four seats, two, one"
    gc.collect()
    assert [walk() for walk in made] == [None] * 3
