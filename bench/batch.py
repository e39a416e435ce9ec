"""`bench.decode --batch`: tokens/s of an engine that decodes many texts at once.

**Steady**, for 8B and the other shapes, whose weights are random: prompts of random tokens are read, and the
clock starts when all texts run and cycles have settled. A round is TOKENS tokens of a text; tokens/s are
medians of ROUNDS rounds. "auto" keeps what a simulated drafter with a published curve of accepted depths
would (strong.py), each text in its own places: its rows say "simulated". The floor is the time of reading
once the weights of a plain cycle and the keys of all texts.

**Jobs**: a list of texts through an engine of so many slots, prompts inside the clock, graphs captured before
it by the first jobs of the list. That is what `--lengths` measures, with prompts of random tokens, and the
only way of the embedded checkpoint, whose prompts are held-out ones without `--lengths`. Its acceptance is
its own. Its texts may end with an end token, and they must be the same whatever decodes them.

The host's share is the time of `engine.step` that was not spent waiting for the record of a cycle."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qwen3_model import Engine, InputError, Qwen3, Qwen3Config
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.decode.engine import MOST_SLOTS
from qwen3_model.prompts import read_prompts

from . import batch_report, kernels, lengths, report, strong, trace_file, vllm_peer
from .batch_measure import Job, decode, steady
from .batch_report import Row
from .command import fail, positive
from .decode_report import Run
from .forced_walk import Forced
from .measure import Meter, Pool, free_memory, machine, machine_line
from .models import MOST_CONTEXT, WHOLE, random_model
from .passes import context_bytes, weight_bytes
from .replay import PLAIN, Way, with_bigram

COMMAND = "bench.decode"
TRACE = Path(__file__).parent / "results/trace-h100.json"  # whose ranks of misses the simulated drafter has
CURVE = "published 4B curve"
SIMULATED_TEXTS, SIMULATED_TOKENS = 64, 256  # tables of simulated texts; more texts have them again
CONTEXTS, SECONDS = [1000], 900
GROWTH = 2048  # positions that a text may grow by before and during the clock: 1,500 with one text of 8B
WAYS = PLAIN, Way("auto", "auto", "auto")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of many texts alone."""
    group = parser.add_argument_group("many texts at once, in place of all that")
    group.add_argument("--batch", type=positive, nargs="+", metavar="TEXTS",
                       help="how many at a time; embedded among --models: a trained checkpoint")  # fmt: skip
    group.add_argument("--lengths", type=Path, metavar="FILE",
                       help="CSV or JSON of prompt_tokens,new_tokens: decode this list of texts")  # fmt: skip


def check(parser: argparse.ArgumentParser, given: Any) -> None:
    """Refuse options that do not go together."""
    if not given.batch and "embedded" in given.models:
        parser.error("--models embedded is of --batch: other runs have it beside the others")
    if given.batch and given.replay:
        parser.error("--batch and --replay are two benches: ask for one")
    if not given.batch:
        return
    if max(given.batch) > MOST_SLOTS:
        parser.error(f"--batch {max(given.batch)} is more than {MOST_SLOTS}")
    shaped, own = set(given.models) - {"embedded"}, "embedded" in given.models
    for name, used, by in (("contexts", shaped, "random weights"), ("prompts", own, "embedded"),
                           ("tokens", own, "embedded")):  # fmt: skip
        if getattr(given, name) and (given.lengths or not used):
            parser.error(f"--{name} with --batch is of {by} without --lengths")


