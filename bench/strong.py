"""A simulated trace of a strong checkpoint, from a published curve of accepted depths.

The model: the first candidate at depth d is right with probability p(d) = S(d) / S(d - 1), where S(d) is the
share of cycles whose chain is accepted at depth d; where it is wrong, the truth is candidate r with the share
that was counted on a recorded checkpoint; depths and cycles are independent. Deeper than the curve goes
nothing is accepted. The draft tree is the best-first tree of these probabilities, the same in every cycle.

A one-pass tree hangs below a token that its block did not know: its depth d is the block's offset d + 1,
right with probability p(d + 1) times the recorded ratio, at that offset, of the agreement of one-pass blocks
anchored one position earlier to that of whole blocks that know their root. Ranks and ratios are those of the
block's own candidates, without a bigram correction, unless `corrected`.

`Draws` are the candidates that were drawn behind every position of simulated texts. They say what a tree of
any size and a block of any length keep there: a block of k rows has k - 1 depths, its tree is the best-first
tree of these, and a tree of n nodes is its first n. All texts have the same tree, so a budget that texts
share gives each as many nodes as the others, and a batch gains nothing of it; of real texts it gains.
Nothing is known of what lookup would find, since simulated texts have no tokens: their traces lack that kind.
Everything that rests on any of this says "simulated"."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orthrus_kernels import DraftTree, choose_anchors, draft_tree
from orthrus_kernels.anchors import end_probabilities
from qwen3_model import InputError
from qwen3_model.decode import controller
from qwen3_model.decode.choice import CANDIDATES
from qwen3_model.decode.groups import Kind
from qwen3_model.decode.one_pass import NODES, Shape

from . import report
from .command import Parser, fail, run
from .trace_file import CHAIN, ONE_PASS, TREES, Text, Trace, read

# Share of cycles of a 4B checkpoint accepted at depth 1..16, as published.
CURVE = (0.87, 0.73, 0.62, 0.54, 0.45, 0.36, 0.31, 0.26, 0.22, 0.19, 0.16, 0.13, 0.11, 0.09, 0.07, 0.05)
STRETCHED_MEAN = 10.0  # tokens a cycle
COMMAND = "bench.strong"
NODES_TRIED = (7, 11, 15, 19, 23, 31, 47, 63)


def mean_of(survival: Sequence[float]) -> float:
    """Tokens a cycle of the chain: the bonus token and each depth as often as it is accepted."""
    return 1 + sum(survival)


def stretched(curve: Sequence[float], mean: float, depths: int) -> list[float]:
    """The curve pulled along depth until a cycle has `mean` tokens, at most `depths` deep; between its points
    linear, S(0) = 1. Raises InputError where no stretch does."""
    known = [1.0, *curve]

    def at(factor: float) -> list[float]:
        deep = min(int(len(curve) * factor), depths)
        return np.interp(np.arange(1, deep + 1) / factor, np.arange(len(known)), known).tolist()

    low, high = 0.01, float(depths)
    if not mean_of(at(low)) <= mean <= mean_of(at(high)):
        raise InputError(f"no stretch of the curve has {mean:g} tokens a cycle in blocks {depths} deep")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_of(at(middle)) < mean else (low, middle)
    return at(high)


@dataclass(frozen=True)
class Drafter:
    """right[d]: that the first candidate at depth d + 1 is right. shares[r]: of misses at which the truth is
    candidate r + 1 behind the first; what is left of 1, none."""

    right: list[float]
    shares: list[float]

    def probabilities(self) -> np.ndarray:
        """[P, K] of the candidates, the first ones first."""
        p = np.array(self.right)[:, None]
        return np.concatenate([p, (1 - p) * np.array(self.shares[: CANDIDATES - 1])], 1)

    def tree(self, count: int) -> DraftTree:
        """The best `count` nodes; tokens say which candidate each is, 0 the first."""
        chances = self.probabilities()
        order = np.argsort(-chances, 1, kind="stable")  # a likelier second candidate comes first
        logs = torch.from_numpy(np.log(np.maximum(np.take_along_axis(chances, order, 1), 1e-30))).float()
        return draft_tree(0, logs.clamp(max=0.0), torch.from_numpy(order), count)

    def draw(self, numbers: np.ndarray) -> list[int]:
        """Which candidate is the truth at each depth, until none is; from uniform numbers [>= P]."""
        ranks = []
        for bounds, number in zip(self.probabilities().cumsum(1), numbers, strict=False):
            rank = int(np.searchsorted(bounds, number, side="right"))
            if rank == len(bounds):
                break
            ranks.append(rank)
        return ranks


def drafters(
    recorded: Trace, survival: Sequence[float], one_pass_rows: int, corrected: bool = False
) -> tuple[Drafter, Drafter]:
    """Of whole blocks that know their root, and of one-pass blocks."""
    whole = recorded.tally(recorded.block_rows, True, corrected)
    right = [b / a for a, b in zip([1.0, *survival], survival, strict=False)]
    ratios = loss(recorded, one_pass_rows, corrected)
    depths = min(one_pass_rows - 2, len(right) - 1)
    lost = [min(right[d + 1] * ratios[min(d, len(ratios) - 1)], 1.0) for d in range(depths)]
    return Drafter(right, whole.shares()[:-1]), Drafter(lost, whole.shares()[:-1])


def loss(recorded: Trace, one_pass_rows: int, corrected: bool = False) -> list[float]:
    """By depth under the root: agreement of one-pass blocks anchored one position earlier over that of whole
    blocks that know their root, at the same offset; where either was hardly counted, the last ratio holds.
    Raises InputError where there is none."""
    whole = recorded.tally(recorded.block_rows, True, corrected).agreement()
    earlier = recorded.tally(one_pass_rows, False, corrected).agreement()
    ratios = [a / b for a, b in zip(earlier, whole[1:], strict=False) if b]
    if not ratios:
        raise InputError("the trace is too short to tell what blocks lose: record more texts")
    return ratios


@dataclass(frozen=True)
class OnePass:
    """The tree of every one-pass cycle, and which of its nodes have a block."""

    tree: DraftTree
    anchors: frozenset[int]

    @staticmethod
    def of(drafter: Drafter, shape: Shape) -> OnePass:
        """With the tree and anchors of a shape."""
        tree = drafter.tree(shape.nodes)
        return OnePass(tree, frozenset(choose_anchors(tree.parents, tree.scores, shape.anchors)))

    def expected(self) -> tuple[float, float, float]:
        """Tokens of a cycle with a draft, the share of those that end at a block, and tokens a forward: a
        cycle that ends elsewhere is followed by one that keeps one token."""
        tokens = sum(math.exp(score) for score in self.tree.scores)
        ends = end_probabilities(self.tree.parents, self.tree.scores)
        covered = sum(ends[node] for node in self.anchors)
        return tokens, covered, (tokens + 1 - covered) / (2 - covered)

    def kept(self, drawn: Sequence[Sequence[int]], nodes: dict[tuple[int, ...], int]) -> list[int]:
        """Table of a text of drawn ranks. Cycle after cycle from its begin, those without a draft keep one
        token; what other cycles would begin at has one."""
        ends = [max(d for d in range(len(ranks) + 1) if tuple(ranks[:d]) in nodes) for ranks in drawn]
        found, at, drafted = [1 + depth for depth in ends], 0, False
        while at < len(found):
            if not drafted:
                found[at], drafted = 1, True
            else:
                drafted = nodes[tuple(drawn[at][: ends[at]])] in self.anchors
            at += found[at]
        return found


@dataclass(frozen=True)
class Draws:
    """Simulated texts. numbers: uniform ones [tokens, depths] for each text, from which `Drafter.draw` takes
    the candidates behind each token."""

    recorded: Trace
    survival: Sequence[float]
    corrected: bool
    numbers: list[np.ndarray]

    @staticmethod
    def of(
        recorded: Trace, survival: Sequence[float], texts: int, tokens: int, corrected: bool = False,
        seed: int = 0,
    ) -> Draws:  # fmt: skip
        """Of so many texts and tokens. Raises InputError for a trace at a temperature."""
        if recorded.temperature > 0:
            raise InputError("ranks and losses of a greedy trace were expected, not of one at a temperature")
        rng = np.random.default_rng(seed)
        numbers = [rng.random((tokens, len(survival))) for _ in range(texts)]
        return Draws(recorded, survival, corrected, numbers)

    @cached_property
    def ranks(self) -> list[list[list[int]]]:
        """What `Drafter.draw` finds behind each token of each text, in whole blocks that know their root."""
        whole, _ = self.drafters(self.recorded.one_pass_rows)
        return [[whole.draw(row) for row in text] for text in self.numbers]

    def drafters(self, one_pass_rows: int) -> tuple[Drafter, Drafter]:
        """`drafters` of the trace and curve."""
        return drafters(self.recorded, self.survival, one_pass_rows, self.corrected)

    def walks(self, kind: Kind, block: int) -> list[list[list[int]]]:
        """The nodes that a cycle of a kind with blocks of so many rows keeps, the root among them: by text
        and by the token at its root. Of trees up to TREES[-1] nodes, whatever the kind's number; a smaller
        one keeps those below its own. Raises InputError for one-pass blocks that the trace has no tally of,
        and for lookup."""
        if kind == controller.LOOKUP:
            raise InputError("simulated texts have no tokens that lookup could find")
        if isinstance(kind, Shape):
            short, found = self.drafters(kind.block)[1], list[list[list[int]]]()
            one_pass = OnePass.of(short, kind)
            for text in self.numbers:
                kept = one_pass.kept([short.draw(row) for row in text], numbered(one_pass.tree))
                found.append([[*range(1, n), 0] for n in kept])
            return found
        if kind == controller.PLAIN:
            return [[[0]] * len(text) for text in self.numbers]
        if kind == controller.CHAIN:
            return [[list(range(min(1 + chain_of(ranks), block))) for ranks in text] for text in self.ranks]
        whole, _ = self.drafters(self.recorded.one_pass_rows)
        nodes = numbered(replace(whole, right=whole.right[: block - 1]).tree(TREES[-1]))
        return [[[0, *path_of(ranks, nodes)] for ranks in text] for text in self.ranks]


def numbered(tree: DraftTree) -> dict[tuple[int, ...], int]:
    """The number of each node by its path."""
    return {tuple(path): i for i, path in enumerate(tree.paths())}


def chain_of(ranks: Sequence[int]) -> int:
    """Proposals of a chain that are kept."""
    return next((d for d, rank in enumerate(ranks) if rank), len(ranks))


def path_of(ranks: Sequence[int], nodes: dict[tuple[int, ...], int]) -> list[int]:
    """Nodes that are kept below the root, as far as the tree goes."""
    found = [nodes.get(tuple(ranks[:d])) for d in range(1, len(ranks) + 1)]
    return [node for node in found if node is not None]


def strong(
    recorded: Trace, survival: Sequence[float], name: str, texts: int = 10, tokens: int = 256,
    shape: Shape | None = None, corrected: bool = False, seed: int = 0,
) -> Trace:  # fmt: skip
    """A simulated trace whose chain is accepted at depth d in survival[d - 1] of the cycles, with prompts as
    long as the recorded ones. shape: of one-pass cycles, that strategy's default if None."""
    draws = Draws.of(recorded, survival, texts, tokens, corrected, seed)
    shape = shape or Shape.of(recorded.one_pass_rows, NODES)
    whole, short = draws.drafters(shape.block)
    one_pass = OnePass.of(short, shape)
    large, small = numbered(whole.tree(TREES[-1])), numbered(one_pass.tree)
    made = list[Text]()
    for text, numbers in enumerate(draws.numbers):
        kept: dict[str, list[int]] = {kind: [] for kind in (CHAIN, *map(str, TREES))}
        for ranks in draws.ranks[text]:
            kept[CHAIN].append(1 + chain_of(ranks))
            path = path_of(ranks, large)
            for nodes in TREES:
                kept[str(nodes)].append(1 + sum(node <= nodes for node in path))
        kept[ONE_PASS] = one_pass.kept([short.draw(row) for row in numbers], small)
        made.append(Text(recorded.texts[text % len(recorded.texts)].prompt_tokens, kept))
    facts: dict[str, Any] = {
        "survival": [round(x, 4) for x in survival], "mean": round(mean_of(survival), 4), "seed": seed,
        "loss": [round(x, 4) for x in loss(recorded, shape.block, corrected)], "one_pass": asdict(shape),
        "miss_shares": [round(x, 4) for x in whole.shares], "corrected": corrected,
        "recorded": recorded.checkpoint, "model": " ".join(str(__doc__).split()),
    }  # fmt: skip
    said = f"simulated: {name}, ranks of misses and one-pass loss of {recorded.checkpoint}"
    return Trace(name, recorded.block_rows, shape.block, recorded.bigram, made, [], said, facts)


