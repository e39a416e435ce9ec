"""Command lines in processes of their own with odd streams, signals and limits, many a second: a server has
imported what `orthrus` needs and forks for each, single-threaded. What comes before that, the imports, a real
process must show."""

from __future__ import annotations

import io
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STREAMS = ("file", "closed", "full", "broken", "terminal", "one-way")
TIMEOUT = 60.0  # seconds; then the process is killed, and its code is -9
CLEARED = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TERM", "PYTHONIOENCODING", "PYTHONUNBUFFERED")


@dataclass
class Ended:
    """How a process ended: an exit code or minus a signal's number, what it wrote, and its seconds."""

    code: int
    out: bytes
    err: bytes
    seconds: float


class ForkServer:
    """Starts the server; `embedded` stands for the embedded checkpoint."""

    def __init__(self, embedded: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="streams-"))
        env = {k: v for k, v in os.environ.items() if k not in CLEARED} | {"OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(embedded)], env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *words: object, **case: Any) -> Ended:
        """Run a command line. stdin: bytes, "closed" or "one-way" (opened for writing); stdout, stderr: one
        of STREAMS; env: more variables; folder: the working folder, None for one that is deleted; memory:
        bytes that may still be had; signals: pairs of seconds and a number."""
        assert self._server.stdin is not None and self._server.stdout is not None
        case = {"stdin": b"", "stdout": "file", "stderr": "file", "folder": "/", "signals": []} | case
        if isinstance(case["stdin"], bytes):
            (self._folder / "stdin").write_bytes(case["stdin"])
            case["stdin"] = "file"
        for name in ("stdout", "stderr"):
            (self._folder / name).write_bytes(b"")
        case |= {"words": [str(word) for word in words], "streams": str(self._folder)}
        self._server.stdin.write(json.dumps(case) + "\n")
        self._server.stdin.flush()
        ended = json.loads(self._server.stdout.readline())
        return Ended(
            ended["code"],
            (self._folder / "stdout").read_bytes(),
            (self._folder / "stderr").read_bytes(),
            ended["seconds"],
        )

    def close(self) -> None:
        """End the server."""
        self._server.communicate("")
        shutil.rmtree(self._folder)


def serve(embedded: str) -> None:
    """Read cases from stdin and answer on stdout how they ended."""
    import torch  # noqa: F401

    from qwen3_model import checkpoint, explain, prompts, qwen3  # noqa: F401
    from qwen3_model.cli import main

    checkpoint.EMBEDDED = Path(embedded)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of forked processes too, until they begin
    for line in sys.stdin:
        case = json.loads(line)
        master, slave = os.openpty() if case["stdout"] == "terminal" else (-1, -1)
        began = time.perf_counter()
        process = os.fork()
        if process == 0:
            os._exit(_work(main, case, slave))
        code = _wait(process, case, master, slave)
        print(json.dumps({"code": code, "seconds": time.perf_counter() - began}), flush=True)


def _wait(process: int, case: dict[str, Any], master: int, slave: int) -> int:
    """Send signals, keep what a terminal was shown, and return the exit code."""
    began, signals, shown = time.perf_counter(), sorted(case["signals"]), b""
    if slave >= 0:
        os.close(slave)
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if master < 0:
            time.sleep(0.002)
        else:
            shown += _shown(master)
        if done:
            break
        past = time.perf_counter() - began
        while signals and signals[0][0] <= past:
            os.kill(process, signals.pop(0)[1])
        if past > TIMEOUT:
            os.kill(process, signal.SIGKILL)
    if master >= 0:
        os.close(master)
        (Path(case["streams"]) / "stdout").write_bytes(shown)
    return os.waitstatus_to_exitcode(status)


def _shown(master: int) -> bytes:
    """What a terminal has been shown since the last time; waits a moment for it."""
    shown = b""
    while select.select([master], [], [], 0.002)[0]:
        try:
            shown += os.read(master, 1 << 16)
        except OSError:  # closed at its other end
            time.sleep(0.002)
            break
    return shown


def _work(main: Any, case: dict[str, Any], slave: int) -> int:
    """The forked process, from what Python does before a script to what it does after."""
    os.environ.update(case.get("env") or {})
    folder = case["folder"] or tempfile.mkdtemp()
    os.chdir(folder)
    if case["folder"] is None:
        os.rmdir(folder)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        _connect(number, case[name], os.path.join(case["streams"], name), slave)
    if slave > 2:
        os.close(slave)
    _open_streams()
    sys.argv = ["orthrus", *case["words"]]
    if case.get("memory") is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + case["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException as error:
        if sys.stderr is not None:
            with suppress(OSError):
                traceback.print_exc()
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        code = 120
    return code


def _connect(number: int, kind: str, file: str, slave: int) -> None:
    """Make a standard stream odd."""
    if kind == "closed":
        os.close(number)
        return
    if kind == "broken":
        reader, writer = os.pipe()
        os.close(reader)
    elif kind == "terminal":
        writer = os.dup(slave)
    elif kind == "full":
        writer = os.open("/dev/full", os.O_WRONLY)
    elif kind == "one-way":
        writer = os.open("/dev/null", os.O_WRONLY if number == 0 else os.O_RDONLY)
    else:
        writer = os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY)
    os.dup2(writer, number)
    os.close(writer)


def _open_streams() -> None:
    """sys.stdin, sys.stdout and sys.stderr as Python opens them."""
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream: io.TextIOWrapper | None = None
        with suppress(OSError):
            os.fstat(number)
            errors = "backslashreplace" if number == 2 else "strict"
            mode = "w" if number else "r"
            stream = open(number, mode, encoding=encoding, closefd=False, errors=errors)  # noqa: SIM115
            stream.reconfigure(
                line_buffering=number == 2 or stream.isatty(),
                write_through="PYTHONUNBUFFERED" in os.environ,
            )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


if __name__ == "__main__":
    serve(sys.argv[1])
