"""What grammars cost: cycles of texts that are all held to a JSON schema, and of the same texts without one.

Every text has a schema of its own (schemas.py), and writes a list of such values that has no end. Trees have
15 nodes. Acceptance is that of the embedded checkpoint. Random weights have a made tokenizer
(serve_tokenizer.py) and keep next to no draft: only the times of their cycles say something."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen3_model import Engine, Grammar, InputError, Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.decode.engine import MOST_SLOTS
from qwen3_model.matcher import Grammars
from qwen3_model.text import Text

from . import report, serve_tokenizer
from .batch import random_prompt
from .batch_measure import steady
from .command import Parser, fail, positive, run, writable
from .measure import free_memory, machine, machine_line
from .models import WHOLE
from .replay import Way
from .report import number
from .schemas import schemas

COMMAND = "bench.grammars"
TINY = "embedded"
PROMPT = "def example():\n    return "
WAYS = {
    "plain": ("autoregressive", 0), "chain": ("two-pass", 0), "tree": ("two-pass", 15),
    "one-pass": ("one-pass", "auto"), "auto": ("auto", "auto"),
}  # fmt: skip


def lists(count: int) -> list[Grammar]:
    """Grammars of lists without an end, the values of each by another schema."""
    endless = {"type": "array", "minItems": 1 << 20}
    return [Grammar.json_schema(hoisted(schema) | endless) for schema in schemas(count)]


def hoisted(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as that of a list's values: definitions stay at the top, where references look for them."""
    whole = dict(schema)
    definitions = {"$defs": whole.pop("$defs")} if "$defs" in whole else {}
    return definitions | {"items": whole}


def made(name: str, device: str | None, folder: Path) -> Qwen3:
    """A model with a tokenizer. Random weights have an end token, since a grammar needs one."""
    if name == TINY:
        return Qwen3.from_pretrained(EMBEDDED, device, progress=False)
    config = WHOLE[name].config()
    model = Qwen3.from_config(
        replace(config, eos_token_ids=(config.vocab_size - 2,)), device=device, dtype="bfloat16",
        activations=WHOLE[name].activations,
    )  # fmt: skip
    serve_tokenizer.write(folder, config.vocab_size)
    model.text = Text(folder)
    model.grammars = Grammars(model.text, model.config)
    return model


def compared(engine: Engine, prompts: Sequence[Sequence[int]], way: Way) -> dict[str, Any]:
    """A way with grammars and without, each behind a run that compiles and captures what it takes."""
    grammars, found = lists(len(prompts)), {}
    for what, given in (("with", grammars), ("without", [])):
        steady(engine, prompts, way, given)
        found[what] = steady(engine, prompts, way, given).row()
    times = [found[what]["ms_per_cycle"] for what in ("with", "without")]
    said = f"{len(prompts)} texts, {way.name}: {times[0]:.3f} ms a cycle, {times[1]:.3f} without"
    print(f"  {said}", flush=True)
    return {"way": way.name, **found, "cycle": round(times[0] / times[1], 4)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(
        prog=f"python -m {COMMAND}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: python -m {COMMAND} --models embedded 8B --texts 32 --json runs/grammars.json",
    )  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=(TINY, *WHOLE), default=[TINY], metavar="NAME",
                        help=f"{TINY} or random weights: {', '.join(WHOLE)} (default: {TINY})")  # fmt: skip
    parser.add_argument("--texts", nargs="+", type=positive, default=[1, 32], metavar="N",
                        help="at once (default: 1 32)")  # fmt: skip
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY",
                        help=f"of {', '.join(WAYS)} (default: all)")  # fmt: skip
    parser.add_argument("--context", type=positive, default=1000, metavar="N",
                        help="tokens of a prompt of random weights (default: 1000)")  # fmt: skip
    parser.add_argument("--device", help="cuda, cpu (default: CUDA if there)")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write all figures there")
    given = parser.parse_args(arguments)
    if max(given.texts) > MOST_SLOTS:
        parser.error(f"--texts {max(given.texts)}: {MOST_SLOTS} run at once at most")
    began, rows, tables, wrong = time.perf_counter(), list[dict[str, Any]](), list[Any](), ""
    try:
        for name in given.models:
            with tempfile.TemporaryDirectory() as folder:
                model = made(name, given.device, Path(folder))
            assert model.text is not None
            for texts in given.texts:
                prompts = [model.text.encode(PROMPT)] * texts if name == TINY else [
                    random_prompt(model, given.context, nth) for nth in range(texts)]  # fmt: skip
                longest = len(prompts[0]) + 1024
                engine = Engine(model, texts, texts * longest)
                engine.runner_for(longest)
                print(f"{name}, {texts} texts: {', '.join(given.ways)}", flush=True)
                ways = [Way(way, *WAYS[way]) for way in given.ways]
                found = [compared(engine, prompts, way) | {"model": name} for way in ways]
                rows += found
                tables.append((f"{name}, {texts} texts", HEAD, [line(row) for row in found]))
                del engine
                free_memory()
            del model
            free_memory()
    except InputError as error:
        wrong = str(error)
    if rows:  # what was measured before something went wrong is not lost
        facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
        report.print_tables(tables)
        print(f"{machine_line(facts)}; {time.perf_counter() - began:.0f} s")
        if given.json:
            report.write_json(given.json, {"machine": facts, "rows": rows})
    if wrong:
        fail(COMMAND, wrong)
    return 0


HEAD = ["way", "ms/cycle", "without", "x", "tokens/cycle", "without", "tokens/s", "without"]


def line(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    ours, free = row["with"], row["without"]
    return [
        row["way"], number(ours["ms_per_cycle"]), number(free["ms_per_cycle"]), f"{row['cycle']:.3f}",
        f"{ours['tokens_per_cycle']:.2f}", f"{free['tokens_per_cycle']:.2f}",
        f"{ours['tokens_per_second']:.0f}", f"{free['tokens_per_second']:.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
