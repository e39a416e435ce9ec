"""orthrus bigram: learn what a draft's tokens change in the proposals behind them."""

from __future__ import annotations

import argparse

from ..errors import InputError
from . import options
from .training_options import (
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
        subparsers, "bigram", "learn a bigram correction for an Orthrus's drafts; its weights stay",
        "orthrus bigram runs/orthrus-0.6b runs/orthrus-0.6b-2 --text my-code/ --batch 2 --seconds 600", run,
    )  # fmt: skip
    parser.add_argument("base", metavar="ORTHRUS", help="checkpoint folder or hub id of an Orthrus-Qwen3")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    add_out_options(parser)
    add_corpus_options(parser)
    add_plan_options(parser, batch=8, length=1024, lr="5e-3", resumable=False)
    parser.add_argument("--rank", type=int, default=32, help="numbers a token (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=32, help="blocks a row (default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=16, metavar="K", help="(default: %(default)s)")
    parser.add_argument(
        "--calibrate", action="store_true",
        help="learn no tables: fit the calibration of ORTHRUS's drafts on text that it writes",
    )  # fmt: skip
    parser.add_argument(
        "--texts", type=int, metavar="N",
        help="with --calibrate: texts at temperature 0, and as many above 0 (default: 96)",
    )  # fmt: skip
    parser.add_argument(
        "--own-text", type=float, default=0.0, metavar="SHARE",
        help="share of the training text that is the model's own greedy text, 1: all of it "
        "(default: %(default)g)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Learn and write OUT."""
    if args.calibrate:
        return _calibrate(args)
    if args.texts is not None:
        raise InputError("--texts is of --calibrate: give it too")
    from .. import hub
    from ..training import recipe
    from ..training.distill import Blocks
    from ..training.out_folder import claimed

    plan = plan_of(args, recipe.BIGRAM, recipe.BIGRAM.lr)
    blocks = Blocks(args.blocks, args.block_size, recipe.BIGRAM_BLOCKS.offset_decay)
    with claimed(args.out, args.overwrite) as out:
        base = hub.resolve(args.base, args.revision)  # downloaded once OUT is known to be free
        recipe.run_bigram(
            base, out, seconds_of(args), corpus_bytes_of(args), args.seed, plan=plan, blocks=blocks,
            rank=args.rank, text=args.text, own_text=args.own_text,
        )  # fmt: skip
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    """Fit the calibration and write OUT."""
    from .. import hub
    from ..training.calibration import TEXTS, run_calibration
    from ..training.out_folder import claimed

    if args.steps is not None or args.seconds is not None:
        raise InputError("--calibrate learns no tables: leave out --steps and --seconds")
    with claimed(args.out, args.overwrite) as out:
        base = hub.resolve(args.base, args.revision)
        texts = TEXTS if args.texts is None else args.texts
        run_calibration(base, out, texts, corpus_bytes_of(args), args.seed, text=args.text)
    return 0
