"""A warm start on a GPU with an empty Triton cache: ready in time, then nothing is compiled or captured for
the texts that come, and another process finds all kernels.

ORTHRUS_WARM_TEXTS: how many texts come behind it (100); `-s` shows the figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qwen3_model
from qwen3_model.decode.warm import FEW

TEXTS = int(os.environ.get("ORTHRUS_WARM_TEXTS", "100"))
SLOTS, READY = 16, 25.0  # s, on 16 cores
COUNTS = """
import json, random, sys, time
import triton
from qwen3_model import Engine, Qwen3, Request
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.decode import many

compiled = []

def note(cache_hit, src, **told):
    if not cache_hit:
        compiled.append(src.name)

triton.knobs.compilation.listener = note
model = Qwen3.from_pretrained(EMBEDDED, "cuda", "bfloat16", progress=False)
"""
SEVERAL = """
texts, slots = map(int, sys.argv[1:])
began = time.perf_counter()
engine = Engine(model, slots, 1 << 16)
done = engine.warm()
ready, ahead = time.perf_counter() - began, len(compiled)
rng, settings = random.Random(5), (
    {}, {"temperature": 0.8}, {"temperature": 0.7, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.05}, {"temperature": 0.9, "top_p": 0.9}, {"repetition_penalty": 1.2},
    {"temperature": 0.8, "repetition_penalty": 1.1}, {"logit_bias": {9: -5.0, 11: 2.0}},
    {"temperature": 0.8, "top_k": 500, "logit_bias": {3: float("-inf")}},
)

def job(nth):
    prompt = [rng.randrange(4, 2000) for _ in range(rng.choice([1, 5, 17, 40, 120, 300, 900, 2500]))]
    how = {"strategy": rng.choice(["auto", "autoregressive", "two-pass"]), "seed": nth}
    return prompt, Request(max_new_tokens=rng.randrange(1, 90), **how, **rng.choice(settings))

graphs = lambda: len(engine.runner.cycles) + len(engine.runner.prompts)
before = graphs()
reasons = [result.stats.finish_reason for result in many.results(engine, map(job, range(texts)))]
print(json.dumps({
    "ready": ready, **done.to_dict(), "in_this_process": ahead, "later": compiled[ahead:],
    "graphs_before": before, "graphs_after": graphs(), "texts": len(reasons),
    "errors": reasons.count("error"),
}))
"""
ALONE = """
done = model.engine.warm() if sys.argv[1] == "warm" else None
began = time.perf_counter()
for how in ({}, {"temperature": 0.8}, {"temperature": 0.7, "top_k": 20, "top_p": 0.95}):
    for prompt in ([5, 6, 7], [9] * 700):
        model.generate(prompt, max_new_tokens=60, seed=1, **how)
seconds = time.perf_counter() - began
print(json.dumps({"warm": done and done.to_dict(), "compiled": compiled, "seconds": seconds}))
"""


def run(code: str, cache: Path, *arguments: object) -> dict:
    """What a process with this Triton cache says."""
    env = os.environ | {
        "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(Path(qwen3_model.__file__).parents[1]),
    }  # fmt: skip
    command = [sys.executable, "-c", COUNTS + code, *map(str, arguments)]
    said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    assert said.returncode == 0, said.stderr[-3000:]
    return json.loads(said.stdout.splitlines()[-1])


def test_nothing_is_compiled_or_captured_behind_a_warm_start(tmp_path):
    found = run(SEVERAL, tmp_path, TEXTS, SLOTS)
    print(f"\n{found}")
    assert found["texts"] == TEXTS and found["errors"] == 0
    assert found["compiled"] > 50 and found["graphs"] == found["graphs_before"] > 50
    assert found["later"] == [] and found["graphs_after"] == found["graphs_before"]
    assert found["in_this_process"] <= FEW, "what the processes have compiled is found"
    again = run(SEVERAL, tmp_path, 1, SLOTS)
    assert again["compiled"] == again["in_this_process"] == 0, again
    if len(os.sched_getaffinity(0)) < 16:
        pytest.skip(f"ready in {found['ready']:.1f} s: the bar is for 16 cores")
    assert found["ready"] <= READY


def test_one_slot(tmp_path):
    """`orthrus warm` and then a text in another process; and a text that comes without it."""
    first = run(ALONE, tmp_path / "a", "warm")
    assert first["compiled"] == [] and first["warm"]["compiled"] > 30, first
    later = run(ALONE, tmp_path / "a", "texts")
    assert later["compiled"] == [], later
    print(f"\n{first}\n{later}")
    alone = run(ALONE, tmp_path / "b", "texts")
    assert len(alone["compiled"]) <= 6 * FEW, "of six texts; the others came before their prompts"
