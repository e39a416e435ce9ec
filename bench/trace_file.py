"""A trace: how many tokens a cycle of each kind would keep if it began at a position of a recorded text.

Texts are known before: a block anchored at every position drafts in a few mixed passes what cycles would
draft there, and what the target would say is what comes next in the text: a sampled choice has the noise of
its position (orthrus_kernels/choice.py), whichever cycle asks. Kinds: "chain" is the first
candidate of each position; "15" to "127" are draft trees of so many nodes, of which the smaller ones are
prefixes, without what lookup finds; "one-pass" is that strategy's default tree, from a short block anchored
one position earlier, which has not seen the root; "lookup" is the chain that lookup finds in the text up to
the root. The end of a text matches no proposal.

Simulated traces (strong.py) have no "lookup", since their texts have no tokens. Traces that were recorded
before that kind was known lack it too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orthrus_kernels import Sampling
from qwen3_model import InputError
from qwen3_model.cli.output import write_atomically
from qwen3_model.decode.choice import CANDIDATES
from qwen3_model.decode.cycle import LOOKUP_ROWS

CHAIN, ONE_PASS, LOOKUP = "chain", "one-pass", "lookup"
TREES = (15, 31, 63, 127)  # nodes that are recorded: with the root they fill the kernels' tiles of rows
KINDS = (CHAIN, *map(str, TREES), ONE_PASS, LOOKUP)


@dataclass(frozen=True)
class Text:
    """A recorded text behind a prompt. kept[kind][i]: tokens of a cycle whose root is its token i."""

    prompt_tokens: int
    kept: dict[str, list[int]]

    @property
    def tokens(self) -> int:
        """Of the text, the prompt's not counted."""
        return len(self.kept[CHAIN])


@dataclass
class Tally:
    """Where first candidates fail. rows: of the blocks. knows_root: or anchored one position earlier.
    corrected: candidates in the order of the bigram correction, behind the true token before.

    hits[d] of trials[d] cycles whose first d first candidates were right have the next one right as well.
    misses[r]: first misses at which the truth was candidate r + 1 behind the first; the last number: none of
    the candidates."""

    rows: int
    knows_root: bool
    corrected: bool
    hits: list[int] = field(default_factory=list)
    trials: list[int] = field(default_factory=list)
    misses: list[int] = field(default_factory=lambda: [0] * CANDIDATES)

    def add(self, ranks: Sequence[int], count: int) -> None:
        """One cycle: `ranks_of` its truth of `count` tokens."""
        right = next((d for d, rank in enumerate(ranks) if rank), len(ranks))
        for numbers, n in ((self.hits, right), (self.trials, min(right + 1, count))):
            numbers += [0] * (n - len(numbers))
            for d in range(n):
                numbers[d] += 1
        if right < count:
            self.misses[ranks[right] - 1 if right < len(ranks) else -1] += 1

    def agreement(self, least: int = 100) -> list[float]:
        """Share of hits by offset, as far as there are `least` trials."""
        hits = [*self.hits, *[0] * (len(self.trials) - len(self.hits))]
        return [a / b for a, b in zip(hits, self.trials, strict=True) if b >= least]

    def shares(self) -> list[float]:
        """`misses` as shares of all misses."""
        return [n / max(sum(self.misses), 1) for n in self.misses]


@dataclass
class Trace:
    """Texts and tallies of a checkpoint. simulated: the model that made it up, in words; None: recorded."""

    checkpoint: str
    block_rows: int
    one_pass_rows: int
    bigram: bool
    texts: list[Text]
    tallies: list[Tally]
    simulated: str | None = None
    made: dict[str, Any] = field(default_factory=dict)  # machine, dtype, command
    temperature: float = 0.0

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those of KINDS that all its texts have: every one, or every one but LOOKUP."""
        return tuple(kind for kind in KINDS if all(kind in text.kept for text in self.texts))

    @property
    def says(self) -> str:
        """What every figure that rests on it must say."""
        return "simulated acceptance" if self.simulated else "acceptance replayed"

    def tally(self, rows: int, knows_root: bool, corrected: bool) -> Tally:
        """Raises InputError when it was not recorded."""
        wanted = rows, knows_root, corrected
        for t in self.tallies:
            if (t.rows, t.knows_root, t.corrected) == wanted:
                return t
        raise InputError(f"the trace has no tally of {wanted}: record it with --blocks {rows}")

    def mean(self, kind: str) -> float:
        """Tokens a cycle, cycle after cycle through all texts."""
        steps = [followed(text, kind) for text in self.texts]
        return sum(sum(kept) for kept in steps) / max(sum(map(len, steps)), 1)


def followed(text: Text, kind: str) -> list[int]:
    """Tokens of each cycle of one kind, from the first root to the end. The first one-pass cycle of a text
    has no draft; every later one has, as if a block stood at each node."""
    kept, at, found = text.kept[kind], 0, list[int]()
    while at < text.tokens - 1:
        found.append(1 if kind == ONE_PASS and not found else min(kept[at], text.tokens - 1 - at))
        at += found[-1]
    return found


def write(path: Path, trace: Trace) -> None:
    """As JSON on one line."""
    write_atomically(path, json.dumps(asdict(trace), allow_nan=False, separators=(",", ":")) + "\n")


def read(path: Path) -> Trace:
    """Raises InputError for what is no trace."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        texts = [Text(**text) for text in found.pop("texts")]
        tallies = [Tally(**tally) for tally in found.pop("tallies")]
        trace = Trace(texts=texts, tallies=tallies, **found)
        if any({*text.kept} not in ({*KINDS}, {*KINDS} - {LOOKUP}) for text in texts):
            raise ValueError("a text has tables of other kinds")
        if len({len(text.kept) for text in texts}) > 1:
            raise ValueError("one text has lookup, another has not")
        sizes = [{*map(len, text.kept.values())} for text in texts]
        if not texts or any(len(size) != 1 for size in sizes):
            raise ValueError("no texts, or tables of several lengths")
        _check(trace)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is no trace ({error}): python -m bench.trace records one") from None
    return trace


def _check(trace: Trace) -> None:
    """Raises ValueError for numbers that no recording gives."""
    numbers = [trace.block_rows, trace.one_pass_rows]
    for text in trace.texts:
        numbers += [text.prompt_tokens, *(n for kept in text.kept.values() for n in kept)]
    if any(type(n) is not int or n < 1 for n in numbers):
        raise ValueError("whole numbers above 0 were expected")
    if any(n > LOOKUP_ROWS for text in trace.texts for n in text.kept.get(LOOKUP, [])):
        raise ValueError(f"a cycle of lookup keeps {LOOKUP_ROWS} tokens at most")
    if type(trace.temperature) not in (int, float) or trace.temperature > 1e30:
        raise ValueError("a temperature is a number")
    Sampling(temperature=trace.temperature)
    for tally in trace.tallies:
        counts = [*tally.hits, *tally.trials, *tally.misses]
        if any(type(n) is not int or n < 0 for n in counts) or type(tally.rows) is not int:
            raise ValueError("tallies are of whole numbers")
        if tally.rows < 2 or len(tally.hits) > len(tally.trials):
            raise ValueError("a tally has fewer trials than hits, or no rows")
    shape = trace.made.get("one_pass")
    if shape is not None and set(shape) != {"nodes", "anchors", "block", "chain"}:
        raise ValueError("a shape of one-pass cycles has nodes, anchors, block and chain")
