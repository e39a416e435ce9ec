"""Clients that do everything wrong: each is told so where it can be told, in OpenAI's form, the others do not
notice, and the next request is answered."""

from __future__ import annotations

import json
import logging
import random
import socket
import time

import httpx
import pytest
from raw_http import HEAD, ask, chunked, connected, post, told
from serving import ScriptedEngine, Serving
from tiny_folder import write_tiny

from qwen3_model.config import Qwen3Config
from qwen3_model.openai.body import CHAT, COMPLETIONS
from qwen3_model.openai.served import Served
from qwen3_model.serve import protocol
from qwen3_model.serve.limits import Limits
from qwen3_model.text import Text

TEXT = "def add(first, second):"
ASKED = {"prompt": "x", "max_tokens": 50}
GOOD = post(COMPLETIONS, json.dumps(ASKED).encode())
MIB = 2**20


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = write_tiny(tmp_path_factory.mktemp("faults") / "tiny")
    return Served("tiny", Qwen3Config.from_folder(folder), Text(folder))


@pytest.fixture(scope="module")
def serving(served):
    """A server whose engine says TEXT to everybody, and which logs no fault of its own."""
    ids = served.text.encode(TEXT)

    def script(text):
        for token in ids:
            text.run([token])
        text.run([0] * (50 - len(ids)))
        text.end("length")

    async def start():
        return ScriptedEngine(slots=500, script=script)

    found = Faults()
    loggers = [logging.getLogger(name) for name in ("asyncio", "uvicorn.error")]
    with Serving(served, start, Limits(), None) as serving:
        for logger in loggers:
            logger.addHandler(found)
        serving.whole = TEXT + served.text.decode([0] * (50 - len(ids)))
        yield serving
        for logger in loggers:
            logger.removeHandler(found)
    assert not found.said


