"""The command line: `orthrus VERB ...`, one file a verb.

A verb's module has `add(subparsers)`, which calls `options.new_verb`, and `run(args) -> exit code`. Modules
are imported for `orthrus --help` already, so what needs torch is imported inside the functions that use it.
This file imports nothing from elsewhere, so that Ctrl-C finds `main` begun.

Exit codes: 0 done, 1 a check failed, 2 bad input (one line on stderr, and nothing on stdout
unless text was streamed before it showed), 130 Ctrl-C, 141 the reader of stdout is gone."""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from .interrupts import CtrlC
    from .options import Parser

VERBS = (
    "generate", "explain", "chat", "verify", "batch", "serve", "info", "warm", "demo", "pretrain", "unrepeat",
    "distill", "bigram", "select", "quantize", "tiny-checkpoint",
)  # fmt: skip
BAD_INPUT, INTERRUPTED, READER_GONE = 2, 130, 141  # the last two: what a shell reports for SIGINT, SIGPIPE


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run a command line (default: this process's, which then ends) and return its exit code."""
    return ended("orthrus", lambda ctrl_c: _run(argv, ctrl_c), at_the_end=argv is None)


def ended(command: str, work: "Callable[[CtrlC], int]", at_the_end: bool) -> int:
    """The exit code of a command, which is that of `work` unless something ends it early, as one line on
    stderr then says. The standard streams are safe inside `work`. at_the_end: the process ends with it."""
    try:
        from .interrupts import CtrlC

        with CtrlC(command, at_the_end) as ctrl_c:
            from . import surroundings

            try:
                surroundings.prepare()
                code = work(ctrl_c)
                sys.stdout.flush()  # here, so that a full disk or a reader who has gone is noticed
            except Exception as error:
                code = _tell(command, error)
            finally:
                surroundings.drop_output()
            return code
    except KeyboardInterrupt:
        from contextlib import suppress

        with suppress(OSError):  # it may have come before stderr was made safe
            print(f"{command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(argv: "Sequence[str] | None", ctrl_c: "CtrlC") -> int:
    """Parse a command line and let its verb work."""
    from .surroundings import check_folder

    args = _parse(argv)
    check_folder()
    _import_torch()
    ctrl_c.working = True
    try:
        return args.run(args)
    finally:
        ctrl_c.working = False


def _parse(argv: "Sequence[str] | None") -> "argparse.Namespace":
    """Raises SystemExit after --help and --version, whose text has been written or an OSError raised."""
    from ..errors import InputError

    try:
        args = _parser().parse_args(argv)
    except SystemExit:
        sys.stdout.flush()
        raise
    if not hasattr(args, "run"):
        raise InputError(f"a verb was expected: {', '.join(VERBS[:-1])} or {VERBS[-1]} (see orthrus --help)")
    return args


def _parser() -> "Parser":
    from importlib import import_module

    from .options import Parser
    from .version import ShowVersion

    parser = Parser(
        prog="orthrus",
        description="Qwen3 and Orthrus-Qwen3 from scratch: lossless multi-token decoding.",
        epilog="example: orthrus generate 'def fibonacci(n):' --colour-runs",
    )
    parser.add_argument("--version", action=ShowVersion, help="show the versions of orthrus and of torch")
    subparsers = parser.add_subparsers(title="verbs", metavar="VERB")
    for verb in VERBS:
        import_module(f".{verb.replace('-', '_')}", __name__).add(subparsers)
    return parser


def _import_torch() -> None:
    """Import what every verb needs, while Ctrl-C still ends the process at once: an exception does not come
    through all of these libraries unharmed. Raises InputError where torch cannot be loaded."""
    from ..errors import foreign

    with foreign("torch cannot be imported", "it needs 1 GB of memory and a whole installation"):
        import safetensors  # noqa: F401
        import tokenizers  # noqa: F401
        import torch  # noqa: F401
    from .. import qwen3  # noqa: F401


def _tell(command: str, error: Exception) -> int:
    """The exit code of what ended a command, said in one line; a fault of this program is raised again."""
    from ..errors import InputError, memory_asked, one_line

    if isinstance(error, BrokenPipeError):  # `orthrus ... | head` has read enough
        return READER_GONE
    said = one_line(error)
    if (asked := None if isinstance(error, InputError) else memory_asked(error)) is not None:
        size = f" ({asked} were asked for at once)" if asked else ""
        said = f"memory ran out{size}: a smaller model, dtype, batch or context needs less"
    elif isinstance(error, OSError) and error.filename is None:
        said = f"stdin, stdout or a file cannot be used ({said})"
    elif not isinstance(error, (InputError, OSError)):
        raise error
    print(f"{command}: error: {said}", file=sys.stderr)
    return BAD_INPUT
