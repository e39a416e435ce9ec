"""Two servers of one model that run: what the second one costs more. Each request goes to both in turn.

Times are a client's: to the first token of a stream that is alone, and between its chunks. Processor time is
of all processes of a machine that a word of their command line tells, such as those of Ray, and of the
servers' own. A request decodes plainly, so that a chunk is a token."""

from __future__ import annotations

import http.client
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from qwen3_model import InputError
from qwen3_model.openai.body import COMPLETIONS

from .command import Parser, fail, positive, run
from .measure import machine, machine_line
from .report import print_tables

COMMAND = "bench.two_servers"
BODY = {"prompt": "def mean(values):", "temperature": 0, "stream": True, "strategy": "autoregressive",
        "ignore_eos": True}  # fmt: skip


def stream(url: str, tokens: int) -> list[float]:
    """Seconds to each event with text of one stream. Raises InputError where none comes."""
    at = urlsplit(url)
    connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=120)
    try:
        began = time.perf_counter()
        body = json.dumps(BODY | {"max_tokens": tokens})
        connection.request("POST", COMPLETIONS, body, {"content-type": "application/json"})
        response, found = connection.getresponse(), list[float]()
        while line := response.readline():
            if line.startswith(b"data: {") and b'"finish_reason": null' in line:
                found.append(time.perf_counter() - began)
    except OSError as error:
        raise InputError(f"{url} does not answer ({error})") from None
    finally:
        connection.close()
    if len(found) < 2:
        raise InputError(f"{url} answered with status {response.status} and {len(found)} chunks of text")
    return found


def processor_seconds(words: Sequence[str]) -> dict[str, float]:
    """That each process has used whose command line has one of the words, by its number."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if any(word in command for word in words):
            found[folder.name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table."""
    parser = Parser(prog=f"python -m {COMMAND}", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("urls", nargs=2, metavar="URL")
    parser.add_argument("--requests", type=positive, default=20, metavar="N", help="to each (default: 20)")
    parser.add_argument("--tokens", type=positive, default=64, metavar="N", help="of each (default: 64)")
    parser.add_argument(
        "--processes", nargs=2, default=("--port 8000", "--port 8001"), metavar="WORDS",
        help="of whose command lines processor time is counted, for each server; several behind |",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
    seen: list[list[list[float]]] = [[], []]
    used = [0.0, 0.0]
    try:
        for url in given.urls:
            stream(url, given.tokens)
        for _ in range(given.requests):
            for i, url in enumerate(given.urls):
                before = processor_seconds(given.processes[i].split("|"))
                seen[i].append(stream(url, given.tokens))
                after = processor_seconds(given.processes[i].split("|"))
                used[i] += sum(after[pid] - before[pid] for pid in after.keys() & before.keys())
    except InputError as error:
        fail(COMMAND, str(error))
    head, rows = ["server", "first token ms", "chunk ms", "processor ms a chunk"], list[list[str]]()
    for url, streams, seconds in zip(given.urls, seen, used, strict=True):
        chunks = sum(map(len, streams))
        each = statistics.median((s[-1] - s[0]) / (len(s) - 1) for s in streams)
        first = statistics.median(s[0] for s in streams)
        rows.append([url, f"{1e3 * first:.1f}", f"{1e3 * each:.2f}", f"{1e3 * seconds / chunks:.2f}"])
    print_tables([(f"medians of {given.requests} streams of {given.tokens} tokens, in turn", head, rows)])
    print(machine_line(facts))
    return 0


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
