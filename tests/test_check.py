"""`make gpu-check` without a GPU: which tests it takes, how it counts, and every launch it would sanitize."""

import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interpreter import DEVICE, device_of
from triton.runtime.jit import KernelInterface

from orthrus_kernels.backends import _TRITON, REFERENCE, Ops
from tools import gpu_check, launches

XML = """<testsuites><testsuite>
<testcase classname="tests.kernels.test_linear" name="a"/>
<testcase classname="tests.kernels.test_linear" name="b"><failure message="assert  False
 here"/></testcase>
<testcase classname="tests.kernels.test_tables" name="c"><skipped message="no"/></testcase>
<testcase classname="tests.kernels.test_rowwise" name="d"><error message="boom"/></testcase>
<testcase classname="tests.kernels.test_rowwise" name="e"><skipped message="no"/></testcase>
</testsuite></testsuites>"""


def test_every_kernel_test_is_taken():
    names = {path.stem for path in gpu_check.kernel_tests()}
    everything = {path.stem for path in (Path(__file__).parent / "kernels").glob("test_*.py")}
    assert (
        {"test_linear", "test_rowwise", "test_attention_kernels"} <= names == everything - gpu_check.LEFT_OUT
    )
    assert everything >= gpu_check.LEFT_OUT
    assert [path.stem for path in gpu_check.model_tests()] == [
        "test_arrival_soak", "test_attention_gluon", "test_bits", "test_captured_cycles",
        "test_dependent_launches", "test_golden_gpu", "test_grammar_gpu", "test_linear_gluon",
        "test_linear_rows", "test_long_texts", "test_many_texts_gpu", "test_prefix_reuse",
        "test_prompts_beside", "test_quantised_gpu", "test_rounded_rows_gpu", "test_serve_gpu",
        "test_warm_start",
    ]  # fmt: skip


def test_whole_models_have_a_run_of_their_own(monkeypatch, capsys):
    """Few processes and a limit of their own; what they take is not taken from the sanitizer."""
    runs = []

    def run_tests(what, files, processes, limit, option):
        runs.append((files, processes, limit, option))
        return [gpu_check.Outcome(what, 1, 0)]

    monkeypatch.setattr(gpu_check, "run_tests", run_tests)
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: None)
    monkeypatch.setattr(gpu_check, "machine", lambda command: {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=85_000_000_000)
    )
    options = ["--processes", "8", "--seconds", "100", "--model-seconds", "70"]
    assert gpu_check.main(options) == 0
    kernels, models, timed = runs
    assert kernels == (gpu_check.kernel_tests(), 8, 100, "--seconds")
    assert models[1:] == (4, 52.5, "--model-seconds") and timed[1] == 1 and 60 < timed[2] <= 70
    assert sorted([*models[0], *timed[0]]) == gpu_check.model_tests(), "each once"
    assert {file.stem for file in timed[0]} == gpu_check.TIMED, "nothing beside what takes times"
    assert "compute-sanitizer is not installed" in capsys.readouterr().out
    runs.clear()
    assert gpu_check.main([*options, "--parts", "models"]) == 0 and [run[1] for run in runs] == [4, 1]
    said = capsys.readouterr().out
    assert "compute-sanitizer" not in said and "not looked at: kernels, sanitizer" in said


def test_a_run_of_tests_ends_at_its_limit(monkeypatch):
    said = []
    monkeypatch.setattr(
        gpu_check, "run", lambda command, limit, env: said.append((command, limit)) or (None, "")
    )
    files = gpu_check.model_tests()
    (got,) = gpu_check.run_tests("whole models", files, 3, 9, "--model-seconds")
    assert got.failures == 1 and "after 9 s (--model-seconds)" in got.said
    ((command, limit),) = said
    assert limit == 9 and str(files[0]) in command and str(gpu_check.kernel_tests()[0]) not in command


def test_outcomes_by_file():
    """Of a file without a case, why: a package that is missing must not hide a whole test."""
    assert gpu_check.outcomes(XML) == [
        gpu_check.Outcome("test_linear", 2, 1, "b: assert False here"),
        gpu_check.Outcome("test_rowwise", 1, 1, "d: boom"),
        gpu_check.Outcome("test_tables", 0, 0, "skipped: no"),
    ]


@pytest.mark.parametrize(
    "code, said, failures",
    [
        (0, "========= ERROR SUMMARY: 0 errors", 0),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0),
        (0, "========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 3 errors", 3),
        (0, "========= RACECHECK SUMMARY: 2 hazards displayed", 2),
        (0, "no summary at all", 1),
        (1, "Traceback\n========= ERROR SUMMARY: 0 errors", 1),
        (None, "", 1),
    ],
)
def test_a_sanitizers_verdict(code, said, failures, tmp_path):
    got = gpu_check.judged("memcheck: x", code, said, tmp_path)
    assert got.failures == failures and bool(got.said) == bool(failures)


TOLD = """========= Error: Race reported between Read access at _kernel+0x120 in a.py:123
=========     and Write access at _kernel+0x1230 in a.py:51 [87 hazards]
=========
========= Error: Race reported between Write access at _kernel+0x40 in b.py:7
=========     and Write access at _kernel+0x40 in b.py:7 [1 hazards]
========= RACECHECK SUMMARY: {} hazards displayed (1 error, 0 warnings)"""


