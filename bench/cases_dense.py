"""Cases of what multiplies matrices, linears, head and attention, beside the libraries that do the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from orthrus_kernels import PAGE, PassPlan, Rows, Weight, backend_ops, in_order, pages_for, tables
from orthrus_kernels.head import head_entry
from orthrus_kernels.linear_swiglu import swiglu_entry
from orthrus_kernels.swiglu import swiglu_triton

from .measure import OURS, Call, NotRun, Pool
from .models import Shape

KERNELS = backend_ops("triton")
LIKELIEST = 16  # tokens of a row that a draft tree asks for


def weight_bytes(n: int, k: int) -> int:
    """Bytes that a product with a weight [N, K] of bf16 reads."""
    return Weight(torch.empty(n, k, dtype=torch.bfloat16, device="meta")).nbytes


def linear_cases(shape: Shape, rows: Sequence[int], contexts: Sequence[int], device: str) -> Iterator[dict]:
    for name, (n, k) in shape.weights().items():
        entry = tables.linear_entry(n, k, torch.bfloat16, device)
        for t in rows:
            yield {
                "name": name, "rows": t, "context": None, "bytes": weight_bytes(n, k) + 2 * (t * k + t * n),
                "flops": 2 * t * n * k, "build": partial(linear, n, k, t),
                "kernel": ("linear", entry.block_k, entry.segments, entry.tile(t)),
            }  # fmt: skip


def linear(n: int, k: int, t: int, pool: Pool) -> tuple[int, dict[str, Call | NotRun]]:
    """x [t, K] by weight [N, K]; peer: cuBLAS."""
    x = pool.take(t, k)
    out, peer_out = (torch.empty(t, n, dtype=x.dtype, device=x.device) for _ in range(2))
    copies = pool.copies(n * k)
    weights = [Weight(pool.take(n, k)) for _ in range(copies)]
    return copies, {
        OURS: lambda i: KERNELS.linear(x, weights[i], out=out),
        "cuBLAS": lambda i: torch.mm(x, weights[i].dense().t(), out=peer_out),
    }


def linear_swiglu_cases(
    shape: Shape, rows: Sequence[int], contexts: Sequence[int], device: str
) -> Iterator[dict]:
    f, e = shape.F, shape.E
    entry = swiglu_entry(2 * f, e, torch.bfloat16, device)
    for t in rows:
        yield {
            "name": "", "rows": t, "context": None, "bytes": weight_bytes(2 * f, e) + 2 * (t * e + t * f),
            "flops": 4 * t * f * e, "build": partial(linear_swiglu, f, e, t),
            "kernel": ("linear_swiglu", entry.block_k, entry.segments, entry.tile(t)),
        }  # fmt: skip


def linear_swiglu(f: int, e: int, t: int, pool: Pool) -> tuple[int, dict[str, Call | NotRun]]:
    """x [t, E] by gate_up [2F, E]; peers: our two kernels in turn, whose bits it has, and cuBLAS with torch's
    silu and product."""
    x = pool.take(t, e)
    out, two_out = (torch.empty(t, f, dtype=x.dtype, device=x.device) for _ in range(2))
    own_wide, peer_wide = (torch.empty(t, 2 * f, dtype=x.dtype, device=x.device) for _ in range(2))
    copies = pool.copies(2 * f * e)
    weights = [Weight(pool.take(2 * f, e)) for _ in range(copies)]

    def two_kernels(i: int) -> Tensor:
        return swiglu_triton(KERNELS.linear(x, weights[i], out=own_wide), out=two_out)

    def chain(i: int) -> Tensor:
        gate, up = torch.mm(x, weights[i].dense().t(), out=peer_wide).chunk(2, -1)
        return F.silu(gate) * up

    return copies, {
        OURS: lambda i: KERNELS.linear_swiglu(x, weights[i], out=out),
        "two kernels": two_kernels,
        "cuBLAS + torch": chain,
    }


def head_cases(shape: Shape, rows: Sequence[int], contexts: Sequence[int], device: str) -> Iterator[dict]:
    entry = head_entry(shape.V, shape.E, torch.bfloat16, device)
    for k in (1, LIKELIEST):
        for t in rows:
            yield {
                "name": f"k {k}", "rows": t, "context": None,
                "bytes": weight_bytes(shape.V, shape.E) + 2 * t * shape.E + t * (12 * k + 4),
                "flops": 2 * t * shape.V * shape.E,
                "build": partial(head, shape.V, shape.E, k, t),
                "kernel": ("head", shape.V, shape.E, k, entry.tile(t)),
            }  # fmt: skip


def head(v: int, e: int, k: int, t: int, pool: Pool) -> tuple[int, dict[str, Call | NotRun]]:
    """Logits of the k likeliest tokens and log-sum-exp; peer: cuBLAS, topk and logsumexp on its logits in
    bf16. Ids are left out of the comparison: such logits are often equal."""
    x = pool.take(t, e)
    out = tuple(torch.empty(t, k, dtype=d, device=pool.device) for d in (torch.float32, torch.int64))
    out = *out, torch.empty(t, dtype=torch.float32, device=pool.device)
    copies = pool.copies(v * e)
    weights = [Weight(pool.take(v, e)) for _ in range(copies)]

    def ours(i: int) -> tuple[Tensor, Tensor]:
        values, _, log_sum_exp = KERNELS.head(x, weights[i], k, out=out)
        return values, log_sum_exp

    def chain(i: int) -> tuple[Tensor, Tensor]:
        logits = torch.mm(x, weights[i].dense().t()).float()
        return logits.topk(k).values, logits.logsumexp(-1)

    return copies, {OURS: ours, "torch chain": chain}


def attention_cases(
    shape: Shape, rows: Sequence[int], contexts: Sequence[int], device: str
) -> Iterator[dict]:
    h, g, d = shape.H, shape.G, shape.D
    for context in contexts:
        for t in rows:
            yield {
                "name": "", "rows": t, "context": context,
                "bytes": 2 * d * (2 * g * (context + t) + 2 * h * t),
                "flops": 4 * d * h * (t * context + t * (t + 1) // 2),
                "build": partial(attention, h, g, d, t, context), "kernel": ("attention", h // g, d, t > 8),
            }  # fmt: skip


SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def attention(
    h: int, g: int, d: int, t: int, context: int, pool: Pool
) -> tuple[int, dict[str, Call | NotRun]]:
    """A chain of t rows in flight on `context` cached positions; each call returns its last row's [H, D].

    Peers read a cache without pages, the chain's keys in it too, behind the context. SDPA runs without a
    mask, so that its rows see the chain's later keys as well, a little work more and no mask to read; only
    the last row, which sees everything, is the same. FlexAttention has the causal mask. "folded": query heads
    of one key head as rows.
    """
    q, k, v = (pool.take(t, heads, d) for heads in (h, g, g))
    n = pages_for(context + t)
    copies = pool.copies(4 * n * g * PAGE * d)
    pages = torch.randperm(n, device=pool.device, dtype=torch.int32)[None]
    pools = [[pool.take(n, g, PAGE, d) for _ in "kv"] for _ in range(copies)]
    caches = [[pool.take(1, g, context + t, d) for _ in "kv"] for _ in range(copies)]
    for both, paged in zip(caches, pools, strict=True):
        for cache, of, flight in zip(both, paged, (k, v), strict=True):
            cache[0] = in_order(of, pages[0], 0, context + t)
            cache[0, :, context:] = flight.transpose(0, 1)
    plan = PassPlan.of(Rows.chain([0] * t, context), pool.device)
    laid = KERNELS.new_tables(plan.shape, context + t, h, g, d, q.dtype, pool.device)
    KERNELS.lay(plan, laid)
    out = torch.empty_like(q)
    plain = q.transpose(0, 1)[None]  # [1, H, T, D]
    folded = q.view(t, g, h // g, d).permute(1, 0, 2, 3).reshape(1, g, t * (h // g), d)

    def ours(i: int) -> Tensor:
        return KERNELS.attention(q, k, v, *pools[i], pages, laid, d**-0.5, out=out)[-1]

    def sdpa(backend: SDPBackend, i: int) -> Tensor:
        k, v = caches[i]
        with sdpa_kernel(backend):
            got = F.scaled_dot_product_attention(plain, k, v, scale=d**-0.5, enable_gqa=h > g)
        return got[0, :, -1]

    def sdpa_folded(backend: SDPBackend, i: int) -> Tensor:
        k, v = caches[i]
        with sdpa_kernel(backend):
            got = F.scaled_dot_product_attention(folded, k, v, scale=d**-0.5)
        return got.view(g, t, h // g, d)[:, -1].reshape(h, d)

    calls: dict[str, Call | NotRun] = {OURS: ours}
    for name, backend in SDPA.items():
        calls[name] = partial(sdpa, backend)
        calls[f"{name} folded"] = partial(sdpa_folded, backend)
    calls["flex"] = flex(plain, caches, context) if t in (1, 32, 128) else "1, 32 and 128 rows only"
    return copies, calls


def flex(q: Tensor, caches: list[list[Tensor]], context: int) -> Call:
    """Compiled FlexAttention of q [1, H, T, D] with the chain's causal mask. Compiles on its first call, for
    seconds."""
    compiled: list[Callable[..., Tensor]] = []

    def call(i: int) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        k, v = caches[i]
        if not compiled:
            torch._dynamo.reset()  # else the ninth shape falls back to eager
            mask = create_block_mask(
                lambda b, h, i_q, i_k: i_k <= i_q + context, None, None, q.shape[2], k.shape[2], q.device
            )
            function = torch.compile(flex_attention, dynamic=False)
            compiled.append(partial(function, block_mask=mask, enable_gqa=q.shape[1] > k.shape[1]))
        return compiled[0](q, k, v)[0, :, -1]

    return call
