"""From accepted tokens to text: end tokens, stop strings, the length limit and the caller's callback, one
token at a time.

Tokens are looked at one by one, however many a cycle accepts, so that text and finish reason are the same for
every strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from ..text import Detokenizer, Text

OnTokens = Callable[[list[int], str], "bool | None"]


class TokenStream:
    """Collects tokens and their text until one of them ends it."""

    def __init__(
        self,
        text: Text | None,
        end_tokens: Sequence[int],
        stop: Sequence[str],
        limit: int,
        on_tokens: OnTokens | None,
        least: int = 0,
    ) -> None:
        """limit: tokens at most. least: tokens that no stop string cuts off."""
        self._detokenizer = Detokenizer(text) if text else None
        self.end_tokens, self._stop, self._limit = frozenset(end_tokens), tuple(stop), limit
        self._least = least
        self.on_tokens = on_tokens
        self._given = self._released = 0  # tokens and characters already handed to the callback
        self._held, self._looked = [_Held(one) for one in self._stop], 0
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason = ""

    def push(self, run: Sequence[int]) -> int:
        """Take an accepted run; returns how many of its tokens were kept, fewer than given when one of them
        ends the text. `release` hands them to the callback.
        """
        kept = 0
        for token in run:
            kept += 1
            self._push_token(token)
            if self.finish_reason:
                break
        return kept

    def finish(self, reason: str) -> None:
        """End the text from outside, keeping what has been decoded. An ended text stays as it is."""
        if not self.finish_reason:
            self._end(reason)

    def _push_token(self, token: int) -> None:
        self.token_ids.append(token)
        if token in self.end_tokens:
            return self._end("end_token")
        if self._detokenizer:
            before = len(self.text)
            self.text += self._detokenizer.push(token)
            if self._cut_at_stop(before):
                self.finish_reason = "stop_string"
                return None
        return self._end("length") if len(self.token_ids) == self._limit else None

    def _end(self, reason: str) -> None:
        before = len(self.text)
        if self._detokenizer:
            self.text += self._detokenizer.flush()
        cut = self._cut_at_stop(before)  # half a character at the end is text too
        self.finish_reason = "stop_string" if cut and reason in ("end_token", "length") else reason

    def _cut_at_stop(self, before: int) -> bool:
        """Whether a stop string was completed by the characters from `before` on; if so the text ends before
        the first one.
        """
        if len(self.token_ids) <= self._least:
            return False
        ends = [(stop, max(before - len(stop) + 1, 0)) for stop in self._stop]
        found = [at for stop, begin in ends if (at := self.text.find(stop, begin)) >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def release(self) -> None:
        """Hand the tokens pushed since the last call to the callback, with the text that can no longer become
        part of a stop string. What it stops keeps text it has not been given.
        """
        tokens, self._given = self.token_ids[self._given :], len(self.token_ids)
        if self.on_tokens is None or not tokens:
            return
        safe = len(self.text)
        if not self.finish_reason:
            for held in self._held:
                held.push(self.text[self._looked :])
            self._looked = len(self.text)
            safe -= max((held.length for held in self._held), default=0)
        piece, self._released = self.text[self._released : safe], max(safe, self._released)
        if self.on_tokens(tokens, piece) is False:
            self.finish("callback")


class _Held:
    """The longest end of a growing text that is a proper beginning of a stop string, by Knuth, Morris and
    Pratt (1977): a few steps a character, however long the string is."""

    def __init__(self, stop: str) -> None:
        self._stop, self._shorter = stop, _shorter_ends(stop)
        self.length = 0

    def push(self, piece: str) -> None:
        """The text goes on with a piece."""
        stop, shorter, length = self._stop, self._shorter, self.length
        for character in piece:
            while length and stop[length] != character:
                length = shorter[length - 1]
            length += stop[length] == character
            if length == len(stop):
                length = shorter[length - 1]
        self.length = length


@lru_cache(maxsize=256)
def _shorter_ends(stop: str) -> tuple[int, ...]:
    """Of each beginning of a string: the length of its longest proper end that is a beginning too."""
    found, length = [0], 0
    for character in stop[1:]:
        while length and stop[length] != character:
            length = found[length - 1]
        length += stop[length] == character
        found.append(length)
    return tuple(found)
