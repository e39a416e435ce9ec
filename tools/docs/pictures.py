"""Draw docs/mask.svg, who sees whom in one pass of the dual-view model, docs/speed.svg, a token's time,
docs/batch.svg, the speed of many texts, and docs/serve.svg, that of a server.

The first is drawn from `visible`, the one definition of visibility, the others from recorded runs of
`bench.decode` and `bench.serve`. Each is a
function of its input: tests/test_pictures.py compares the files with what is drawn now."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.command import Parser, fail, short
from orthrus_kernels import Rows, visible
from qwen3_model.cli.output import write_atomically

from . import batch, serve
from .svg import MONO, line, picture, rect, text

COMMAND = "tools.docs.pictures"
ROOT = Path(__file__).resolve().parents[2]
MASK, SPEED, BATCH, SERVE = (ROOT / f"docs/{name}.svg" for name in ("mask", "speed", "batch", "serve"))
RUN = ROOT / "bench/results/decode-peers-h100.json"
RESULTS = ROOT / "bench/results"
BATCH_RUNS = RESULTS / "batch-8B-h200.json", RESULTS / "batch-h200.json"  # the newest first
SERVE_RUNS = RESULTS / "serve-8B-h200.json", RESULTS / "serve-1.7B-h200.json"

# The pass of the picture: a tree under `return`, whose nodes 3 and 1 have blocks of three rows.
START, SIZE, MASK_TOKEN = 3, 3, -1
WORDS = ("return", "sum", "len", "(", "[", "(")
PARENTS, ANCHORS = (-1, 0, 0, 1, 1, 2), (3, 1)
ROWS = Rows.tree_with_blocks(range(len(WORDS)), PARENTS, START, ANCHORS, SIZE, MASK_TOKEN)

CONTEXT, AR, DIFFUSION, HIDDEN = "#c8ccd2", "#2f6fb7", "#e08a1e", "#f6f7f9"
GREY, INK = "#8a929c", "#222"
CELL, LEFT, TOP = 22, 470, 92
OURS, LIBRARY, PEER, FLOOR = "#2f6fb7", "#9db9d8", "#c8ccd2", INK


def word(row: int) -> str:
    """The token of a row; the mask token is a square."""
    token = ROWS.tokens[row]
    return "▢" if token == MASK_TOKEN else WORDS[token]


def cells() -> Iterator[tuple[int, int, str]]:
    """(row, in-flight key, colour) of the grid, from `visible`."""
    for i, seen in enumerate(visible(ROWS).tolist()):
        for j, is_seen in enumerate(seen):
            yield i, j, HIDDEN if not is_seen else AR if ROWS.blocks[j] < 0 else DIFFUSION


def mask() -> str:
    """The tree and its blocks on the left, the pass row by row on the right."""
    n, right = len(ROWS), LEFT + START * CELL
    parts = [
        text(24, 32, "One pass holds a draft tree to verify and the blocks that draft the next one", 17,
             font_weight="bold"),
        text(24, 54, "blue: rows of the AR view     orange: rows of the diffusion view, "
             "which see their whole block and keep no keys", 12, GREY),
        *_tree(),
        text(LEFT, TOP - 8, "context", 11, GREY),
    ]  # fmt: skip
    for j in range(n):
        parts.append(text(right + (j + 0.5) * CELL, TOP - 8, word(j), 11, _colour(j), MONO,
                          transform=f"rotate(-40 {right + (j + 0.5) * CELL:g} {TOP - 8})"))  # fmt: skip
    for i in range(n):
        y = TOP + i * CELL
        parts.append(text(LEFT - 8, y + 15, f"{word(i)}  at {ROWS.positions[i]}", 11, _colour(i), MONO,
                          text_anchor="end"))  # fmt: skip
        parts += [_cell(LEFT + c * CELL, y, CONTEXT) for c in range(START)]
    for i, j, colour in cells():
        parts.append(_cell(right + j * CELL, TOP + i * CELL, colour, data_row=str(i), data_key=str(j)))
    bottom = TOP + n * CELL
    parts.append(text(LEFT, bottom + 22, "a line: a row that asks; a column: a key it may see", 11, GREY))
    said = "A grid: which row sees which key; tree nodes their ancestors, blocks what is above their anchor"
    return picture(right + n * CELL + 40, bottom + 40, parts, said)


def _cell(x: float, y: float, fill: str, **data: str) -> str:
    return rect(x, y, CELL - 2, CELL - 2, fill, rx="3", **data)


def _colour(row: int) -> str:
    return AR if ROWS.blocks[row] < 0 else DIFFUSION


def _tree() -> Iterator[str]:
    """Nodes by depth to the right, each block beside its anchor."""
    heights = {0: 200, 1: 140, 2: 280, 3: 120, 4: 200, 5: 280}
    at = {i: (30 + 90 * (ROWS.positions[i] - START), heights[i]) for i in range(len(WORDS))}
    for i, parent in enumerate(PARENTS):
        if parent >= 0:
            yield line(at[parent][0] + 58, at[parent][1], at[i][0], at[i][1], GREY)
    for b, anchor in enumerate(ANCHORS):
        x, y = at[anchor]
        for r in range(SIZE):
            row = len(WORDS) + b * SIZE + r
            yield rect(x + 22 * r, y - 40, 20, 18, DIFFUSION, rx="3", fill_opacity="0.25", stroke=DIFFUSION)
            yield text(x + 22 * r + 10, y - 27, word(row), 8, INK, MONO, text_anchor="middle")  # fmt: skip
    for i, (x, y) in at.items():
        yield rect(x, y - 14, 58, 28, "white", rx="6", stroke=AR, stroke_width="1.5")
        yield text(x + 29, y + 4, WORDS[i], 12, INK, MONO, text_anchor="middle")
    for y, words in (
        (332, "The target walks the tree and commits what it agrees with."),
        (350, "The block where it stops has drafted the next tree."),
    ):
        yield text(30, y, words, 12, INK)


def speed(run: dict[str, Any]) -> str:
    """Milliseconds a token of plain decoding, beside the peers of the same run and the time of reading the
    bytes."""
    machine = run["machine"]
    theirs = {p["model"]: p["us"]["median"] / 1e3 for p in run["peers"]}
    (peer,) = {p["peer"] for p in run["peers"]}
    context = min(p["context"] for p in run["passes"])
    tokens = [p for p in run["passes"] if (p["pass"], p["context"]) == ("token", context)]
    tokens.sort(key=lambda p: -p["us"]["median"])
    scale = 460 / max(theirs.values())
    parts = [
        text(24, 32, "Milliseconds a token, plain decoding, Qwen3 shapes with random weights", 17,
             font_weight="bold"),
        text(24, 54, f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, bf16, "
             f"context {context}, {machine['date']}, one run", 12, GREY),
    ]  # fmt: skip
    y = 76.0
    for p in tokens:
        ours, library = p["us"]["median"] / 1e3, p["peers_us"]["cuBLAS + SDPA"]["median"] / 1e3
        parts.append(text(24, y + 34, p["model"], 15, font_weight="bold"))
        bars = (("ours", ours, OURS), ("cuBLAS + SDPA", library, LIBRARY),
                (peer, theirs[p["model"]], PEER))  # fmt: skip
        for k, (name, ms, fill) in enumerate(bars):
            at = y + 18 * k
            over = "" if name == "ours" else f"  {ms / ours:.2f}x"
            parts.append(rect(90, at, ms * scale, 15, fill, data_ms=f"{ms:.3f}", data_model=p["model"]))
            parts.append(text(96 + ms * scale, at + 12, f"{ms:.2f}{over}  {name}", 11))
        x = 90 + p["floor_ms"] * scale
        parts.append(line(x, y - 3, x, y + 54, FLOOR, stroke_width="1.5", stroke_dasharray="4 2"))
        y += 74
    parts.append(
        text(90, y + 4, "dashed: the time of reading the step's bytes at the measured bandwidth", 11, GREY)
    )
    return picture(880, y + 24, parts, "Bars of milliseconds a token for four model sizes beside their peers")


def drawn() -> dict[Path, str]:
    """Every picture. Raises OSError, and LookupError, TypeError or ValueError for a run that is none."""
    return {MASK: mask(), SPEED: speed(json.loads(RUN.read_text())), BATCH: batch.drawn(read(BATCH_RUNS)),
            SERVE: serve.drawn(read(SERVE_RUNS))}  # fmt: skip


def read(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Recorded runs. Raises OSError and ValueError."""
    return [json.loads(run.read_text()) for run in runs]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description=" ".join(str(__doc__).split("\n\n")[0].split()),
        epilog="example: make pictures",
    )
    parser.parse_args(arguments)
    try:
        for path, svg in drawn().items():
            write_atomically(path, svg)
            print(f"wrote {path.relative_to(ROOT)}")
    except (OSError, LookupError, TypeError, ValueError) as error:
        runs = ", ".join(f"{RESULTS.name}/{run.name}" for run in (RUN, *BATCH_RUNS, *SERVE_RUNS))
        fail(COMMAND, f"{short(error)}: {runs} have to be whole runs of bench.decode and bench.serve --json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
