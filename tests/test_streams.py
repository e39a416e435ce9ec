"""Commands whose standard streams, terminal, folder or encoding are odd, and Ctrl-C at any time."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest
from fork_server import ForkServer
from tiny_folder import PROMPTS, write_tiny

RUNS = "--strategy", "two-pass", "--tree-nodes", "0", "--temperature", "1", "--seed", "3"
COMMANDS = {
    "help": ["--help"],
    "version": ["--version"],
    "info": ["info"],
    "json": ["info", "--json"],
    "generate": ["generate", PROMPTS[0], "--max-new-tokens", 20, *RUNS],
    "colour": ["generate", PROMPTS[0], "--max-new-tokens", 20, "--colour-runs", *RUNS],
    "explain": ["explain", PROMPTS[0], "--max-new-tokens", 4, *RUNS],
    "verify": ["verify", "--limit", 1, "--max-new-tokens", 4],
    "demo": ["demo", "--prompts", 1, "--max-new-tokens", 4],
}
INTERRUPTS = """
import atexit, os, re, signal, sys
interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)
class Watch:
    def find_spec(self, name, *rest):
        if name == {name!r}:
            for _ in range({times}):
                interrupt()
sys.meta_path.insert(0, Watch())
if {name!r} == "atexit":
    atexit.register(interrupt)
from qwen3_model.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("streams") / "tiny")


@pytest.fixture(scope="module")
def server(tiny):
    server = ForkServer(tiny)
    yield server
    server.close()


@pytest.fixture(scope="module")
def run(server, tiny):
    """Runs one of COMMANDS, or words, with odd streams; returns how it ended."""

    def call(command, **odd):
        words = COMMANDS[command] if isinstance(command, str) else list(command)
        small = words[0] in ("generate", "explain", "verify", "demo", "chat")
        return server.run(*words, *(["--model", tiny] if small else []), **odd)

    return call


def one_line(ended, what: str = "") -> bool:
    """Whether a process was refused in one line."""
    err = ended.err.decode()
    return ended.code == 2 and err.startswith("orthrus: error: ") and err.count("\n") == 1 and what in err


@pytest.mark.parametrize("command", COMMANDS)
def test_stdout_that_takes_nothing(run, command):
    full = run(command, stdout="full")
    assert one_line(full, "No space left"), full
    broken = run(command, stdout="broken")  # `orthrus ... | head`
    assert (broken.code, broken.err) == (141, b"") or command == "demo" and broken.code == 141, broken


def test_what_argparse_cannot_write_unbuffered(run):
    assert one_line(run("help", stdout="full", env={"PYTHONUNBUFFERED": "1"}), "No space left")


@pytest.mark.parametrize("command", ["help", "info", "generate"])
def test_stdout_that_is_closed(run, command):
    assert one_line(run(command, stdout="closed"), "stdout is closed")
    assert run(command, stdout="closed", stderr="closed", stdin="closed").code == 2


def test_statistics_that_cannot_be_written_change_nothing(run):
    usual = run("generate")
    assert b"tok/s" in usual.err
    for stderr in ("closed", "full", "broken", "one-way"):
        odd = run("generate", stderr=stderr)
        assert (odd.code, odd.out, odd.err) == (0, usual.out, b"")
        assert run(["fly"], stderr=stderr).code == 2


def test_stdin_that_is_closed(run):
    odd, usual = run("info", stdin="closed"), run("info")
    assert (odd.code, odd.out) == (0, usual.out)
    for words in (["generate", "-"], ["explain", "-"], ["chat"]):
        assert one_line(run(words, stdin="closed"), "stdin is closed")
    assert one_line(run(["generate", "-"], stdin="one-way"), "stdin")


def test_a_closed_stream_is_not_given_to_the_next_file(run, tmp_path):
    """The page would be written to by whoever writes to stderr."""
    page = tmp_path / "page.html"
    ended = run([*COMMANDS["explain"], "--html", page], stderr="closed", stdin="closed")
    assert ended.code == 0 and page.read_text().startswith("<!") and "tok/s, seed" not in page.read_text()


def test_a_working_folder_that_was_deleted(run):
    assert one_line(run("generate", folder=None), "working folder")
    assert run("version", folder=None).code == 0


