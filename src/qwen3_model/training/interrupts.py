"""Signals that end a training: at once, or after the step that is being done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

# What ends a process without Python's knowing, unless asked for: a scheduler's or a shell's farewell.
FAREWELLS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def ending_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit(128 + number), so that a run removes what it made for itself.

    Does nothing outside the main thread, and leaves signals alone that are ignored or have a handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in FAREWELLS if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _exit)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


class Interruption:
    """A signal that was asked to wait. `asked`: whether one came."""

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    def go_on(self) -> None:
        """End as the signal that came would have, if one came: KeyboardInterrupt or SystemExit."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number is not None:
            _exit(self.number, None)


@contextmanager
def late_interruption(wanted: bool) -> Iterator[Interruption]:
    """Ctrl-C, and what `ending_by_signals` has taken, is kept for later, so that a step is done whole; a
    second one ends the run at once."""
    found = Interruption()

    def on_signal(number: int, _frame: object) -> None:
        if found.asked:
            found.number = number
            found.go_on()
        found.number = number

    if not wanted or threading.current_thread() is not threading.main_thread():
        yield found
        return
    taken = [signal.SIGINT, *(n for n in FAREWELLS if signal.getsignal(n) is _exit)]
    before = {number: signal.signal(number, on_signal) for number in taken}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
