"""docs/serve.svg, tokens a second and time to the first token by number of clients, and the section of
docs/performance.md on the server, both made from recorded runs of `bench.serve`, the newest first: a
picture's panel is that of the first run with its model."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from bench import serve_report
from bench.serve_report import PLAIN, RATE

from .batch import BETWEEN, GREY, HEIGHT, LEFT, TOP, WIDTH, Points, command, first_of, legend, panel, where
from .svg import picture, text

OURS, DRAFTED, VLLM = "plain", "drafted", "vLLM without HTTP"
COLOURS = {OURS: "#2f6fb7", DRAFTED: "#e08a1e", VLLM: "#8a929c"}
LINES = {PLAIN: OURS, "drafted": DRAFTED, serve_report.VLLM: VLLM}  # of a row's way
# Of the bench's tables: what the page leaves to the recorded run
LEFT_OUT = "acceptance", "requests", "steady s", "engine alone", "identical", "errors", "client core"
Found = dict[str, Any]


def panels(run: Found) -> dict[tuple[str, str], Points]:
    """The lines of each model that has a rate: tokens/s and, where requests were counted, time to the first
    token. Raises ValueError for a run without one."""
    found: dict[tuple[str, str], Points] = {}
    for row in (*run["rows"], *run["peers"]):
        if row["loop"] != "closed" or not row[RATE]:
            continue
        values = {"tokens a second": row[RATE]}
        if row["ttft_ms"]:
            values["ms to the first token, p50"] = row["ttft_ms"]["p50"]
        for what, value in values.items():
            points = found.setdefault((row["model"], what), {name: {} for name in COLOURS})
            points[LINES[row["way"]]][row["clients"]] = value
    if not found:
        raise ValueError("no rows of closed loops")
    return found


def drawn(runs: Sequence[Found]) -> str:
    """The picture: a line of panels a model, all axes logarithmic."""
    found = first_of(runs, panels)
    parts = [
        text(24, 32, "orthrus serve as its clients see it, by number of clients", 17, font_weight="bold"),
        text(24, 54, f"{where(runs)}, over HTTP, streamed; 8B and "
             "the like: random weights, acceptance of drafts simulated", 12, GREY),
    ]  # fmt: skip
    parts += legend(COLOURS, found.values())
    models = list(dict.fromkeys(model for model, _ in found))
    for (model, what), points in found.items():
        across, down = 0 if what == "tokens a second" else 1, models.index(model)
        place = LEFT + across * (WIDTH + BETWEEN), TOP + down * (HEIGHT + BETWEEN)
        parts += panel(*place, f"{model}, {what}", points, COLOURS, "clients")
    said = "Lines of tokens a second and of time to the first token over the number of clients"
    return picture(LEFT + 2 * (WIDTH + BETWEEN), TOP + len(models) * (HEIGHT + BETWEEN) - 30, parts, said)


def section(runs: Sequence[Found], markdown: Any) -> str:
    """The section of the page, heading included. markdown: makes a table of head and lines."""
    parts = ["## Served over HTTP", _words(), "![by number of clients](serve.svg)"]
    for run in runs:
        parts += [_said(run), *_tables(run, markdown)]
    return "\n\n".join(parts)


def _tables(run: Found, markdown: Any) -> Iterator[str]:
    for title, head, lines in serve_report.tables(run["rows"], run["peers"]):
        kept = [i for i, name in enumerate(head) if name not in LEFT_OUT]
        cut, *cells = ([line[i] for i in kept] for line in [head, *lines])
        yield from (f"**{title}**", markdown(cut, cells))


def _said(run: Found) -> str:
    """What a run asked for, and where it was measured."""
    m, s = run["machine"], run["settings"]
    peers = ", ".join(sorted({row["peer"] for row in run["peers"]})) or "vLLM not installed"
    asked = (f"texts of {s['lengths']}" if s["lengths"]
             else f"prompts of {s['prompt_tokens']:,} tokens and texts of {s['new_tokens']:,}")  # fmt: skip
    said = (
        f"{m['gpu'] or 'a CPU'}, torch {m['torch']}, triton {m['triton']}, {peers}, {m['date']}, commit "
        f"{m['commit']}: `{command(run)}`, {asked}; the embedded checkpoint's prompts are held-out ones, no "
        f"longer than that. Goodput is the share of requests with a TTFT of at most {s['ttft_ms']} ms and at "
        f"most {s['token_ms']} ms a token."
    )
    return textwrap.fill(said, 140)


def _words() -> str:
    """What the tables' words mean."""
    sentences = [
        "`make bench-serve` measures it.",
        "Requests are streamed completions over HTTP. Every text runs to its full length, and no prompt is",
        "found in the cache.",
        "TTFT is the time from sending a request to its first text, ms/token the time from there to the end",
        "over the other tokens.",
        "Tokens/s of a closed loop are those of its steady part: whole turns of a client, from the end of",
        "every client's first request until the first client has nothing more to send.",
        "Latencies and goodput are of the requests that ended in it.",
        "In an open loop they leave out the first quarter.",
        '"Server adds" compares the same jobs through the same engine without a server and without text.',
        '"Drafted" is strategy "auto". With random weights its acceptance is simulated from a published',
        "curve (`bench/strong.py`).",
        'In lines of "vLLM" the same loops drive its engine in process, without its HTTP server.',
    ]
    return textwrap.fill(" ".join(sentences), 140)
