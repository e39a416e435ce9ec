"""vLLM on dummy weights at a Qwen3 shape, beside `bench.decode --batch`.

It runs in a process of its own, so that its memory goes away with it. A step's time is the difference of two
generations of other lengths over the difference of the lengths: starting and reading prompts is in neither.
The process reads what to measure as JSON from stdin and prints a JSON line for each result."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

NAME = "vllm"
NOT_INSTALLED = "vLLM is not installed here: there are no figures of it"
SHORT, LONG, ROUNDS = 64, 192, 3  # new tokens of the two generations, and how often
ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_USE_FLASHINFER_SAMPLER": "0"}  # fmt: skip
Generate = Callable[[Sequence[tuple[int, int]]], float]  # lengths of prompts and texts -> seconds


def installed() -> bool:
    """Whether vLLM can be imported."""
    return importlib.util.find_spec(NAME) is not None


def measured(
    spec: dict[str, Any], seconds: float, command: Sequence[str] = (sys.executable, "-m", "bench.vllm_peer")
) -> tuple[list[dict[str, Any]], str]:
    """(rows, what went wrong or nothing) of a process that measures `spec`: config, of Hugging Face's kind;
    contexts and texts, all pairs of which are measured; jobs; rounds, pairs of texts and the jobs that they
    decode in rounds. It ends after so many seconds, and what it has measured until then is returned."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code = subprocess.run(
                command, input=json.dumps(spec), stdout=out, stderr=err, text=True, timeout=seconds,
                cwd=ROOT, env=os.environ | ENVIRONMENT,
            ).returncode  # fmt: skip
            wrong = f"it ended with exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            wrong = f"it was ended after {seconds:.0f} s"
        out.seek(0), err.seek(0)
        rows = [json.loads(line) for line in out if line.startswith('{"peer"')]
        last = next((line.strip() for line in reversed(err.readlines()) if line.strip()), "")
    return rows, f"{wrong}: {last[:160]}" if wrong else ""


def steps(generate: Generate, texts: int, context: int) -> dict[str, Any]:
    """A step of so many texts behind prompts of `context` tokens: median of ROUNDS."""
    generate([(context, 8)] * texts)
    rounds = [
        (generate([(context, LONG)] * texts) - generate([(context, SHORT)] * texts)) / (LONG - SHORT)
        for _ in range(ROUNDS)
    ]
    step = median(rounds)
    return {"measure": "steady", "texts": texts, "context": context, "ms_per_cycle": round(1e3 * step, 4),
            "tokens_per_second": round(texts / step, 1)}  # fmt: skip


def whole(generate: Generate, texts: int, jobs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """All jobs, their prompts inside the clock, behind a first generation of two for each text."""
    generate(jobs[: 2 * texts])
    seconds, tokens = generate(jobs), sum(new for _, new in jobs)
    return {"measure": "jobs", "texts": texts, "jobs": len(jobs), "tokens": tokens,
            "seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds, 1)}  # fmt: skip


def in_rounds(generate: Generate, texts: int, jobs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """All jobs, so many at a time: the next ones begin when the last of them has ended. Their prompts are
    inside the clock."""
    generate(jobs[:texts])
    seconds = sum(generate(jobs[i : i + texts]) for i in range(0, len(jobs), texts))
    tokens = sum(new for _, new in jobs)
    return {"measure": "rounds", "texts": texts, "jobs": len(jobs), "tokens": tokens,
            "seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds, 1)}  # fmt: skip


def main() -> int:
    """Measure what stdin says."""
    spec, rng = json.load(sys.stdin), random.Random(0)
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(spec["config"]))
        in_all = [job for _, jobs in spec["rounds"] for job in jobs]
        most = max(map(sum, [*spec["jobs"], *in_all, *((context, LONG) for context in spec["contexts"])]))
        llm = vllm.LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=most + 64,
            gpu_memory_utilization=0.9, dtype="bfloat16", max_num_seqs=max(spec["texts"]),
            enable_prefix_caching=False,
        )  # fmt: skip

        def generate(lengths: Sequence[tuple[int, int]]) -> float:
            prompts = [{"prompt_token_ids": [rng.randrange(1000, 150000) for _ in range(n)]}
                       for n, _ in lengths]  # fmt: skip
            asked = [
                vllm.SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
                for _, new in lengths
            ]
            began = time.perf_counter()
            llm.generate(prompts, asked, use_tqdm=False)
            return time.perf_counter() - began

        for context in spec["contexts"]:
            for texts in spec["texts"]:
                say(steps(generate, texts, context), vllm.__version__)
        if spec["jobs"]:
            say(whole(generate, max(spec["texts"]), spec["jobs"]), vllm.__version__)
        for texts, jobs in spec["rounds"]:
            say(in_rounds(generate, texts, jobs), vllm.__version__)
    return 0


def say(row: dict[str, Any], version: str) -> None:
    """A result on a line of its own."""
    print(json.dumps({"peer": f"{NAME} {version}"} | row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
