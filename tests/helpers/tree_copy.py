"""A copy of this tree to edit, and commands run in it that import nothing of this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def copied(to: Path) -> Path:
    """src, bench, tools and tests without what is large, at `to`."""
    without = shutil.ignore_patterns("__pycache__", "embedded", "results", "*.md", "fixtures")
    for folder in ("src", "bench", "tools", "tests"):
        shutil.copytree(ROOT / folder, to / folder, ignore=without)
    shutil.copy(ROOT / "pyproject.toml", to)
    return to


def said_by(root: Path, *command: str) -> tuple[int, str]:
    """Exit code and output of a Python command in the copy."""
    paths = os.pathsep.join(str(root / part) for part in ("src", "tests/helpers", "."))
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, *command], cwd=root, env=env, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)  # fmt: skip
    return done.returncode, done.stdout
