"""Many texts at once on a GPU, joining at random: each has the tokens and log-probabilities it has alone.

The embedded checkpoint with held-out prompts and five settings each, then random weights of 8B. How much
runs: ORTHRUS_PROMPTS prompts (20), at least ORTHRUS_CYCLES cycles of an engine (2,000), ORTHRUS_LARGE texts
of 8B (8); `-s` shows what ran. Graphs are captured at the start, and no more later."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from bench.models import random_model
from qwen3_model import Engine, Qwen3, Request
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.decode.sequence import Result, Sequence
from qwen3_model.prompts import read_prompts

pytestmark = pytest.mark.usefixtures("memory")

PROMPTS, CYCLES, LARGE = (
    int(os.environ.get(f"ORTHRUS_{name}", default))
    for name, default in (("PROMPTS", 20), ("CYCLES", 2000), ("LARGE", 8))
)
SLOTS, TOKENS = 64, 256
SETTINGS = (
    {}, {"temperature": 0.8}, {"temperature": 0.7, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.1}, {"logit_bias": {9: -4.0, 11: 1.5}},
)  # fmt: skip
Job = tuple[list[int], Request]


def graphs(engine: Engine) -> int:
    assert engine.runner is not None
    return len(engine.runner.cycles) + len(engine.runner.prompts)


def decoded(engine: Engine, jobs: list[Job], rng: random.Random, check: Callable[[int, Result], None]) -> int:
    """Decode jobs that join at random; returns the number of steps."""
    waiting, texts, steps = list(enumerate(jobs)), dict[Sequence, int](), 0
    while waiting or texts:
        most = 2 * SLOTS - len(texts)
        for _ in range(min(rng.choice([0, 0, 0, 1, 2, 9]), most, len(waiting))):
            nth, job = waiting.pop()
            texts[engine.submit(*job)] = nth
        engine.step()
        steps += 1
        for text in [text for text in texts if text.finished]:
            check(texts.pop(text), text.result())
    return steps


def assert_same(got: Result, want: Result, what: object) -> None:
    assert got.token_ids == want.token_ids, what
    assert got.logprobs == want.logprobs, what
    assert got.stats.finish_reason == want.stats.finish_reason, what


def test_held_out_texts_of_the_embedded_checkpoint():
    model, rng = Qwen3.from_pretrained(EMBEDDED, "cuda", "bfloat16", progress=False), random.Random(3)
    assert model.text is not None
    jobs: list[Job] = []
    for i, text in enumerate(read_prompts(EMBEDDED / "held_out.jsonl", PROMPTS, None, "test")):
        for j, how in enumerate(SETTINGS):
            strategy = rng.choice(["auto", "auto", "autoregressive", "two-pass"])
            request = Request(strategy=strategy, max_new_tokens=TOKENS, seed=100 * i + j, **how)
            jobs.append((model.text.encode(text), request))
    alone = [model.engine.generate(*job) for job in jobs]
    model.engine.forget()
    engine = Engine(model, SLOTS, SLOTS * 1024)
    engine.warm()
    captured, order, steps, done, began = graphs(engine), list(range(len(jobs))), 0, 0, time.perf_counter()
    while steps < CYCLES or not done:
        rng.shuffle(order)
        steps += decoded(
            engine, [jobs[i] for i in order], rng, lambda n, got: assert_same(got, alone[order[n]], order[n])
        )
        done += len(jobs)
        assert graphs(engine) == captured
    seconds = time.perf_counter() - began
    print(f"\n{done} texts as alone, {steps} steps, {captured} graphs, {seconds:.0f} s")
    mixed = [(prompt, replace(how, strategy=rng.choice(["auto", "one-pass"]))) for prompt, how in jobs]
    decoded(engine, mixed, rng, lambda n, got: assert_same(got, alone[n], n))


@pytest.mark.parametrize("name", ["8B", "8B-fp8", "8B-int4"])
def test_random_weights(name):
    model, rng = random_model(name), random.Random(4)
    jobs: list[Job] = []
    for i in range(LARGE):
        prompt = [rng.randrange(model.config.vocab_size - 1) for _ in range(rng.randrange(1, 900))]
        strategy = rng.choice(["auto", "autoregressive"])
        request = Request(strategy=strategy, max_new_tokens=128, seed=i, **SETTINGS[i % len(SETTINGS)])
        jobs.append((prompt, request))
    alone = [model.engine.generate(*job) for job in jobs]
    model.engine.forget()
    engine = Engine(model, min(LARGE, SLOTS), LARGE * 1088)
    steps = decoded(engine, jobs, rng, lambda n, got: assert_same(got, alone[n], n))
    print(f"\n{len(jobs)} texts of {name} as alone, {steps} steps")