@pytest.mark.parametrize(
    "encoding, command", [("ascii", "colour"), ("latin-1", "explain"), ("cp437", "info")]
)
def test_encodings_that_lack_characters(run, encoding, command):
    ended = run(command, env={"PYTHONIOENCODING": encoding})
    assert ended.code == 0 and ended.out.decode(encoding), ended


@pytest.mark.parametrize("columns", ["40", "20", "1", "0", "²", "9" * 30])
def test_a_narrow_terminal_shows_every_value(run, columns):
    env = {"COLUMNS": columns, "LINES": columns}
    ended = run("info", env=env)
    words = set(re.findall(r"[\d.,]*\d", ended.out.decode()))
    assert ended.code == 0 and words == set(re.findall(r"[\d.,]*\d", run("info").out.decode()))
    lines = ended.out.decode().splitlines()
    assert max(map(len, lines)) <= {"40": 40, "20": 20, "1": 20}.get(columns, 80)


@pytest.mark.parametrize(
    "command, shown", [("verify", "1/1 "), ("demo", "autoregressive"), ("explain", "cycle 1"), ("help", "-h")]
)
def test_a_terminal_of_no_width_shows_every_verb(run, command, shown):
    for columns in ("20", "0"):
        ended = run(command, env={"COLUMNS": columns})
        assert ended.code == 0 and shown in ended.out.decode(), ended


@pytest.mark.parametrize(
    "env, stdout, apart",
    [
        ({"TERM": "xterm"}, "terminal", "\x1b[33m"),
        ({}, "terminal", "\x1b[33m"),
        ({"TERM": "xterm", "NO_COLOR": ""}, "terminal", "\x1b[33m"),
        ({"FORCE_COLOR": "1"}, "file", "\x1b[33m"),
        ({"TERM": "xterm", "NO_COLOR": "1"}, "terminal", "·"),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, "terminal", "·"),
        ({"TERM": "dumb"}, "terminal", "·"),
        ({"TERM": "xterm"}, "file", "·"),
    ],
)
def test_runs_are_told_apart_everywhere(run, env, stdout, apart):
    ended = run("colour", env=env, stdout=stdout)
    out = ended.out.decode().replace("\r\n", "\n")
    assert ended.code == 0 and apart in out and ({"·", "\x1b"} & set(out)) == {apart[0]}
    assert not re.search(r"\x1b\[33m[^\x1b]*\n", out), "a colour ends before its line"


@pytest.mark.parametrize("command", ["info", "explain", "demo"])
def test_no_colour_is_no_escape_sequence(run, command):
    assert b"\x1b" in run(command, stdout="terminal").out
    assert b"\x1b" not in run(command, stdout="terminal", env={"NO_COLOR": "1", "FORCE_COLOR": "1"}).out


def test_a_forced_colour_makes_no_progress_bar(run):
    assert run("generate", env={"FORCE_COLOR": "1"}).err.count(b"\n") == 1


@pytest.mark.parametrize(
    "name, times, words",
    [
        ("qwen3_model.cli.interrupts", 1, ["--help"]),
        ("argparse", 1, ["--help"]),
        ("rich.console", 2, ["info"]),
        ("torch", 3, ["info"]),
        pytest.param("qwen3_model.model", 1, ["info"], marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_during_the_imports(name, times, words):
    command = [sys.executable, "-c", INTERRUPTS.format(name=name, times=times), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "orthrus: interrupted\n")


def test_ctrl_c_before_stderr_is_safe():
    command = [sys.executable, "-c", INTERRUPTS.format(name="qwen3_model.cli.interrupts", times=1), "--help"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, stdout=full, stderr=full).returncode == 130


def test_ctrl_c_when_all_is_done():
    command = [sys.executable, "-c", INTERRUPTS.format(name="atexit", times=1), "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("orthrus ")


def test_ctrl_c_more_than_once(run):
    signals = [(0.15 + 0.001 * i, int(signal.SIGINT)) for i in range(6)]
    ended = run(["verify", "--max-new-tokens", 900], signals=signals)
    assert (ended.code, ended.out, ended.err) == (130, b"", b"orthrus: interrupted\n")
