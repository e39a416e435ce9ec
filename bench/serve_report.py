"""What `bench.serve` leaves: rows for JSON, tables, a line of progress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .decode_report import Table
from .report import number
from .serve_jobs import Seen
from .serve_steady import Steady

Row = dict[str, Any]
PLAIN, VLLM = "plain", "vLLM"
VLLM_SAID = "vLLM: its engine in process, without its HTTP server"
RATE = "tokens_per_second"
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


def of_closed(seen: Sequence[Seen], bounds: Bounds) -> Row:
    """Of a closed loop. Rates are of its steady part (serve_steady.py), and None where it has none. The
    requests that ended there count for latencies and goodput: none is its client's first."""
    steady = Steady.of(seen)
    if steady is None:
        rates: Row = {"steady_s": None, RATE: None, "requests_per_second": None}
        return _totals(seen) | rates | _latencies([], bounds)
    inside = [(steady.tokens(s), s.tokens) for s in seen if s.tokens and not s.error]
    rates = {
        "steady_s": round(steady.seconds, 4),
        RATE: round(sum(tokens for tokens, _ in inside) / steady.seconds, 2),
        "requests_per_second": round(sum(tokens / of for tokens, of in inside) / steady.seconds, 4),
    }
    counted = [s for s in seen if steady.holds(s.ended)]
    return _totals(seen) | rates | _latencies(counted, bounds)


def of_open(seen: Sequence[Seen], seconds: float, bounds: Bounds) -> Row:
    """Of an open loop. Rates are of all requests, from the first one sent to the last one's end. seconds: in
    which requests came."""
    totals = _totals(seen)
    took = totals["seconds"] or math.inf
    rates = {"steady_s": None, RATE: round(totals["tokens"] / took, 2),
             "requests_per_second": round((totals["requests"] - totals["errors"]) / took, 4)}  # fmt: skip
    return totals | rates | _latencies([s for s in seen if s.sent >= WARM * seconds], bounds)


def _totals(seen: Sequence[Seen]) -> Row:
    seconds = max((s.ended for s in seen), default=0.0) - min((s.sent for s in seen), default=0.0)
    return {
        "requests": len(seen), "errors": sum(bool(s.error) for s in seen),
        "tokens": sum(s.tokens for s in seen if not s.error), "seconds": round(seconds, 4),
    }  # fmt: skip


def _latencies(counted: Sequence[Seen], bounds: Bounds) -> Row:
    good = [s for s in counted if not s.error]
    first = [1e3 * (s.first - s.sent) for s in good]
    each = [(1e3 * (s.ended - s.first) / (s.tokens - 1), s) for s in good if s.tokens > 1]
    slow = {s.job for ms, s in each if ms > bounds.token}
    kept = [s for s, ms in zip(good, first, strict=True) if ms <= bounds.first and s.job not in slow]
    return {
        "counted": len(counted), "ttft_ms": _spread(first), "token_ms": _spread([ms for ms, _ in each]),
        "goodput": round(len(kept) / len(counted), 4) if counted else None,
    }  # fmt: skip


def beside_engine(
    row: Row, engine: Row, ours: Sequence[Seen], theirs: Sequence[Seen], same_text: bool
) -> Row:
    """A closed loop's row with the engine's own, what the server adds to its time, as a share of it where
    both have a steady part, and how many texts are the engine's; nothing of it where they were not the same
    jobs. same_text: whether a job always has the same text."""
    row = row | {"engine": engine, "adds": None, "identical": None}
    if row["errors"] or {s.job for s in ours} != {s.job for s in theirs}:
        return row
    if engine[RATE] and row[RATE]:
        row["adds"] = round(engine[RATE] / row[RATE] - 1, 4)
    if same_text:
        digests = {s.job: s.digest for s in theirs}
        row["identical"] = f"{sum(s.digest == digests[s.job] for s in ours)}/{len(ours)}"
    return row


