"""What verbs print: JSON, statistics, and text whose accepted runs can be told apart."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_replaceable, replacing
from . import terminal

if TYPE_CHECKING:
    from ..decode.sequence import GenerationStats, Result

RUN_COLOURS = (terminal.CYAN, terminal.YELLOW)
RUN_MARK = "·"  # stands between runs where there are no colours; rare in code and in prose


def write_json(value: dict[str, Any]) -> None:
    """Print one JSON object on a line of stdout."""
    print(json.dumps(value, allow_nan=False), flush=True)


def check_file(path: Path) -> None:
    """Refuse what `write_atomically` could not replace, before any work. Raises InputError."""
    check_replaceable(path)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that whoever reads it finds the old text or the new one, never half of it."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def result_json(result: Result) -> dict[str, Any]:
    """A generation as --json gives it."""
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "logprobs": result.logprobs,
        **({"top_logprobs": result.top_logprobs} if result.top_logprobs else {}),
        "stats": result.stats.to_dict(),
    }


def tokens_per_second(stats: GenerationStats) -> float:
    """Speed of a generation, its prefill inside the clock."""
    return stats.tokens / stats.seconds if stats.seconds else 0.0


def print_statistics(stats: GenerationStats) -> None:
    """One line of statistics on stderr."""
    how = stats.strategy if stats.verify == "coupled" else f"{stats.strategy}, {stats.verify}"
    if stats.strategy == "auto" and stats.cycles_of:  # what it was
        how += f" ({', '.join(f'{count} {kind}' for kind, count in stats.cycles_of.items())})"
    print(
        f"{how}: {stats.tokens} tokens in {stats.forwards} forward passes"
        f" ({stats.tokens_per_forward:.2f} a pass, {stats.tokens_per_cycle:.2f} a cycle),"
        f" {tokens_per_second(stats):.1f} tok/s, seed {stats.seed}, ended by {stats.finish_reason}",
        file=sys.stderr,
    )


class TextWriter:
    """A generation's callback: streams the text to stdout, every piece of it as soon as it is final."""

    def __call__(self, tokens: list[int], text: str) -> None:
        """Write the text of an accepted run."""
        terminal.write(text)

    def finish(self) -> None:
        """End the last line."""
        terminal.write("\n")


class RunWriter(TextWriter):
    """Streams the text with accepted runs in alternating colours, or a mark between them where stdout has no
    colours.
    """

    def __init__(self) -> None:
        self._runs = 0

    def __call__(self, tokens: list[int], text: str) -> None:
        """Write the text of an accepted run; one without text (an end token, part of a character) shows
        nothing.
        """
        if not text:
            return
        if terminal.coloured():
            terminal.write(text, RUN_COLOURS[self._runs % 2])
        else:
            terminal.write((RUN_MARK if self._runs else "") + text)
        self._runs += 1
