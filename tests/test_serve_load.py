"""Many clients at once, and what happens to the server under them. `make test-slow`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from urllib.error import HTTPError

import pytest
from serve_load import SMALL, exchange, mixed, run
from serve_process import ServeProcess
from tiny_folder import PROMPTS, write_tiny

from qwen3_model import Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.openai.body import COMPLETIONS

pytestmark = pytest.mark.slow

OPTIONS = ("--device", "cpu", "--slots", 16, "--cache-tokens", 8192, "--max-waiting", 2000,
           "--generation-config", "none")  # fmt: skip
GROWTH = 8 * 1024  # KiB of memory that 1,500 requests may leave behind: what an allocator keeps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("load") / "tiny")


@pytest.fixture(scope="module")
def jobs(folder):
    """200 requests of mixed settings with what must be heard."""
    model = Qwen3.from_pretrained(folder, "cpu", progress=False)
    return [(asked, asked.alone(model)) for asked in mixed(PROMPTS, 200, 16, draft=SMALL)]


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with ServeProcess(tmp_path_factory.mktemp("said") / "said", "--model", folder, *OPTIONS) as server:
        yield server
        assert server.end() == 0 and "Traceback" not in server.said


def test_200_streams_at_once_are_as_alone(server, jobs):
    tally = asyncio.run(run(server.port, jobs, 200, seconds=200))
    print(f"\n{tally}")
    assert tally.equal == 200, tally.wrong[:2]
    server.wait_until_idle()


def test_a_third_of_the_clients_goes(server, jobs):
    tally = asyncio.run(run(server.port, jobs, 200, leave=1 / 3, seconds=200))
    print(f"\n{tally}")
    assert tally.gone > 20 and tally.equal + tally.gone == 200, tally.wrong[:2]
    server.wait_until_idle()
    assert server.metric("cancelled_total") > 10


def test_2000_requests_leave_no_memory_and_no_file(server, folder):
    """Nor do the clients that go among them."""
    model = Qwen3.from_pretrained(folder, "cpu", progress=False)
    jobs = [(asked, asked.alone(model)) for asked in mixed(PROMPTS, 100, 8, 1, SMALL)]
    found = []
    for done in range(20):
        tally = asyncio.run(run(server.port, jobs, 50, leave=0.1))
        assert tally.equal + tally.gone == 100, tally.wrong[:2]
        if done >= 4:  # the first 500 fill what is kept: pages that may be used again, arenas
            server.wait_until_idle()
            time.sleep(0.1)
            found.append((server.resident(), server.open_files()))
    (first, files), (last, files_now) = found[0], found[-1]
    print(f"\nKiB: {first} to {last}; files: {files}")
    assert files_now == files
    assert all(last[name] - first[name] < GROWTH for name in first), [one[0] for one in found]


def streamed(**more):
    """A request that streams, with a long answer unless told otherwise."""
    body = {"prompt": "def add(first", "max_tokens": 900, "stream": True, "min_tokens": 900} | more
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head.encode() + f"connection: close\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data


async def streams(port, count, then, **more):
    """What so many streams say; then() is called once all of them have begun, or wait."""
    clients = [asyncio.create_task(exchange(port, streamed(seed=i, **more))) for i in range(count)]
    await asyncio.sleep(1.0)
    await asyncio.to_thread(then)
    return await asyncio.wait_for(asyncio.gather(*clients), 200)


def test_the_engine_is_killed(folder, tmp_path):
    """All clients hear of it at once, /health says so as long as somebody may ask, and the server ends."""
    with ServeProcess(tmp_path / "said", "--model", folder, *OPTIONS) as server:
        killed, healths = [], []

        def kill():
            os.kill(server.worker, signal.SIGKILL)
            killed.append(time.monotonic())
            try:
                while True:
                    server.get("/health")
            except HTTPError as error:
                healths.append(error.code)
            except OSError:
                pass  # it has ended already

        said = asyncio.run(streams(server.port, 64, kill))
        assert time.monotonic() - killed[0] < 5
        assert all(b"has died" in one for one in said) and not any(b"[DONE]" in one for one in said)
        assert server.process.wait(20) == 1 and healths in ([503], [])
        assert "has died (exit code -9)" in server.said and "Traceback" not in server.said


def test_sigterm_under_load(folder, tmp_path):
    """Those that are there are answered to their end, waiting ones too; new ones are refused."""
    with ServeProcess(tmp_path / "said", "--model", folder, *OPTIONS, "--grace", 200) as server:
        late = []

        def end():
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            late.append(asyncio.run(exchange(server.port, streamed())))

        said = asyncio.run(streams(server.port, 64, end, max_tokens=100, min_tokens=100))
        assert all(one.startswith(b"HTTP/1.1 200") and b"[DONE]" in one for one in said)
        assert late[0].startswith(b"HTTP/1.1 503") and server.process.wait(20) == 0
        assert "requests may go on" in server.said and "Traceback" not in server.said


def test_a_long_prompt_stalls_nobody(tmp_path):
    """Others go on while a prompt is read that fills the context: each of its chunks lets them have a
    cycle."""
    words = ("--model", EMBEDDED, "--device", "cpu", "--slots", 4, "--cache-tokens", 8192)
    with ServeProcess(tmp_path / "said", *words) as server:
        came: list[float] = []

        async def other():
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(streamed(max_tokens=4000, min_tokens=4000, strategy="autoregressive"))
            while await reader.read(2**16):
                came.append(time.monotonic())
                if len(came) == 5:
                    begun.set()

        async def both():
            task = asyncio.create_task(other())
            await begun.wait()
            began = time.monotonic()
            said = await exchange(
                server.port, streamed(prompt=[7, 8, 9, 10] * 1015, max_tokens=1, min_tokens=1)
            )
            ended = time.monotonic()
            task.cancel()
            assert b"[DONE]" in said, said
            return began, ended

        begun = asyncio.Event()
        began, ended = asyncio.run(both())
        times = [began, *(at for at in came if began < at < ended), ended]
        longest = max(b - a for a, b in zip(times, times[1:], strict=False))
        print(f"\n{ended - began:.1f} s for the prompt, {len(times) - 2} pieces, {longest:.2f} s apart")
        assert len(times) > 8 and longest < (ended - began) / 3
