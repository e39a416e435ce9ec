"""What is measured: for every kernel, its shapes, the bytes that must move, and its peers on the same inputs.

To add an operation: a function (shape, rows, ...) -> Build that takes inputs from the pool and returns calls
by name, OURS first, then a line in `_OF` or, for rows, in `ROW_WISE`. All calls of a case return the same
numbers within rounding (tensors of one shape, or tuples of them): the bench compares them before it measures,
and so does tests/test_bench.py, with toy shapes in the interpreter. Linears, head and attention, whose peers
are libraries, are in cases_dense.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orthrus_kernels import FORMS, PAGE, Sampling, alike, backend_ops, pages_for, rope, top_k
from orthrus_kernels.choice import candidate_scores
from orthrus_kernels.commit import commit_triton
from orthrus_kernels.swiglu import swiglu_triton

from .cases_dense import KERNELS, LIKELIEST, attention_cases, head_cases, linear_cases, linear_swiglu_cases
from .measure import OURS, Call, NotRun, Pool
from .models import MODELS, Shape

EPS = 1e-6
TWINS = backend_ops("reference")
RANK, GATED = 32, 64  # of a bigram correction, and of a selector beside it
SETTINGS = {
    "greedy": Sampling(),
    "T 0.8": Sampling(temperature=0.8, seed=1),
    "T 0.8, top-p 0.95": Sampling(temperature=0.8, top_p=0.95, seed=1),
    "T 1, top-p 0.95, top-k 20": Sampling(temperature=1.0, top_p=0.95, top_k=20, seed=1),
}
# Choices launched as in a pass of texts of any settings, from logits spread so much: at 6 few tokens have
# nearly all of the mass, at 1 top-p 0.9 keeps two thirds of the vocabulary.
MIXED = {
    "mixed: greedy": (Sampling(), 6.0),
    "mixed: T 0.8": (Sampling(temperature=0.8, seed=1), 6.0),
    "mixed: T 0.8, top-k 20": (Sampling(temperature=0.8, top_k=20, seed=1), 6.0),
    "mixed: T 0.8, top-p 0.9": (Sampling(temperature=0.8, top_p=0.9, seed=1), 6.0),
    "mixed: T 1, top-p 0.9, flat": (Sampling(temperature=1.0, top_p=0.9, seed=1), 1.0),
}

Build = Callable[[Pool], "tuple[int, dict[str, Call | NotRun]]"]


@dataclass(frozen=True)
class Case:
    """One row of a table. build(pool): (copies of the inputs, calls by name, ours first)."""

    op: str
    model: str
    name: str  # the weight of a linear, the setting of a head or choice, else ""
    rows: int
    context: int | None
    bytes: int  # read and written at least once
    flops: int
    build: Build = field(repr=False)
    kernel: tuple = ()  # cases with equal ones launch the same compiled kernels


def cases(
    ops: Sequence[str], models: Sequence[str], rows: Sequence[int], contexts: Sequence[int], device: str
) -> Iterator[Case]:
    """Every case asked for, in the order of OPS; models of one shape share a case, which names them both.
    device: the launch tables' key, such as "sm_90"."""
    for op in (op for op in OPS if op in ops):
        found: dict[tuple, tuple[list[str], dict]] = {}
        for model in models:
            for case in _OF[op](MODELS[model], rows, contexts, device):
                key = case["name"], case["rows"], case["context"], case["build"].args
                found.setdefault(key, ([], case))[0].append(model)
        for names, case in found.values():
            yield Case(op, ", ".join(names), **case)


def row_cases(op: str, shape: Shape, rows: Sequence[int]) -> Iterator[dict]:
    """The row-wise kernels. Bytes: every element of every operand once."""
    width, build, row_bytes = ROW_WISE[op](shape)
    for t in rows:
        yield {
            "name": "", "rows": t, "context": None, "bytes": t * row_bytes, "flops": 0,
            "build": partial(build, t), "kernel": (op, width),
        }  # fmt: skip


