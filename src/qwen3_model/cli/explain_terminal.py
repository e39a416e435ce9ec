"""The story of a generation in the terminal: the trunk of a draft is what the target walked, its branches
are what it left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text as Line

from ..explain import count_of
from ..text import on_one_line
from .terminal import new_console

if TYPE_CHECKING:
    from ..explain import Cycle
    from ..text import Text

KEPT, OWN, LEFT, QUIET = "bold green", "bold yellow", "red", "dim"
BRANCHES = 3  # shown at a node; the page shows all
LEGEND = (
    "✓ proposed and kept   ✗ proposed and left   → the target's own choice",
    "%: the draft's own estimate   · a space   ↵ the end of a line",
)


class StoryWriter:
    """Prints each cycle as it comes, no line wider than the terminal: drafts and texts are cut."""

    def __init__(self, text: Text, prompt: str) -> None:
        self._console, self._text, self._before = new_console(), text, prompt
        self._number = 0

    def __call__(self, cycle: Cycle) -> None:
        """Print a cycle, before the first one what the signs mean."""
        if self._number == 0:
            for line in LEGEND:
                self._console.print(line, style=QUIET, overflow="fold")
        title = f"cycle {self._number}" if self._number else "prompt"
        facts = [cycle.kind] * (self._number > 0) + [cycle.passes, cycle.outcome]
        end = "■ the text ends here" if cycle.bonus is None else f"→ {self._text.label(cycle.bonus)}"
        heading = Line.assemble("\n", (f"{title:10}", "bold"), ", ".join(facts))
        self._console.print(heading, overflow="fold")
        self._print([
            *self._walk(cycle),
            Line(f"  {end}", OWN),
            self._so_far(cycle.text),
        ])  # fmt: skip
        self._before += cycle.text
        self._number += 1

    def _print(self, lines: list[Line]) -> None:
        for line in lines:
            line.truncate(self._console.width, overflow="ellipsis")
            self._console.print(line, soft_wrap=True)

    def _walk(self, cycle: Cycle) -> list[Line]:
        """A line for the tokens kept between two nodes with branches, and some branches of each such node."""
        if cycle.run.tree is None:
            return []
        children, lines, trunk = cycle.children(), [], Line()
        for node, following in zip(cycle.path, [*cycle.path[1:], -1], strict=True):
            if node == 0:
                trunk = Line(f"  ● {self._node(cycle, 0)}", QUIET)
            elif not trunk:
                trunk = Line(f"  ✓ {self._node(cycle, node)}", KEPT)
            else:
                trunk.append(f"  {self._node(cycle, node)}", KEPT)
            left = [child for child in children[node] if child != following]
            if following < 0 and cycle.bonus is None:
                left = []  # nobody looked
            if left or node == 0:
                lines += [trunk, *self._branches(cycle, children, left)]
                trunk = Line()
        return [*lines, trunk] if trunk else lines

    def _branches(self, cycle: Cycle, children: list[list[int]], left: list[int]) -> list[Line]:
        lines = []
        for node in left[:BRANCHES]:
            line = Line(f"  ├ ✗ {self._node(cycle, node)}", LEFT)
            while children[node]:
                node = children[node][0]
                line.append(f"  {self._node(cycle, node)}", QUIET)
            lines.append(line)
        rest = left[BRANCHES:]
        if rest:
            lines.append(Line(f"  ├ … {count_of(len(rest), 'more branch', 'es')}", QUIET))
        return lines

    def _node(self, cycle: Cycle, node: int) -> str:
        assert cycle.run.tree is not None
        label = self._text.label(cycle.run.tree.tokens[node])
        return f"{label} {cycle.chance(node):.0%}" if node else label

    def _so_far(self, new: str) -> Line:
        """The end of the text, what is new of it in colour."""
        before, new, room = (
            on_one_line(self._before[-self._console.width :]),
            on_one_line(new),
            self._console.width,
        )
        cut = len(before) < len(self._before)
        while before and cell_len(before) + cell_len(new) > room - 4:
            before, cut = before[1:], True
        return Line.assemble("  ", ("…" * cut + before, QUIET), (new, KEPT))
