"""The terminal recording: what a terminal would show, each piece at its time, and docs/demo.svg of the
verb that is here."""

import re
import shlex
import sys
from html import unescape

import pytest

from qwen3_model import cli
from qwen3_model.cli import demo
from tools.docs import recording
from tools.docs.recording import Piece


def test_pieces_are_what_a_terminal_shows():
    events = [
        (0.5, "\x1b[?25l\r\x1b[2Kbar 1"), (1.0, "\r\x1b[2Kbar 2\r\n"),
        (1.5, "\x1b[1mbold\x1b[0m \x1b[38;5;70mgrown\x1b[0m\r\n"), (2.0, "\x1b[36m" + 90 * "x" + "\x1b[0m."),
    ]  # fmt: skip
    assert recording.pieces(events) == [
        Piece(1.0, 0, 0, "bar 2"), Piece(1.5, 1, 0, "bold", bold=True), Piece(1.5, 1, 4, " "),
        Piece(1.5, 1, 5, "grown", 39), Piece(2.0, 2, 0, 80 * "x", 36), Piece(2.0, 3, 0, 10 * "x", 36),
        Piece(2.0, 3, 10, "."),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "said, why", [("a\x1b[2Ab", "moves the cursor"), ("\n" * 99, "99 lines: 60 at most")]
)
def test_what_cannot_be_drawn(said, why):
    with pytest.raises(ValueError, match=why):
        recording.pieces([(0.0, said)])


def test_the_picture_hides_each_piece_until_its_time():
    svg = recording.draw("run it", [Piece(1.25, 0, 0, "a < b"), Piece(2.5, 1, 0, "  ")], "here")
    assert "$ run it" in svg and "here" in svg and "a &lt; b" in svg
    assert re.findall(r'to="hidden" begin="clock.begin" dur="([\d.]+)s"', svg) == ["1.25"], (
        "blanks are left out"
    )
    assert 'dur="6.50s"' in svg, "the clock starts anew after a pause"


def test_a_command_is_recorded(tmp_path, refused):
    code = "import time; print('é', flush=True); time.sleep(0.3); print('\\x1b[36mdone\\x1b[0m')"
    events = recording.record([sys.executable, "-c", code])
    first, last = recording.pieces(events)
    assert (first.text, last.text, last.colour) == ("é", "done", 36) and 0.25 < last.at - first.at < 30
    out = tmp_path / "out.svg"
    command = shlex.join([sys.executable, "-c", "print(1)"])
    assert recording.main(["--command", command, "--out", str(out)]) == 0 and ">1<" in out.read_text()
    for bad in ("no-such-command", f"{sys.executable} -c 1/0", ""):
        refused(recording.main, "--command", bad, "--out", str(tmp_path / "no.svg"))
    assert not (tmp_path / "no.svg").exists()


def test_the_recording_is_of_the_verb_as_it_is(monkeypatch):
    """Text and times are of the day it was made; the command, the headings and the table are today's."""
    svg = recording.PICTURE.read_text()
    shown = [unescape(words) for words in re.findall(r">([^<>]+)<", svg)]
    assert f"$ {recording.RECORDED}" in shown, "make recording"
    assert cli._parser().parse_args(shlex.split(recording.RECORDED)[1:]).run is demo.run
    assert set(demo.STRATEGIES) <= {words.strip() for words in shown}
    monkeypatch.setattr(demo, "_figures", lambda stats: [""] * 4)
    assert {str(column.header) for column in demo._table([]).columns} <= {"", *map(str.strip, shown)}
    assert re.search(r"a real run at its own speed, [\d.]+ s: .*, torch [\d.]+, \d{4}-\d\d-\d\d", svg)
