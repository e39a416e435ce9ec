"""Beside a prompt of 30,000 tokens nobody waits more than about twice his usual cycle, and behind longer ones
no more than keys make him: the scheduler with the rows that `Pace` tells it, under a clock that is none."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import pytest
import torch

from orthrus_kernels import pages_for
from qwen3_model.decode import pace
from qwen3_model.decode.pace import AT_ONCE, CHUNKS, FULL, LEAST, Pace, Span, riders_beside
from qwen3_model.decode.scheduler import Cycle, Scheduler

# ms of chunks without keys, and of rows that ride: about those of 8B on an H200; and of a row for a key
FIRST = {512: 13.0, 1024: 28.0, 2048: 60.0}
RIDERS, RIDING, KEY = 256, 5.4, 1.6e-6


def first_of(rows: int) -> float:
    """Of a chunk of any number of rows."""
    return next(took for size, took in FIRST.items() if rows <= size)


def cycle_of(texts: int) -> float:
    return 5.0 + 1.5 * texts


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

    def add(self, text: str, prompt: int, new: int) -> None:
        self.scheduler.add(text, range(prompt), prompt + new)
        self.lengths[text] = prompt + 1

    def step(self) -> object:
        self.scheduler.beside, self.scheduler.at_once = self.pace.rows(), self.pace.at_once
        work = self.scheduler.next(2)
        assert work is not None
        parts = [(part.end - part.first, part.first) for part in work.parts]
        tokens, keys = sum(n for n, _ in parts), sum(n * first * KEY for n, first in parts)
        self.chunks += tokens > 0
        if isinstance(work, Cycle):
            usual, thought = cycle_of(len(work.texts)), sum(self.pace.read(*part) for part in parts)
            riding = RIDING + keys if 0 < tokens <= RIDERS else 0.0
            self.now += usual + riding + (first_of(tokens) + keys if tokens > RIDERS else 0.0)
            self.rode += [tokens] * (riding > 0)
            self.late.append(usual + riding - (RIDING + thought if riding else 0.0))
            self.tell([text for text, _ in work.texts], usual)
        else:
            self.now += first_of(tokens) + keys
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


def decoding(texts: int, tokens: int) -> Clock:
    """So many texts in the middle of their cycles."""
    clock = Clock(texts + 4, tokens)
    for nth in range(texts):
        clock.add(f"short {nth}", 20, 4000)
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


@pytest.mark.parametrize("tokens", [60_000, 200_000])
def test_behind_long_contexts_rows_of_several_steps_ride_together(monkeypatch, tokens):
    """As many as every pass has room for, so that the keys are read once for them. The prompt ends as early
    as with few rows in each step, and nobody waits for more than those keys."""
    ends = []
    for at_once in (AT_ONCE, 1):
        monkeypatch.setattr(pace, "AT_ONCE", at_once)
        clock = decoding(8, 1 << 18)
        clock.add("long", tokens, 100)
        steps = 0
        while "long" not in clock.began:
            clock.step()
            steps += 1
        ends.append(steps)
        assert (min(clock.rode[:-1]) == AT_ONCE) == (at_once == AT_ONCE)
        longest = max(gap for gap, _ in clock.gaps)
        assert longest <= cycle_of(8) + RIDING + max(AT_ONCE * tokens * KEY, cycle_of(8) / 2)
    assert abs(ends[0] - ends[1]) <= 2


@pytest.mark.parametrize("tokens", range(LEAST, 2 * AT_ONCE, 7))
def test_rows_that_ride_together_fit_in_every_pass(monkeypatch, tokens):
    """Whatever room the next one has; more of them ride in one step alone."""
    clock = decoding(1, 1 << 18)
    monkeypatch.setattr(clock.pace, "rows", lambda: tokens)
    clock.add("long", 50_000, 100)
    while "long" not in clock.began:
        clock.step()
    assert set(clock.rode[:-1]) == {max(tokens, AT_ONCE)}
    least = min(riders_beside(rows) for rows in range(1, 3 * FULL))
    assert least >= AT_ONCE


def test_prompts_that_wait_come_in_turn():
    """One after another behind a long one, and no cycle is kept waiting by several together."""
    clock = decoding(8, 1 << 18)
    for nth, prompt_tokens in enumerate((9000, 40, 3000, 10)):
        clock.add(f"waiting {nth}", prompt_tokens, 500)
    for _ in range(400):
        clock.step()
    assert clock.began[8:] == [f"waiting {nth}" for nth in range(4)]
    assert max(gap / usual for gap, usual in clock.gaps) < 2.1


def test_a_prompt_always_ends():
    """Even where a row takes longer than a cycle, or nobody knows what it takes."""
    for key, first in ((1.0, dict.fromkeys(CHUNKS, 1e6)), (0.0, None)):
        clock = decoding(1, 1 << 18)
        clock.pace.first, clock.pace.key = first, key
        clock.add("long", 6400, 100)
        steps = 0
        while "long" not in clock.began:
            clock.step()
            steps += 1
        assert steps <= 6400 // LEAST + 4


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
    assert of.read(150, 0) == 0.0 and of.rows() == RIDERS, "13 ms, and 0.8 for the keys of 512 rows"
    assert of.read(500, 2500) == pytest.approx(12.5) and of.rows() == 226, "6.8 ms for keys, 0.03 each row"
    of.read(100, 100_000)
    assert of.rows() == LEAST
    of.read(20, 0)
    assert of.rows() == 512, "another prompt"
    of.riders = 192
    assert of.read(20, 2500) > 0 and of.rows() == 192
    assert CHUNKS == (512, 1024, 2048)


def test_rows_are_saved_up_where_they_ride():
    of = Pace()
    of.riders = RIDERS
    assert of.at_once == 1, "nothing is measured"
    of.first = dict(FIRST)
    assert of.at_once == AT_ONCE
    of.riders = 0
    assert of.at_once == 1, "none ride"


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
