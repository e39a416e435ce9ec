"""Kinds of values that settings of a request take: how the library and the command line read each of them."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from .errors import InputError
from .grammar import Grammar
from .reading import read_json_object

MOST_NODES = 255  # of a draft tree, its root besides: rows of a pass that kernels are tuned for
MOST_BITS = 64  # of a whole number
MOST_STOP_TOKENS = 16  # beside the checkpoint's end tokens


@dataclass(frozen=True)
class Kind:
    """What values a setting takes. read raises any exception for another one."""

    read: Callable[[Any], Any]
    wanted: str
    of_text: Callable[[str], Any] = str  # how the command line reads it; ValueError for what it cannot read


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    whole = operator.index(value)
    if whole.bit_length() > MOST_BITS:  # Python does not even write out one of 5000 digits
        raise OverflowError
    return whole


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _or_none(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _nodes(value: Any) -> int | Literal["auto"]:
    if isinstance(value, str) and value == "auto":
        return "auto"
    nodes = _whole(value)
    if not 0 <= nodes <= MOST_NODES:
        raise ValueError
    return nodes


def _strings(value: Any) -> tuple[str, ...]:
    given = tuple(_word(text) for text in ([value] if isinstance(value, str) else value or ()))
    if not all(given):
        raise InputError("a stop string is empty: leave it out, or give at least one character")
    return given


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _tokens(value: Any) -> tuple[int, ...]:
    """Each one once, in the order given."""
    if isinstance(value, str | bytes | Mapping):
        raise TypeError
    tokens = [_whole(token) for token in islice(value, MOST_STOP_TOKENS + 1)]
    if len(tokens) > MOST_STOP_TOKENS:
        raise ValueError
    return tuple(dict.fromkeys(tokens))


def _biases(value: Any) -> dict[int, float]:
    """Token ids may be text, as in JSON, whose keys always are."""
    if value is not None and not isinstance(value, Mapping):
        raise TypeError
    found: dict[int, float] = {}
    for key, bias in (value or {}).items():
        token, amount = int(key) if isinstance(key, str) else _whole(key), _number(bias)
        if token in found:
            raise ValueError
        found[token] = amount
    return found


def _bias_of_text(text: str) -> tuple[int, float]:
    token, equals, value = text.partition("=")
    if not equals:
        raise ValueError
    return int(token), float(value)


def _grammar(value: Any) -> Grammar | None:
    if not isinstance(value, Grammar | None):
        raise TypeError
    return value


NUMBER = Kind(_number, "a number", float)
WHOLE = Kind(_whole, f"a whole number of at most {MOST_BITS} bits", int)
WHOLE_OR_NONE = Kind(_or_none(_whole), WHOLE.wanted, int)
WORD = Kind(_word, "a word")
NODES = Kind(
    _nodes, f'"auto" or a whole number from 0 (a chain) to {MOST_NODES}',
    lambda text: text if text == "auto" else int(text),
)  # fmt: skip
FLAG = Kind(_flag, "true or false")
TOKENS = Kind(_tokens, f"a list of at most {MOST_STOP_TOKENS} token ids", int)
GRAMMAR = Kind(
    _grammar, "a Grammar, such as Grammar.json_schema(...)",
    lambda path: Grammar.json_schema(read_json_object(Path(path))),
)  # fmt: skip
STRINGS = Kind(_strings, "a string or a list of strings")
BIASES = Kind(_biases, "a mapping of token ids to numbers", _bias_of_text)