def curves(recorded: Trace) -> dict[str, list[float]]:
    """The published curve, and that curve stretched to STRETCHED_MEAN tokens a cycle, by name."""
    far = stretched(CURVE, STRETCHED_MEAN, recorded.block_rows - 1)
    return {
        "published 4B curve": list(CURVE),
        f"published 4B curve stretched to {STRETCHED_MEAN:g} a cycle": far,
    }


def both(recorded: Trace, texts: int, tokens: int, shape: Shape | None = None) -> list[Trace]:
    """Simulated traces of `curves`; shape: of one-pass cycles."""
    return [strong(recorded, curve, name, texts, tokens, shape) for name, curve in curves(recorded).items()]


def shapes(recorded: Trace, corrected: bool) -> tuple[str, list[str], list[list[str]]]:
    """Tokens a forward that the model expects of one-pass cycles of several shapes."""
    lines = []
    for name, curve in curves(recorded).items():
        for rows in sorted({t.rows for t in recorded.tallies}):
            _, drafter = drafters(recorded, curve, rows, corrected)
            for shape in (Shape.of(rows, nodes) for nodes in NODES_TRIED):
                tokens, covered, rate = OnePass.of(drafter, shape).expected()
                used = 1 + shape.nodes + shape.anchors * rows
                lines.append([f"simulated: {name}", *map(str, (rows, shape.nodes, shape.anchors, used)),
                              f"{tokens:.2f}", f"{covered:.2f}", f"{rate:.2f}"])  # fmt: skip
    head = ["curve", "block", "nodes", "blocks", "rows", "tokens, drafted", "covered", "tokens/forward"]
    return (
        "one-pass cycles of a strong checkpoint, " + ("" if corrected else "not ") + "corrected",
        head,
        lines,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(
        prog=f"python -m {COMMAND}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m bench.strong runs/trace.json",
    )  # fmt: skip
    parser.add_argument("trace", type=Path, metavar="TRACE", help="recorded by python -m bench.trace")
    parser.add_argument(
        "--corrected", action="store_true", help="candidates in the bigram correction's order"
    )
    given = parser.parse_args(arguments)
    try:
        recorded = read(given.trace)
        report.print_tables([shapes(recorded, given.corrected)])
    except InputError as error:
        fail(COMMAND, str(error))
    return 0


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
