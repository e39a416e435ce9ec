"""Grammars in captured cycles: the embedded checkpoint on a GPU. A cycle is three graphs, the host fills
masks between them, and the text is that of every other strategy, alone and beside texts without a grammar."""

import json
from functools import cache

import pytest

from qwen3_model import Engine, Grammar, Qwen3, Request
from qwen3_model.checkpoint import EMBEDDED

pytest.importorskip("llguidance", reason="grammars need llguidance")
pytestmark = pytest.mark.usefixtures("memory")

PERSON = Grammar.json_schema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 99},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "long"]}, "maxItems": 4},
        },
        "required": ["name", "age", "tags"], "additionalProperties": False,
    }
)  # fmt: skip
WAYS = [
    {"strategy": "autoregressive"}, {"strategy": "lookup"}, {"strategy": "two-pass", "tree_nodes": 0},
    {"strategy": "two-pass", "tree_nodes": 63}, {"strategy": "one-pass"}, {},
]  # fmt: skip
PROMPTS = ["def make_json():\n    return ", "data = ", "config = json.loads('''", "x ="]


@cache
def loaded():
    return Qwen3.from_pretrained(EMBEDDED, "cuda", "bfloat16", progress=False)


@pytest.mark.parametrize("choice", [{}, {"temperature": 0.8, "top_p": 0.95}], ids=str)
def test_every_strategy_is_plain_decoding_of_what_is_permitted(choice):
    loaded().engine.forget()
    for prompt in map(loaded().text.encode, PROMPTS[:2]):
        want = None
        for way in WAYS:
            asked = {"max_new_tokens": 120, "grammar": PERSON, "seed": 7, **choice, **way}
            for _ in "01":  # the second one's cycles are replays
                got = loaded().generate(prompt, **asked)
                want = want or got
                assert (got.token_ids, got.logprobs) == (want.token_ids, want.logprobs), way
            if got.stats.finish_reason == "end_token":
                assert json.loads(got.text)["age"] <= 99
    used = [cycle for cycle in loaded().engine.runner.cycles._cycles.values() if cycle.launches > 2]
    assert used and all(len(cycle.graphs) == 3 for cycle in used)


def test_texts_beside_have_the_bits_that_they_have_alone():
    """With grammars and without, launched ahead; and each is captured before the first text."""
    model, asked = loaded(), []
    for nth in range(12):
        grammar = (PERSON, None, Grammar.json_object())[nth % 3]
        way = WAYS[nth % len(WAYS)]
        choice = {"temperature": 0.8 * (nth % 2), "seed": nth, "max_new_tokens": 90}
        asked.append((model.text.encode(PROMPTS[nth % 4]), Request(grammar=grammar, **choice, **way)))
    alone = [model.engine.generate(*one) for one in asked]
    engine = Engine(model, slots=8, cache_tokens=4096)
    texts = [engine.submit(*one) for one in asked]
    while engine.step():
        pass
    for text, want in zip(texts, alone, strict=True):
        got = text.result()
        assert (got.token_ids, got.logprobs) == (want.token_ids, want.logprobs)
