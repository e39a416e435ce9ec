"""The server as OpenAI's clients see it: answers are those of `generate`, bit for bit, and nobody who goes
leaves a text behind."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from threading import Event

import httpx
import openai
import pytest
from chat_cases import TEMPLATES
from serving import ScriptedEngine, Serving, with_engine
from tiny_folder import write_tiny

from qwen3_model import InputError, Qwen3
from qwen3_model.openai import answer
from qwen3_model.openai.answer import REASONS, CompletionLogprobs, piece
from qwen3_model.openai.body import CHAT, COMPLETIONS
from qwen3_model.openai.served import Served
from qwen3_model.serve import routes
from qwen3_model.serve.app import build
from qwen3_model.serve.beside import Beside
from qwen3_model.serve.guard import Access, is_loopback, read_keys
from qwen3_model.serve.limits import Limits
from qwen3_model.serve.messages import EngineOptions
from qwen3_model.serve.protocol import Protocol
from qwen3_model.serve.server import PathOnly
from qwen3_model.serve.site import Site

PROMPT = "def add(first"
HELLO = [{"role": "user", "content": PROMPT}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
KEY = "k" * 20
FEW = {"tree_nodes": 3, "block_size": 4}  # rows of a draft, which take a CPU long
LIMITS = Limits()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return Qwen3.from_pretrained(folder, progress=False)


@pytest.fixture(scope="module")
def served(model):
    return Served("tiny", model.config, model.text)


@pytest.fixture(scope="module")
def serving(served, folder):
    """A server with a real engine."""
    options = EngineOptions(model=str(folder), device="cpu", slots=4, cache_tokens=4096)
    with with_engine(served, options, LIMITS) as serving:
        yield serving


@pytest.fixture(scope="module")
def client(serving):
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def scripted(served):
    """A server whose engine a test plays."""
    with scripted_server(served) as serving:
        yield serving


def scripted_server(served, limits=LIMITS, access=None, **engine):
    async def start():
        return ScriptedEngine(**engine)

    return Serving(served, start, limits, access)


def until(condition, seconds=20.0):
    """Wait until a condition is true, and return what it gives."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)
    return found


