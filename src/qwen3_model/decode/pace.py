"""How many tokens of prompts a step reads beside texts that decode.

Some ride in the verify pass of a cycle (two_pass.py), as many as fill it to a multiple of FULL rows. That
pass reads the weights anyway, so rows for prompts add their arithmetic alone. More tokens are a chunk of
their own behind the cycle, if it takes no longer than a cycle: then there are texts enough, or drafts, and
the weights are the smaller part of it.

Prompts may take as long as cycles do, so that a text waits about twice as long as usual on average. What they
took is owed, and while it is, cycles go alone. Rows count as a cycle at most, so that a prompt with few keys
in front of it is read in every step. Behind long contexts keys take most of the time; then passes full of
rows come less often, as a few rows in every pass would read all keys for each few.

What rows take follows from their number and from the keys that they see. Both are measured at a warm start.
So what a cycle took without its prompts can be said of every cycle, and there need not be one without."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from statistics import median

import torch

from ..model import PREFILL_ROWS

FULL = 256  # rows of a pass: on an H200 the next row takes as long as 64 do (8B, bench/LOG.md, 2026-11-29)
LEAST = 64  # tokens of a step where nothing is measured, or none ride and no chunk is short enough
LATEST = 16  # cycles that go alone, at most: a prompt must end, whatever was measured
CHUNKS = tuple(FULL << n for n in range(1, (PREFILL_ROWS // FULL).bit_length()))  # rows of those chunks
LAST_CYCLES = 5  # of which the median is the usual one: two that were held up change nothing


def riders_beside(rows: int) -> int:
    """Rows for prompts of a verify pass that has so many others: they fill it, and are half of FULL at
    least."""
    return FULL // 2 + -(rows + FULL // 2) % FULL


class Pace:
    """What chunks and cycles of one cache take, in ms."""

    def __init__(self) -> None:
        self.first: dict[int, float] | None = None  # of chunks of CHUNKS, no keys; None: not measured
        self.key = 0.0  # of a row, for each key that it sees
        self.riders = 0  # rows for prompts that the next verify pass has, as the last one had them
        self._cycles: deque[float] = deque(maxlen=LAST_CYCLES)
        self._keys = 0  # that the next row of a prompt may see
        self._owed = 0.0  # cycles that have to go alone for what prompts took; below 0: one that did

    def cycle(self, milliseconds: float) -> None:
        """What the cycles of a step took without their prompts; 0 or less: they were not timed."""
        if milliseconds > 0:
            self._cycles.append(milliseconds)
        self._owed = max(self._owed - 1, -1)

    def read(self, pieces: Iterable[tuple[int, int]], riding: float | None = None) -> float:
        """(tokens, start): so many tokens of a text are read beside a cycle, behind its `start` first ones.
        riding: ms that rows in the cycle's pass take, inf where that was not measured; None: they are a
        chunk. Returns the ms of keys."""
        keys, tokens = 0.0, 0
        for count, start in pieces:
            keys += count * start * self.key
            tokens, self._keys = tokens + count, start + count
        if self.first is not None and self._cycles:
            usual = median(self._cycles)
            chunk = min((took for rows, took in self.first.items() if rows >= tokens), default=usual)
            rows = min(chunk if riding is None else riding, usual)
            self._owed = min(self._owed + (rows + keys) / usual, LATEST)
        return keys

    def rows(self) -> int:
        """Tokens of the next step at most; 0: the cycle goes alone. Where nothing is measured, LEAST."""
        if self.first is None or not self._cycles:
            return LEAST
        if self._owed > 0:
            return 0
        usual, each = median(self._cycles), self._keys * self.key
        chunks = [rows for rows, took in self.first.items() if took + rows * each <= usual]
        return max([self.riders or LEAST, *chunks])


class Span:
    """What is launched from here until `end` is called, and its time: the GPU's, or the host's on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * (device.type == "cuda"))]
        self._host = [0, 0]
        self._mark(0)

    def end(self) -> None:
        """The last launch was made."""
        self._mark(1)

    def _mark(self, nth: int) -> None:
        if self._events:
            self._events[nth].record()
        else:
            self._host[nth] = time.perf_counter_ns()

    def milliseconds(self) -> float:
        """It took; waits until it is over."""
        if not self._events:
            return (self._host[1] - self._host[0]) * 1e-6
        began, ended = self._events
        ended.synchronize()
        return began.elapsed_time(ended)
