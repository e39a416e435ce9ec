"""A checkpoint's chat template: which one it is, and a conversation as transformers' `apply_chat_template`
(5.23) renders it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from threading import Lock
from types import CodeType
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.utils import Namespace

from .bounded_jinja import DEEPEST, LONGEST_SOURCE, BoundedEnvironment
from .errors import InputError, one_line, quoted
from .reading import read_json_object, read_text

TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
DEFAULT, WITH_TOOLS = "default", "tool_use"  # names of templates
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field, the first is the usual one

Message = Mapping[str, Any]


class ChatTemplate:
    """The templates of a folder and the special tokens they may name, read on first use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = Lock()
        self._compiled: dict[str, CodeType] = {}
        self._read: tuple[dict[str, str], dict[str, str]] | None = None
        self._tools: bool | None = None  # whether they show tools

    def compile(self, tools: bool = False) -> tuple[CodeType, dict[str, str]]:
        """The code of the template for a conversation with or without tools, and the special tokens by name.
        Raises InputError for a folder without one and for one that cannot be compiled."""
        with self._lock:
            try:
                templates, tokens = self._files()
                name = WITH_TOOLS if tools and WITH_TOOLS in templates else DEFAULT
                if name not in templates:
                    raise InputError(
                        f"{self._folder} has no chat template (no {TEMPLATE}, none in {TOKENIZER_CONFIG}): "
                        "give a plain prompt instead"
                    )
                if name not in self._compiled:
                    self._compiled[name] = _environment().bounded_code(templates[name])
            except InputError:
                raise
            except Exception as error:  # jinja raises what Python's compiler raises
                raise InputError(
                    f"the chat template of {self._folder} cannot be read: {one_line(error)}"
                ) from None
            return self._compiled[name], tokens

    def takes_tools(self) -> bool:
        """Whether a conversation with tools shows them: there is a template for it, or the usual one names
        them. Raises the InputErrors of `compile`."""
        self.compile(tools=True)
        if self._tools is None:
            templates, _ = self._files()
            names = _environment().parse(templates.get(DEFAULT, "")).find_all(nodes.Name)
            named = any(name.name == "tools" and name.ctx == "load" for name in names)
            self._tools = named or WITH_TOOLS in templates
        return self._tools

    def _files(self) -> tuple[dict[str, str], dict[str, str]]:
        """The templates and the special tokens by name."""
        if self._read is None:
            config = tokenizer_config(self._folder)
            self._read = _templates(self._folder, config), special_tokens(config)
        return self._read

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        names: Mapping[str, Any],
    ) -> str:
        """A conversation as the prompt of its next answer. Raises InputError for malformed arguments and for
        whatever the template raises."""
        conversation = checked_messages(messages)
        given = {"tools": _objects("tools", tools), "documents": _objects("documents", documents)}
        code, tokens = self.compile(tools is not None)
        environment = _environment()
        taken = {"messages", "add_generation_prompt", *given, *tokens, *environment.globals}
        if wrong := sorted(taken & set(names)):
            raise InputError(f"the name {wrong[0]} belongs to the template's own: pass another")
        values = tokens | _plain("a name of the template", dict(names)) | given
        values |= {"messages": conversation, "add_generation_prompt": True}
        try:
            return environment.bounded_text(code, values)
        except Exception as error:  # a template is a program: it can raise anything
            raise InputError(f"the chat template of {self._folder} failed: {one_line(error)}") from None


def checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as transformers gives them to a template: what is None is left out, the reasoning is there by
    its usual name. Raises InputError."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise InputError("a conversation is a list of at least one message with role and content")
    return [_message(number, message) for number, message in enumerate(messages, 1)]


def _message(number: int, message: Message) -> dict[str, Any]:
    what = f"message {number} of the conversation"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"{what} needs a role, a string; its content is a string, a list, or left out")
    if not isinstance(message.get("content"), (str, list, tuple, type(None))):
        raise InputError(
            f"the content of {what} is {quoted(message['content'])}; a string or a list was expected"
        )
    plain = _plain(what, {key: value for key, value in message.items() if value is not None})
    reasoning = next((plain[key] for key in REASONING if plain.get(key) is not None), None)
    return plain if reasoning is None else {"thinking": reasoning} | plain | {"reasoning_content": reasoning}


def _objects(what: str, given: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    if given is None:
        return None
    if not isinstance(given, (list, tuple)) or not all(isinstance(item, Mapping) for item in given):
        raise InputError(f"{what} is {quoted(given)}; a list of objects was expected")
    return [_plain(what, item) for item in given]


def _plain(what: str, value: Any, depth: int = 0) -> Any:
    """A copy made of what JSON has: a template gets no object with methods of its own, and no file."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):  # enumerations and numbers of other libraries
        if isinstance(value, kind):
            return kind(value) if kind is not str else str.__str__(value)
    if depth == DEEPEST:
        raise InputError(f"{what} nests values deeper than {DEEPEST}")
    if isinstance(value, Mapping):
        return {_plain(what, key, depth + 1): _plain(what, item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(what, item, depth + 1) for item in value)
    raise InputError(f"{what} holds a {type(value).__name__}; what JSON has was expected")


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; special_tokens_map.json too where the former does not list added tokens."""
    config, older = folder / TOKENIZER_CONFIG, folder / SPECIAL_TOKENS
    found = read_json_object(config) if os.path.lexists(config) else {}
    if "added_tokens_decoder" in found or not os.path.lexists(older):
        return found
    return found | read_json_object(older)


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name: those of files, else those of tokenizer_config.json."""
    more = folder / MORE_TEMPLATES
    if os.path.lexists(more) and not more.is_dir():
        raise InputError(f"{more} is not a folder; chat templates were expected in it")
    files = {path.stem: path for path in sorted(more.glob("*.jinja"))}
    if os.path.lexists(folder / TEMPLATE):
        files[DEFAULT] = folder / TEMPLATE
    if files:
        return {name: read_text(path, 4 * LONGEST_SOURCE) for name, path in files.items()}
    found = config.get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {DEFAULT: found}
    try:
        named = {entry["name"]: entry["template"] for entry in found}
    except (TypeError, KeyError):
        named = {"": None}
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise InputError(
            f"{TOKENIZER_CONFIG}: chat_template is {quoted(found)}; a string, or a list of objects with name "
            "and template, was expected"
        )
    return named


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of tokenizer_config.json by name: every `..._token`, and those of an object
    `extra_special_tokens`, such as an image's."""
    extra = config.get("extra_special_tokens")
    tokens = {key: value for key, value in config.items() if key.endswith("_token")}
    named = {}
    for key, token in (tokens | (extra if isinstance(extra, dict) else {})).items():
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            named[key] = token
    return named


def _environment() -> BoundedEnvironment:
    """Jinja as published chat templates expect it."""
    environment = BoundedEnvironment((GenerationTag,))
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


class GenerationTag(Extension):
    """`{% generation %}` around what the assistant wrote, by which trainings mask losses; here its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """A block with a scope of its own, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


class _Dict:
    """`dict` without the class's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace` without names that begin with an underscore. It may hold itself, so it is not printed."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: B902, N805  a name may be `self`
        self, *positional = args
        attributes = dict(*positional, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        raise TemplateError("a namespace cannot be printed")


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have an attribute {name!r}")


def _now(format: str) -> str:
    if len(format) > 1000:
        raise TemplateError("the format of strftime_now has more than 1000 characters")
    return datetime.now().strftime(format)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
