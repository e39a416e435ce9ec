"""orthrus explain: the story of a generation, cycle by cycle, in the terminal, as a page or as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import options, output


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = options.new_verb(
        subparsers, "explain",
        "show how a text comes about: each cycle's draft, the target's choices and what is kept",
        "orthrus explain 'def fibonacci(n):' --tree-nodes 15 --html fibonacci.html", run,
    )  # fmt: skip
    parser.add_argument("prompt", help="the text to complete, or - to read it from stdin as it is")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write one self-contained page too, with every node"
    )
    options.add_model_options(parser)
    options.add_generation_options(parser, max_new_tokens=32)
    parser.add_argument(
        "--json", action="store_true", help="one JSON object: what generate --json says, and cycles"
    )


def run(args: argparse.Namespace) -> int:
    """Generate once and tell it; 130 when Ctrl-C ended it."""
    from ..explain import explain
    from .explain_page import page
    from .explain_terminal import StoryWriter

    if args.html is not None:
        output.check_file(args.html)
    prompt = options.read_prompt(args.prompt)
    model = options.load_model(args)
    text = options.text_of(model)
    prompt_ids = text.encode(prompt)
    settings = options.generation_settings(args, model, len(prompt_ids))
    on_cycle = None if args.json else StoryWriter(text, prompt)
    result, cycles = explain(model, prompt_ids, on_cycle, **settings)
    if args.html is not None:
        dtype = str(model.dtype).removeprefix("torch.")
        where = f"{args.model or 'embedded'}, {dtype}, {model.device.type}"
        output.write_atomically(args.html, page(text, prompt, result, cycles, where))
    if args.json:
        told = [cycle.to_dict(text) for cycle in cycles]
        output.write_json({"prompt": prompt, **output.result_json(result), "cycles": told})
    output.print_statistics(result.stats)
    return 130 if result.stats.finish_reason == "interrupted" else 0
