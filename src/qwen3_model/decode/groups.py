"""Groups: the texts that share a cycle, and what follows from who they are.

Texts that asked for one pass a cycle take a cycle of their own in each step, all others share one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from orthrus_kernels import Form

from .controller import LOOKUP, PLAIN, Controller
from .cycle import Cycle, Slots
from .one_pass import Shape
from .sequence import Sequence as Text

MOST_ROWS = 512  # of a pass with drafts of several texts, where a request says how large they are


class Strategy(Protocol):
    """A kind of cycle of a strategy's own, hashable: all that its launches follow from."""

    def cycle(self, slots: Slots, seats: int) -> Cycle:
        """A cycle of this kind for so many texts."""


Kind = int | Strategy  # a number is a two-pass cycle's (controller.py)
Seated = Sequence[tuple[Text, int]]  # texts and their slots


class Group:
    """The texts of one cycle, and what follows from them. It stays the same until one joins or leaves."""

    def __init__(self, seated: Seated, form: Form, shape: Shape | None) -> None:
        """form: of their choice. shape: of one-pass cycles; None: they take two passes, or plain ones."""
        self.seated, self.form, self.shape = seated, form, shape
        self.texts, self.slots = [text for text, _ in seated], [slot for _, slot in seated]
        self.seats, self.epochs = seats_for(len(seated)), tuple(text.epoch for text in self.texts)
        self.drafted = [text for text in self.texts if shape or _drafts(text)]
        self.block = min((text.block_size for text in self.drafted), default=0)
        self.led = [text for text in self.drafted if fixed_kind(text) is None]
        self.kind = _shared([kind for kind in map(fixed_kind, self.drafted) if kind is not None], self.seats)
        self.controllers: tuple[Controller | None, ...] = (None,) * len(seated)  # of those that are led


def groups_of(seated: Seated, form_of: Callable[[Iterable[int]], Form]) -> list[Group]:
    """One group or two of texts in slots. form_of: of the choice of slots."""
    in_one, others = list[tuple[Text, int]](), list[tuple[Text, int]]()
    for pair in seated:
        (in_one if pair[0].request.strategy == "one-pass" else others).append(pair)
    shape = _one_pass([text for text, _ in in_one])
    parts = [(in_one, shape), (others, None)] if shape is not None else [(seated, None)]
    return [Group(part, form_of([slot for _, slot in part]), of) for part, of in parts if part]


def seats_for(texts: int) -> int:
    """Seats of a cycle for so many texts: powers of two up to 16, then multiples of 16."""
    return 1 << (texts - 1).bit_length() if texts <= 16 else -(-texts // 16) * 16


def _drafts(text: Text) -> bool:
    """Whether a text asks for drafts from a cycle that it shares with texts of other strategies."""
    return text.request.strategy not in ("autoregressive", "one-pass")


def _one_pass(texts: Sequence[Text]) -> Shape | None:
    """The kind of a cycle of texts that asked for one-pass; None where there are none, or no room in a pass
    for proposals of so many."""
    if not texts:
        return None
    asked, seats = [(text.block_size, text.request.tree_nodes) for text in texts], seats_for(len(texts))
    return Shape.of(*asked[0]) if seats == 1 else Shape.shared(asked, MOST_ROWS // seats)


def fixed_kind(text: Text) -> Kind | None:
    """The kind of every cycle of a text that drafts; None where a controller says it."""
    if text.request.strategy == "lookup":
        return LOOKUP
    return None if text.request.tree_nodes == "auto" else text.request.tree_nodes


def _shared(kinds: Sequence[Kind], seats: int) -> Kind:
    """The kind of a cycle of texts that asked for some: of several texts the largest, as far as MOST_ROWS
    permits; PLAIN where none did."""
    if seats == 1:
        return next(iter(kinds), PLAIN)
    most = max((kind for kind in kinds if isinstance(kind, int)), default=PLAIN)
    return min(most, max(MOST_ROWS // seats - 1, 1))
