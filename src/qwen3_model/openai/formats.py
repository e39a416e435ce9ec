"""What an answer has to be: the grammar of `response_format`, or of calls that `tool_choice` forces."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import quoted
from ..grammar import Grammar
from .refusal import FieldError, naming
from .tools import forced_calls, tools_of

FORMATS = ("text", "json_object", "json_schema")
SCHEMA = ("name", "description", "schema", "strict")  # fields of json_schema
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)


def may_compile(body: Any) -> bool:
    """Whether a body may ask for a grammar, which takes long to try where it is new."""
    if not isinstance(body, dict):
        return False
    return body.get("response_format") is not None or body.get("tool_choice") not in (None, "auto", "none")


def grammar_of(given: Mapping[str, Any], reasons: bool) -> Grammar | None:
    """The grammar that a body asks for, one that compiles; None for any text. reasons: whether the prompt has
    begun the answer's reasoning, which goes on before the grammar begins. Raises FieldError."""
    field, grammar = "response_format", _response_format(given.get("response_format", {"type": "text"}))
    if grammar is not None and tools_of(given):
        raise FieldError(
            field, "response_format cannot be had from an answer that may call tools: use tool_choice none"
        )
    if grammar is None:
        field, grammar = "tools", forced_calls(given)
    if grammar is None:
        return None
    grammar = grammar.behind_thought() if reasons else grammar
    with naming(field):
        grammar.check()
    return grammar


def _response_format(value: Any) -> Grammar | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in FORMATS:
        wanted = f"an object with a type of {', '.join(FORMATS)}"
        raise FieldError("response_format", f"response_format is {quoted(value)}; {wanted} was expected")
    own = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    if unknown := [name for name in value if name not in own]:
        raise FieldError("response_format", f"response_format has an unknown field {quoted(unknown[0])}")
    with naming("response_format"):
        if kind == "json_schema":
            return Grammar.json_schema(_schema(value.get("json_schema")))
        return Grammar.json_object() if kind == "json_object" else None


def _schema(value: Any) -> Any:
    """OpenAI's description of a schema; whatever `strict` says, answers keep to the schema."""
    if not isinstance(value, dict) or "schema" not in value:
        raise FieldError("response_format", "json_schema must be an object with name and schema")
    if unknown := [name for name in value if name not in SCHEMA]:
        raise FieldError("response_format", f"json_schema has an unknown field {quoted(unknown[0])}")
    if not isinstance(value.get("name"), str) or not NAME.fullmatch(value["name"]):
        raise FieldError(
            "response_format", "the name of json_schema must have 1 to 64 letters, digits, _ or -"
        )
    if not isinstance(value.get("description", ""), str | None):
        raise FieldError("response_format", "the description of json_schema must be a string")
    if not isinstance(value.get("strict"), bool | None):
        raise FieldError("response_format", "strict of json_schema must be true or false")
    return value["schema"]
