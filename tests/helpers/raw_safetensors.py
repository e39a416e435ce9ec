"""Safetensors files written byte by byte, independently of the library that reads them: real, sparse or
broken."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

SIZE = {"F64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}
Shapes = Mapping[str, tuple[str, list[int]]]  # name -> dtype, shape


def header(shapes: Shapes) -> tuple[bytes, int]:
    """Length and JSON of a header with the tensors one after another, and the bytes they take."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * SIZE[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text, end


def write_sparse(file: Path, shapes: Shapes) -> None:
    """A whole file of zeros, of which only the header takes room on the disk."""
    head, size = header(shapes)
    file.write_bytes(head)
    os.truncate(file, len(head) + size)


def write_index(folder: Path, weight_map: Mapping[str, object]) -> None:
    """model.safetensors.index.json."""
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": dict(weight_map)})
    (folder / "model.safetensors.index.json").write_text(text)
