"""Nobody waits more than about twice his usual cycle for another's prompt: the scheduler with the rows that
`Pace` tells it, under a clock that is none."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import pytest
import torch

from orthrus_kernels import pages_for
from qwen3_model.decode import pace
from qwen3_model.decode.pace import CHUNKS, FULL, LATEST, LEAST, Pace, Span, riders_beside
from qwen3_model.decode.scheduler import Cycle, Scheduler

# ms of chunks without keys, and of rows that ride: about those of 8B on an H200; and of a row for a key
FIRST = {512: 13.0, 1024: 28.0, 2048: 60.0}
RIDERS, RIDING, KEY = 256, 5.4, 1.6e-6
# ms of a cycle of 0.6B there, of rows that ride, of reading a key once, and of a row for it
SMALL, SMALL_RIDING, SMALL_READ, SMALL_KEY = 1.9, 1.8, 4.7e-5, 1.9e-7


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
        self.cycle_of, self.riding, self.key, self.once = cycle_of, RIDING, KEY, 0.0

    def add(self, text: str, prompt: int, new: int) -> None:
        self.scheduler.add(text, range(prompt), prompt + new)
        self.lengths[text] = prompt + 1

    def step(self) -> object:
        self.scheduler.beside = self.pace.rows()
        work = self.scheduler.next(2)
        assert work is not None
        parts = [(part.end - part.first, part.first) for part in work.parts]
        tokens, keys = sum(n for n, _ in parts), sum(first * (self.once + n * self.key) for n, first in parts)
        self.chunks += tokens > 0
        if isinstance(work, Cycle):
            usual, rides = self.cycle_of(len(work.texts)), 0 < tokens <= self.pace.riders
            thought = sum((self.pace.ride if rides else self.pace.read)(*part) for part in parts)
            riding = self.riding + keys if rides else 0.0
            self.now += usual + (riding if rides or not tokens else first_of(tokens) + keys)
            self.rode += [tokens] * rides
            self.late.append(usual + riding - (self.riding + thought if riding else 0.0))
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


def test_behind_long_contexts_full_passes_come_less_often():
    """0.6B and a prompt of 120,000 tokens: reading its keys once takes longer than a cycle. Texts wait no
    longer than about twice as long on average, and what is read is read by full passes."""
    clock = decoding(8, 1 << 18, 8000)
    clock.pace.first, clock.pace.key = {512: 5.6}, SMALL_READ / RIDERS + SMALL_KEY
    clock.cycle_of, clock.riding, clock.key, clock.once = (
        lambda texts: SMALL, SMALL_RIDING, SMALL_KEY, SMALL_READ
    )  # fmt: skip
    for _ in range(9):
        clock.step()
    clock.gaps.clear()
    clock.add("long", 120_000, 100)
    began = clock.now
    while "long" not in clock.began:
        clock.step()
    assert sum(gap for gap, _ in clock.gaps) / len(clock.gaps) < 2.1 * SMALL
    assert set(clock.rode) == {RIDERS, 120_000 % RIDERS}
    least = SMALL + SMALL_RIDING + 60_000 * (SMALL_READ + LEAST * SMALL_KEY)
    assert clock.now - began < 120_000 / LEAST * least, "a few rows in every pass would take longer"


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
        (1.0, dict.fromkeys(CHUNKS, 1e6), RIDERS, 6400 / RIDERS * LATEST),
        (1.0, dict.fromkeys(CHUNKS, 1e6), 0, 6400 / LEAST),
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
    assert of.read(150, 0) == 0.0 and of.rows() == RIDERS, "13 ms, and 0.8 for the keys of 512 rows"
    assert of.read(500, 2500) == pytest.approx(12.5) and of.rows() == RIDERS
    of.read(20, 0)
    assert of.rows() == 512, "another prompt"
    of.riders = 0
    of.read(100, 100_000)
    assert of.rows() == LEAST, "none ride, and the keys of a chunk take longer than a cycle"


def test_keys_of_riding_rows_take_half_of_what_cycles_take():
    """On average, and of one cycle at most in advance."""
    of = Pace()
    of.first, of.key, of.riders = {}, 1e-5, RIDERS
    for _ in range(9):
        of.cycle(10.0)
    assert of.rows() == RIDERS
    assert of.ride(RIDERS, 5000) == pytest.approx(12.8) and of.rows() == 0, "5 ms may be taken"
    waited = 0
    while not of.rows():
        of.cycle(0.0)  # not timed: as long as the usual one
        waited += 1
    assert waited == 2
    rode = 0
    for _ in range(1000):
        if of.rows():
            rode += 1
            of.ride(RIDERS, 5000)
        of.cycle(10.0)
    assert rode == pytest.approx(1000 * 5 / 12.8, abs=2)


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
