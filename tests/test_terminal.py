"""What is written to stdout is the text; a terminal is shown no commands."""

from __future__ import annotations

import io
import re
import sys

import pytest
from tiny_folder import write_tiny

from qwen3_model import Qwen3, checkpoint
from qwen3_model.cli import main, output, terminal

TEXT = (
    "a\tb\r\nc\x1b[2Jd\x07\x00\x08\x0b\x0c\x7f\x9b31m\u200d\u200b\ufeff\u202e\u2028é\ufffd"
    "[bold]x[/] :smile: \\[z\n\n"
)
SHOWN = (
    "a\tb\\r\nc\\x1b[2Jd\\x07\\x00\\x08\\x0b\\x0c\\x7f\\x9b31m\u200d\u200b\ufeff\u202e\u2028é\ufffd"
    "[bold]x[/] :smile: \\[z\n\n"
)


class Stream(io.TextIOWrapper):
    """A stdout that is a terminal or is not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__(io.BytesIO(), "utf-8", newline="")
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def said(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()


@pytest.fixture(params=[False, True], ids=["pipe", "terminal"])
def put(request, monkeypatch):
    """Puts a stream in the place of stdout."""

    def call() -> Stream:
        for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(sys, "stdout", Stream(request.param))
        return sys.stdout

    return call


def test_text_is_written_as_it_is(put):
    stdout = put()
    output.TextWriter()([1], TEXT)
    assert stdout.said() == (SHOWN if stdout.isatty() else TEXT)


def test_runs_are_written_as_they_are(put):
    stdout = put()
    writer, pieces = output.RunWriter(), [TEXT, "", "x\ty", "\n", "end"]
    for piece in pieces:
        writer([1], piece)
    if not stdout.isatty():
        assert stdout.said() == f"{TEXT}·x\ty·\n·end"
        return
    assert re.sub(r"\x1b\[\d+m", "", stdout.said()) == SHOWN + "x\ty\nend"
    assert stdout.said().endswith("\x1b[33mx\ty\x1b[0m\n\x1b[33mend\x1b[0m")
    assert all(line.count("\x1b[0m") == line.count("\x1b[3") for line in stdout.said().split("\n"))


def test_a_forced_colour_in_a_pipe_changes_no_character(put, monkeypatch):
    stdout = put()
    monkeypatch.setenv("FORCE_COLOR", "1")
    output.RunWriter()([1], "a\tb\x0b\x85c\r\n\u2028d")
    wanted = {False: "a\tb\x0b\x85c\r\n\u2028d", True: "a\tb\\x0b\\x85c\\r\n\u2028d"}[stdout.isatty()]
    assert re.sub(r"\x1b\[\d+m", "", stdout.said()) == wanted


@pytest.mark.parametrize("literal", ["[bold]x[/]", ":smile:", "[/]", "{'a': ['b']}", "\\[x]"])
def test_tables_and_headings_take_text_literally(put, literal):
    stdout = put()
    console, table = terminal.new_console(), terminal.new_table(title=literal)
    table.add_row("name", literal)
    console.print(literal)
    terminal.show(console, table)
    assert stdout.said().count(literal) == 3


def test_a_name_is_no_command(put, tmp_path):
    stdout = put()
    tiny = write_tiny(tmp_path / "[red]a:smile:\x1b[2J")
    assert main(["info", str(tiny)]) == 0
    said = re.sub(r"\x1b\[\d+m|\s", "", stdout.said())
    assert "[red]a:smile:\\x1b[2J" in said and "\x1b" not in said


def test_what_generate_and_demo_print_is_the_text(put, tmp_path, monkeypatch):
    tiny = write_tiny(tmp_path / "tiny")
    monkeypatch.setattr(checkpoint, "EMBEDDED", tiny)
    model = Qwen3.from_pretrained(tiny, device="cpu")
    line = ["--max-new-tokens", "60", "--temperature", "3", "--seed"]
    for seed in range(2):
        stdout = put()
        assert main(["generate", "x\t", "--model", str(tiny), *line, str(seed)]) == 0
        text = model.generate(model.text.encode("x\t"), max_new_tokens=60, temperature=3.0, seed=seed).text
        shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], text)
        assert stdout.said() == (shown if stdout.isatty() else text) + "\n" != "\n"
    stdout = put()
    (tiny / "held_out.jsonl").write_text('{"prompt": "\\f\\ta\\u0085\\u2028b\\n[bold]c", "split": "test"}\n')
    assert main(["demo", "--model", str(tiny), "--prompts", "1", "--max-new-tokens", "2"]) == 0
    said = re.sub(r"\x1b\[\d+m", "", stdout.said())
    assert ("\\x0c\ta\\x85\u2028b\n[bold]c\n" if stdout.isatty() else "\f\ta\x85\u2028b\n[bold]c\n") in said
