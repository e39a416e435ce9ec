"""What `bench.decode` leaves: a run, rows for JSON, tables, a picture of where the time of a step goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .command import short
from .passes import CYCLE, OURS, SDPA, Measured
from .report import number
from .step_profile import GAPS, GROUPS, StepProfile

Table = tuple[str, list[str], list[list[str]]]
# Settings of sampled cycles, and the kernels around a cycle's passes: they grow, walk and commit.
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "top_k": 20}
TREE_KERNELS = (
    "_grow_kernel", "_lookup_kernel", "_branch_kernel", "_allot_kernel", "_walk_kernel", "_commit_kernel",
)  # fmt: skip


class Run:
    """Everything measured so far, ready for JSON."""

    def __init__(self, read_gb_s: float, seconds_left: Callable[[], float]) -> None:
        self.read_gb_s, self.seconds_left = read_gb_s, seconds_left
        self.passes: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = []
        self.generate: list[dict[str, Any]] = []
        self.choices: list[dict[str, Any]] = []
        self.profiles: list[dict[str, Any]] = []
        self.peers: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.left_out = 0
        self.failed = False

    @property
    def wrong(self) -> bool:
        """Whether something of ours failed, or a pass or a text was not what it must be."""
        passes, texts = (OURS not in r["notes"] for r in self.passes), (r["identical"] for r in self.generate)
        return self.failed or not all(passes) or not all(texts)

    def tables(self) -> list[Table]:
        """All tables, in order."""
        return [*pass_tables(self.passes), *memory_table(self.memory), *generate_table(self.generate),
                *choice_table(self.choices), *profile_tables(self.profiles)]  # fmt: skip

    def to_json(self, machine: dict[str, Any]) -> dict[str, Any]:
        """The whole run."""
        return {
            "machine": machine, "roof": {"read_gb_s": round(self.read_gb_s, 1)}, "passes": self.passes,
            "memory": self.memory, "generate": self.generate, "choices": self.choices,
            "profiles": self.profiles, "peers": self.peers, "notes": self.notes, "left_out": self.left_out,
        }  # fmt: skip

    def out_of_time(self) -> bool:
        """Whether nothing more is to be started."""
        return self.seconds_left() <= 0

    def attempt(self, what: str, work: Callable[[], None], seconds: float = 0, is_peer: bool = False) -> None:
        """Do it, unless fewer seconds are left than that; a failure leaves a note and the run goes on.
        Raises OSError where stdout cannot be written."""
        if self.seconds_left() <= seconds:
            self.notes.append(f"{what}: no time left")
            return
        try:
            work()
        except Exception as error:
            if isinstance(error, OSError) and error.filename is None and not is_peer:
                raise  # stdout takes no more: nobody would be told of what follows
            self.notes.append(f"{what}: {short(error)}")
            self.failed |= not is_peer


def pass_row(model: str, m: Measured, read_gb_s: float, token_us: float | None) -> dict[str, Any]:
    """A measured pass for JSON. floor_ms is at `read_gb_s`; token_us: the plain token on the same context."""
    floor = m.bytes / read_gb_s / 1e3
    us = m.time.median if m.time else None
    return {
        "model": model, "pass": m.what.name, "rows": len(m.what), "context": m.context, "bytes": m.bytes,
        "floor_ms": round(floor / 1e3, 4), "us": asdict(m.time) if m.time else None,
        "share_of_floor": round(floor / us, 4) if us else None,
        "over_token": round(us / token_us, 4) if us and token_us else None,
        "host_launch_us": m.launch_us, "host_forward_us": m.forward_us,
        "host_launch_share": round(m.launch_us / us, 4) if us and m.launch_us else None,
        "peers_us": {name: asdict(t) for name, t in m.peers.items()}, "notes": m.notes,
    }  # fmt: skip


def pass_tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """A table a model."""
    head = ["pass", "context", "rows", "GB", "floor ms", "ms", "p20", "p80", "floor / ms", "x token",
            "launch µs", "of pass", "forward µs", f"{SDPA} ms", "/ ours"]  # fmt: skip
    found = []
    for model in dict.fromkeys(r["model"] for r in rows):
        lines = []
        for r in (r for r in rows if r["model"] == model):
            us, peer = r["us"], next(iter(r["peers_us"].values()), None)
            lines.append([
                r["pass"], str(r["context"]), str(r["rows"]), f"{r['bytes'] / 1e9:.2f}",
                number(r["floor_ms"]),
                *([number(us[n] / 1e3) for n in ("median", "p20", "p80")]
                  if us else [r["notes"].get(OURS, "-")[:24], "", ""]),
                _percent(r["share_of_floor"]), f"{r['over_token']:.2f}" if r["over_token"] else "-",
                number(r["host_launch_us"]) if r["host_launch_us"] else "-",
                _percent(r["host_launch_share"]),
                number(r["host_forward_us"]) if r["host_forward_us"] else "-",
                number(peer["median"] / 1e3) if peer else "-",
                f"{peer['median'] / us['median']:.2f}x" if peer and us else "-",
            ])  # fmt: skip
        found.append((f"{model}: passes as CUDA graphs", head, lines))
    return found


def card_tables(rows: Sequence[dict[str, Any]], read_gb_s: float) -> list[Table]:
    """What can be said without measuring."""
    head = ["pass", "context", "rows", "GB", "floor ms", "tokens/s at the floor"]
    found = []
    for model in dict.fromkeys(r["model"] for r in rows):
        lines = [
            [r["pass"], str(r["context"]), str(r["rows"]), f"{r['bytes'] / 1e9:.2f}", number(r["floor_ms"]),
             f"{1e3 / r['floor_ms']:.0f}" if r["pass"] == "token" else ""]
            for r in rows if r["model"] == model
        ]  # fmt: skip
        found.append((f"{model}: floor at {read_gb_s:.0f} GB/s", head, lines))
    return found


def memory_table(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Peak of what torch allocated beside what must be there."""
    head = ["model", "context", "weights GB", "cache GB", "peak GB", "more than both MB"]
    lines = [
        [r["model"], str(r["context"]),
         *(f"{r[n] / 1e9:.2f}" for n in ("weights_bytes", "cache_bytes", "peak_bytes")),
         f"{(r['peak_bytes'] - r['weights_bytes'] - r['cache_bytes']) / 1e6:.0f}"]
        for r in rows
    ]  # fmt: skip
    return (
        [("memory of model.generate, two-pass, prefill and captures included", head, lines)] if rows else []
    )


