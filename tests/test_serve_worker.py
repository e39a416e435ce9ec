"""The engine's process and its client: texts are those of `generate`, whoever is cancelled beside them, and
no end of a process leaves a text waiting or a process behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import SimpleQueue

import pytest
import torch
from forked_worker import ForkedWorker
from small import small_model
from tiny_folder import write_tiny

from orthrus_kernels import PAGE
from qwen3_model import Engine, InputError, Qwen3, Request
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.decode.sequence import GenerationStats, Run
from qwen3_model.serve import engine_client
from qwen3_model.serve.engine_client import EngineClient, EngineDied, Refused
from qwen3_model.serve.fingerprint import fingerprint
from qwen3_model.serve.messages import Cancel, Ended, EngineOptions, Ran, Submit
from qwen3_model.serve.worker import Loop

SLOTS, CACHE = 4, 32 * PAGE
LONG = Request(max_new_tokens=400, min_tokens=400, seed=1, strategy="autoregressive")
FEW = {"tree_nodes": 3, "block_size": 4}  # rows of a draft, which take a CPU long
MIXED = [
    ([1, 2, 3], Request(max_new_tokens=5)),
    (list(range(5, 90)), Request(max_new_tokens=9, temperature=0.9, top_p=0.9, seed=2**63, **FEW)),
    ([7], Request(max_new_tokens=8, temperature=1.2, top_k=30, seed=5, strategy="one-pass", **FEW)),
    ([9, 9, 4], Request(max_new_tokens=12, repetition_penalty=1.3, logit_bias={15: -5.0, 16: 2.0}, **FEW)),
    ([3, 1], Request(max_new_tokens=10, min_tokens=10, temperature=1.0, seed=3, strategy="autoregressive")),
    ([4] * 70, Request(max_new_tokens=8, stop=("e", "a"), **FEW)),
]


@pytest.fixture(scope="module")
def model():
    return Qwen3.from_pretrained(EMBEDDED, device="cpu", progress=False)


@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def client(loop):
    """Of a real process with the embedded checkpoint."""
    options = EngineOptions(device="cpu", slots=SLOTS, cache_tokens=CACHE)
    client = loop.run_until_complete(EngineClient.start(options))
    yield client
    loop.run_until_complete(client.close(0))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = write_tiny(tmp_path_factory.mktemp("worker") / "tiny")
    return EngineOptions(model=folder, device="cpu", slots=2)


@pytest.fixture
def forked(monkeypatch):
    monkeypatch.setattr(engine_client, "_spawned", ForkedWorker)


async def whole(running) -> tuple[list[Ran], Ended]:
    """All runs of a text, and its end."""
    *runs, end = [item async for item in running]
    assert all(isinstance(run, Ran) for run in runs) and isinstance(end, Ended)
    return runs, end


def joined(runs):
    return [t for run in runs for t in run.tokens], [p for run in runs for p in run.logprobs]


def alone(model, prompt, request):
    request = replace(request, stop=(), strategy="autoregressive")
    result = model.engine.generate(prompt, request)
    return result.token_ids, result.logprobs


def gone(process: int) -> bool:
    """Whether a process of another one has ended."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().split()[-50] == "Z"
    except OSError:
        return True


