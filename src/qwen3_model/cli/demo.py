"""orthrus demo: held-out functions completed plainly and by the two views, each accepted run one step of
colour.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from . import options, output

if TYPE_CHECKING:
    from ..comparison import Pair
    from ..model import Qwen3

PROMPT_LINES = 4  # of a prompt that are shown
STRATEGIES = ("autoregressive", "two-pass")


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = options.new_verb(
        subparsers, "demo", "watch the embedded model complete held-out functions, plainly and with Orthrus",
        "orthrus demo --prompts 3 --max-new-tokens 128", run,
    )  # fmt: skip
    parser.add_argument("--prompts", type=int, default=3, metavar="N", help="how many functions (default: 3)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="a function (default: 128)"
    )
    options.add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the show")


def run(args: argparse.Namespace) -> int:
    """Run the demonstration; 1 if the two ever differ."""
    from ..checkpoint import EMBEDDED
    from ..prompts import read_prompts

    prompts = read_prompts(EMBEDDED / "held_out.jsonl", args.prompts, split="test")
    model = options.load_model(args)
    for prompt in prompts:
        _begin(model, options.encode(model, prompt), args.max_new_tokens)
    console = Console(highlight=False, quiet=args.json)
    console.print(
        f"Plain decoding takes one forward pass a token. Orthrus drafts {model.config.block_size - 1} tokens"
        f" with its diffusion view and keeps those its AR view agrees with. {_legend(console)}"
    )
    pairs = [_complete(args, model, console, i, prompt) for i, prompt in enumerate(prompts)]
    if args.json:
        output.write_json({"prompts": [_pair_json(pair) for pair in pairs]})
    else:
        console.print(_table(pairs))
    return int(any(pair.diverges_at is not None for pair in pairs))


def _legend(console: Console) -> str:
    if console.color_system is None:
        return f"{output.RUN_MARK} stands between the runs it accepted."
    return "Each accepted run is one step of colour."


def _begin(model: Qwen3, prompt_ids: list[int], max_new_tokens: int) -> None:
    """Decode two runs each way: what does not fit is refused before anything is shown, and what only first
    calls pay is paid before the clock runs.
    """
    for strategy in STRATEGIES:
        go_on = iter((True, False))
        model.generate(
            prompt_ids,
            strategy=strategy,
            max_new_tokens=max_new_tokens,
            on_tokens=lambda tokens, text, go_on=go_on: next(go_on),
        )


def _complete(args: argparse.Namespace, model: Qwen3, console: Console, i: int, prompt: str) -> Pair:
    """Complete one function both ways, streaming."""
    from ..comparison import Pair

    prompt_ids = options.encode(model, prompt)
    console.rule(f"function {i + 1}")
    console.out("".join(prompt.splitlines(keepends=True)[-PROMPT_LINES:]), style="dim", end="")
    results = []
    for strategy in STRATEGIES:
        console.print(f"[bold]{strategy}[/]")
        writer = output.RunWriter() if strategy != "autoregressive" else output.TextWriter()
        result = model.generate(
            prompt_ids, strategy=strategy, max_new_tokens=args.max_new_tokens, seed=0,
            on_tokens=None if args.json else writer,
        )  # fmt: skip
        if result.stats.finish_reason == "interrupted":
            raise KeyboardInterrupt
        if not args.json:
            writer.finish()
        results.append(result)
    return Pair(i, 0, prompt_ids, *results)


def _pair_json(pair: Pair) -> dict[str, Any]:
    return {
        "plain": output.result_json(pair.plain),
        "drafted": output.result_json(pair.drafted),
        "identical": pair.diverges_at is None,
    }


def _table(pairs: list[Pair]) -> Table:
    table = Table("", "strategy", "tokens", "forwards", "tokens/forward", "tok/s", "identical")
    for pair in pairs:
        for result in (pair.plain, pair.drafted):
            stats = result.stats
            drafted = result is pair.drafted
            table.add_row(
                "" if drafted else str(pair.prompt + 1),
                stats.strategy,
                str(stats.tokens),
                str(stats.forwards),
                f"{stats.tokens_per_forward:.2f}",
                f"{output.tokens_per_second(stats):.0f}",
                ("yes" if pair.diverges_at is None else "no") if drafted else "",
            )
    return table
