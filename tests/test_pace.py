"""How long texts wait beside another's prompt: the scheduler with the rows that `Pace` tells it, under a
clock that is none. `-s` shows the waits behind long contexts."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from math import inf
from statistics import mean, median
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from orthrus_kernels import pages_for
from qwen3_model.decode import pace
from qwen3_model.decode.pace import CHUNKS, FULL, LEAST, Pace, Span, riders_beside
from qwen3_model.decode.scheduler import Cycle, Scheduler

# ms of chunks without keys, and of rows that ride: about those of 8B on an H200; and of a row for a key
FIRST = {512: 13.0, 1024: 28.0, 2048: 60.0}
RIDERS, RIDING, KEY = 256, 5.4, 1.6e-6
# of models beside 8 plain texts there: ms of a cycle and of rows that ride, query heads, layers
MODELS = {"0.6B": (1.9, 1.8, 16, 28), "8B": (4.9, 3.1, 32, 36)}


def first_of(rows: int) -> float:
    """Of a chunk of any number of rows."""
    return next(took for size, took in FIRST.items() if rows <= size)


def cycle_of(texts: int) -> float:
    return 5.0 + 1.5 * texts


def attention(rows: int, heads: int, layers: int) -> float:
    """ms that rows take for each key: microseconds a layer of 8B at 32,768 keys on an H200 (bench/LOG.md,
    #154), and from the last number of rows on in proportion. Models have 8 key heads; rows of fewer query
    heads are as fewer rows."""
    of_8b = rows * heads / 32
    known = float(np.interp(of_8b, [1, 32, 64], [50.1, 65.7, 107.9]))
    return known * max(of_8b / 64, 1.0) * layers / 32768 * 1e-3


class Clock:
    """Runs what a scheduler says, and tells what it took one piece of work late, as an engine does."""

    def __init__(self, slots: int, tokens: int) -> None:
        self.scheduler: Scheduler[str] = Scheduler(slots, pages_for(tokens), 2048, reuse=False)
        self.pace, self.now, self.late = Pace(), 0.0, deque[float]()
        self.pace.first, self.pace.key, self.pace.riders = dict(FIRST), KEY, RIDERS
        self.lengths: dict[str, int] = {}
        self.last: dict[str, float] = {}  # when each text's last cycle was done
        self.gaps: list[tuple[float, float]] = []  # of each text and cycle: the time since, and the usual one
        self.began: list[str] = []  # texts, in the order of their first cycles
        self.chunks = 0  # steps that read prompts
        self.rode: list[int] = []  # tokens that each of them read in a cycle's pass
        self.steps: list[int] = []  # tokens of prompts that each step with a cycle read
        self.cycle_of, self.first_of, self.riding = cycle_of, first_of, RIDING
        self.of_key = lambda rows: rows * KEY

    def add(self, text: str, prompt: int, new: int) -> None:
        self.scheduler.add(text, range(prompt), prompt + new)
        self.lengths[text] = prompt + 1

    def step(self) -> object:
        self.scheduler.beside = self.pace.rows()
        work = self.scheduler.next(2)
        assert work is not None
        parts = [(part.end - part.first, part.first) for part in work.parts]
        tokens, keys = sum(n for n, _ in parts), sum(first * self.of_key(n) for n, first in parts)
        self.chunks += tokens > 0
        if isinstance(work, Cycle):
            usual, rides = self.cycle_of(len(work.texts)), 0 < tokens <= self.pace.riders
            thought = self.pace.read(parts, self.riding if rides else None) if tokens else 0.0
            riding = self.riding + keys if rides else 0.0
            self.now += usual + (riding if rides or not tokens else self.first_of(tokens) + keys)
            self.rode += [tokens] * rides
            self.steps.append(tokens)
            self.late.append(usual + riding - (self.riding + thought if rides else 0.0))
            self.tell([text for text, _ in work.texts], usual)
        else:
            self.now += self.first_of(tokens) + keys
        while len(self.late) > 2:
            self.pace.cycle(self.late.popleft())
        return work

    def tell(self, texts: list[str], usual: float) -> None:
        for text in texts:
            if text in self.last:
                self.gaps.append((self.now - self.last[text], usual))
            else:
                self.began.append(text)
            self.last[text] = self.now
            self.lengths[text] += 1
            self.scheduler.grown(text, self.lengths[text])


def decoding(texts: int, tokens: int, new: int = 4000) -> Clock:
    """So many texts in the middle of their cycles, of so many new tokens."""
    clock = Clock(texts + 4, tokens)
    for nth in range(texts):
        clock.add(f"short {nth}", 20, new)
    for _ in range(9):
        clock.step()
    assert len(clock.began) == texts
    clock.gaps.clear()
    return clock


@pytest.mark.parametrize("texts", [8, 32])
def test_a_long_prompt_makes_nobody_wait_for_more_than_twice_his_cycle(texts):
    """30,000 tokens beside texts that decode: they wait no longer than twice their usual cycle, and the
    prompt does not end at the least pace."""
    clock = decoding(texts, 1 << 18)
    clock.add("long", 30_000, 100)
    while "long" not in clock.began:
        clock.step()
    assert max(gap / usual for gap, usual in clock.gaps) < 2.1
    assert clock.chunks < 30_000 / 128
    busy = sum(gap - usual for gap, usual in clock.gaps[::texts])
    assert busy > 0.5 * clock.chunks * cycle_of(texts), "more than half of what a step may take"


def beside_a_long_prompt(model: str, tokens: int, start: int = 0, riders: int = RIDERS) -> Clock:
    """8 texts beside a prompt of so many tokens, until its first token comes."""
    clock = decoding(8, 1 << 18, 30_000)
    usual, riding, heads, layers = MODELS[model]
    clock.cycle_of, clock.riding = lambda texts: usual, riding
    clock.first_of = lambda rows: 1.2 * usual  # a few rows
    clock.of_key = lambda rows: attention(rows, heads, layers)
    clock.pace.first, clock.pace.key = {512: 2.6 * usual}, attention(RIDERS, heads, layers) / RIDERS
    clock.pace.riders = riders
    for _ in range(9):
        clock.step()
    clock.gaps.clear(), clock.rode.clear(), clock.steps.clear()
    clock.add("long", tokens, 100)
    began = clock.now
    while "long" not in clock.began:
        clock.step()
    waits = sorted(gap / usual for gap, usual in clock.gaps)
    print(
        f"\n{model}, {tokens} tokens, {riders} rows that ride: waits in usual cycles {mean(waits):.2f} on "
        f"average, median {median(waits):.2f}, 95 % below {waits[int(0.95 * len(waits))]:.2f}, at most "
        f"{waits[-1]:.2f}; first token after {(clock.now - began) / 1e3:.2f} s"
    )
    return clock


@pytest.mark.parametrize("tokens", [8000, 32_000, 120_000])
@pytest.mark.parametrize("model", MODELS)
def test_behind_long_contexts_full_passes_come_less_often(model, tokens):
    """Texts wait twice as long as usual on average, and nobody for more than one full pass."""
    clock = beside_a_long_prompt(model, tokens)
    usual, riding, heads, layers = MODELS[model]
    waits = [gap for gap, _ in clock.gaps]
    assert mean(waits) < 2.05 * usual
    assert set(clock.rode) == {RIDERS, tokens % RIDERS} - {0}
    assert max(waits) <= usual + riding + tokens * attention(RIDERS, heads, layers)
    apart = [b - a for a, b in pairwise(i for i, rows in enumerate(clock.steps) if rows)]
    assert max(apart) <= 17
    if tokens < 10_000:
        assert max(apart) <= 2, "a prompt with few keys is read in nearly every step"


def test_prompts_that_have_no_rows_in_a_pass_wait_likewise():
    """Beside texts that draft in one pass."""
    clock = beside_a_long_prompt("0.6B", 60_000, riders=0)
    assert mean(gap for gap, _ in clock.gaps) < 2.25 * 1.9, "rows count as a cycle, and take 1.2"
    assert set(clock.steps) == {0, LEAST, 60_000 % LEAST}


def test_rows_that_nobody_has_timed_count_as_a_cycle():
    of = Pace()
    of.first, of.key, of.riders = {}, 1e-5, RIDERS
    for _ in range(9):
        of.cycle(10.0)
    for _ in range(2):
        assert of.rows() == RIDERS, "a cycle each, the first one of them made up for already"
        assert of.read([(100, 0)], inf) == 0.0
        of.cycle(10.0)
    assert of.read([(100, 0), (200, 1000)], inf) == pytest.approx(2.0) and of.rows() == 0
    of.cycle(-inf)  # nor does anybody know what the cycle took
    assert of.rows() == RIDERS


def test_what_does_not_ride_is_owed_too():
    of = Pace()
    of.first, of.key, of.riders = dict(FIRST), 1e-5, 0
    for _ in range(9):
        of.cycle(10.0)
    of.read([(LEAST, 30_000)])
    alone = 0
    while not of.rows():
        of.cycle(10.0)
        alone += 1
    assert alone == 2, "10 and 19.2 ms, of 10 a cycle, one of them in advance"


def test_prompts_that_wait_come_in_turn():
    """One after another behind a long one, and no cycle is kept waiting by several together."""
    clock = decoding(8, 1 << 18)
    for nth, prompt_tokens in enumerate((9000, 40, 3000, 10)):
        clock.add(f"waiting {nth}", prompt_tokens, 500)
    for _ in range(400):
        clock.step()
    assert clock.began[8:] == [f"waiting {nth}" for nth in range(4)]
    assert max(gap / usual for gap, usual in clock.gaps) < 2.1


@pytest.mark.parametrize(
    "key, first, riders, pieces",
    [
        (1.0, dict.fromkeys(CHUNKS, 1e6), RIDERS, 6400 / RIDERS * 17),
        (1.0, dict.fromkeys(CHUNKS, 1e6), 0, 6400 / LEAST * 17),
        (0.0, None, RIDERS, 6400 / LEAST),
    ],
)
def test_a_prompt_always_ends(key, first, riders, pieces):
    """Even where a row takes longer than a cycle, or nobody knows what it takes."""
    clock = decoding(1, 1 << 18)
    clock.pace.first, clock.pace.key, clock.pace.riders = first, key, riders
    clock.add("long", 6400, 100)
    steps = 0
    while "long" not in clock.began:
        clock.step()
        steps += 1
        assert steps <= pieces + 4


def test_alone_prompts_are_read_in_the_largest_chunks():
    clock = Clock(4, 1 << 17)
    clock.add("long", 30_000, 100)
    while "long" not in clock.began:
        clock.step()
    assert clock.chunks == -(-30_000 // 2048)


def test_a_constant_stream_of_prompts_rides_in_full_passes():
    """What a cycle takes without them is known though none runs without them; a text with few keys in front
    of it never waits."""
    clock = decoding(8, 1 << 18)
    clock.pace.first = {}  # no chunk of its own
    for nth in range(60):
        clock.add(f"next {nth}", 1000, 40)
        for _ in range(4):
            clock.step()
            for text in [text for text in clock.lengths if clock.lengths[text] == 1031]:
                clock.scheduler.remove(text)
                del clock.lengths[text]
    assert set(clock.rode[8:]) <= {RIDERS, 1000 % RIDERS} and len(clock.rode) > 100
    assert max(gap / usual for gap, usual in clock.gaps) < 2.1


def test_the_pace_follows_cycles_and_keys():
    of = Pace()
    of.cycle(8.0)
    assert of.rows() == LEAST, "nothing is measured"
    of = Pace()
    of.first, of.key, of.riders = dict(FIRST), 1e-5, RIDERS
    assert of.rows() == LEAST, "no cycle was timed"
    for took in (13.6, 0.0, -2.0, 13.6, 100.0, 13.6, 100.0):
        of.cycle(took)
    assert of.rows() == 512, "of the last five that were timed the middle one counts"
    assert of.read([(150, 0)], 1.0) == 0.0 and of.rows() == RIDERS, "13 ms, and 0.8 for the keys of 512 rows"
    assert of.read([(500, 500)], 1.0) == pytest.approx(2.5) and of.rows() == RIDERS
    of.read([(20, 0)], 1.0)
    assert of.rows() == 512, "another prompt"
    of.riders = 0
    of.read([(100, 1000)], 1.0)
    assert of.rows() == LEAST, "none ride, and a chunk with its keys takes longer than a cycle"


def test_prompts_take_a_share_of_what_cycles_take():
    """In the long run, and a cycle's in advance."""
    of = Pace()
    of.first, of.key, of.riders = {}, 1e-5, RIDERS
    for _ in range(9):
        of.cycle(10.0)
    assert of.rows() == RIDERS
    assert of.read([(RIDERS, 10_000)], 4.0) == pytest.approx(25.6) and of.rows() == 0
    alone = 0
    while not of.rows():
        of.cycle(0.0)  # not timed: it pays as the usual one
        alone += 1
    assert alone == 2
    rode = 0
    for _ in range(1000):
        if of.rows():
            rode += 1
            of.read([(RIDERS, 10_000)], 4.0)
        of.cycle(10.0)
    assert rode == pytest.approx(1000 * 10 / 29.6, abs=2)


def test_chunks_are_pieces_of_the_largest():
    assert CHUNKS == (512, 1024, 2048)


def test_prompts_fill_a_pass():
    for rows in range(1, 3 * FULL):
        riders = riders_beside(rows)
        assert (rows + riders) % FULL == 0 and FULL // 2 <= riders < FULL + FULL // 2


def test_a_span_on_a_cpu_is_the_hosts(monkeypatch):
    ticks = iter((5_000_000, 7_500_000))
    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter_ns=lambda: next(ticks)))
    span = Span(torch.device("cpu"))
    span.end()
    assert span.milliseconds() == 2.5
