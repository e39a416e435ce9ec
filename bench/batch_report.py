"""What `bench.decode --batch` leaves: rows for JSON, tables, a line of progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .decode_report import Table
from .measure import Timing
from .report import number

Row = dict[str, Any]
PLAIN = "plain"
KEYS = "model", "measure", "context"  # of the rows of one table


@dataclass
class Rounds:
    """What was counted, round by round. Counts are sums over all texts."""

    texts: int
    seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)  # of them: for records of cycles
    tokens: list[int] = field(default_factory=list)
    cycles: list[int] = field(default_factory=list)  # one of all texts counts once for each
    nodes: int = 0
    kinds: Counter[str] = field(default_factory=Counter)  # cycles of each kind
    context: float = 0.0  # tokens of a text, its prompt included, in the middle of the clock

    def row(self) -> Row:
        """Ready for JSON; tokens/s and their spread are over rounds."""
        cycles = sum(self.cycles)
        rates = [n / s for n, s in zip(self.tokens, self.seconds, strict=True)]
        rate, each = Timing.of(rates), [
            1e3 * s * self.texts / n for s, n in zip(self.seconds, self.cycles, strict=True)
        ]  # fmt: skip
        return {
            "texts": self.texts, "tokens_per_second": round(rate.median, 1), "p20": round(rate.p20, 1),
            "p80": round(rate.p80, 1), "ms_per_cycle": round(Timing.of(each).median, 4),
            "tokens_per_cycle": round(sum(self.tokens) / cycles, 3),
            "nodes_per_cycle": round(self.nodes / cycles, 2),
            "cycles_of": {kind: round(n / cycles, 3) for kind, n in sorted(self.kinds.items())},
            "host_share": round(1 - sum(self.waited) / sum(self.seconds), 4),
            "mean_context": round(self.context),
        }  # fmt: skip


def beside_floor(row: Row, bytes_a_cycle: float, read_gb_s: float) -> Row:
    """The row with the time of reading the weights of a plain cycle and all keys once, and, if it is plain,
    the share of that floor's speed."""
    floor = bytes_a_cycle / read_gb_s / 1e6
    share = round(floor / row["ms_per_cycle"], 4) if row["way"] == PLAIN else None
    return row | {"floor_ms": round(floor, 4), "share_of_floor": share}


def tables(rows: Sequence[Row], peers: Sequence[Row]) -> list[Table]:
    """A table a model and context, and one a model for whole lists of jobs."""
    found = []
    for key in dict.fromkeys(tuple(row.get(name) for name in KEYS) for row in rows):
        mine = [row for row in rows if tuple(row.get(name) for name in KEYS) == key]
        theirs = {row["texts"]: row for row in peers if tuple(row.get(name) for name in KEYS) == key}
        model, measure, context = key
        title = f"{model}, {context} tokens of context, all texts running" if measure == "steady" else (
            f"{model}, a list of {mine[0]['jobs']} jobs, as many texts at a time, prompts inside the clock"
        )  # fmt: skip
        found.append((title, *(_steady if measure == "steady" else _jobs)(mine, theirs)))
    return found


def _steady(rows: Sequence[Row], peers: dict[int, Row]) -> tuple[list[str], list[list[str]]]:
    head = ["texts", "way", "acceptance", "tokens/s", "p20", "p80", "over plain", "ms/cycle",
            "tokens/cycle/text", "nodes", "plain cycles", "of floor", "host", *_head(peers)]  # fmt: skip
    lines = [
        [str(r["texts"]), r["way"], r["acceptance"],
         *(f"{r[name]:.0f}" for name in ("tokens_per_second", "p20", "p80")), over_plain(r, rows),
         number(r["ms_per_cycle"]), f"{r['tokens_per_cycle']:.2f}", f"{r['nodes_per_cycle']:.0f}",
         f"{r['cycles_of'].get('plain', 0):.0%}", percent(r["share_of_floor"]), percent(r["host_share"]),
         *_theirs(r, peers)]
        for r in rows
    ]  # fmt: skip
    return head, lines


def _jobs(rows: Sequence[Row], peers: dict[int, Row]) -> tuple[list[str], list[list[str]]]:
    head = ["texts", "way", "acceptance", "tokens/s", "over plain", "seconds", "tokens", "identical",
            "host", *_head(peers)]  # fmt: skip
    lines = [
        [str(r["texts"]), r["way"], r["acceptance"], f"{r['tokens_per_second']:.0f}", over_plain(r, rows),
         f"{r['seconds']:.2f}", str(r["tokens"]), r["identical"] or "-", percent(r["host_share"]),
         *_theirs(r, peers)]
        for r in rows
    ]  # fmt: skip
    return head, lines


def over_plain(row: Row, rows: Sequence[Row]) -> str:
    """Its tokens/s over those of plain decoding with as many texts, of the same rows."""
    plain = [r for r in rows if (r["texts"], r["way"]) == (row["texts"], PLAIN)]
    return f"{row['tokens_per_second'] / plain[0]['tokens_per_second']:.2f}x" if plain else "-"


def _head(peers: dict[int, Row]) -> list[str]:
    return ["vLLM tokens/s"] if peers else []


def _theirs(row: Row, peers: dict[int, Row]) -> list[str]:
    """The peer's cell, where a table has peers."""
    peer = peers.get(row["texts"])
    return [f"{peer['tokens_per_second']:.0f}" if peer else "-"] if peers else []


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def progress(row: Row) -> str:
    """A measured row in one line."""
    what = f"context {row['context']}" if row["measure"] == "steady" else f"{row['jobs']} jobs"
    return (
        f"{row['model']}, {what}, {row['texts']} texts, {row['way']} ({row['acceptance']}): "
        f"{row['tokens_per_second']:.0f} tokens/s"
    )
