"""Text to tokens and back: the checkpoint's tokenizer, and decoding token by token."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from .added_tokens import register_tokens
from .chat_template import ChatTemplate
from .errors import InputError, foreign, quoted
from .reading import read_bytes

TOKENIZER = "tokenizer.json"
# Characters of every kind: a tokenizer that panics on them does so when it is loaded.
PROBE = "Probe: 0123 é 日本 🙂\u0301\n\t <x> \x00\ufffd  end."
PROBED = 512  # tokens that are written on loading
_STDERR = Lock()  # one thread at a time has file descriptor 2
INCOMPLETE = "\ufffd"  # what bytes that are no character yet decode to
LONGEST_CHARACTER = 4  # bytes of UTF-8, so as many tokens at most
COMPOSED = 3  # of how many times its bytes Unicode's composition (NFC) makes a text at most
LONGEST_WAIT = 8  # unfinished tokens before the detokeniser looks for a place to cut; any number above 4


class Text:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, folder: str | Path) -> None:
        """Read tokenizer.json. Raises InputError when it is missing or malformed; the chat template is read
        on its first use. Threads may share it."""
        self._tokenizer = read_tokenizer(Path(folder))
        self._file = str(Path(folder) / TOKENIZER)
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}  # by name, as decoding knows them
        self._template = ChatTemplate(Path(folder))

    @cached_property
    def longest_token(self) -> int:
        """Bytes of UTF-8 that one token stands for at most."""
        # A byte-level vocabulary writes each byte as a character; added tokens are written as they are.
        size = len if isinstance(self._tokenizer.decoder, ByteLevel) else _bytes
        added = (token.content for token in self._tokenizer.get_added_tokens_decoder().values())
        sizes = [*map(size, self._tokenizer.get_vocab(with_added_tokens=False)), *map(_bytes, added)]
        return max(sizes, default=1) * (1 if self._tokenizer.normalizer is None else COMPOSED)

    def encode(self, text: str, added_specials: bool = True, context: int | None = None) -> list[int]:
        """Token ids of a text; special tokens written in it count as such. added_specials: whether the
        tokenizer puts its own around them (a BOS); not around a rendered conversation, whose template wrote
        all it needs. context: tokens that the caller has room for; a text with more bytes than so many tokens
        can have is refused before any work. Raises InputError for what is no string or no Unicode (lone
        surrogates), for a text beyond `context`, and for what the tokenizer cannot read."""
        if not isinstance(text, str):
            raise InputError(f"the text is {quoted(text)}; a string was expected")
        try:
            size = _bytes(text)
        except UnicodeEncodeError:
            raise InputError("the text cannot be encoded: it holds half a surrogate pair") from None
        if context is not None and size > (most := self.longest_token * context):
            raise InputError(
                f"the text has {size} bytes; the context of {context} tokens holds at most {most}: shorten it"
            )
        with foreign(f"{self._file} cannot encode this text"):
            # One text as a batch: so other threads run meanwhile, and a server's streams do not stop.
            (found,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=added_specials)
            return found.ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out. Bytes that are no character become U+FFFD. Raises
        InputError for what is no list of ids, and for tokens that the tokenizer cannot write."""
        try:
            return self._tokenizer.decode(list(ids), skip_special_tokens=True)
        except BaseException:
            with foreign(f"{self._file} cannot decode these tokens"):  # here: every token comes by
                raise

    def is_visible(self, token: int) -> bool:
        """Whether a token has text of its own: it is in the vocabulary and not special. Raises InputError for
        what is no id."""
        name = self._name(token)
        return name is not None and name not in self._special

    def label(self, token: int) -> str:
        """A token on one line: · for a space, ↵ for a line end, its name if it has no text, unprintable
        characters escaped. Raises InputError for what is no id."""
        return on_one_line(self.decode([token]) or self._name(token) or f"<{token}>")

    def _name(self, token: int) -> str | None:
        try:
            return self._tokenizer.id_to_token(token)
        except BaseException:
            with foreign(f"{self._file} has no such token"):
                raise

    def as_json(self) -> str:
        """The tokenizer as a tokenizer.json has it, with all tokens that other files declare."""
        return self._tokenizer.to_str()

    def check_template(self) -> None:
        """Raises InputError for a checkpoint without a chat template, or with one that cannot be read."""
        self._template.compile()

    @cached_property
    def converses(self) -> bool:
        """Whether the chat template makes a conversation of messages: not where there is none, nor where it
        refuses a user's message, nor where it only joins texts, as one for code does."""
        try:
            return self.chat([{"role": "user", "content": "x"}]).strip() != "x"
        except InputError:
            return False

    def takes_tools(self) -> bool:
        """Whether the chat template knows tools. Raises the InputErrors of `check_template`."""
        return self._template.takes_tools()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **names: Any,
    ) -> str:
        """A conversation as the prompt of its next answer, as transformers' `apply_chat_template` renders it:
        by the checkpoint's chat template, in a sandbox. Encode it with `added_specials=False`.

        messages: mappings with a string `role`; `content` is a string, a list, None or left out, and other
        fields (`tool_calls`) go to the template as they are. thinking: passed as `enable_thinking`; None
        leaves it undefined, the template's own default. tools: JSON schemas. documents: mappings. names: more
        of the template's names. Raises InputError for malformed arguments, a checkpoint without a template,
        whatever the template raises, and one that takes too long or makes too much."""
        if thinking is not None:
            if "enable_thinking" in names:
                raise InputError("thinking and enable_thinking are the same: give one of them")
            names["enable_thinking"] = thinking
        return self._template.render(messages, tools, documents, names)


