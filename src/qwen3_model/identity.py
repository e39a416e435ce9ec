"""What a checkpoint folder holds, as a hash: by it a folder that has changed is told from what it was."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .errors import InputError
from .files import reason

WHOLE = (".json", ".jinja")  # files that are read to their end; of weights samples are
WEIGHTS = ".safetensors"
SAMPLES, SAMPLE = 64, 4096  # of a file of weights, at equal distances; bytes of each


def identity(folder: Path) -> str:
    """64 hexadecimal digits. Raises InputError where a file cannot be read."""
    found = hashlib.sha256()
    try:
        for file in sorted(folder.iterdir()):
            if file.suffix in (*WHOLE, WEIGHTS) and file.is_file():
                found.update(file.name.encode() + b"\0" + _digest(file))
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({reason(error)})") from None
    return found.hexdigest()


def _digest(file: Path) -> bytes:
    """Of a file's size, and of its bytes or samples of them."""
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if file.suffix in WHOLE:
            found.update(stream.read())
        else:
            for nth in range(SAMPLES):
                stream.seek(max(size - SAMPLE, 0) * nth // (SAMPLES - 1))
                found.update(stream.read(SAMPLE))
    return found.digest()
