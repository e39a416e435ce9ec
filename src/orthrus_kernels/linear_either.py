"""Which kernel a linear runs in: Gluon's (linear_gluon.py, with more rows linear_gluon_wide.py, with codes
linear_gluon_codes.py) with the shapes and on the GPUs that its tables name, else Triton's (linear.py,
linear_swiglu.py). Which of them runs changes no bit.

That is not taken on trust. Before a launch in Gluon first runs in a process, it is made once on random rows,
beside Triton's: by the weights that it has, on the GPU and with the Triton that are there. Where one bit
differs, or where it does not compile, Triton's kernels run from then on, and one line on stderr says why.

ORTHRUS_GLUON=off turns Gluon off."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import tables
from ._gluon import HAS_GLUON
from ._triton import triton_interprets
from .coded_rows import Rows
from .compile_ahead import is_recorded
from .late import stopped
from .linear import check_shapes, linear_triton
from .linear_gluon import Plan, linear_gluon, multiprocessors, plan_of, takes
from .linear_gluon_codes import ROUNDED_ROWS_BEGIN, linear_gluon_codes, plans_of, takes_codes
from .linear_gluon_wide import WidePlan, linear_gluon_wide, wide_plan_of
from .linear_swiglu import linear_swiglu_triton
from .quantise_rows import quantise_rows_triton
from .quantised import QuantisedWeight
from .rows import new_rows
from .tables import LinearEntry
from .weight import AnyWeight
from .workspace import Workspace, workspace

Views = tuple[AnyWeight, AnyWeight | None]

_trusted: set[tuple] = set()  # launches whose bits are Triton's, on this machine
_distrusted: list[str] = []  # why no launch is made in Gluon any more: nothing, or one reason


def why_not() -> str:
    """Why Gluon runs nothing any more in this process; "" where it does."""
    return _distrusted[0] if _distrusted else ""


@dataclass(frozen=True)
class Launch:
    """A launch in Gluon: rows [first, last) of a pass, of which [first, first + n_ar) are multiplied by the
    first of its weights. A quantised weight is alone in its launch."""

    plan: Plan
    views: Views
    first: int
    last: int
    n_ar: int

    def run(self, x: Rows, *, out: Tensor, **how: Any) -> None:
        """Make it, of its own rows alone."""
        weight, weight_diff = self.views
        if isinstance(weight, QuantisedWeight):
            linear_gluon_codes(self.plan, x, weight, out=out, **how)
            return
        assert isinstance(x, Tensor) and not isinstance(weight_diff, QuantisedWeight), self
        if isinstance(self.plan, WidePlan):
            how.pop("space", None)  # its sums meet in registers
            linear_gluon_wide(self.plan, x, weight, out=out, **how)
            return
        linear_gluon(self.plan, x, weight, weight_diff, self.n_ar, out=out, **how)


def launches_of(x: Tensor, views: Views, n_ar: int, swiglu: bool, space: Workspace | None) -> list[Launch]:
    """The launches in Gluon of a linear: one, one a view, or several of a view with codes. None where
    Triton's kernels must run."""
    rows, key = x.shape[0], tables.device_key(x.device)
    has = key == "sm_90" and HAS_GLUON and not triton_interprets() and not _distrusted
    if not (rows and has):
        return []
    space, weight_diff = space or workspace(x.device), views[1]
    together = _planned(x, views, 0, rows, n_ar, swiglu, space)
    if together or weight_diff is None:
        return together
    first = _planned(x, (views[0], None), 0, n_ar, n_ar, swiglu, space)
    behind = _planned(x, (weight_diff, None), n_ar, rows, rows - n_ar, swiglu, space)
    return first + behind if first and behind else []


def _planned(
    x: Tensor, views: Views, first: int, last: int, n_ar: int, swiglu: bool, space: Workspace
) -> list[Launch]:
    """Launches of rows [first, last) where the tables have tiles that run on this GPU."""
    (weight, weight_diff), key = views, tables.device_key(x.device)
    launches, count = [], last - first
    if isinstance(weight, QuantisedWeight):
        if weight_diff is None and takes_codes(x, weight):
            for plan, rows in plans_of(weight, key, count, swiglu):
                launches.append(Launch(plan, views, first, first + rows, rows))
                first += rows
    elif not isinstance(weight_diff, QuantisedWeight) and takes(x, weight, weight_diff):
        of, most = (*weight.shape, x.dtype, key), multiprocessors(x.device)
        plan_or_none = plan_of(*of, n_ar, count - n_ar, swiglu)
        if plan_or_none is None and weight_diff is None:
            plan_or_none = wide_plan_of(*of, count, swiglu, most)
        if plan_or_none:
            launches.append(Launch(plan_or_none, views, first, last, n_ar))
    fit = all(launch.plan.fits(multiprocessors(x.device), space) for launch in launches)
    return launches if fit else []