def _bytes(text: str) -> int:
    return len(text.encode())


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


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, for decoding and for trainings alike: its tokenizer.json with the tokens
    that other files declare; truncation and padding that were left in it are not obeyed. Raises InputError
    when the file is missing, malformed, or holds a tokenizer that panics on a short text or on its first
    tokens."""
    file = folder / TOKENIZER
    if not os.path.lexists(file):
        raise InputError(f"{file} is missing: text needs the checkpoint's tokenizer in this format")
    with foreign(f"{file} is no tokenizer", "download the checkpoint again"):
        content = read_bytes(file)
        with _unless_panic():
            tokenizer = Tokenizer.from_buffer(content)
            tokenizer.no_truncation()  # settings left from training would cut prompts silently
            tokenizer.no_padding()
            register_tokens(tokenizer, folder)
            _probe(tokenizer)
    return tokenizer


def _probe(tokenizer: Tokenizer) -> None:
    """Let a tokenizer panic now, where the words of its panic can be kept back. Its errors can wait until a
    text has them."""
    for text in ("", PROBE):  # what fails on a text may still panic without one
        with suppress(Exception):
            tokenizer.encode(text)
    for token in range(min(PROBED, tokenizer.get_vocab_size())):
        with suppress(Exception):
            tokenizer.decode([token])


@contextmanager
def _unless_panic() -> Iterator[None]:
    """Rust writes a panic's words and stack straight to file descriptor 2 before the exception comes, which
    says it again. What is written there meanwhile is kept back and, unless it was a panic, passed on."""
    with _STDERR, ExitStack() as held:
        try:
            shown = held.enter_context(os.fdopen(os.dup(2), "wb", buffering=0))
            kept = held.enter_context(tempfile.TemporaryFile())
        except OSError:  # stderr is closed, or there is no place for a file
            kept = None
        if kept is None:
            yield
            return
        os.dup2(kept.fileno(), 2)
        panic = False
        try:
            yield
        except BaseException as error:
            panic = not isinstance(error, Exception)
            raise
        finally:
            os.dup2(shown.fileno(), 2)
            kept.seek(0)
            with suppress(OSError):
                shown.write(b"" if panic else kept.read())
