"""The story of a generation as one page: every tree drawn as SVG, no scripts, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.cells import cell_len

if TYPE_CHECKING:
    from ..decode.sequence import Result
    from ..explain import Cycle
    from ..text import Text

# px, of 13 px monospace
CHARACTER, PADDING, LINE, BOX, GAP, MARGIN = 7.9, 8, 32, 24, 22, 6
LONGEST_LABEL = 24  # characters
SHOWN_BEFORE = 300  # characters of the text that a cycle shows before its own


@dataclass
class Box:
    """A node as drawn, its top left corner at (x, y)."""

    x: float
    y: float
    width: float
    label: str
    title: str
    kind: str  # root, kept, own or left
    edge: str  # SVG path from its parent; none at the root


@dataclass
class Drawing:
    """A tree as drawn."""

    boxes: list[Box]
    width: float
    height: float


def page(text: Text, prompt: str, result: Result, cycles: Sequence[Cycle], where: str) -> str:
    """The page. where: model, dtype and device, in words. Control characters are shown as pictures."""
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = visible
    stories, before = [], prompt
    for cycle in cycles:
        stories.append((cycle, before[-SHOWN_BEFORE:], len(before) > SHOWN_BEFORE, draw(cycle, text)))
        before += cycle.text
    return environment.get_template("explain.html.jinja").render(
        prompt=prompt, stats=result.stats, stories=stories, where=where, label=text.label, box=BOX
    )


def visible(text: str) -> str:
    """Text with control characters as pictures, but for tabs and line ends; HTML takes no others."""
    return "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\t\n" else c for c in text)


def draw(cycle: Cycle, text: Text) -> Drawing | None:
    """Lay a cycle's tree out from left to right: a column a depth, what was kept straight along the top, the
    target's own choice behind it. None without a tree."""
    tree = cycle.run.tree
    if tree is None:
        return None
    path, own = cycle.path, len(tree)
    trunk = path if cycle.bonus is None else [*path, own]
    children = [*cycle.children(), []]
    for node, following in zip(trunk, trunk[1:], strict=False):
        children[node] = [following, *(child for child in children[node] if child != following)]
    parents, depths = [*tree.parents, path[-1]], [*tree.depths, len(path)]
    labels = [_label(cycle, node, text) for node in range(max(own, trunk[-1] + 1))]
    widths = [CHARACTER * cell_len(label) + 2 * PADDING for label in labels]
    columns = _columns(widths, depths)
    boxes: dict[int, Box] = {}
    waiting, line = [0], 0
    while waiting:
        node = waiting.pop()
        parent = boxes.get(parents[node])
        x, y = columns[depths[node]], float(MARGIN + LINE * line)
        kind = "root" if node == 0 else "own" if node == own else "kept" if node in path else "left"
        edge = _edge(parent, x, y) if parent else ""
        boxes[node] = Box(x, y, widths[node], labels[node], _title(cycle, node, text), kind, edge)
        line += not children[node]  # a first child stands on its parent's line
        waiting += reversed(children[node])
    right = max(box.x + box.width for box in boxes.values())
    return Drawing(list(boxes.values()), right + MARGIN, LINE * line + MARGIN)


def _edge(parent: Box, x: float, y: float) -> str:
    """From the middle of the parent's right side to that of a child's left side."""
    begin = parent.x + parent.width
    return f"M{begin:.1f} {parent.y + BOX / 2:.1f}H{x - GAP / 2:.1f}V{y + BOX / 2:.1f}H{x:.1f}"


def _columns(widths: Sequence[float], depths: Sequence[int]) -> list[float]:
    """Where each depth begins."""
    widest = [0.0] * (max(depths) + 1)
    for width, depth in zip(widths, depths, strict=False):
        widest[depth] = max(widest[depth], width)
    columns = [float(MARGIN)]
    for width in widest[:-1]:
        columns.append(columns[-1] + width + GAP)
    return columns


def _label(cycle: Cycle, node: int, text: Text) -> str:
    """Token and the draft's estimate."""
    tree = cycle.run.tree
    assert tree is not None
    if node == len(tree):
        return f"→ {_short(text.label(cycle.run.tokens[-1]))}"
    label = _short(text.label(tree.tokens[node]))
    return f"{label} {cycle.chance(node):.0%}" if node else label


def _short(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


def _title(cycle: Cycle, node: int, text: Text) -> str:
    """What a pointer over a node tells."""
    if cycle.run.tree is None or node == len(cycle.run.tree):
        return "the target's own choice"
    asked = node < len(cycle.run.choices)
    return f"the target's choice after it: {text.label(cycle.run.choices[node])}" if asked else ""
