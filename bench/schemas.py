"""JSON schemas of the kinds that public suites have, drawn anew: objects flat and nested, optional names,
arrays and tuples, enumerations, unions, references, patterns, formats and ranges. Every one bounds its
answers, so that a text of a few hundred tokens ends by itself."""

from __future__ import annotations

import random
from typing import Any

WORDS = [
    "id",
    "name",
    "size",
    "kind",
    "tags",
    "items",
    "total",
    "unit",
    "owner",
    "state",
    "x",
    "y_1",
    "größe",
]
Schema = dict[str, Any]


def _string(draw: random.Random, depth: int) -> Schema:
    return {"type": "string", "maxLength": draw.randint(1, 8)}


def _bounded_string(draw: random.Random, depth: int) -> Schema:
    return {"type": "string", "minLength": 2, "maxLength": draw.randint(2, 6)}


def _pattern(draw: random.Random, depth: int) -> Schema:
    patterns = "^[a-z]{1,4}$", "^[A-Z]{2}-[0-9]{3}$", "^(yes|no|maybe)$", "^v[0-9]{1,2}(\\.[0-9]{1,2}){0,2}$"
    return {"type": "string", "pattern": draw.choice(patterns)}


def _format(draw: random.Random, depth: int) -> Schema:
    return {"type": "string", "format": draw.choice(["date", "ipv4", "uuid"])}


def _integer(draw: random.Random, depth: int) -> Schema:
    least = draw.randint(-50, 50)
    return {"type": "integer", "minimum": least, "maximum": least + draw.randint(0, 900)}


def _multiple(draw: random.Random, depth: int) -> Schema:
    return {"type": "integer", "multipleOf": draw.choice([2, 5, 7]), "exclusiveMinimum": 0, "maximum": 500}


def _number(draw: random.Random, depth: int) -> Schema:
    return {"type": "number", "multipleOf": draw.choice([0.5, 0.25]), "minimum": -9, "exclusiveMaximum": 30}


def _enum(draw: random.Random, depth: int) -> Schema:
    values = ["a", "b c", 'q"', "\\", 3, -1.5, True, None, [1, "z"], {"k": [0]}]
    return {"enum": draw.sample(values, draw.randint(1, 5))}


def _const(draw: random.Random, depth: int) -> Schema:
    return {"const": draw.choice(["fixed", 7, {"a": 1, "b": [True]}, [], ""])}


def _boolean(draw: random.Random, depth: int) -> Schema:
    return draw.choice([{"type": "boolean"}, {"type": ["boolean", "null"]}, {"type": "null"}])


def _array(draw: random.Random, depth: int) -> Schema:
    least = draw.randint(0, 2)
    return {
        "type": "array",
        "items": _any(draw, depth),
        "minItems": least,
        "maxItems": least + draw.randint(0, 2),
    }


def _tuple(draw: random.Random, depth: int) -> Schema:
    parts = [_any(draw, depth) for _ in range(draw.randint(1, 3))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": draw.randint(0, len(parts))}


def _object(draw: random.Random, depth: int) -> Schema:
    names = draw.sample(WORDS, draw.randint(1, 4))
    required = [name for name in names if draw.random() < 0.7]
    parts = {name: _any(draw, depth) for name in names}
    return {"type": "object", "properties": parts, "required": required, "additionalProperties": False}


def _named_by_pattern(draw: random.Random, depth: int) -> Schema:
    return {
        "type": "object", "patternProperties": {"^[a-z]{1,3}$": _any(draw, depth)}, "maxProperties": 2,
        "additionalProperties": False,
    }  # fmt: skip


def _any_of(draw: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(draw, depth) for _ in range(2)]}


def _one_of(draw: random.Random, depth: int) -> Schema:
    return {"oneOf": [_integer(draw, depth), _string(draw, depth), {"type": "null"}]}


def _all_of(draw: random.Random, depth: int) -> Schema:
    first, second = (
        _object(draw, depth),
        {"properties": {"also": _integer(draw, depth)}, "required": ["also"]},
    )
    del first["additionalProperties"]
    first["properties"]["also"] = {"type": "integer"}
    return {"allOf": [first, second], "type": "object", "maxProperties": len(first["properties"])} | {
        "required": list(first["properties"])
    }


def _reference(draw: random.Random, depth: int) -> Schema:
    following = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]}
    node = {
        "type": "object", "required": ["v"], "additionalProperties": False,
        "properties": {"v": _integer(draw, depth), "next": following},
    }  # fmt: skip
    return {"$ref": "#/$defs/node", "$defs": {"node": node, "leaf": _enum(draw, depth)}}


_LEAVES = _string, _bounded_string, _pattern, _format, _integer, _multiple, _number, _enum, _const, _boolean
_HOLDERS = _array, _tuple, _object, _named_by_pattern, _any_of, _one_of
_ROOTS = _object, _array, _tuple, _named_by_pattern, _any_of, _one_of, _all_of, _reference, *_LEAVES


def _any(draw: random.Random, depth: int) -> Schema:
    kinds = _LEAVES if depth <= 0 else _LEAVES + 2 * _HOLDERS
    return draw.choice(kinds)(draw, depth - 1)


def schemas(count: int, seed: int = 0) -> list[Schema]:
    """So many schemas, every kind in turn as the root; half of them objects."""
    draw = random.Random(seed)
    kinds = [kind for root in _ROOTS for kind in (root, _object)]
    return [kinds[nth % len(kinds)](draw, 2) for nth in range(count)]