def trusted(launch: Launch, pdl: bool) -> bool:
    """Whether a launch has the bits of Triton's kernels on this machine: found out once. Raises RuntimeError
    where that would fall into the capture of a CUDA graph: make the launch once before."""
    device = launch.views[0].pointer.device
    key = device, launch.plan, launch.views[0].scheme, pdl
    if _distrusted or key in _trusted:
        return not _distrusted  # of two launches the first may have turned Gluon off
    if not is_recorded() and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("launch once before the capture, so that the kernels' bits have been compared")
    try:
        why = "" if same_bits(launch, pdl) or is_recorded() else "has other bits than Triton's kernel"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler or a driver can raise anything
        why = stopped() or f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if why:
        plan = launch.plan
        tiles = ", ".join(f"{tile.rows} rows by {64 * tile.groups}" for tile in plan.tiles)
        kernel = "linear_gluon_wide" if isinstance(plan, WidePlan) else "linear_gluon"
        _distrusted.append(f"{kernel}, weight {plan.n}x{plan.k}, tile {tiles}: {why}")
        print(f"orthrus: Triton's linears run in place of Gluon's. {_distrusted[0]}", file=sys.stderr)
    elif not is_recorded():  # recorded launches did not run; both kernels are compiled ahead
        _trusted.add(key)
    return not why


def same_bits(launch: Launch, pdl: bool) -> bool:
    """Run both kernels on as many random rows as the launch's tiles have, or as make a wide one show all of
    itself, scaled by 2^-6 .. 2^6, so that sums show their order."""
    plan, (weight, weight_diff) = launch.plan, launch.views
    device, n_ar = weight.pointer.device, plan.tile.rows
    rows, how = sum(tile.rows for tile in plan.tiles), {}
    if isinstance(plan, WidePlan):
        rows, how["programs"] = plan.compared
    launch, shape = replace(launch, n_ar=n_ar), (rows, plan.k)
    made: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(rows), "device": device}
    x = torch.randn(shape, dtype=weight.dtype, **made)
    x *= torch.exp2(torch.randint(-6, 7, shape, dtype=weight.dtype, **made))
    width = plan.n // 2 if plan.swiglu else plan.n
    ours = torch.full((rows, width), float("nan"), dtype=x.dtype, device=device)
    launch.run(x, out=ours, pdl=pdl, **how)
    if plan.swiglu:
        theirs = linear_swiglu_triton(x, weight, pdl=pdl)
    else:
        theirs = linear_triton(x, weight, weight_diff, n_ar, pdl=pdl)
    return torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


def launched(launches: Sequence[Launch], x: Tensor, out: Tensor, **how: Any) -> Tensor:
    """The rows of `out`, by launches that are trusted. Where they round rows, a launch before them does, and
    one more in front of a launch that cannot begin in the middle of rounded rows."""
    rounds = all(isinstance(w := of.views[0], QuantisedWeight) and w.rounds for of in launches)
    taken: Rows = x
    begin = 0
    for launch in launches:
        if rounds and (launch is launches[0] or (launch.first - begin) % ROUNDED_ROWS_BEGIN):
            taken, begin = quantise_rows_triton(x[launch.first :], pdl=how["pdl"]), launch.first
        launch.run(
            taken[launch.first - begin : launch.last - begin], out=out[launch.first : launch.last], **how
        )
    return out


def linear_either(
    x: Tensor, weight: AnyWeight, weight_diff: AnyWeight | None = None, n_ar: int | None = None,
    out_dtype: torch.dtype | None = None, *, out: Tensor | None = None, entry: LinearEntry | None = None,
    space: Workspace | None = None, pdl: bool = False, early: bool = True,
) -> Tensor:  # fmt: skip
    """`linear_triton`, in Gluon where that is possible; with an entry always in Triton."""
    check_shapes(x, weight, weight_diff)
    rows = x.shape[0]
    views: Views = weight, weight_diff
    first = rows if n_ar is None or weight_diff is None else n_ar  # of the rows, by the first weight
    if first == rows:
        views = weight, None
    elif first == 0 and weight_diff is not None:
        views, first = (weight_diff, None), rows
    how: dict[str, Any] = {"space": space, "pdl": pdl, "early": early}
    if entry is None and out_dtype in (None, x.dtype) and (out is None or out.dtype == x.dtype):
        launches = launches_of(x, views, first, False, space)
        if launches and all(trusted(launch, pdl) for launch in launches):
            y = torch.empty(rows, weight.shape[0], dtype=x.dtype, device=x.device) if out is None else out
            return launched(launches, x, y, **how)
    return linear_triton(x, weight, weight_diff, n_ar, out_dtype, out=out, entry=entry, **how)


def linear_swiglu_either(
    x: Tensor, gate_up: AnyWeight, *, out: Tensor | None = None, entry: LinearEntry | None = None,
    pdl: bool = False, early: bool = True,
) -> Tensor:  # fmt: skip
    """`linear_swiglu_triton`, in Gluon where that is possible; with an entry always in Triton."""
    check_shapes(x, gate_up, None)
    launches = [] if entry else launches_of(x, (gate_up, None), x.shape[0], True, None)
    if launches and all(trusted(launch, pdl) for launch in launches):
        y = new_rows(x, x.shape[0], gate_up.shape[0] // 2) if out is None else out
        return launched(launches, x, y, pdl=pdl, early=early)
    return linear_swiglu_triton(x, gate_up, out=out, entry=entry, pdl=pdl, early=early)
