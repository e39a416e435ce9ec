"""Machines on this machine: namespaces with processes, a network address and a /tmp/ray of their own, behind
one bridge. They need root and util-linux."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOOLS = ("ip", "setpriv", "unshare", "nsenter", "mount", "ps")
NET = f"10.77.{os.getpid() % 250}"  # another one each time: a killed run leaves its bridge


def lacking() -> str:
    """Why there can be none here; "" where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if found := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{found[0]} is not installed"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return tried.stderr.decode()


class Machine:
    """One of them. Its processes end when its first one does."""

    def __init__(self, bridge: str, number: int) -> None:
        self.address = f"{NET}.{number}"
        of_its_own = ["--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
        with_us = ["setpriv", "--pdeathsig", "KILL"]  # a killed run leaves no process
        self._holder = subprocess.Popen([*with_us, "unshare", *of_its_own, "sleep", "infinity"])
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        while not (found := children.read_text().split()):
            time.sleep(0.01)
        self._pid, veth = found[0], f"{bridge}v{number}"
        _ip("link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", self._pid)
        _ip("link", "set", veth, "master", bridge, "up")
        for words in (
            ["ip", "link", "set", "lo", "up"], ["ip", "link", "set", "eth0", "up"],
            ["ip", "addr", "add", f"{self.address}/24", "dev", "eth0"],
            ["mkdir", "-p", "/tmp/ray"], ["mount", "-t", "tmpfs", "none", "/tmp/ray"],
        ):  # fmt: skip
            subprocess.run(self.words(*words), check=True)

    def words(self, *words: object, **environment: str) -> list[str]:
        """A command line that runs `words` there."""
        names = [f"{name}={value}" for name, value in environment.items()]
        inside = ["nsenter", "-t", self._pid, "--mount", "--net", "--pid"]
        return [*inside, "env", *names, *map(str, words)]

    def end(self) -> None:
        """End all that runs there."""
        self._holder.kill()
        self._holder.wait()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def machines(count: int) -> Iterator[list[Machine]]:
    """So many, which reach each other and are reached from here."""
    bridge, found = f"or{os.getpid() % 100000}", list[Machine]()
    _ip("link", "add", bridge, "type", "bridge")
    try:
        _ip("addr", "add", f"{NET}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number in range(1, count + 1):
            found.append(Machine(bridge, number))
        yield found
    finally:
        for machine in found:
            machine.end()
        _ip("link", "del", bridge)
