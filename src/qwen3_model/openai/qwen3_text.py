"""What an answer's text says, in Qwen3's words: `<think>…</think>` at its beginning is reasoning, and
`<tool_call>{"name": …, "arguments": {…}}</tool_call>` calls a tool.

The text is read as it comes. What may be the beginning of a tag is held back, so that all cuttings of a text
into pieces give the same. Line ends beside a tag belong to the tag, as Qwen3's template writes them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from .strict_json import parse

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"


@dataclass
class Said:
    """A piece of an answer, or the whole."""

    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)  # name, arguments: a JSON text

    def add(self, more: Said) -> None:
        """Go on with another piece."""
        self.reasoning += more.reasoning
        self.content += more.content
        self.calls += more.calls


class Reader:
    """Reads an answer piece by piece. tools: whether it may call tools; else `<tool_call>` is text.
    reasons: whether the prompt has begun the reasoning."""

    def __init__(self, tools: bool, reasons: bool) -> None:
        self._tools = tools
        self._state = self._reasoning if reasons else self._beginning
        self._held = ""  # has come, and is not said yet
        self._before = ""  # line ends before a call's tag, which are text if the call is none
        self._trim = reasons  # line ends that come now belong to the tag before them
        self._said = Said()

    def push(self, text: str) -> Said:
        """What is certain now that more text has come."""
        self._held += text
        while self._held:
            if self._trim:
                self._held = self._held.lstrip("\n")
                self._trim = not self._held
            if not self._held or not self._state():
                break
        said, self._said = self._said, Said()
        return said

    def flush(self) -> Said:
        """The rest, of a text that ends here: a tag that is not closed is text."""
        rest, self._held = self._held, ""
        if self._state == self._reasoning:
            return Said(reasoning=rest)
        return Said(content=self._before + CALL + rest if self._state == self._call else rest)

    # Each state says what it can of the text held, and whether another state goes on with it.

    def _beginning(self) -> bool:
        text = self._held.lstrip()
        if len(text) < len(THINK) and THINK.startswith(text):
            return False
        if text.startswith(THINK):
            self._state, self._held, self._trim = self._reasoning, text[len(THINK) :], True
        else:
            self._state = self._content
        return True

    def _reasoning(self) -> bool:
        text, found = self._up_to(THOUGHT)
        self._said.reasoning += text
        if found:
            self._state, self._trim = self._content, True
            self._before = ""
        return found

    def _content(self) -> bool:
        if not self._tools:
            self._said.content += self._held
            self._held = ""
            return False
        text, found = self._up_to(CALL)
        self._said.content += text
        if found:
            self._state = self._call
        return found

    def _call(self) -> bool:
        inner, tag, rest = self._held.partition(CALLED)
        if not tag:
            return False
        call = _read_call(inner)
        if call is None:
            self._said.content += self._before + CALL + inner + CALLED
        else:
            self._said.calls.append(call)
        self._state, self._held, self._trim, self._before = self._content, rest, call is not None, ""
        return True

    def _up_to(self, tag: str) -> tuple[str, bool]:
        """The text held before a tag without its last line ends, which go to `_before`, and whether the tag
        is there; without it, the text before what may become line ends and the tag."""
        text, found, rest = self._held.partition(tag)
        if not found:
            reach = range(min(len(tag) - 1, len(text)), 0, -1)
            text = text[: len(text) - next((n for n in reach if text.endswith(tag[:n])), 0)]
        said = text.rstrip("\n")
        if found:
            self._before, self._held = text[len(said) :], rest
        else:
            self._held = self._held[len(said) :]
        return said, bool(found)


def read_said(text: str, tools: bool, reasons: bool) -> Said:
    """What a whole answer says."""
    reader = Reader(tools, reasons)
    said = reader.push(text)
    said.add(reader.flush())
    return said


def _read_call(text: str) -> dict[str, str] | None:
    """The call of a tag's text; None for what is no call."""
    try:
        found: Any = parse(text.encode("utf-8", "surrogatepass"), "a call")
    except InputError:
        return None
    if not isinstance(found, dict) or set(found) - {"name", "arguments"}:
        return None
    name, arguments = found.get("name"), found.get("arguments", {})
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