# What is answered


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0, "max_tokens": 20},
        {"seed": 3, "max_tokens": 20, "n": 3, "logprobs": 0},
        {"seed": 3, "max_tokens": 20, "n": 2, "logprobs": 5},
        {"seed": 2**63, "max_tokens": 25, "top_p": 0.9, "extra_body": {"top_k": 40, "min_p": 0.01}},
        {"seed": 5, "max_tokens": 20, "logit_bias": {"7": 5}, "extra_body": {"repetition_penalty": 1.2}},
        {"seed": 8, "max_tokens": 40, "frequency_penalty": 1, "presence_penalty": 0.5,
         "extra_body": {"stop_token_ids": list(range(10, 22)), "ignore_eos": True, **FEW}},
        {"temperature": 0, "max_tokens": 9, "extra_body": {"strategy": "one-pass", "min_tokens": 9, **FEW}},
    ],
)  # fmt: skip
def test_a_stream_is_the_offline_text(client, model, given):
    settings = {"temperature": 1.0} | given | given.get("extra_body", {})
    settings.pop("extra_body", None)
    n, budget = settings.pop("n", 1), settings.pop("max_tokens")
    likeliest = settings.pop("logprobs", None)
    texts, probabilities, ends = [""] * n, [[] for _ in range(n)], [None] * n
    tops = [[] for _ in range(n)]
    for chunk in client.completions.create(model="tiny", prompt=PROMPT, stream=True, **given):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        probabilities[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
        tops[choice.index] += (choice.logprobs and choice.logprobs.top_logprobs) or []
        ends[choice.index] = choice.finish_reason
    seed = settings.pop("seed", 0)
    for i in range(n):
        settings["top_logprobs"] = likeliest or 0
        alone = model.generate(model.text.encode(PROMPT), max_new_tokens=budget, seed=seed + i, **settings)
        assert texts[i] == alone.text and ends[i] == REASONS[alone.stats.finish_reason]
        assert ends[i] == ("stop" if "stop_token_ids" in settings else "length")
        assert probabilities[i] == (alone.logprobs if likeliest is not None else [])
        told = CompletionLogprobs(model.text).push(alone.token_ids, alone.logprobs, alone.top_logprobs)
        assert tops[i] == (told["top_logprobs"] or []) and bool(tops[i]) == bool(likeliest)
    whole = client.completions.create(model="tiny", prompt=PROMPT, **given)
    assert [choice.text for choice in whole.choices] == texts
    if likeliest is not None:
        assert [choice.logprobs.token_logprobs for choice in whole.choices] == probabilities
        assert [choice.logprobs.top_logprobs or [] for choice in whole.choices] == tops


def test_a_stop_string_ends_a_stream_where_it_ends_the_text(client, model):
    ids = model.text.encode(PROMPT)
    free = model.generate(ids, max_new_tokens=60, temperature=1.0, seed=9)
    stop = free.text[20:23]
    alone = model.generate(ids, max_new_tokens=60, temperature=1.0, seed=9, stop=[stop], top_logprobs=2)
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 60, "seed": 9, "stop": [stop], "logprobs": 2}
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == alone.text
    assert chunks[-2].choices[0].finish_reason == "stop"
    usage = chunks[-1].usage
    assert usage.completion_tokens == len(alone.token_ids) and usage.prompt_tokens == len(ids)
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == alone.text and whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == len(alone.token_ids)
    told = CompletionLogprobs(model.text).push(alone.token_ids, alone.logprobs, alone.top_logprobs)
    assert whole.choices[0].logprobs.top_logprobs == told["top_logprobs"]


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_a_stream_tells_its_runs(serving, model, url):
    """All tokens, and what each run took."""
    what = {"prompt": PROMPT} if url == COMPLETIONS else {"messages": HELLO}
    body = what | {
        "max_tokens": 30,
        "seed": 4,
        "stream": True,
        "stream_options": {"include_runs": True},
        **FEW,
    }
    told = httpx.post(serving.url + url, json=body, timeout=60).text.split("\n\n")
    choices = [
        json.loads(line.removeprefix("data: "))["choices"][0]
        for line in told
        if "[DONE]" not in line and line
    ]
    ids = model.text.encode(PROMPT)
    alone = model.generate(ids, max_new_tokens=30, temperature=1.0, seed=4, **FEW)
    runs = [choice["run"] for choice in choices if "run" in choice]
    assert [token for run in runs for token in run["token_ids"]] == alone.token_ids
    assert len(choices) == len(runs) + (1 if url == COMPLETIONS else 2), "a role, runs, an end"
    first, *cycles = runs
    assert (first["kind"], first["nodes"], len(first["token_ids"])) == ("prompt", 0, 1)
    assert {run["kind"] for run in cycles} <= {"plain", "two-pass"} and all(run["forwards"] for run in runs)
    assert all(1 <= len(run["token_ids"]) <= run["nodes"] + 1 for run in cycles)


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_a_run_without_text_is_told(served, url):
    def script(text):
        text.run([0, 0])
        text.run(served.text.encode("a"))
        text.end("length")

    what = {"prompt": PROMPT} if url == COMPLETIONS else {"messages": HELLO}
    body = what | {"stream": True, "max_tokens": 3}
    with scripted_server(served, script=script) as serving:
        silent = httpx.post(serving.url + url, json=body).text
        told = httpx.post(serving.url + url, json=body | {"stream_options": {"include_runs": True}}).text
    assert '"run"' not in silent and told.count("data: ") == silent.count("data: ") + 1
    assert '"run": {"token_ids": [0, 0], "kind": "plain", "nodes": 0, "forwards": 1}' in told


def test_a_chat_streamed_and_whole(client, model, serving):
    asked = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 30, "seed": 4, "logprobs": True,
             "top_logprobs": 5}  # fmt: skip
    chunks = list(client.chat.completions.create(**asked, stream=True))
    ids = model.text.encode(model.text.chat(HELLO), added_specials=False)
    alone = model.generate(ids, max_new_tokens=30, temperature=1.0, seed=4, top_logprobs=5)
    first, *middle, last = [chunk.choices[0] for chunk in chunks]
    assert first.delta.role == "assistant" and last.finish_reason == "length" and not last.delta.content
    assert "".join(choice.delta.content or "" for choice in middle) == alone.text
    told = [token for choice in middle for token in choice.logprobs.content]
    assert [token.logprob for token in told] == alone.logprobs
    names = [[(one.token, one.logprob) for one in token.top_logprobs] for token in told]
    assert names == [[(piece(model.text, t), p) for t, p in place] for place in alone.top_logprobs]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == alone.text
    assert whole.choices[0].logprobs.content == told
    assert whole.system_fingerprint == chunks[0].system_fingerprint == serving.engine.ready.fingerprint
    assert whole.usage.completion_tokens_details.accepted_prediction_tokens is not None


