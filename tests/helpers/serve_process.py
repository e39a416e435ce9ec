"""`orthrus serve` as a process of its own, as a user starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

COMMAND = "from qwen3_model.cli import main; raise SystemExit(main())"


class ServeProcess:
    """The command with its engine's process. file: for what it says, on stdout and stderr."""

    def __init__(self, file: Path, *words: object, seconds: float = 120.0, **environment: str) -> None:
        """Start it on a free port, and wait until it is ready. environment: beside this process's."""
        self.file = file
        with open(file, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, "serve", "--port", "0", *map(str, words)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=os.environ | environment,
            )  # fmt: skip
        try:
            self._wait_until_ready(seconds)
        except BaseException:
            self.process.kill()
            raise

    def _wait_until_ready(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not (found := re.search(r"served at http://\S+:(\d+) ", self.said)):
            assert self.process.poll() is None and time.monotonic() < end, self.said
            time.sleep(0.05)
        self.port = int(found[1])
        self.worker = _children(self.process.pid)[0]

    def __enter__(self) -> ServeProcess:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def said(self) -> str:
        """What it has said so far."""
        return self.file.read_text()

    def get(self, path: str) -> str:
        """The body at a path. Raises HTTPError for a status that is none of success."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=20) as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        """A value of /metrics."""
        found = re.search(rf"^orthrus_{name} (\S+)", self.get("/metrics"), re.M)
        assert found is not None, name
        return float(found[1])

    def wait_until_idle(self, seconds: float = 30.0) -> None:
        """Wait until no text runs or waits, and no page is owned."""
        end = time.monotonic() + seconds
        names = "requests_running", "requests_waiting", "requests_paused", "cache_pages_used"
        while found := {name: count for name in names if (count := self.metric(name))}:
            assert time.monotonic() < end, found
            time.sleep(0.05)

    def resident(self) -> dict[str, int]:
        """KiB of memory of the server and of its engine."""
        return {name: _resident(pid) for name, pid in self._pids().items()}

    def open_files(self) -> dict[str, int]:
        """File descriptors of both."""
        return {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in self._pids().items()}

    def _pids(self) -> dict[str, int]:
        return {"server": self.process.pid, "engine": self.worker}

    def end(self, seconds: float = 60.0) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


def _children(pid: int) -> list[int]:
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        found += Path(f"/proc/{pid}/task/{task}/children").read_text().split()
    return [int(child) for child in found]


def _resident(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in line]
    return int(line.split()[1])
