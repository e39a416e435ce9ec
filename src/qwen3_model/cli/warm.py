"""orthrus warm: compile the kernels of a checkpoint before its first text asks for them."""

from __future__ import annotations

import argparse

from ..errors import InputError
from . import options, output


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = options.new_verb(
        subparsers, "warm",
        "compile what texts of a checkpoint need, in parallel, so that no later command waits for it",
        "orthrus warm chiennv/Orthrus-Qwen3-8B --slots 64", run,
    )  # fmt: skip
    options.add_model_options(parser, positional=True)
    parser.add_argument(
        "--slots", type=int, default=1, metavar="N",
        help="for N texts side by side, whose graphs are captured too; 1: for one text (default: 1)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the line")


def run(args: argparse.Namespace) -> int:
    """Compile and say what was done."""
    from ..decode.engine import MOST_SLOTS
    from ..decode.runner import replays

    if not 1 <= args.slots <= MOST_SLOTS:
        raise InputError(f"--slots is {args.slots}; 1 to {MOST_SLOTS} was expected")
    model = options.load_model(args)
    done = model.engine_of(args.slots).warm()
    if args.json:
        about = {"model": args.model or "embedded", "device": str(model.device), "slots": args.slots}
        output.write_json(about | done.to_dict())
    elif not replays(model):
        print(f"nothing to compile: backend {model.backend} on {model.device} has no CUDA graphs")
    else:
        graphs = f", {done.graphs} graphs captured" if args.slots > 1 else ""
        had = done.kernels - done.compiled
        print(f"{done.compiled} kernels compiled, {had} were there{graphs}: {done.seconds:.1f} s")
    return 0
