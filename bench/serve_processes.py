"""The processes of `bench.serve`: the server's and those of its clients. Each answers in lines of JSON."""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_model import InputError

from .serve_jobs import Seen

ROOT = Path(__file__).resolve().parents[1]
CONNECTIONS = 16  # of a client process
PATIENCE = 60.0  # seconds that a request may take at least
END_SECONDS = 20.0  # that a server has to end


class NoTime(InputError):
    """What is asked for does not fit into --seconds."""


class Lines:
    """A process that answers in lines of JSON; what it writes to stderr goes to a file."""

    def __init__(self, module: str, keep: ExitStack) -> None:
        self._err = keep.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", module], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._err, start_new_session=True,
        )  # fmt: skip
        keep.callback(self._end)
        self._said = queue.SimpleQueue[bytes]()
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, data: bytes) -> None:
        """Write to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def next(self, until: float) -> dict[str, Any]:
        """Its next line. Raises InputError where it ends without one, and where none comes in time."""
        try:
            line = self._said.get(timeout=max(until - time.monotonic(), 0.1))
        except queue.Empty:
            raise NoTime("no time left") from None
        if not line:
            self._err.seek(0)
            last = [text.strip()[-200:] for text in self._err if text.strip()][-2:]
            raise InputError(f"{self.process.args[-1]} has ended: {' / '.join(last)}")  # type: ignore[index]
        return json.loads(line)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(b"{"):
                self._said.put(line)
        self._said.put(b"")

    def _end(self) -> None:
        with suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class Clients:
    """The client processes."""

    processes: list[Lines]

    @staticmethod
    @contextmanager
    def of(connections: int) -> Iterator[Clients]:
        """So many connections at once, shared out among processes; a core of four at most does nothing
        else."""
        count = max(1, min(math.ceil(connections / CONNECTIONS), (os.cpu_count() or 1) // 4))
        with ExitStack() as keep:
            yield Clients([Lines("bench.serve_client", keep) for _ in range(count)])

    def loop(
        self, plan: dict[str, Any], kind: str, asked: Sequence[Any], until: float
    ) -> tuple[list[Seen], float]:
        """What became of the requests of a loop, and the share of a core that the busiest process used. kind:
        of `asked`, clients or arrivals. Raises InputError."""
        plan = plan | {"begin": time.monotonic() + 0.3}
        used = self.processes[: max(1, min(len(self.processes), len(asked)))]
        for i, process in enumerate(used):
            process.send(json.dumps(plan | {kind: asked[i :: len(used)]}).encode() + b"\n")
        answers = [process.next(until + PATIENCE) for process in used]
        if wrong := next((answer["error"] for answer in answers if "error" in answer), None):
            raise InputError(f"a client failed: {wrong}")
        seen = [Seen(**one) for answer in answers for one in answer["seen"]]
        return sorted(seen, key=lambda s: s.sent), round(max(answer["core"] for answer in answers), 3)
