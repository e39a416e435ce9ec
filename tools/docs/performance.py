"""Rewrite the tables and the picture of docs/performance.md from recorded runs of `bench.decode`.

A table stands between `<!-- name -->` and `<!-- end -->`; what is around them is written by hand. The
sections on many texts and on the server are of runs of `bench.decode --batch` and `bench.serve`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import decode_report
from bench.command import Parser, fail, short
from bench.decode_report import choice_table
from bench.report import number

from . import batch, serve
from .pictures import BATCH_RUNS, SERVE_RUNS, read

COMMAND = "tools.docs.performance"
ROOT = Path(__file__).resolve().parents[2]
PAGE, PICTURE = ROOT / "docs/performance.md", ROOT / "docs/performance.png"
RUN, PEERS = ROOT / "bench/results/decode-h100.json", ROOT / "bench/results/decode-peers-h100.json"
PICTURED = [("8B", "token"), ("8B", "verify-64"), ("8B", "mixed-33+24x6"), ("1.7B", "token")]
CONTEXT = 1024

Found = dict[str, Any]


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def tokens(run: Found, peers: Found) -> str:
    """Plain decoding at the shortest context, beside Hugging Face in the run that had it."""
    theirs = {p["model"]: p["us"]["median"] for p in peers["peers"]}
    beside = {r["model"]: r["us"]["median"] for r in peers["passes"]
              if (r["pass"], r["context"]) == ("token", CONTEXT)}  # fmt: skip
    lines = [
        [r["model"], f"{r['bytes'] / 1e9:.2f}", number(r["floor_ms"]), number(r["us"]["median"] / 1e3),
         f"{r['share_of_floor']:.0%}", f"{number(theirs[r['model']] / 1e3)}",
         f"{theirs[r['model']] / beside[r['model']]:.2f}x"]
        for r in run["passes"] if (r["pass"], r["context"]) == ("token", CONTEXT)
    ]  # fmt: skip
    head = ["model", "GB to read", "floor ms", "ms", "share of the floor's speed", "transformers ms",
            "over ours"]  # fmt: skip
    return markdown(head, lines)


def passes(run: Found, model: str) -> str:
    """Every pass of a model: ms at each context, and in plain tokens."""
    mine = [r for r in run["passes"] if r["model"] == model]
    contexts = sorted({r["context"] for r in mine})
    of = {(r["pass"], r["context"]): r for r in mine}
    lines = []
    for name in dict.fromkeys(r["pass"] for r in mine):
        found = [of[name, context] for context in contexts]
        times = (f"{number(r['us']['median'] / 1e3)} ({r['over_token']:.2f})" for r in found)
        lines.append([name, str(found[0]["rows"]), *times])
    return markdown(["pass", "rows", *(f"context {c}" for c in contexts)], lines)


def kernels(run: Found, model: str, what: str) -> str:
    """One pass kernel by kernel."""
    (p,) = [p for p in run["profiles"] if (p["model"], p["pass"], p["context"]) == (model, what, CONTEXT)]
    lines = [
        [f"`{k['name']}`", k["group"], f"{k['count']:g}", number(k["us"]), number(k["us"] / k["count"]),
         f"{k['share']:.1%}"]
        for k in p["kernels"]
    ]  # fmt: skip
    return markdown(["kernel", "group", "launches", "µs", "µs each", "share"], lines)


def generated(run: Found) -> str:
    """model.generate by captured cycles."""
    lines = [
        [r["model"], r["strategy"], f"{r['tokens_per_second']:.0f}", number(r["ms_per_cycle"]),
         f"{number(us)} ({us / r['ms_per_cycle'] / 1e3:.1%})", f"{r['tokens_per_cycle']:.2f}"]
        for r in run["generate"] if r["captured"] == "cycles" for us in [r["host_us_per_cycle"]]
    ]  # fmt: skip
    head = ["model", "strategy", "tokens/s", "ms a cycle", "host µs a cycle", "tokens a cycle"]
    return markdown(head, lines)


def choices(run: Found) -> str:
    """What sampling and trees cost; the kernels where they were profiled."""
    ((_, head, lines),) = choice_table(run["choices"])
    return markdown(head, lines)


def memory(run: Found) -> str:
    """Peaks of whole generations."""
    ((_, head, lines),) = decode_report.memory_table(run["memory"])
    return markdown(head, lines)


def rewritten(page: str, run: Found, peers: Found, many: Sequence[Found], served: Sequence[Found]) -> str:
    """The page with its tables made anew. many: runs of `--batch`, served: of
    `bench.serve`, the newest first. Raises KeyError for a table that nobody makes."""
    m = run["machine"]
    tables = {
        "machine": f"{m['gpu']}, torch {m['torch']}, triton {m['triton']}, {m['date']}, read roof "
        f"{run['roof']['read_gb_s']:.0f} GB/s: `{batch.command(run)}`",
        "tokens": tokens(run, peers), "passes 8B": passes(run, "8B"), "passes 1.7B": passes(run, "1.7B"),
        "generate": generated(run), "choices": choices(run), "memory": memory(run),
        "batch": batch.section(many, markdown),
        "serve": serve.section(served, markdown),
    }  # fmt: skip
    tables |= {f"kernels {model} {what}": kernels(run, model, what) for model, what in PICTURED}
    for name in re.findall(r"<!-- (?!end)(.+?) -->", page):
        if name not in tables:
            raise KeyError(f"no table is called {name!r}")
    return re.sub(
        r"<!-- (?!end)(.+?) -->\n.*?<!-- end -->",
        lambda found: f"<!-- {found[1]} -->\n{tables[found[1]]}\n<!-- end -->",
        page,
        flags=re.DOTALL,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description=" ".join(str(__doc__).split("\n\n")[0].split()),
        epilog="example: python -m tools.docs.performance --run bench/results/decode-h100.json",
    )
    parser.add_argument("--run", type=Path, default=RUN, help="JSON of a run with --profile")
    parser.add_argument("--peers", type=Path, default=PEERS, help="JSON of a run with transformers installed")
    for name, runs, what in (("batch", BATCH_RUNS, "--batch"), ("serve", SERVE_RUNS, "bench.serve")):
        parser.add_argument(f"--{name}", type=Path, nargs="+", default=runs, metavar="FILE",
                            help=f"JSON of runs of {what}, the newest first")  # fmt: skip
    given = parser.parse_args(arguments)
    try:
        run, peers = read([given.run, given.peers])
        page = rewritten(PAGE.read_text(), run, peers, read(given.batch), read(given.serve))
        pictured = [
            p for p in run["profiles"] if (p["model"], p["pass"]) in PICTURED and p["context"] == CONTEXT
        ]
        decode_report.plot(PICTURE, pictured, f"{run['machine']['gpu']}, {run['machine']['date']}")
        PAGE.write_text(page)
    except ImportError:
        fail(COMMAND, "the picture needs matplotlib: pip install -e '.[bench]'")
    except (OSError, LookupError, TypeError, ValueError) as error:  # not what bench.decode leaves, in any way
        fail(
            COMMAND,
            f"{short(error)}: give whole runs of bench.decode on a GPU, with --json, of 8B and 1.7B, and "
            "--profile token verify-64 mixed-33+24x6",
        )
    print(f"wrote {PAGE.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
