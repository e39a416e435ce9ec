"""One small launch of every kernel in every form, for compute-sanitizer: `python -m bench.launches NAME...`.

Odd sizes, so that masks matter; the caches hold no more than they must, so that reading past them shows."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from orthrus_kernels import Rows, backend_ops
from orthrus_kernels.commit_triton import commit_triton
from orthrus_kernels.tables import LinearEntry, LinearTile
from orthrus_kernels.verify_triton import verify_triton

TRITON = backend_ops("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16().to(DEVICE)


def table(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def linear(split: bool) -> None:
    """Three segments, a ragged last block of K and of N, both views."""
    entry = LinearEntry(64, 3, (LinearTile(None, 16, 64, split, 4, 3),))
    x, w, w_diff = numbers(21, 328), numbers(70, 328), numbers(70, 328)
    TRITON.linear(x, w, w_diff, 9, entry=entry)


def linear_by_the_table() -> None:
    for rows in (1, 40, 100, 200):
        TRITON.linear(numbers(rows, 2048), numbers(200, 2048))


def norms() -> None:
    x, w = numbers(5, 1000), numbers(1000)
    TRITON.rms_norm(x, w, EPS, w, 2)
    TRITON.add_rms_norm(x, x.flip(0), w, EPS)


def qk_norm_rope() -> None:
    w, angle = numbers(64), torch.randn(5, 32, device=DEVICE)
    TRITON.qk_norm_rope(numbers(5, 9, 64), 5, w, w, angle.cos(), angle.sin(), EPS, w, w, 2)


def attention(form: str) -> None:
    """A tree with two blocks behind 300 cached keys: a whole segment and a ragged one."""
    rows = Rows.tree_with_blocks([1] * 7, [-1, 0, 0, 1, 1, 3, 2], 300, [2, 5], 4, 2)
    q, k, v = (numbers(len(rows), heads, 64) for heads in (4, 2, 2))
    TRITON.attention(q, k, v, numbers(1, 2, 300, 64), numbers(1, 2, 300, 64), rows, 0.125, form=form)


def commit() -> None:
    caches, rows = [numbers(2, 1, 3, 8, 40) for _ in "kv"], [numbers(2, 6, 3, 40) for _ in "kv"]
    commit_triton(caches[0], caches[1], rows[0], rows[1], table([0, 2, 5, -1]), table([6]))


LAUNCHES: dict[str, Callable[[], object]] = {
    "linear, split": lambda: linear(True),
    "linear, in one CTA": lambda: linear(False),
    "linear, table": linear_by_the_table,
    "norms": norms,
    "qk_norm_rope": qk_norm_rope,
    "swiglu": lambda: TRITON.swiglu(numbers(5, 2 * 1100)),
    "embedding": lambda: TRITON.embedding(numbers(50, 1100), table([49, 0, 7])),
    "attention, partial": lambda: attention("partial"),
    "attention, whole": lambda: attention("whole"),
    "verify": lambda: verify_triton(table([5, 6, 7, 7]), table([-1, 0, 0, 2]), table([7, 1, 7, 3])),
    "commit": commit,
}


def main(names: list[str]) -> None:
    torch.manual_seed(0)
    for name in names or LAUNCHES:
        LAUNCHES[name]()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
