"""A real server on a GPU, 64 requests at a time: each of ORTHRUS_REQUESTS (100) of mixed settings is answered
with the texts that it has decoded alone, and so are those whose clients stay where a third goes. `-s` shows
the counts. Beside what the tests of this folder need: fastapi, uvicorn and prometheus_client."""

from __future__ import annotations

import asyncio
import os
import time

import pytest
from serve_load import mixed, run
from serve_process import ServeProcess

from qwen3_model import Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.prompts import read_prompts

REQUESTS = int(os.environ.get("ORTHRUS_REQUESTS", 100))
AT_ONCE, TOKENS = 64, 96
OPTIONS = (
    "--device", "cuda", "--dtype", "bfloat16", "--slots", AT_ONCE, "--cache-tokens", AT_ONCE * 1024,
    "--max-waiting", 1000, "--generation-config", "none",
)  # fmt: skip


def test_requests_are_answered_as_alone(tmp_path):
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(name)
    began = time.perf_counter()
    prompts = read_prompts(EMBEDDED / "held_out.jsonl", 60, None, "test")
    model = Qwen3.from_pretrained(EMBEDDED, "cuda", "bfloat16", progress=False)
    jobs = [(asked, asked.alone(model)) for asked in mixed(prompts, REQUESTS, TOKENS)]
    model.engine.forget()
    print(f"\n{REQUESTS} requests decoded alone in {time.perf_counter() - began:.0f} s")
    with ServeProcess(tmp_path / "said", *OPTIONS, seconds=300) as server:
        for leave in (0.0, 1 / 3):
            tally = asyncio.run(run(server.port, jobs, AT_ONCE, leave))
            print(f"{REQUESTS} requests, {AT_ONCE} at a time: {tally}")
            assert tally.equal + tally.gone == REQUESTS, tally.wrong[:2]
            assert (tally.gone > 0) == (leave > 0)
            server.wait_until_idle()
        assert server.end() == 0 and "Traceback" not in server.said
