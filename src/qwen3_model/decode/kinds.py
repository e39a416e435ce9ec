"""Which kinds of cycles "auto" chooses among, the blocks that drafts come from, and the rows that verify
passes have for prompts."""

from __future__ import annotations

from collections.abc import Sequence

from .controller import CHAIN, LOOKUP, PLAIN, TREES, TWIN_TIMES
from .cycle import LOOKUP_ROWS
from .groups import MOST_ROWS, Kind, fixed_kind, seats_for
from .one_pass import Shape
from .pace import riders_beside
from .sequence import Sequence as Text
from .two_pass import TwoPassCycle

# Nodes of the trees of "auto", and rows of a pass for each text and for all together. With times of passes of
# 8B and the published acceptance, that gives the best tree for 1 to 64 texts, or one within 4 % of it
# (simulated, bench/LOG.md, 2026-11-29).
SIZES = (3, 5, 7, 11, 15, *TREES)
OWN_ROWS, SHARED_ROWS = 6, 128


def seat_counts(slots: int) -> tuple[int, ...]:
    """The numbers of seats that cycles of texts in so many slots have."""
    return tuple(sorted({seats_for(texts) for texts in range(1, slots + 1)}))


def trees_for(seats: int) -> tuple[int, ...]:
    """Nodes of the trees that "auto" chooses among: the two largest of which a text has rows for. All texts
    together have MOST_ROWS, or the smallest trees."""
    most = min(OWN_ROWS + SHARED_ROWS // seats - 1, max(MOST_ROWS // seats - 1, SIZES[0]))
    return tuple(nodes for nodes in SIZES if nodes <= most)[-2:]


def kinds_of_auto(seats: int, block: int, looks: bool = True) -> tuple[int, ...]:
    """The kinds that "auto" chooses among. block: rows of a draft block; 0: the model has none. looks:
    whether lookup is one of them."""
    return PLAIN, *((LOOKUP,) if looks else ()), *(trees_for(seats) if block else ())


def twin_times(block: int, looks: bool) -> dict[int, float]:
    """What kinds that "auto" chooses among without CUDA graphs take, as in `kinds_of_auto`."""
    there = {PLAIN: True, LOOKUP: looks, CHAIN: block > 0}
    return {kind: time for kind, time in TWIN_TIMES.items() if there[kind]}


def kinds_of(text: Text) -> tuple[Kind, ...]:
    """The kinds that a text alone takes."""
    if text.request.strategy == "autoregressive":
        return (PLAIN,)
    if text.request.strategy == "one-pass":
        return (PLAIN, Shape.of(text.block_size, text.request.tree_nodes))
    fixed = fixed_kind(text)
    return (PLAIN, fixed) if fixed is not None else kinds_of_auto(1, text.block_size)


def block_of(kind: Kind, block: int, seats: int) -> int:
    """Rows of a text's block, of `block` at most, or of what lookup has found. With several texts a tree of n
    nodes has no more than its own depth takes: what a cycle costs follows from the rows of both passes."""
    if kind == LOOKUP:
        return min(LOOKUP_ROWS, max(SHARED_ROWS // seats, 2))
    if not isinstance(kind, int) or kind == PLAIN:
        return 0
    if kind > CHAIN and seats > 1:
        return min(block, kind + 1)
    return min(block, max(MOST_ROWS // seats, 2))


def with_riders(kinds: Sequence[int]) -> tuple[int, ...]:
    """Of these kinds, PLAIN the first, those of cycles that carry prompts: PLAIN and the largest draft."""
    return tuple(dict.fromkeys((kinds[0], kinds[-1])))


def riders_of(kind: Kind, block: int, seats: int) -> int:
    """Rows for prompts that the verify pass of a kind may have. One-pass cycles have none."""
    if not isinstance(kind, int):
        return 0
    return riders_beside(seats * TwoPassCycle.rows_each(kind, block_of(kind, block, seats)))


def ahead(kinds: Sequence[Kind], block: int, seats: int, slots: int) -> list[tuple[Kind, int]]:
    """The cycles of these kinds that are captured ahead, and their rows for prompts: of an engine of several
    slots, with and without."""
    numbers = [kind for kind in kinds if isinstance(kind, int)] if slots > 1 else []
    beside = with_riders(numbers) if numbers else ()
    return [*((kind, 0) for kind in kinds), *((kind, riders_of(kind, block, seats)) for kind in beside)]
