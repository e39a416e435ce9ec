"""Time an operation of one tree on this GPU: `python tools/time_op.py swiglu '{"models": ["8B"], ...}'`.

Every line on stdin is answered by a line of JSON, microseconds by case. The operation is that of the tree
whose folder and src are on PYTHONPATH, which need not be this file's: tools/check_kernel.py asks two in
turn."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence

if __name__ == "__main__":
    sys.path.pop(0)  # tools/ of this file's tree

import torch  # noqa: E402

from bench.cases import OURS, Case, cases  # noqa: E402
from bench.kernels import POOL  # noqa: E402
from bench.measure import Meter, Pool  # noqa: E402
from orthrus_kernels import tables  # noqa: E402


def label(case: Case) -> str:
    """A case in words."""
    context = f"context {case.context}" if case.context is not None else ""
    return ", ".join(filter(None, (case.model, case.name, f"rows {case.rows}", context)))


def timed(wanted: Sequence[Case], meter: Meter) -> dict[str, float | str]:
    """The median of every case, or what it raised."""
    found: dict[str, float | str] = {}
    for case in wanted:
        meter.pool.reset()
        try:
            copies, calls = case.build(meter.pool)
            found[label(case)] = meter.time(calls[OURS], copies).median  # type: ignore[arg-type]
        except Exception as error:  # the others still report
            found[label(case)] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return found


def main(op: str, sizes: str) -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    device = torch.device("cuda")
    given = json.loads(sizes)
    key = tables.device_key(device)
    wanted = list(cases([op], given["models"], given["rows"], given["contexts"], key))
    meter = Meter(Pool(device, POOL), seconds=0.01)
    for _ in sys.stdin:
        print(json.dumps(timed(wanted, meter)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
