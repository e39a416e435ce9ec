"""What captured cycles take, measured on launches that change nothing: nothing is committed, and texts in the
slots keep what they have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from orthrus_kernels import PAGE
from orthrus_kernels.layout import State

from .controller import measured_times
from .cycle import Cycle, Slots
from .prompt_rows import Piece
from .two_pass import TwoPassCycle

TIMED_PAGES = 128  # of the context behind which a prompt's rows are timed, at most
EVERY_NODE = 1 << 15  # in `State.NODES`: no limit


def capture(cycles: Sequence[Cycle], slots: Slots, pool: Any) -> None:
    """Capture cycles."""
    with _ended(slots):
        for cycle in cycles:
            cycle.new_readings()
            cycle.seat(range(min(len(cycle.seats), len(slots.state))))
            for _ in range(2):  # the second is captured
                cycle.launch(pool)()


def times_of(cycles: Sequence[Cycle], slots: Slots, pool: Any) -> list[float]:
    """ms of each captured cycle without a prompt, for texts as long as those that are in the slots."""
    with _ended(slots):
        return list(measured_times(range(len(cycles)), lambda nth: _timed(cycles[nth], pool)).values())


@contextmanager
def _ended(slots: Slots) -> Iterator[None]:
    """The texts in the slots are said to have ended, and trees to be whole, as long as this lasts."""
    before = slots.state.clone()
    try:
        slots.state[:, State.FINISHED], slots.state[:, State.NODES] = 1, EVERY_NODE
        yield
    finally:
        slots.state.copy_(before)


def key_time(cycle: TwoPassCycle, slots: Slots, pool: Any) -> float:
    """ms that a row of a prompt takes for each key that it sees. cycle: captured, with rows for
    prompts. The context is of pages that are anybody's."""
    state, table, riders = slots.state, slots.cache.pages, cycle.riders
    pages = min(TIMED_PAGES, table.shape[1], slots.cache.positions // PAGE)
    before = state.clone(), table.clone()
    assert riders is not None
    rows = len(riders)
    cycle.seat(())

    def launch(start: int) -> Callable[[], float]:
        riders.fill([Piece([0] * rows, start, 0 if start else -1)])
        return _timed(cycle, pool)

    try:
        table[0] = -1  # behind the context: what has no page is not committed
        table[0, :pages] = torch.arange(pages)
        none, some = measured_times((0, pages * PAGE), launch).values()
    finally:
        state.copy_(before[0]), table.copy_(before[1])
    return max(some - none, 0.0) / (rows * pages * PAGE)


def _timed(cycle: Cycle, pool: Any) -> Callable[[], float]:
    """Launch a cycle that is captured; returns a function that waits for its ms."""
    read = cycle.launch(pool, timed=True)

    def milliseconds() -> float:
        found = read()[0].milliseconds
        assert found is not None, "of a captured cycle"
        return found

    return milliseconds
