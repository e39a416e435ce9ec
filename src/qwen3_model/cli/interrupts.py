"""Ctrl-C, from the first import to the end of the process."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType

INTERRUPTED = 130


class CtrlC:
    """While a verb works, Ctrl-C is a KeyboardInterrupt, which the verb may catch and clean up after. Before
    and after, it ends the process at once with its line and exit code 130: an exception would be swallowed
    or shown as a traceback by the imports of foreign libraries and by the handling of a first Ctrl-C. While
    the interpreter shuts down, which takes a moment, it changes nothing any more.

    Leaves alone a SIGINT that is ignored (a command in a script's background) or that another program has
    taken, and every thread but the main one. at_the_end: the process ends with the command."""

    def __init__(self, command: str, at_the_end: bool) -> None:
        self._line = f"{command}: interrupted\n".encode()
        self.working, self._at_the_end, self._taken = False, at_the_end, False

    def __enter__(self) -> CtrlC:
        with suppress(ValueError):  # not the main thread
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, self._come)
                self._taken = True
        return self

    def __exit__(self, *error: object) -> None:
        if self._taken:
            signal.signal(signal.SIGINT, signal.SIG_IGN if self._at_the_end else signal.default_int_handler)

    def _come(self, number: int, frame: FrameType | None) -> None:
        if self.working:
            raise KeyboardInterrupt
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one line, however often it comes
        with suppress(OSError):
            os.write(2, self._line)
        os._exit(INTERRUPTED)