def norm(e: int, t: int, pool: Pool) -> tuple[int, dict[str, Call | NotRun]]:
    """Peers: a chain of torch operations that rounds as ours does, and torch's fused norm, which does not."""
    weight, copies = pool.take(e), pool.copies(t * e)
    x = [pool.take(t, e) for _ in range(copies)]
    out = torch.empty_like(x[0])
    return copies, {
        OURS: lambda i: KERNELS.rms_norm(x[i], weight, EPS, out=out),
        "torch chain": lambda i: _norm(x[i], weight),
        "F.rms_norm": lambda i: F.rms_norm(x[i], (e,), weight, EPS),
    }


def add_norm(e: int, t: int, pool: Pool) -> tuple[int, dict[str, Call | NotRun]]:
    weight, copies = pool.take(e), pool.copies(2 * t * e)
    x, residual = ([pool.take(t, e) for _ in range(copies)] for _ in range(2))
    out = torch.empty_like(x[0]), torch.empty_like(x[0])

    def chain(i: int) -> tuple[Tensor, Tensor]:
        total = x[i] + residual[i]
        return _norm(total, weight), total

    return copies, {
        OURS: lambda i: KERNELS.add_rms_norm(x[i], residual[i], weight, EPS, out=out),
        "torch chain": chain,
    }


