"""How many rows a chunk of prompts may have beside texts that decode: as many as take about as long as one of
their cycles. Chunks and cycles take turns, so a text waits about twice as long as usual for its next tokens.

What a chunk takes follows from its rows and from the context that they see. The first is measured at a warm
start, on rows that see nothing. The second is what the last chunk took beyond that, for each of its rows."""

from __future__ import annotations

import time
from collections import deque
from statistics import median

import torch

from ..model import PREFILL_ROWS

LEAST = 64  # rows of a chunk beside texts that decode, at any rate: a prompt must end
SIZES = tuple(LEAST << n for n in range((PREFILL_ROWS // LEAST).bit_length()))  # rows to choose among
LAST_CYCLES = 5  # of which the median is the usual one: two that were held up change nothing


class Pace:
    """What chunks and cycles of one cache take, in ms."""

    def __init__(self) -> None:
        self.first: dict[int, float] = {}  # of a chunk of each size, without context; {}: not measured
        self._cycles: deque[float] = deque(maxlen=LAST_CYCLES)
        self._context = 0.0  # of a row, what the last chunk's context took

    def cycle(self, milliseconds: float) -> None:
        """What the cycles of a step took; 0: they were not timed."""
        if milliseconds > 0:
            self._cycles.append(milliseconds)

    def chunk(self, rows: int, milliseconds: float) -> None:
        """What a chunk of so many rows took."""
        if rows in self.first:
            self._context = max(milliseconds - self.first[rows], 0.0) / rows

    def rows(self) -> int:
        """Of the next chunk, at most. Where nothing is measured, LEAST."""
        if not self._cycles:
            return LEAST
        usual = median(self._cycles)
        fitting = [rows for rows, took in self.first.items() if took + rows * self._context <= usual]
        return max(LEAST, *fitting) if fitting else LEAST


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

    @property
    def over(self) -> bool:
        """Whether the device has done it."""
        return not self._events or self._events[1].query()

    def milliseconds(self) -> float:
        """It took; waits until it is over."""
        if not self._events:
            return (self._host[1] - self._host[0]) * 1e-6
        began, ended = self._events
        ended.synchronize()
        return began.elapsed_time(ended)
