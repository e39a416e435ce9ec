"""Lengths of prompts and texts from a user's file: what a server of his own would decode."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from qwen3_model import InputError

HEAD = "prompt_tokens", "new_tokens"
MOST_BYTES = 1 << 24  # of a file: a million texts
Job = tuple[int, int]  # tokens of a prompt, and new ones


def read(path: Path, most: int, whose: str) -> list[Job]:
    """The jobs of a file, in order: a CSV line or a JSON pair each, `prompt_tokens,new_tokens`, or JSON
    objects of these names. A CSV may begin with the names and may quote. most: tokens of a prompt with its
    text; whose: what has no more, in words.

    Raises InputError, with the number of the job, for what is none, and for more than MOST_BYTES."""
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise InputError(f"{path} is larger than the {MOST_BYTES} bytes that are read of a list of texts")
        text = raw.decode("utf-8-sig")
        rows = json.loads(text) if path.suffix.lower() == ".json" else _lines(text)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except InputError:
        raise
    except (ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}): a JSON list or lines of a CSV") from None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} holds no jobs: a list of {','.join(HEAD)} was expected")
    return [_job(row, f"{path}, job {i}", most, whose) for i, row in enumerate(rows, 1)]


def _lines(text: str) -> list[list[int | str]]:
    """Rows of a CSV without its head and its empty lines, numbers as such."""
    reader = csv.reader(text.splitlines(), skipinitialspace=True, strict=True)
    rows = [[cell.strip() for cell in row] for row in reader]
    rows = [row for row in rows if any(row)]
    rows = rows[1:] if rows and tuple(rows[0]) == HEAD else rows
    return [[int(cell) if cell.isascii() and cell.isdigit() else cell for cell in row] for row in rows]


def _job(row: Any, where: str, most: int, whose: str) -> Job:
    numbers = [row.get(name) for name in HEAD] if isinstance(row, dict) else row
    if not isinstance(numbers, list) or [type(n) for n in numbers] != [int, int]:
        raise InputError(f"{where}: two whole numbers, {','.join(HEAD)}, were expected")
    prompt, new = numbers
    if prompt < 1 or new < 1 or prompt + new > most:
        raise InputError(
            f"{where}: {prompt} and {new} tokens; at least 1 each and at most {most} together in {whose}"
        )
    return prompt, new
