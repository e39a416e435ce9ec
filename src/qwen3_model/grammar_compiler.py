"""Grammars as llguidance compiles them; and the process that tries to, for `Grammar.check`: its stdin has the
grammar, its stdout gets what is wrong, nothing where it compiles."""

from __future__ import annotations

import re
import resource
import signal
import sys
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    from llguidance import LLTokenizer

SECONDS, BYTES = 2.0, 2**31  # of a processor, of memory, that the process may take
# What llguidance says: where, what, then advice about an option that nobody here can set, or the grammar
_SAID = re.compile(
    r"(?:at \d+\(\d+\): )?(?:failed to compile JSON schema: )?(.*?)(?:\. Enable .*|\n +\d+ \|.*)?", re.DOTALL
)


def check_compiles(lark: str, tokenizer: LLTokenizer) -> None:
    """Raises InputError for what is no grammar, and for what llguidance would not apply."""
    from llguidance import LLMatcher

    wrong, said = LLMatcher.validate_grammar_with_warnings(lark, tokenizer)
    if said:  # one without a fault, too: a warning says that something is not applied
        raise InputError(without_place(said[0]))
    matcher = LLMatcher(tokenizer, lark, log_level=0)
    matcher.compute_bitmask()
    if matcher.is_error():
        raise InputError(without_place(matcher.get_error()))


def without_place(said: str) -> str:
    """What llguidance says is wrong, without its own state and the grammar."""
    if said.startswith("NoExtensionBias"):
        return "no text fits the schema"
    said = said.split("<state>")[0].strip()
    found = _SAID.fullmatch(said)
    return found[1].strip() if found else said


class _Bytes:
    """A tokenizer whose tokens are the 256 bytes and an end token."""

    eos_token_id, bos_token_id = 256, None
    tokens = (*(bytes([byte]) for byte in range(256)), b"\xff<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes | str) -> list[int]:
        """Token ids of a text."""
        return list(text.encode() if isinstance(text, str) else text)


def main() -> None:
    """Try the grammar of stdin. The process is killed where that takes more than it may."""
    from llguidance import LLTokenizer, TokenizerWrapper

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # no Python runs meanwhile
    try:
        tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()), eos_token=256)
        check_compiles(sys.stdin.buffer.read().decode("utf-8", "replace"), tokenizer)
    except InputError as error:
        print(error, end="")
