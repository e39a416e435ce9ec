"""The kernels on this GPU: their tests compiled instead of interpreted, whole models, then compute-sanitizer.

The interpreter proves indices, masks and the order of segments; only a GPU proves the order of sums inside
compiled reductions and tensor-core dots, and that programs do not race. This is what stands behind "bit for
bit" on a machine. Needs the `test` extra; compute-sanitizer comes with the CUDA toolkit and is left out, in a
line, where there is none."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

from bench.command import Parser, fail, positive
from bench.measure import machine, machine_line
from bench.report import print_tables

from .launches import LAUNCHES
from .races import is_hand_over, races

COMMAND = "tools.gpu_check"
ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {
    "test_aot", "test_attention_aot", "test_attention_gluon_aot", "test_backends", "test_compile_ahead",
    "test_compiled_options", "test_gluon_aot", "test_gluon_attention", "test_gluon_wide",
    "test_interpreter", "test_linear_either", "test_pdl",
}  # fmt: skip
TIMED = {"test_long_texts", "test_prefix_reuse", "test_prompts_beside", "test_warm_start"}  # run one by one
PARTS = ("kernels", "models", "sanitizer")
TOOLS = ("memcheck", "racecheck")
MODEL_BYTES = 19 << 30  # of a process, which holds a model, the largest of 8B
BESIDE = 0.75  # of the time of whole models, until those that take times run
ERRORS = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


@dataclass(frozen=True)
class Outcome:
    """A line of the table."""

    what: str
    cases: int
    failures: int
    said: str = ""  # why, where something failed or nothing ran; and races that are none


def kernel_tests(root: Path = ROOT) -> list[Path]:
    """Every kernel test but those that compile for other GPUs or test the interpreter, which prove the same
    anywhere."""
    return sorted(p for p in (root / "tests/kernels").glob("test_*.py") if p.stem not in LEFT_OUT)


def model_tests(root: Path = ROOT) -> list[Path]:
    """Whole models and full sizes, minutes: in a run of their own."""
    return sorted((root / "tests/gpu").glob("test_*.py"))


def model_processes(given: int) -> int:
    """So many at most, and no more than models fit in the GPU's memory."""
    return max(1, min(given, torch.cuda.get_device_properties(0).total_memory // MODEL_BYTES))


def environment(device: str = "cuda") -> dict[str, str]:
    """For child processes: this repository's sources, tensors on `device`; kernels are compiled on a GPU."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT / "src"), str(ROOT), env.get("PYTHONPATH", "")]
    return env | {"ORTHRUS_TEST_DEVICE": device, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(command: Sequence[str], limit: float, env: dict[str, str]) -> tuple[int | None, str]:
    """(exit code, output) of a process; None when it took longer than `limit` seconds and was ended."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, timeout=max(limit, 1), text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        return None, said.decode(errors="replace") if isinstance(said, bytes) else said
    return done.returncode, done.stdout


def run_tests(
    what: str, files: Sequence[Path], processes: int, limit: float, option: str, device: str = "cuda"
) -> list[Outcome]:
    """A pytest run of at most `limit` seconds, a line a file. option: the one that sets the limit."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", *map(str, files), f"--junitxml={xml}",
                   "-p", "no:cacheprovider", f"--timeout={limit:.0f}"]  # fmt: skip
        if processes > 1 and importlib.util.find_spec("xdist"):
            command += ["-n", str(processes)]
        code, said = run(command, limit, environment(device))
        if code is None:
            return [Outcome(what, 0, 1, f"not done after {limit:.0f} s ({option})")]
        if not xml.exists():
            return [Outcome(what, 0, 1, " ".join(said.split())[-300:])]
        found = outcomes(xml.read_text())
    if code and not any(outcome.failures for outcome in found):
        found.append(Outcome(what, 0, 1, f"exit code {code}: " + " ".join(said.split())[-300:]))
    return found


def whole_models(processes: int, seconds: float) -> list[Outcome]:
    """The tests of whole models, those that take times one by one behind the others."""
    began, files, option = time.perf_counter(), model_tests(), "--model-seconds"
    beside = [file for file in files if file.stem not in TIMED]
    found = run_tests("whole models", beside, model_processes(processes), BESIDE * seconds, option)
    left = seconds - (time.perf_counter() - began)
    return found + run_tests("timed models", [f for f in files if f.stem in TIMED], 1, left, option)


def outcomes(xml: str) -> list[Outcome]:
    """Cases and failures by test file from pytest's JUnit XML. Skipped tests are no cases; where a file has
    no others, why."""
    counts: dict[str, list] = {}
    skipped: dict[str, str] = {}
    for case in ElementTree.fromstring(xml).iter("testcase"):
        file = case.get("classname", "").split(".")[-1] or case.get("name", "?")
        count = counts.setdefault(file, [0, 0, ""])
        left_out = case.find("skipped")
        if left_out is not None:
            skipped.setdefault(file, f"skipped: {_folded(left_out)}")
            continue
        count[0] += 1
        broken = case.find("failure") if case.find("failure") is not None else case.find("error")
        if broken is not None:
            count[1] += 1
            count[2] = count[2] or f"{case.get('name')}: {_folded(broken)}"
    for file, why in skipped.items():
        if not counts[file][0]:
            counts[file][2] = why
    return [Outcome(name, *count) for name, count in sorted(counts.items())]


def _folded(element: ElementTree.Element) -> str:
    return " ".join((element.get("message") or "").split())[:200]


def sanitizer() -> str | None:
    """compute-sanitizer, on the PATH or in the CUDA toolkit."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [os.path.join(home, "bin") for home in (*homes, "/usr/local/cuda") if home]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(places)
    )


def sanitize(program: str, tool: str, name: str, limit: float) -> Outcome:
    """One kernel's small launches under one tool. Without torch's cache of freed memory, so that each tensor
    is an allocation whose bounds are checked; with a cache of compiled kernels that holds these alone."""
    command = [program, "--tool", tool, "--target-processes", "application-only", sys.executable, "-m",
               "tools.launches", name]  # fmt: skip
    # what a sanitizer that was ended had started may go on writing for a while
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cubins:
        own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_CACHE_DIR": cubins}
        code, said = run(command, limit, environment() | own)
        return judged(f"{tool}: {name}", code, said, Path(cubins))


def sanitized(program: str, processes: int, seconds: float) -> list[Outcome]:
    """Every launch under every tool, so many beside each other."""
    end = time.perf_counter() + seconds
    jobs = [(tool, name) for tool in TOOLS for name in LAUNCHES]
    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(lambda job: sanitize(program, *job, end - time.perf_counter()), jobs))