@pytest.mark.parametrize("displayed, failures", [(0, 2), (2, 2), (5, 5)])
def test_races_are_told_with_both_accesses(displayed, failures, tmp_path):
    """And each is a failure, whatever the summary counts."""
    got = gpu_check.judged("racecheck: x", 0, TOLD.format(displayed), tmp_path)
    assert got.failures == failures
    assert got.said.count("Race reported") == 2 and "a.py:123 and Write access" in got.said
    assert got.said.endswith("b.py:7 and Write access at _kernel+0x40 in b.py:7 [1 hazards]")


@pytest.mark.parametrize("displayed, failures", [(0, 1), (2, 1), (5, 4)])
def test_races_of_the_hand_over_are_told_and_no_failures(displayed, failures, tmp_path, monkeypatch):
    """They offset no other failure."""
    monkeypatch.setattr(gpu_check, "is_hand_over", lambda race, cubins: "a.py" in race)
    got = gpu_check.judged("racecheck: x", 0, TOLD.format(displayed), tmp_path)
    assert got.failures == failures
    assert got.said.count("Race reported") == 1 and "b.py:7" in got.said and "a.py" not in got.said
    assert "no failure: 1 told" in got.said


def test_a_sanitizers_launch_has_compiled_kernels_of_its_own(monkeypatch):
    """racecheck's verdict reads their machine code, and finds no other form of a kernel there."""
    seen = []

    def run(command, limit, env):
        cubins = Path(env["TRITON_CACHE_DIR"])
        assert list(cubins.iterdir()) == []
        seen.append(cubins)
        return 0, TOLD.format(2)

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(
        gpu_check, "is_hand_over", lambda race, cubins: cubins == seen[-1] and cubins.is_dir()
    )
    assert gpu_check.sanitize("compute-sanitizer", "racecheck", "head", 5).failures == 0
    assert not seen[0].exists()


def test_a_part_that_cannot_run_is_refused(monkeypatch, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "machine", lambda command: {})
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: None)
    assert "CUDA toolkit" in refused(gpu_check.main, "--parts", "sanitizer")


def test_a_process_that_takes_too_long_is_ended():
    command = [sys.executable, "-c", "import time; print('began', flush=True); time.sleep(60)"]
    code, _ = gpu_check.run(command, 1, gpu_check.environment())
    assert code is None


def test_a_launch_that_is_ended_may_go_on_writing(monkeypatch):
    """compute-sanitizer is ended; the process that it started writes into the folder that is removed."""
    starts = "import subprocess, sys, time; subprocess.Popen([*sys.argv[1:]]); time.sleep(60)"
    writes = (
        "import os, time; end = time.time() + 4\n"
        "while time.time() < end:\n"
        "    os.makedirs(os.environ['TRITON_CACHE_DIR'], exist_ok=True)\n"
        "    open(os.path.join(os.environ['TRITON_CACHE_DIR'], str(time.time())), 'w')"
    )
    run = gpu_check.run
    monkeypatch.setattr(
        gpu_check, "run",
        lambda command, limit, env: run(
            [sys.executable, "-c", starts, sys.executable, "-c", writes], limit, env
        ),
    )  # fmt: skip
    got = gpu_check.sanitize("compute-sanitizer", "memcheck", "head", 1)
    assert got.failures == 1 and "not done in time" in got.said


def test_children_run_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    env = gpu_check.environment()
    assert "TRITON_INTERPRET" not in env and env["ORTHRUS_TEST_DEVICE"] == "cuda"


@pytest.mark.parametrize("name", launches.LAUNCHES)
def test_every_launch_runs(name, monkeypatch):
    """Each starts a kernel, and none raises."""
    started, plain = [], KernelInterface.__getitem__

    def record(kernel, grid):
        started.append(kernel.fn.__name__)
        return plain(kernel, grid)

    monkeypatch.setattr(KernelInterface, "__getitem__", record)
    monkeypatch.setattr(launches, "DEVICE", DEVICE)
    launches.main([name])
    assert started


def test_every_kernel_has_a_launch(monkeypatch):
    """All launches once, on the twins: what they call is what the Triton backend has kernels for."""
    called = set()

    def twin(name):
        def call(*arguments, **given):
            called.add(name)
            if name == "attention":  # its twin takes tiles of another height
                return arguments[0]
            of = getattr(REFERENCE, name)
            known = inspect.signature(of).parameters
            return of(*arguments, **{key: value for key, value in given.items() if key in known})

        return call

    monkeypatch.setattr(launches, "DEVICE", "cpu")
    monkeypatch.setattr(launches, "TRITON", Ops(**{name: twin(name) for name in vars(REFERENCE)}))
    monkeypatch.setattr(launches, "swiglu_triton", lambda *arguments: called.add("swiglu"))
    launches.main([])
    kernels = {name for name, op in vars(REFERENCE).items() if getattr(_TRITON, name) is not op}
    kernels.remove("new_tables")  # which launches nothing
    assert called == kernels | {"swiglu"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
@pytest.mark.parametrize("device, word", [("cuda", "where torch sees a GPU"), ("tpu", "'tpu'")])
def test_a_device_that_is_not_there_is_refused(device, word):
    with pytest.raises(RuntimeError, match=word):
        device_of(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_checking_needs_a_gpu(refused):
    assert "none here" in refused(gpu_check.main)
