"""Options that the training verbs share: the text, the plan, what happens to OUT, and resuming."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..training.loop import Plan
    from ..training.out_folder import OutFolder

DEFAULT_SECONDS = 600.0  # when neither --steps nor --seconds is given


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """BASE and its --revision."""
    parser.add_argument("base", metavar="BASE", help="checkpoint folder or hub id of a dense Qwen3")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")


def add_out_options(parser: argparse.ArgumentParser) -> None:
    """OUT and --overwrite."""
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, whole or not at all")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint that OUT holds")


def add_corpus_options(parser: argparse.ArgumentParser, own_text: bool = True) -> None:
    """--corpus-mb, --seed and, where it makes sense, --text."""
    if own_text:
        parser.add_argument(
            "--text", type=Path, nargs="+", default=[], metavar="PATH",
            help="UTF-8 files and folders to learn from (default: the source of Python and of the "
            "permissively licensed packages installed here)",
        )  # fmt: skip
    parser.add_argument(
        "--corpus-mb", type=float, default=200.0, metavar="MB",
        help="size of the default corpus at most (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")


def add_limit_options(parser: argparse.ArgumentParser) -> None:
    """--steps and --seconds."""
    parser.add_argument("--steps", type=int, metavar="N", help="steps at most")
    parser.add_argument(
        "--seconds", type=float, metavar="S",
        help=f"seconds at most (default: {DEFAULT_SECONDS:g}, if --steps is not given)",
    )  # fmt: skip


def add_plan_options(
    parser: argparse.ArgumentParser, batch: int, length: int, lr: str, resumable: bool = True
) -> None:
    """How long and in what portions to train, and how to go on after an interruption."""
    add_limit_options(parser)
    parser.add_argument("--batch", type=int, default=batch, help="rows a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=length, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--lr", type=float, help=f"peak learning rate (default: {lr})")
    if not resumable:
        return
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the state file if there is one; same settings",
    )
    parser.add_argument(
        "--state", type=Path, metavar="FILE",
        help="where to keep the state of an unfinished run (default: OUT.state.safetensors)",
    )  # fmt: skip


def plan_of(args: argparse.Namespace, default: Plan, lr: float) -> Plan:
    """The plan the options ask for; steps of `default` if there is only a limit in seconds."""
    import dataclasses

    steps = default.steps if args.steps is None else args.steps
    return dataclasses.replace(
        default, steps=steps, batch=args.batch, length=args.length, lr=lr if args.lr is None else args.lr
    )


def seconds_of(args: argparse.Namespace) -> float | None:
    """The limit in seconds; None is none."""
    return DEFAULT_SECONDS if args.seconds is None and args.steps is None else args.seconds


def corpus_bytes_of(args: argparse.Namespace) -> int:
    """The size of the corpus. Raises InputError."""
    if not 0 < args.corpus_mb < 1e6:
        raise InputError(f"--corpus-mb is {args.corpus_mb}; above 0 was expected")
    return int(args.corpus_mb * 1e6)


@contextmanager
def state_of(args: argparse.Namespace, out: OutFolder) -> Iterator[Path]:
    """The state file of the run that owns OUT, its own alone and deleted when it has ended well. Raises
    InputError for one that would be lost or cannot be written.
    """
    from ..files import folders_made, owned, resolved
    from ..training.state import is_state

    state = resolved(args.state or out.path.with_name(out.path.name + ".state.safetensors"))
    if state.is_relative_to(out.path):
        raise InputError(f"{state} lies in OUT, which is replaced: keep the state elsewhere")
    with folders_made(state.parent, f"{state} cannot be written"), owned(state):
        if state.exists() and not state.is_file():
            raise InputError(f"{state} is not a file; one was expected")
        if state.exists() and not args.resume:
            raise InputError(f"{state} holds an unfinished run: --resume goes on with it, or delete it")
        yield state
        if state.exists() and is_state(state):  # else it is somebody's file
            state.unlink()
