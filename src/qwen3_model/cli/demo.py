"""orthrus demo: held-out functions completed plainly and by the two views, each accepted run one step of
colour.
"""

from __future__ import annotations

import argparse
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich import box

from ..errors import InputError
from . import options, output, terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..comparison import Pair
    from ..decode.sequence import GenerationStats, Result
    from ..decode.stream import OnTokens
    from ..qwen3 import Qwen3

PROMPT_LINES = 4  # of a prompt that are shown
STRATEGIES = ("autoregressive", "two-pass")


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = options.new_verb(
        subparsers, "demo", "watch the embedded model complete held-out functions, plainly and with Orthrus",
        "orthrus demo --prompts 3 --max-new-tokens 128", run,
    )  # fmt: skip
    parser.add_argument(
        "--prompts", type=int, default=3, metavar="N",
        help="how many functions; those the model ends at once are passed over (default: 3)",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="a function (default: 128)"
    )
    options.add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the show")


def run(args: argparse.Namespace) -> int:
    """Run the demonstration; 1 if the two ever differ."""
    from ..checkpoint import EMBEDDED
    from ..prompts import read_prompts

    if args.prompts < 1:
        raise InputError(f"--prompts is {args.prompts}; at least 1 was expected")
    rows = _spread(read_prompts(EMBEDDED / "held_out.jsonl", split="test"), args.prompts)
    model = options.load_model(args)
    prompts = list(islice((row for row in rows if _goes_on(model, row, args.max_new_tokens)), args.prompts))
    if not prompts:
        raise InputError("the model ends every held-out prompt at once: there is nothing to show")
    console = terminal.new_console(quiet=args.json)
    console.print(
        f"Plain decoding takes one forward pass a token. Orthrus drafts {model.config.block_size - 1} tokens"
        f" with its diffusion view and keeps those its AR view agrees with. {_legend()}"
    )
    pairs = [_complete(args, model, console, i, prompt) for i, prompt in enumerate(prompts)]
    if args.json:
        output.write_json({"prompts": [_pair_json(pair) for pair in pairs]})
    else:
        terminal.show(console, _table(pairs))
    return int(any(pair.diverges_at is not None for pair in pairs))


def _spread(rows: list[str], count: int) -> list[str]:
    """The prompts in an order whose first `count` lie far apart: neighbours come from one file."""
    step = max(len(rows) // count, 1)
    return [row for first in range(step) for row in rows[first::step]]


def _legend() -> str:
    if terminal.coloured():
        return "Each accepted run is one step of colour."
    return f"{output.RUN_MARK} stands between the runs it accepted."


def _goes_on(model: Qwen3, prompt: str, max_new_tokens: int) -> bool:
    """Whether the model does not end the text at once, which would show nothing.

    Decodes two runs each way, so what does not fit is refused before anything is shown, and what only first
    calls pay is paid before the clock runs.
    """
    prompt_ids = options.encode(model, prompt)
    for strategy in STRATEGIES:
        begun = _decode(model, prompt_ids, strategy, max_new_tokens, _two_runs())
    return begun.stats.tokens > 1 or max_new_tokens == 1


def _two_runs() -> OnTokens:
    """A callback that stops a generation after its second run."""
    go_on = iter((True, False))
    return lambda tokens, text: next(go_on)


def _decode(
    model: Qwen3, prompt_ids: list[int], strategy: str, max_new_tokens: int, on_tokens: OnTokens | None
) -> Result:
    """Decode greedily; Ctrl-C ends the whole demonstration."""
    return model.generate(
        prompt_ids, strategy=strategy, max_new_tokens=max_new_tokens, seed=0, on_tokens=on_tokens
    ).whole()


def _complete(args: argparse.Namespace, model: Qwen3, console: Console, i: int, prompt: str) -> Pair:
    """Complete one function both ways, streaming."""
    from ..comparison import Pair

    prompt_ids = options.encode(model, prompt)
    console.rule(f"function {i + 1}")
    if not args.json:
        lines = prompt.removesuffix("\n").split("\n")
        terminal.write("\n".join(lines[-PROMPT_LINES:]) + "\n", terminal.DIM)
    results = []
    for strategy in STRATEGIES:
        console.print(strategy, style="bold")
        writer = output.RunWriter() if strategy != "autoregressive" else output.TextWriter()
        on_tokens = None if args.json else writer
        result = _decode(model, prompt_ids, strategy, args.max_new_tokens, on_tokens)
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
    """Figures of every function, then of all together as ratios of sums."""
    columns = "", "strategy", "tokens", "forwards", "per forward", "tok/s", "identical"
    table = terminal.new_table(*columns, box=box.SIMPLE_HEAD)  # fits 80 columns
    for label, some in [*((str(pair.prompt + 1), [pair]) for pair in pairs), ("all", pairs)]:
        same = all(pair.diverges_at is None for pair in some)
        table.add_section()
        table.add_row(label, STRATEGIES[0], *_figures([pair.plain.stats for pair in some]), "")
        drafted = _figures([pair.drafted.stats for pair in some])
        table.add_row("", STRATEGIES[1], *drafted, "yes" if same else "no")
    return table


def _figures(stats: list[GenerationStats]) -> list[str]:
    tokens, forwards = sum(s.tokens for s in stats), sum(s.forwards for s in stats)
    seconds = sum(s.seconds for s in stats)
    return [str(tokens), str(forwards), f"{tokens / forwards:.2f}", f"{tokens / seconds:.0f}"]
