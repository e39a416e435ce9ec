"""IN and OUT of a batch. OUT only grows, by whole lines, and is what a run that was killed goes on from. At
the end it may be replaced as a whole, by the same lines in the order of IN.

A line is written by one call of the system, and nothing is in a buffer of this process. So whenever a run
ends, OUT is whole lines and at most the beginning of one more, which the next run cuts."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count as numbers
from pathlib import Path
from typing import Any

from ..errors import InputError, one_line, quoted
from ..files import owned, reason, replacing, resolved, sync
from .batch_lines import BEGINNING, Key, Line, read_answer, read_lines

SYNC_SECONDS = 1.0  # what a power cut may cost
LONGEST_ANSWER = 2**30  # bytes of a line of OUT

Seen = tuple[int, int, int, int]  # device, inode, bytes and time of a file


class BatchFile:
    """An IN that has been looked through, and its OUT. total: lines of IN; known: whose answers are in OUT;
    failed: how many of those are errors."""

    def __init__(
        self, source: Path, out: Path, settings: str, seen: Seen, total: int, known: set[Key], failed: int,
        length: int,
    ) -> None:  # fmt: skip
        self.source, self.out, self._settings, self._seen = source, out, settings, seen
        self.total, self.known, self.failed = total, known, failed
        self._length = length  # bytes of whole lines
        self._synced, self._dirty = time.monotonic(), False
        self._file = -1

    @contextmanager
    def open(self) -> Iterator[BatchFile]:
        """Take what was torn off OUT, and write to it in the block. Raises InputError where that fails."""
        try:
            try:
                self._file = os.open(self.out, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
                os.ftruncate(self._file, self._length)
                sync(self.out.parent)
            except OSError as error:
                raise self._refusal(error) from None
            yield self
            self.sync()
        finally:
            if self._file >= 0:
                os.close(self._file)

    def waiting(self, most: int | None = None) -> Iterator[Line]:
        """The lines of the first `most` of IN that have no answer yet. Raises InputError for an IN that has
        changed."""
        for nth, line in enumerate(read_lines(self.source, self._settings)):
            if nth == most:
                return
            self._check_source()
            if line.key not in self.known:
                yield line

    def order(self) -> None:
        """Bring OUT into the order of IN, behind `open`. Whoever reads OUT, and whoever goes on after a kill,
        finds it as it was or in order, and whole. Raises InputError where the disk is full, and for an IN
        that has changed; OUT then is as it was."""
        self._check_source()
        places, end = dict[Key, int](), 0
        for data, key, *_ in _answers(self.out):
            places[key], end = end, end + len(data)
        keys = [line.key for line in read_lines(self.source, self._settings) if line.key in places]
        self._check_source()
        if keys == list(places):
            return
        try:
            permissions = stat.S_IMODE(self.out.stat().st_mode)
            with (
                replacing(self.out, permissions) as beside,
                self.out.open("rb") as old,
                beside.open("wb") as new,
            ):
                for key in keys:
                    old.seek(places[key])
                    new.write(old.readline())
        except OSError as error:
            raise self._refusal(error) from None

    def append(self, line: Line, answer: dict[str, Any], ok: bool) -> None:
        """Write an answer. Raises InputError where the disk is full; OUT then has the lines before."""
        data = json.dumps(answer, allow_nan=False).encode() + b"\n"
        self._check_out()
        try:
            self._write(data)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, self._length)
            raise self._refusal(error) from None
        self._length += len(data)
        self._dirty = True
        self.known.add(line.key)
        self.failed += not ok
        self.sync(due=SYNC_SECONDS)

    def sync(self, due: float = 0.0) -> None:
        """Have all that was written on the disk, unless that was done less than `due` seconds ago. Raises
        InputError."""
        if not self._dirty or time.monotonic() - self._synced < due:
            return
        self._check_out()
        self._synced = time.monotonic()
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._refusal(error) from None
        self._dirty = False

    def _write(self, data: bytes) -> None:
        """A full disk takes the beginning of a line first."""
        left = memoryview(data)
        while left:
            left = left[os.write(self._file, left) :]

    def _check_source(self) -> None:
        """Raises InputError unless IN is what was looked through."""
        if _seen(self.source) != self._seen:
            raise InputError(
                f"{self.source} has changed since this run began: the {len(self.known)} answers in "
                f"{self.out} stay; the same command looks it through again and goes on"
            )

    def _check_out(self) -> None:
        """Raises InputError unless OUT still has its name."""
        if _seen(self.out)[:2] != _seen(self._file)[:2]:
            raise InputError(
                f"{self.out} was removed or replaced while it was written: the same command goes on with the "
                "answers that are there now"
            )

    def _refusal(self, error: OSError) -> InputError:
        return InputError(
            f"{self.out} cannot be written ({reason(error)}): its {len(self.known)} answers stay; the same "
            "command goes on"
        )


@contextmanager
def batch_file(source: Path, out: Path, settings: str) -> Iterator[BatchFile]:
    """A batch that this process alone works on; `open` then begins to write. settings: all that an answer
    follows from beside its line. Raises InputError, before anything is written, for an IN that cannot be read
    or is empty, for a custom_id that IN has twice, for an OUT that is IN or holds anything but answers to IN
    with these settings, and where another process writes OUT."""
    _check_regular(source, "IN")
    out = resolved(out)
    if os.path.lexists(out):
        _check_regular(out, "OUT")
        if os.path.samefile(source, out):
            raise InputError(f"IN and OUT are the same file, {source}: choose another OUT")
    with owned(out):
        known, failed, length = _read_out(out) if out.exists() else ({}, 0, 0)
        seen = _seen(source)
        total = _look_through(source, out, settings, known)
        yield BatchFile(source, out, settings, seen, total, set(known), failed, length)


def _seen(file: Path | int) -> Seen:
    """By what a file is known to be the same, and not to have changed; of none that is there zeros."""
    try:
        now = os.stat(file)
    except OSError:
        return 0, 0, 0, 0
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns


def _check_regular(path: Path, what: str) -> None:
    """What is read twice and written by its end is a file."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        said = reason(error) if isinstance(error, OSError) else one_line(error)
        raise InputError(f"{what} {path} cannot be read ({said})") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{what} {path} is not a regular file: give one")


