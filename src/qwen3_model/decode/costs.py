"""What a cycle of each kind takes on this GPU, before a budget chooses among them (budget.py).

Kinds are timed in turn and not one after another: a GPU that lay idle while a kernel was compiled or a graph
captured is slow for a while, and what its clock does must meet all kinds alike. It matters, as the budget
follows only the costs of kinds that it runs: one that looks dear at the beginning is never timed again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

from .cycle import IN_FLIGHT, Read

ROUNDS = 5  # that count: the last ones
AWAKE = 0.1  # seconds of work before an idle GPU is sure to run at its speed


def measured_costs(
    kinds: Sequence[int], launch: Callable[[int], Read], awake: float = AWAKE
) -> dict[int, float]:
    """ms of a cycle of each kind, medians.

    launch: starts a timed cycle of a kind that is captured already, one that changes nothing, and returns how
    to read it. awake: seconds; rounds go on for as long."""
    times: dict[int, list[float]] = {kind: [] for kind in kinds}
    unread: deque[tuple[int, Read]] = deque()

    def read_first() -> None:
        kind, read = unread.popleft()
        milliseconds = read().milliseconds
        assert milliseconds is not None, "of a captured cycle"
        times[kind].append(milliseconds)

    began, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - began < awake:
        for kind in kinds:
            unread.append((kind, launch(kind)))
            if len(unread) == IN_FLIGHT:  # one behind the other, or the host's time would be in it
                read_first()
        rounds += 1
    while unread:
        read_first()
    return {kind: median(times[kind][-ROUNDS:]) for kind in kinds}
