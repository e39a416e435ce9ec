"""What the commands here share: options that end with one clear line, and work done by several processes."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
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
    """A path whose folder exists, so that a long run does not end without its file."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: it is a folder, or its folder is not there")
    return path


def short(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def in_processes(work: Callable[..., list[str]], arguments: tuple, workers: int, limit: float) -> list[str]:
    """Call work(*arguments, i, workers) for i in range(workers), each in a process of its own; the lines they
    return. What is not done within `limit` seconds is dropped: compiling ahead only saves time."""
    if workers < 2:
        return []
    shares = [(*arguments, i, workers) for i in range(workers)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:  # leaving it ends the processes
        try:
            said = pool.starmap_async(work, shares, chunksize=1).get(timeout=limit)
        except Exception as error:
            return [f"compiling ahead stopped, the rest is compiled on first use: {short(error)}"]
    return sorted({line for lines in said for line in lines})
