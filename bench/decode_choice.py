"""What sampling and draft trees cost: whole two-pass cycles, greedy and sampled, and the kernels around their
passes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from qwen3_model import Qwen3

from .measure import Timing
from .report import number
from .step_profile import Span, record

TREE = 63
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "top_k": 20}
TREE_KERNELS = ("_grow_kernel", "_advance_kernel", "_commit_kernel")  # grow, walk, commit
PROFILED_TOKENS = 24

TimeIt = Callable[[Callable[[], Any]], Timing]
Recorded = Callable[[Callable[[], Any], int], list[Span]]
Row = dict[str, Any]


def choice_rows(name: str, model: Qwen3, prompt: Sequence[int], time_it: TimeIt) -> list[Row]:
    """A row for each draft and choice, for JSON. time_it: times a call that is a replay already; what it
    times are cycles behind the end of a text, which do all the work and change nothing."""
    rows: list[Row] = []
    for nodes in (0, TREE):
        for choice in ("greedy", "sampled"):
            row: Row = {"model": name, "nodes": nodes, "choice": choice}
            text = _text(model, prompt, row)
            text(), text()  # the second captures nothing more
            assert model.spare_cache is not None and model.spare_cache.cycles is not None
            with torch.inference_mode():
                us = time_it(model.spare_cache.cycles.again)
            rows.append(row | {"us": asdict(us), "tree_kernels_us": {}, "share": None})
    return rows


def add_kernels(
    rows: Sequence[Row], model: Qwen3, prompt: Sequence[int], recorded: Recorded = record
) -> None:
    """Into the rows of a model: the kernels that grow, walk and commit, medians over the cycles of a text."""
    for row in rows:
        text = _text(model, prompt, row)
        text(), text()
        around = kernel_us(recorded(text, 1))
        row |= {"tree_kernels_us": around, "share": round(sum(around.values()) / row["us"]["median"], 5)}


def _text(model: Qwen3, prompt: Sequence[int], row: Row) -> Callable[[], Any]:
    settings = SAMPLED if row["choice"] == "sampled" else {}
    return lambda: model.generate(
        prompt, "two-pass", PROFILED_TOKENS, seed=0, tree_nodes=row["nodes"], **settings
    ).whole()


def kernel_us(spans: Sequence[Span]) -> dict[str, float]:
    """Median µs of each of TREE_KERNELS that ran."""
    times = {k: [s.end - s.start for s in spans if s.name.startswith(k)] for k in TREE_KERNELS}
    return {k: round(statistics.median(t), 3) for k, t in times.items() if t}


def choice_table(rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The rows as one table."""
    head = ["model", "draft", "choice", "ms a cycle", "p20", "p80", "over greedy", "grow µs", "walk µs",
            "commit µs", "of the cycle"]  # fmt: skip
    greedy = {(r["model"], r["nodes"]): r["us"]["median"] for r in rows if r["choice"] == "greedy"}
    lines = [
        [r["model"], f"tree of {r['nodes']}" if r["nodes"] else "chain", r["choice"],
         *(number(r["us"][n] / 1e3) for n in ("median", "p20", "p80")),
         f"{r['us']['median'] / greedy[r['model'], r['nodes']]:.3f}",
         *(f"{r['tree_kernels_us'][k]:.1f}" if k in r["tree_kernels_us"] else "-" for k in TREE_KERNELS),
         f"{r['share']:.2%}" if r["share"] else "-"]
        for r in rows
    ]  # fmt: skip
    said = ", ".join(f"{k} {v:g}" for k, v in SAMPLED.items())
    return [(f"two-pass cycles, greedy and sampled ({said})", head, lines)] if rows else []
