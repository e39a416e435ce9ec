"""`make gpu-check` without a GPU: which tests it takes, how it counts, and every launch it would sanitize."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreter import DEVICE

from bench import check, launches

XML = """<testsuites><testsuite>
<testcase classname="tests.kernels.test_linear" name="a"/>
<testcase classname="tests.kernels.test_linear" name="b"><failure message="assert  False
 here"/></testcase>
<testcase classname="tests.kernels.test_tables" name="c"><skipped message="no"/></testcase>
<testcase classname="tests.kernels.test_rowwise" name="d"><error message="boom"/></testcase>
</testsuite></testsuites>"""


def test_every_kernel_test_is_taken():
    names = {path.stem for path in check.test_files()}
    everything = {path.stem for path in (Path(__file__).parent / "kernels").glob("test_*.py")}
    assert (
        {"test_linear", "test_rowwise", "test_attention_kernels"}
        <= names
        == (everything - check.LEFT_OUT) | {"test_bits"}
    )
    assert everything >= check.LEFT_OUT


def test_outcomes_by_file():
    assert check.outcomes(XML) == [
        check.Outcome("test_linear", 2, 1, "b: assert False here"),
        check.Outcome("test_rowwise", 1, 1, "d: boom"),
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
def test_a_sanitizers_verdict(code, said, failures):
    got = check.judged("memcheck: x", code, said)
    assert got.failures == failures and bool(got.said) == bool(failures)


def test_a_process_that_takes_too_long_is_ended():
    command = [sys.executable, "-c", "import time; print('began', flush=True); time.sleep(60)"]
    code, _ = check.run(command, 1, check.environment())
    assert code is None


def test_children_run_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    env = check.environment()
    assert "TRITON_INTERPRET" not in env and env["ORTHRUS_TEST_DEVICE"] == "cuda"


@pytest.mark.parametrize("name", launches.LAUNCHES)
def test_every_launch_runs(name, monkeypatch):
    monkeypatch.setattr(launches, "DEVICE", DEVICE)
    launches.main([name])


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
@pytest.mark.parametrize("device, word", [("cuda", "where torch sees a GPU"), ("tpu", "'tpu'")])
def test_a_device_that_is_not_there_is_refused(device, word):
    code = "import os, sys; os.environ['ORTHRUS_TEST_DEVICE'] = sys.argv[1]; import interpreter"
    got = subprocess.run([sys.executable, "-c", code, device], cwd=Path(__file__).parent,
                         capture_output=True, text=True)  # fmt: skip
    assert got.returncode and word in got.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_checking_needs_a_gpu(capsys):
    with pytest.raises(SystemExit) as end:
        check.main([])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "none here" in said
