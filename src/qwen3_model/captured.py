"""Passes of one shape as CUDA graphs: a replay costs the host one launch in place of a hundred.

Two passes have the same shape when every launch of theirs does: the same `PassShape` and the same rows'
logits. Decoding repeats a few shapes: one row, a chain, a block. Lengths, positions and tokens are numbers in
device tables, so a graph serves any of them, with the bits of a plain launch: it is the same kernels on the
same numbers."""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from orthrus_kernels import PassPlan

from .decode.device import DeviceCycles
from .graphs import capturing
from .pass_inputs import PassInputs

if TYPE_CHECKING:
    from .kv_cache import KVCache
    from .model import Output, Qwen3

MOST_GRAPHS = 128  # of a cache; the one not used for longest goes first
SPARE_STEP = 1024  # capacities of caches that are kept are multiples of it
MOST_ROWS = 256  # of a pass that is captured: longer ones, prompts, keep the GPU busy by themselves


@contextmanager
def lent_cache(model: Qwen3, capacity: int) -> Iterator[KVCache]:
    """An empty cache of at least `capacity` positions for one generation. With graphs, the last one's memory
    again where that is enough: its graphs stay good.
    """
    if not model.use_graphs:
        yield model.new_cache(capacity)
        return
    cache, model.spare_cache = model.spare_cache, None
    if cache is None or cache.capacity < capacity:
        cache = None  # frees the memory before more is taken
        cache = model.new_cache(-(-capacity // SPARE_STEP) * SPARE_STEP)
        cache.passes, cache.cycles = CapturedPasses(model, cache), DeviceCycles(model, cache)
    cache.lengths = [0]
    try:
        yield cache
    finally:
        model.spare_cache = cache


class CapturedPasses:
    """The graphs of passes over one cache. On a CPU passes run from the same fixed inputs, uncaptured."""

    def __init__(self, model: Qwen3, cache: KVCache) -> None:
        # weak: the cache owns its passes and the model the cache, and their memory is to go when they go
        self._model, self._cache = weakref.proxy(model), weakref.proxy(cache)
        self._seen: Counter[tuple] = Counter()
        self._graphs: OrderedDict[tuple, tuple[PassInputs, torch.cuda.CUDAGraph | None, Output | None]] = (
            OrderedDict()
        )
        self._pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    def __len__(self) -> int:
        """How many shapes are captured."""
        return len(self._graphs)

    def run(self, plan: PassPlan, logits_of: Sequence[int] | None) -> Output:
        """The pass of a plan, which is on the CPU. The output is valid until the next pass.

        A shape is captured when it comes for the second time: by then its kernels are compiled."""
        shape = plan.shape, None if logits_of is None else tuple(logits_of)
        self._seen[shape] += 1
        if plan.shape.n_rows > MOST_ROWS or self._seen[shape] == 1:
            inputs = self._model.pass_inputs(plan.on(self._model.device), self._cache, logits_of)
            return self._model.compute(inputs, self._cache)
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(plan, logits_of)
            while len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(shape)
        fixed, graph, output = self._graphs[shape]
        fixed.put(plan)
        if graph is None or output is None:
            return self._model.compute(fixed, self._cache)
        graph.replay()
        return output

    def _capture(
        self, plan: PassPlan, logits_of: Sequence[int] | None
    ) -> tuple[PassInputs, torch.cuda.CUDAGraph | None, Output | None]:
        fixed = self._model.pass_inputs(plan.on(self._model.device), self._cache, logits_of)
        if self._pool is None:
            return fixed, None, None
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self._pool):
            output = self._model.compute(fixed, self._cache)
        return fixed, graph, output
