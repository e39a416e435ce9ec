"""docs/batch.svg, tokens a second by number of texts, and the section of docs/performance.md on many texts,
both made from recorded runs of `bench.decode --batch`, the newest first: a model at a context is shown as the
first run with it has it."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

from bench.batch_report import PLAIN, over_plain, percent

from .svg import line, picture, rect, text

WIDTH, HEIGHT = 400, 300  # of a panel, its axes inside
LEFT, TOP, BETWEEN, COLUMNS = 70, 104, 90, 2
GREY, GRID = "#8a929c", "#e6e8eb"
FLOOR, OURS, DRAFTED, VLLM = "floor of plain", "plain", "drafted, simulated", "vLLM"
COLOURS = {FLOOR: "#222", OURS: "#2f6fb7", DRAFTED: "#e08a1e", VLLM: "#8a929c"}
Found = dict[str, Any]
Points = dict[str, dict[int, float]]  # tokens/s of each line by number of texts
Key = TypeVar("Key")  # of a panel


def panels(run: Found) -> dict[tuple[str, int], Points]:
    """The lines of each model and context. Raises ValueError for a run without one."""
    found: dict[tuple[str, int], Points] = {}
    for row in run["rows"]:
        if row["measure"] != "steady":
            continue
        points = found.setdefault((row["model"], row["context"]), {name: {} for name in COLOURS})
        texts, plain = row["texts"], row["way"] == PLAIN
        points[OURS if plain else DRAFTED][texts] = row["tokens_per_second"]
        if plain:
            points[FLOOR][texts] = 1e3 * texts / row["floor_ms"]
    for row in run["peers"]:
        if (row["model"], row.get("context")) in found:
            found[row["model"], row["context"]][VLLM][row["texts"]] = row["tokens_per_second"]
    if not found:
        raise ValueError("no steady rows")
    return found


def drawn(runs: Sequence[Found]) -> str:
    """The picture: a panel a model and context, both axes logarithmic."""
    found = first_of(runs, panels)
    parts = [
        text(24, 32, "Tokens a second of all texts together, by number of texts", 17, font_weight="bold"),
        text(24, 54, f"Qwen3 shapes, random weights, bf16; {where(runs)}; "
             "acceptance of drafts: simulated from a published curve", 12, GREY),
    ]  # fmt: skip
    parts += legend(COLOURS, found.values())
    for i, ((model, context), points) in enumerate(found.items()):
        down, across = divmod(i, COLUMNS)
        place = LEFT + across * (WIDTH + BETWEEN), TOP + down * (HEIGHT + BETWEEN)
        parts += panel(*place, f"{model}, context {context}", points, COLOURS, "texts at once")
    width, lines = LEFT + min(len(found), COLUMNS) * (WIDTH + BETWEEN), -(-len(found) // COLUMNS)
    said = "Lines of tokens a second over the number of texts: floor, plain, drafted and vLLM"
    return picture(max(width, 760), TOP + lines * (HEIGHT + BETWEEN) - 30, parts, said)


def first_of(runs: Sequence[Found], panels: Callable[[Found], dict[Key, Points]]) -> dict[Key, Points]:
    """The panels of all runs; one that several have is that of the first."""
    found = dict[Key, Points]()
    for run in runs:
        found = panels(run) | found
    return found


def where(runs: Sequence[Found]) -> str:
    """The machines and days of runs, for the line under a picture's title."""
    days = dict.fromkeys(f"{run['machine']['gpu'] or 'a CPU'}, {run['machine']['date']}" for run in runs)
    return f"{'; '.join(days)}, {'one run' if len(runs) == 1 else f'{len(runs)} runs'}"


def legend(colours: dict[str, str], drawn: Collection[Points]) -> Iterator[str]:
    """The colour of each line that one of the panels has."""
    x = 24.0
    for name, colour in colours.items():
        if any(points[name] for points in drawn):
            yield from (rect(x, 68, 14, 10, colour), text(x + 20, 78, name, 12))
            x += 44 + 7 * len(name)


