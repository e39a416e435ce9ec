"""What a process is started with, made safe to use: standard streams, the terminal's size, a folder."""

from __future__ import annotations

import io
import os
import re
import sys
from typing import Any, NoReturn

from ..errors import InputError


def prepare() -> None:
    """Make the standard streams and the terminal's size usable, whatever they are. Raises InputError when
    stdout is closed.

    A closed stdin says so when it is read. What cannot be written to stderr is left out: progress and
    statistics end no command. What an odd encoding lacks is printed as question marks."""
    _fill_descriptors()
    if sys.stdin is None:
        sys.stdin = _Closed()
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_Forgiving(2, "w", closefd=False)),
            encoding=getattr(sys.stderr, "encoding", "utf-8"), errors="replace", line_buffering=True,
        )  # fmt: skip
    if sys.stdout is None:
        sys.stdout = io.StringIO()
        raise InputError("stdout is closed: there is nowhere to print to")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    for name in ("COLUMNS", "LINES"):  # rich takes any for a size, and fails on some
        if not re.fullmatch("[1-9][0-9]{0,3}", os.environ.get(name, "1")):
            del os.environ[name]


def check_folder() -> None:
    """Refuse to work in a folder that was deleted: torch fails there. Raises InputError."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError("the working folder was deleted: change to one that is there") from None


def drop_output() -> None:
    """Flush stdout; what cannot be written goes nowhere instead of to a traceback at the end of the
    process."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fill_descriptors() -> None:
    """Open the null device where a standard stream is closed: the next file to be opened, a checkpoint, would
    take its place and be written to by whoever writes to the stream."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


class _Closed(io.TextIOBase):
    """A stdin that is closed."""

    def read(self, size: int | None = -1) -> NoReturn:
        """Raise InputError."""
        raise InputError(
            "stdin is closed: open it, or give the text as an argument where the command takes one"
        )

    def readline(self, size: int = -1) -> NoReturn:  # type: ignore[override]
        """Raise InputError."""
        self.read()


class _Forgiving(io.FileIO):
    """A file that takes what it cannot write for written."""

    def write(self, data: Any) -> int:
        """Write, and never raise OSError."""
        try:
            return super().write(data)
        except OSError:
            return len(data)
