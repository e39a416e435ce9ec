"""How a bench ends where stdout takes nothing, its reader has gone, or Ctrl-C comes: as `orthrus` does."""

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRINTS = "from bench.command import *; sys.exit(run('bench.x', lambda: print('x' * 9) or {then}))"
# What `python -m bench.strong` does, with a Ctrl-C in the imports of torch
IMPORTS = """
import os, runpy, signal, sys
class Watch:
    def find_spec(self, name, *rest):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Watch())
sys.argv = ["-m"]
runpy.run_module("bench.strong", run_name="__main__", alter_sys=True)
"""


def started(*words: str, stdout: int | None = None, smallest: bool = False) -> subprocess.CompletedProcess:
    """A process whose stdout is a descriptor or, with `smallest`, a file that can hold nothing."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, text=True, timeout=60, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE if stdout is None else stdout, preexec_fn=limit if smallest else None,
        env=os.environ | {"PYTHONPATH": f"{ROOT}/src", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip


def full(folder: Path, *words: str) -> subprocess.CompletedProcess:
    with open(folder / "out", "w") as out:
        return started(*words, stdout=out.fileno(), smallest=True)


def broken(*words: str) -> subprocess.CompletedProcess:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return started(*words, stdout=writer)
    finally:
        os.close(writer)


def test_a_disk_that_is_full(tmp_path):
    for words in (["-c", PRINTS.format(then="0")], ["-m", "bench.strong", "--help"]):
        done = full(tmp_path, *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "File too large" in done.stderr
        assert re.match(r"bench\.(x|strong): error: ", done.stderr)


def test_a_reader_who_has_gone():
    for words in (["-c", PRINTS.format(then="0")], ["-m", "bench.kernels", "--quick", "--ops", "swiglu"]):
        done = broken(*words)
        assert (done.returncode, done.stderr) == (141, "")


def test_exit_codes_stay():
    for then, code in (("0", 0), ("1", 1), ("fail('bench.x', 'no')", 2)):
        assert started("-c", PRINTS.format(then=then)).returncode == code
    done = started("-c", PRINTS.format(then="1 / 0"))
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr, "a fault of the program is shown"


def test_ctrl_c_at_work_and_during_the_imports():
    for words, command in (
        (PRINTS.format(then="os.kill(os.getpid(), 2)").replace("; ", "; import os; ", 1), "bench.x"),
        (IMPORTS, "bench"),
    ):
        done = started("-c", words)
        assert (done.returncode, done.stderr) == (130, f"{command}: interrupted\n")


def test_ctrl_c_is_not_told_by_the_processes_that_compile():
    """All of a terminal's processes get it: they ignore it, and this one ends them."""
    from bench.command import in_processes

    before = signal.getsignal(signal.SIGINT)
    assert in_processes(says_sigint, (), 2, 60) == [str(signal.SIG_IGN)]
    assert signal.getsignal(signal.SIGINT) is before


def says_sigint(i: int, workers: int) -> list[str]:
    return [str(signal.getsignal(signal.SIGINT))]


def test_an_attempt_does_not_go_on_without_stdout():
    from bench import decode_report  # here: processes that import this file should not wait for torch

    run = decode_report.Run(1.0, lambda: 9.0)

    def fail(error: Exception) -> None:
        raise error

    for error in (ValueError("x"), FileNotFoundError(2, "gone", "file")):
        run.attempt("work", lambda error=error: fail(error))
    run.attempt("peer", lambda: fail(ConnectionError("no server")), is_peer=True)
    assert len(run.notes) == 3 and run.failed
    try:
        run.attempt("work", lambda: fail(BrokenPipeError(32, "Broken pipe")))
    except BrokenPipeError:
        run.notes.append("ended")
    assert run.notes[3:] == ["ended"]


def test_all_benches_end_so():
    """Those that a user starts, not what a bench starts."""
    inner = "vllm_peer.py", "serve_client.py", "serve_server.py"
    mains = [
        path for path in (ROOT / "bench").glob("*.py")
        if 'if __name__ == "__main__"' in path.read_text() and path.name not in inner
    ]  # fmt: skip
    assert len(mains) >= 8
    for path in mains:
        assert path.read_text().rstrip().endswith("sys.exit(run(COMMAND, main))"), path.name
        assert f'COMMAND = "bench.{path.stem}"' in path.read_text()
