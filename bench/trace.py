"""Record a trace: tokens that a cycle of each kind would keep at each position of texts.

`python -m bench.decode --replay TRACE` states the speed of larger models with it. Also counted: how often
first candidates are right by offset, with blocks that know their root and with blocks anchored one position
earlier, and at which candidate the truth is where the first one fails (bench/strong.py)."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from orthrus_kernels import Sampling
from qwen3_model import InputError, Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.prompts import read_prompts

from . import report, trace_run
from .budget import SEED, SETS, prompt_sets
from .command import Parser, fail, positive, writable
from .measure import machine, machine_line
from .trace_run import CHAIN, KINDS, ONE_PASS, Trace

COMMAND = "bench.trace"
_OFFSETS, _RANKS = 8, 6  # that are printed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(
        prog=f"python -m {COMMAND}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: python -m {COMMAND} --prompts 100 --tokens 256 --json runs/trace.json",
    )  # fmt: skip
    parser.add_argument("file", nargs="?", type=Path, metavar="PROMPTS.jsonl",
                        help="a prompt a line (default: embedded held-out ones)")  # fmt: skip
    parser.add_argument(
        "--set", choices=SETS, help="the prompts and the temperature of a set of bench.budget"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="of the texts (default: 0, greedy)")
    parser.add_argument("--model", default=EMBEDDED, help="an Orthrus-Qwen3: folder or hub id")
    parser.add_argument("--device", help="cuda, cpu (default: CUDA if there)")
    parser.add_argument("--dtype", help="float32, bfloat16 (default: the checkpoint's on CUDA)")
    parser.add_argument("--backend", default="auto", help="reference, triton, torch or auto")
    parser.add_argument("--prompts", type=positive, default=100, metavar="N", help="default: 100")
    parser.add_argument("--skip", type=positive, metavar="N", help="leave out the first N prompts")
    parser.add_argument("--tokens", type=positive, default=256, metavar="N", help="of a text (default: 256)")
    parser.add_argument("--blocks", nargs="*", type=positive, default=[16, 24], metavar="ROWS",
                        help="further sizes of blocks to count agreement of (default: 16 24)")  # fmt: skip
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the trace to FILE")
    given = parser.parse_args(arguments)
    if given.set and (given.file or given.skip or given.temperature is not None):
        parser.error("--set has prompts and a temperature of its own: give it alone")
    began, skip = time.perf_counter(), given.skip or 0
    try:
        sampling = _sampling(given.temperature or 0.0)
        file, split = (given.file, None) if given.file else (EMBEDDED / "held_out.jsonl", "test")
        texts = [] if given.set else read_prompts(file, skip + given.prompts, split=split)[skip:]
        if not (texts or given.set):
            raise InputError(f"--skip {skip} leaves none of the prompts of {file}")
        model = Qwen3.from_pretrained(given.model, given.device, given.dtype, given.backend)
        if model.text is None:
            raise InputError("this checkpoint has no tokenizer.json, which prompts need")
        name = "embedded" if given.model == EMBEDDED else str(given.model)
        prompts = [model.text.encode(text) for text in texts]
        if skip:
            name += f", from prompt {skip + 1}"
        if given.temperature:
            name += f", T {given.temperature:g}"
        if given.set:
            chosen = next(of for of in prompt_sets(model, given.prompts) if of.name == given.set)
            prompts, name, sampling = chosen.prompts, f"{name}, {given.set}", _sampling(chosen.temperature)
        trace = trace_run.record(model, prompts, given.tokens, name, given.blocks, _said, sampling)
    except InputError as error:
        fail(COMMAND, str(error))
    facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
    trace.made = {
        "machine": facts, "dtype": str(model.dtype).removeprefix("torch."), "backend": model.backend,
        "tokens": given.tokens,
    }  # fmt: skip
    report.print_tables(tables(trace))
    print(f"{model.dtype}, {model.backend}, {machine_line(facts)}; {time.perf_counter() - began:.0f} s")
    if given.json:
        trace_run.write(given.json, trace)
    return 0


def _sampling(temperature: float) -> Sampling:
    """Raises InputError for a temperature that cannot be."""
    try:
        return Sampling(temperature=temperature, seed=SEED)
    except ValueError as error:
        raise InputError(str(error)) from None


def tables(trace: Trace) -> list[tuple[str, list[str], list[list[str]]]]:
    """Means by kind, agreement by offset, ranks of misses."""
    passes = dict.fromkeys(KINDS, 2) | {ONE_PASS: 1}
    said = trace.simulated or f"recorded from {trace.checkpoint}"
    lines = [
        [kind if kind in (CHAIN, ONE_PASS) else f"tree {kind}", f"{trace.mean(kind):.3f}",
         f"{trace.mean(kind) / passes[kind]:.3f}"]
        for kind in KINDS
    ]  # fmt: skip
    kept = f"cycles followed through {len(trace.texts)} texts, {said}", ["kind", "tokens/cycle", "a forward"]
    if not trace.tallies:
        return [(*kept, lines)]
    found = []
    for t in trace.tallies:
        shares = t.agreement()[:_OFFSETS]
        blocks = f"blocks of {t.rows}, {'at the root' if t.knows_root else 'one earlier'}"
        found.append([
            blocks + (", corrected" if t.corrected else ""),
            *(f"{share:.2f}" for share in shares), *[""] * (_OFFSETS - len(shares)),
            *(f"{share:.2f}" for share in (*t.shares()[:_RANKS], t.shares()[-1])),
        ])  # fmt: skip
    head = ["first candidates right at offset", *map(str, range(1, _OFFSETS + 1)),
            *(f"miss: {rank}." for rank in range(2, _RANKS + 2)), "none"]  # fmt: skip
    return [(*kept, lines), ("agreement while all before agreed; rank of the truth at a miss", head, found)]


def _said(done: int, of: int) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        end = "" if done < of else "\n"
        print(f"\r  {done} of {of} prompts   ", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
