"""orthrus --version: what is installed, without importing it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


class ShowVersion(argparse.Action):
    """The option."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *parsed: object) -> None:
        """Print one line and raise SystemExit."""
        found = {name: _version(name) for name in ("orthrus-kernels", "torch", "triton")}
        own = found.pop("orthrus-kernels")
        beside = ", ".join(f"{name} {version}" for name, version in found.items())
        print(f"orthrus {own} ({beside}, Python {sys.version.split()[0]})")
        parser.exit()


def _version(package: str) -> str:
    """The version of an installed package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
