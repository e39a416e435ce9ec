"""orthrus generate: stream a completion of a prompt."""

from __future__ import annotations

import argparse

from . import options, output


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = options.new_verb(
        subparsers, "generate", "complete a prompt; the text streams to stdout, statistics go to stderr",
        "orthrus generate 'def fibonacci(n):' --max-new-tokens 100 --colour-runs", run,
    )  # fmt: skip
    parser.add_argument("prompt", help="the text to complete, or - to read it from stdin as it is")
    options.add_model_options(parser)
    options.add_generation_options(parser, max_new_tokens=256)
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument(
        "--colour-runs", "--color-runs", action="store_true",
        help=f"show what was accepted together: colours, or {output.RUN_MARK} between runs in a pipe",
    )  # fmt: skip
    shape.add_argument(
        "--json", action="store_true", help="one JSON object: text, token_ids, logprobs, stats"
    )


def run(args: argparse.Namespace) -> int:
    """Generate once; 130 when Ctrl-C ended it."""
    prompt = options.read_prompt(args.prompt)
    model = options.load_model(args)
    prompt_ids = options.encode(model, prompt)
    settings = options.generation_settings(args, model, len(prompt_ids))
    writer = output.RunWriter() if args.colour_runs else output.TextWriter()
    result = model.generate(prompt_ids, on_tokens=None if args.json else writer, **settings)
    if args.json:
        output.write_json(output.result_json(result))
    else:
        writer.finish()
    output.print_statistics(result.stats)
    return 130 if result.stats.finish_reason == "interrupted" else 0