def panel(
    left: float, top: float, title: str, points: Points, colours: dict[str, str], across_says: str
) -> Iterator[str]:
    """Lines over a number of texts, both axes logarithmic. points: of at least one line, above 0. colours: of
    the lines by name."""
    texts = sorted({count for of_line in points.values() for count in of_line})
    rates = [rate for of_line in points.values() for rate in of_line.values()]
    low, high = math.log(min(rates) / 1.2), math.log(max(rates) * 1.2)
    wide = math.log(texts[-1] / texts[0]) or 1.0

    def across(count: int) -> float:
        return left + WIDTH * math.log(count / texts[0]) / wide

    def up(rate: float) -> float:
        return top + 20 + (HEIGHT - 20) * (high - math.log(rate)) / (high - low)

    yield text(left, top + 8, title, 14, font_weight="bold")
    for tick in (unit * 10**power for power in range(7) for unit in (1, 2, 5)):
        if low <= math.log(tick) <= high:
            yield line(left, up(tick), left + WIDTH, up(tick), GRID)
            yield text(left - 8, up(tick) + 4, f"{tick:,}", 11, GREY, text_anchor="end")
    for count in texts:
        yield text(across(count), top + HEIGHT + 20, str(count), 11, GREY, text_anchor="middle")
    yield text(left + WIDTH / 2, top + HEIGHT + 40, across_says, 11, GREY, text_anchor="middle")
    for name, of_line in points.items():
        ends = sorted(of_line.items())
        dashed = {"stroke_dasharray": "5 3"} if name == FLOOR else {}
        for (a, first), (b, last) in zip(ends, ends[1:], strict=False):
            yield line(across(a), up(first), across(b), up(last), colours[name], stroke_width="2", **dashed)
        for count, rate in ends:
            yield rect(across(count) - 3, up(rate) - 3, 6, 6, colours[name], data_line=name,
                       data_texts=str(count), data_rate=f"{rate:.1f}")  # fmt: skip


def section(runs: Sequence[Found], markdown: Any) -> str:
    """The section of the page, heading included. markdown: makes a table of head and lines."""
    parts = ["## Many texts at once", _words(), "![tokens a second by number of texts](batch.svg)"]
    shown = set[Any]()
    for run in runs:
        parts += [_said(run), *_tables(run, shown, markdown)]
    return "\n\n".join(parts)


def _tables(run: Found, shown: set[Any], markdown: Any) -> Iterator[str]:
    """Those of a run. shown: models and contexts that a newer run has; this run's are added."""
    for of in [of for of in panels(run) if of not in shown]:
        model, context = of
        shown.add(of)
        rows, peers = ([r for r in run[name] if (r["model"], r.get("context")) == of]
                       for name in ("rows", "peers"))  # fmt: skip
        theirs = {r["texts"]: r["tokens_per_second"] for r in peers}
        yield from (f"**{model}, context {context}**", _table(rows, theirs, markdown))
    own = [r for r in run["rows"] if r["model"] == "embedded"]
    if own and "embedded" not in shown:
        shown.add("embedded")
        lines = [
            [str(r["texts"]), r["way"], f"{r['tokens_per_second']:,.0f}", over_plain(r, own), r["identical"]]
            for r in own
        ]
        yield (
            f"**The embedded checkpoint**, its own acceptance: {own[0]['jobs']} held-out prompts, which are "
            "read inside the clock"
        )
        yield markdown(["texts", "way", "tokens/s", "over plain", "identical"], lines)


def _said(run: Found) -> str:
    """Where and how a run was measured."""
    m, peers = run["machine"], ", ".join(sorted({r["peer"] for r in run["peers"]})) or "vLLM not installed"
    said = (
        f"{m['gpu']}, torch {m['torch']}, triton {m['triton']}, {peers}, {m['date']}, commit {m['commit']}, "
        f"read roof {run['roof']['read_gb_s']:.0f} GB/s: `{command(run)}`."
    )
    return textwrap.fill(said, 140)


def command(run: Found) -> str:
    """How a run was started, without where its files went."""
    return re.sub(r" --(?:json|plot) \S+", "", run["machine"]["command"])


def _words() -> str:
    """What the tables' words mean."""
    sentences = [
        "`make bench-batch` measures it. Tokens/s are of all texts together, while all of them run.",
        "The floor is the time of reading once the weights of a plain cycle and the keys of all texts.",
        '"Drafted" is strategy "auto" with an acceptance simulated from a published curve',
        "(`bench/strong.py`).",
    ]
    return textwrap.fill(" ".join(sentences), 140)


def _table(rows: Sequence[Found], theirs: dict[int, float], markdown: Any) -> str:
    head = ["texts", "floor", "plain", "of floor", "drafted, simulated", "over plain",
            "tokens a cycle and text", "host", *(["vLLM"] if theirs else [])]  # fmt: skip
    lines, of = [], {(r["texts"], r["way"] == PLAIN): r for r in rows}
    for texts in sorted({r["texts"] for r in rows}):
        plain, drafted = of.get((texts, True)), of.get((texts, False))
        lines.append([
            str(texts),
            *([f"{1e3 * texts / plain['floor_ms']:,.0f}", f"{plain['tokens_per_second']:,.0f}",
               f"{plain['share_of_floor']:.0%}"] if plain else ["-"] * 3),
            *([f"{drafted['tokens_per_second']:,.0f}", over_plain(drafted, rows),
               f"{drafted['tokens_per_cycle']:.2f}"] if drafted else ["-"] * 3),
            percent(plain["host_share"]) if plain else "-",
            *([f"{theirs[texts]:,.0f}" if texts in theirs else "-"] if theirs else []),
        ])  # fmt: skip
    return str(markdown(head, lines))