def test_a_seed_is_drawn_told_and_repeats_the_answer(client):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 12}
    first = client.chat.completions.create(**asked)
    again = client.chat.completions.create(**asked, seed=first.model_extra["seed"])
    assert again.choices[0].message.content == first.choices[0].message.content


def test_many_at_once_by_the_async_client(serving, model):
    async def one(client, seed):
        stream = await client.completions.create(
            model="tiny", prompt=[1, 5, seed % 200 + 9], max_tokens=15, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{serving.url}/v1", api_key="none", timeout=60) as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(12)))

    for seed, text in enumerate(asyncio.run(all_of_them())):
        assert text == model.generate([1, 5, seed + 9], max_new_tokens=15, temperature=1.0, seed=seed).text


def test_prompts_of_every_form(client, model):
    asked = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    ids = model.text.encode(PROMPT)
    for prompt, count in ((PROMPT, 1), (ids, 1), ([PROMPT, "x"], 2), ([ids, [1, 2]], 2)):
        whole = client.completions.create(prompt=prompt, **asked)
        assert len(whole.choices) == count and whole.choices[0].text == model.generate(ids, "auto", 4).text
    long = list(range(5, 205))
    client.completions.create(prompt=long, **asked)
    again = client.completions.create(prompt=long, **asked)
    assert again.usage.prompt_tokens == 200 and again.usage.prompt_tokens_details.cached_tokens == 192


def test_a_chats_second_turn_is_found_in_the_cache(client):
    """And is answered as where nothing of it is there."""
    told = [{"role": "user", "content": PROMPT * 60}]
    asked = {"model": "tiny", "max_tokens": 40, "seed": 5, "logprobs": True}
    first = client.chat.completions.create(messages=told, **asked)
    told += [first.choices[0].message.model_dump(include={"role", "content"}), *HELLO]
    warm = client.chat.completions.create(messages=told, **asked)
    cold = client.chat.completions.create(messages=told, **asked, extra_body={"cache_salt": "cold"})
    assert warm.usage.prompt_tokens_details.cached_tokens >= 64
    assert cold.usage.prompt_tokens_details.cached_tokens == 0
    assert warm.choices == cold.choices and warm.usage.completion_tokens == cold.usage.completion_tokens


def test_the_other_endpoints(serving, client, model):
    (card,) = client.models.list().data
    assert (
        card == client.models.retrieve("tiny")
        and card.id == "tiny"
        and card.model_extra["max_model_len"] == 1024
    )
    with httpx.Client(base_url=serving.url) as http:
        assert (http.get("/health").status_code, http.get("/ready").status_code) == (200, 200)
        found = http.post("/tokenize", json={"prompt": PROMPT}).json()
        assert found == {"count": 3, "max_model_len": 1024, "tokens": model.text.encode(PROMPT)}
        ids = model.text.encode(model.text.chat(HELLO), added_specials=False)
        assert http.post("/tokenize", json={"messages": HELLO, "model": "tiny"}).json()["tokens"] == ids
        for body in ({}, {"prompt": PROMPT, "messages": HELLO}, {"prompt": [1]}, {"text": "x"}):
            assert http.post("/tokenize", json=body).status_code == 400
        lines = http.get("/metrics").text
        for name in ("requests_running", "cache_pages", "time_to_first_token_seconds_count", "cycles_total",
                     "generated_tokens_total", "time_per_token_seconds_sum"):  # fmt: skip
            assert re.search(rf"^orthrus_{name} \d", lines, re.M), name
        assert float(re.search(r"^orthrus_cache_pages (\S+)", lines, re.M)[1]) == 64
        assert float(re.search(r"^orthrus_tokens_per_cycle (\S+)", lines, re.M)[1]) >= 1
        assert "openapi" in http.get("/openapi.json").json() and http.get("/docs").status_code == 404


def test_a_stop_string_frees_its_slot(scripted, served):
    """And runs that the engine had made meanwhile are no part of the answer."""
    body = {"prompt": "x", "stop": "def", "stream": True, "max_tokens": 50}
    client = scripted.connected(COMPLETIONS, json.dumps(body).encode())
    (text,) = until(lambda: scripted.engine.texts)
    assert text.request.stop == ("def",)  # the client's `submit` leaves it out
    text.run(served.text.encode("a def"))
    text.run(served.text.encode("more"))
    assert text.cancelled.wait(10)
    said = b""
    while b"[DONE]" not in said:
        said += client.recv(4096)
    assert b'"text": "a "' in said and b'"finish_reason": "stop"' in said and b"more" not in said


# Tools and reasoning


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
SAID = f"<think>\nhm\n</think>\n\nI ask.\n{CALL}"


@pytest.fixture
def with_tools(served, folder, tmp_path):
    """Served by a template that knows tools, and the engine says SAID, three tokens a run."""
    copy = write_tiny(tmp_path / "tools")
    (copy / "chat_template.jinja").write_text(TEMPLATES["reasoning"])
    text = type(served.text)(copy)
    ids = text.encode(SAID)
    config = replace(served.config, eos_token_ids=(0,))

    def script(spoken):
        for at in range(0, len(ids), 3):
            spoken.run(ids[at : at + 3])
        spoken.run([0])
        spoken.end("end_token")

    with scripted_server(replace(served, text=text, config=config), script=script) as serving:
        yield serving


def test_tool_calls_and_reasoning_streamed_and_whole(with_tools):
    client = openai.OpenAI(base_url=f"{with_tools.url}/v1", api_key="none", max_retries=0)
    asked = {"model": "tiny", "messages": HELLO, "tools": [WEATHER], "tool_choice": "auto"}
    (choice,) = client.chat.completions.create(**asked).choices
    call = choice.message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Łódź"})
    assert choice.message.model_extra["reasoning_content"] == "hm" and choice.message.content == "I ask."
    assert choice.finish_reason == "tool_calls"
    content, reasoning, calls, reasons = "", "", [], []
    for chunk in client.chat.completions.create(**asked, stream=True):
        (streamed,) = chunk.choices
        content += streamed.delta.content or ""
        reasoning += (streamed.delta.model_extra or {}).get("reasoning_content", "")
        calls += streamed.delta.tool_calls or []
        reasons.append(streamed.finish_reason)
    assert (content, reasoning, reasons[-1]) == ("I ask.", "hm", "tool_calls") and not any(reasons[:-1])
    assert [(c.index, c.function.name, c.function.arguments) for c in calls] == [
        (0, "weather", call.function.arguments)
    ]
    plain = client.chat.completions.create(model="tiny", messages=HELLO).choices[0]
    assert "<tool_call>" in plain.message.content and plain.finish_reason == "stop"
    told = [*HELLO, choice.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "sun"}]  # fmt: skip
    assert client.chat.completions.create(model="tiny", messages=told, tools=[WEATHER]).choices


