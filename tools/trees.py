"""Two trees of this repository side by side: what is here, and a commit exported beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

HERE = Path(__file__).parent


class NoBase(Exception):
    """Why there is no tree to compare with, in one line."""


@contextmanager
def exported(ref: str, root: Path) -> Iterator[Path]:
    """src, bench and tests of a commit, in a folder that goes away. Raises NoBase."""
    with tempfile.TemporaryDirectory(prefix="orthrus-base-") as folder:
        archive = Path(folder) / "base.tar"
        _git(root, ref, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
        _git(root, ref, "archive", "-o", str(archive), ref, "src", "bench", "tests")
        shutil.unpack_archive(archive, folder)
        yield Path(folder)


def _git(root: Path, ref: str, *command: str) -> None:
    try:
        done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True)
    except OSError as error:
        raise NoBase(f"git is needed to export {ref!r}: {error}") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or "it is no commit here"
        raise NoBase(f"cannot export {ref!r}, the tree to compare with (--base): {said}")


def environment(tree: Path) -> dict[str, str]:
    """For a process that compiles or measures a tree's kernels and imports nothing of another tree's."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [tree / "src", tree / "tests/helpers", tree]
    return env | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


def compiled(tree: Path, kernels: Sequence[str], limit: float) -> tuple[dict[tuple[str, str], dict], str]:
    """({(kernel, case): figures for sm_90}, why it ended early) of a tree, in a process of its own."""
    command = [sys.executable, str(HERE / "compile_op.py"), *kernels]
    try:
        done = subprocess.run(
            command, env=environment(tree), cwd=tree, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {}, f"not compiled after {limit:.0f} s (--seconds)"
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    said = " ".join(done.stderr.split())[-300:] if done.returncode else ""
    return {(line.pop("kernel"), line.pop("case")): line for line in lines}, said


def timed(
    trees: Mapping[str, Path], op: str, sizes: Mapping, rounds: int
) -> dict[str, list[dict[str, float | str]]]:
    """Microseconds by case, a dictionary a round, of every tree. Each tree has a process, and they take turns
    on the GPU; the first to go changes from round to round. Raises RuntimeError when one ends early."""
    command = [sys.executable, str(HERE / "time_op.py"), op, json.dumps(sizes)]
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(subprocess.Popen(
                command, env=environment(tree), cwd=tree, text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            ))
            for name, tree in trees.items()
        }  # fmt: skip
        found: dict[str, list] = {name: [] for name in trees}
        for i in range(rounds + 1):
            for name in list(trees)[:: 1 if i % 2 else -1]:
                found[name].append(_answer(name, running[name]))
    return {name: answers[1:] for name, answers in found.items()}  # the first round compiled


def _answer(name: str, process: subprocess.Popen) -> dict[str, float | str]:
    assert process.stdin and process.stdout
    try:
        process.stdin.write("go\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        raise RuntimeError(f"measuring {name} ended early with exit code {process.wait()}")
    return json.loads(line)
