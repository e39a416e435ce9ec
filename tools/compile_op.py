"""Compile kernels for sm_90 and print a JSON line each: `python tools/compile_op.py _swiglu_kernel ...`.

Launches, launchers and kernels are those of the tree whose src and tests/helpers are on PYTHONPATH, which
need not be this file's: tools/check_kernel.py compares two."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import sys
from collections.abc import Collection, Iterator
from contextlib import redirect_stdout

if __name__ == "__main__":
    sys.path.pop(0)  # tools/ of this file's tree

import aot  # noqa: E402
import aot_launches  # noqa: E402
import compile_attention  # noqa: E402

TARGET = "sm_90"
# compiled by compile_attention.py
BY_SIGNATURE = {
    "_partial_kernel",
    "_combine_kernel",
    "_path_kernel",
    "_whole_kernel",
    "_commit_kernel",
}
# compiled by compile_gluon.py
GLUON, CODES, WIDE = "_linear_gluon_kernel", "_linear_gluon_codes_kernel", "_linear_gluon_wide_kernel"
GLUON_ATTENTION = "_attention_gluon_kernel"  # compiled by compile_attention_gluon.py
FIGURES = ("registers", "spill_bytes", "shared")


def by_launch(wanted: Collection[str]) -> Iterator[dict]:
    """What the launches of aot_launches.py compile."""
    for case, module, kernel, launch, targets in aot_launches.launches():
        if kernel not in wanted or not {TARGET, *aot_launches.MORE} & set(targets):
            continue
        line = {"kernel": kernel, "case": case}
        try:
            with aot.recorded(module, kernel) as recorder:
                launch()
            (arguments,) = recorder.launches
            line |= aot.compile_for(recorder.kernel, arguments, aot.TARGETS[TARGET])
        except Exception as error:  # the others still report
            line["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        yield line


def by_signature(wanted: Collection[str]) -> Iterator[dict]:
    """What compile_attention.py prints; it compiles the large ones together."""
    said = io.StringIO()
    with redirect_stdout(said):
        if set(wanted) == {"_commit_kernel"}:
            compile_attention.commit(TARGET)
        else:
            sys.argv = ["compile_attention.py", TARGET, *getattr(compile_attention, "MORE", ())]
            compile_attention.main()
    for line in map(json.loads, said.getvalue().splitlines()):
        names = {"D": line["D"], "rows": line["FOLDED"], "folds": line["FUSED"]}
        sizes = ", ".join(f"{name} {value}" for name, value in names.items() if value is not None)
        yield {
            "kernel": line["kernel"], "case": f"{line['dtype']} {sizes}".strip(),
            "registers": line["registers"], "spill_bytes": line["spilled"], "shared": line["shared"],
        }  # fmt: skip


def by_tile() -> Iterator[dict]:
    """What compile_gluon.py compiles; nothing in a tree without Gluon."""
    if importlib.util.find_spec("compile_gluon"):
        compile_gluon = importlib.import_module("compile_gluon")
        for plan in compile_gluon.plans(False):
            line = compile_gluon.line_of(plan, True)
            yield {"kernel": GLUON, **{name: line[name] for name in ("case", *FIGURES)}}
        for plan in compile_gluon.wide_plans(False) if hasattr(compile_gluon, "wide_plans") else ():
            line = compile_gluon.line_of(plan, True)
            yield {"kernel": WIDE, **{name: line[name] for name in ("case", *FIGURES)}}
        for coded in compile_gluon.coded_plans(False) if hasattr(compile_gluon, "coded_plans") else ():
            line = compile_gluon.coded_line(*coded)
            yield {"kernel": CODES, **{name: line[name] for name in ("case", *FIGURES)}}


def gluon_attention() -> Iterator[dict]:
    """What compile_attention_gluon.py compiles; nothing in a tree without it."""
    if importlib.util.find_spec("compile_attention_gluon"):
        for line in importlib.import_module("compile_attention_gluon").gluon_lines():
            case = f"{line['heads']} heads, {'whole' if line['whole'] else 'partial'}"
            yield {"kernel": GLUON_ATTENTION, "case": case, **{name: line[name] for name in FIGURES}}


def main(wanted: list[str]) -> None:
    found = list(by_launch(wanted))
    if GLUON in wanted:
        found += by_tile()
    if BY_SIGNATURE.intersection(wanted):
        found += [line for line in by_signature(wanted) if line["kernel"] in wanted]
    if GLUON_ATTENTION in wanted:
        found += gluon_attention()
    seen: dict[tuple[str, str], int] = {}
    for line in found:
        key = line["kernel"], line["case"]
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 1:
            line["case"] += f", {seen[key]}"
        kept = {name: line[name] for name in ("kernel", "case", "error", *FIGURES) if name in line}
        print(json.dumps(kept), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
