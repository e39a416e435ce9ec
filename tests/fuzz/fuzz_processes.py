"""Processes with odd streams, terminals, signals and limits: every verb that needs no training.

Most cases fork from a server that has imported all (`fork_server`); a few are real processes, where Ctrl-C
comes during the imports. What Python itself says before it has come to this package is not looked at."""

from __future__ import annotations

import atexit
import functools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fork_server import CLEARED, Ended, ForkServer
from fuzzing import Finding, Said, message_faults
from tiny_folder import PROMPTS, write_tiny

COUNT = 150
KINDS = {
    "traceback": "no traceback",
    "wrong exit code": "0 done, 2 bad input or streams, 130 Ctrl-C, 141 the reader has gone",
    "not one line": "an error is one line on stderr",
    "long line": "no line over 500 characters",
    "escape": "nothing unprintable in messages, no escape sequence where colours are off",
    "other text": "stdout has the text of an ordinary run, byte for byte, or its beginning",
}
REAL = 0.04  # share of cases that are real processes
SCRIPT = "import re, sys; from qwen3_model.cli import main; sys.exit(main())"
COLOUR, CONTROL = re.compile(r"\x1b\[[0-9;]*m"), re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
INTERRUPTED = "orthrus: interrupted\n"
ASKED = re.compile(r"[^\n]*tok/s, seed \d+, ended by \w+\n")


@functools.cache
def _world() -> tuple[Path, ForkServer]:
    """The checkpoint of all cases and the server."""
    folder = write_tiny(Path(tempfile.mkdtemp(prefix="processes-")) / "tiny")
    server = ForkServer(folder)
    atexit.register(server.close)
    return folder, server


def case(rng: random.Random, folder: Path) -> Iterator[Finding]:
    """One process."""
    tiny, server = _world()
    if rng.random() < REAL:
        yield from _imports(rng, tiny)
        return
    verb, words, stdin = _command(rng, tiny)
    odd = _odd(rng)
    if verb in ("-", "chat"):  # they read stdin
        odd["stdin"] = rng.choice([stdin, stdin, stdin, "closed", "one-way"])
    else:
        odd["stdin"] = rng.choice([b"", b"", b"", "closed"])
    ended = server.run(*words, **odd)
    told = f"{' '.join(map(str, words[1:]))} {odd}"
    for finding in _faults(verb, words, stdin, odd, ended, server):
        yield Finding(finding.kind, f"{finding.detail} | {verb} {told}"[:600])


def _command(rng: random.Random, tiny: Path) -> tuple[str, list[str], bytes]:
    """A verb, "-" for one that reads its prompt from stdin, its words, and what it may read."""
    verb = rng.choice([*["generate"] * 4, "-", "explain", "chat", "verify", "demo", "info", "--help",
                       "--version", "bad"])  # fmt: skip
    length = ["--max-new-tokens", str(rng.choice([1, 30, 60])), "--model", str(tiny)]
    sampled = ["--seed", str(rng.randrange(99)), "--strategy", "two-pass", "--tree-nodes", "0",
               "--temperature", str(rng.choice([0, 1, 3]))]  # fmt: skip
    prompt = rng.choice([*PROMPTS, "\t\x0bx", "a\x1b[31mb", "é\u200d\u202e"])
    if verb in ("generate", "-"):
        marked = rng.choice([[], ["--colour-runs"]])
        return verb, ["generate", "-" if verb == "-" else prompt, *length, *sampled, *marked], prompt.encode()
    if verb == "explain":
        return verb, [verb, prompt, *length, *sampled], b""
    if verb == "chat":
        return verb, [verb, *length, *sampled], f"{PROMPTS[0]}\n{PROMPTS[1]}\n".encode()
    if verb in ("verify", "demo"):
        some = ["--limit", "1"] if verb == "verify" else ["--prompts", "1"]
        return verb, [verb, *length, *some], b""
    if verb == "info":
        return verb, [verb, str(tiny), *rng.choice([[], ["--json"]])], b""
    if verb == "bad":
        words = rng.choice([[], ["--x"], ["fly\x1b[2J"], ["generate"], ["generate", "--x"],
                            ["info", "/nowhere"], ["generate", "x", "--model", "/\x1b]0;x\x07"],
                            ["demo", "--prompts", "0"], ["verify", "--seeds", "0"]])  # fmt: skip
        return verb, words, b""
    return verb, [verb], b""


def _odd(rng: random.Random) -> dict[str, Any]:
    """Streams, terminal and limits, mostly ordinary ones."""
    odd: dict[str, Any] = {
        "stdout": rng.choice(
            [*["file"] * 5, *["terminal"] * 5, *["broken"] * 3, "closed", "full", "one-way"]
        ),
        "stderr": rng.choice([*["file"] * 8, "closed", "full", "broken", "one-way"]),
        "env": {},
    }
    for name, values in {
        "COLUMNS": ["40", "20", "1", "0", "-5", "999999999", "²", "x"], "LINES": ["0", "²"],
        "NO_COLOR": ["1", ""], "FORCE_COLOR": ["1"], "TERM": ["dumb", "xterm-256color", ""],
        "PYTHONIOENCODING": ["ascii", "latin-1", "cp437"], "PYTHONUNBUFFERED": ["1"],
    }.items():  # fmt: skip
        if rng.random() < 0.25:
            odd["env"][name] = rng.choice(values)
    if rng.random() < 0.05:
        odd["folder"] = None
    if rng.random() < 0.05:
        odd["memory"] = rng.randrange(1 << 20, 100 << 20)
    elif rng.random() < 0.2:
        begins = rng.uniform(0.0, 0.4)
        odd["signals"] = [(begins + 0.002 * i, int(signal.SIGINT)) for i in range(rng.choice([1, 1, 3]))]
    return odd


