"""The scheduler of many texts: which pass comes next, in which slots, and who owns the pages of the cache.

    scheduler = Scheduler(slots=64, pages=4096, chunk=2048)
    scheduler.add(text, length, limit)
    while work := scheduler.next(ahead):
        ...  # launch it: a Prefill or a Cycle; tell what earlier ones brought: grown, remove

Nothing of a device is in here. Texts run in the order in which they came:

- Texts are admitted first come, first served, as soon as a step reads the first tokens of their prompts:
  several in a step, where they are short. So every running text is older than every waiting one,
  and only the youngest running text can be in the middle of its prompt.
- Free pages go to the oldest text first. While a text lacks a page, no younger one takes any; it may go on in
  the pages that it has.
- If no text can go on, the youngest is preempted: it gives up slot and pages and is the next to be admitted.
  The oldest text alone has all pages, so it always ends, and then the next one is the oldest.
- While texts decode, a step reads as many tokens of prompts as the caller says in `beside`, since they wait
  for them. Where those are fewer than `at_once`, they are saved up for one step, which reads so many.
- Full pages of a text are known by their tokens, of prompt and answer (pages.py). A text that is admitted
  owns those of its own beginning too, and its first chunk starts behind them. One token at least is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from orthrus_kernels import PAGE, pages_for

from ..errors import InputError
from .pages import Chain, Pages

T = TypeVar("T", bound=Hashable)

MOST_PARTS = 16  # texts of a step whose prompts are read, at most


class Grant(NamedTuple):
    """Pages that a slot's page table gets, from the place `first` on, before the work that names them."""

    slot: int
    first: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Part(Generic[T]):
    """Tokens [first, end) of a text in a slot, which a pass reads.

    The parts of a text end in front of its last token, the root of its first cycle: of a new text, that is
    the token which is chosen behind the last part; a preempted text has it already."""

    text: T
    slot: int
    first: int
    end: int
    last: bool  # no further part comes


@dataclass(frozen=True)
class Prefill(Generic[T]):
    """A chunk, where no text decodes: a pass over parts of texts through the AR view, with the commit of
    their tokens, the oldest text first."""

    parts: tuple[Part[T], ...]
    grants: tuple[Grant, ...]

    @property
    def all_texts(self) -> tuple[T, ...]:
        """That it is for."""
        return tuple(part.text for part in self.parts)


@dataclass(frozen=True)
class Cycle(Generic[T]):
    """One cycle of all texts that can go on, the oldest first, and parts of others' prompts. Before it the
    slots of preempted texts stop, and what has not been read of those texts is dropped."""

    texts: tuple[tuple[T, int], ...]  # with their slots
    grants: tuple[Grant, ...]
    preempted: tuple[T, ...]
    parts: tuple[Part[T], ...] = ()

    @property
    def all_texts(self) -> tuple[T, ...]:
        """That it is for."""
        return tuple(text for text, _ in self.texts) + tuple(part.text for part in self.parts)


@dataclass(frozen=True)
class Load:
    """How busy slots and pages are. preemptions: how often a text had to give its pages up to an older one
    and was prefilled again."""

    running: int = 0
    waiting: int = 0
    paused: int = 0
    pages_used: int = 0
    pages: int = 0
    preemptions: int = 0


@dataclass(eq=False)
class _Entry(Generic[T]):
    text: T
    ids: Sequence[int]  # grows with the text
    tokens: int  # known, and the one that follows the prompt
    limit: int
    salt: str
    chain: Chain  # of its known pages, which are its first
    known: int = 0  # how many they are
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    unread: int = 0  # tokens in front of the last one that are in no chunk yet
    paused: bool = False

    def missing(self, growth: int) -> int:
        """Pages it must get before so many more tokens fit."""
        over = min(self.limit, self.tokens + growth) - PAGE * len(self.pages)
        return pages_for(over) if over > 0 else 0


def check_fits(limit: int, count: int) -> None:
    """Raises InputError where a pool of so many pages cannot hold a text of `limit` tokens."""
    needed = pages_for(limit)
    if needed > count:
        raise InputError(
            f"the text may grow to {limit} tokens, {needed} pages of {PAGE}, but the whole cache has "
            f"{count} pages, {count * PAGE} tokens: shorten the prompt, ask for fewer new tokens, or "
            "make the engine with more cache_tokens"
        )


