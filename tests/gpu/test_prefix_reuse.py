"""The second turn of a chat finds the first one's pages: its first token comes sooner, and it has the bits
that it has where nothing is found, and where it was preempted.

Random weights at the shapes of ORTHRUS_MODEL ("8B"); `-s` shows the times."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from statistics import median

import torch
from golden import seeded_model

from orthrus_kernels import PAGE, pages_for
from qwen3_model import Engine, Request

MODEL = os.environ.get("ORTHRUS_MODEL", "8B")
TURN, ANSWER, QUESTION, CHATS = 8000, 200, 100, 4
HOW = Request(temperature=0.8, seed=3, max_new_tokens=ANSWER, ignore_eos=True)


def words(length: int, seed: int) -> list[int]:
    return torch.randint(0, 151_000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def decoded(engine: Engine, prompt: list[int], request: Request = HOW):
    """(seconds until the first token, result) of a text alone in an engine."""
    began = time.perf_counter()
    text = engine.submit(prompt, request)
    while not text.stream.token_ids:
        engine.step()
    first = time.perf_counter() - began
    while not text.finished:
        engine.step()
    return first, text.result()


def same(found, wanted) -> bool:
    return (found.token_ids, found.logprobs) == (wanted.token_ids, wanted.logprobs)


def test_a_second_turn_reads_its_question_alone():
    engine = Engine(seeded_model(MODEL, "cuda"), 2, 4 * CHATS * (TURN + 2 * ANSWER + QUESTION))
    engine.warm()
    firsts, seconds = [], []
    for chat in range(CHATS):
        prompt = words(TURN, chat)
        first, answer = decoded(engine, prompt)
        again = [*prompt, *answer.token_ids, *words(QUESTION, -1 - chat)]
        second, warm = decoded(engine, again)
        _, cold = decoded(engine, again, replace(HOW, cache_salt=f"nobody else's {chat}"))
        assert warm.stats.cached_tokens > TURN and cold.stats.cached_tokens == 0 and same(warm, cold)
        firsts.append(first), seconds.append(second)
    first, second = median(firsts[1:]), median(seconds[1:])
    print(
        f"\n{MODEL}, {TURN} tokens: first token after {1e3 * first:.1f} ms; a second turn's after "
        f"{1e3 * second:.1f} ms, {first / second:.1f} times sooner"
    )
    assert second <= first / 8


def test_a_second_turn_that_is_preempted():
    """An older text grows into the pages that it needs, and it is read again, from what is left of them."""
    model, prompt = seeded_model(MODEL, "cuda"), words(TURN, 0)
    older, newer = (replace(HOW, max_new_tokens=times * ANSWER) for times in (8, 4))
    begun = pages_for(TURN + ANSWER + QUESTION) + pages_for(PAGE + 4 * ANSWER)
    engine = Engine(model, 2, PAGE * (begun + 6))
    _, answer = decoded(engine, prompt)
    again = [*prompt, *answer.token_ids, *words(QUESTION, -1)]
    _, wanted = decoded(engine, again, newer)
    grows = engine.submit(words(PAGE, 9), older)
    while len(grows.stream.token_ids) < 4 * ANSWER:
        engine.step()
    text = engine.submit(again, newer)
    while engine.step():
        pass
    assert engine.load.preemptions > 0 and grows.finished
    assert same(text.result(), wanted)
