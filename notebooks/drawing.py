"""Pictures that several notebooks draw: who sees whom in a pass, and a draft tree."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from torch import Tensor

from orthrus_kernels import Rows, visible

HIDDEN, CONTEXT, AR, DIFFUSION, WRONG = range(5)  # kinds of cells
COLOURS = ["white", "lightgrey", "tab:blue", "tab:orange", "tab:red"]
ACCEPTED = "tab:green"


def draw_pass(axes: Axes, rows: Rows, seen: Tensor | None = None) -> None:
    """A pass as a grid: a line a row that asks, a column a key, the committed context of each sequence first.

    seen: bool [T, T], by default `visible(rows)`; red where it differs from that."""
    right = visible(rows)
    seen = right if seen is None else seen
    columns = [(s, p) for s, context in rows.contexts.items() for p in range(context)]
    cells = [
        [CONTEXT if s == rows.sequences[i] else HIDDEN for s, _ in columns]
        + [_kind(rows, j, bool(seen[i, j]), bool(right[i, j])) for j in range(len(rows))]
        for i in range(len(rows))
    ]
    axes.imshow(cells, cmap=ListedColormap(COLOURS), vmin=HIDDEN, vmax=WRONG, aspect="auto")
    axes.set_xticks([x - 0.5 for x in range(len(columns) + len(rows) + 1)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(len(rows) + 1)], minor=True)
    axes.grid(which="minor", color="grey", linewidth=0.5)
    axes.tick_params(which="both", length=0, labelsize=8)
    names = row_names(rows)
    axes.set_xticks(range(len(columns) + len(rows)), [str(p) for _, p in columns] + names, rotation=90)
    axes.set_yticks(range(len(rows)), [f"{n} at {p}" for n, p in zip(names, rows.positions, strict=True)])


def _kind(rows: Rows, key: int, seen: bool, right: bool) -> int:
    if seen != right:
        return WRONG
    if not seen:
        return HIDDEN
    return AR if rows.blocks[key] < 0 else DIFFUSION


def row_names(rows: Rows) -> list[str]:
    """n3: AR row 3; b1.0: the first row of block 1."""
    names = []
    for i, block in enumerate(rows.blocks):
        names.append(f"n{i}" if block < 0 else f"b{block}.{i - rows.blocks.index(block)}")
    return names


def draw_tree(axes: Axes, parents: Sequence[int], labels: Sequence[str], path: Sequence[int] = ()) -> None:
    """A draft tree from left to right, parents before their children; the nodes of `path` in green."""
    places = _places(parents)
    for i, parent in enumerate(parents):
        kept = i in path
        if parent >= 0:
            ends = zip(places[parent], places[i], strict=True)
            axes.plot(*ends, color=ACCEPTED if kept else "grey", linewidth=2 if kept else 0.8, zorder=1)
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": ACCEPTED if kept else "grey"}
        axes.text(*places[i], labels[i], ha="center", va="center", fontsize=8, bbox=box, parse_math=False)
    axes.margins(0.1, 0.15)
    axes.invert_yaxis()
    axes.set_axis_off()


def _places(parents: Sequence[int]) -> list[tuple[float, float]]:
    """(depth, line) of every node: leaves on lines of their own, a parent in the middle of its children."""
    children: dict[int, list[int]] = {}
    for i, parent in enumerate(parents):
        children.setdefault(parent, []).append(i)
    places = [(0.0, 0.0)] * len(parents)
    lines = iter(range(len(parents)))

    def place(node: int, depth: int) -> float:
        below = [place(child, depth + 1) for child in children.get(node, [])]
        line = (below[0] + below[-1]) / 2 if below else float(next(lines))
        places[node] = float(depth), line
        return line

    for root in children[-1]:
        place(root, 0)
    return places
