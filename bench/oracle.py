"""What the best possible choice among a block's candidates would keep, and how often they hold the target's
token. No draft of these blocks keeps more, whatever ranks their candidates (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from orthrus_kernels import Sampling
from qwen3_model import Qwen3
from qwen3_model.decode.choice import CANDIDATES
from qwen3_model.lattice import lattice_of, ranks, walked
from qwen3_model.request import block_rows
from qwen3_model.training.followed import Drafts, passed

from .bootstrap import interval, ratio

WIDTHS = (1, 4, CANDIDATES)  # first candidates that may hold the target's token
OFFSETS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 31)  # that are told


@dataclass(frozen=True)
class Lattice:
    """The lattices of texts at one temperature, a text a prompt.

    two_pass, one_pass: of each text the `ranks` of blocks as two-pass and as one-pass cycles have them, [N,
    P]; text i's block j stands in front of its token j."""

    temperature: float
    two_pass: list[np.ndarray]
    one_pass: list[np.ndarray]

    def cycles(self, width: int = CANDIDATES) -> np.ndarray:
        """Tokens and cycles of each text, [N, 2], if each two-pass cycle keeps as far as the target's tokens
        are among the first `width` candidates."""
        kept = ([leading(row, width) for row in table[1:]] for table in self.two_pass)
        return np.array([walked(steps) for steps in kept])

    def passes(self, width: int = CANDIDATES) -> np.ndarray:
        """The same of one-pass cycles, as if a block stood at every node. The block stands one position
        before the root, so its first proposal is dropped; the first cycle of a text has no draft."""
        kept = ([0, *(leading(row[1:], width) for row in table[1:-1])] for table in self.one_pass)
        return np.array([walked(steps) for steps in kept])

    def recall(self, offset: int, width: int) -> np.ndarray:
        """Of each text, [N, 2]: blocks with the target's token at an offset from 1 on among the first `width`
        candidates of two-pass cycles, and blocks whose text goes on as far."""
        columns = [table[:, offset - 1] for table in self.two_pass]
        return np.array([[((c >= 0) & (c < width)).sum(), (c >= 0).sum()] for c in columns])

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "temperature": self.temperature,
            "oracle": [
                {"draft": draft, "tokens_per_cycle": round(ratio(pairs), 4),
                 "interval_95": [round(x, 4) for x in interval(pairs)],
                 "tokens_per_forward": round(per_forward(pairs, each), 4)}
                for draft, pairs, each in self.oracles()
            ],
            "recall": [
                {"offset": offset, "width": width, "share": round(ratio(pairs), 4),
                 "interval_95": [round(x, 4) for x in interval(pairs)], "blocks": int(pairs[:, 1].sum())}
                for offset in self.offsets() for width in WIDTHS
                for pairs in (self.recall(offset, width),)
            ],
        }  # fmt: skip

    def oracles(self) -> list[tuple[str, np.ndarray, int]]:
        """(name, tokens and cycles of each text, passes a cycle)."""
        named = [(f"two-pass, oracle of the first {k}", self.cycles(k), 2) for k in (4, CANDIDATES)]
        return [*named, (f"one-pass, oracle of the first {CANDIDATES}", self.passes(), 1)]

    def offsets(self) -> list[int]:
        """Those of `OFFSETS` that blocks have."""
        return [offset for offset in OFFSETS if offset <= self.two_pass[0].shape[1]]


def leading(row: np.ndarray, width: int) -> int:
    """How many ranks from the first on are below `width` and known."""
    right = (row >= 0) & (row < width)
    return len(right) if right.all() else int(right.argmin())


def of_drafts(drafts: Drafts, width: int = CANDIDATES) -> np.ndarray:
    """(tokens, cycles) of each text, [B, 2], if every cycle of recorded drafts keeps as far as the first
    candidates hold the text."""
    found = []
    for ranks_ in drafts.ranks.split(drafts.each):
        kept = [leading(row, width) for row in ranks_.cpu().numpy()]
        found.append(walked(kept) if drafts.known else passed(kept, [True] * len(kept)))
    return np.array(found)


def per_forward(pairs: np.ndarray, passes: int) -> float:
    """Tokens a forward pass of texts [N, 2] of (tokens, cycles), prefills and first tokens with them."""
    tokens, cycles = pairs.sum(0)
    return float((tokens + len(pairs)) / (passes * cycles + len(pairs)))


def measure(
    model: Qwen3, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling], progress: Callable[[int, int], None] = lambda done, of: None,
) -> Lattice:  # fmt: skip
    """The lattices of texts behind prompts that were decoded with these settings. Texts of one token have
    none."""
    sizes = model.config.block_size, block_rows(model.config, None, "one-pass")
    found: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for i, (prompt, text, sampling) in enumerate(zip(prompts, texts, samplings, strict=True)):
        for size, tables in zip(sizes, found, strict=True):
            if len(text) > 1:
                ids = lattice_of(model, prompt, text, size, sampling).ids
                tables.append(ranks(ids.cpu(), torch.tensor(text)).numpy())
        progress(i + 1, len(texts))
    return Lattice(samplings[0].temperature, *found)


Table = tuple[str, list[str], list[list[str]]]


def tables(found: Lattice) -> list[Table]:
    """What is printed."""
    of = f"T {found.temperature:g}, {len(found.two_pass)} prompts"
    lines = []
    for name, pairs, passes in found.oracles():
        low, high = interval(pairs)
        lines.append([name, f"{ratio(pairs):.2f}", f"{low:.2f} to {high:.2f}",
                      f"{per_forward(pairs, passes):.2f}"])  # fmt: skip
    shares = []
    for offset in found.offsets():
        line = [str(offset)]
        for width in WIDTHS:
            pairs = found.recall(offset, width)
            low, high = interval(pairs)
            line += [f"{ratio(pairs):.3f}", f"{low:.3f} to {high:.3f}"]
        shares.append(line)
    heads = [column for width in WIDTHS for column in (f"recall@{width}", "95 %")]
    return [
        (
            f"the best choice among candidates, {of}",
            ["draft", "tokens/cycle", "95 %", "tokens/forward"],
            lines,
        ),
        (f"the target's token among the candidates, {of}", ["offset", *heads], shares),
    ]
