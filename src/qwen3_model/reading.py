"""Files of a checkpoint, as other programs leave them: which are worth opening, and reading text and JSON."""

from __future__ import annotations

import codecs
import json
import os
import stat
from pathlib import Path
from typing import Any

from .errors import InputError, foreign, quoted

LFS_POINTER = b"version https://git-lfs"
LARGEST = 2**28  # bytes of a file that is read whole; the largest tokenizers have 2**25
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
                raise InputError(f"{path} is {kind}, not a regular file: put the checkpoint's file there")
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise InputError(
                    f"{path} is a Git LFS pointer, not the file itself: fetch that, with `git lfs pull` or "
                    "`hf download`"
                )


def read_bytes(path: Path, most: int = LARGEST) -> bytes:
    """A file without its UTF-8 byte order mark, if it has one. Raises InputError for what is no file (see
    `check_file`) and for more than `most` bytes, OSError where reading fails."""
    check_file(path)
    if path.stat().st_size > most:
        raise InputError(f"{path} is larger than the {most} bytes that are read of such a file")
    return path.read_bytes().removeprefix(codecs.BOM_UTF8)


def read_text(path: Path, most: int = LARGEST) -> str:
    """A UTF-8 file without its byte order mark, if it has one; its line ends are \\n. Raises what
    `read_bytes` raises, and UnicodeDecodeError."""
    return read_bytes(path, most).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


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
