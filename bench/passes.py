"""The passes of decoding: their rows, the bytes they must read, and how they are measured.

The floor of a pass is the time of reading once what no pass of this kind can do without: the weights of the
views that have rows, with norms and head but without the embedding (a few rows of it), and the keys and
values of the context. What a pass writes, and what it reads of its own rows, is not in it."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from orthrus_kernels import Rows, Weight
from orthrus_kernels.torch_ops import linear_torch
from qwen3_model import Qwen3, Qwen3Config
from qwen3_model.kv_cache import KVCache
from qwen3_model.model import Network

from .command import short
from .measure import Timing, replayable

TimeIt = Callable[[Callable[[], Any]], Timing]  # of a replay; µs

# Largest difference of a peer's logits from ours, over the largest logit: sums in other orders, rounded to
# bf16 in tens of layers. A wrong position, mask or weight is off by about 1.
PEER_TOLERANCE = 0.1
OURS, SDPA = "ours", "cuBLAS + SDPA"
HOST_CALLS, HOST_ROUNDS = 5, 3  # few in a row, so that the launch queue never fills and makes the host wait


@dataclass(frozen=True)
class Pass:
    """A pass over `ar` AR rows, a chain, or a tree if there are blocks on it; then `blocks` diffusion blocks
    of `size` rows. Without AR rows the one block stands at the root."""

    name: str
    ar: int
    blocks: int = 0
    size: int = 0

    def __len__(self) -> int:
        return self.ar + self.blocks * self.size

    @property
    def is_token(self) -> bool:
        """Plain decoding of one token."""
        return (self.ar, self.blocks) == (1, 0)

    def rows(self, config: Qwen3Config, context: int) -> Rows:
        """The rows on `context` committed tokens. The first is the root, the same token in every pass."""
        rng = random.Random(0)
        tokens = [rng.randrange(config.vocab_size) for _ in range(max(self.ar, 1))]
        if not self.ar:
            return Rows.block(tokens[0], self.size, context, config.mask_token_id)
        if not self.blocks:
            return Rows.chain(tokens, context)
        parents = [-1] + [i - 1 if rng.random() < 0.5 else rng.randrange(i) for i in range(1, self.ar)]
        anchors = sorted(rng.sample(range(self.ar), self.blocks))
        return Rows.tree_with_blocks(tokens, parents, context, anchors, self.size, config.mask_token_id)

    @property
    def logits_of(self) -> range | None:
        """The rows whose logits a cycle asks for; None: all. A draft's last row proposes nothing."""
        return None if self.ar else range(self.size - 1)


PASSES = (
    Pass("token", 1), Pass("draft-32", 0, 1, 32), Pass("verify-32", 32), Pass("verify-64", 64),
    Pass("verify-128", 128), Pass("verify-192", 192), Pass("mixed-33+24x6", 33, 24, 6),
)  # fmt: skip
CYCLE = "two-pass"


def weight_bytes(config: Qwen3Config, ar: bool, diffusion: bool, width: int = 2) -> int:
    """Bytes of the weights that a pass with rows of these views reads, `width` bytes a number."""
    model = Qwen3.from_config(config, device="meta", dtype={2: "bfloat16", 4: "float32"}[width])
    read: list[Weight | Tensor] = [model.norm, model.head]
    for layer in model.layers:
        read += [layer.input_norm, layer.post_norm, layer.gate_up, layer.down]
        for view in (layer.ar if ar else None, layer.diffusion if diffusion else None):
            read += [view.qkv, view.o, view.q_norm, view.k_norm] if view else []
    return sum(of.nbytes for of in read)


def context_bytes(config: Qwen3Config, context: int, width: int = 2) -> int:
    """Bytes of the keys and values of `context` tokens."""
    return 2 * width * config.num_hidden_layers * config.num_key_value_heads * context * config.head_dim


def pass_bytes(config: Qwen3Config, what: Pass, context: int, width: int = 2) -> int:
    """Bytes that a pass on `context` committed tokens must read."""
    weights = weight_bytes(config, what.ar > 0, what.blocks > 0, width)
    return weights + context_bytes(config, context, width)


@dataclass
class Measured:
    """A pass on a context: bytes that must be read, times, and a word for what has none."""

    what: Pass
    context: int
    bytes: int
    time: Timing | None = None  # of a replay on the GPU
    launch_us: float | None = None  # the host that launches the replay
    forward_us: float | None = None  # the host in Qwen3.forward: rows copied, every kernel launched
    peers: dict[str, Timing] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def launches_of(model: Network, cache: KVCache, what: Pass, context: int) -> Callable[[], Tensor]:
    """A pass on a cache that holds `context` tokens, as a call that only launches and returns the logits."""
    wanted = None if what.logits_of is None else torch.tensor(what.logits_of, device=model.device)
    given = model.new_pass(what.rows(model.config, context), cache, logits_of=wanted)

    def launch() -> Tensor:
        model.ops.lay(given.plan, given.tables)
        states, _, _ = model.states(given, cache)
        return model.ops.linear(states, model.head, out_dtype=torch.float32)

    return launch


