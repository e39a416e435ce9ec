"""Engines on a Ray cluster of this machine, with the embedded checkpoint, whose replicas are killed.
`make test-slow`."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from serve_load import SMALL, Heard, Mixed, exchange, heard, mixed
from serve_process import COMMAND, ServeProcess

from qwen3_model import Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.openai.body import COMPLETIONS
from qwen3_model.prompts import read_prompts

pytest.importorskip("ray", reason="the extra `cluster` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STREAMS, REPLICAS = 50, 2
CLUSTER = ("--ray", "--replicas", REPLICAS, "--device", "cpu", "--slots", 8)
SERVE = (*CLUSTER, "--cache-tokens", 8192, "--generation-config", "none", "--grace", 300)
MARK = "ORTHRUS_TEST_CLUSTER"  # in the environment of all processes of a cluster, which tells whose they are


def processes(mark: str, name: str) -> list[int]:
    """Those of a cluster whose command line begins so."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if command.startswith(name.encode()) and f"{MARK}={mark}\0".encode() in (
                Path(f"/proc/{pid}/environ").read_bytes() + b"\0"
            ):
                found.append(int(pid))
        except OSError:
            pass  # it has ended
    return sorted(found)


def replicas(mark: str) -> list[int]:
    return processes(mark, "ray::ServeReplica:")


def wait_for(what, seconds: float = 120.0):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def model():
    return Qwen3.from_pretrained(EMBEDDED, "cpu", progress=False)


@pytest.fixture(scope="module")
def jobs(model):
    """Streams of mixed settings with what must be heard."""
    prompts = read_prompts(EMBEDDED / "held_out.jsonl", limit=20, split="test")
    asked = mixed(prompts, STREAMS, 48, draft=SMALL)
    return [(one, one.alone(model)) for one in (replace(one, stream=True, n=1) for one in asked)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    file = tmp_path_factory.mktemp("cluster") / "said"
    with ServeProcess(file, *SERVE, seconds=300, RAY_ADDRESS="local", **{MARK: MARK}) as server:
        yield server
        assert server.end() == 0 and "Traceback" not in server.said
        assert wait_for(lambda: not replicas(MARK)), "the cluster ends with its server"


async def asked_at_once(server: ServeProcess, jobs: list[tuple[Mixed, Heard]], then) -> list[bytes]:
    """Whole answers to streams that run together. then: what happens once a third of them has begun."""
    before = server.metric("time_to_first_token_seconds_count")
    answers = [asyncio.create_task(exchange(server.port, asked.sent())) for asked, _ in jobs]

    def begun() -> bool:
        return server.metric("time_to_first_token_seconds_count") - before >= len(jobs) / 3

    await asyncio.to_thread(wait_for, begun)
    await asyncio.to_thread(wait_for, lambda: server.metric("requests_running") > 0)  # full replicas say so
    then()
    return await asyncio.wait_for(asyncio.gather(*answers), 400)


async def left_at_once(server: ServeProcess, jobs: list[tuple[Mixed, Heard]]) -> None:
    """Clients that go in the middle."""
    await asyncio.gather(*(exchange(server.port, asked.sent(), cut=800) for asked, _ in jobs))


def as_heard(answers: list[bytes], jobs: list[tuple[Mixed, Heard]]) -> list[Heard | None]:
    return [heard(said, asked) for said, (asked, _) in zip(answers, jobs, strict=True)]


def events(said: bytes) -> list[dict]:
    """Of a stream."""
    return [json.loads(data) for data in re.findall(rb"^data: (\{.*\})\r?$", said, re.M)]


def test_what_a_killed_replica_loses(server, jobs):
    """Each of its streams ends with an error event, and the same seed gives the same text elsewhere."""
    killed = replicas(MARK)[0]
    answers = asyncio.run(asked_at_once(server, jobs, lambda: os.kill(killed, signal.SIGKILL)))
    lost = []
    for said, (asked, want) in zip(answers, jobs, strict=True):
        assert said.startswith(b"HTTP/1.1 200 ") and said.endswith(b"0\r\n\r\n"), "no stream is cut"
        if (got := heard(said, asked)) is not None:
            assert got == want
            continue
        lost.append((asked, want))
        *chunks, error = events(said)
        assert error["error"]["type"] == "server_error" and "replica" in error["error"]["message"]
        assert {"message", "type", "param", "code"} == error["error"].keys()
        said_so_far = "".join(c["delta"].get("content", "") if asked.chat else c["text"]
                              for chunk in chunks for c in chunk["choices"])  # fmt: skip
        assert want.voices[0].text.startswith(said_so_far)
    print(f"\n{len(lost)} of {STREAMS} streams were lost")
    assert 0 < len(lost) < STREAMS
    repeated = asyncio.run(asked_at_once(server, lost, lambda: None))
    assert [heard(said, asked) for said, (asked, _) in zip(repeated, lost, strict=True)] == [
        w for _, w in lost
    ]
    assert len({event["system_fingerprint"] for said in repeated for event in events(said)}) == 1
    wait_for(lambda: len(replicas(MARK)) == REPLICAS and killed not in replicas(MARK))
    wait_for(lambda: server.metric("cache_pages") == REPLICAS * 8192 / 64)


def test_a_rolling_restart_loses_nothing(server, jobs):
    before = replicas(MARK)
    answers = asyncio.run(asked_at_once(server, jobs, lambda: server.process.send_signal(signal.SIGHUP)))
    assert [heard(said, asked) for said, (asked, _) in zip(answers, jobs, strict=True)] == [
        w for _, w in jobs
    ]
    wait_for(lambda: "all replicas are new" in server.said)
    assert len(replicas(MARK)) == REPLICAS and not set(replicas(MARK)) & set(before)
    again = asyncio.run(asked_at_once(server, jobs[:10], lambda: None))
    asyncio.run(left_at_once(server, jobs[:10]))
    server.wait_until_idle(120)
    told = {event["system_fingerprint"] for said in [*answers, *again] for event in events(said)}
    assert len(told) == 1, "the fingerprint too is as before"


def lines_of(file: Path) -> list[dict]:
    """The whole lines of OUT."""
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]] if file.exists() else []


