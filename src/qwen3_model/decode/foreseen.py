"""What lookup would keep of a text, without a cycle of it.

What lookup drafts follows from the text alone (orthrus_kernels/lookup.py), and so does what of it is right,
as soon as the text is known. So the host walks over the tokens that it has in cycles of lookup that never
ran: from a root over what lookup would have drafted there to the first token that is another, which is the
next root. Each token is looked at once, whatever cycles wrote it. A long prompt is not walked over at once: a
step has tokens for all of its texts (WALKED in controller.py)."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from typing import NamedTuple, Protocol

from orthrus_kernels.lookup import MOST

_BITS = 21  # of a token in the number that stands for some; clashes of larger ids mislead the estimate alone
assert MOST == 4, "numbers below stand for one to four tokens"


class Followed(NamedTuple):
    """What came to be known of cycles of lookup. kept: tokens of each one whose end is known now. at_least:
    tokens that the next one keeps at least; 0 where nothing is said of it. walked: tokens of the text that
    were walked over."""

    kept: Sequence[int]
    at_least: int
    walked: int


class Foresees(Protocol):
    """Says what cycles of lookup would keep of one text."""

    @property
    def unread(self) -> int:
        """Tokens of the text that are still to be walked over."""

    def follow(self, rows: int, most: int) -> Followed:
        """Go on from the last call, over `most` tokens at most, in cycles of so many rows."""


class Foreseen:
    """Cycles of lookup along a text that grows, one behind the other."""

    def __init__(self, tokens: Sequence[int]) -> None:
        """tokens: of the text, at least one; the caller adds to them. The first cycle that counts has the
        last of them as its root, or a later one."""
        self._tokens, self._walked, self._walk = tokens, 0, _walk(tokens)
        next(self._walk)

    @property
    def unread(self) -> int:
        """As of `Foresees`."""
        return len(self._tokens) - self._walked

    def follow(self, rows: int, most: int) -> Followed:
        """As of `Foresees`."""
        followed = self._walk.send((rows, most))
        self._walked += followed.walked
        return followed


def _walk(tokens: Sequence[int]) -> Generator[Followed, tuple[int, int], None]:
    """`Foreseen.follow`, with what it keeps from call to call in variables of its own: that is faster."""
    first = len(tokens) - 1
    # Behind the last place of equals, by the last n tokens up to it.
    ones, twos, threes, fours = dict[int, int](), dict[int, int](), dict[int, int](), dict[int, int]()
    one = two = three = -1  # no text has a token -1: what stands in front of one matches nothing
    # The root, where its draft begins, and how much of that was right; as if a cycle ended in front of the
    # text.
    root, begin, right = -1, 0, sys.maxsize
    kept, start, known = list[int](), 0, 0
    while True:
        rows, most = yield Followed(kept, right + 1 if root >= first else 0, known - start)
        kept, start, known = [], known, min(known + most, len(tokens))
        for at in range(start, known):
            token = tokens[at]
            four, three, two, one = three << _BITS | token, two << _BITS | token, one << _BITS | token, token
            # A draft goes round at the root; what stands behind the root is the same again, as it was right.
            if right + 1 < rows and token == tokens[begin + right]:
                right += 1
            else:
                if root >= first:
                    kept.append(right + 1)
                # a draft without a match repeats the root
                begin = fours.get(four) or threes.get(three) or twos.get(two) or ones.get(one) or at
                root, right = at, 0
            fours[four] = threes[three] = twos[two] = ones[one] = at + 1
