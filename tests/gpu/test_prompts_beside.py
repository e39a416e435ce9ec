"""Prompts beside texts that decode, on a GPU: what their rows add to a cycle, how long texts wait beside a
prompt of 30,000 tokens, and tokens/s of a closed loop of 64 texts with prompts of three lengths, 256 new
tokens each.

Random weights at the shapes of ORTHRUS_MODEL ("8B"); `-s` shows the figures. The last two tests need no row
that rides: copied into an older checkout they give the figures before."""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import replace
from functools import cache
from itertools import count
from statistics import mean, median, quantiles

import pytest
import torch
from golden import seeded_model
from waits import gaps

from qwen3_model import Engine, Request

MODEL = os.environ.get("ORTHRUS_MODEL", "8B")
SLOTS, PROMPT, NEW, LONG = 64, 1000, 256, 30_000
PLAIN = Request(strategy="autoregressive", max_new_tokens=NEW, ignore_eos=True)
DRAFTED = Request(strategy="two-pass", max_new_tokens=NEW, ignore_eos=True)  # random weights keep a token
_SEEDS = count()


@cache
def engine() -> Engine:
    """Warm, with pages for all texts of these tests."""
    made = Engine(seeded_model(MODEL, "cuda"), SLOTS, 2 * SLOTS * (PROMPT + NEW) + 2 * LONG)
    began = time.perf_counter()
    print(f"\n{made.warm()}: {time.perf_counter() - began:.1f} s")
    return made


def prompt(length: int) -> list[int]:
    """Tokens that no other prompt has, so that none is found in pages of another."""
    generator = torch.Generator().manual_seed(next(_SEEDS))
    return torch.randint(0, 151_000, (length,), generator=generator).tolist()


def test_what_rows_for_prompts_add_to_a_cycle():
    """By seats and number of rows. 256 rows, the ones that ride, take less than a chunk of their own."""
    from qwen3_model.decode.cycle_times import capture, key_time, times_of
    from qwen3_model.decode.groups import seats_for
    from qwen3_model.decode.kinds import trees_for, with_riders
    from qwen3_model.decode.two_pass import TwoPassCycle

    runner, numbers = engine().runner, (0, 64, 128, 192, 256, 384, 512)
    assert runner is not None
    slots, pool, pace = runner.cycles.slots, runner.cycles.pool, runner.cycles.pace
    print(f"\nchunks of their own (ms): {pace.first}; a row, for 1000 keys: {1e3 * pace.key:.4f}")
    with torch.inference_mode():
        for seats in map(seats_for, (1, 8, 16, 32, 64)):
            for nodes in with_riders((-1, *trees_for(seats))):
                block = 0 if nodes < 0 else min(32, nodes + 1)
                made = [TwoPassCycle(slots, seats, nodes, block, riders=riders) for riders in numbers]
                capture(made, slots, pool)
                took = dict(zip(numbers, times_of(made, slots, pool), strict=True))
                keys = 1e3 * key_time(made[numbers.index(256)], slots, pool)
                times = ", ".join(f"{n}: {t:.2f}" for n, t in took.items())
                print(f"{seats} seats, trees of {nodes}: {times} ms; a row, for 1000 keys: {keys:.4f}")
                assert 0 < took[256] - took[0] < pace.first[512]


@pytest.mark.parametrize("request_of", [PLAIN, DRAFTED], ids=["plain", "drafted"])
@pytest.mark.parametrize("texts", [1, 8, 32, 63])
def test_how_long_texts_wait_beside_a_long_prompt(texts, request_of):
    """Once nobody's prompt is read, then beside one: the time between two steps that bring a text tokens."""
    work = engine()
    going = replace(request_of, max_new_tokens=2000)
    beside = [work.submit(prompt(100), going) for _ in range(texts)]
    while min(len(text.stream.token_ids) for text in beside) < 50:
        work.step()
    usual = gaps(work, beside[0], lambda: len(beside[0].stream.token_ids) > 150)
    long, began = work.submit(prompt(LONG), PLAIN), time.perf_counter()
    found = gaps(work, beside[0], lambda: bool(long.stream.token_ids))
    first = time.perf_counter() - began
    for text in (*beside, long):
        work.cancel(text)
    times = median(found) / median(usual)
    print(
        f"\n{texts} texts: {1e3 * median(usual):.1f} ms a cycle; beside {LONG} tokens "
        f"{1e3 * median(found):.1f} ({times:.2f} times; {1e3 * mean(found):.1f} on average), 95 % "
        f"below {1e3 * quantiles(found, n=20)[-1]:.1f}, at most {1e3 * max(found):.1f}; {len(found)} cycles, "
        f"first token after {first:.2f} s"
    )
    assert times < 3 and mean(found) < 3 * median(usual)


@pytest.mark.parametrize("request_of", [PLAIN, DRAFTED], ids=["plain", "drafted"])
@pytest.mark.parametrize("length", [20, 250, PROMPT])
def test_tokens_a_second_of_a_closed_loop(length, request_of):
    """As many texts as slots, a new one for each that ends; 64 end before the clock, 256 within it."""
    work = engine()
    running = deque(work.submit(prompt(length), request_of) for _ in range(SLOTS))
    ended, tokens, began, first = 0, 0, 0.0, list[float]()
    asked = dict.fromkeys(running, time.perf_counter())
    while ended < 5 * SLOTS:
        work.step()
        now = time.perf_counter()
        first += [now - asked.pop(text) for text in running if text in asked and text.stream.token_ids]
        for text in [text for text in running if text.finished]:
            running.remove(text)
            ended += 1
            if ended == SLOTS:
                tokens, began, first = 0, now, []
            tokens += len(text.result().token_ids) * (ended > SLOTS)
            running.append(work.submit(prompt(length), request_of))
            asked[running[-1]] = time.perf_counter()
    seconds = time.perf_counter() - began
    print(f"\n{length} tokens of prompt: {tokens / seconds:.0f} tokens/s; first token after "
          f"{1e3 * median(first):.0f} ms (median)")  # fmt: skip
    for text in running:
        work.cancel(text)
    assert tokens == 4 * SLOTS * NEW
