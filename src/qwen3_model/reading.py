"""Text and JSON files of a checkpoint, as other programs leave them."""

from __future__ import annotations

import codecs
import json
import stat
from pathlib import Path
from typing import Any

from .errors import InputError, foreign

LARGEST = 2**28  # bytes of a file that is read whole; the largest tokenizers have 2**25
_LFS = b"version https://git-lfs"


def read_bytes(path: Path, most: int = LARGEST) -> bytes:
    """A file without its UTF-8 byte order mark, if it has one. Raises OSError, and InputError for what is no
    regular file (a device, a pipe), for more than `most` bytes, and for a Git LFS pointer."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise InputError(f"{path} is not a regular file: a file was expected")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise InputError(f"{path} is larger than the {most} bytes that are read of such a file")
    if data.startswith(_LFS):
        raise InputError(f"{path} is a Git LFS pointer, not the file itself: fetch it (git lfs pull)")
    return data.removeprefix(codecs.BOM_UTF8)


def read_text(path: Path, most: int = LARGEST) -> str:
    """A UTF-8 file without its byte order mark, if it has one; its line ends are \\n. Raises InputError as
    `read_bytes` does, OSError and UnicodeDecodeError."""
    return read_bytes(path, most).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold an object. Raises InputError."""
    with foreign(f"{path} cannot be read as JSON"):
        try:
            parsed = json.loads(read_text(path))
        except FileNotFoundError:
            raise InputError(f"{path} is missing: a checkpoint folder needs it") from None
    if not isinstance(parsed, dict):
        raise InputError(f"{path} holds a JSON {type(parsed).__name__}; an object was expected")
    return parsed
