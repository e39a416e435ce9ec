"""Text to tokens and back: the checkpoint's tokenizer, its chat template, and decoding token by token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from .errors import InputError, one_line
from .reading import read_json_object

TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
INCOMPLETE = "\ufffd"  # what bytes that are no character yet decode to
LONGEST_CHARACTER = 4  # bytes of UTF-8, so as many tokens at most
LONGEST_WAIT = 8  # unfinished tokens before the detokeniser looks for a place to cut; any number above 4


class Text:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, folder: str | Path) -> None:
        """Read tokenizer.json. Raises InputError when it is missing or malformed; the chat template is read
        on its first use."""
        self._folder = Path(folder)
        self._tokenizer = _read_tokenizer(self._folder / TOKENIZER)
        self._special = {i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        self._template: Template | None = None
        self._names: dict[str, str] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written in it count as such. Raises InputError for a text that
        is not Unicode (lone surrogates)."""
        try:
            return self._tokenizer.encode(text).ids
        except TypeError:
            raise InputError(
                "the text cannot be encoded: it holds half a surrogate pair, or is not a string"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out. Bytes that are no character become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def is_visible(self, token: int) -> bool:
        """Whether a token has text of its own: it is in the vocabulary and not special."""
        return token not in self._special and self._tokenizer.id_to_token(token) is not None

    def label(self, token: int) -> str:
        """A token on one line: · for a space, ↵ for a line end, its name if it has no text, unprintable
        characters escaped."""
        text = self.decode([token]) or self._tokenizer.id_to_token(token) or f"<{token}>"
        return on_one_line(text)

    def chat(self, messages: Sequence[Mapping[str, Any]], thinking: bool | None = None) -> str:
        """A conversation as the prompt of its next answer, by the checkpoint's chat template in a sandbox.

        messages: mappings with strings `role` and `content`. thinking: passed to the template as
        `enable_thinking`; None leaves it undefined, the template's own default. Raises InputError for
        malformed messages, a checkpoint without a template and whatever the template raises."""
        _check_messages(messages)
        if self._template is None:
            self._template, self._names = _read_template(self._folder)
        settings: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                **self._names,
                **settings,
            )
        except Exception as error:  # a template is a program: it can raise anything
            raise InputError(f"the chat template of {self._folder} failed: {one_line(error)}") from None


def on_one_line(text: str) -> str:
    """Text with visible spaces and line ends, and unprintable characters escaped."""
    text = text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Detokenizer:
    """Text of tokens as they come, never half a character; for byte-level tokenizers the pieces and `flush`
    together are exactly what decoding all tokens at once gives.

    Decodes a short window: the last finished piece (some decoders treat a first token differently) and what
    came after it. An unfinished character is one U+FFFD at the end of the window's text, all that is ever
    held back; the next token completes it, or shows it for invalid bytes, which are then returned as U+FFFD.
    So invalid bytes delay output by one token, for ever never."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._window: list[int] = []
        self._finished = 0  # tokens of the window whose text has been returned whole
        self._returned = 0  # characters of the window's text that have been returned

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come. O(1) amortised."""
        if not self._text.is_visible(token):
            return ""
        self._window.append(token)
        whole = self._text.decode(self._window)
        complete = not whole.endswith(INCOMPLETE)
        certain = len(whole) if complete else len(whole) - 1
        piece = whole[self._returned : certain]
        self._returned = max(self._returned, certain)
        if complete:
            self._window = self._window[self._finished :]
            self._finished, self._returned = len(self._window), len(self._text.decode(self._window))
        elif len(self._window) - self._finished > LONGEST_WAIT:
            self._cut(whole)
        return piece

    def flush(self) -> str:
        """The rest of the text, an unfinished character as U+FFFD; the next token starts a new text."""
        rest = self._text.decode(self._window)[self._returned :]
        self._window, self._finished, self._returned = [], 0, 0
        return rest

    def _cut(self, whole: str) -> None:
        """Shorten a window of invalid bytes where its two parts decode to the same as together, before the
        tokens that a later one may still complete."""
        head, tail = self._window[:-LONGEST_CHARACTER], self._window[-LONGEST_CHARACTER:]
        before = self._text.decode(head)
        if before + self._text.decode(tail) == whole:
            self._window, self._finished, self._returned = tail, 0, self._returned - len(before)


def _read_tokenizer(file: Path) -> Tokenizer:
    if not file.is_file():
        raise InputError(f"{file} is missing: text needs the checkpoint's tokenizer in this format")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            f"{file} is no tokenizer ({one_line(error)}): download the checkpoint again"
        ) from None
    tokenizer.no_truncation()  # settings left from training would cut prompts silently
    tokenizer.no_padding()
    return tokenizer


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, (str, Mapping)) or not messages:
        raise InputError("a conversation is a list of at least one message with role and content")
    for number, message in enumerate(messages, 1):
        fields = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(value, str) for value in fields):
            raise InputError(f"message {number} of the conversation needs a role and a content, both strings")


def _read_template(folder: Path) -> tuple[Template, dict[str, str]]:
    """The compiled chat template and the named tokens it may use."""
    config = read_json_object(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).exists() else {}
    try:
        file = folder / TEMPLATE
        source = file.read_text("utf-8") if file.exists() else _template_of(config)
        if source is None:
            raise InputError(
                f"{folder} has no chat template (no {TEMPLATE}, none in {TOKENIZER_CONFIG}): "
                "give a plain prompt instead"
            )
        template = _environment().from_string(source)
    except (OSError, UnicodeDecodeError, TemplateError, RecursionError) as error:
        raise InputError(f"the chat template of {folder} cannot be read: {one_line(error)}") from None
    return template, _named_tokens(config)


def _template_of(config: Mapping[str, Any]) -> str | None:
    """tokenizer_config.json's template: a string, or the one named "default" of a list."""
    found = config.get("chat_template")
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = named[0].get("template") if named else None
    if found is not None and not isinstance(found, str):
        raise InputError(
            f"{TOKENIZER_CONFIG}: chat_template is a {type(found).__name__}; a string was expected"
        )
    return found


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    named = {}
    for key in NAMED_TOKENS:
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            named[key] = token
    return named


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as published chat templates expect it; the sandbox because a template is a downloaded program."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda f: datetime.now().strftime(f)}
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
             sort_keys: bool = False) -> str:  # fmt: skip
    """JSON without jinja's HTML escapes, which models have not seen."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