def test_a_file_survives_a_replica_and_itself(model, tmp_path):
    """One of two replicas is killed, then the command at whatever byte: no line is lost or doubled."""
    prompts = read_prompts(EMBEDDED / "held_out.jsonl", limit=30, split="test")
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    plain = {"temperature": 0.8, "strategy": "autoregressive"}  # drafts take a CPU long
    bodies = [{"prompt": p, "seed": i, "max_tokens": 40, **plain} for i, p in enumerate(prompts)]
    rows = [
        {"custom_id": str(i), "method": "POST", "url": COMPLETIONS, "body": body}
        for i, body in enumerate(bodies)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no request\n")
    words = [sys.executable, "-c", COMMAND, "batch", source, out, *CLUSTER, "--generation-config", "none"]
    command = list(map(str, [*words, "--ordered", "--json"]))
    mark = f"{MARK}-batch"
    environment = os.environ | {MARK: mark, "RAY_ADDRESS": "local"}
    with subprocess.Popen(command, env=environment) as first:
        wait_for(lambda: len(lines_of(out)) >= 4 or first.poll() is not None, 300)
        os.kill(replicas(mark)[0], signal.SIGKILL)
        wait_for(lambda: len(lines_of(out)) >= 20 or first.poll() is not None, 300)
        first.kill()
    left = lines_of(out)
    assert 20 <= len(left) < len(rows), "it was killed in the middle"
    wait_for(lambda: not processes(mark, "ray::"))
    second = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=400, check=False)
    figures = json.loads(second.stdout)
    assert second.returncode == 1 and figures["failed"] == 1, "the line that is no request"
    assert figures["answered_now"] == len(rows) + 1 - len(left)
    *answers, wrong = lines_of(out)
    assert wrong["error"]["code"] == "invalid_line"
    assert [answer["custom_id"] for answer in answers] == [row["custom_id"] for row in rows]
    assert [answer["response"]["body"]["choices"][0]["text"] for answer in answers] == [
        model.generate(model.text.encode(prompt), max_new_tokens=40, seed=i, **plain).text
        for i, prompt in enumerate(prompts)
    ]