class Faults(logging.Handler):
    """What a log says of errors of the program."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        if record.exc_info or record.levelno >= logging.ERROR:
            self.said.append(self.format(record))


@pytest.fixture(autouse=True)
def lives(serving):
    """After each test a request is answered, and nobody is left."""
    yield
    assert text_of(ask(serving.port, GOOD)) == serving.whole
    end = time.monotonic() + 30  # on a busy machine; less than the server itself waits for a reader
    while serving.site.jobs:
        assert time.monotonic() < end, "a request was left behind"
        time.sleep(0.005)


def text_of(answer) -> str:
    assert answer.status == 200, answer
    return json.loads(answer.body)["choices"][0]["text"]


# What is no HTTP


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), 400),
        (b"hello\r\n\r\n", 400),
        (b"\r\n\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nhost: a\r\nhost: localhost\r\n\r\n", 400),
        (b"GET / HTTP/x.1\r\nhost: localhost\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nbad header: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: a\x00b\r\n\r\n", 400),
        (f"POST {CHAT} HTTP/1.1\r\n{HEAD}content-length: -5\r\n\r\n".encode(), 400),
        (f"POST {CHAT} HTTP/1.1\r\n{HEAD}content-length: 5, 6\r\n\r\n".encode(), 400),
        (f"POST {CHAT} HTTP/1.1\r\n{HEAD}content-length: 5\r\ncontent-length: 6\r\n\r\n".encode(), 400),
        (f"POST {CHAT} HTTP/1.1\r\n{HEAD}content-length: {'9' * 30}\r\n\r\n".encode(), 400),
        (f"POST {CHAT} HTTP/1.1\r\n{HEAD}transfer-encoding: gzip\r\n\r\n".encode(), 501),
        (f"POST {CHAT} HTTP/1.1\r\n{HEAD}transfer-encoding: chunked\r\n\r\nzz\r\n".encode(), 400),
        (b"GET /" + b"a" * MIB + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 200_000, 431),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * MIB, 431),
        (f"POST {CHAT} HTTP/1.1\r\n{HEAD}transfer-encoding: chunked\r\n\r\n1;{'x' * MIB}".encode(), 431),
    ],
)  # fmt: skip
def test_what_is_no_http(serving, data, status):
    with connected(serving.port, data) as client:
        answer = told(client)
        assert answer.status == status and answer.error and answer.headers["connection"] == "close"
        assert client.recv(1) == b""


def test_a_request_in_pieces(serving):
    with connected(serving.port) as client:
        rng, at = random.Random(1), 0
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while at < len(GOOD):
            more = rng.choice([1, 1, 2, 30])
            client.sendall(GOOD[at : at + more])
            at += more
        assert text_of(told(client)) == serving.whole


@pytest.mark.parametrize("cut", [1, 10, 30, len(GOOD) - 30, len(GOOD) - 1])
@pytest.mark.parametrize("how", ["close", "reset", "half"])
def test_half_a_request(serving, cut, how):
    """And its client goes, or says that no more comes."""
    client = connected(serving.port, GOOD[:cut])
    if how == "half":
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""
    elif how == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()


def test_headers_that_do_not_come(serving, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.1)
    with connected(serving.port) as silent, connected(serving.port, b"GET / HTTP/1.1\r\nhos") as client:
        answer = told(client)
        assert answer.status == 408 and "headers" in answer.error["message"]
        assert silent.recv(1) == b""
    with connected(serving.port, GOOD) as client:  # one that is kept has as long for the next request
        assert text_of(told(client)) == serving.whole
        client.sendall(GOOD[:50])
        assert told(client).status == 408


def test_more_connections_than_there_may_be(serving, monkeypatch):
    """One more is closed at once, and those that are there go on."""
    soon(lambda: not serving.server.server_state.connections)
    monkeypatch.setattr(protocol, "MOST_CONNECTIONS", 3)
    there = [connected(serving.port) for _ in range(3)]
    soon(lambda: len(serving.server.server_state.connections) == 3)
    with connected(serving.port) as client:
        client.settimeout(5)  # before silence alone would close it
        assert client.recv(1) == b""
    for client in there:
        client.sendall(GOOD)
        assert text_of(told(client)) == serving.whole
        client.close()


def test_connections_and_open_files(monkeypatch):
    limit = [200, 4096]
    monkeypatch.setattr(protocol.resource, "getrlimit", lambda which: tuple(limit))
    monkeypatch.setattr(protocol.resource, "setrlimit", lambda which, both: limit.__setitem__(0, both[0]))
    assert protocol.most_connections() == 200 - protocol.SPARE_FILES
    protocol.raise_file_limit()
    assert limit[0] == 4096 and protocol.most_connections() == 4096 - protocol.SPARE_FILES
    limit[0] = 10
    assert protocol.most_connections() == 1


# Bodies


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "empty"),
        (b'{"prompt": "x"', 400, "JSON"),
        (b'{"prompt": "\xff\xfe"}', 400, "JSON"),
        (b'\xef\xbb\xbf{"prompt": "x"}', 400, "JSON"),
        ('{"prompt": "x"}'.encode("utf-16"), 400, "JSON"),
        (b'{"prompt": "x", "prompt": "y"}', 400, "twice"),
        (b'{"prompt": "x", "logit_bias": {"5": 1, "5": 2}}', 400, "twice"),
        (b'{"prompt": "x", "temperature": NaN}', 400, "NaN"),
        (b'{"prompt": "x", "temperature": -Infinity}', 400, "Infinity"),
        (b'{"prompt": "x", "temperature": 1e999}', 400, "1e999"),
        (b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}", 400, "JSON"),
        (b'{"prompt": "x", "seed": 1.5}', 400, "seed"),
        (b'{"prompt": "\\ud800"}', 400, "prompt"),
        (b'{"prompt": "x", "\\ud800": 1}', 400, "not known"),
        (b'{"prompt": "x", "stop": "\\udfff"}', 200, ""),
        (b'{"prompt": ' + b"[" * 65 + b"]" * 65 + b"}", 400, "deep"),
        (b"[" * MIB, 400, "deep"),
        (b'{"a":' * MIB, 413, "4194304 bytes"),
        (b" " * (4 * MIB + 1), 413, "4194304 bytes"),
        (b'{"prompt": "' + b"a" * 300_000 + b'"}', 400, "context"),
        (b"null", 400, "object"),
        (b'"prompt"', 400, "object"),
    ],
)
@pytest.mark.parametrize("send", [post, chunked])
def test_bodies(serving, body, status, words, send):
    """A connection goes on behind a body that was refused."""
    with connected(serving.port, send(COMPLETIONS, body)) as client:
        answer = told(client)
        assert answer.status == status, answer
        assert status == 200 or words in answer.error["message"], answer.error
        client.sendall(GOOD)
        assert text_of(told(client)) == serving.whole


def test_a_body_that_is_shorter_or_longer_than_it_says(serving):
    with connected(serving.port, GOOD + b"and more\r\n\r\n") as client:  # the rest is the next request
        assert text_of(told(client)) == serving.whole
        assert told(client).status == 400
    with connected(serving.port, GOOD[:-1]) as client:
        time.sleep(0.05)
        assert not serving.site.jobs
        client.sendall(GOOD[-1:])
        assert text_of(told(client)) == serving.whole


def test_a_bad_chunk_behind_an_answer(serving):
    """Nobody can be told any more."""
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    with connected(serving.port, head) as client:
        assert told(client).status == 415
        client.sendall(b"zz\r\n")
        assert client.recv(1) == b""


def test_a_client_that_waits_until_it_may_send(serving):
    body = json.dumps(ASKED).encode()
    whole = post(COMPLETIONS, body, "expect: 100-continue\r\n")
    with connected(serving.port, whole[: -len(body)]) as client:
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert text_of(told(client)) == serving.whole


# Methods, versions, who may ask


def test_pipelined_requests_are_answered_in_their_order(serving):
    health = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    streamed = post(COMPLETIONS, json.dumps(ASKED | {"stream": True}).encode())
    with connected(serving.port, (GOOD + health + streamed) * 5 + b"bad\r\n\r\n") as client:
        for _ in range(5):
            assert text_of(told(client)) == serving.whole
            assert told(client, "GET").status == 200
            assert told(client).body.endswith(b"data: [DONE]\n\n")
        assert told(client).error


def test_http_1_0_and_head(serving):
    for data, status in ((post(COMPLETIONS, json.dumps(ASKED).encode(), version="1.0"), 200),
                         (b"GET /health HTTP/1.0\r\nhost: localhost\r\n\r\n", 200),
                         (b"GET /health HTTP/1.0\r\n\r\n", 403)):  # fmt: skip
        with connected(serving.port, data) as client:
            assert told(client).status == status and client.recv(1) == b""
    streamed = post(COMPLETIONS, json.dumps(ASKED | {"stream": True}).encode(), version="1.0")
    assert ask(serving.port, streamed).body.endswith(b"data: [DONE]\n\n")
    with connected(serving.port, f"HEAD /health HTTP/1.1\r\n{HEAD}\r\n".encode()) as client:
        answer = told(client, "HEAD")
        assert (answer.status, answer.body) == (200, b"")
        client.sendall(f"HEAD {CHAT} HTTP/1.1\r\n{HEAD}\r\n".encode())
        assert told(client, "HEAD").status == 405
        client.sendall(GOOD)
        assert text_of(told(client)) == serving.whole


@pytest.mark.parametrize(
    ("request_line", "headers", "status"),
    [
        (f"POST {CHAT}", "host: evil.example\r\ncontent-type: application/json\r\n", 403),
        (f"POST {CHAT}", "host: localhost@evil.example\r\n", 403),
        ("POST http://evil.example/v1/models", "host: evil.example\r\n", 403),
        (f"POST {CHAT}", "host: localhost\r\ncontent-type: text/plain\r\n", 415),
        (f"POST {CHAT}", "host: localhost\r\ncontent-type: application/json, text/plain\r\n", 415),
        (f"POST {CHAT}", "host: localhost\r\n", 415),
        (f"OPTIONS {CHAT}", "host: localhost\r\norigin: http://evil.example\r\n"
         "access-control-request-method: POST\r\naccess-control-request-headers: content-type\r\n", 405),
        ("OPTIONS *", "host: localhost\r\n", 404),
        (f"BREW {CHAT}", HEAD, 405),
        (f"DELETE {CHAT}", HEAD, 405),
        ("GET //etc/passwd", HEAD, 404),
        ("GET /v1/models/../../x", HEAD, 404),
        ("GET /%00%0d%0aset-cookie:%20a=b", HEAD, 404),
        ("GET /health/", HEAD, 404),
        (f"GET {CHAT}", HEAD + "connection: upgrade\r\nupgrade: websocket\r\n", 405),
    ],
)  # fmt: skip
def test_who_and_what_is_refused(serving, request_line, headers, status):
    answer = ask(serving.port, f"{request_line} HTTP/1.1\r\n{headers}content-length: 2\r\n\r\n{{}}".encode())
    assert answer.status == status and answer.error
    assert not {name for name in answer.headers if name.startswith("access-control") or name == "set-cookie"}


# Slow ones


@pytest.fixture
def narrow(serving):
    """What the server accepts has small buffers."""
    sent = serving.listener.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    serving.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    yield
    serving.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sent // 2)  # Linux doubles it


def test_a_slow_reader_holds_nobody_up_and_little_memory(serving, narrow):
    """What it has not taken waits as pieces, and at most a buffer of it as bytes."""
    stream = json.dumps({"prompt": "x", "max_tokens": 900, "stream": True, "logprobs": 0}).encode()
    script, kept = serving.engine.script, []
    serving.engine.script = kept.append
    slow: list[socket.socket] = []
    try:
        while len(slow) < 10:  # one behind the other: their texts are submitted in this order
            slow.append(serving.connected(COMPLETIONS, stream, receive_buffer=8192))
            soon(lambda: len(kept) == len(slow))
        serving.engine.script = script
        for text in kept:
            for _ in range(900):
                text.run([5])
        body = json.dumps(ASKED | {"stream": True}).encode()
        others = [connected(serving.port, post(COMPLETIONS, body)) for _ in range(40)]
        for client in others:
            assert told(client).body.endswith(b"data: [DONE]\n\n")
            client.close()
        held = [c.transport.get_write_buffer_size() for c in serving.server.server_state.connections]
        assert sum(size > 0 for size in held) >= 10 and max(held) < 2**17, held
        kept[0].end("length")  # who reads at last gets it all
        said = told(slow[0]).body
        assert said.count(b'"token_logprobs"') == 900 and said.endswith(b"data: [DONE]\n\n")
    finally:
        serving.engine.script = script
        for client in slow:
            client.close()


def test_who_does_not_read_keeps_no_place(serving, narrow, monkeypatch):
    """Its texts end, and are counted, when the engine has ended them; its connection is closed."""
    monkeypatch.setattr(protocol, "UNREAD_SECONDS", 0.5)
    stream = json.dumps({"prompt": "x", "max_tokens": 990, "stream": True, "logprobs": 0}).encode()
    kept, script = [], serving.engine.script
    monkeypatch.setattr(serving.engine, "script", kept.append)
    before = serving.site.metrics.finished.labels("length")._value.get()
    client = serving.connected(COMPLETIONS, stream, receive_buffer=4096)
    soon(lambda: kept)
    serving.engine.script = script
    for _ in range(990):
        kept[0].run([5])
    (job,) = serving.site.jobs
    kept[0].end("length")
    soon(lambda: not job.left)
    assert job in serving.site.jobs and serving.site.metrics.finished.labels("length")._value.get() > before
    soon(lambda: not serving.site.jobs)
    said = b"".join(iter(lambda: client.recv(2**16), b""))
    assert b'"text"' in said and b"[DONE]" not in said
    client.close()


def soon(condition):
    """Wait until a condition is true."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


@pytest.mark.slow
def test_a_long_prompt_stalls_nobody(serving):
    """It is read, and made tokens of, beside the others."""
    body = b'{"prompt": "' + b"def add(first, second): " * 170_000 + b'"}'
    with connected(serving.port, post(COMPLETIONS, body)) as client, httpx.Client() as http:
        client.setblocking(False)
        longest, asked = 0.0, 0
        while True:
            began = time.monotonic()
            assert http.get(serving.url + "/health").status_code == 200
            longest, asked = max(longest, time.monotonic() - began), asked + 1
            try:
                client.recv(1, socket.MSG_PEEK)
                break
            except BlockingIOError:
                pass
        client.setblocking(True)
        assert told(client).status == 400
        assert asked >= 20 and longest < 1.0, (asked, longest)