# What is refused


def asked_of(app, *requests, **client):
    """The answers of an app in this process to requests: method, path, more."""

    async def ask():
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        base = {"transport": transport, "base_url": "http://localhost"} | client
        async with httpx.AsyncClient(**base) as http:
            app.state.site.attach(ScriptedEngine())
            return [await http.request(method, path, **more) for method, path, more in requests]

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("method", "path", "more", "status", "param"),
    [
        ("POST", CHAT, {"json": {"messages": HELLO, "magic": 1}}, 400, "magic"),
        ("POST", CHAT, {"json": {"messages": HELLO, "top_logprobs": 2}}, 400, "top_logprobs"),
        ("POST", CHAT, {"json": {"messages": HELLO, "tools": [WEATHER]}}, 400, "tools"),
        ("POST", CHAT, {"json": {"messages": HELLO, "model": "gpt"}}, 404, "model"),
        ("POST", CHAT, {"json": {"messages": HELLO, "max_tokens": 1000}}, 400, "max_tokens"),
        ("POST", COMPLETIONS, {"json": {"prompt": "x", "messages": HELLO}}, 400, "messages"),
        ("POST", COMPLETIONS, {"json": {"prompt": ["x"] * 256, "n": 2}}, 400, "n"),
        ("POST", COMPLETIONS, {"json": {"prompt": "x", "n": 128, "model": None}}, 400, "n"),
        ("POST", COMPLETIONS, {"json": {"prompt": "x", "n": 32, "max_tokens": 900, "logprobs": 20}}, 400,
         "logprobs"),
        ("POST", COMPLETIONS, {"json": {"prompt": ["x", "y"], "n": 128, "max_tokens": 900, "logprobs": 20,
                                        "stream": True}}, 400, "logprobs"),
        ("POST", CHAT, {"json": {"messages": HELLO, "n": 32, "max_tokens": 900, "logprobs": True,
                                 "top_logprobs": 20}}, 400, "top_logprobs"),
        ("POST", COMPLETIONS, {"json": {"prompt": "x", "stream_options": {}, "stream": 1}}, 400, "stream"),
        ("POST", COMPLETIONS, {"content": b'{"prompt": "a", "prompt": "b"}'}, 400, None),
        ("POST", COMPLETIONS, {"content": b'{"prompt": "\xff"}'}, 400, None),
        ("POST", COMPLETIONS, {"content": b"[" * 10000}, 400, None),
        ("POST", COMPLETIONS, {"content": b""}, 400, None),
        ("POST", "/tokenize", {"json": {"prompt": "x", "magic": 1}}, 400, "magic"),
        ("GET", "/v1/nothing", {}, 404, None),
        ("GET", "/v1/models/gpt/4", {}, 404, None),
        ("GET", "/docs", {}, 404, None),
        ("GET", CHAT, {}, 405, None),
        ("OPTIONS", CHAT, {"headers": {"origin": "http://evil.com"}}, 405, None),
        ("POST", CHAT, {"data": {"a": "b"}}, 415, None),
        ("POST", CHAT, {"content": b"{}", "headers": {"content-type": "text/plain"}}, 415, None),
        ("POST", CHAT, {"content": b" " * 3000}, 413, None),
        ("GET", "/health", {"headers": {"host": "evil.com"}}, 403, None),
        ("GET", "/health", {"headers": {"host": "evil.com:8000"}}, 403, None),
        ("GET", "/health", {"headers": {"host": ""}}, 403, None),
        ("GET", "/health", {"headers": {"host": "10.0.0.1"}}, 403, None),
    ],
)  # fmt: skip
def test_what_is_refused_says_so_as_openai_does(served, method, path, more, status, param):
    app = build(Site(served, Limits(waiting=100, body_bytes=20_000 if status != 413 else 2000)))
    headers = {} if "data" in more else {"content-type": "application/json"}
    (answer,) = asked_of(app, (method, path, {"headers": headers} | more))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert error["type"] == "invalid_request_error" and error["message"] and "\n" not in error["message"]
    assert status != 403 or ":8000" not in error["message"]
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert f'orthrus_refused_total{{status="{status}"}} 1.0' in app.state.site.metrics.text().decode()


