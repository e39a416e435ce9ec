"""Answers of the embedded checkpoint to JSON schemas of many kinds: each is JSON that fits its schema, by
another library; and drafts change no token of it, alone or beside others. `-s` shows tokens a cycle."""

from __future__ import annotations

import json
from functools import cache

import jsonschema
import pytest
from interpreter import DEVICE

pytest.importorskip("llguidance", reason="grammars need llguidance")

from bench.schemas import schemas
from qwen3_model import Engine, Grammar, Qwen3, Request
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.decode.sequence import Result

PROMPT = "def example():\n    return "
# But for dates: Python knows no year 0, which RFC 3339 has.
FORMATS = jsonschema.FormatChecker(["ipv4", "uuid"])
MOST = 400  # tokens: far more than an answer takes
DRAFTED = [
    {}, {"strategy": "two-pass", "tree_nodes": 15}, {"strategy": "two-pass", "tree_nodes": 0},
    {"strategy": "one-pass", "tree_nodes": 7}, {"strategy": "lookup"},
]  # fmt: skip


@cache
def model() -> Qwen3:
    return Qwen3.from_pretrained(EMBEDDED, DEVICE, progress=False)


def answers(
    given: list[dict], slots: int, temperature: float, most: int = MOST, first: int = 0, **way
) -> list[Result]:
    """One a schema, decoded side by side; the seeds count from `first`."""
    engine = Engine(model(), slots, 512 * slots if slots > 1 else None)
    prompt = model().text.encode(PROMPT)
    settings = {"max_new_tokens": most, "temperature": temperature, **way}
    texts = [
        engine.submit(prompt, Request(grammar=Grammar.json_schema(schema), seed=nth, **settings))
        for nth, schema in enumerate(given, first)
    ]
    while engine.step():
        pass
    return [text.result() for text in texts]


def check(given: list[dict], found: list[Result]) -> None:
    """Every answer has ended by itself, and fits."""
    for schema, result in zip(given, found, strict=True):
        assert result.stats.finish_reason == "end_token", (schema, result.text)
        checker = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
        checker.validate(json.loads(result.text))


def ids(found: list[Result]) -> list[list[int]]:
    return [result.token_ids for result in found]


def test_some_schemas():
    given = schemas(10, seed=2)
    plain = answers(given, 10, 0.8, strategy="autoregressive")
    check(given, plain)
    assert ids(answers(given[4:7], 2, 0.8, first=4, **DRAFTED[1])) == ids(plain[4:7])


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_two_hundred_schemas(temperature):
    given = schemas(100, seed=int(10 * temperature))
    plain = answers(given, 32, temperature, strategy="autoregressive")
    check(given, plain)
    for way in DRAFTED:  # on a CPU a tree for all of them, for the others as many as there is time for
        some = given if DEVICE == "cuda" or way is DRAFTED[1] else given[:20]
        found = answers(some, 32, temperature, **way)
        assert ids(found) == ids(plain)[: len(some)], way
        tokens, cycles = (sum(getattr(r.stats, n) for r in found) for n in ("cycle_tokens", "cycles"))
        print(f"\nT {temperature:g}, {way}: {len(some)} as plain, {tokens / cycles:.2f} tokens a cycle")
    cut = answers(given, 32, temperature, most=5, **DRAFTED[1])
    assert all(whole[:5] == part for whole, part in zip(ids(plain), ids(cut), strict=True))
    alone = [answers([given[0]], 1, temperature, **way)[0].token_ids for way in DRAFTED]
    assert alone == [plain[0].token_ids] * len(DRAFTED)