def judged(what: str, code: int | None, said: str, cubins: Path) -> Outcome:
    """The outcome of a sanitizer's output: errors or races counted, and what it did not finish. Races at the
    hand-over of parts to warps (races.py) are told, and are no failures."""
    if code is None:
        return Outcome(what, 1, 1, "not done in time (--seconds)")
    counts = [int(a or b) for a, b in ERRORS.findall(said)]
    if not counts or code:
        last = " ".join(said.split())[-200:]
        return Outcome(what, 1, max([1, *counts]), f"exit code {code}: {last}")
    found = races(said)
    true = [race for race in found if not is_hand_over(race, cubins)]
    none = len(found) - len(true)
    failures = max(sum(counts), len(found)) - none
    told = ["; ".join(true) or _first_error(said)] if failures else []
    if none:
        told.append(f"no failure: {none} told at Triton's hand-over of parts to warps, ordered by barrier 1")
    return Outcome(what, 1, failures, "; ".join(told))


def _first_error(said: str) -> str:
    lines = [line.strip("= ") for line in said.splitlines() if line.startswith("=========")]
    return next((line for line in lines if "Invalid" in line or "hazard" in line.lower()), "")


def need_pytest(command: str) -> None:
    """End with one line where the `test` extra is not installed."""
    missing = [n for n in ("pytest", "pytest_timeout", "hypothesis") if not importlib.util.find_spec(n)]
    if missing:
        fail(command, f"{', '.join(missing)} missing: pip install -e '.[test]'")


def parse(arguments: Sequence[str] | None):
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description="Run the kernel tests compiled on this GPU, whole models, then compute-sanitizer.",
        epilog="example: python -m tools.gpu_check --parts models --model-seconds 1800",
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of the check; default: all"
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=480,
        help="for kernel tests and compute-sanitizer together; default: %(default)s",
    )
    parser.add_argument(
        "--model-seconds",
        type=positive,
        default=1500,
        help="for the tests of whole models besides; default: %(default)s",
    )
    parser.add_argument(
        "--processes",
        type=positive,
        default=min(8, os.cpu_count() or 1),
        help="beside each other, for whole models no more than fit in memory; default: %(default)s",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if not torch.cuda.is_available():
        fail(
            COMMAND,
            "this checks compiled kernels on a GPU, and there is none here; `make test` interprets them",
        )
    need_pytest(COMMAND)
    program = sanitizer() if "sanitizer" in given.parts else None
    if not program and given.parts == ["sanitizer"]:
        fail(COMMAND, "compute-sanitizer is not here: it comes with the CUDA toolkit; CUDA_HOME says where")
    began = time.perf_counter()
    print(machine_line(machine(f"python -m {COMMAND}")), flush=True)
    limit = given.seconds * (0.65 if program else 1)
    found = list[Outcome]()
    if "kernels" in given.parts:
        found += run_tests("kernel tests", kernel_tests(), given.processes, limit, "--seconds")
    left = given.seconds - (time.perf_counter() - began)
    if "models" in given.parts:
        found += whole_models(given.processes, given.model_seconds)
    if program:
        found += sanitized(program, given.processes, left)
    lines = [[o.what, str(o.cases), str(o.failures)] for o in found]
    failures = sum(o.failures for o in found)
    lines.append(["all", str(sum(o.cases for o in found)), str(failures)])
    print_tables([("Compiled kernels on this GPU", ["what", "cases", "failures"], lines)])
    print(*(f"{o.what}: {o.said}" for o in found if o.said), sep="\n")
    if not program and "sanitizer" in given.parts:
        print("compute-sanitizer is not installed here: out-of-bounds accesses and races were not looked for")
    left_out = [part for part in PARTS if part not in given.parts]
    if left_out:
        print(f"not looked at: {', '.join(left_out)}")
    print(f"{failures} failures; {time.perf_counter() - began:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