def qk(h: int, g: int, d: int, t: int, pool: Pool) -> tuple[int, dict[str, Call | NotRun]]:
    q_norm, k_norm, copies = pool.take(d), pool.take(d), pool.copies(t * (h + 2 * g) * d)
    qkv = [pool.take(t, h + 2 * g, d) for _ in range(copies)]
    angle = pool.take(t, d // 2).float()
    cos, sin = angle.cos(), angle.sin()
    out, *keep = (torch.empty(t, n, d, dtype=qkv[0].dtype, device=pool.device) for n in (h, g, g))

    def chain(i: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv[i].split([h, g, g], dim=1)
        return rope(_norm(q, q_norm), cos, sin), rope(_norm(k, k_norm), cos, sin), v.clone()

    return copies, {
        OURS: lambda i: KERNELS.qk_norm_rope(qkv[i], h, q_norm, k_norm, cos, sin, EPS, keep=keep, out=out),
        "torch chain": chain,
    }


def swiglu(f: int, t: int, pool: Pool) -> tuple[int, dict[str, Call | NotRun]]:
    copies = pool.copies(2 * t * f)
    x = [pool.take(t, 2 * f) for _ in range(copies)]
    out = torch.empty(t, f, dtype=x[0].dtype, device=pool.device)

    def chain(i: int) -> Tensor:
        gate, up = x[i].chunk(2, -1)
        return F.silu(gate) * up

    return copies, {OURS: lambda i: swiglu_triton(x[i], out=out), "torch chain": chain}


def embedding(v: int, e: int, t: int, pool: Pool) -> tuple[int, dict[str, Call | NotRun]]:
    """Other tokens in every call; one table, which no L2 cache holds."""
    table, copies = pool.take(v, e), 64
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(v, (copies, t), generator=generator).to(pool.device)
    out = torch.empty(t, e, dtype=table.dtype, device=pool.device)
    return copies, {
        OURS: lambda i: KERNELS.embedding(table, tokens[i], out=out),
        "torch": lambda i: F.embedding(tokens[i], table),
    }


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as a chain of torch operations, rounding as `rms_norm` does."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


# make new-op: its case


def logits_cases(op: str, shape: Shape, rows: Sequence[int]) -> Iterator[dict]:
    """What reads written logits. Bytes: every logit once, and the results."""
    v = shape.V
    build, names, row_bytes = {
        "choose": (choose, [*SETTINGS, *MIXED], 16),
        "candidates": (candidates, list(SETTINGS), 12 * LIKELIEST),
        "likeliest": (likeliest, [""], 4 + 12 * LIKELIEST),
        "log_sum_exp": (log_sum_exp, [""], 4),
    }[op]
    for name in names:
        for t in rows:
            yield {
                "name": name, "rows": t, "context": None, "bytes": t * (4 * v + row_bytes), "flops": 0,
                "build": partial(build, v, name, t), "kernel": (op, v, name),
            }  # fmt: skip


def written_logits(v: int, t: int, pool: Pool, spread: float = 2.5) -> list[Tensor]:
    """Copies of logits [T, V] fp32, of a few units as a model's. Two numbers of the pool are the bits of one:
    rounded to bf16, many would be equal."""
    return [spread * pool.take(t, 2 * v).view(torch.float32) for _ in range(pool.copies(2 * t * v))]


def choose(v: int, name: str, t: int, pool: Pool) -> tuple[int, dict[str, Call | NotRun]]:
    """Peer: what the twin does with rows of one setting, where a graph can hold it: its noise and its filters
    ask the host."""
    sampling, spread = MIXED[name] if name in MIXED else (SETTINGS[name], 2.5)
    logits = written_logits(v, t, pool, spread)
    settings = table, _ = alike(sampling, logits[0])
    table.form = FORMS[1] if name in MIXED else table.form
    positions = torch.arange(t, device=pool.device)
    out = torch.empty_like(positions)
    return len(logits), {
        OURS: lambda i: KERNELS.choose(logits[i], positions, *settings, out=out),
        "twin": "asks the host" if sampling.temperature else lambda i: candidate_scores(
            logits[i], positions, sampling
        ).argmax(-1),
    }  # fmt: skip


def candidates(v: int, name: str, t: int, pool: Pool) -> tuple[int, dict[str, Call | NotRun]]:
    """Of a draft tree. Peer: what the twin does with rows of one setting, where a graph can hold it."""
    sampling, logits = SETTINGS[name], written_logits(v, t, pool)
    settings = alike(sampling, logits[0])
    positions = torch.arange(t, device=pool.device)
    return len(logits), {
        OURS: lambda i: KERNELS.candidates(logits[i], positions, *settings, LIKELIEST)[0],
        "twin": "asks the host" if sampling.temperature else lambda i: top_k(logits[i], LIKELIEST)[0],
    }  # fmt: skip


def likeliest(v: int, name: str, t: int, pool: Pool) -> tuple[int, dict[str, Call | NotRun]]:
    logits = written_logits(v, t, pool)
    return len(logits), {
        OURS: lambda i: KERNELS.likeliest(logits[i], LIKELIEST)[0],
        "torch": lambda i: logits[i].topk(LIKELIEST)[0],
    }


def log_sum_exp(v: int, name: str, t: int, pool: Pool) -> tuple[int, dict[str, Call | NotRun]]:
    logits = written_logits(v, t, pool)
    return len(logits), {
        OURS: lambda i: KERNELS.log_sum_exp(logits[i]),
        "torch": lambda i: logits[i].logsumexp(-1),
    }


def commit_cases(shape: Shape, rows: Sequence[int]) -> Iterator[dict]:
    for t in rows:
        yield {
            "name": "", "rows": t, "context": None, "flops": 0,
            "bytes": 8 * shape.layers * t * shape.G * shape.D,
            "build": partial(commit, shape.layers, shape.G, shape.D, t), "kernel": ("commit", shape.D),
        }  # fmt: skip


def commit(layers: int, g: int, d: int, t: int, pool: Pool) -> tuple[int, dict[str, Call | NotRun]]:
    """All t rows of a pass accepted. The peer, whose cache has no pages, copies slices and knows on the host
    what was accepted. Each returns its cache, [L, G, pages, PAGE, D]."""
    start, n = 37, pages_for(37 + t)
    copies = pool.copies(2 * layers * g * d * (t + 2 * n * PAGE))
    k_rows, v_rows = ([pool.take(layers, t, g, d) for _ in range(copies)] for _ in "kv")
    pools = [[pool.take(layers, n, g, PAGE, d) for _ in "kv"] for _ in range(copies)]
    caches = [[pool.take(layers, g, n, PAGE, d).copy_(p.transpose(1, 2)) for p in both] for both in pools]
    pages, accepted = (torch.arange(m, dtype=torch.int32, device=pool.device)[None] for m in (n, t))
    at, slot = (torch.tensor([x], dtype=torch.int32, device=pool.device) for x in (start, 0))

    def ours(i: int) -> tuple[Tensor, ...]:
        commit_triton(*pools[i], pages, slot, k_rows[i], v_rows[i], accepted, at)
        return tuple(pool.transpose(1, 2) for pool in pools[i])

    def slices(i: int) -> tuple[Tensor, ...]:
        for cache, own in zip(caches[i], (k_rows[i], v_rows[i]), strict=True):
            cache.flatten(2, 3)[:, :, start : start + t].copy_(own.transpose(1, 2))
        return tuple(caches[i])

    return copies, {OURS: ours, "torch slices": slices}


def rerank_cases(shape: Shape, rows: Sequence[int]) -> Iterator[dict]:
    """The candidates of a block, by tables alone and with a selector. Bytes: scores and ids, the rows of the
    tables, gates, what is written."""
    k = LIKELIEST
    for t, gated in product(rows, (0, GATED)):
        r = RANK + gated
        yield {
            "name": f"{k} candidates" + (f", a gate of {gated}" if gated else ""), "rows": t, "context": None,
            "bytes": t * k * (12 + 4 * r) + 4 * t * gated + 8 * t * k * k, "flops": 0,
            "build": partial(rerank, shape.V, t, k, r, gated),
        }  # fmt: skip


def rerank(v: int, p: int, k: int, r: int, gated: int, pool: Pool) -> tuple[int, dict[str, Call | NotRun]]:
    before, after = pool.take(v, r), pool.take(v, r)
    scores = torch.randn(1, p, k, device=pool.device).sort(-1, descending=True).values.log_softmax(-1)
    ids = torch.randint(0, v, (1, p, k), device=pool.device)
    zero = torch.zeros(1, dtype=torch.int32, device=pool.device)  # the root, and its slot
    one, calibration = torch.ones(1, device=pool.device), torch.ones(2, p, 2, device=pool.device)
    gate = [torch.ones(*shape, gated, device=pool.device) for shape in ((1, p), (p,)) if gated]
    arguments = scores, ids, zero, before, after, calibration, one, one, zero, True, *gate
    return 16, {OURS: lambda i: KERNELS.rerank(*arguments)[0], "twin": lambda i: TWINS.rerank(*arguments)[0]}


# Width of a row, the case of t rows, bytes a row.
ROW_WISE: dict[str, Callable[[Shape], tuple[int, Callable[..., Any], int]]] = {
    "rms_norm": lambda s: (s.E, partial(norm, s.E), 4 * s.E),
    "add_rms_norm": lambda s: (s.E, partial(add_norm, s.E), 8 * s.E),
    "qk_norm_rope": lambda s: (
        stacked := (s.H + 2 * s.G) * s.D,
        partial(qk, s.H, s.G, s.D),
        4 * stacked + 4 * s.D,
    ),
    "swiglu": lambda s: (s.F, partial(swiglu, s.F), 6 * s.F),
    "embedding": lambda s: (s.E, partial(embedding, s.V, s.E), 4 * s.E + 8),
    # make new-op: its shapes
}

_OF: dict[str, Callable[[Shape, Sequence[int], Sequence[int], str], Iterator[dict]]] = {
    "linear": linear_cases,
    "linear_swiglu": linear_swiglu_cases,
    "attention": attention_cases,
    "head": head_cases,
    **{
        op: (lambda shape, rows, contexts, device, op=op: row_cases(op, shape, rows))  # type: ignore[misc]
        for op in ROW_WISE
    },
    **{
        op: (lambda shape, rows, contexts, device, op=op: logits_cases(op, shape, rows))  # type: ignore[misc]
        for op in ("choose", "candidates", "likeliest", "log_sum_exp")
    },
    "rerank": lambda shape, rows, contexts, device: rerank_cases(shape, rows),
    "commit": lambda shape, rows, contexts, device: commit_cases(shape, rows),
}
OPS = tuple(_OF)
