"""A run of `bench.decode`: passes, memory, profiles and tokens/s of one model after another."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from qwen3_model import Qwen3
from qwen3_model.captured import MOST_ROWS
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.kv_cache import KVCache
from qwen3_model.model import PREFILL_ROWS
from qwen3_model.prompts import read_prompts

from . import decode_report
from .command import short
from .decode_choice import choice_table
from .measure import replayable
from .passes import (
    CYCLE,
    OURS,
    Pass,
    TimeIt,
    calls_of,
    filled_cache,
    host_time,
    measure_passes,
    pass_bytes,
)  # fmt: skip
from .step_profile import Span, record, step_profile

PROMPT_TOKENS = 64
PROFILED_PASSES = 10


class Run:
    """Everything measured so far, ready for JSON."""

    def __init__(self, read_gb_s: float, seconds_left: Callable[[], float]) -> None:
        self.read_gb_s, self.seconds_left = read_gb_s, seconds_left
        self.passes: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = []
        self.generate: list[dict[str, Any]] = []
        self.choices: list[dict[str, Any]] = []
        self.profiles: list[dict[str, Any]] = []
        self.peers: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.left_out = 0
        self.failed = False

    @property
    def wrong(self) -> bool:
        """Whether something of ours failed, or a pass or a text was not what it must be."""
        passes, texts = (OURS not in r["notes"] for r in self.passes), (r["identical"] for r in self.generate)
        return self.failed or not all(passes) or not all(texts)

    def tables(self) -> list[decode_report.Table]:
        """All tables, in order."""
        r = decode_report
        return [*r.pass_tables(self.passes), *r.memory_table(self.memory), *r.generate_table(self.generate),
                *choice_table(self.choices), *r.profile_tables(self.profiles)]  # fmt: skip

    def to_json(self, machine: dict[str, Any]) -> dict[str, Any]:
        """The whole run."""
        return {
            "machine": machine, "roof": {"read_gb_s": round(self.read_gb_s, 1)}, "passes": self.passes,
            "memory": self.memory, "generate": self.generate, "choices": self.choices,
            "profiles": self.profiles, "peers": self.peers, "notes": self.notes, "left_out": self.left_out,
        }  # fmt: skip

    def out_of_time(self) -> bool:
        """Whether nothing more is to be started."""
        return self.seconds_left() <= 0

    def attempt(self, what: str, work: Callable[[], None], seconds: float = 0, is_peer: bool = False) -> None:
        """Do it, unless fewer seconds are left than that; a failure leaves a note and the run goes on."""
        if self.seconds_left() <= seconds:
            self.notes.append(f"{what}: no time left")
            return
        try:
            work()
        except Exception as error:
            self.notes.append(f"{what}: {short(error)}")
            self.failed |= not is_peer


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
    recorded: Callable[[Callable[[], Any], int], list[Span]] = record,
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
    recorded: Callable[[Callable[[], Any], int], list[Span]],
) -> None:
    cache.lengths[0] = context
    replay = replayable(calls_of(model, cache, what, context).device, model.device)
    floor = pass_bytes(model.config, what, context, model.dtype.itemsize) / run.read_gb_s / 1e6
    made = step_profile(recorded(replay, PROFILED_PASSES), PROFILED_PASSES)
    run.profiles.append(decode_report.profile_row(name, what.name, context, made, round(floor, 4)))


def generate_with(run: Run, name: str, model: Qwen3, prompt: Sequence[int], new_tokens: int) -> None:
    """tokens/s of model.generate by both strategies, with passes captured one by one and with whole cycles
    captured where the model can; of two runs the second, since the first captures."""
    texts: list[list[int]] = []
    default = model.use_cycles
    try:
        for strategy in ("autoregressive", "two-pass"):
            for captured in ("passes", "cycles") if model.use_graphs else ("nothing",):
                model.use_cycles = captured == "cycles"
                for _ in range(2):
                    result = model.generate(prompt, strategy, new_tokens, seed=0, tree_nodes=0).whole()
                texts.append(result.token_ids)
                s = result.stats
                host_us = cycle_host_us(model) if captured == "cycles" else None
                run.generate.append({
                    "model": name, "strategy": strategy, "captured": captured, "prompt_tokens": len(prompt),
                    "host_us_per_cycle": host_us,
                    "tokens": s.tokens, "seconds": round(s.seconds, 4),
                    "tokens_per_second": round(s.tokens / s.seconds, 2),
                    "ms_per_cycle": round(s.seconds * 1e3 / max(s.cycles, 1), 4),
                    "tokens_per_cycle": round(s.tokens_per_cycle, 4),
                    "identical": result.token_ids == texts[0],
                })  # fmt: skip
    finally:
        model.use_cycles = default


def cycle_host_us(model: Qwen3) -> float:
    """Median µs of the host's time to launch a captured cycle of the last generation; what that launches
    comes after its end and changes nothing."""
    assert model.spare_cache is not None and model.spare_cache.cycles is not None
    with torch.inference_mode():
        return host_time(model.spare_cache.cycles.again, model.device)


def memory_of(run: Run, name: str, model: Qwen3, context: int, new_tokens: int = 64) -> None:
    """Peak memory of a whole two-pass generation of `new_tokens`, every kind of cycle in it, behind a long
    prompt. The last chunk of the
    prompt has 256 rows, the most of a captured pass."""
    rng = random.Random(0)
    chunks = max((context - new_tokens - MOST_ROWS) // PREFILL_ROWS, 0)
    length = chunks * PREFILL_ROWS + MOST_ROWS
    prompt = [rng.randrange(model.config.vocab_size - 1) for _ in range(min(length, context - new_tokens))]
    model.spare_cache = None
    before = torch.cuda.memory_allocated(model.device) - weights_bytes(model)
    torch.cuda.reset_peak_memory_stats(model.device)
    model.generate(prompt, "two-pass", new_tokens, seed=0).whole()
    assert model.spare_cache is not None
    run.memory.append({
        "model": name, "context": context, "weights_bytes": weights_bytes(model),
        "cache_bytes": model.spare_cache.keys.nbytes + model.spare_cache.values.nbytes,
        "peak_bytes": torch.cuda.max_memory_allocated(model.device) - before,
    })  # fmt: skip
    model.spare_cache = None


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
