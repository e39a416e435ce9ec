"""The command line: `orthrus VERB ...`, one file a verb.

A verb's module has `add(subparsers)`, which calls `options.new_verb`, and `run(args) -> exit code`. Modules
are imported for `orthrus --help` already, so what needs torch is imported inside the functions that use it.

Exit codes: 0 done, 1 a check failed, 2 bad input (one line on stderr, and nothing on stdout
unless text was streamed before it showed), 130 Ctrl-C."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from ..errors import InputError, one_line
from . import (
    bigram,
    chat,
    demo,
    distill,
    explain,
    generate,
    info,
    pretrain,
    tiny_checkpoint,
    unrepeat,
    verify,
)
from .options import Parser

VERBS = (generate, explain, chat, verify, info, demo, pretrain, unrepeat, distill, bigram, tiny_checkpoint)
INTERRUPTED, BROKEN_PIPE = 130, 141  # what a shell reports for SIGINT and SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit code."""
    try:
        _check_streams()
        args = _parser().parse_args(argv)
        code = args.run(args)
        sys.stdout.flush()  # here, so that a reader who has gone is noticed below and not at exit
        return code
    except InputError as error:
        print(f"orthrus: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("orthrus: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `orthrus ... | head` has read enough; what is still buffered goes nowhere instead of to a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:  # a full disk, a name too long, a folder that may not be written to
        print(f"orthrus: error: {one_line(error)}", file=sys.stderr)
        return 2


def _check_streams() -> None:
    """Refuse closed standard streams, and print what an odd encoding lacks as question marks."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        sys.exit(2)  # nowhere to say it
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _parser() -> Parser:
    parser = Parser(
        prog="orthrus",
        description="Qwen3 and Orthrus-Qwen3 from scratch: lossless multi-token decoding.",
        epilog="example: orthrus generate 'def fibonacci(n):' --colour-runs",
    )
    subparsers = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        verb.add(subparsers)
    return parser
