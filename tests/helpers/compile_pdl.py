"""Compile every kernel of a pass for sm_90 as an ordinary and as a dependent launch; one JSON line a kernel
and case. Run by test_pdl.py without TRITON_INTERPRET: `python tests/helpers/compile_pdl.py`.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import aot  # noqa: E402
import torch  # noqa: E402
from aot_launches import meta, module  # noqa: E402
from ptx_order import sass_before_wait, touches_before_wait  # noqa: E402

from orthrus_kernels import PassShape, Weight  # noqa: E402

HOPPER = aot.TARGETS["sm_90"]
KERNELS = (
    ("rms_norm", "_rms_norm_kernel"), ("qk_norm_rope", "_qk_norm_rope_kernel"), ("swiglu", "_swiglu_kernel"),
    ("embedding", "_embedding_kernel"), ("quantise_rows", "_quantise_rows_kernel"),
    ("attention_triton", "_partial_kernel"),
    ("attention_triton", "_combine_kernel"), ("attention_triton", "_path_kernel"),
    ("attention_triton", "_whole_kernel"),
    ("linear", "_linear_kernel"), ("linear_swiglu", "_linear_swiglu_kernel"),
    ("head", "_head_kernel"), ("logit_summary", "_merge_kernel"),
)  # fmt: skip
# Instructions that decide a row's bits, so as many of each kind with and without dependent launch.
_ARITHMETIC = re.compile(r"\b((?:add|sub|mul|fma|div|rsqrt|sqrt|ex2|lg2|max|min|shfl|wgmma|mma)\.[\w.]*)")
_FLOATING = re.compile(r"f32|f16|shfl|mma")


def cases() -> Iterator[tuple[str, Callable[..., object]]]:
    """(case, launcher call that takes `pdl`) at the shapes of Qwen3-8B."""
    norm, qk, swiglu, embedding = (module(n) for n in ("rms_norm", "qk_norm_rope", "swiglu", "embedding"))
    linear, fused, head = module("linear"), module("linear_swiglu"), module("head")
    x, w, tokens = meta(33, 4096), meta(4096), meta(33, dtype=torch.int64)
    yield "norm", partial(norm.rms_norm_triton, x, w, 1e-6, w, 20)
    yield "add", partial(norm.add_rms_norm_triton, x, x, w, 1e-6)
    w, cos = meta(128), meta(33, 64, dtype=torch.float32)
    yield "qk", partial(qk.qk_norm_rope_triton, meta(33, 48, 128), 32, w, w, cos, cos, 1e-6, w, w, 9,
                        (meta(33, 8, 128), meta(33, 8, 128)))  # fmt: skip
    yield "swiglu", partial(swiglu.swiglu_triton, meta(33, 24576))
    yield "embedding", partial(embedding.embedding_triton, meta(151936, 4096), tokens)
    yield "rows of codes", partial(module("quantise_rows").quantise_rows_triton, meta(33, 4096))
    yield from attentions()
    # tiles by pointers, by descriptors, in segments, and with a weight for each view
    for n, k, rows in ((6144, 4096, 1), (4096, 4096, 32), (4096, 12288, 1)):
        yield f"{n}x{k} {rows} rows", partial(linear.linear_triton, meta(rows, k), Weight(meta(n, k)))
    views = Weight(meta(6144, 4096)), Weight(meta(6144, 4096))
    both = partial(linear.linear_triton, meta(40, 4096), *views, 8)
    yield "both views", both
    for rows in (1, 64):  # by pointers, by descriptors
        gate_up = partial(fused.linear_swiglu_triton, meta(rows, 4096), Weight(meta(24576, 4096)))
        yield f"gate_up {rows} rows", gate_up
    for k in (1, 16):
        yield f"head k {k}", partial(head.head_triton, meta(64, 4096), Weight(meta(151936, 4096)), k)


def attentions() -> Iterator[tuple[str, Callable[..., object]]]:
    """Every form; nobody reads the tables."""
    op, dtype = module("attention_triton"), torch.bfloat16
    cache, pages = meta(32, 8, 64, 128), meta(1, 32, dtype=torch.int32)
    for form, n, lines in (("fused", 1, 1), ("partial", 33, 1), ("shared", 33, 33), ("whole", 512, 1)):
        shape = PassShape(n, n, lines, n if lines == 1 else 9, 1)
        tables = op.new_tables_triton(shape, 2048, 32, 8, 128, dtype, torch.device("meta"))
        assert (tables.whole, tables.shared) == (form == "whole", form == "shared")
        q, k = meta(n, 32, 128), meta(n, 8, 128)
        space = meta(op.workspace_size(tables, 32, 128), dtype=torch.float32)
        call = partial(
            op.attention_triton, q, k, k, cache, cache, pages, tables, 1.0, workspace=space, form=form
        )
        yield form, call


def launched(call: Callable[..., object], **how: bool) -> list[tuple]:
    """The kernels that a launcher launches, with their arguments."""
    with ExitStack() as stack:
        recorders = [stack.enter_context(aot.recorded(module(m), kernel)) for m, kernel in KERNELS]
        call(**how)
    return [(r.kernel, arguments) for r in recorders for arguments in r.launches]


def arithmetic(ptx: str) -> Counter[str]:
    return Counter(op for op in _ARITHMETIC.findall(ptx) if _FLOATING.search(op))


def line_of(kernel, plain: dict, dependent: dict) -> dict:
    """What the test reads, and the dependent launch's cubin."""
    off, _, _ = aot.built_for(kernel, plain, HOPPER)
    on, log, names = aot.built_for(kernel, dependent, HOPPER)
    return {
        "cubin": on.asm["cubin"],
        "launch_pdl": [plain.get("launch_pdl", False), dependent.get("launch_pdl", False)],
        "registers": aot.registers(log), "spill_bytes": aot.spilled(log),
        "before_wait": touches_before_wait(on.asm["ptx"], names),
        "same_arithmetic": arithmetic(on.asm["ptx"]) == arithmetic(off.asm["ptx"]),
        "arithmetic": sum(arithmetic(on.asm["ptx"]).values()),
        "waits_off": off.asm["ptx"].count("griddepcontrol"),
    }  # fmt: skip


def main() -> None:
    lines = []
    for case, call in cases():
        for (kernel, plain), (_, dependent) in zip(
            launched(call, pdl=False), launched(call, pdl=True), strict=True
        ):
            line = {"kernel": kernel.__name__.strip("_"), "case": case}
            lines.append(line | line_of(kernel, plain, dependent))
    for line, sass in zip(lines, aot.disassembled([line.pop("cubin") for line in lines]), strict=True):
        print(json.dumps(line | {"sass_before_wait": sass_before_wait(sass)}))


if __name__ == "__main__":
    main()
