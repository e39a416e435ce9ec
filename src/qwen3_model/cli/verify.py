"""orthrus verify: is the strategy lossless on these prompts, and how many tokens does a pass give?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from ..errors import InputError
from . import options, output, terminal

if TYPE_CHECKING:
    from rich.table import Table

    from ..comparison import Pair
    from ..qwen3 import Qwen3

BAR_WIDTH, MOST_JOBS = 30, 128
BESIDE_BAR = 46  # columns of the histogram without its bars


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = options.new_verb(
        subparsers, "verify",
        "decode prompts plainly and with a strategy and compare every bit; exit 1 if any differs",
        "orthrus verify prompts.jsonl --model chiennv/Orthrus-Qwen3-1.7B --field question --limit 100", run,
    )  # fmt: skip
    parser.add_argument(
        "prompts", nargs="?", metavar="PROMPTS.jsonl",
        help="a prompt a line, - reads stdin (default: the embedded checkpoint's held-out ones, split test)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N prompts")
    parser.add_argument("--field", help="field of a line that holds the prompt")
    parser.add_argument("--split", help="use lines of this split only")
    options.add_model_options(parser)
    parser.add_argument(
        "--strategy", default="auto", help="what to compare with plain decoding (default: %(default)s)"
    )
    options.add_draft_options(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="a prompt (default: 256)"
    )
    options.add_sampling_options(parser)
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="prompt i is sampled with seed S + i (default: 0)"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="decode every prompt with N seeds (default: 1)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N",
        help="processes that share the prompts, each with a model of its own; speeds are then those of N "
        "decodings at once (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N",
        help="decode N texts of the strategy side by side, and plainly one at a time (default: 1)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")


def run(args: argparse.Namespace) -> int:
    """Compare and report; 1 unless everything is identical."""
    from ..comparison import compare
    from ..decode.engine import MOST_SLOTS

    if args.seeds < 1:
        raise InputError(f"--seeds is {args.seeds}; it must be at least 1")
    if not 1 <= args.jobs <= MOST_JOBS:
        raise InputError(f"--jobs is {args.jobs}; 1 to {MOST_JOBS} was expected")
    if not 1 <= args.batch <= MOST_SLOTS:
        raise InputError(f"--batch is {args.batch}; 1 to {MOST_SLOTS} was expected")
    if args.batch > 1 and args.jobs > 1:
        raise InputError("--batch and --jobs both share the prompts out: give one of them")
    prompts = _prompts(args)
    model = options.load_model(args)
    prompt_ids = [options.encode(model, prompt) for prompt in prompts]
    settings = options.sampling_settings(args)
    with _progress(args.seeds * len(prompts)) as advance:
        report = compare(
            model, prompt_ids, args.strategy, args.seed, args.seeds, advance,
            load=options.model_loader(args, progress=False), jobs=args.jobs,
            batch=args.batch, max_new_tokens=args.max_new_tokens, block_size=args.block_size,
            tree_nodes=args.tree_nodes, **settings,
        )  # fmt: skip
    figures = _circumstances(args, model) | report.to_dict()
    if args.json:
        output.write_json(figures)
    else:
        _print(figures)
    return 0 if report.identical == len(report.pairs) else 1


def _prompts(args: argparse.Namespace) -> list[str]:
    from ..checkpoint import EMBEDDED
    from ..prompts import read_prompts

    if args.prompts is None:
        return read_prompts(EMBEDDED / "held_out.jsonl", args.limit, args.field, args.split or "test")
    return read_prompts(args.prompts, args.limit, args.field, args.split)


def _circumstances(args: argparse.Namespace, model: Qwen3) -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    from ..request import block_rows

    on = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU"
    return {
        "model": args.model or "embedded",
        "diffusion": args.diffusion,
        "device": on,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "activations": model.activations,
        "backend": model.backend,
        "max_new_tokens": args.max_new_tokens,
        "jobs": args.jobs,
        "batch": args.batch,
        "block_size": block_rows(model.config, args.block_size, args.strategy),
        "tree_nodes": args.tree_nodes,
        "seed": args.seed,
        **options.sampling_settings(args),
        # as given: JSON has no -inf
        "logit_bias": [f"{token}={value}" for token, value in args.logit_bias],
    }


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    console = terminal.new_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("comparing", total=total)

        def advance(pair: Pair) -> None:
            progress.advance(task)

        yield advance


def _print(figures: dict[str, Any]) -> None:
    console = terminal.new_console()
    table = terminal.new_table(title=f"{figures['strategy']} against plain decoding")
    table.add_row(
        "identical",
        f"{figures['identical']}/{figures['compared']} (tokens and log-probabilities, bit for bit)",
    )
    table.add_row("same tokens", f"{figures['same_tokens']}/{figures['compared']}")
    for name in ("tokens_per_cycle", "tokens_per_forward"):
        mean = figures[f"{name}_mean_per_prompt"]
        table.add_row(name.replace("_", " "), f"{figures[name]:.3f} (mean of prompts {_number(mean)})")
    table.add_row("nodes per cycle", f"{figures['nodes_per_cycle']:.1f}")
    parts = figures["time_shares"].items()
    table.add_row("time in", ", ".join(f"{name} {share:.0%}" for name, share in parts))
    table.add_row("tokens, forward passes", f"{figures['tokens']}, {figures['forwards']}")
    table.add_row("distinct 8-grams", _number(figures["distinct_8grams"]))
    plain = figures["tokens_per_second_plain"]
    beside = f" (each of {figures['jobs']} at once)" if figures["jobs"] > 1 else ""
    beside = f" ({figures['batch']} texts side by side; plainly one)" if figures["batch"] > 1 else beside
    table.add_row("tok/s", f"{figures['tokens_per_second']:.1f}, plainly {plain:.1f}{beside}")
    on = "{device}, torch {torch}, {threads} threads, {dtype}, {backend}".format(**figures)
    rounded = f", activations {figures['activations']}" if figures["activations"] else ""
    table.add_row("on", on + rounded)
    terminal.show(console, table)
    if figures["accepted_histogram"]:
        terminal.show(console, _histogram(figures["accepted_histogram"], console.width - BESIDE_BAR))
    if figures["first_divergence"]:
        _print_divergence(figures["first_divergence"], figures["strategy"])


def _histogram(counts: list[int], room: int) -> Table:
    """Accepted proposals a cycle, with the share of cycles that got that far. room: columns for bars."""
    table = terminal.new_table(
        "accepted", "cycles", "this many or more", "", title="accepted proposals a cycle"
    )
    most, cycles, width = max(counts), sum(counts), min(max(room, 0), BAR_WIDTH)
    for n, count in enumerate(counts):
        bar = "█" * round(width * count / most)
        table.add_row(str(n), str(count), f"{sum(counts[n:]) / cycles:.1%}", bar)
    return table


def _print_divergence(found: dict[str, Any], strategy: str) -> None:
    """Printed as it is: text of a model is not laid out."""
    print(
        f"first divergence: prompt {found['prompt'] + 1}, seed {found['seed']},"
        f" new token {found['position'] + 1}"
    )
    for name, side in (("autoregressive", found["plain"]), (strategy, found["drafted"])):
        said = (
            "had ended"
            if side["token"] is None
            else f"token {side['token']} {side['text']!r}, logit {side['logit']!r},"
            f" log-probability {side['logprob']!r}"
        )
        print(f"  {name}: {said}")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
