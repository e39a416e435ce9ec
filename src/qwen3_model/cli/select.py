"""orthrus select: fit a selector, by which the context ranks what drafts propose."""

from __future__ import annotations

import argparse

from . import options
from .training_options import (
    add_corpus_options,
    add_limit_options,
    add_out_options,
    corpus_bytes_of,
    seconds_of,
)


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = options.new_verb(
        subparsers, "select", "fit a selector of draft candidates on an Orthrus's own text; its weights stay",
        "orthrus select runs/orthrus-0.6b-3 runs/orthrus-0.6b-4 --text my-code/ --tokens 2000000", run,
    )  # fmt: skip
    add = parser.add_argument
    add("base", metavar="ORTHRUS", help="checkpoint folder or hub id of an Orthrus-Qwen3 with bigram tables")
    add("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    add_out_options(parser)
    add_corpus_options(parser)
    add_limit_options(parser)
    add("--tokens", type=int, default=10_000_000, metavar="N",
        help="of greedy text that ORTHRUS writes, to fit on (default: %(default)s)")  # fmt: skip
    add("--rank", type=int, default=64, metavar="R",
        help="columns that it adds to the tables (default: %(default)s)")  # fmt: skip
    add("--batch", type=int, default=4096, metavar="N",
        help="blocks of each form of cycle a step (default: %(default)s)")  # fmt: skip
    add("--lr", type=float, default=3e-3, help="peak learning rate (default: %(default)g)")
    add("--texts", type=int, default=96, metavar="N",
        help="at most to calibrate on at temperature 0, and above 0 (default: %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Fit and write OUT."""
    from .. import hub
    from ..training.out_folder import claimed
    from ..training.selector_fit import Limits
    from ..training.selector_run import run_select

    limits = Limits(seconds_of(args), args.steps, args.lr, args.batch, args.seed)
    with claimed(args.out, args.overwrite) as out:
        base = hub.resolve(args.base, args.revision)  # downloaded once OUT is known to be free
        run_select(
            base, out, limits, corpus_bytes_of(args), tokens=args.tokens, rank=args.rank, texts=args.texts,
            text=args.text,
        )  # fmt: skip
    return 0
