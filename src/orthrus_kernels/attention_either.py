"""Which kernel attention runs in: Gluon's (attention_gluon.py) for many rows on Hopper, else Triton's
(attention_triton.py). Trees attend in Gluon in the shared form and in Triton in the partial one, since over
few keys, or of many texts, sharing gains nothing. Which of them runs changes no bit.

That is not taken on trust. Before tables for Gluon, or of the shared form, are first made in a process, it
attends from the rows of random passes beside Triton's other forms, with the heads of the model, on the GPU
and with the Triton that are there. Where one bit differs, or where a kernel does not compile, the others run
from then on, and one line on stderr says why. The tables say which kernel they are for.

ORTHRUS_GLUON=off turns Gluon off."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from . import tables as launch_tables
from ._gluon import HAS_GLUON
from ._triton import triton_interprets
from .attention_compared import differences, shared_differs
from .attention_gluon import FOLDED, HEAD, attention_gluon, new_tables_gluon, takes
from .attention_triton import attention_triton, new_tables_triton
from .compile_ahead import is_recorded
from .pass_tables import PassTables
from .plan import PassShape
from .switches import gluon_is_on

# (device, heads, key heads) of Gluon, and (device, heads, key heads, D, dtype) of the shared form -> "" where
# it has the bits of the others on this machine, else why it does not run.
_verdicts: dict[tuple[object, ...], str] = {}


def attention_either(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, tables: PassTables,
    scale: float, *, out: Tensor | None = None, workspace: Tensor | None = None, form: str = "auto",
    programs: int | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """Attend from every row of a pass: `attention_triton`, in Gluon with tables that are for it. A form or a
    number of programs that is asked for is Triton's."""
    args = q, k, v, k_cache, v_cache, pages, tables, scale
    if form == "auto" and programs is None and is_for_gluon(tables, q, k.shape[1]):
        return attention_gluon(*args, out=out, workspace=workspace, pdl=pdl)
    return attention_triton(*args, out=out, workspace=workspace, form=form, programs=programs, pdl=pdl)


def new_tables_either(
    shape: PassShape, capacity: int, heads: int, groups: int, d: int, dtype: torch.dtype, device: torch.device
) -> PassTables:
    """Tables for `attention_either`: for Gluon where it takes the pass and has Triton's bits here."""
    device = torch.empty(0, device=device).device  # with its number, as tensors say it
    if takes(shape, capacity, heads, groups, d, dtype) and _runs(device) and trusted(heads, groups, device):
        shared = shape.branches and may_share(heads, groups, d, dtype, device)
        return new_tables_gluon(shape, capacity, heads, groups, device, shared=shared)
    return new_tables_triton(shape, capacity, heads, groups, d, dtype, device, shared=False)


def is_for_gluon(tables: PassTables, q: Tensor, groups: int) -> bool:
    """Whether `attention_either` takes tables, of queries q [T, H, D] on G key heads, to Gluon. Tall tiles
    that are not whole are for it alone."""
    heads, d = q.shape[1:]
    if tables.tile_rows * heads != FOLDED * groups or d != HEAD or q.dtype != torch.bfloat16:
        return False
    return not tables.whole or (_runs(q.device) and _verdicts.get((q.device, heads, groups)) == "")


def _runs(device: torch.device) -> bool:
    """Whether Gluon may run there. Raises ValueError where ORTHRUS_GLUON is neither on nor off."""
    can = HAS_GLUON and not triton_interprets() and launch_tables.device_key(device) == "sm_90"
    return gluon_is_on() and can


def _is_compiled(device: torch.device) -> bool:
    """Whether Triton's kernels run there, and not in an interpreter."""
    return device.type == "cuda" and not triton_interprets()


def trusted(heads: int, groups: int, device: torch.device) -> bool:
    """Whether Gluon has the bits of Triton's kernels for these heads on this machine: found out once. Raises
    RuntimeError where that would fall into the capture of a CUDA graph: make tables once before."""

    def compare() -> str:
        shared = may_share(heads, groups, HEAD, torch.bfloat16, device)
        return differences(heads, groups, device, ("partial", "whole", "shared")[: 2 + shared])

    return _found_equal((device, heads, groups), compare, "Triton's attention runs in place of Gluon's")


def may_share(heads: int, groups: int, d: int, dtype: torch.dtype, device: torch.device) -> bool:
    """As `trusted`, of the shared form of Triton's kernels beside their partial one. Where they are
    interpreted, or run nowhere, tests have shown it."""
    return not _is_compiled(device) or _found_equal(
        (device, heads, groups, d, dtype), lambda: shared_differs(heads, groups, d, dtype, device),
        "trees attend in the partial form",
    )  # fmt: skip


def _found_equal(key: tuple[object, ...], compare: Callable[[], str], else_said: str) -> bool:
    """Whether a comparison finds nothing that differs; it runs once a key, which begins with (device, heads,
    key heads)."""
    if key not in _verdicts:
        if is_recorded():  # nothing runs now: what the comparison launches is compiled ahead
            compare()
            return True
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("make tables once before the capture, so that kernels have been compared")
        try:
            _verdicts[key] = compare()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler or a driver can raise anything
            _verdicts[key] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if _verdicts[key]:
            _, heads, groups, *_ = key
            print(f"orthrus: {else_said}. {heads} heads on {groups}: {_verdicts[key]}", file=sys.stderr)
    return not _verdicts[key]
