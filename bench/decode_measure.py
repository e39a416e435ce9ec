"""What `bench.decode` measures of a model: passes and their profiles, memory, tokens/s of model.generate, and
what sampling and draft trees cost."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from qwen3_model import Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.decode.controller import CHAIN, PLAIN
from qwen3_model.kv_cache import KVCache
from qwen3_model.prompts import read_prompts

from . import decode_report
from .decode_report import SAMPLED, TREE_KERNELS, Run
from .measure import Timing, replayable
from .passes import CYCLE, Pass, TimeIt, filled_cache, host_time, launches_of, measure_passes, pass_bytes
from .step_profile import Span, record, step_profile

PROMPT_TOKENS = 64
PROFILED_PASSES = 10
TREE = 63
PROFILED_TOKENS = 24

Recorded = Callable[[Callable[[], Any], int], list[Span]]
Row = dict[str, Any]


def passes_of(
    run: Run,
    name: str,
    model: Qwen3,
    contexts: Sequence[int],
    passes: Sequence[Pass],
    time_it: TimeIt,
) -> None:
    """Measure the passes of a model into `run`.

    Raises InputError when the cache does not fit."""
    cache = filled_cache(model, contexts, max(map(len, passes)))
    token: float | None = None
    measured = 0
    for m in measure_passes(model, cache, contexts, passes, time_it, run.out_of_time):
        measured += m.what.name != CYCLE
        if m.what.is_token:
            token = m.time.median if m.time else None
        run.passes.append(decode_report.pass_row(name, m, run.read_gb_s, token))
        print(f"  {decode_report.progress(run.passes[-1])}", flush=True)
    run.left_out += len(contexts) * len(passes) - measured


def profiles_of(
    run: Run,
    name: str,
    model: Qwen3,
    contexts: Sequence[int],
    passes: Sequence[Pass],
    recorded: Recorded = record,
) -> None:
    """Profile passes of a model into `run`."""
    cache = filled_cache(model, contexts, max(map(len, passes)))
    for context in contexts:
        for what in passes:
            run.attempt(
                f"profile of {name}, {what.name}, context {context}",
                partial(_profile, run, name, model, cache, what, context, recorded),
            )


@torch.inference_mode()
def _profile(
    run: Run,
    name: str,
    model: Qwen3,
    cache: KVCache,
    what: Pass,
    context: int,
    recorded: Recorded,
) -> None:
    cache.lengths[0] = context
    replay = replayable(launches_of(model, cache, what, context), model.device)
    floor = pass_bytes(model.config, what, context, model.dtype.itemsize) / run.read_gb_s / 1e6
    made = step_profile(recorded(replay, PROFILED_PASSES), PROFILED_PASSES)
    run.profiles.append(decode_report.profile_row(name, what.name, context, made, round(floor, 4)))


def generate_with(run: Run, name: str, model: Qwen3, prompt: Sequence[int], new_tokens: int) -> None:
    """tokens/s of model.generate, plainly and with two-pass chains; of two runs the second, since the first
    captures."""
    texts: list[list[int]] = []
    for strategy, kind in (("autoregressive", PLAIN), ("two-pass", CHAIN)):
        for _ in range(2):
            result = model.generate(prompt, strategy, new_tokens, seed=0, tree_nodes=0).whole()
        texts.append(result.token_ids)
        s, graphs = result.stats, model.use_graphs
        run.generate.append({
            "model": name, "strategy": strategy, "captured": "cycles" if graphs else "nothing",
            "prompt_tokens": len(prompt),
            "host_us_per_cycle": cycle_host_us(model, kind) if graphs else None,
            "tokens": s.tokens, "seconds": round(s.seconds, 4),
            "tokens_per_second": round(s.tokens / s.seconds, 2),
            "ms_per_cycle": round(s.seconds * 1e3 / max(s.cycles, 1), 4),
            "tokens_per_cycle": round(s.tokens_per_cycle, 4),
            "identical": result.token_ids == texts[0],
        })  # fmt: skip


def again(model: Qwen3, kind: int) -> Callable[[], None]:
    """Launches the newest cycle of a kind once more; behind the end of a text that changes nothing."""
    slot = model.engine.runner
    assert slot is not None, "after a text"
    return partial(slot.cycles.again, kind)


@torch.inference_mode()
def cycle_host_us(model: Qwen3, kind: int) -> float:
    """Median µs of the host's time to launch a cycle of a kind."""
    return host_time(again(model, kind), model.device)


