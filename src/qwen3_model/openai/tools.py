"""The tools of a chat request: functions that the answer may call."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import quoted
from ..grammar import Grammar
from .refusal import FieldError, naming

MOST_TOOLS = 128
FUNCTION = ("name", "description", "parameters", "strict")  # fields
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)


CHOICES = ("auto", "none", "required")


def tools_of(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tools that the answer may call; none for tool_choice "none". Raises FieldError."""
    tools = given.get("tools", [])
    if not isinstance(tools, list) or len(tools) > MOST_TOOLS:
        raise FieldError("tools", f"tools must be a list of at most {MOST_TOOLS} functions")
    choice = given.get("tool_choice", "auto" if tools else "none")
    for at, tool in enumerate(tools):
        _check(f"tools[{at}]", tool, forced=choice not in ("auto", "none"))
    if choice not in CHOICES:
        _check_named(choice, [tool["function"]["name"] for tool in tools])
    elif choice != "none" and not tools:
        raise FieldError("tool_choice", f"tool_choice is {choice}, and there are no tools: give tools too")
    return tools if choice != "none" else []


def forced_calls(given: Mapping[str, Any]) -> Grammar | None:
    """The grammar of an answer that has to call a tool: one call of the function that tool_choice names, or
    one and more calls where it is "required". None where nothing is forced. Raises FieldError."""
    functions, choice = [tool["function"] for tool in tools_of(given)], given.get("tool_choice", "auto")
    if choice in ("auto", "none"):
        return None
    if choice != "required":
        functions = [one for one in functions if one["name"] == choice["function"]["name"]]
    nothing = {"properties": {}, "additionalProperties": False}  # OpenAI's, of one without parameters
    with naming("tools"):
        wanted = [(one["name"], one.get("parameters") or nothing) for one in functions]
        return Grammar.calls(wanted, several=choice == "required")


def _check_named(choice: Any, names: list[str]) -> None:
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(function, dict) or set(choice) != {"type", "function"} or choice["type"] != "function":
        wanted = f'{", ".join(CHOICES)} or {{"type": "function", "function": {{"name": …}}}}'
        raise FieldError("tool_choice", f"tool_choice is {quoted(choice)}; {wanted} was expected")
    if set(function) != {"name"} or function["name"] not in names:
        raise FieldError("tool_choice", f"tool_choice names {quoted(function)}, which is none of the tools")
    if names.count(function["name"]) > 1:
        raise FieldError("tools", f"two tools have the name {function['name']}: tool_choice names one")


def _check(where: str, tool: Any, forced: bool) -> None:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or set(tool) != {"type", "function"} or tool["type"] != "function":
        raise FieldError("tools", f'{where} is {quoted(tool)}; an object of type "function" was expected')
    if unknown := [name for name in function if name not in FUNCTION]:
        raise FieldError("tools", f"{where} has an unknown field {quoted(unknown[0])}")
    if not isinstance(function.get("name"), str) or not NAME.fullmatch(function["name"]):
        raise FieldError("tools", f"the name of {where} must have 1 to 64 letters, digits or any of _ . -")
    if not isinstance(function.get("description", ""), str | None):
        raise FieldError("tools", f"the description of {where} must be a string")
    if not isinstance(function.get("parameters", {}), dict | None):
        raise FieldError("tools", f"the parameters of {where} must be a JSON schema, an object")
    strict = function.get("strict")
    if not isinstance(strict, bool | None) or (strict and not forced):
        bound = "only calls that tool_choice forces are bound to a schema"
        raise FieldError("tools", f"strict of {where} is {quoted(strict)}; {bound}")
