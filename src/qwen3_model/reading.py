"""Files of a checkpoint, as other programs leave them: which are worth opening, and reading text and JSON."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from .errors import InputError, foreign, quoted

LFS_POINTER = b"version https://git-lfs"
MOST_TEXT = 2**28  # bytes of a text or JSON file; the largest tokenizers have a tenth of it
# The first one that is true of a file's mode
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
)


def check_file(path: Path) -> None:
    """Raise InputError unless a regular file, or a link to one, is there and is the file itself.

    A pipe would block and a device can be endless. A Git LFS pointer stands for a file that was not fetched:
    the same download gives the same pointer again."""
    with foreign(f"{path} cannot be read"):
        if not os.path.lexists(path):
            raise InputError(f"{path} is missing: a checkpoint folder needs it")
        if not os.path.exists(path):
            raise InputError(f"{path} is not a file but a link to nowhere: fetch the file that it stands for")
        mode = os.stat(path).st_mode
        for is_kind, kind in _KINDS:
            if is_kind(mode):
                raise InputError(f"{path} is not a file but {kind}: put the checkpoint's file there")
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise InputError(
                    f"{path} is a Git LFS pointer, not the file itself: fetch that, with `git lfs pull` or "
                    "`hf download`"
                )


def read_text(path: Path) -> str:
    """A UTF-8 file without its byte order mark, if it has one. Raises InputError for what is no such file
    (see `check_file`), UnicodeDecodeError for other bytes."""
    check_file(path)
    size = path.stat().st_size
    if size > MOST_TEXT:
        raise InputError(f"{path} has {size} bytes; a text file of at most {MOST_TEXT} was expected")
    return path.read_text("utf-8-sig")


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold an object. Raises InputError, also for a name that an object holds
    twice with different values."""
    with foreign(f"{path} cannot be read as JSON"):
        parsed = json.loads(read_text(path), object_pairs_hook=_without_contradiction)
    if not isinstance(parsed, dict):
        raise InputError(f"{path} holds a JSON {type(parsed).__name__}; an object was expected")
    return parsed


def _without_contradiction(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Python's reader would keep the last of two values without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for name, value in pairs:
            if found[name] != value:
                raise ValueError(f"{quoted(name)} stands in it twice with different values: keep one")
    return found
