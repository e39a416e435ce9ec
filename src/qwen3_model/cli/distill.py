"""orthrus distill: give any dense Qwen3 a diffusion view, its own weights untouched."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import options
from .training_options import (
    add_base_options,
    add_corpus_options,
    add_out_options,
    add_plan_options,
    corpus_bytes_of,
    plan_of,
    seconds_of,
    state_of,
)

OFFSET_WEIGHTS, LOSSES = ("decay", "survival"), ("kl", "ce")  # as training/objective.py has them
TINY_RATE, RATE, TINY_HIDDEN = 3e-3, 2e-4, 512  # the recipe's, and the paper's above so wide a model


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = options.new_verb(
        subparsers, "distill", "train a diffusion view for a dense Qwen3, whose tensors stay bit-identical",
        "orthrus distill Qwen/Qwen3-0.6B runs/orthrus-0.6b --text my-code/ --batch 1 --seconds 3600", run,
    )  # fmt: skip
    add_base_options(parser)
    add_out_options(parser)
    add_corpus_options(parser)
    add_plan_options(
        parser, batch=8, length=1024, lr=f"{TINY_RATE:g} to hidden size {TINY_HIDDEN}, else {RATE:g}"
    )
    group = parser.add_argument_group("diffusion view")
    group.add_argument("--blocks", type=int, default=32, help="blocks a row (default: %(default)s)")
    group.add_argument("--block-size", type=int, default=32, metavar="K", help="(default: %(default)s)")
    group.add_argument(
        "--short-blocks", type=int, default=0, metavar="K",
        help="every other step's blocks have K rows: for one-pass decoding, whose blocks are short "
        "(default: none)",
    )  # fmt: skip
    group.add_argument(
        "--offset-decay", type=float, default=0.9, metavar="D",
        help="the loss at offset j weighs D^(j-1); 1 is the paper's (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--offset-weights", choices=OFFSET_WEIGHTS, default=OFFSET_WEIGHTS[0],
        help="decay: by --offset-decay; survival: by what an agreement at an offset is worth to a chain, as "
        "measured on held-out prompts while the training goes on, at least 0.15 (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--loss", choices=LOSSES, default=LOSSES[0],
        help="kl: of the diffusion view's proposals from the AR view's; ce: cross-entropy of the AR view's "
        "likeliest token (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--own-text", type=float, default=0.0, metavar="SHARE",
        help="share of the training text that is the base's own greedy continuations of pieces of it, 1: all "
        "of it (default: %(default)g)",
    )  # fmt: skip
    group.add_argument(
        "--start", type=Path, metavar="FOLDER",
        help="an Orthrus folder whose diffusion weights to start from (default: the base's AR weights)",
    )  # fmt: skip
    group.add_argument(
        "--mask-token-id", type=int, metavar="ID",
        help="(default: the tokenizer's <|mask|>, else the first row of the embedding behind its tokens)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Distil and write OUT."""
    from .. import hub
    from ..training import recipe
    from ..training.base import base_config
    from ..training.distill import Blocks
    from ..training.objective import Objective
    from ..training.out_folder import claimed

    blocks = Blocks(args.blocks, args.block_size, args.offset_decay, args.short_blocks)
    with claimed(args.out, args.overwrite) as out, state_of(args, out) as state:
        base = hub.resolve(args.base, args.revision)  # downloaded once OUT is known to be free
        rate = TINY_RATE if base_config(base).hidden_size <= TINY_HIDDEN else RATE
        plan = plan_of(args, recipe.DISTILL, rate)
        recipe.run_distill(
            base, out, seconds_of(args), corpus_bytes_of(args), args.seed, plan=plan, blocks=blocks,
            text=args.text, mask_token_id=args.mask_token_id, name=args.base, start=args.start,
            own_text=args.own_text, objective=Objective(args.loss, args.offset_weights), state=state,
            resume=args.resume,
        )  # fmt: skip
    return 0
