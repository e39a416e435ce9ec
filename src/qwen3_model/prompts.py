"""Prompt files: JSON lines, one prompt a line."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError, foreign, one_line, quoted
from .reading import LFS_POINTER

FIELDS = ("prompt", "question", "text")  # tried in this order
STDIN = "-"
MOST_BYTES = 2**28  # of all lines that are read: a file without an end must not take all memory


def read_prompts(
    path: str | Path, limit: int | None = None, field: str | None = None, split: str | None = None
) -> list[str]:
    """Prompts of a JSONL file ("-": of stdin) in order, at least one and at most `limit`. A line is a string
    or an object; blank lines are skipped and lines past the limit are not read.

    field: the objects' field that holds the prompt, else "prompt", "question" or "text", the first that is
    not null. split: leaves out rows whose "split" is another one; rows without it pass. Raises InputError,
    with the line's number where a line is wrong."""
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; at least 1 prompt was expected")
    prompts: list[str] = []
    name = "stdin" if str(path) == STDIN else str(path)
    with _opened(path) as lines:
        for where, row in _rows(lines, name):
            if split is not None and isinstance(row, dict) and row.get("split", split) != split:
                continue
            prompts.append(_prompt(row, field, where))
            if len(prompts) == limit:
                break
    if not prompts:
        of_split = "" if split is None else f" of split {quoted(split)}"
        raise InputError(f"{name} holds no prompts{of_split}: one JSON object a line was expected")
    return prompts


def _opened(path: str | Path) -> AbstractContextManager[BinaryIO]:
    """A context of the file or stdin, in bytes."""
    if str(path) == STDIN:
        stream = getattr(sys.stdin, "buffer", None)
        if stream is None:
            raise InputError("stdin is closed: give a JSONL file of prompts, or send it to stdin")
        return nullcontext(stream)
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode) and os.path.lexists(os.path.realpath(path)):
            # one that has a name, and maybe no writer: opening it would wait for one
            raise InputError(f"{path} is a pipe: send it to stdin and give - as the file")
        return open(path, "rb")  # noqa: SIM115 (the caller closes it)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}: give a JSONL file of prompts") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from None


def _rows(lines: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
    """Each line's place, for messages, and its JSON."""
    left, number = MOST_BYTES, 0
    with foreign(f"{name} cannot be read"):
        while line := lines.readline(left + 1):
            number, left = number + 1, left - len(line)
            where = f"{name} line {number}"
            if left < 0:
                raise InputError(
                    f"{where} goes past {MOST_BYTES // 2**20} MiB, more than prompts may take: "
                    "give fewer of them"
                )
            if line.startswith(LFS_POINTER):
                raise InputError(f"{name} is a Git LFS pointer: fetch the file itself, with `git lfs pull`")
            if line.strip():
                yield where, _parsed(line, where)


def _parsed(line: bytes, where: str) -> Any:
    with foreign(f"{where} is not JSON", "one object a line was expected"):
        return json.loads(line.decode("utf-8-sig"))


def _prompt(row: Any, field: str | None, where: str) -> str:
    if isinstance(row, dict):
        names = [name for name in (FIELDS if field is None else (field,)) if name in row]
        if not names:
            wanted = " or ".join(FIELDS) if field is None else one_line(field, 80)
            raise InputError(f"{where} has no field {wanted}; its fields are {_listed(row)}")
        name = next((name for name in names if row[name] is not None), names[0])
        where, row = f"{where}, {name}", row[name]
    if not isinstance(row, str):
        raise InputError(f"{where} is of type {type(row).__name__}; a string was expected")
    if not row:
        raise InputError(f"{where} is an empty prompt: give at least one character")
    try:
        row.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{where} holds half a surrogate pair, which is no text") from None
    return row


def _listed(row: dict[str, Any]) -> str:
    return ", ".join(one_line(name, 40) for name in list(row)[:8]) or "none"
