"""Nobody waits more than twice his usual cycle for another's prompt: the scheduler with the rows that `Pace`
tells it, under a clock that is none."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import pytest
import torch

from orthrus_kernels import pages_for
from qwen3_model.decode import pace, prompt
from qwen3_model.decode.pace import LEAST, SIZES, Pace, Span
from qwen3_model.decode.prompt import Piece, Prompts, rows_for
from qwen3_model.decode.scheduler import Cycle, Scheduler

# ms of chunks without context, about those of 8B on an H200, and what a row's thousand keys take
FIRST = {64: 4.6, 128: 5.5, 256: 8.0, 512: 13.0, 1024: 28.0, 2048: 60.0}
KEYS = 0.0016


def first_of(rows: int) -> float:
    """Of a chunk of any number of rows."""
    return next(took for size, took in FIRST.items() if rows <= size)


def cycle_of(texts: int) -> float:
    return 5.0 + 1.5 * texts


class Clock:
    """Runs what a scheduler says, and tells what it took one piece of work late, as an engine does."""

    def __init__(self, slots: int, tokens: int) -> None:
        self.scheduler: Scheduler[str] = Scheduler(slots, pages_for(tokens), 2048, reuse=False)
        self.pace, self.now, self.late = Pace(), 0.0, deque()
        self.pace.first = dict(FIRST)
        self.lengths: dict[str, int] = {}
        self.last: dict[str, float] = {}  # when each text's last cycle was done
        self.gaps: list[tuple[float, float]] = []  # of each text and cycle: the time since, and the usual one
        self.began: list[str] = []  # texts, in the order of their first cycles
        self.chunks = 0

    def add(self, text: str, prompt: int, new: int) -> None:
        self.scheduler.add(text, range(prompt), prompt + new)
        self.lengths[text] = prompt + 1

    def step(self) -> object:
        self.scheduler.beside = self.pace.rows()
        work = self.scheduler.next(2)
        assert work is not None
        if isinstance(work, Cycle):
            took = cycle_of(len(work.texts))
            self.late.append((self.pace.cycle, took))
        else:
            rows = rows_for(sum(part.end - part.first for part in work.parts))
            took = first_of(rows) + sum(KEYS * (p.end - p.first) * p.first / 1000 for p in work.parts)
            self.late.append((self.pace.chunk, rows, took))
            self.chunks += 1
        self.now += took
        if isinstance(work, Cycle):
            self.tell([text for text, _ in work.texts], took)
        while len(self.late) > 2:
            told, *what = self.late.popleft()
            told(*what)
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
    """30,000 tokens beside texts that decode: they wait, 64 rows aside, no longer than twice their usual
    cycle, and the prompt ends in as many steps as chunks and cycles of the smallest size that was told."""
    clock = decoding(texts, 1 << 18)
    clock.add("long", 30_000, 100)
    while "long" not in clock.began:
        clock.step()
    assert max(gap / usual for gap, usual in clock.gaps) < 2.1
    assert clock.chunks < 30_000 / 128, "and not at the least pace"
    busy = sum(gap - usual for gap, usual in clock.gaps[::texts])
    assert busy > 0.5 * clock.chunks * cycle_of(texts), "a chunk takes more than half of what it may"


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
    """Even where 64 rows take longer than a cycle, or nobody knows what they take."""
    for first in (dict.fromkeys(SIZES, 1e6), {}):
        clock = decoding(1, 1 << 18)
        clock.pace.first = first
        clock.add("long", 6400, 100)
        steps = 0
        while "long" not in clock.began:
            clock.step()
            steps += 1
        assert steps <= 2 * (6400 // LEAST) + 4


def test_alone_prompts_are_read_in_the_largest_chunks():
    clock = Clock(4, 1 << 17)
    clock.add("long", 30_000, 100)
    while "long" not in clock.began:
        clock.step()
    assert clock.chunks == -(-30_000 // 2048)


def test_the_pace_follows_cycles_and_context():
    of = Pace()
    assert of.rows() == LEAST, "nothing is measured"
    of.first = dict(FIRST)
    assert of.rows() == LEAST, "no cycle was timed"
    for took in (8.0, 0.0, 8.0, 100.0, 8.0, 100.0):
        of.cycle(took)
    assert of.rows() == 256, "of the last five that were timed the middle one counts"
    of.chunk(512, 13.0 + 512 * 0.01)
    assert of.rows() == 128, "5.5 ms and 1.3 of context"
    of.chunk(384, 500.0)
    assert of.rows() == 128, "a size that was not measured tells nothing"
    of.chunk(128, 5.0)
    assert of.rows() == 256
    assert SIZES == (64, 128, 256, 512, 1024, 2048)


def test_chunks_are_timed_as_they_end(monkeypatch):
    """Each once, in turn, by its rows; one that runs is left for later."""
    spans, over = [], set()

    class Fake(Span):
        def __init__(self, device):
            spans.append(self)

        def end(self):
            pass

        over = property(lambda self: spans.index(self) in over)

        def milliseconds(self):
            return 10.0 + spans.index(self)

    monkeypatch.setattr(prompt, "Span", Fake)
    model = SimpleNamespace(device=torch.device("cpu"))
    prompts = Prompts(model, SimpleNamespace(sequences=2), "a pool")
    chunk = SimpleNamespace(fill=lambda pieces: None, launch=lambda pool: None)
    monkeypatch.setattr(prompts, "chunk_of", lambda rows, several: chunk)
    for tokens in (60, 100, 200):
        prompts.run([Piece([0] * tokens, 0, 0)])
    over |= {0, 2}
    assert list(prompts.times()) == [(64, 10.0)], "the third ends behind the second"
    over.add(1)
    assert list(prompts.times()) == [(128, 11.0), (256, 12.0)] and not list(prompts.times())


def test_a_span_on_a_cpu_is_the_hosts(monkeypatch):
    ticks = iter((5_000_000, 7_500_000))
    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter_ns=lambda: next(ticks)))
    span = Span(torch.device("cpu"))
    span.end()
    assert span.over and span.milliseconds() == 2.5
