"""Whole decoding steps beside their floors: plain token, draft, verification, mixed pass and cycle.

Random weights at the shapes of Qwen3, bf16, one sequence; every pass is a replay of a CUDA graph. The floor
is the bytes a pass must read over the read bandwidth of the same run. Also the host's time a pass, memory,
tokens/s of model.generate, what sampling and trees cost, and peers. Without a GPU: bytes and floors."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from orthrus_kernels import tables as launch_tables
from qwen3_model import Qwen3
from qwen3_model.bigram import MOST_RANK
from qwen3_model.checkpoint import EMBEDDED

from . import batch, decode_report, kernels, replay, report
from .cases import cases
from .command import Parser, fail, in_processes, positive, run, writable
from .decode_measure import (
    add_kernels,
    choice_rows,
    embedded_prompt,
    generate_with,
    memory_of,
    passes_of,
    profiles_of,
    random_prompt,
)  # fmt: skip
from .decode_report import Run
from .measure import Meter, Pool, free_memory, machine, machine_line, time_replays
from .models import MODELS, MOST_CONTEXT, NAMES, WHOLE, random_model
from .passes import PASSES, Measured, Pass, pass_bytes
from .peers import HUGGING_FACE, hugging_face
from .trace_file import TREES

COMMAND = "bench.decode"
DEVICE = "cuda"
DEFAULT_MODELS, CONTEXTS = ["8B", "1.7B"], [1024, 4096, 16384, 32768]
NEW_TOKENS, SECONDS = 256, 220
PEER_CONTEXT = 1024
PEER_SECONDS = 80  # torch.compile of tens of layers takes about so long: not started with less left
PROFILE_SECONDS = 15  # kept for the profiles of a model
COMPILED_AHEAD = "linear", "linear_swiglu", "attention", "add_rms_norm", "qk_norm_rope", "head", "choose"
USUAL = "runs without --batch and --replay"
RUNS_OF = {  # options that only some runs have
    "seconds": [USUAL, "--batch"], "profile": [USUAL], "plot": [USUAL], "workers": [USUAL], "passes": [USUAL],
    "trees": ["--replay"], "selectors": ["--replay"], "prompts": ["--replay", "--batch"],
    "tokens": ["--replay", "--batch"], "lengths": ["--batch"],
}  # fmt: skip
_PASS_NAMES = [what.name for what in PASSES]


def parse(arguments: Sequence[str] | None) -> Any:
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description=" ".join(str(__doc__).split("\n\n")[0].split()),
        epilog="example: python -m bench.decode --models 8B --contexts 1k 32k --profile --json out.json",
    )
    parser.add_argument(
        "--models", nargs="+", choices=[*WHOLE, "embedded"], default=DEFAULT_MODELS, metavar="MODEL",
        help=f"{NAMES}; --batch: embedded too (default: 8B 1.7B)",
    )  # fmt: skip
    parser.add_argument(
        "--contexts", nargs="+", type=positive,
        help="cached tokens; default: 1k 4k 16k 32k, --batch 1000, --replay the recorded prompts",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=positive,
        help=f"start no new case after this long; default: {SECONDS}, --batch {batch.SECONDS}",
    )  # fmt: skip
    parser.add_argument(
        "--passes", nargs="+", choices=_PASS_NAMES, metavar="PASS",
        help=f"times of these passes and nothing else: {', '.join(_PASS_NAMES)}",
    )  # fmt: skip
    parser.add_argument(
        "--profile", nargs="*", choices=_PASS_NAMES, metavar="PASS",
        help=f"kernel by kernel, of {', '.join(_PASS_NAMES)}; without a name: of the token",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=positive, help="processes that compile ahead; default: a core each, at most 12"
    )
    parser.add_argument("--json", type=writable, metavar="FILE", help="write all figures to FILE")
    parser.add_argument(
        "--plot", type=writable, metavar="FILE", help="a picture of the profiles; implies --profile"
    )
    replayed = parser.add_argument_group("speed of decoding with acceptance replayed, in place of all that")
    replayed.add_argument("--replay", type=Path, nargs="+", metavar="TRACE",
                          help="as python -m bench.trace records one")  # fmt: skip
    replayed.add_argument("--trees", type=int, nargs="+", choices=TREES, metavar="NODES",
                          help=f"two-pass trees, of {', '.join(map(str, TREES))} (default: 63)")  # fmt: skip
    replayed.add_argument("--strong", action="store_true", help="also simulated traces of strong checkpoints")
    replayed.add_argument("--shape", nargs=2, type=positive, metavar=("NODES", "ROWS"),
                          help="of their one-pass cycles (python -m bench.strong)")  # fmt: skip
    replayed.add_argument("--selectors", type=int, nargs="+", metavar="RANK",
                          help="random ones beside the tables, 0: none (default: 0)")  # fmt: skip
    replayed.add_argument("--prompts", type=positive, metavar="N",
                          help="default: 10; --batch: held-out ones of embedded, two a text")  # fmt: skip
    replayed.add_argument("--tokens", type=positive, metavar="N", help="new ones; default: 256")
    batch.add_options(parser)
    given = parser.parse_args(arguments)
    _check(parser, given)
    usual = batch.CONTEXTS if given.batch else [] if given.replay else CONTEXTS
    given.contexts = sorted(set(given.contexts or usual))
    given.seconds = given.seconds or (batch.SECONDS if given.batch else SECONDS)
    given.workers, given.tokens = given.workers or min(12, os.cpu_count() or 1), given.tokens or NEW_TOKENS
    given.trees = list(dict.fromkeys(given.trees or [63]))
    given.models = list(dict.fromkeys(given.models))
    if given.replay:
        given.prompts = given.prompts or 10
    given.measured = [what for what in PASSES if not given.passes or what.name in given.passes]
    if given.profile == [] or (given.plot and given.profile is None):
        given.profile = ["token"]
    return given


def _check(parser: Parser, given: Any) -> None:
    """Refuse options that do not go together. `given.replay` is left without repetitions."""
    batch.check(parser, given)
    kind = "--batch" if given.batch else "--replay" if given.replay else USUAL
    if given.passes and (given.profile is not None or given.plot):
        parser.error("--passes measures nothing else: give --profile and --plot without it")
    for name, runs in RUNS_OF.items():
        if getattr(given, name) is not None and kind not in runs:
            parser.error(f"--{name} is of {' and '.join(runs)}")
    given.replay = list(dict.fromkeys(given.replay or []))
    if given.strong and not given.replay:
        parser.error("--strong takes ranks and losses from the trace of --replay")
    if given.strong and len(given.replay) > 1:
        parser.error("--strong takes ranks and losses from one trace: give --replay one file")
    if not all(0 <= rank <= MOST_RANK for rank in given.selectors or ()):
        parser.error(f"--selectors are ranks of 0 to {MOST_RANK}")
    if given.shape and not given.strong:
        parser.error("--shape is of --strong; a recorded trace has the default one")
    behind = (given.tokens or NEW_TOKENS) if given.replay else 0  # a replay decodes so many tokens there
    if given.contexts and max(given.contexts) > MOST_CONTEXT - behind:
        parser.error(f"--contexts {max(given.contexts)} is more than {MOST_CONTEXT - behind}")


def card(
    models: Sequence[str], contexts: Sequence[int], passes: Sequence[Pass] = PASSES
) -> list[dict[str, Any]]:
    """Every pass with its bytes and floor; nothing measured."""
    rows = []
    for name in models:
        config = WHOLE[name].config()
        for context in contexts:
            for what in passes:
                m = Measured(what, context, pass_bytes(config, what, context))
                rows.append(decode_report.pass_row(name, m, kernels.NOMINAL_GB_S, None))
    return rows


def without_gpu(given: Any) -> int:
    rows = card(given.models, given.contexts, given.measured)
    report.print_tables(decode_report.card_tables(rows, kernels.NOMINAL_GB_S))
    print(
        "No GPU here: nothing was measured; floors are bytes over the read bandwidth of an H100's data sheet."
    )
    if given.plot:
        print("No GPU here: no picture is drawn.")
    if given.json:
        facts = {"machine": machine(_command()), "roof": None, "passes": rows, "left_out": len(rows)}
        report.write_json(given.json, facts)
    return 0


def measure(run: Run, given: Any, facts: dict[str, Any]) -> None:
    """Everything asked for, as far as time allows, into `run`; the JSON file anew after each model."""
    for name in given.models:
        run.attempt(name, partial(_model, run, given, name))
        free_memory()
        if given.json:
            report.write_json(given.json, run.to_json(facts))
    if given.passes:
        return
    run.attempt("generate with embedded", partial(_embedded, run))
    profiles = PROFILE_SECONDS * len(given.models) if given.profile else 0
    for name in [name for name in given.models if name in MODELS]:
        free_memory()
        run.attempt(
            f"{HUGGING_FACE}, {name}", partial(_hugging_face, run, name), PEER_SECONDS + profiles, True
        )
    # last: whatever is launched after the profiler was there takes the host several times as long
    for name in given.models if given.profile else ():
        free_memory()
        run.attempt(f"profiles of {name}", partial(_profiles, run, given, name))


def _model(run: Run, given: Any, name: str) -> None:
    """All figures of one model but profiles; its memory goes when this returns."""
    model = random_model(name)
    prompt = random_prompt(model)
    run.attempt(
        f"passes of {name}", lambda: passes_of(run, name, model, given.contexts, given.measured, time_replays)
    )
    if given.passes:
        return
    run.attempt(f"generate with {name}", lambda: generate_with(run, name, model, prompt, NEW_TOKENS))
    if model.device.type == "cuda":
        run.attempt(f"choices of {name}", partial(_choices, run, name, model, prompt))
        free_memory()
        run.attempt(f"memory of {name}", partial(memory_of, run, name, model, max(given.contexts)))


def _profiles(run: Run, given: Any, name: str) -> None:
    model = random_model(name)
    profiles_of(run, name, model, given.contexts, [what for what in PASSES if what.name in given.profile])
    if model.device.type == "cuda":
        rows = [row for row in run.choices if row["model"] == name]
        run.attempt(f"tree kernels of {name}", lambda: add_kernels(rows, model, random_prompt(model)))


def _choices(run: Run, name: str, model: Qwen3, prompt: Sequence[int]) -> None:
    run.choices += choice_rows(name, model, prompt, time_replays)


def _embedded(run: Run) -> None:
    model = Qwen3.from_pretrained(EMBEDDED, DEVICE, "bfloat16", progress=False)
    prompt = embedded_prompt(model)
    generate_with(run, "embedded", model, prompt, NEW_TOKENS)
    if model.device.type == "cuda":
        _choices(run, "embedded", model, prompt)


def _hugging_face(run: Run, name: str) -> None:
    timing = hugging_face(random_model(name), PEER_CONTEXT)
    ours = [r["us"] for r in run.passes if (r["model"], r["pass"]) == (name, "token")
            and r["context"] == PEER_CONTEXT and r["us"]]  # fmt: skip
    beside = f", {timing.median / ours[0]['median']:.2f} times our pass" if ours else ""
    run.peers.append({"peer": HUGGING_FACE, "model": name, "context": PEER_CONTEXT, "us": asdict(timing)})
    run.notes.append(
        f"{HUGGING_FACE}: {name}, context {PEER_CONTEXT}: {timing.median / 1e3:.2f} ms a token{beside}"
    )


def _compile_ahead(given: Any, key: str) -> list[str]:
    rows = sorted({len(what) for what in given.measured})
    dense = [name for name in given.models if name in MODELS]  # the others' kernels compile as they are met
    wanted = {c.kernel: c for c in cases(COMPILED_AHEAD, dense, rows, [1024], key)}
    if not wanted:
        return []
    share = kernels.compile_share, (list(wanted.values()),), min(given.workers, len(wanted))
    return in_processes(*share, given.seconds / 3)


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.perf_counter()
    given = parse(arguments)
    if given.replay:
        return replay.main(given)
    if given.batch:
        return batch.main(given)
    if not torch.cuda.is_available():
        return without_gpu(given)
    if given.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            fail(COMMAND, "--plot needs matplotlib: pip install -e '.[bench]'")
    device = torch.device(DEVICE)
    torch.manual_seed(0)
    facts = machine(_command())
    print(machine_line(facts), flush=True)
    for line in _compile_ahead(given, launch_tables.device_key(device)):
        print(f"  compiling ahead: {line}", flush=True)
    read = Meter(Pool(device, kernels.POOL)).read_roof()
    free_memory()
    run = Run(read, lambda: given.seconds - (time.perf_counter() - began))
    print(f"read roof {read:.0f} GB/s, {time.perf_counter() - began:.0f} s so far", flush=True)
    measure(run, given, facts)
    report.print_tables(run.tables())
    said = [*decode_report.summary(run.passes), *decode_report.reasons(run.passes)]
    print(*said, *(f"note: {note}" for note in run.notes), sep="\n")
    if run.left_out:
        print(f"{run.left_out} passes were left out: {given.seconds} s were up (--seconds)")
    print(f"{machine_line(facts)}; {time.perf_counter() - began:.0f} s")
    if given.json:
        report.write_json(given.json, run.to_json(facts))
    if given.plot and run.profiles:
        decode_report.plot(given.plot, run.profiles, f"{facts['gpu']}, {facts['date']}, {read:.0f} GB/s")
    return 1 if run.wrong else 0


def _command() -> str:
    return " ".join([f"python -m {COMMAND}", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
