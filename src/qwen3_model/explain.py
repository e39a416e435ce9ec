"""What each cycle of a generation did: passes, draft, the target's choices and what was kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import exp
from typing import TYPE_CHECKING, Any

from .decode.sequence import Run

if TYPE_CHECKING:
    from .decode.sequence import Result
    from .qwen3 import Qwen3
    from .text import Text


def count_of(count: int, noun: str, ending: str = "s") -> str:
    """A number and its noun: "1 node", "2 nodes"."""
    return f"{count} {noun}{ending * (count != 1)}"


@dataclass
class Cycle:
    """One cycle, whatever the strategy; the first is the prompt's pass. Read from its run alone."""

    run: Run
    kept: int  # of the run's tokens, fewer when one of them ended the text
    text: str = ""  # that became certain with it

    @property
    def rows(self) -> list[int]:
        """Rows of each forward pass."""
        return list(self.run.rows)

    @property
    def tokens(self) -> list[int]:
        """Kept tokens: accepted proposals, then the target's own choice, unless the text ended before it."""
        return self.run.tokens[: self.kept]

    @property
    def path(self) -> list[int]:
        """Nodes of the tree whose tokens were kept, the root first. A walk ends where the text does, with a
        choice that a node may have proposed."""
        path, tree = list(self.run.path)[: self.kept + 1], self.run.tree
        if tree is not None and len(path) == self.kept:
            path += [node for node in self.children()[path[-1]] if tree.tokens[node] == self.tokens[-1]][:1]
        return path

    @property
    def bonus(self) -> int | None:
        """The target's choice where the walk left the tree; None when the text ended before it."""
        return self.tokens[-1] if len(self.path) == self.kept else None

    @property
    def kind(self) -> str:
        """What was verified, in words."""
        tree = self.run.tree
        if tree is None or len(tree) == 1:
            return "no draft"
        shape = "chain" if tree.parents == list(range(-1, len(tree) - 1)) else "tree"
        return f"{shape} of {count_of(len(tree) - 1, 'node')}"

    @property
    def passes(self) -> str:
        """Passes and their rows, in words. Where one pass holds more rows than the tree has nodes, the others
        are blocks that draft the next one."""
        *others, last = self.rows
        rows = " + ".join([*map(str, others), count_of(last, "row")])
        said = f"{count_of(len(self.rows), 'pass', 'es')} of {rows}"
        tree = self.run.tree
        drafting = last - len(tree) if tree is not None and not others else 0
        return f"{said}, {drafting} of them drafting" if drafting > 0 else said

    @property
    def outcome(self) -> str:
        """What was kept, in words."""
        own = int(self.bonus is not None)
        return f"kept {self.kept - own} proposed + {own} own"

    def children(self) -> list[list[int]]:
        """The children of each node of the tree, in its order."""
        found: list[list[int]] = [[] for _ in self.run.tree.parents] if self.run.tree else []
        if self.run.tree:
            for node, parent in enumerate(self.run.tree.parents[1:], 1):
                found[parent].append(node)
        return found

    def chance(self, node: int) -> float:
        """The drafter's probability of a node behind its parent; given the noise, when sampling."""
        tree = self.run.tree
        if tree is None or node == 0:
            return 1.0
        return min(exp(tree.scores[node] - tree.scores[tree.parents[node]]), 1.0)

    def to_dict(self, text: Text) -> dict[str, Any]:
        """All of it, ready for JSON. nodes: of the tree, its root first; logprob: the drafter's, of the path
        from the root; choice: the target's token after the node, None where it is not known."""
        tree, nodes = self.run.tree, []
        if tree is not None:
            facts = zip_longest(tree.tokens, tree.parents, tree.scores, self.run.choices)
            names = "token", "text", "parent", "logprob", "choice"
            nodes = [dict(zip(names, (f[0], text.decode(f[:1]), *f[1:]), strict=True)) for f in facts]
        return {
            "kind": self.kind, "rows": self.rows, "nodes": nodes, "path": self.path if tree else [],
            "bonus": self.bonus, "tokens": self.tokens, "logprobs": self.run.logprobs[: self.kept],
            "text": self.text,
        }  # fmt: skip


def explain(
    model: Qwen3,
    prompt_ids: Sequence[int],
    on_cycle: Callable[[Cycle], None] | None = None,
    **settings: Any,
) -> tuple[Result, list[Cycle]]:
    """Generate, and tell every cycle. settings: those of `generate` but its callbacks. on_cycle: called with
    each cycle as it comes. Raises InputError as `generate` does."""
    cycles: list[Cycle] = []

    def on_tokens(tokens: list[int], text: str) -> None:
        cycles[-1].text = text
        if on_cycle is not None:
            on_cycle(cycles[-1])

    result = model.generate(
        prompt_ids, on_run=lambda run, kept: cycles.append(Cycle(run, kept)), on_tokens=on_tokens, **settings
    )
    return result, cycles