def of_peer(row: Row, model: str, bounds: Bounds) -> Row:
    """The row of a closed loop that vLLM's engine has told (vllm_peer.py), made as ours are."""
    named = {"model": model, "way": VLLM, "acceptance": "-", "loop": "closed", "peer": row["peer"],
             "clients": row["clients"], "core": None}  # fmt: skip
    told = of_closed([Seen(**one) for one in row["seen"]], bounds)
    return named | told | {"engine": None, "adds": None, "identical": None}


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {f"p{round(100 * share)}": round(percentile(values, share), 3) for share in (0.5, 0.99)}


def right(row: Row) -> bool:
    """Whether all requests of a row had their whole text, and the text that it must be."""
    found, _, of = (row.get("identical") or "0/0").partition("/")
    return row["errors"] == 0 and found == of


def tables(rows: Sequence[Row], peers: Sequence[Row]) -> list[Table]:
    """Two a model: closed loops, vLLM's beside ours, and open ones."""
    found = list[Table]()
    for model in dict.fromkeys(row["model"] for row in rows):
        for loop, made in (("closed", _closed), ("open", _open)):
            mine = [row for row in (*rows, *peers) if (row["model"], row["loop"]) == (model, loop)]
            if mine:
                found.append(made(model, mine))
    return found


LATENCY = ["TTFT p50 ms", "TTFT p99", "ms/token p50", "ms/token p99", "goodput", "errors", "client core"]


def latency(row: Row) -> list[str]:
    """The cells of LATENCY."""
    spreads = [row["ttft_ms"], row["token_ms"]]
    cells = [number(s[name]) if s else "-" for s in spreads for name in ("p50", "p99")]
    return [*cells, percent(row["goodput"]), str(row["errors"]), percent(row["core"])]


def _closed(model: str, rows: Sequence[Row]) -> Table:
    head = ["clients", "way", "acceptance", "requests", "steady s", "tokens/s", "over plain", "engine alone",
            "server adds", "identical", "requests/s", *LATENCY]  # fmt: skip
    lines = [
        [str(row["clients"]), row["way"], row["acceptance"], str(row["requests"]), cell(row["steady_s"]),
         cell(row[RATE]), over_plain(row, rows), cell((row["engine"] or {}).get(RATE)), percent(row["adds"]),
         row["identical"] or "-", cell(row["requests_per_second"]), *latency(row)]
        for row in sorted(rows, key=lambda row: row["clients"])
    ]  # fmt: skip
    said = f"{model}, each client sends its next request when its last has ended"
    return f"{said}; {VLLM_SAID}" if any(row["way"] == VLLM for row in rows) else said, head, lines


def _open(model: str, rows: Sequence[Row]) -> Table:
    head = ["of saturation", "way", "acceptance", "asked/s", "requests", "tokens/s", *LATENCY]
    lines = [
        [f"{row['share']:.0%}", row["way"], row["acceptance"], number(row["rate"]), str(row["requests"]),
         cell(row[RATE]), *latency(row)]
        for row in rows
    ]  # fmt: skip
    return f"{model}, requests come by themselves (Poisson)", head, lines


def over_plain(row: Row, rows: Sequence[Row]) -> str:
    """Its tokens/s over those of plain decoding for as many clients, of the same rows."""
    plain = next((r[RATE] for r in rows if (r["clients"], r["way"]) == (row["clients"], PLAIN)), None)
    return f"{row[RATE] / plain:.2f}x" if plain and row[RATE] else "-"


def cell(value: float | None) -> str:
    return "-" if value is None else number(value)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def progress(row: Row) -> str:
    """A measured row in one line."""
    what = f"{row['clients']} clients" if row["loop"] == "closed" else f"{row['share']:.0%} of saturation"
    first, each = (f"{number(s['p50'])} ms" if s else "-" for s in (row["ttft_ms"], row["token_ms"]))
    said = [
        f"{row['model']}, {what}, {row['way']} ({row['acceptance']}): {row['requests']} requests",
        f"{cell(row[RATE])} tokens/s", f"first token {first}, each {each}",
    ]  # fmt: skip
    if row["loop"] == "closed" and row["adds"] is not None:
        said.append(f"server adds {percent(row['adds'])}")
    return ", ".join([*said, *([f"{row['errors']} ERRORS"] if row["errors"] else [])])
