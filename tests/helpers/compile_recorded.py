"""Record what engines launch on an H100 that is not here, compile a few kernels of it in other processes, and
print one JSON line a question. Run by test_compile_ahead.py without TRITON_INTERPRET.

A driver that only says what the GPU is takes the place of Triton's own: nothing of a recording runs."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread

assert not os.environ.get("TRITON_INTERPRET"), "this process compiles"
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
import triton  # noqa: E402
from small import small_config  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from orthrus_kernels.compile_ahead import compile_all, missing, recorded  # noqa: E402
from orthrus_kernels.embedding import embedding_triton  # noqa: E402
from orthrus_kernels.linear_gluon import Plan as Tiles  # noqa: E402
from orthrus_kernels.linear_gluon import linear_gluon  # noqa: E402
from orthrus_kernels.tables.gluon import GluonTile  # noqa: E402
from orthrus_kernels.weight import Weight  # noqa: E402
from qwen3_model import Qwen3, Request  # noqa: E402
from qwen3_model.decode import warm  # noqa: E402
from qwen3_model.decode.warm import Plan, launches, plan_of_engine  # noqa: E402

CAPACITY, SLOTS = 1024, 3


class H100:
    """As much of a driver as a launch asks."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def names(entries) -> dict[str, int]:
    """How many entries each kernel has."""
    found: dict[str, int] = {}
    for entry in entries:
        name = json.loads(entry)["name"].rpartition(".")[2]
        found[name] = found.get(name, 0) + 1
    return found


def main() -> None:
    triton.runtime.driver.set_active(H100())
    config = small_config(num_hidden_layers=3, hidden_size=64, head_dim=64)
    model = Qwen3(config, torch.device("cpu"), torch.bfloat16, "triton", None)
    plan = replace(plan_of_engine(model, SLOTS, CAPACITY), chunks=(16, 256))
    first = launches(model, SLOTS, CAPACITY, plan)
    warm._first_layer = lambda whole: whole
    print(json.dumps({"names": names(first), "whole": first == launches(model, SLOTS, CAPACITY, plan)}))
    plain = Plan((Request(),), (1,), None, 0, (16,))
    print(json.dumps({"plain": names(launches(model, 1, CAPACITY, plain))}))

    weight, ids = torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.int64)
    torch.set_deterministic_debug_mode("warn")  # fresh memory is poisoned
    with recorded() as own:
        out = embedding_triton(weight, ids)
        linear_gluon(
            Tiles(64, 64, 1, GluonTile(16, 1)), weight[:5], Weight(weight), out=torch.empty_like(out)
        )
    asked, launch = [], triton.JITFunction.run
    triton.JITFunction.run = lambda *given, warmup, **named: asked.append(warmup)
    with recorded():
        embedding_triton(weight, ids)
        other = Thread(target=embedding_triton, args=(weight, ids))
        other.start()
        other.join()
    triton.JITFunction.run = launch
    lacked, told, hits = missing(first | own), [], []
    few = [*own, *(next(e for e in lacked if name in e) for name in ("_log_prob", "_row_best"))]
    compile_all([*few, json.dumps({"name": "json.nothing"})], lambda: told.append(1), processes=1)
    triton.knobs.compilation.listener = lambda cache_hit, **named: hits.append(cache_hit)
    kernel = sys.modules["orthrus_kernels.embedding"]._embedding_kernel
    run, kernel.run = kernel.run, lambda *args, warmup, **named: run(*args, warmup=True, **named)
    embedding_triton(weight, ids)
    print(json.dumps({
        "zeros": not out.any(), "lacked": len(lacked), "compiled": len(few), "told": len(told),
        "left": len(missing(first | own)), "still": len(missing(few)), "hits": hits,
        "asked": asked,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
