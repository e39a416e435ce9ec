"""A Ray cluster of three machines, which are namespaces of this one: start, join, leave. `make test-slow`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from machines import Machine, lacking, machines
from serve_process import COMMAND

from qwen3_model import Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.openai.body import COMPLETIONS

pytest.importorskip("ray", reason="the extra `cluster` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STREAMS = 20
PLAIN = {"temperature": 1.0, "strategy": "autoregressive"}  # drafts take a CPU long
BODY = {"prompt": "def mean(values):", "max_tokens": 60, **PLAIN, "stream": True}
HEAD = ("--head", "--port", 6379)
# As docs/scaling.md has it: who does not know the token runs nothing there.
EVERYWHERE = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of-this-test-" * 4, "RAY_USAGE_STATS_ENABLED": "0"}


def ray(machine: Machine, *words: object) -> list[str]:
    return machine.words(sys.executable, "-m", "ray.scripts.scripts", *words, **EVERYWHERE)


def joined(machine: Machine, *where: object) -> None:
    """Have a machine start a cluster, or join one, with room for one replica."""
    here = ("--node-ip-address", machine.address, "--num-cpus", 1, "--object-store-memory", 2**27)
    with_no_page = ("--include-dashboard", "false") if where == HEAD else ()
    subprocess.run(ray(machine, "start", *where, *here, *with_no_page), check=True, timeout=120)


def replicas_on(machine: Machine) -> int:
    found = subprocess.run(machine.words("ps", "-eo", "args"), stdout=subprocess.PIPE, check=True)
    return found.stdout.decode().count("ray::ServeReplica:")


def wait_for(what, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.5)


def begun(url: str) -> float:
    """Texts that have a token."""
    said = httpx.get(url + "/metrics", timeout=60).text
    return float(re.findall(r"^orthrus_time_to_first_token_seconds_count (\S+)", said, re.M)[0])


def streamed(url: str, seed: int) -> tuple[str, str, str]:
    """The text of a stream, its fingerprint, and the error at its end."""
    said = httpx.post(url + COMPLETIONS, json=BODY | {"seed": seed}, timeout=300)
    events = [json.loads(data) for data in re.findall(r"^data: (\{.*\})$", said.text, re.M)]
    chunks = [event for event in events if "error" not in event]
    error = "".join(event["error"]["message"] for event in events[len(chunks) :])
    assert bool(error) != said.text.endswith("data: [DONE]\n\n"), said.text
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    return text, "".join({chunk["system_fingerprint"] for chunk in chunks}), error


@pytest.mark.skipif(bool(why := lacking()), reason=why)
def test_start_join_leave(tmp_path):
    model = Qwen3.from_pretrained(EMBEDDED, "cpu", progress=False)
    ids = model.text.encode(BODY["prompt"])
    wants = [model.generate(ids, max_new_tokens=60, seed=i, **PLAIN).text for i in range(STREAMS)]
    with machines(3) as (first, second, third), (tmp_path / "said").open("wb") as out:
        address = f"{first.address}:6379"
        joined(first, *HEAD)
        joined(second, "--address", address)
        url = f"http://{first.address}:8000"
        serve = (sys.executable, "-c", COMMAND, "serve", "--ray", "--replicas", 2)
        what = ("--device", "cpu", "--slots", 8, "--generation-config", "none")
        where = ("--host", first.address, "--insecure")
        command = first.words(*serve, *what, *where, RAY_ADDRESS=address, **EVERYWHERE)
        with subprocess.Popen(command, stdout=out, stderr=out) as server, ThreadPoolExecutor(STREAMS) as pool:
            try:
                wait_for(lambda: f"served at {url} (2 x " in (tmp_path / "said").read_text())
                assert (replicas_on(first), replicas_on(second), replicas_on(third)) == (1, 1, 0)
                joined(third, "--address", address)
                streams = [pool.submit(streamed, url, seed) for seed in range(STREAMS)]
                wait_for(lambda: begun(url) >= STREAMS / 2)
                subprocess.run(ray(second, "stop"), check=True, timeout=60)
                heard = [stream.result() for stream in streams]
                lost = [seed for seed, (*_, error) in enumerate(heard) if error]
                print(f"\n{len(lost)} of {STREAMS} streams were lost")
                assert 0 < len(lost) < STREAMS
                for seed, (text, _, error) in enumerate(heard):
                    assert wants[seed].startswith(text) if error else text == wants[seed]
                    assert not error or "replica" in error
                again = list(pool.map(lambda seed: streamed(url, seed), lost))
                assert [text for text, *_ in again] == [wants[seed] for seed in lost]
                wait_for(lambda: replicas_on(third) == 1)
                assert (replicas_on(first), replicas_on(second)) == (1, 0)
                more = list(pool.map(lambda seed: streamed(url, seed), range(STREAMS)))
                assert [text for text, *_ in more] == wants
                assert len({fingerprint for _, fingerprint, _ in [*heard, *again, *more]} - {""}) == 1
            finally:
                server.terminate()
