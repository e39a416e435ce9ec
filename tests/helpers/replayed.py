"""Passes of one shape from the same tensors, on a GPU as a CUDA graph: what cycles do with theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from orthrus_kernels import PassPlan, Rows
from qwen3_model.decode.graphs import captured
from qwen3_model.kv_cache import KVCache
from qwen3_model.model import Network, Output


class Replayed:
    """Passes over one cache. The first one of a shape is launched kernel by kernel; without graphs, so are
    the others."""

    def __init__(self, model: Network, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None
        self.passes: dict[Any, _OneShape] = {}

    @torch.inference_mode()
    def forward(self, rows: Rows, logits_of: Sequence[int] | None = None) -> Output:
        """As `Network.forward`; valid until the next pass of this shape."""
        plan = PassPlan.of(rows, self.model.device)
        wanted = torch.tensor(list(range(len(rows)) if logits_of is None else logits_of)).to(plan.tokens)
        key = plan.shape, len(wanted)
        if key not in self.passes:
            self.passes[key] = _OneShape(self.model, self.cache, rows, wanted)
            return self.passes[key].run()
        return self.passes[key].again(plan, wanted, self.pool)


class _OneShape:
    def __init__(self, model: Network, cache: KVCache, rows: Rows, wanted: torch.Tensor) -> None:
        self.model, self.cache = model, cache
        self.given = model.new_pass(rows, cache, logits_of=wanted)
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self) -> Output:
        self.model.ops.lay(self.given.plan, self.given.tables)
        states, keys, values = self.model.states(self.given, self.cache)
        logits = self.model.ops.linear(states, self.model.head, out_dtype=torch.float32)
        self.out = Output(logits, states, keys, values)
        return self.out

    def again(self, plan: PassPlan, wanted: torch.Tensor, pool: Any) -> Output:
        for field in fields(plan):
            if field.name != "shape":
                getattr(self.given.plan, field.name).copy_(getattr(plan, field.name))
        self.given.logits_of.copy_(wanted)
        if pool is None:
            return self.run()
        self.graph = self.graph or captured(self.run, pool)
        self.graph.replay()
        return self.out
