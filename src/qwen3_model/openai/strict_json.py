"""JSON that other programs sent, read strictly: what two readers could take for two things is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NoReturn

from ..errors import InputError, one_line, quoted

DEEPEST = 64  # arrays and objects inside each other


def parse(data: bytes, what: str) -> Any:
    """The value of a JSON text in UTF-8. what: what messages call the text.

    Raises InputError for what is not UTF-8 or not JSON, for a name that an object holds twice, for numbers
    that are not finite, and for arrays and objects more than DEEPEST inside each other."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_each_once, parse_constant=_not_json, parse_float=_finite
        )
    except RecursionError:
        raise InputError(_too_deep(what)) from None
    except json.JSONDecodeError as error:
        raise InputError(f"{what} is not JSON ({error.msg}, at character {error.pos + 1})") from None
    except (ValueError, MemoryError) as error:  # of bytes, of syntax, of what is below, of 5000 digits
        raise InputError(f"{what} is not JSON that can be read ({one_line(error, 200)})") from None
    _check_depth(value, what)
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"{quoted(twice)} stands in an object twice")
    return found


def _not_json(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{quoted(digits)} is past what a number can hold")
    return number


def _check_depth(value: Any, what: str) -> None:
    """Level by level."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [item for holder in level if isinstance(holder, (dict, list)) for item in _items(holder)]
        if not level:
            return
    raise InputError(_too_deep(what))


def _items(holder: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return holder.values() if isinstance(holder, dict) else holder


def _too_deep(what: str) -> str:
    return f"{what} nests arrays and objects deeper than {DEEPEST}"
