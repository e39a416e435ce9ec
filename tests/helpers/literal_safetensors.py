"""Safetensors files and the codes in them, read bit by bit, independently of every library."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

CODES = {"F32": "f", "I32": "I", "I64": "q", "BF16": "H", "F16": "e", "F8_E4M3": "B"}


@dataclass(frozen=True)
class Read:
    """A tensor: its stored dtype, its shape, and its numbers row by row (of BF16 and F8_E4M3 the bits)."""

    dtype: str
    shape: tuple[int, ...]
    numbers: list

    def at(self, row: int, column: int):
        return self.numbers[row * self.shape[1] + column]

    def bf16(self, row: int, column: int) -> float:
        return bf16(self.at(row, column))


def read(file: Path) -> dict[str, Read]:
    """All tensors of a file."""
    content = file.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    found = {}
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            count, begin = math.prod(entry["shape"]), 8 + length + entry["data_offsets"][0]
            numbers = list(struct.unpack_from(f"<{count}{CODES[entry['dtype']]}", content, begin))
            found[name] = Read(entry["dtype"], tuple(entry["shape"]), numbers)
    return found


def bf16(bits: int) -> float:
    """The number that 16 bits stand for."""
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def e4m3(code: int) -> float:
    """The number that 8 bits stand for: sign, 4 bits of an exponent, 3 of a fraction."""
    sign, exponent, fraction = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * fraction * 2.0**-9
    return math.nan if code & 127 == 127 else sign * (8 + fraction) * 2.0 ** (exponent - 10)


def nibble(word: int, place: int) -> int:
    """The code at a place of a word, 0 in the lowest bits."""
    return (word >> 4 * place) & 15
