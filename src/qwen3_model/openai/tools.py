"""The tools of a chat request: functions that the answer may call."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import quoted
from .refusal import FieldError

MOST_TOOLS = 128
FUNCTION = ("name", "description", "parameters", "strict")  # fields
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)


def tools_of(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tools that the answer may call; none for tool_choice "none". Raises FieldError: nothing here can
    force a call."""
    tools = given.get("tools", [])
    if not isinstance(tools, list) or len(tools) > MOST_TOOLS:
        raise FieldError("tools", f"tools must be a list of at most {MOST_TOOLS} functions")
    for at, tool in enumerate(tools):
        _check(f"tools[{at}]", tool)
    choice = given.get("tool_choice", "auto" if tools else "none")
    if choice not in ("auto", "none"):
        raise FieldError("tool_choice", f"tool_choice is {quoted(choice)}; auto and none are supported yet")
    if choice == "auto" and not tools:
        raise FieldError("tool_choice", "tool_choice is auto, and there are no tools: give tools too")
    return tools if choice == "auto" else []


def _check(where: str, tool: Any) -> None:
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
    if function.get("strict") not in (None, False):
        raise FieldError("tools", f"strict of {where} is not supported: no answer is bound to a schema")