def _faults(
    verb: str, words: list[str], stdin: bytes, odd: dict[str, Any], ended: Ended, server: ForkServer
) -> Iterator[Finding]:
    """What is wrong with how a process ended."""
    encoding = odd["env"].get("PYTHONIOENCODING", "utf-8")
    err = ended.err.decode(encoding, "replace")
    wanted = _wanted(verb, odd)
    if ended.code not in wanted:
        yield Finding("wrong exit code", f"{ended.code} of {sorted(wanted)}: {ascii(err[-200:])}")
    stderr = re.sub(ASKED, "", err) if ended.code != 2 else err
    shown = odd["stderr"] == "file"
    yield from message_faults(Said(ended.code if shown else None, "", stderr, None))
    if shown and ended.code == 130 and err != INTERRUPTED and "ended by interrupted" not in err:
        yield Finding("not one line", ascii(err[-300:]))
    if odd["stdout"] not in ("file", "terminal") or encoding != "utf-8":
        return
    yield from _other_text(verb, words, stdin, odd, ended, server)


def _wanted(verb: str, odd: dict[str, Any]) -> set[int]:
    """The exit codes that may be: a signal or a limit may come first, or too late."""
    no_folder = odd.get("folder", "/") is None and verb not in ("--help", "--version")
    no_prompt = verb in ("-", "chat") and not isinstance(odd["stdin"], bytes)
    found = {{"full": 2, "one-way": 2, "closed": 2, "broken": 141}.get(odd["stdout"], 0)}
    if verb == "bad" or no_folder or no_prompt:
        found = {2}
    if "memory" in odd or (verb in ("-", "chat") and "PYTHONIOENCODING" in odd["env"]):  # stdin is no text
        found |= {2}
    return found | ({130} if "signals" in odd else set())


def _other_text(
    verb: str, words: list[str], stdin: bytes, odd: dict[str, Any], ended: Ended, server: ForkServer
) -> Iterator[Finding]:
    """Compare the text of what always gives the same with a run in ordinary surroundings."""
    env, terminal = odd["env"], odd["stdout"] == "terminal"
    out = ended.out.decode()
    if terminal:
        out = out.replace("\r\n", "\n")
    plain = env.get("NO_COLOR") or env.get("TERM") in ("dumb", "unknown")
    coloured = not plain and ("FORCE_COLOR" in env or terminal)
    if not coloured and "\x1b" in out and (terminal or verb not in ("generate", "-", "chat")):
        yield Finding("escape", ascii(out[:200]))
    if verb not in ("generate", "-", "chat") or ended.code not in (0, 130):
        return
    if verb == "chat" and "signals" in odd:  # ends one answer, and the next one begins
        return
    marked = "--colour-runs" in words
    usual = server.run(*(word for word in words if word != "--colour-runs"), stdin=stdin).out.decode()
    if terminal:
        usual = CONTROL.sub(lambda found: ascii(found[0])[1:-1], usual)
    text = COLOUR.sub("", out) if marked and coloured else out.replace("·", "") if marked else out
    if marked and text.count("\n") == usual.count("\n") and len(text) > 20:
        apart = "\x1b[33m" if coloured else "·"
        if apart not in out:
            yield Finding("other text", f"runs cannot be told apart: {ascii(out[:200])}")
    usual = usual.replace("·", "") if marked else usual
    if text != usual and not (ended.code == 130 and usual.startswith(text.removesuffix("\n"))):
        yield Finding("other text", f"{ascii(text[:200])}, not {ascii(usual[:200])}")


def _imports(rng: random.Random, tiny: Path) -> Iterator[Finding]:
    """A real process and Ctrl-C at a random time of its imports."""
    words = rng.choice([["info", str(tiny)], ["generate", "x", "--model", str(tiny), "--max-new-tokens", "9"],
                        ["--help"]])  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k not in CLEARED}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", SCRIPT, *words], env=env, **pipes) as process:
        time.sleep(rng.choice([rng.uniform(0.04, 0.3), rng.uniform(0.04, 2.5)]))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    err = said.decode()
    if "Traceback" in err and "qwen3_model" not in err.replace(f"{SCRIPT}", ""):
        return  # Python had not come to this package
    if "Traceback" in err or "Exception ignored" in err:
        yield Finding("traceback", f"Ctrl-C, {words[0]}: {ascii(err[-300:])}")
    elif process.returncode == -signal.SIGINT and not err:
        return  # Python had not begun
    elif process.returncode not in (0, 130):
        yield Finding("wrong exit code", f"Ctrl-C, {words[0]}: {process.returncode} {ascii(err[-300:])}")