def test_texts_are_those_of_generate(client, loop, model):
    async def all_of_them():
        return await asyncio.gather(*(whole(client.submit(*asked)) for asked in MIXED))

    for (prompt, request), (runs, end) in zip(MIXED, loop.run_until_complete(all_of_them()), strict=True):
        assert joined(runs) == alone(model, prompt, request), request
        counted = GenerationStats(end.stats.strategy, end.stats.seed)
        for run in runs:
            counted.count(Run(run.tokens, run.logprobs, run.forwards, run.kind, run.nodes), len(run.tokens))
        kept = ("forwards", "cycles", "cycle_tokens", "nodes", "accepted_histogram", "cycles_of")
        assert [getattr(counted, name) for name in kept] == [getattr(end.stats, name) for name in kept]
        assert (end.reason, end.error, end.stats.tokens) == ("length", "", request.max_new_tokens)
    assert (client.load.running, client.load.waiting, client.load.pages) == (0, 0, CACHE // PAGE)
    assert client.load.tokens == sum(request.max_new_tokens for _, request in MIXED)


def test_a_cancelled_text_makes_room_and_the_others_go_on(client, loop, model):
    asked = Request(max_new_tokens=10, temperature=0.8, seed=4, **FEW)

    async def cancel_one():
        long = [client.submit([5, n], LONG) for n in range(SLOTS - 1)]
        beside, waiting = client.submit([1, 2], asked), client.submit([2, 3], asked)
        first = await anext(long[0])
        for running in long:
            running.cancel()
            running.cancel()
        ends = await asyncio.gather(*map(whole, long))
        return first, ends, await asyncio.gather(whole(beside), whole(waiting))

    first, ends, others = loop.run_until_complete(cancel_one())
    assert all(end.reason == "cancelled" and len(joined(runs)[0]) < 400 for runs, end in ends)
    tokens, logprobs = joined([first, *ends[0][0]])
    limit = replace(LONG, max_new_tokens=len(tokens), min_tokens=len(tokens))
    assert (tokens, logprobs) == alone(model, [5, 0], limit)
    for prompt, (runs, _) in zip(([1, 2], [2, 3]), others, strict=True):
        assert joined(runs) == alone(model, prompt, asked)


def test_what_the_engine_does_not_take_is_refused(client, loop):
    async def ask(prompt, **settings):
        await whole(client.submit(prompt, Request(**settings)))

    with pytest.raises(InputError, match="the whole cache has 32 pages"):
        loop.run_until_complete(ask([1] * 2000, max_new_tokens=100))
    for prompt, settings, said in [
        ([1], {"logit_bias": {10**6: 1.0}}, "logit_bias names token 1000000"),
        ([10**6], {"max_new_tokens": 3}, "token id 1000000"),
        ([], {"max_new_tokens": 3}, "prompt is empty"),
    ]:
        with pytest.raises(Refused, match=said):
            loop.run_until_complete(ask(prompt, **settings))


def test_signals_are_for_the_server(client, loop, model):
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(client._process.pid, number)
    runs, _ = loop.run_until_complete(whole(client.submit([8], Request(max_new_tokens=5))))
    assert joined(runs) == alone(model, [8], Request(max_new_tokens=5))


def test_a_text_of_no_length_may_have_what_the_cache_holds(tiny, forked):
    async def fill():
        client = await EngineClient.start(replace(tiny, cache_tokens=PAGE))
        assert (client.ready.cache_tokens, client.ready.longest) == (PAGE, PAGE)
        found = await whole(client.submit([1] * (PAGE - 3), Request()))
        await client.close(0)
        return found

    runs, end = asyncio.run(fill())
    assert end.reason == "length" and len(joined(runs)[0]) == 3


def test_many_texts_leave_nothing_behind(client, loop):
    async def come_and_go():
        for _ in range(20):
            running = [client.submit([n, 1], LONG) for n in range(100)]
            for text in running:
                text.cancel()
            ends = await asyncio.gather(*map(whole, running))
            assert all(end.reason == "cancelled" for _, end in ends)

    loop.run_until_complete(come_and_go())
    assert client._open == {} and client._outbox.empty()
    assert (client.load.running, client.load.waiting, client.load.pages_used) == (0, 0, 0)


def test_a_killed_engine_ends_its_texts_at_once(tiny, forked):
    async def kill():
        client = await EngineClient.start(tiny)
        running = [client.submit([n], LONG) for n in range(5)]
        await anext(running[0])
        os.kill(client._process.pid, signal.SIGKILL)
        began = time.perf_counter()
        await asyncio.wait_for(client.died.wait(), 5)
        for text in running:
            with pytest.raises(EngineDied):
                while True:
                    await anext(text)
        assert time.perf_counter() - began < 3 and not client.alive and client._open == {}
        with pytest.raises(EngineDied):
            client.submit([1], LONG)
        await client.close(5)
        return client.exit_code

    assert asyncio.run(kill()) == -signal.SIGKILL


def test_the_engine_ends_with_its_server(tiny, forked):
    told, tell = os.pipe()
    server = os.fork()
    if server == 0:

        async def serve():
            client = await EngineClient.start(tiny)
            os.write(tell, f"{client._process.pid}\n".encode())
            await asyncio.sleep(60)

        asyncio.run(serve())
        os._exit(0)
    worker, began = int(os.read(told, 20)), time.perf_counter()
    try:
        assert not gone(worker)
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
        while not gone(worker):
            assert time.perf_counter() - began < 5
            time.sleep(0.01)
    finally:
        if not gone(worker):
            os.kill(worker, signal.SIGKILL)
        os.close(told), os.close(tell)


@pytest.mark.parametrize("grace", [30, 0])
def test_texts_have_a_grace_to_end_in(tiny, forked, grace):
    async def close():
        client = await EngineClient.start(tiny)
        running = [client.submit([n], replace(LONG, max_new_tokens=60, min_tokens=0)) for n in range(4)]
        await anext(running[0])
        closing = asyncio.create_task(client.close(grace))
        await asyncio.sleep(0)
        with pytest.raises(EngineDied, match="being closed"):
            client.submit([1], LONG)
        ends = [(await whole(text))[1].reason for text in running]
        await closing
        await client.close(grace)
        assert not client.alive and not client._reader.is_alive() and not client._writer.is_alive()
        assert client.exit_code == 0
        return ends

    gc.collect()  # sockets of earlier tests
    before = os.listdir("/proc/self/fd")
    assert asyncio.run(close()) == ["length" if grace else "cancelled"] * 4
    assert os.listdir("/proc/self/fd") == before


def test_less_grace_ends_a_close_that_waits(tiny, forked):
    async def close_twice():
        client = await EngineClient.start(tiny)
        running = client.submit([1], LONG)
        patient = asyncio.create_task(client.close(60))
        await anext(running)
        await client.close(0)
        await patient
        return await whole(running)

    assert asyncio.run(close_twice())[1].reason == "cancelled"


def test_an_engine_that_cannot_start_says_why(tiny, forked, tmp_path):
    async def start(options):
        await EngineClient.start(options)

    with pytest.raises(InputError) as told:
        Qwen3.from_pretrained(tmp_path / "nowhere", device="cpu")
    for options, said in [
        (replace(tiny, model=tmp_path / "nowhere"), str(told.value)),
        (replace(tiny, slots=999), "slots is 999; a whole number from 1 to 256 was expected"),
    ]:
        with pytest.raises(InputError) as found:
            asyncio.run(start(options))
        assert str(found.value) == said


def test_a_start_that_is_given_up_leaves_no_process(tiny, forked, monkeypatch):
    made = []
    monkeypatch.setattr(engine_client, "_spawned", lambda pipe: made.append(ForkedWorker(pipe)) or made[0])

    async def give_up():
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(EngineClient.start(tiny), 0.01)

    asyncio.run(give_up())
    assert made[0].returncode == -signal.SIGKILL


@dataclass(frozen=True)
class Breaking(EngineOptions):
    """Of an engine that fails in its n-th step."""

    nth: int = 0

    def made(self):
        model, engine = super().made()
        steps, step = [], engine.step

        def breaking():
            steps.append(1)
            if len(steps) >= self.nth:
                raise RuntimeError("the device has gone")
            return step()

        engine.step = breaking
        return model, engine


@pytest.mark.parametrize("nth", [1, 60])
def test_a_fault_ends_the_process_with_a_line(tiny, forked, capfd, nth):
    async def until_it_breaks():
        client = await EngineClient.start(Breaking(**vars(tiny), nth=nth))
        assert nth > 1
        with pytest.raises(EngineDied):
            await whole(client.submit([1], LONG))
        await client.close(0)
        return client.exit_code

    if nth == 1:  # in the texts of the fingerprint
        with pytest.raises(InputError, match="has ended before it was ready; stderr says why"):
            asyncio.run(until_it_breaks())
    else:
        assert asyncio.run(until_it_breaks()) == 1
    assert capfd.readouterr().err.endswith("orthrus: the engine has failed: the device has gone\n")


def test_a_text_of_nan_ends_alone_and_tables_are_left_empty():
    damaged = small_model(tie_word_embeddings=False, eos_token_ids=())
    damaged.embedding[5] = torch.nan
    inbox, sent = SimpleQueue(), []
    loop = Loop(Engine(damaged, 3, 4 * PAGE), inbox, sent.append)
    request = Request(max_new_tokens=6)
    for number, prompt in enumerate(([5, 1], [1, 2], [2, 3])):
        inbox.put(Submit(number, prompt, request))
    while loop._open or not sent:
        loop.turn()
    ends = {number: end for batch in sent for number, end in batch.ended}
    assert [ends[n].reason for n in range(3)] == ["error", "length", "length"]
    assert "NaN" in ends[0].error and not ends[1].error
    for number, prompt in ((1, [1, 2]), (2, [2, 3])):
        runs = [Ran(*run) for batch in sent for n, *run in batch.ran if n == number]
        assert joined(runs) == alone(damaged, prompt, request)
    inbox.put(Cancel(1))  # has ended
    inbox.put(Submit(3, [1], request))
    inbox.put(Cancel(3))
    loop.turn()
    assert loop._texts == {} == loop._open and sent[-1].ended[0][1].reason == "cancelled"
    assert (sent[-1].load.running, sent[-1].load.waiting, sent[-1].load.pages_used) == (0, 0, 0)


def test_a_fingerprint_is_of_weights_and_not_of_slots():
    one = small_model()
    found = fingerprint(one, Engine(one, 1, PAGE))
    assert found == fingerprint(small_model(), Engine(one, 5, 9 * PAGE)) and len(found) == 16
    other = small_model("bfloat16")
    assert fingerprint(other, Engine(other, 1, PAGE)) != found
    one.layers[1].down.dense()[3, 3] += 1.0
    assert fingerprint(one, Engine(one, 1, PAGE)) != found
    one.norm[:] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        fingerprint(one, Engine(one, 1, PAGE))
