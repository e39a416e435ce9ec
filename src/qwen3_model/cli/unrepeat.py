"""orthrus unrepeat: train a dense Qwen3 against repeating itself."""

from __future__ import annotations

import argparse

from . import options
from .training_options import (
    add_base_options,
    add_corpus_options,
    add_out_options,
    add_plan_options,
    corpus_bytes_of,
    plan_of,
    seconds_of,
)


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = options.new_verb(
        subparsers, "unrepeat", "train a small Qwen3 against loops in its greedy text (unlikelihood)",
        "orthrus unrepeat runs/base runs/base-2 --seconds 90 --distinct 0.45", run,
    )  # fmt: skip
    add_base_options(parser)
    add_out_options(parser)
    add_corpus_options(parser)
    add_plan_options(parser, batch=48, length=1024, lr="1e-3", resumable=False)
    parser.add_argument(
        "--distinct", type=float, default=0.45, metavar="SHARE",
        help="share of different runs of 8 tokens in greedy text that is enough (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Train and write OUT."""
    import dataclasses

    from .. import hub
    from ..training import recipe
    from ..training.out_folder import claimed

    plan = plan_of(args, recipe.UNREPEAT, recipe.UNREPEAT.lr)
    own = dataclasses.replace(recipe.CONTINUATIONS, distinct=args.distinct)
    with claimed(args.out, args.overwrite) as out:
        base = hub.resolve(args.base, args.revision)  # downloaded once OUT is known to be free
        recipe.run_unrepeat(
            base, out, seconds_of(args), corpus_bytes_of(args), args.seed, plan=plan, own=own, text=args.text
        )
    return 0