class Scheduler(Generic[T]):
    """Says which pass comes next. Texts are any hashable objects."""

    def __init__(self, slots: int, pages: int, chunk: int, reuse: bool = True) -> None:
        """slots: texts that run at a time at most; pages: of the pool; chunk: tokens of prompts that a step
        reads at most, of all its parts together. reuse: whether texts begin in pages that others have
        filled."""
        assert slots > 0 and pages > 0 and chunk > 0, (slots, pages, chunk)
        self.chunk, self.reuse, self.preemptions = chunk, reuse, 0
        self.beside = chunk  # as many while texts decode, on average; the caller may change it
        self.at_once = 1  # and as many in one step at least, but for what ends a prompt; likewise
        self._saved = 0  # tokens that cycles might have had beside them
        self._pages, self._slots = Pages(pages), list(range(slots))[::-1]
        self._entries: dict[T, _Entry[T]] = {}
        # both in the order of submission, and every running text is older than every waiting one
        self._running: list[_Entry[T]] = []
        self._waiting: deque[_Entry[T]] = deque()
        self._refused: tuple | None = None  # what `_admissible` last found impossible
        self._released = 0  # texts that gave slot and pages back

    def __contains__(self, text: T) -> bool:
        """Whether a text runs or waits."""
        return text in self._entries

    def __len__(self) -> int:
        """How many texts run or wait."""
        return len(self._entries)

    @property
    def texts(self) -> list[T]:
        """Those that have a slot, the oldest first."""
        return [entry.text for entry in self._running]

    @property
    def running(self) -> int:
        """Texts that have a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Texts that have none, those that were preempted included."""
        return len(self._waiting)

    @property
    def paused(self) -> int:
        """Running texts that the last cycle left out for want of a page."""
        return sum(entry.paused for entry in self._running)

    @property
    def pages_used(self) -> int:
        """Pages that texts own."""
        return self._pages.count - self._pages.free

    @property
    def load(self) -> Load:
        """All counts."""
        count = self._pages.count
        return Load(self.running, self.waiting, self.paused, self.pages_used, count, self.preemptions)

    def add(self, text: T, ids: Sequence[int], limit: int, salt: str = "") -> None:
        """Queue a text of these tokens that may have `limit` in the end. ids: the caller adds to them before
        it tells that the text has grown. salt: pages are shared with texts of the same one alone.

        Raises InputError where the pool cannot hold `limit` tokens."""
        assert 0 < len(ids) < limit and text not in self._entries, (len(ids), limit)
        check_fits(limit, self._pages.count)
        self._entries[text] = entry = _Entry(text, ids, len(ids) + 1, limit, salt, salt)
        self._waiting.append(entry)

    def grown(self, text: T, length: int) -> None:
        """The text is known to have so many tokens now, the one behind its prompt included. Told of texts
        whose prompt has been read; what was not read of a preempted text is never told."""
        entry = self._entries[text]
        assert entry.pages and not entry.unread and entry.tokens <= length <= entry.limit, (entry, length)
        entry.tokens = length
        while self.reuse and PAGE * (entry.known + 1) < length:  # all tokens but the last are committed
            page, ids = entry.pages[entry.known], entry.ids[PAGE * entry.known : PAGE * (entry.known + 1)]
            entry.chain, entry.known = self._pages.know(page, entry.chain, ids), entry.known + 1

    def remove(self, text: T) -> None:
        """Forget a text that ended or was cancelled, wherever it is. Its slot and pages are free at once:
        what is launched later runs later. Raises KeyError for a text that is not there."""
        entry = self._entries.pop(text)
        if entry.pages:
            self._running.remove(entry)
            self._release(entry)
        else:
            self._waiting.remove(entry)

    def next(self, ahead: int) -> Prefill[T] | Cycle[T] | None:
        """The next piece of work; None where there is no text.

        ahead: tokens that the cycles in flight and the next one may add to a text at most."""
        if self._running and not self._running[0].unread:  # only the youngest can be in its prompt
            return self._cycle(ahead)
        parts, grants = self._parts(self.chunk, ahead)
        return Prefill(parts, grants) if parts else None

    def _parts(self, rows: int, ahead: int) -> tuple[tuple[Part[T], ...], tuple[Grant, ...]]:
        """What of prompts is read next, of so many tokens at most: of the text that is in its prompt, then of
        waiting ones."""
        parts, grants = list[Part[T]](), list[Grant]()
        while rows and len(parts) < MOST_PARTS:
            if not self._running or not self._running[-1].unread:
                if not self._admissible(rows, ahead):
                    break
                grants.append(self._admit(ahead))
            entry = self._running[-1]
            first, count = entry.tokens - 1 - entry.unread, min(rows, entry.unread)
            entry.unread, rows = entry.unread - count, rows - count
            parts.append(Part(entry.text, entry.slot, first, first + count, not entry.unread))
        return tuple(parts), tuple(grants)

    def _rows(self) -> tuple[int, int]:
        """Tokens of prompts that a cycle has beside it on average, and that one has at once."""
        beside = min(self.chunk, self.beside)
        return beside, min(self.chunk, max(self.at_once, beside))

    def _admissible(self, rows: int, ahead: int) -> bool:
        """Whether the first waiting text gets a slot, and rows of the next step.

        It would lose its pages to older texts, and its prompt would have been read in vain, if those ran out
        of pages soon. So there must be pages for what every text may add in the cycles of its prompt and in
        its first one, and for a page's worth of tokens besides. Where no text runs, it always fits."""
        if not self._waiting or not self._slots:
            return False
        entry = self._waiting[0]
        asked = entry, rows, self.beside, self.at_once, ahead, self._released
        if asked == self._refused:  # its tokens are not looked up again before pages have come back
            return False
        pages, _ = self._filled(entry)
        unread = entry.tokens - 1 - PAGE * len(pages)
        beside, piece = self._rows()
        pieces = max(-(-(unread - rows) // piece), 0)
        cycles = 1 + -(-pieces * piece // beside)
        growth = max((cycles + 1) * ahead, PAGE)
        missing = sum(text.missing(growth) for text in (*self._running, entry))
        fits = missing - self._pages.owned(pages) <= self._pages.free
        self._refused = None if fits else asked
        return fits

    def _filled(self, entry: _Entry[T]) -> tuple[list[int], Chain]:
        """Pages in which a waiting text begins, and their chain: a token at least is left to be read."""
        return self._pages.find(entry.ids[: entry.tokens - 2], entry.salt) if self.reuse else ([], entry.salt)

    def _admit(self, ahead: int) -> Grant:
        """Give the first waiting text a slot, and the pages of its prompt and first cycle."""
        entry = self._waiting.popleft()
        self._running.append(entry)
        pages, entry.chain = self._filled(entry)
        self._pages.own(pages)
        entry.slot, entry.known, entry.pages = self._slots.pop(), len(pages), pages
        entry.unread = entry.tokens - 1 - PAGE * len(pages)
        self._grant(entry, entry.missing(ahead))
        return Grant(entry.slot, 0, tuple(entry.pages))

    def _cycle(self, ahead: int) -> Cycle[T]:
        """A cycle of all texts whose prompt has been read and that have pages; the youngest texts are
        preempted until there is one. Prompts are read with the pages that it leaves."""
        preempted: list[T] = []
        while not (going := self._going(ahead))[0]:
            youngest = self._running.pop()
            self._release(youngest)
            self._waiting.appendleft(youngest)
            preempted.append(youngest.text)
            self.preemptions += 1
        beside, piece = self._rows()
        self._saved = min(self._saved, piece) + beside
        parts, grants = self._parts(piece, ahead) if self._saved >= piece else ((), ())
        self._saved -= sum(part.end - part.first for part in parts)
        return Cycle(tuple(going[0]), (*going[1], *grants), tuple(preempted), parts)

    def _going(self, ahead: int) -> tuple[list[tuple[T, int]], list[Grant]]:
        """The texts that can take part in a cycle, with their slots, and the pages that they get for it."""
        going, grants, short = [], list[Grant](), False
        for entry in self._running:
            if entry.unread:
                continue
            missing = entry.missing(ahead)
            # free pages are kept for the oldest text that lacks some: younger ones would take them one by one
            entry.paused = missing > 0 and (short or missing > self._pages.free)
            short = short or entry.paused
            if not entry.paused:
                going.append((entry.text, entry.slot))
                if missing:
                    grants.append(self._grant(entry, missing))
        return going, grants

    def _grant(self, entry: _Entry[T], count: int) -> Grant:
        """Give a text so many more pages."""
        first, pages = len(entry.pages), self._pages.take(count)
        entry.pages += pages
        return Grant(entry.slot, first, tuple(pages))

    def _release(self, entry: _Entry[T]) -> None:
        """Take back a text's slot and pages."""
        self._released += 1
        self._slots.append(entry.slot)
        self._pages.give(entry.pages)
        entry.pages, entry.slot, entry.unread, entry.paused = [], -1, 0, False
        entry.chain, entry.known = entry.salt, 0
