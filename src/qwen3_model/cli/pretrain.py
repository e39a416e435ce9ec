"""orthrus pretrain: a tiny Qwen3 on source text, from nothing."""

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
    state_of,
)


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = options.new_verb(
        subparsers, "pretrain", "train a tiny Qwen3 and its tokenizer from nothing, on source text",
        "orthrus pretrain runs/base --seconds 300 --batch 8 --hidden-size 128 --layers 4", run,
    )  # fmt: skip
    add_out_options(parser)
    add_corpus_options(parser)
    add_plan_options(parser, batch=96, length=1024, lr="5e-3")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--hidden-size", type=int, default=256, metavar="E",
        help="a multiple of 64, a head for each (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--layers", type=int, default=8, help="(default: %(default)s)")
    group.add_argument("--vocab-size", type=int, default=2048, metavar="V", help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Train and write OUT."""
    import dataclasses

    from ..config import Qwen3Config
    from ..training import recipe
    from ..training.out_folder import claimed

    if args.hidden_size < 64 or args.hidden_size % 64:
        raise InputError(f"--hidden-size is {args.hidden_size}; a multiple of 64 was expected")
    for name, value in (("--layers", args.layers), ("--vocab-size", args.vocab_size)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be above 0")
    heads = args.hidden_size // 64
    config = dataclasses.replace(
        recipe.TINY,
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
    )
    config = Qwen3Config.from_dict(config.to_dict())  # refuses what could not be loaded again
    plan = plan_of(args, recipe.PRETRAIN, recipe.PRETRAIN.lr)
    with claimed(args.out, args.overwrite) as out, state_of(args, out) as state:
        recipe.run_pretrain(
            out, seconds_of(args), corpus_bytes_of(args), args.seed, plan=plan, config=config,
            text=args.text, state=state, resume=args.resume,
        )  # fmt: skip
    return 0
