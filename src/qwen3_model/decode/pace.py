"""How many tokens of prompts a step reads beside texts that decode: as many as take about as long as a cycle,
so that a text waits about twice as long as usual for its next tokens, and never so few that a prompt does not
end: behind very long contexts it waits longer.

Some ride in the verify pass of a cycle (two_pass.py), as many as fill it to a multiple of FULL rows. That
pass reads the weights anyway, so rows for prompts add their arithmetic alone. More tokens are a chunk of
their own behind the cycle, if it takes no longer than a cycle: then there are texts enough, or drafts, and
the weights are the smaller part of it.

Behind long contexts a step would read few tokens, and all keys in front of them. There tokens are saved up
until they are as many as every pass has room for, and ride together: the keys are read once for them. Waits
are uneven then.

What rows take follows from their number and from the keys that they see. Both are measured at a warm start.
So what a cycle took without its prompts can be said of every cycle, and there need not be one without."""

from __future__ import annotations

import time
from collections import deque
from statistics import median

import torch

from ..model import PREFILL_ROWS

FULL = 256  # rows of a pass: on an H200 the next row takes as long as 64 do (8B, bench/LOG.md, 2026-11-29)
AT_ONCE = FULL // 2  # rows for prompts that every pass with such rows has: riders_beside
LEAST = 64  # tokens of a step beside texts that decode, on average, at any rate: a prompt must end
CHUNKS = tuple(FULL << n for n in range(1, (PREFILL_ROWS // FULL).bit_length()))  # rows of those chunks
LAST_CYCLES = 5  # of which the median is the usual one: two that were held up change nothing


def riders_beside(rows: int) -> int:
    """Rows for prompts of a verify pass that has so many others: they fill it, and are AT_ONCE at
    least."""
    return AT_ONCE + -(rows + AT_ONCE) % FULL


class Pace:
    """What chunks and cycles of one cache take, in ms."""

    def __init__(self) -> None:
        self.first: dict[int, float] | None = None  # of chunks of CHUNKS, no keys; None: not measured
        self.key = 0.0  # of a row, for each key that it sees
        self.riders = 0  # rows for prompts that the next verify pass has, as the last one had them
        self._cycles: deque[float] = deque(maxlen=LAST_CYCLES)
        self._keys = 0  # that the next row of a prompt may see

    def cycle(self, milliseconds: float) -> None:
        """What the cycles of a step took without their prompts; 0 or less: they were not timed."""
        if milliseconds > 0:
            self._cycles.append(milliseconds)

    def read(self, tokens: int, start: int) -> float:
        """So many tokens of a text are read behind its `start` first ones; what their keys take."""
        self._keys = start + tokens
        return tokens * start * self.key

    @property
    def at_once(self) -> int:
        """Tokens that ride together at least, but for what ends a prompt; 1: none are saved up."""
        return AT_ONCE if self.first is not None and self.riders else 1

    def rows(self) -> int:
        """Tokens of a step at most, on average. Where nothing is measured, LEAST."""
        if self.first is None or not self._cycles:
            return LEAST
        usual, each = median(self._cycles), self._keys * self.key
        riding = self.riders
        if each > 0:  # it has that many rows whatever they hold, and padding sees no keys
            riding = min(riding, int(usual / (2 * each)))
        return max(LEAST, riding, *(n for n, took in self.first.items() if took + n * each <= usual))


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
