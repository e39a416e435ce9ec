"""The conversation of a chat request, as the checkpoint's chat template takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError, quoted
from .refusal import FieldError, naming
from .strict_json import parse

# Roles, and the fields that a message of each may have. A field that is null is not there: a client sends an
# answer's message back as it came.
ROLES = {
    "system": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", "reasoning_content", "tool_calls"),
    "tool": ("role", "content", "tool_call_id"),
}
FIELDS = ("refusal", *dict.fromkeys(name for names in ROLES.values() for name in names))
MOST_CALLS = 128  # of a message
# What the conversation, the checkpoint and this program say, and no request.
TAKEN = (
    "messages", "conversation", "chat_template", "tokenizer", "tokenize", "tools", "documents",
    "add_generation_prompt", "continue_final_message", "thinking", "self",
)  # fmt: skip


def conversation(value: Any) -> list[dict[str, Any]]:
    """Messages with a role, a string as content, and what the role has besides. Raises FieldError.

    Parts of type text are joined by line ends, as vLLM joins them: most templates take only a string."""
    if not isinstance(value, list) or not value:
        raise FieldError("messages", "messages must be a list of at least one message with role and content")
    return [_message(f"messages[{at}]", message) for at, message in enumerate(value)]


def template_names(value: Any) -> dict[str, Any]:
    """More names for the template (`chat_template_kwargs`). Raises FieldError for what is no object, and for
    names that belong to others: a request cannot bring a template or a tokenizer of its own."""
    field = "chat_template_kwargs"
    if not isinstance(value, Mapping):
        raise FieldError(field, f"{field} is {quoted(value)}; an object was expected")
    for name in value:
        if name in TAKEN:
            instead = ": use enable_thinking" if name == "thinking" else ""
            raise FieldError(field, f"{field} cannot set {name}{instead}")
    return dict(value)


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise FieldError("messages", f"{where} is {quoted(message)}; an object was expected")
    given = {name: value for name, value in message.items() if value is not None}
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise FieldError("messages", f"role of {where} is {quoted(role)}; use {', '.join(ROLES)}")
    for name in message:
        if name not in FIELDS or (name in given and name not in ROLES[role]):
            raise FieldError("messages", f"{where} of {role} has a field {quoted(name)}: leave it out")
    found: dict[str, Any] = {"role": role}
    if "tool_calls" in given:
        found["tool_calls"] = _calls(f"tool_calls of {where}", given["tool_calls"])
    # an assistant's that calls tools says nothing besides, where templates want a string
    content = given.get("content", "" if "tool_calls" in found else None)
    found["content"] = _content(f"content of {where}", content)
    for name in ("reasoning_content", "tool_call_id"):
        if name in given and not isinstance(given[name], str):
            raise FieldError("messages", f"{name} of {where} is {quoted(given[name])}; a string was expected")
        if name in given:
            found[name] = given[name]
    if role == "tool" and "tool_call_id" not in found:
        raise FieldError("messages", f"{where} of tool has no tool_call_id: say whose result it is")
    return found


def _calls(where: str, value: Any) -> list[dict[str, Any]]:
    """Calls with their arguments as objects, as templates take them."""
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_CALLS:
        raise FieldError("messages", f"{where} must be a list of 1 to {MOST_CALLS} calls")
    found = []
    for at, call in enumerate(value):
        function = call.get("function") if isinstance(call, dict) else None
        given = function if isinstance(function, dict) else {}
        texts = (given.get("name"), given.get("arguments"), call.get("id") if given else None)
        if not all(isinstance(text, str) for text in texts):
            raise FieldError("messages", f"{where}[{at}] needs an id and a function with name and arguments")
        with naming("messages"):
            arguments = parse(given["arguments"].encode("utf-8", "replace") or b"{}", f"{where}[{at}]")
        if not isinstance(arguments, dict):
            raise FieldError("messages", f"the arguments of {where}[{at}] must be a JSON object, as a string")
        named = {"name": given["name"], "arguments": arguments}
        found.append({"id": call["id"], "type": "function", "function": named})
    return found


def _content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise FieldError(
            "messages", f"{where} is {quoted(content)}; a string or a list of text parts was expected"
        )
    try:
        return "\n".join(_part(part) for part in content)
    except InputError as error:
        raise FieldError("messages", f"{where}: {error}") from None


def _part(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else part
        raise InputError(f"a part of type {quoted(kind)} is not supported; use text")
    if set(part) != {"type", "text"} or not isinstance(part["text"], str):
        raise InputError("a part of type text has a string as its text, and no other field")
    return part["text"]
