"""Pages: the cache of many texts is a pool of them, and texts own those that hold their positions.

A full page can be **known** by its tokens and by all those in front of it. A text that begins with the same
tokens owns it too: keys have the same bits whoever computed them. A page that nobody owns is free, known or
not; of the known ones the one that nobody has owned for longest is taken first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import count as numbers
from typing import NamedTuple

from orthrus_kernels import PAGE

Chain = int | str  # what stands in front of a page: the number of a known page, or a salt in front of all


class _Key(NamedTuple):
    before: Chain
    tokens: tuple[int, ...]


class Pages:
    """The numbers 0 to count - 1 of a pool's pages: who owns them, and what they are known by."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._owners = [0] * count
        self._blank = list(range(count))[::-1]  # nobody owns or knows them
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, nobody owns them; the next one first
        self._known: dict[_Key, tuple[int, int]] = {}  # the page, and its number as a `Chain`
        self._keys: dict[int, _Key] = {}  # by page
        self._chains = numbers()  # none is given twice, so nothing is found behind a page that was taken

    @property
    def free(self) -> int:
        """How many pages nobody owns."""
        return len(self._blank) + len(self._idle)

    def take(self, n: int) -> list[int]:
        """n pages that nobody owned, known by nothing. The caller sees to it that there are as many."""
        assert 0 <= n <= self.free, (n, self.free)
        while len(self._blank) < n:
            page, _ = self._idle.popitem(last=False)
            del self._known[self._keys.pop(page)]
            self._blank.append(page)
        pages = [self._blank.pop() for _ in range(n)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def own(self, pages: Sequence[int]) -> None:
        """One more owner of known pages."""
        for page in pages:
            self._owners[page] += 1
            self._idle.pop(page, None)

    def give(self, pages: Sequence[int]) -> None:
        """Take back the pages of an owner, in the order of its positions."""
        for page in reversed(pages):  # the end of a text is forgotten before its beginning
            self._owners[page] -= 1
            assert self._owners[page] >= 0, page
            if not self._owners[page] and page in self._keys:
                self._idle[page] = None
            elif not self._owners[page]:
                self._blank.append(page)

    def owned(self, pages: Sequence[int]) -> int:
        """How many of some pages somebody owns."""
        return sum(self._owners[page] > 0 for page in pages)

    def know(self, page: int, before: Chain, tokens: Sequence[int]) -> int:
        """Know a page by its PAGE tokens behind a chain; returns the chain with it. Where another page is
        known by the same, this one stays its owner's alone."""
        key = _Key(before, tuple(tokens))
        assert len(key.tokens) == PAGE and page not in self._keys, (page, key)
        if key not in self._known:
            self._known[key], self._keys[page] = (page, next(self._chains)), key
        return self._known[key][1]

    def find(self, tokens: Sequence[int], salt: str) -> tuple[list[int], Chain]:
        """The known pages of the longest beginning of some tokens, whole pages only, and their chain."""
        found: list[int] = []
        at: Chain = salt
        for first in range(0, len(tokens) - PAGE + 1, PAGE):
            hit = self._known.get(_Key(at, tuple(tokens[first : first + PAGE])))
            if hit is None:
                break
            page, at = hit
            found.append(page)
        return found, at