def sdpa_token(model: Qwen3, cache: KVCache, what: Pass, context: int) -> Callable[[], Tensor]:
    """The peer of plain decoding: the same step with cuBLAS for linears and SDPA for attention.

    As everyone decodes: keys lie in the order of their positions, the token's go behind the context, and SDPA
    reads them without a mask; the query heads of a key head are folded into rows, which is faster for one
    token."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, pages: object, tables: object,
        scale: float,
    ) -> Tensor:  # fmt: skip
        k_cache[:, context], v_cache[:, context] = k[0], v[0]
        folded = q.reshape(1, k.shape[1], -1, q.shape[2])
        out = torch.nn.functional.scaled_dot_product_attention(
            folded, k_cache[None], v_cache[None], scale=scale
        )
        return out.reshape(q.shape)

    own = copy.copy(cache)
    own.keys, own.values = cache.read(0, context + 1)
    peer = copy.copy(model)
    peer.ops = replace(model.ops, linear=linear_torch, attention=attention, lay=lambda plan, tables: None)
    return launches_of(peer, own, what, context)


def filled_cache(model: Qwen3, contexts: Sequence[int], room: int) -> KVCache:
    """A cache of random keys and values for the longest context and `room` rows behind it."""
    cache = model.new_cache(max(contexts) + room)
    for numbers in (cache.keys, cache.values):
        for layer in numbers:
            layer.normal_()
    return cache


@torch.inference_mode()
def measure_passes(
    model: Qwen3,
    cache: KVCache,
    contexts: Sequence[int],
    passes: Sequence[Pass],
    time_it: TimeIt,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Iterator[Measured]:
    """Measure every pass on every context, the cycles of draft and chain after each, until time is out.

    Before an AR pass is timed, its root's logits are compared with those of plain decoding, bit for bit;
    where they differ it gets a word and no time."""
    for context in contexts:
        cache.lengths[0] = context
        found: list[Measured] = []
        if out_of_time():
            return
        plain = launches_of(model, cache, Pass("token", 1), context)()[0].clone()
        for what in passes:
            if out_of_time():
                return
            result = Measured(what, context, pass_bytes(model.config, what, context, model.dtype.itemsize))
            try:
                _measure(result, model, cache, plain, time_it)
            except Exception as error:  # one pass that does not fit must not end the run
                result.notes[OURS] = short(error)
            found.append(result)
            yield result
        yield from cycles(found)


def _measure(result: Measured, model: Qwen3, cache: KVCache, plain: Tensor, time_it: TimeIt) -> None:
    """Fill in a result. plain: the root's logits in plain decoding."""
    what, context = result.what, result.context
    launch = launches_of(model, cache, what, context)
    logits = launch()
    if not torch.isfinite(logits).all():
        result.notes[OURS] = "WRONG: logits are not finite"
        return
    if what.ar and not torch.equal(logits[0], plain):
        result.notes[OURS] = "WRONG: the root's logits are not those of plain decoding"
        return
    del logits  # up to 117 MB, which would count as memory of the pass
    replay = replayable(launch, model.device)
    result.time = time_it(replay)
    if model.use_graphs:
        rows = what.rows(model.config, context)
        result.launch_us = host_time(replay, model.device)
        result.forward_us = host_time(lambda: model.forward(rows, cache, what.logits_of), model.device)
    if what.is_token and model.config.quantisation is None:  # cuBLAS would have to widen all codes first
        _measure_peer(result, sdpa_token(model, cache, what, context), plain, time_it)


def _measure_peer(result: Measured, call: Callable[[], Tensor], plain: Tensor, time_it: TimeIt) -> None:
    try:
        off = ((call()[0] - plain).abs().max() / plain.abs().max()).nan_to_num(1.0).item()
        if off > PEER_TOLERANCE:
            result.notes[SDPA] = f"differs by {off:.1%}"
        else:
            result.peers[SDPA] = time_it(replayable(call, plain.device))
    except Exception as error:  # a peer that fails must not end the run
        result.notes[SDPA] = short(error)


def cycles(found: Sequence[Measured]) -> Iterator[Measured]:
    """The published cycle of one context: a draft and the chain of its length, one after the other."""
    for draft in found:
        for chain in found:
            if draft.what.ar or chain.what.blocks or chain.what.ar != draft.what.size:
                continue
            if draft.time is None or chain.time is None:
                continue
            both = draft.time, chain.time
            total = Timing(*(round(sum(getattr(t, n) for t in both), 3) for n in ("median", "p20", "p80")))
            what = Pass(CYCLE, chain.what.ar, 1, draft.what.size)
            yield Measured(
                what, draft.context, draft.bytes + chain.bytes, total,
                _sum(draft.launch_us, chain.launch_us), _sum(draft.forward_us, chain.forward_us),
            )  # fmt: skip


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else round(a + b, 3)


def host_time(call: Callable[[], Any], device: torch.device) -> float:
    """Median µs that the host spends in a call, which is made several times in a row without waiting."""
    call()
    samples = []
    for _ in range(HOST_ROUNDS):
        synchronize(device)
        for _ in range(HOST_CALLS):
            began = time.perf_counter()
            call()
            samples.append((time.perf_counter() - began) * 1e6)
    synchronize(device)
    return round(statistics.median(samples), 3)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
