"""What `bench.serve` leaves: rows for JSON, tables, a line of progress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .decode_report import Table
from .report import number
from .serve_jobs import Seen

Row = dict[str, Any]
PLAIN = "plain"
WARM = 0.25  # of an open loop: requests that come in it are not counted, the server being emptier than later


@dataclass(frozen=True)
class Bounds:
    """What a request has to keep to count as goodput: milliseconds."""

    first: float
    token: float


def percentile(values: Sequence[float], share: float) -> float:
    """Of at least one value; between neighbours linearly."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    return low + (high - low) * (at - math.floor(at))


def summary(seen: Sequence[Seen], counted: Sequence[Seen], bounds: Bounds) -> Row:
    """Of a loop. Rates are of all requests, from the first one sent to the last one's end; latencies and
    goodput are of those that are counted."""
    whole = [s for s in seen if not s.error]
    seconds = max((s.ended for s in seen), default=0.0) - min((s.sent for s in seen), default=0.0)
    tokens = sum(s.tokens for s in whole)
    good = [s for s in counted if not s.error]
    first = [1e3 * (s.first - s.sent) for s in good]
    each = [(1e3 * (s.ended - s.first) / (s.tokens - 1), s) for s in good if s.tokens > 1]
    slow = {s.job for ms, s in each if ms > bounds.token}
    kept = [s for s, ms in zip(good, first, strict=True) if ms <= bounds.first and s.job not in slow]
    return {
        "requests": len(seen), "errors": len(seen) - len(whole), "tokens": tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 2) if seconds else 0.0,
        "requests_per_second": round(len(whole) / seconds, 4) if seconds else 0.0,
        "counted": len(counted), "ttft_ms": _spread(first), "token_ms": _spread([ms for ms, _ in each]),
        "goodput": round(len(kept) / len(counted), 4) if counted else None,
    }  # fmt: skip


def of_closed(seen: Sequence[Seen], bounds: Bounds) -> Row:
    """The first request of a client is not counted: all of these come at once."""
    return summary(seen, [s for s in seen if s.turn], bounds)


def of_open(seen: Sequence[Seen], seconds: float, bounds: Bounds) -> Row:
    """seconds: in which requests came."""
    return summary(seen, [s for s in seen if s.sent >= WARM * seconds], bounds)


def beside_engine(
    row: Row, engine: Row | None, ours: Sequence[Seen], theirs: Sequence[Seen], same_text: bool
) -> Row:
    """A closed loop's row with the engine's own, what the server adds to its time, as a share of it, and how
    many texts are the engine's; nothing of it where they were not the same jobs. same_text: whether a job
    always has the same text."""
    row = row | {"engine": engine, "adds": None, "identical": None}
    if engine is None or row["errors"] or {s.job for s in ours} != {s.job for s in theirs}:
        return row
    row["adds"] = round(engine["tokens_per_second"] / row["tokens_per_second"] - 1, 4)
    if same_text:
        digests = {s.job: s.digest for s in theirs}
        row["identical"] = f"{sum(s.digest == digests[s.job] for s in ours)}/{len(ours)}"
    return row


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {f"p{round(100 * share)}": round(percentile(values, share), 3) for share in (0.5, 0.99)}


def right(row: Row) -> bool:
    """Whether all requests of a row had their whole text, and the text that it must be."""
    found, _, of = (row.get("identical") or "0/0").partition("/")
    return row["errors"] == 0 and found == of


def tables(rows: Sequence[Row], peers: Sequence[Row]) -> list[Table]:
    """Two a model: closed loops and open ones."""
    found = list[Table]()
    for model in dict.fromkeys(row["model"] for row in rows):
        for loop, made in (("closed", _closed), ("open", _open)):
            mine = [row for row in rows if (row["model"], row["loop"]) == (model, loop)]
            if mine:
                theirs = {row["texts"]: row for row in peers if row["model"] == model}
                found.append(made(model, mine, theirs))
    return found


LATENCY = ["TTFT p50 ms", "TTFT p99", "ms/token p50", "ms/token p99", "goodput", "errors", "client core"]


def latency(row: Row) -> list[str]:
    """The cells of LATENCY."""
    spreads = [row["ttft_ms"], row["token_ms"]]
    cells = [number(s[name]) if s else "-" for s in spreads for name in ("p50", "p99")]
    return [*cells, percent(row["goodput"]), str(row["errors"]), percent(row["core"])]


def _closed(model: str, rows: Sequence[Row], theirs: dict[int, Row]) -> Table:
    head = ["clients", "way", "acceptance", "requests", "tokens/s", "over plain", "engine alone",
            "server adds", "identical", "requests/s", *LATENCY,
            *(["vLLM offline"] if theirs else [])]  # fmt: skip
    lines = []
    for row in rows:
        engine, peer = row["engine"], theirs.get(row["clients"])
        lines.append([
            str(row["clients"]), row["way"], row["acceptance"], str(row["requests"]),
            number(row["tokens_per_second"]), over_plain(row, rows),
            number(engine["tokens_per_second"]) if engine else "-", percent(row["adds"]),
            row["identical"] or "-", number(row["requests_per_second"]), *latency(row),
            *([number(peer["tokens_per_second"]) if peer else "-"] if theirs else []),
        ])  # fmt: skip
    return f"{model}, each client sends its next request when its last has ended", head, lines


def _open(model: str, rows: Sequence[Row], theirs: dict[int, Row]) -> Table:
    head = ["of saturation", "way", "acceptance", "asked/s", "requests", "tokens/s", *LATENCY]
    lines = [
        [f"{row['share']:.0%}", row["way"], row["acceptance"], number(row["rate"]), str(row["requests"]),
         number(row["tokens_per_second"]), *latency(row)]
        for row in rows
    ]  # fmt: skip
    return f"{model}, requests come by themselves (Poisson)", head, lines


def over_plain(row: Row, rows: Sequence[Row]) -> str:
    """Its tokens/s over those of plain decoding for as many clients, of the same rows."""
    plain = [r for r in rows if (r["clients"], r["way"]) == (row["clients"], PLAIN)]
    if not plain or not plain[0]["tokens_per_second"]:
        return "-"
    return f"{row['tokens_per_second'] / plain[0]['tokens_per_second']:.2f}x"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def progress(row: Row) -> str:
    """A measured row in one line."""
    what = f"{row['clients']} clients" if row["loop"] == "closed" else f"{row['share']:.0%} of saturation"
    first, each = (f"{number(s['p50'])} ms" if s else "-" for s in (row["ttft_ms"], row["token_ms"]))
    said = [
        f"{row['model']}, {what}, {row['way']} ({row['acceptance']}): {row['requests']} requests",
        f"{number(row['tokens_per_second'])} tokens/s", f"first token {first}, each {each}",
    ]  # fmt: skip
    if row["loop"] == "closed" and row["adds"] is not None:
        said.append(f"server adds {percent(row['adds'])}")
    return ", ".join([*said, *([f"{row['errors']} ERRORS"] if row["errors"] else [])])
