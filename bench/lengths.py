"""Lengths of prompts and texts from a user's file: what a server of his own would decode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen3_model import InputError

HEAD = "prompt_tokens", "new_tokens"
Job = tuple[int, int]  # tokens of a prompt, and new ones


def read(path: Path, most: int) -> list[Job]:
    """The jobs of a file, in order: a CSV line or a JSON pair each, `prompt_tokens,new_tokens`, or JSON
    objects of these names. A CSV may begin with the names. most: tokens of a prompt with its text.

    Raises InputError, with the number of the job or line, for what is none."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if path.suffix == ".json" else _lines(text)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): a JSON list or lines of a CSV") from None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} holds no jobs: a list of {','.join(HEAD)} was expected")
    return [_job(row, f"{path}, job {i}", most) for i, row in enumerate(rows, 1)]


def _lines(text: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return rows[1:] if rows and tuple(rows[0]) == HEAD else rows


def _job(row: Any, where: str, most: int) -> Job:
    numbers = [row.get(name) for name in HEAD] if isinstance(row, dict) else row
    try:
        if any(isinstance(n, (bool, float)) for n in numbers):
            raise TypeError
        prompt, new = (int(n) for n in numbers)
    except (TypeError, ValueError):
        raise InputError(f"{where}: two whole numbers, {','.join(HEAD)}, were expected") from None
    if prompt < 1 or new < 1 or prompt + new > most:
        raise InputError(f"{where}: {prompt} and {new} tokens; at least 1 each and at most {most} together")
    return prompt, new
