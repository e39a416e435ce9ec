"""Prompt files: JSON lines, one prompt a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError, one_line

FIELDS = ("prompt", "question", "text")  # tried in this order


def read_prompts(
    path: str | Path, limit: int | None = None, field: str | None = None, split: str | None = None
) -> list[str]:
    """Prompts of a JSONL file in order, at least one and at most `limit`. A line is a string or an object;
    blank lines are skipped and lines past the limit are not read.

    field: the objects' field that holds the prompt, else "prompt", "question" or "text", the first there is.
    split: leaves out rows whose "split" is another one; rows without it pass. Raises InputError, with the
    line's number where a line is wrong."""
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; at least 1 prompt was expected")
    prompts: list[str] = []
    for where, row in _rows(Path(path)):
        if split is not None and isinstance(row, dict) and row.get("split", split) != split:
            continue
        prompts.append(_prompt(row, field, where))
        if len(prompts) == limit:
            break
    if not prompts:
        of_split = "" if split is None else f" of split {split!r}"
        raise InputError(f"{path} holds no prompts{of_split}: one JSON object a line was expected")
    return prompts


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line's place, for messages, and its JSON."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path} line {number}"
                    yield where, _parsed(line, where)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}: give a JSONL file of prompts") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from None


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({one_line(error)}): one object a line was expected") from None


def _prompt(row: Any, field: str | None, where: str) -> str:
    if isinstance(row, dict):
        names = FIELDS if field is None else (field,)
        name = next((name for name in names if name in row), None)
        if name is None:
            raise InputError(f"{where} has no field {' or '.join(names)}; its fields are {_listed(row)}")
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
    return ", ".join(list(row)[:8]) or "none"
