"""Pages: the cache of many texts is a pool of them, and a text owns those that hold its positions."""

from __future__ import annotations

from collections.abc import Sequence


class Pages:
    """The numbers 0 to count - 1 of a pool's pages: which of them nobody owns."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))[::-1]

    @property
    def free(self) -> int:
        """How many pages nobody owns."""
        return len(self._free)

    def take(self, n: int) -> list[int]:
        """n pages that nobody owned. The caller sees to it that there are as many."""
        assert 0 <= n <= self.free, (n, self.free)
        return [self._free.pop() for _ in range(n)]

    def give(self, pages: Sequence[int]) -> None:
        """Take back pages whose owner needs them no more."""
        self._free += pages
        assert self.free <= self.count, (self.free, self.count)