def test_the_hosts_that_are_this_one():
    for host, header in (("127.0.0.1", "localhost:8000"), ("127.0.0.1", "[::1]:8"), ("::1", "[0:0::1]"),
                         ("10.0.0.7", "10.0.0.7:80"), ("localhost", "LOCALHOST."), ("0.0.0.0", "10.1.2.3"),
                         ("::", "[2001:db8::1]:80"), ("0.0.0.0", "my.name:80")):  # fmt: skip
        assert Access.at(host, ["my.name"]).takes_host(header), (host, header)
    for host, header in (("127.0.0.1", "10.0.0.7"), ("0.0.0.0", "evil.com"), ("127.0.0.1", "localhost.evil"),
                         ("10.0.0.7", "10.0.0.8"), ("127.0.0.1", "127.0.0.1.evil.com"),
                         ("::1", "[::1]evil.com"), ("::1", "[::1]:8.evil.com"), ("::1", "[::1"),
                         ("127.0.0.1", "localhost:80:80"), ("127.0.0.1", "localhost:evil")):  # fmt: skip
        assert not Access.at(host).takes_host(header), (host, header)
    assert is_loopback("127.3.4.5") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("::") and not is_loopback("example.org")


def test_keys(served):
    app = build(Site(served, Limits()), Access.at("0.0.0.0", keys=(b"a" * 20, KEY.encode())))

    def status(path, header=None):
        headers = {} if header is None else {"authorization": header}
        return asked_of(app, ("GET", path, {"headers": headers}))[0].status_code

    assert status("/v1/models", f"Bearer {KEY}") == status("/v1/models", f"bearer  {'a' * 20}") == 200
    for wrong in (None, "", KEY, "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}",
                  "Bearer \xff"):  # fmt: skip
        assert status("/v1/models", wrong and wrong.encode("latin-1")) == 401, wrong
    assert (status("/metrics"), status("/health"), status("/ready"), status("/nothing")) == (
        401,
        200,
        200,
        401,
    )