def generate_table(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """model.generate, everything inside the clock."""
    head = ["model", "strategy", "captured", "new tokens", "tokens/s", "ms a cycle", "host µs",
            "tokens/cycle", "identical"]  # fmt: skip
    lines = [
        [r["model"], r["strategy"], r["captured"], str(r["tokens"]), f"{r['tokens_per_second']:.1f}",
         number(r["ms_per_cycle"]), number(r["host_us_per_cycle"]) if r["host_us_per_cycle"] else "-",
         f"{r['tokens_per_cycle']:.2f}", "yes" if r["identical"] else "NO"]
        for r in rows
    ]  # fmt: skip
    title = "model.generate after a prompt of 64 tokens, greedy; prefill inside the clock"
    return [(title, head, lines)] if rows else []


def choice_table(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """The rows as one table."""
    kernels = list(max((r["tree_kernels_us"] for r in rows), key=len, default={}))
    head = ["model", "draft", "choice", "ms a cycle", "p20", "p80", "over greedy",
            *(f"{k[1:].removesuffix('_kernel')} µs" for k in kernels), "of the cycle"]  # fmt: skip
    greedy = {(r["model"], r["nodes"]): r["us"]["median"] for r in rows if r["choice"] == "greedy"}
    lines = [
        [r["model"], f"tree of {r['nodes']}" if r["nodes"] else "chain", r["choice"],
         *(number(r["us"][n] / 1e3) for n in ("median", "p20", "p80")),
         f"{r['us']['median'] / greedy[r['model'], r['nodes']]:.3f}",
         *(f"{r['tree_kernels_us'][k]:.1f}" if k in r["tree_kernels_us"] else "-" for k in kernels),
         f"{r['share']:.2%}" if r["share"] else "-"]
        for r in rows
    ]  # fmt: skip
    said = ", ".join(f"{k} {v:g}" for k, v in SAMPLED.items())
    return [(f"two-pass cycles, greedy and sampled ({said})", head, lines)] if rows else []


def profile_row(model: str, what: str, context: int, p: StepProfile, floor_ms: float) -> dict[str, Any]:
    """A profile for JSON."""
    return {
        "model": model, "pass": what, "context": context, "us": round(p.us, 3), "floor_ms": floor_ms,
        "groups_us": {name: round(us, 3) for name, us in p.groups().items()},
        "kernels": [
            {"name": k.name, "group": k.group, "count": round(k.count, 3), "us": round(k.us, 3),
             "share": round(k.share, 4)}
            for k in p.kernels
        ],
    }  # fmt: skip


def profile_tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Kernel by kernel, gaps last."""
    head = ["kernel", "group", "count", "µs", "µs each", "share"]
    found = []
    for r in rows:
        lines = [
            [k["name"], k["group"], f"{k['count']:g}", number(k["us"]), number(k["us"] / k["count"]),
             f"{k['share']:.1%}"]
            for k in r["kernels"]
        ]  # fmt: skip
        gaps = r["groups_us"][GAPS]
        lines.append([GAPS, "", "", number(gaps), "", f"{gaps / r['us']:.1%}"])
        title = f"{r['model']}, {r['pass']}, context {r['context']}: {number(r['us'] / 1e3)} ms profiled"
        found.append((title, head, lines))
    return found


def plot(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """`draw_steps` of profiles as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(6, 1.4 * len(rows) + 3), 5))
    draw_steps(axes, rows)
    axes.set_title(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_steps(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """A stacked bar a profile on matplotlib's axes: ms of a pass by group, and its floor as a line across the
    bar."""
    bottoms = [0.0] * len(rows)
    for group in (*GROUPS, GAPS):
        heights = [r["groups_us"][group] / 1e3 for r in rows]
        colour = {"color": "lightgrey"} if group == GAPS else {}
        axes.bar(range(len(rows)), heights, 0.7, bottoms, label=group, **colour)
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    for i, r in enumerate(rows):
        label = "floor" if i == 0 else None
        axes.hlines(r["floor_ms"], i - 0.45, i + 0.45, color="black", linestyle="--", label=label)
    names = [f"{r['model']}, {r['pass']}\ncontext {r['context']}" for r in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set_ylabel("ms a pass, profiled")
    axes.legend(fontsize=8)


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each model and context: the plain token, and what a cycle must yield to pay."""
    pays = {(r["model"], r["context"]): r["over_token"] for r in rows if r["pass"] == CYCLE}
    said = []
    for r in (r for r in rows if r["pass"] == "token" and r["us"]):
        ratio = pays.get((r["model"], r["context"]))
        said.append(
            f"{r['model']}, context {r['context']}: a token in {number(r['us']['median'] / 1e3)} ms, "
            f"{r['share_of_floor']:.0%} of the floor's speed"
            + (f"; a two-pass cycle pays from {ratio:.2f} tokens on" if ratio else "")
        )
    return said


def progress(row: dict[str, Any]) -> str:
    """A measured pass in one line."""
    said = f"{number(row['us']['median'] / 1e3)} ms" if row["us"] else row["notes"].get(OURS, "-")
    return f"{row['model']}, context {row['context']}, {row['pass']}: {said}"


def reasons(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why what was not measured was not."""
    return [
        f"not measured: {r['model']}, {r['pass']}, context {r['context']}, {who}: {why}"
        for r in rows for who, why in r["notes"].items()
    ]  # fmt: skip


def _percent(share: float | None) -> str:
    return f"{share:.0%}" if share is not None else "-"
