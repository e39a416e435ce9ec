"""What the commands here share: options that end with one clear line, and work done by several processes."""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qwen3_model.cli import ended, options
from qwen3_model.errors import InputError
from qwen3_model.files import check_replaceable

from . import imports

if TYPE_CHECKING:
    from qwen3_model.cli.interrupts import CtrlC


def run(command: str, main: Callable[[], int]) -> int:
    """The exit code of a process that is `python -m COMMAND`. It ends as `orthrus` does: one line and 2 for a
    disk that is full or what `main` refuses, 141 for a reader of stdout who has gone, 130 for Ctrl-C."""

    def work(ctrl_c: CtrlC) -> int:
        ctrl_c.working = True
        try:
            return main()
        except SystemExit as asked:
            if not asked.code:  # --help, which may not have been written yet
                sys.stdout.flush()
            raise

    imports.__exit__()
    return ended(command, work, at_the_end=True)


class Parser(options.Parser):
    """Bad options: one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def fail(command: str, message: str) -> NoReturn:
    """One line on stderr, exit code 2."""
    print(f"{command}: {message}", file=sys.stderr)
    raise SystemExit(2)


def positive(text: str) -> int:
    """A whole number above 0; a k at its end counts 1024."""
    digits, unit = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    if not (digits.isascii() and digits.isdigit()) or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0, such as 32 or 16k")
    return int(digits) * unit


def writable(text: str) -> Path:
    """A path where a file can be made or replaced, so that a long run does not end without its file."""
    try:
        check_replaceable(Path(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def short(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def in_processes(work: Callable[..., list[str]], arguments: tuple, workers: int, limit: float) -> list[str]:
    """Call work(*arguments, i, workers) for i in range(workers), each in a process of its own; the lines they
    return. What is not done within `limit` seconds is dropped: compiling ahead only saves time."""
    if workers < 2:
        return []
    shares = [(*arguments, i, workers) for i in range(workers)]
    ours = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which they inherit: Ctrl-C is told by this process
    try:
        pool = multiprocessing.get_context("spawn").Pool(workers)
    finally:
        signal.signal(signal.SIGINT, ours)
    with pool:  # leaving it ends the processes
        try:
            said = pool.starmap_async(work, shares, chunksize=1).get(timeout=limit)
        except Exception as error:
            return [f"compiling ahead stopped, the rest is compiled on first use: {short(error)}"]
    return sorted({line for lines in said for line in lines})