def _look_through(source: Path, out: Path, settings: str, known: dict[Key, str]) -> int:
    """How many lines IN has. Raises InputError for a custom_id that comes twice, and for answers in OUT to
    what IN does not ask."""
    keys: set[Key] = set()
    for line in read_lines(source, settings):
        if line.key in keys:
            raise InputError(
                f"{source} line {line.number} has the custom_id of an earlier line, {quoted(line.key)}: each "
                "needs its own"
            )
        if known.get(line.key, line.answer_id) != line.answer_id:
            raise InputError(
                f"{out} answers {_named(line.key)} as {source} had it before, or with another model or other "
                "settings: take that answer out, or choose another OUT"
            )
        keys.add(line.key)
    if not keys:
        raise InputError(f"{source} holds no requests: one JSON object a line was expected")
    foreign = next((key for key in known if key not in keys), None)
    if foreign is not None:
        raise InputError(
            f"{out} has an answer to {_named(foreign)}, which {source} does not ask: choose another OUT"
        )
    return len(keys)


def _named(key: Key) -> str:
    return f"line {key}" if isinstance(key, int) else f"custom_id {quoted(key)}"


def _read_out(out: Path) -> tuple[dict[Key, str], int, int]:
    """The ids of answers that OUT holds, how many of them are errors, and the bytes of its whole lines.
    Raises InputError for any other file; the beginning of an answer may stand at its end."""
    known: dict[Key, str] = {}
    failed = length = 0
    for number, (data, key, answer_id, ok) in enumerate(_answers(out), 1):
        if key in known:
            raise InputError(f"{out} line {number} answers {quoted(key)} a second time: choose another OUT")
        known[key] = answer_id
        failed += not ok
        length += len(data)
    return known, failed, length


def _answers(out: Path) -> Iterator[tuple[bytes, Key, str, bool]]:
    """The whole lines of OUT: whose answer each is, its id, and whether it is none of an error. Raises
    InputError for any other file."""
    try:
        with out.open("rb") as file:
            for number in numbers(1):
                data = file.readline(LONGEST_ANSWER)
                whole = data.endswith(b"\n") or len(data) == LONGEST_ANSWER
                if not data or (not whole and _is_torn(data)):
                    return
                yield data, *read_answer(data, f"{out} line {number}")
    except OSError as error:
        raise InputError(f"{out} cannot be read ({reason(error)}): choose another OUT") from None


def _is_torn(data: bytes) -> bool:
    """Whether a last line without its end is the beginning of an answer."""
    return data.startswith(BEGINNING) or BEGINNING.startswith(data)
