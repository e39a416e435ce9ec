"""orthrus tiny-checkpoint: the embedded checkpoint, made again from nothing."""

from __future__ import annotations

import argparse

from . import options
from .training_options import add_corpus_options, add_out_options, corpus_bytes_of


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = options.new_verb(
        subparsers, "tiny-checkpoint", "make a checkpoint like the embedded one, from corpus to model card",
        "orthrus tiny-checkpoint runs/tiny --pretrain-seconds 600 --distill-seconds 600", run,
    )  # fmt: skip
    add_out_options(parser)
    add_corpus_options(parser, own_text=False)
    for name, what, seconds in (
        ("pretrain", "of the AR view", 600.0),
        ("unrepeat", "of the AR view against loops in its text", 100.0),
        ("distill", "of the diffusion view", 600.0),
        ("bigram", "of its bigram correction", 75.0),
        ("select", "of its selector of draft candidates", 90.0),
    ):
        parser.add_argument(
            f"--{name}-seconds", type=float, default=seconds, metavar="S",
            help=f"training time {what}; the defaults are meant for a GPU (default: %(default)g)",
        )  # fmt: skip
    parser.add_argument(
        "--select-tokens", type=int, default=10_000_000, metavar="N",
        help="of its own text, to fit the selector on; some 6 kB of memory each (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Train and write OUT."""
    from ..training import tiny

    tiny.run_tiny(
        args.out, args.pretrain_seconds, args.unrepeat_seconds, args.distill_seconds, args.bigram_seconds,
        args.select_seconds, corpus_bytes_of(args), args.seed, select_tokens=args.select_tokens,
        overwrite=args.overwrite,
    )  # fmt: skip
    return 0
