"""orthrus quantize: a checkpoint's matrices in 8 or 4 bits, in forms that other programs read too."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from ..errors import InputError, in_memory, size_of
from . import options, output, terminal

if TYPE_CHECKING:
    from ..quantising.folder import Plan, Source, Written

FORMATS, DIFFUSION = ("fp8", "int4"), ("same", "fp8", "none")
GROUP = 128  # columns that share a scale of 4 bits, unless --group says otherwise
MOST_PROMPTS = 100  # of --report


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = options.new_verb(
        subparsers, "quantize",
        "write a checkpoint with its matrices in 8 or 4 bits, as vLLM and transformers read them",
        "orthrus quantize chiennv/Orthrus-Qwen3-8B runs/orthrus-8b-fp8 --format fp8", run,
    )  # fmt: skip
    parser.add_argument("base", metavar="IN", help="checkpoint folder or hub id, of 16 or 32 bits a number")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, whole or not at all")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--format", required=True, choices=FORMATS,
        help="fp8: e4m3, a scale for 128 x 128 numbers, as Qwen's FP8 checkpoints; int4: 4 bits with zero "
        "points, a scale for a group of a row, as compressed-tensors' pack-quantized",
    )  # fmt: skip
    parser.add_argument(
        "--group", type=int, choices=(32, 64, 128), metavar="32|64|128",
        help=f"columns that share a scale of int4 (default: {GROUP})",
    )  # fmt: skip
    parser.add_argument(
        "--diff", choices=DIFFUSION,
        help="the diffusion view: same: as --format says; fp8; none: as it is (default: fp8)",
    )  # fmt: skip
    parser.add_argument(
        "--report", metavar="PROMPTS.jsonl",
        help="then load both and measure them on these prompts, the first 100; - reads stdin",
    )  # fmt: skip
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:N, which rounds and measures (default: cuda if there)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")


def run(args: argparse.Namespace) -> int:
    """Write OUT and say what it costs."""
    from .. import hub
    from ..prompts import read_prompts
    from ..quantising import folder
    from ..settings import pick_device, pick_threads
    from ..training.out_folder import claimed

    if args.group is not None and args.format != "int4":
        raise InputError(
            "--group belongs to --format int4; fp8 has a scale for 128 x 128 numbers: leave it out"
        )
    if args.out.is_dir() and any(args.out.iterdir()):
        raise InputError(f"{args.out} is not empty: choose another folder, which is never overwritten")
    device = pick_device(args.device)
    if device.type == "meta":
        raise InputError("nothing can be rounded on device meta: use cpu, cuda or cuda:N")
    prompts = read_prompts(args.report, MOST_PROMPTS) if args.report is not None else []
    with claimed(args.out) as out:
        base = hub.resolve(args.base, args.revision)  # downloaded once OUT is known to be free
        out.check_base(base)
        source = folder.Source(base)
        pick_threads(device, source.config.hidden_size)
        plan = _plan(args, source)
        source.check(plan)
        figures: dict[str, Any] = {}

        def fill(new: Path) -> None:
            with _bytes_read(source) as advance:
                written = folder.write(source, plan, new, device, advance)
            figures.update(_figures(source, plan, written))
            output.write_atomically(new / folder.REPORT, folder.as_json(figures))

        with in_memory(f"{args.base}, quantised a tensor at a time,", "free some, or give --device cpu"):
            out.put(fill)
        if prompts:
            figures["measured"] = _measured(args, base, prompts)
            output.write_atomically(args.out / folder.REPORT, folder.as_json(figures))
    if args.json:
        output.write_json(figures)
    else:
        _print(figures, str(args.out))
    return 0


def _plan(args: argparse.Namespace, source: Source) -> Plan:
    """The forms that the options name. Raises InputError for one that the checkpoint has no use for."""
    from ..quantising.folder import Plan
    from ..quantising.written import Fp8, Int4

    if args.diff is not None and not source.config.has_diffusion_view:
        raise InputError(f"--diff is {args.diff}, but {args.base} has no diffusion view: leave it out")
    base = Fp8() if args.format == "fp8" else Int4(args.group or GROUP)
    return Plan(base, {"same": base, "none": None}.get(args.diff or "fp8", Fp8()))


def _figures(source: Source, plan: Plan, written: Written) -> dict[str, Any]:
    """What was written, and how well. diffusion: the form of that view, None where there is none."""
    from ..quantising.written import Int4

    diffusion = plan.diffusion.name if plan.diffusion else "plain"
    return {
        "format": plan.base.name,
        "group": plan.base.group if isinstance(plan.base, Int4) else None,
        "diffusion": diffusion if source.config.has_diffusion_view else None,
        "bytes_before": written.bytes_before,
        "bytes_after": written.bytes_after,
        "quantised_tensors": len(written.errors),
        "worst_relative_errors": dict(written.worst()),
    }


def _measured(args: argparse.Namespace, base: Path, prompts: list[str]) -> dict[str, Any]:
    """Both checkpoints, on prompts. Raises InputError; OUT is whole then."""
    from ..quantising.report import measure
    from ..qwen3 import Qwen3

    before, after = (Qwen3.from_pretrained(folder, args.device) for folder in (base, args.out))
    ids = [options.encode(after, prompt) for prompt in prompts]
    with _prompts_done(len(prompts) * (2 if after.config.has_diffusion_view else 1)) as advance:
        return measure(before, after, ids, advance)


@contextmanager
def _bytes_read(source: Source) -> Iterator[Callable[[int], None]]:
    """A bar of the bytes read, on a terminal."""
    columns = TextColumn("quantising"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    console = terminal.new_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=source.nbytes)
        yield lambda count: progress.advance(task, count)


@contextmanager
def _prompts_done(total: int) -> Iterator[Callable[[], None]]:
    columns = TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = terminal.new_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def _print(figures: dict[str, Any], name: str) -> None:
    console = terminal.new_console()
    table = terminal.new_table(title=name)
    group = f", groups of {figures['group']}" if figures["group"] else ""
    view = f"; diffusion view: {figures['diffusion']}" if figures["diffusion"] else ""
    table.add_row("format", f"{figures['format']}{group}{view}")
    before, after = figures["bytes_before"], figures["bytes_after"]
    table.add_row("weights", f"{size_of(before)} before, {size_of(after)} after ({after / before:.1%})")
    table.add_row("quantised", f"{figures['quantised_tensors']} matrices")
    if found := figures.get("measured"):
        table.add_row("measured on", f"{found['prompts']} prompts, {found['scored_tokens']} tokens of them")
        table.add_row("KL divergence of the AR view", f"{found['kl_divergence']:.3g} nats a token")
        table.add_row(
            "perplexity", f"{found['perplexity_before']:.4f} before, {found['perplexity_after']:.4f} after"
        )
        if "identical" in found:
            table.add_row(
                "tokens a cycle",
                f"{found['tokens_per_cycle_before']:.3f} before, {found['tokens_per_cycle_after']:.3f} after",
            )
            table.add_row("its own plain decoding", f"{found['identical']}/{found['compared']}, bit for bit")
    terminal.show(console, table)
    worst = terminal.new_table("tensor", "relative error", title="what changed most")
    for tensor, error in figures["worst_relative_errors"].items():
        worst.add_row(tensor, f"{error:.4f}")
    terminal.show(console, worst)
