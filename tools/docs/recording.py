"""Record a command in a terminal and write it as an animated picture, docs/demo.svg, at the speed it ran.

Pieces of output become visible when they came; the picture starts anew 4 seconds after the last. A program
that does not animate shows the end. The machine and the day stand under it."""

from __future__ import annotations

import fcntl
import os
import platform
import pty
import re
import select
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch

from bench.command import Parser, fail, writable
from qwen3_model.cli.output import write_atomically

from .svg import MONO, SANS, picture, rect, text

COMMAND = "tools.docs.recording"
ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs/demo.svg"
RECORDED = "orthrus demo --prompts 1 --max-new-tokens 64 --device cpu"
COLUMNS, MOST_LINES, PAUSE = 80, 60, 4.0
WIDTH, HEIGHT, MARGIN, TOP = 7.8, 17, 16, 52  # of a character, of a line, and around them
INK, PAPER, DIM = "#d8dee6", "#14181d", "#7d8794"
BUTTONS = ("#e06c75", "#e5b93c", "#7bc96f")
COLOURS = {36: "#56c8d8", 33: "#e5b93c", 32: "#7bc96f", 31: "#e06c75", 35: "#c792ea"}


@dataclass(frozen=True)
class Piece:
    """Text of one style on one line. at: seconds from the start until it was there."""

    at: float
    line: int
    column: int
    text: str
    colour: int = 0
    bold: bool = False
    dim: bool = False


def record(command: Sequence[str]) -> list[tuple[float, str]]:
    """What a command wrote to a terminal of COLUMNS columns, with the second at which it came. Raises
    OSError if it does not start, ValueError if it fails."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
    env |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    began, found, rest = time.perf_counter(), list[tuple[float, str]](), b""
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env, cwd=ROOT) as process:
        os.close(slave)
        while True:
            ready = select.select([master], [], [], 0.2)[0]
            if not ready and process.poll() is not None:
                break
            try:
                came = os.read(master, 1 << 16) if ready else b""
            except OSError:  # Linux: the other end is closed
                break
            whole, rest = _whole(rest + came)
            if whole:
                found.append((time.perf_counter() - began, whole))
    os.close(master)
    if process.returncode:
        raise ValueError(f"{shlex.join(command)} ended with exit code {process.returncode}")
    return found


def _whole(data: bytes) -> tuple[str, bytes]:
    """Text up to a character or an escape sequence that is not there yet, and that."""
    for end in range(len(data), -1, -1):
        try:
            said = data[:end].decode()
        except UnicodeDecodeError:
            continue
        if not re.search(r"\x1b(\[[\d;]*)?$", said):
            return said, data[end:]
    return "", data


def pieces(events: Sequence[tuple[float, str]]) -> list[Piece]:
    """What stands on the screen at the end, with the times at which it came. Raises ValueError for output
    that moves the cursor elsewhere than to a line's start, or has more than MOST_LINES lines."""
    found: list[Piece] = []
    line = column = 0
    style = Piece(0, 0, 0, "")
    for at, said in events:
        for code, words in re.findall(r"(\x1b\[\??[\d;]*[A-Za-z]|[\r\n])|([^\x1b\r\n]+)", said):
            if code.endswith("m"):
                style = restyled(style, code[2:-1])
            elif code == "\x1b[2K":  # a progress bar is drawn anew
                found = [piece for piece in found if piece.line != line]
            elif code in ("\r", "\n"):
                line, column = line + (code == "\n"), 0
            elif code and code not in ("\x1b[?25l", "\x1b[?25h"):  # those hide and show the cursor
                raise ValueError(f"the command moves the cursor ({code!r}): that cannot be drawn")
            while words:
                if column == COLUMNS:
                    line, column = line + 1, 0
                part, words = words[: COLUMNS - column], words[COLUMNS - column :]
                found.append(replace(style, at=at, line=line, column=column, text=part))
                column += len(part)
    if line > MOST_LINES:
        raise ValueError(f"the command wrote {line} lines: {MOST_LINES} at most can be shown")
    return found


def restyled(style: Piece, codes: str) -> Piece:
    """The style behind an SGR sequence; colours that are not among COLOURS are left out."""
    numbers = [int(number or 0) for number in re.sub(r"[34]8;5;\d+", "39", codes).split(";")]
    for n in numbers:
        if n == 0:
            style = replace(style, colour=0, bold=False, dim=False)
        elif n in (1, 2):
            style = replace(style, bold=style.bold or n == 1, dim=style.dim or n == 2)
        elif 30 <= n <= 39 or 90 <= n <= 97:
            style = replace(style, colour=n % 60)
    return style


def draw(command: str, shown: Sequence[Piece], under: str) -> str:
    """The picture. Every piece is hidden from the start of the clock until its time."""
    seconds = max(piece.at for piece in shown)
    lines = 2 + max(piece.line for piece in shown)
    width, height = 2 * MARGIN + COLUMNS * WIDTH, TOP + lines * HEIGHT + 30
    again = f'begin="0s;clock.end" dur="{seconds + PAUSE:.2f}s"'
    clock = f'<animate id="clock" attributeName="x" values="-9;-9" {again}/>'
    parts = [
        f'<rect x="-9" y="0" width="1" height="1" fill="{PAPER}">{clock}</rect>',
        rect(0, 0, width, 28, "#232a32"),
        *(rect(14 + 18 * i, 9, 10, 10, button, rx="5") for i, button in enumerate(BUTTONS)),
        text(MARGIN, TOP, f"$ {command}", 13, "#ffffff", MONO, font_weight="bold"),
    ]
    for piece in shown:
        if not piece.text.strip():
            continue
        more = {"font_weight": "bold"} if piece.bold else {}
        fill = DIM if piece.dim else COLOURS.get(piece.colour, INK)
        x, y = MARGIN + piece.column * WIDTH, TOP + (piece.line + 1) * HEIGHT
        element = text(x, y, piece.text, 13, fill, MONO, textLength=f"{len(piece.text) * WIDTH:.1f}", **more)
        hidden = f'<set attributeName="visibility" to="hidden" begin="clock.begin" dur="{piece.at:.2f}s"/>'
        parts.append(element.replace("</text>", f"{hidden}</text>"))
    parts.append(text(MARGIN, height - 14, under, 11, DIM, SANS))
    return picture(width, height, parts, f"Terminal recording of {command}", PAPER)


def here(seconds: float) -> str:
    """The machine and the day, for the line under the picture."""
    return (
        f"a real run at its own speed, {seconds:.1f} s: {os.cpu_count()} {platform.machine()} CPU cores, "
        f"Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}, {date.today()}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description=" ".join(str(__doc__).split("\n\n")[0].split()),
        epilog="example: make recording",
    )
    parser.add_argument("--command", default=RECORDED, help="what is typed; default: %(default)s")
    parser.add_argument("--out", type=writable, default=PICTURE, help="the file; default: docs/demo.svg")
    given = parser.parse_args(arguments)
    try:
        first, *rest = shlex.split(given.command)
        beside = shutil.which(first, path=str(Path(sys.executable).parent))  # of this environment
        events = record([beside or first, *rest])
        shown = pieces(events)
        write_atomically(given.out, draw(given.command, shown, here(events[-1][0])))
    except (OSError, ValueError, IndexError) as error:
        fail(COMMAND, " ".join(str(error).split()))
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
