"""What a cycle of each kind takes on this GPU, before a budget chooses among them (budget.py).

Kinds are timed in turn and not one after another: a GPU that lay idle while a kernel was compiled or a graph
captured may be slow for a while, and what its clock does must meet all kinds alike. It matters, as the budget
follows only the costs of kinds that it runs: one that looks dear at the beginning is timed again only when
its turn to be tried comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

from .cycle import IN_FLIGHT, Read

ROUNDS = 5  # that count: the last ones
AWAKE = 0.1  # seconds of work until a GPU runs at its speed, by far enough; 0.1 s of a cache's first text


def measured_costs(kinds: Sequence[int], launch: Callable[[int], Read]) -> dict[int, float]:
    """ms of a cycle of each kind, medians of the last ROUNDS of as many rounds as take AWAKE.

    kinds: of budget.py. launch: starts a timed cycle of a kind that is captured already, one that changes
    nothing, and returns how to read it."""
    times: dict[int, list[float]] = {kind: [] for kind in kinds}
    unread: deque[tuple[int, Read]] = deque()

    def read_first() -> None:
        kind, read = unread.popleft()
        milliseconds = read().milliseconds
        assert milliseconds is not None, "of a captured cycle"
        times[kind].append(milliseconds)

    began, rounds = perf_counter(), 0
    while rounds < ROUNDS or perf_counter() - began < AWAKE:
        for kind in kinds:
            unread.append((kind, launch(kind)))
            if len(unread) == IN_FLIGHT:  # so many that the GPU never waits for the host: times are its own
                read_first()
        rounds += 1
    while unread:
        read_first()
    return {kind: median(times[kind][-ROUNDS:]) for kind in kinds}
