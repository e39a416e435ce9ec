"""Engine processes that fork off this one, which has imported torch, in place of the spawned ones of
serve/engine_client.py: they start in no time."""

from __future__ import annotations

import os
import signal
import sys
import time
from threading import Lock

from qwen3_model.serve import worker


class ForkedWorker:
    """As much of subprocess.Popen as an EngineClient needs."""

    def __init__(self, pipe: int) -> None:
        """pipe: a file descriptor, the one of ours that the process keeps beside the standard streams."""
        self.returncode: int | None = None
        self._waited = Lock()  # the client's reader and its loop both ask; a process is waited for once
        self.pid = os.fork()
        if self.pid == 0:
            os.closerange(3, pipe)
            os.closerange(pipe + 1, 1 << 16)
            sys.argv, sys.stderr = ["worker", str(pipe)], open(2, "w", closefd=False)  # noqa: SIM115
            worker.main()

    def poll(self) -> int | None:
        with self._waited:
            if self.returncode is None:
                done, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if done else None
            return self.returncode

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.005)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
