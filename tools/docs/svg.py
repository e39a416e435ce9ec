"""The few elements that the pictures of docs/ are made of. Text in, text out: a picture can be compared."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

SANS, MONO = "ui-sans-serif, Helvetica, Arial, sans-serif", "ui-monospace, Menlo, Consolas, monospace"


def picture(width: float, height: float, parts: Iterable[str], label: str, background: str = "white") -> str:
    """A whole file. label: what a reader who cannot see it is told."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(label)}">'
    )
    return "\n".join([head, rect(0, 0, width, height, background), *parts, "</svg>"]) + "\n"


def rect(x: float, y: float, width: float, height: float, fill: str, **more: str) -> str:
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {place} fill="{fill}"{_attributes(more)}/>'


def line(x: float, y: float, to_x: float, to_y: float, stroke: str, **more: str) -> str:
    return f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{stroke}"{_attributes(more)}/>'


def text(
    x: float, y: float, words: str, size: float = 12, fill: str = "#222", family: str = SANS, **more: str
) -> str:
    """Words whose baseline is at y; spaces are kept."""
    how = f'font-size="{size:g}" fill="{fill}" font-family="{family}" xml:space="preserve"'
    return f'<text x="{x:g}" y="{y:g}" {how}{_attributes(more)}>{escape(words)}</text>'


def _attributes(more: dict[str, str]) -> str:
    return "".join(f' {name.replace("_", "-")}="{escape(value)}"' for name, value in more.items())
