"""Text and JSON files of a checkpoint, as other programs leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import InputError, foreign


def read_text(path: Path) -> str:
    """A UTF-8 file without its byte order mark, if it has one. Raises OSError and UnicodeDecodeError."""
    return path.read_text("utf-8-sig")


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