def test_files_of_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# mine\n\n  {KEY} \n" + "z" * 16)
    assert read_keys(file) == (KEY.encode(), b"z" * 16)
    for wrong in ("", "# none\n", "short\n", KEY + " x", KEY + "é"):
        file.write_text(wrong)
        with pytest.raises(InputError, match="key"):
            read_keys(file)
    with pytest.raises(InputError, match="a key a line"):
        read_keys(tmp_path / "nothing")


def test_a_body_of_no_known_length_is_bounded(served):
    async def pieces():
        for _ in range(100):
            yield b" " * 100

    app = build(Site(served, Limits(body_bytes=5000)))
    headers = {"content-type": "application/json"}
    (answer,) = asked_of(app, ("POST", CHAT, {"content": pieces(), "headers": headers}))
    assert answer.status_code == 413 and answer.json()["error"]["message"].endswith("5000 bytes")


def test_a_body_that_does_not_come(served):
    with scripted_server(served, Limits(body_seconds=0.1)) as serving:
        client = serving.connected(CHAT, b'{"messages": ', missing=10)
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")
        serving.connected(CHAT, b'{"messages": ', missing=10).close()
        assert httpx.get(serving.url + "/health").status_code == 200


def test_too_many_wait(served):
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    with scripted_server(served, Limits(waiting=1), slots=1) as serving:
        there = [serving.connected(COMPLETIONS, body) for _ in range(2)]
        until(lambda: len(serving.engine.texts) == 2)
        answer = httpx.post(serving.url + COMPLETIONS, json={"prompt": "x"})
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        there[0].close()
        until(lambda: len(serving.site.jobs) == 1)
        there.append(serving.connected(COMPLETIONS, body))
        until(lambda: len(serving.engine.texts) == 3)
        for client in there:
            client.close()


def test_requests_that_are_being_read_count(served):
    with scripted_server(served, Limits(waiting=1), slots=1) as serving:
        there = [serving.connected(path, b'{"prompt": ', missing=10) for path in ("/tokenize", COMPLETIONS)]
        until(lambda: serving.site._reading.total() == 2)
        for path in ("/tokenize", COMPLETIONS):
            assert httpx.post(serving.url + path, json={"prompt": "x"}).status_code == 429
        there[0].close()
        until(lambda: serving.site._reading.total() == 1)
        assert httpx.post(serving.url + "/tokenize", json={"prompt": "x"}).status_code == 200
        there[1].close()


