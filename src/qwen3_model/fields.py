"""Typed reading of a JSON object's fields: what is wrong is refused by its name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError, quoted

# Far above any model, and low enough that no product of them overflows and a wrong file is refused quickly
MOST_LAYERS, MOST_HEADS, MOST_SIZE, MOST_TOKENS = 2**12, 2**16, 2**24, 2**30


@dataclass(frozen=True)
class Fields:
    """The fields of one object, a null one like an absent one. where: what messages call the object."""

    raw: Mapping[str, Any]
    where: str

    def count(self, name: str, most: int = MOST_SIZE, default: int | None = None) -> int:
        """A whole number from 1 to `most`."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise InputError(
                f"{self.where}: {name} is {quoted(value)}; a whole number in 1..{most} was expected"
            )
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._value(name, default)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value <= 1e30 or not math.isfinite(value):
            raise InputError(f"{self.where}: {name} is {quoted(value)}; a finite number above 0 was expected")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: {name} is {quoted(value)}; true or false was expected")
        return value

    def _value(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        value = default if value is None else value
        if value is None:
            raise InputError(f"{self.where}: {name} is missing")
        return value
