"""The prompts of a request as token ids: strings, ids, or a conversation through the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..model import checked_prompt
from .messages import conversation, template_names
from .qwen3_text import THINK
from .refusal import FieldError, naming
from .served import Served
from .tools import tools_of

MOST_CHOICES = 256  # of all prompts


def conversation_prompt(served: Served, given: Mapping[str, Any]) -> tuple[list[int], bool]:
    """The prompt of a chat, and whether its template has begun the answer's reasoning. Raises FieldError."""
    if "messages" not in given:
        raise FieldError("messages", "messages is missing")
    messages = conversation(given["messages"])
    names = template_names(given.get("chat_template_kwargs", {}))
    tools = tools_of(given)
    for field, wanted in (("tools", bool(tools)), ("messages", any(_about_tools(m) for m in messages))):
        with naming(field):
            if wanted and not served.text.takes_tools():
                raise InputError("the chat template of this checkpoint knows no tools: leave them out")
    if tools:
        names["tools"] = tools
    with naming("chat_template_kwargs" if names.keys() - {"tools"} else "messages"):
        rendered = served.text.chat(messages, **names)
    with naming("messages"):
        ids = served.text.encode(rendered, added_specials=False, context=served.context)
        return checked_prompt(ids, served.config.vocab_size), rendered.rstrip("\n").endswith(THINK)


def _about_tools(message: Mapping[str, Any]) -> bool:
    return message["role"] == "tool" or "tool_calls" in message


def plain_prompts(served: Served, prompt: Any) -> list[list[int]]:
    """The prompts of a string, of token ids, or of a list of either. Raises FieldError."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and type(prompt[0]) is int):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise FieldError("prompt", "prompt must be a string, token ids, or a list of either, and not empty")
    if len(prompt) > MOST_CHOICES:
        raise FieldError("prompt", f"prompt has {len(prompt)} prompts; at most {MOST_CHOICES} choices")
    return [
        _prompt(served, "prompt" if len(prompt) == 1 else f"prompt[{i}]", p) for i, p in enumerate(prompt)
    ]


def _prompt(served: Served, where: str, prompt: Any) -> list[int]:
    try:
        if isinstance(prompt, list):
            if not all(type(token) is int for token in prompt):
                raise InputError("token ids are whole numbers")
        else:
            prompt = served.text.encode(prompt, context=served.context)
        return checked_prompt(prompt, served.config.vocab_size)
    except InputError as error:
        raise FieldError("prompt", f"{where}: {error}") from None
