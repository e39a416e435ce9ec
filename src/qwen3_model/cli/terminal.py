"""What a terminal is shown: colours or none, tables of its width, and text as it is, which is never laid
out."""

from __future__ import annotations

import os
import re
import shutil
import sys
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

CYAN, YELLOW, DIM = 36, 33, 2  # ANSI codes
NARROWEST, WIDEST = 20, 500  # columns; a narrower terminal breaks the lines itself
TABLES = 76  # columns from which on there are tables
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but tabs and line ends


def coloured(stream: TextIO | None = None) -> bool:
    """Whether a stream (default: stdout) gets colours: a terminal that has them or FORCE_COLOR, and no
    NO_COLOR."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "").lower() in ("dumb", "unknown"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream or sys.stdout).isatty()


def write(text: str, colour: int | None = None) -> None:
    """Write text of a model or a user to stdout at once, byte for byte as it is. A terminal is shown control
    characters escaped, tabs and line ends apart, since they could clear it or set its title. A colour ends
    before every line end."""
    if sys.stdout.isatty():
        text = _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
    if colour is not None and coloured():
        text = re.sub("[^\n]+", lambda found: f"\x1b[{colour}m{found[0]}\x1b[0m", text)
    sys.stdout.write(text)
    sys.stdout.flush()


class _Console(Console):
    """rich ends the process itself, with 1, when the reader of its output has gone."""

    def on_broken_pipe(self) -> None:
        """Let `main` give the exit code."""
        raise BrokenPipeError


def new_console(stderr: bool = False, quiet: bool = False) -> Console:
    """The layout engine for tables and headings, which takes every text literally."""
    colours = coloured(sys.stderr if stderr else sys.stdout)
    width = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    return _Console(
        stderr=stderr, quiet=quiet, width=width, color_system="standard" if colours else None,
        highlight=False, markup=False, emoji=False,
    )  # fmt: skip


def new_table(*headers: str, **shape: Any) -> Table:
    """A table whose cells are folded where they are too wide, never cut. No headers: names and values."""
    table = Table(show_header=bool(headers), **shape)
    for header in headers or ("", ""):
        table.add_column(header, overflow="fold")
    return table


def show(console: Console, table: Table) -> None:
    """Print a table; a narrow terminal gets its rows as sentences."""
    if console.width >= TABLES:
        console.print(table)
        return
    if table.title is not None:
        console.print(table.title, overflow="fold")
    for row in zip(*(column.cells for column in table.columns), strict=True):
        names, cells = [column.header for column in table.columns], row
        if not table.show_header:
            names, cells = list(row[:1]), row[1:]
        named = [f"{name}: {cell}" if name else cell for name, cell in zip(names, cells, strict=True) if cell]
        console.print(", ".join(named), overflow="fold")