def memory_of(run: Run, name: str, model: Qwen3, context: int, new_tokens: int = 64) -> None:
    """Peak memory of a whole two-pass generation of `new_tokens`, every kind of cycle in it, behind a long
    prompt."""
    rng = random.Random(0)
    prompt = [rng.randrange(model.config.vocab_size - 1) for _ in range(context - new_tokens)]
    model.engine.forget()
    before = torch.cuda.memory_allocated(model.device) - weights_bytes(model)
    torch.cuda.reset_peak_memory_stats(model.device)
    model.generate(prompt, "two-pass", new_tokens, seed=0).whole()
    assert model.engine.runner is not None
    cache = model.engine.runner.cache
    run.memory.append({
        "model": name, "context": context, "weights_bytes": weights_bytes(model),
        "cache_bytes": cache.keys.nbytes + cache.values.nbytes,
        "peak_bytes": torch.cuda.max_memory_allocated(model.device) - before,
    })  # fmt: skip
    model.engine.forget()


def weights_bytes(model: Qwen3) -> int:
    """Bytes of all parameters, the embedding and both views included."""
    return sum(weight.nbytes for weight in model.destinations().values())


def random_prompt(model: Qwen3) -> list[int]:
    """PROMPT_TOKENS token ids."""
    return [(7919 * i + 11) % (model.config.vocab_size - 1) for i in range(PROMPT_TOKENS)]


def embedded_prompt(model: Qwen3) -> list[int]:
    """The first PROMPT_TOKENS tokens of the first held-out prompt that has so many."""
    assert model.text is not None
    ids = (model.text.encode(text) for text in read_prompts(EMBEDDED / "held_out.jsonl"))
    return next(tokens[:PROMPT_TOKENS] for tokens in ids if len(tokens) >= PROMPT_TOKENS)


def choice_rows(
    name: str, model: Qwen3, prompt: Sequence[int], time_it: Callable[[Callable[[], Any]], Timing]
) -> list[Row]:
    """A row for each draft and choice, for JSON. time_it: times a call that is a replay already; what it
    times are cycles behind the end of a text, which do all the work and change nothing."""
    rows: list[Row] = []
    for nodes in (0, TREE):
        for choice in ("greedy", "sampled"):
            row: Row = {"model": name, "nodes": nodes, "choice": choice}
            text = _text(model, prompt, row)
            text(), text()  # the second captures nothing more
            with torch.inference_mode():
                us = time_it(again(model, nodes))
            rows.append(row | {"us": asdict(us), "tree_kernels_us": {}, "share": None})
    return rows


def add_kernels(
    rows: Sequence[Row], model: Qwen3, prompt: Sequence[int], recorded: Recorded = record
) -> None:
    """Into the rows of a model: the kernels that grow, walk and commit, medians over the cycles of a text."""
    for row in rows:
        text = _text(model, prompt, row)
        text(), text()
        around = kernel_us(recorded(text, 1))
        row |= {"tree_kernels_us": around, "share": round(sum(around.values()) / row["us"]["median"], 5)}


def _text(model: Qwen3, prompt: Sequence[int], row: Row) -> Callable[[], Any]:
    settings = SAMPLED if row["choice"] == "sampled" else {}
    return lambda: model.generate(
        prompt, "two-pass", PROFILED_TOKENS, seed=0, tree_nodes=row["nodes"], **settings
    ).whole()


def kernel_us(spans: Sequence[Span]) -> dict[str, float]:
    """Median µs of each of TREE_KERNELS that ran."""
    times = {k: [s.end - s.start for s in spans if s.name.startswith(k)] for k in TREE_KERNELS}
    return {k: round(statistics.median(t), 3) for k, t in times.items() if t}