def test_work_that_does_not_end_keeps_no_process():
    script = """
import asyncio, time
from qwen3_model.serve.beside import Beside
async def main():
    beside = Beside()
    assert await beside.run(lambda: 5) == 5
    try:
        await beside.run(lambda: {}["a"])
    except KeyError:
        task = asyncio.create_task(beside.run(lambda: time.sleep(1000)))
        await asyncio.sleep(0.1)
asyncio.run(main())
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=20).returncode == 0


def test_large_bodies_hold_no_small_ones_up(served, monkeypatch):
    holds, read = Event(), []

    def tokenized(served, body):
        read.append(len(body["prompt"]))
        return {"a": len(body["prompt"]) < 10 or holds.wait(20)}

    monkeypatch.setattr(routes, "tokenized", tokenized)
    with scripted_server(served) as serving:
        body = b'{"prompt": "%s"}' % (b"a" * routes.LARGE)
        clients = [serving.connected("/tokenize", body) for _ in range(9)]
        until(lambda: serving.site._reading.total() == 9 and read)
        clients.append(serving.connected("/tokenize", b'{"prompt": "x"}'))
        until(lambda: 1 in read, 5)
        assert len(read) <= 3, "two large ones at a time"
        holds.set()
        for client in clients:
            assert client.recv(100).startswith(b"HTTP/1.1 200")
            client.close()


def test_a_whole_answer_is_made_beside_the_others(served, monkeypatch):
    """Who asks meanwhile is answered."""
    holds = Event()
    made = answer.answer
    monkeypatch.setattr(answer, "answer", lambda *given: holds.wait(10) and made(*given))
    with scripted_server(served, script=lambda text: (text.run([0] * 16), text.end("length"))) as serving:
        client = serving.connected(COMPLETIONS, b'{"prompt": "x"}')
        until(lambda: "orthrus_choices_total{" in serving.site.metrics.text().decode())
        assert httpx.get(serving.url + "/health", timeout=5).status_code == 200
        holds.set()
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        client.close()


def test_a_key_has_so_many_requests(served):
    access = Access(keys=(KEY.encode(), b"b" * 20))
    with scripted_server(served, Limits(per_key=1), access, slots=4) as serving:

        def ask(key, timeout):
            headers = {"authorization": f"Bearer {key}"}
            return httpx.post(
                serving.url + COMPLETIONS, json={"prompt": "x"}, headers=headers, timeout=timeout
            )

        for key in (KEY, "b" * 20):
            with pytest.raises(httpx.ReadTimeout):
                ask(key, 0.3)
        with httpx.stream(
            "POST", serving.url + COMPLETIONS, json={"prompt": "x", "stream": True},
            headers={"authorization": f"Bearer {KEY}"},
        ):  # fmt: skip
            assert ask(KEY, 5).status_code == 429


# Who goes, and what dies


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["queued", "running"])
def test_a_client_that_goes_cancels_its_texts(scripted, stream, phase):
    body = {"prompt": "x", "n": 3, "stream": stream, "max_tokens": 500}
    client = scripted.connected(COMPLETIONS, json.dumps(body).encode())
    texts = until(lambda: len(scripted.engine.texts) == 3 and scripted.engine.texts)
    if phase == "running":
        texts[1].run([5, 6])
        texts[2].run([0] * 500)
        texts[2].end("length")
        if stream:
            assert b"200 OK" in client.recv(4096)
    client.close()
    for text in texts[: 2 if phase == "running" else 3]:  # the last one may have ended
        assert text.cancelled.wait(10)
    until(lambda: "orthrus_cancelled_total 1.0" in scripted.site.metrics.text().decode())
    assert 'status="499"' not in scripted.site.metrics.text().decode()
    assert not scripted.site.jobs


def test_a_slow_reader_that_goes_cancels_its_text(scripted):
    body = json.dumps({"prompt": "x", "stream": True, "max_tokens": 990, "logprobs": 0}).encode()
    client = scripted.connected(COMPLETIONS, body, receive_buffer=4096)
    (text,) = until(lambda: scripted.engine.texts)
    for _ in range(90):
        text.run(list(range(5, 16)))
    time.sleep(0.2)  # what the sockets hold is full now
    assert not text.cancelled.is_set()
    client.close()
    assert text.cancelled.wait(10)
    until(lambda: not scripted.site.jobs)


def test_a_client_that_closes_its_sending_side_has_gone(scripted):
    with scripted.connected(COMPLETIONS, b'{"prompt": "x"}') as client:
        (text,) = until(lambda: scripted.engine.texts)
        client.shutdown(socket.SHUT_WR)
        assert text.cancelled.wait(10)


def test_a_client_that_goes_costs_no_reading(served, monkeypatch):
    """Of a body that waits for its place in the pool."""
    holds, read = Event(), []
    monkeypatch.setattr(routes, "tokenized", lambda served, body: read.append(body) or {"a": holds.wait(20)})
    with scripted_server(served) as serving:
        serving.site.beside = Beside(1)
        first = serving.connected("/tokenize", b'{"prompt": "x"}')
        until(lambda: read)
        gone = [serving.connected(path, b'{"prompt": "y"}') for path in ("/tokenize", COMPLETIONS)]
        until(lambda: serving.site._reading.total() == 3)
        for client in gone:
            client.close()
        until(lambda: serving.site._reading.total() == 1)
        assert httpx.get(serving.url + "/health").status_code == 200
        holds.set()
        assert first.recv(100).startswith(b"HTTP/1.1 200")
        first.close()
        assert read == [{"prompt": "x"}] and not serving.engine.texts
        assert 'status="499"' not in serving.site.metrics.text().decode()


@pytest.mark.parametrize("wait", [0.0, 0.05, 0.3])
def test_a_client_that_goes_frees_the_engines_slots(serving, client, wait):
    """Whatever the texts are doing then: others have the bits that they have alone."""
    body = {"prompt": [7] * 600, "n": 6, "stream": True, "max_tokens": 400, "strategy": "autoregressive"}
    gone = serving.connected(COMPLETIONS, json.dumps(body).encode())
    until(lambda: serving.site.jobs)
    time.sleep(wait)
    gone.close()
    until(lambda: not serving.site.jobs)
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "seed": 1}
    first = client.completions.create(**asked).choices[0].text
    until(lambda: (serving.engine.load.running, serving.engine.load.waiting) == (0, 0))
    assert client.completions.create(**asked).choices[0].text == first


def events_of(response):
    return [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]


def broken(scripted, stream, then):
    """The answer to a request whose text has a run, and then that happens to it."""
    body = {"prompt": "x", "stream": stream, "max_tokens": 500}
    with httpx.Client(base_url=scripted.url, timeout=20) as http:
        scripted.engine.script = lambda text: (text.run([5]), then(text))
        with http.stream("POST", COMPLETIONS, json=body) as response:
            if stream:
                return response.status_code, events_of(response)
            response.read()
            return response.status_code, [response.json()]


@pytest.mark.parametrize(
    ("then", "status", "words"),
    [
        (lambda text: text.die(), 503, "has died"),
        (lambda text: text.end("error", "its logits are not numbers"), 500, "not numbers"),
        (lambda text: text.end("cancelled"), 503, "server stops"),
    ],
)
def test_an_error_in_the_middle(scripted, then, status, words):
    code, events = broken(scripted, True, then)
    assert code == 200 and "choices" in events[0]
    assert words in events[-1]["error"]["message"] and events[-1]["error"]["type"] == "server_error"
    code, (told,) = broken(scripted, False, then)
    assert code == status and words in told["error"]["message"]
    client = openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match=words):
        list(client.completions.create(model="tiny", prompt="x", stream=True))


def test_health_while_the_engine_is_made_and_when_it_has_died(served):
    site = Site(served, Limits())
    app = build(site)

    async def statuses():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://localhost"
        ) as http:
            asked = [http.get("/health"), http.get("/ready"), http.post(COMPLETIONS, json={"prompt": "x"})]
            return [(await answer).status_code for answer in asked]

    async def all_of_them():
        made = await statuses()
        engine = ScriptedEngine(script=lambda text: (text.run([0] * 16), text.end("length")))
        site.attach(engine)
        alive = await statuses()
        site.draining = True
        draining = await statuses()
        site.draining, engine.alive = False, False
        return made, alive, draining, await statuses()

    assert asyncio.run(all_of_them()) == (
        [200, 503, 503], [200, 200, 200], [200, 503, 503], [503, 503, 503],
    )  # fmt: skip


def test_no_token_waits_for_a_receipt(served, monkeypatch):
    """By Nagle's algorithm it would, for the one of the headers: 40 ms on Linux."""
    found, made = [], Protocol.connection_made

    def connection_made(self, transport):
        made(self, transport)
        option = socket.IPPROTO_TCP, socket.TCP_NODELAY
        found.append(transport.get_extra_info("socket").getsockopt(*option))

    monkeypatch.setattr(Protocol, "connection_made", connection_made)
    with scripted_server(served) as serving:
        assert serving.listener.proto == 0, "asyncio leaves such a socket's connections as they are"
        assert httpx.get(f"{serving.url}/health").status_code == 200
    assert found and all(found)


def test_the_log_has_no_query():
    record = logging.LogRecord("uvicorn.access", 20, "", 1, '%s - "%s %s HTTP/%s" %d',
                               ("1.2.3.4:5", "GET", "/health?prompt=secret", "1.1", 200), None)  # fmt: skip
    assert PathOnly().filter(record) and record.getMessage() == '1.2.3.4:5 - "GET /health HTTP/1.1" 200'
