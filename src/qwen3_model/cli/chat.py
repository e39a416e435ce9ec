"""orthrus chat: a conversation by the checkpoint's chat template, a line a turn.

A turn that cannot be answered is said in one line and left out of the conversation, which goes on."""

from __future__ import annotations

import argparse
import codecs
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from ..errors import InputError
from . import options, output

if TYPE_CHECKING:
    from ..decode.sequence import Result
    from ..qwen3 import Qwen3

LONGEST_LINE = 2**24  # bytes; a longer line is no question
TURNS = """\
A line that cannot be answered (too long for the context, not UTF-8, refused by the template) is said on
stderr and left out of the conversation; with --json it also gives an object with the field "error". When the
conversation outgrows the context, its oldest questions and answers are left out; the system message stays.
The exit code is 0 at the end of the input, and 2 where the first question cannot be answered because of the
model or the settings.

"""


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = options.new_verb(
        subparsers, "chat", "talk to a model, a line a turn, until Ctrl-D; Ctrl-C ends an answer",
        "orthrus chat --model chiennv/Orthrus-Qwen3-1.7B --no-thinking --temperature 0.7 --top-p 0.8", run,
    )  # fmt: skip
    parser.epilog = TURNS + str(parser.epilog)
    options.add_model_options(parser)
    options.add_generation_options(parser, max_new_tokens=2048)
    parser.add_argument("--system", metavar="TEXT", help="system message that opens the conversation")
    parser.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction,
        help="let the model think first, if its template knows of that (default: the template's)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object a turn instead of the text")


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends."""
    model = options.load_model(args)
    options.text_of(model).check_template()  # before the first question is asked
    conversation = Conversation(args, model)
    for line in _lines(args.json):
        try:
            if (question := _question(line)).strip():
                conversation.answer(question)
        except InputError as error:
            if conversation.broken:
                raise
            if args.json:
                output.write_json({"error": str(error)})
            print(f"orthrus: error: {error}: this turn is left out", file=sys.stderr)
    return 0


class Conversation:
    """The turns so far, and the model that answers them."""

    def __init__(self, args: argparse.Namespace, model: Qwen3) -> None:
        self._args, self._model = args, model
        self._system = [] if args.system is None else [{"role": "system", "content": args.system}]
        self._turns: list[dict[str, Any]] = []  # questions and answers in turn
        self._answered = False  # whether the model has answered at all
        self.broken = False  # whether no question can be answered

    def answer(self, question: str) -> None:
        """Answer a question, show the answer and remember both. Raises InputError; what came before stays."""
        asked = {"role": "user", "content": question}
        turns, prompt_ids = self._fitting(asked)
        settings = options.generation_settings(self._args, self._model, len(prompt_ids))
        try:
            result = self._generate(prompt_ids, settings)
        except InputError:  # of the first question: the settings or the checkpoint
            self.broken = not self._answered
            raise
        if len(turns) < len(self._turns):
            print(
                "orthrus: the conversation has outgrown the context: its oldest turns are left out",
                file=sys.stderr,
            )
        self._turns, self._answered = [*turns, asked, {"role": "assistant", "content": result.text}], True

    def _fitting(self, asked: dict[str, Any]) -> tuple[list[dict[str, Any]], list[int]]:
        """The latest turns that fit the context with a question and its answer, and their prompt."""
        context, budget = self._model.config.context_length, self._args.max_new_tokens
        wished, least = budget or min(self._args.default_max_new_tokens, context // 4), max(budget or 1, 1)
        turns = self._turns
        while len(prompt_ids := self._prompt([*turns, asked])) + wished > context and turns:
            turns = turns[2:]
        if len(prompt_ids) + least > context:
            raise InputError(
                f"the question makes a prompt of {len(prompt_ids)} tokens, its answer has at least {least}, "
                f"the context only {context}: shorten the question"
            )
        return turns, prompt_ids

    def _prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of the conversation. Raises InputError."""
        from ..model import check_ids

        text = options.text_of(self._model)
        rendered = text.chat([*self._system, *messages], self._args.thinking)
        prompt_ids = text.encode(rendered, added_specials=False)
        if not prompt_ids:
            raise InputError("the chat template makes an empty prompt of this question")
        check_ids(prompt_ids, self._model.config.vocab_size)
        return prompt_ids

    def _generate(self, prompt_ids: list[int], settings: dict[str, Any]) -> Result:
        """Generate one answer and show it."""
        writer = output.TextWriter()
        result = self._model.generate(prompt_ids, on_tokens=None if self._args.json else writer, **settings)
        if self._args.json:
            output.write_json(output.result_json(result))
        else:
            writer.finish()
        output.print_statistics(result.stats)
        return result


def _question(line: str | bytes) -> str:
    """A line of stdin as text, its line end left out. Raises InputError."""
    if isinstance(line, str):
        return line.removesuffix("\n")
    if len(line) > LONGEST_LINE:
        raise InputError(f"a line of stdin has more than {LONGEST_LINE} bytes")
    try:
        return line.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise InputError(f"a line of stdin is not text: {error}") from None


def _lines(as_json: bool) -> Iterator[str | bytes]:
    """Lines of stdin: bytes, one of which may be damaged without the others, or text where a person types."""
    if sys.stdin.isatty():
        yield from _typed("" if as_json else "> ")
    elif (stream := getattr(sys.stdin, "buffer", None)) is None:
        yield from sys.stdin
    else:
        yield _read_line(stream).removeprefix(codecs.BOM_UTF8)
        while line := _read_line(stream):
            yield line


def _read_line(stream: IO[bytes]) -> bytes:
    """The next line; of one that is too long as much as shows that."""
    line = rest = stream.readline(LONGEST_LINE + 1)
    while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
        rest = stream.readline(LONGEST_LINE + 1)
    return line


def _typed(prompt: str) -> Iterator[str | bytes]:
    """Lines typed in a terminal."""
    with suppress(ImportError):  # not everywhere; gives input() editing and history
        import readline  # noqa: F401
    while True:
        try:
            yield input(prompt)
        except EOFError:
            if prompt:
                print()
            return
        except UnicodeDecodeError as error:
            yield error.object  # the line's bytes, told to be no text like a pipe's
