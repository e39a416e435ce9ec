"""The token ids of a prompt or a conversation, as vLLM's /tokenize gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError, quoted
from .body import check_labels
from .prompts import conversation_prompt, plain_prompts
from .refusal import FieldError
from .served import Served

FIELDS = ("model", "user", "prompt", "messages", "chat_template_kwargs", "tools", "tool_choice")


def tokenized(served: Served, body: Any) -> dict[str, Any]:
    """The ids of a `prompt`, as /v1/completions reads it, or of `messages`, as /v1/chat/completions does.
    max_model_len: tokens of a prompt and its answer at most. Raises InputError, and FieldError where the
    fault is a field's."""
    if not isinstance(body, Mapping):
        raise InputError(f"the body is {quoted(body)}; an object was expected")
    if unknown := [name for name in body if name not in FIELDS]:
        raise FieldError(unknown[0], f"the field {quoted(unknown[0])} is not known")
    given = {name: value for name, value in body.items() if value is not None}
    check_labels(served, given)
    if ("prompt" in given) == ("messages" in given):
        raise FieldError("prompt", "give either prompt or messages")
    if "messages" in given:
        tokens, _ = conversation_prompt(served, given)
    elif isinstance(given["prompt"], str):
        (tokens,) = plain_prompts(served, given["prompt"])
    else:
        raise FieldError("prompt", f"prompt is {quoted(given['prompt'])}; a string was expected")
    return {"count": len(tokens), "max_model_len": served.context, "tokens": tokens}
