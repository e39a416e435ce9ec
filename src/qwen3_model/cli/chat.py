"""orthrus chat: a conversation by the checkpoint's chat template, a line a turn."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import InputError
from . import options, output

if TYPE_CHECKING:
    from ..generate import Result
    from ..model import Qwen3


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = options.new_verb(
        subparsers, "chat", "talk to a model, a line a turn, until Ctrl-D; Ctrl-C ends an answer",
        "orthrus chat --model chiennv/Orthrus-Qwen3-1.7B --no-thinking --temperature 0.7 --top-p 0.8", run,
    )  # fmt: skip
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
    text = options.text_of(model)
    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    # a missing chat template is told before the first question is asked
    text.chat([*messages, {"role": "user", "content": ""}], args.thinking)
    for question in _questions(args.json):
        messages.append({"role": "user", "content": question})
        result = _answer(args, model, text.chat(messages, args.thinking))
        messages.append({"role": "assistant", "content": result.text})
    return 0


def _answer(args: argparse.Namespace, model: Qwen3, prompt: str) -> Result:
    """Generate one answer and show it."""
    prompt_ids = options.encode(model, prompt)
    settings = options.generation_settings(args, model, len(prompt_ids))
    writer = output.TextWriter()
    result = model.generate(prompt_ids, on_tokens=None if args.json else writer, **settings)
    if args.json:
        output.write_json(output.result_json(result))
    else:
        writer.finish()
    output.print_statistics(result.stats)
    return result


def _questions(as_json: bool) -> Iterator[str]:
    """Lines of stdin that are not blank, asked for if a person is there."""
    prompt = "> " if sys.stdin.isatty() and not as_json else ""
    with suppress(ImportError):  # not everywhere; gives input() editing and history
        import readline  # noqa: F401
    while True:
        try:
            question = input(prompt)
        except EOFError:
            if prompt:
                print()
            return
        except UnicodeDecodeError as error:
            raise InputError(f"stdin is not text: {error}") from None
        if question.strip():
            yield question
