"""What a text may be: a grammar, and whether it can be compiled.

A grammar is a text in llguidance's form of Lark (github.com/guidance-ai/llguidance, docs/syntax.md), in which
JSON schemas are a rule's right side. Any keyword of a schema that llguidance does not apply makes the grammar
impossible: none is left out silently.

White space stands only between the tokens of the JSON, one space or one line end with up to DEEPEST_INDENT
spaces, so that a model may write as it likes to, and cannot go on with spaces for ever. Strings have no \\u
escapes: an object could hold a name twice by them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from .errors import InputError, quoted

MOST_BYTES = 2**16  # of a grammar; one of so many compiles in about 0.1 s, and may take far longer
DEEPEST = 64  # arrays and objects of a schema inside each other
DEEPEST_INDENT = 16  # spaces behind a line end
OPTIONS: Mapping[str, Any] = {
    "item_separator": ",", "key_separator": ":", "whitespace_flexible": True,
    "whitespace_pattern": f"( |\\n {{0,{DEEPEST_INDENT}}})?", "coerce_one_of": False, "lenient": False,
    "json_allowed_escapes": '"\\bfnrt',
}  # fmt: skip
NOT_THERE = "grammars need llguidance: pip install 'orthrus-kernels[serve]', or pip install llguidance"
_START, _ANSWER = "start: answer\n", "answer: "
_THOUGHT = 'start: thought /\\n{0,2}/ answer\nthought[suffix="</think>"]: /(?s:.*)/\n'
# The folder in which a server was started is no place for modules.
_CHECK = (
    "import sys; sys.path[:] = filter(None, sys.path); from qwen3_model.grammar_compiler import main; main()"
)
_MOST_SECONDS = 30.0  # that it may take on a busy machine; it ends itself sooner
_TOO_LONG = "the schemas take too long, or too much memory, to compile: make them simpler"


@dataclass(frozen=True)
class Grammar:
    """Made by `json_schema`, `json_object` and `calls`. rules: in Lark; `answer` is the whole text.
    thinks: reasoning that ends with `</think>` stands in front of it."""

    rules: str
    thinks: bool = False

    @property
    def lark(self) -> str:
        """As llguidance takes it."""
        return (_THOUGHT if self.thinks else _START) + self.rules

    @staticmethod
    def json_schema(schema: Mapping[str, Any]) -> Grammar:
        """JSON that fits a schema. Raises InputError for what is no object, or too large."""
        return _bounded(Grammar(_ANSWER + _json(schema, "the schema")))

    @staticmethod
    def json_object() -> Grammar:
        """Any JSON object."""
        return Grammar.json_schema({"type": "object"})

    @staticmethod
    def calls(functions: Sequence[tuple[str, Mapping[str, Any]]], several: bool) -> Grammar:
        """Calls of functions, as Qwen3 writes them: `<tool_call>`, `{"name": …, "arguments": …}` and
        `</tool_call>` in lines of their own.

        functions: name and schema of the arguments of each, one at least; names of letters, digits and any of
        _ . -; several: one call or more, one behind the other, else one. Raises InputError for a schema of
        arguments that is not one of an object, or for too large ones."""
        rules = ["answer: call" + (' ("\\n" call)*' if several else "")]
        each = " | ".join(f"call{nth}" for nth in range(len(functions)))
        rules.append(f'call: "<tool_call>\\n" ({each}) "\\n</tool_call>"')
        for nth, (name, schema) in enumerate(functions):
            if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
                raise InputError(f"the arguments of {quoted(name)} must have a schema of type object")
            written = _json({"type": "object", **schema}, f"the schema of {quoted(name)}")
            rules.append(f'call{nth}: "{{\\"name\\": \\"{name}\\", \\"arguments\\": " args{nth} "}}"')
            rules.append(f"args{nth}: {written}")
        return _bounded(Grammar("\n".join(rules) + "\n"))

    def behind_thought(self) -> Grammar:
        """The same behind reasoning that has begun."""
        return replace(self, thinks=True)

    def check(self) -> None:
        """Raises InputError where it cannot be compiled, naming what llguidance does not apply; where that
        takes longer than texts should wait; and where llguidance is not installed. The first time it takes a
        process of its own, some tenths of a second."""
        if not is_there():
            raise InputError(NOT_THERE)
        if wrong := _wrong(self.lark):
            raise InputError(wrong)


def is_there() -> bool:
    """Whether llguidance is installed."""
    return find_spec("llguidance") is not None


def _json(schema: Mapping[str, Any], what: str) -> str:
    """The right side of a rule. Names keep their order: answers have it."""
    if not isinstance(schema, Mapping):
        raise InputError(f"{what} is {quoted(schema)}; an object was expected")
    try:
        written = json.dumps({**schema, "x-guidance": dict(OPTIONS)}, ensure_ascii=False, allow_nan=False)
        written.encode()
        _check(schema, what)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what} cannot be written as JSON ({quoted(error)})") from None
    return f"%json {written}\n"


def _check(schema: Mapping[str, Any], what: str) -> None:
    """Refuse what llguidance takes and cannot hold an answer to."""
    for holder in _objects(schema, what):
        least, required = holder.get("minProperties"), holder.get("required")
        named = len(required) if isinstance(required, list) else 0
        if isinstance(least, int) and least > named + 1:  # of two free names the second could be the first
            raise InputError(f"minProperties of {what} is {quoted(least)}; at most {named + 1} is supported")


def _objects(schema: Any, what: str) -> Iterator[Mapping[str, Any]]:
    level = [schema]
    for _ in range(DEEPEST + 1):
        yield from (holder for holder in level if isinstance(holder, Mapping))
        level = [
            item for holder in level
            for item in (holder.values() if isinstance(holder, Mapping) else holder)
            if isinstance(item, Mapping | list | tuple)
        ]  # fmt: skip
        if not level:
            return
    raise InputError(f"{what} nests arrays and objects deeper than {DEEPEST}")


def _bounded(grammar: Grammar) -> Grammar:
    size = len(grammar.rules.encode("utf-8", "surrogatepass"))
    if size > MOST_BYTES:
        raise InputError(f"the schemas have {size} bytes; at most {MOST_BYTES} are supported")
    return grammar


@lru_cache(maxsize=256)
def _wrong(lark: str) -> str:
    """Why a grammar cannot be compiled; "" where it can.

    Some schemas of a line would compile for hours, which no limit of llguidance's stops, and a thread cannot
    be stopped. So a process of its own tries it (grammar_compiler.py)."""
    try:
        tried = subprocess.run(
            [sys.executable, "-c", _CHECK], input=lark.encode("utf-8", "replace"), capture_output=True,
            timeout=_MOST_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise InputError(_TOO_LONG) from None  # maybe of this machine at this time
    return _TOO_LONG if tried.returncode else tried.stdout.decode("utf-8", "replace")
