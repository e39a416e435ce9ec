"""The conversation of a chat request, as the checkpoint's chat template takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError, quoted
from .refusal import FieldError

ROLES = ("system", "user", "assistant")
# Of a message; OpenAI's answers have the last two, null, and a client sends them back as they came.
FIELDS = ("role", "content", "reasoning_content", "refusal", "tool_calls")
# What the conversation, the checkpoint and this program say, and no request.
TAKEN = (
    "messages", "conversation", "chat_template", "tokenizer", "tokenize", "tools", "documents",
    "add_generation_prompt", "continue_final_message", "thinking", "self",
)  # fmt: skip


def conversation(value: Any) -> list[dict[str, Any]]:
    """Messages with a role and a string as content. Raises FieldError.

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
    for name in message:
        if name not in FIELDS or (name in FIELDS[-2:] and name in given):
            raise FieldError("messages", f"{where} has a field {quoted(name)}, which is not supported")
    role = given.get("role")
    if role not in ROLES:
        raise FieldError("messages", f"role of {where} is {quoted(role)}; use {', '.join(ROLES)}")
    found = {"role": role, "content": _content(f"content of {where}", given.get("content"))}
    if "reasoning_content" in given:
        if role != "assistant" or not isinstance(given["reasoning_content"], str):
            raise FieldError("messages", f"reasoning_content of {where} must be a string of an assistant")
        found["reasoning_content"] = given["reasoning_content"]
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