@dataclass
class Bench:
    """A run over models, and what it has measured."""

    run: Run
    batch: Sequence[int]
    contexts: Sequence[int]
    lengths: Sequence[lengths.Job] | None
    read_gb_s: float | None  # None: no GPU
    rows: list[Row] = field(default_factory=list)

    def note(self, row: Row) -> None:
        """Keep a row and say it."""
        self.rows.append(row)
        print(f"  {batch_report.progress(row)}", flush=True)

    @property
    def wrong(self) -> bool:
        """Whether something failed or a text was not what it must be."""
        return self.run.failed or any(not same(row) for row in self.rows)

    def to_json(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The whole run."""
        roof = self.read_gb_s and {"read_gb_s": round(self.read_gb_s, 1)}
        return {"machine": facts, "roof": roof, "simulated": said(), "rows": self.rows,
                "peers": self.run.peers, "notes": self.run.notes}  # fmt: skip


def same(row: Row) -> bool:
    """Whether all texts of a row were what they must be, as far as that is known."""
    found, _, of = (row.get("identical") or "0/0").partition("/")
    return found == of


def random_prompt(model: Qwen3, tokens: int, seed: int) -> list[int]:
    """Random token ids."""
    rng = random.Random(seed)
    return [rng.randrange(model.config.vocab_size - 1) for _ in range(tokens)]


def shapes(bench: Bench, name: str, model: Qwen3, draws: strong.Draws) -> None:
    """Everything asked for of a model with random weights, an engine for each number of texts."""
    for texts in bench.batch:
        if bench.run.out_of_time():
            bench.run.notes.append(f"{name}, {texts} texts: no time left")
            continue
        longest = max(map(sum, bench.lengths)) if bench.lengths else max(bench.contexts) + GROWTH
        engine = Engine(model, texts, longest if texts == 1 else None)  # alone a cache of a text's size
        engine.runner_for(longest).cycles.force(Forced(model.device, texts, draws.walks))
        if bench.lengths:
            jobs = random_jobs(model, bench.lengths)
            for way in WAYS:
                what = f"{name}, {len(jobs)} jobs, {texts} texts, {way.name}"
                bench.run.attempt(what, partial(_jobs_row, bench, name, engine, jobs, way))
        for context in () if bench.lengths else bench.contexts:
            for way in WAYS:
                what = f"{name}, context {context}, {texts} texts, {way.name}"
                bench.run.attempt(what, partial(_steady_row, bench, name, engine, context, way))
        del engine
        free_memory()


def _steady_row(bench: Bench, name: str, engine: Engine, context: int, way: Way) -> None:
    model, texts = engine.model, engine.slots
    if texts * (context + GROWTH) > engine.cache_tokens:
        raise InputError(
            f"{texts} texts of {context + GROWTH} tokens do not fit into {engine.cache_tokens} positions"
        )
    prompts = [random_prompt(model, context, i) for i in range(texts)]
    found = steady(engine, prompts, way)
    row = _named(name, "steady", way) | {"context": context} | found.row()
    assert bench.read_gb_s is not None
    width = model.dtype.itemsize
    read = weight_bytes(model.config, True, False, width)
    read += context_bytes(model.config, round(found.context * texts), width)
    bench.note(batch_report.beside_floor(row, read, bench.read_gb_s))


def _jobs_row(bench: Bench, name: str, engine: Engine, jobs: Sequence[Job], way: Way) -> None:
    row, _ = decode(engine, jobs, way)
    bench.note(_named(name, "jobs", way) | {"identical": None} | row)


def _named(name: str, measure: str, way: Way) -> Row:
    drafted = f"simulated: {CURVE}" if way is not PLAIN else "-"
    return {"model": name, "measure": measure, "way": way.name, "acceptance": drafted}


def random_jobs(model: Qwen3, found: Sequence[lengths.Job]) -> list[Job]:
    """Prompts of random tokens."""
    return [Job(random_prompt(model, tokens, i), new) for i, (tokens, new) in enumerate(found)]


def held_out(bench: Bench, model: Qwen3, prompts: int, tokens: int) -> list[Job]:
    """The first held-out prompts; a note says where there are fewer."""
    assert model.text is not None
    texts = read_prompts(EMBEDDED / "held_out.jsonl", prompts, split="test")
    if len(texts) < prompts:
        bench.run.notes.append(f"embedded: {len(texts)} prompts in place of {prompts}: no more are held out")
    return [Job(model.text.encode(text), tokens) for text in texts]


def embedded(bench: Bench, model: Qwen3, jobs: Sequence[Job]) -> None:
    """Jobs with the embedded checkpoint; any number of texts and way must give the same texts."""
    first = list[list[int]]()

    def measure(engine: Engine, way: Way) -> None:
        row, found = decode(engine, jobs, way)
        first[:] = first or found
        right = sum(a == b for a, b in zip(first, found, strict=True))
        named = _named("embedded", "jobs", way) | {
            "acceptance": "its own",
            "identical": f"{right}/{len(jobs)}",
        }
        if bench.read_gb_s is None:
            row["host_share"] = None  # the host computes
        bench.note(named | row)

    for count in bench.batch:
        engine = Engine(model, count)
        for way in WAYS:
            bench.run.attempt(f"embedded, {count} texts, {way.name}", partial(measure, engine, way))
        del engine
        free_memory()


def peer_config(name: str) -> dict[str, Any]:
    """A config.json of a shape, for vLLM."""
    c = WHOLE[name].config()
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads, "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim, "vocab_size": c.vocab_size, "tie_word_embeddings": c.tie_word_embeddings,
        "rms_norm_eps": c.rms_norm_eps, "rope_theta": c.rope_theta, "hidden_act": "silu",
        "max_position_embeddings": c.max_position_embeddings, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 1, "attention_bias": False,
    } | ({"quantization_config": c.quantisation.raw} if c.quantisation else {})  # fmt: skip


def peer(bench: Bench, name: str) -> None:
    """vLLM at the same shapes, in what time is left."""
    contexts = [] if bench.lengths else list(bench.contexts)
    spec = {"config": peer_config(name), "texts": list(bench.batch), "contexts": contexts,
            "jobs": bench.lengths or []}  # fmt: skip
    rows, wrong = vllm_peer.measured(spec, bench.run.seconds_left())
    bench.run.peers += [{"model": name, **row} for row in rows]
    if wrong:
        bench.run.notes.append(f"vLLM, {name}: {wrong}")


def measure(bench: Bench, given: Any, save: Callable[[], None]) -> None:
    """Every model, and vLLM behind it when its memory is free."""
    draws = strong.Draws.of(trace_file.read(TRACE), strong.CURVE, SIMULATED_TEXTS, SIMULATED_TOKENS)
    if not vllm_peer.installed():
        bench.run.notes.append(vllm_peer.NOT_INSTALLED)
    for name in given.models:
        if name == "embedded":
            device = "cpu" if bench.read_gb_s is None else "cuda"
            model = Qwen3.from_pretrained(
                EMBEDDED, device, "float32" if device == "cpu" else "bfloat16", progress=False
            )
            prompts = given.prompts or 2 * max(bench.batch)
            jobs = (random_jobs(model, bench.lengths) if bench.lengths
                    else held_out(bench, model, prompts, given.tokens))  # fmt: skip
            bench.run.attempt(name, partial(embedded, bench, model, jobs))
        else:
            model = with_bigram(random_model(name))
            bench.run.attempt(name, partial(shapes, bench, name, model, draws))
        del model
        free_memory()
        save()
        if name != "embedded" and vllm_peer.installed():
            bench.run.attempt(f"vLLM, {name}", partial(peer, bench, name), is_peer=True)
            save()


def most_context(models: Sequence[str]) -> tuple[int, str]:
    """Tokens that a text of every model may have, and whose these are."""
    if "embedded" not in models:
        return MOST_CONTEXT, "a model"
    return Qwen3Config.from_folder(EMBEDDED).context_length, "embedded of --models"


def said() -> str:
    """What the simulated acceptance is, for the file."""
    model = " ".join(str(strong.__doc__).split())
    return f"simulated: {CURVE}, ranks of misses of the embedded checkpoint; {model}"


def main(given: Any) -> int:
    """What `bench.decode --batch` does with its options. The file comes anew after each model."""
    gpu, began = torch.cuda.is_available(), time.perf_counter()
    if not gpu and set(given.models) != {"embedded"}:
        fail(COMMAND, "--batch takes times of models of these shapes, which need a GPU, and there is none; "
             "--models embedded runs on the CPU")  # fmt: skip
    facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
    if not gpu:
        torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    try:
        jobs = lengths.read(given.lengths, *most_context(given.models)) if given.lengths else None
        print(machine_line(facts), flush=True)
        read = Meter(Pool(torch.device("cuda"), kernels.POOL)).read_roof() if gpu else None
        free_memory()
        run = Run(read or 0.0, lambda: given.seconds - (time.perf_counter() - began))
        bench = Bench(run, sorted(set(given.batch)), given.contexts, jobs, read)

        def save() -> None:
            if given.json:
                report.write_json(given.json, bench.to_json(facts))

        measure(bench, given, save)
    except InputError as error:
        fail(COMMAND, str(error))
    report.print_tables(batch_report.tables(bench.rows, run.peers))
    print(*(f"note: {note}" for note in run.notes), sep="\n")
    print(f"{machine_line(facts)}; {time.perf_counter() - began:.0f} s")
    return 1 if bench.wrong else 0
