"""`orthrus serve` as a process: what it refuses before it loads a model, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from threading import Thread

import httpx
import pytest
from forked_worker import ForkedWorker
from tiny_folder import write_tiny

from qwen3_model import checkpoint
from qwen3_model.cli import main
from qwen3_model.cli import serve as verb
from qwen3_model.openai.body import COMPLETIONS
from qwen3_model.serve import engine_client

LONG = {"prompt": "def add(first", "max_tokens": 900, "stream": True, "strategy": "autoregressive"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("serve") / "tiny")


class Process:
    """The command in a forked process. worker: its engine's process; url: where it is, once that is said."""

    def __init__(self, folder, file, *words: object) -> None:
        self.file = file
        self.pid = os.fork()
        if self.pid == 0:
            code = 3
            try:
                out = os.open(file, os.O_WRONLY | os.O_CREAT)
                os.dup2(out, 1)
                os.dup2(out, 2)
                sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
                sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115
                engine_client._spawned = ForkedWorker
                signal.signal(signal.SIGINT, signal.default_int_handler)
                code = main(["serve", "--model", str(folder), "--port", "0", *map(str, words)])
                sys.stdout.flush()
            finally:
                os._exit(code)
        self.url = self.wait_for(r"served at (\S+) ")[1]

    @property
    def said(self) -> str:
        return self.file.read_text() if self.file.exists() else ""

    def wait_for(self, pattern: str):
        end = time.monotonic() + 60
        while not (found := re.search(pattern, self.said)):
            assert time.monotonic() < end, self.said
            time.sleep(0.01)
        return found

    def ended(self) -> int:
        end = time.monotonic() + 60
        while not (done := os.waitpid(self.pid, os.WNOHANG))[0]:
            assert time.monotonic() < end, self.said
            time.sleep(0.01)
        return os.waitstatus_to_exitcode(done[1])

    def worker(self) -> int:
        """The engine's process."""
        with open(f"/proc/{self.pid}/task/{self.pid}/children") as file:
            return int(file.read().split()[0])


class Streaming(Thread):
    """A streamed answer that is read as it comes. lines: its data; began: after the first of them."""

    def __init__(self, url: str, body) -> None:
        super().__init__()
        self.url, self.body, self.lines, self.status = url, body, [], 0
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self.url + COMPLETIONS, json=self.body, timeout=60) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                self.lines.append(line.removeprefix("data: ")) if line else None

    def begun(self):
        while not self.lines:
            time.sleep(0.005)
        return self


def test_sigterm_lets_running_requests_end(folder, tmp_path):
    """And takes no new ones meanwhile."""
    process = Process(folder, tmp_path / "said")
    line = re.search(r"^curl .*", process.said, re.M)[0]
    assert process.url in line and json.loads(line[line.index("{") : -1])["prompt"]
    page = re.search(r"^In a browser: (\S+)$", process.said, re.M)[1]
    assert page == process.url + "/" and "<h1>" in httpx.get(page).text
    running = Streaming(process.url, LONG | {"max_tokens": 150}).begun()
    os.kill(process.pid, signal.SIGTERM)
    process.wait_for("requests may go on")
    with httpx.Client(base_url=process.url) as http:
        assert http.get("/ready").status_code == 503 and http.get("/health").status_code == 200
        late = http.post(COMPLETIONS, json={"prompt": "x"})
        assert late.status_code == 503 and "stops" in late.json()["error"]["message"]
    running.join(60)
    assert running.lines[-1] == "[DONE]" and json.loads(running.lines[-2])["choices"][0]["finish_reason"]
    assert process.ended() == 0 and "Traceback" not in process.said
    assert "def add" not in process.said, "no prompt is logged"


def test_requests_that_outlive_the_grace_get_an_error(folder, tmp_path):
    process = Process(folder, tmp_path / "said", "--grace", 0.1, "--slots", 1)
    running = [
        Streaming(process.url, LONG | {"n": 3}).begun(),
        Streaming(process.url, LONG | {"stream": False}),
    ]
    while httpx.get(process.url + "/metrics").text.count("orthrus_requests_waiting 0.0"):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    for client in running:
        client.join(60)
        assert "server stops" in json.loads(client.lines[-1])["error"]["message"], client.lines[-1]
    assert [client.status for client in running] == [200, 503]
    assert process.ended() == 0 and "Traceback" not in process.said


def test_ctrl_c_twice_ends_at_once(folder, tmp_path):
    process = Process(folder, tmp_path / "said")
    running = Streaming(process.url, LONG | {"n": 8}).begun()
    os.kill(process.pid, signal.SIGINT)
    process.wait_for("requests may go on")
    os.kill(process.pid, signal.SIGINT)
    running.join(60)
    assert process.ended() == 130 and "Traceback" not in process.said


def test_many_sigterms(folder, tmp_path):
    """They change no exit code, whenever they come."""
    process = Process(folder, tmp_path / "said")
    running = Streaming(process.url, LONG | {"n": 8}).begun()
    while not (done := os.waitpid(process.pid, os.WNOHANG))[0]:
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.005)
    running.join(60)
    assert os.waitstatus_to_exitcode(done[1]) == 0 and "Traceback" not in process.said


def test_the_engines_death_ends_the_server(folder, tmp_path):
    process = Process(folder, tmp_path / "said")
    running = Streaming(process.url, LONG | {"n": 8}).begun()
    os.kill(process.worker(), signal.SIGKILL)
    running.join(60)
    assert "has died" in json.loads(running.lines[-1])["error"]["message"]
    assert process.ended() == 1 and "has died (exit code -9)" in process.said


def test_an_engine_that_hangs_has_died(folder, tmp_path):
    process = Process(folder, tmp_path / "said", "--engine-timeout", 1)
    time.sleep(1.5)  # one without texts may be silent
    running = Streaming(process.url, LONG | {"n": 8}).begun()
    os.kill(process.worker(), signal.SIGSTOP)
    running.join(15)
    assert "has died" in json.loads(running.lines[-1])["error"]["message"]
    assert process.ended() == 1 and "nothing for 1 s" in process.said


@pytest.fixture
def refused(folder, monkeypatch, capsys):
    """Runs a command that must be refused in one line before an engine is made: that line."""

    def call(*words):
        monkeypatch.setattr(engine_client, "_spawned", lambda pipe: pytest.fail("an engine was made"))
        monkeypatch.setattr(checkpoint, "EMBEDDED", folder)
        capsys.readouterr()
        assert main(["serve", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1, (out, err)
        return err

    return call


def test_a_port_in_use(refused):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}" in refused("--port", port)
    assert "cannot listen" in refused("--host", "nowhere.invalid", "--insecure")


def test_an_address_that_others_reach_needs_keys(refused, tmp_path):
    for host in ("0.0.0.0", "::", "10.0.0.7", "example.org"):
        assert "--api-key-file, or --insecure" in refused("--host", host)
    (tmp_path / "keys").write_text("")
    assert "0 keys" in refused("--host", "0.0.0.0", "--api-key-file", tmp_path / "keys")


@pytest.mark.parametrize(
    "words",
    [
        ("--port", 70000), ("--slots", 0), ("--slots", 257), ("--cache-tokens", 0), ("--max-waiting", -1),
        ("--max-per-key", 0), ("--grace", -1), ("--grace", "nan"), ("--engine-timeout", 0),
        ("--generation-config", "vllm"), ("--port", "x"), ("--served-model-name", ""), ("--allowed-host", ""),
        ("--allowed-host", "a.org:80"), ("--allowed-host", "http://a.org"),
    ],
)  # fmt: skip
def test_options_that_are_out_of_range(refused, words):
    assert words[0] in refused(*words)


def test_options_that_are_empty(refused):
    for option in ("--host", "--api-key-file"):
        for empty in ("", " "):
            assert f"{option} is empty: " in refused(option, empty, "--insecure")


def test_a_checkpoint_that_is_none(refused, tmp_path):
    assert "safetensors" in refused("--port", 0, "--model", tmp_path)


def test_an_engine_that_cannot_start(folder, monkeypatch, capsys):
    """Its one line is the command's."""
    monkeypatch.setattr(engine_client, "_spawned", ForkedWorker)
    assert main(["serve", "--model", str(folder), "--port", "0", "--dtype", "float13"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("orthrus: error: ") and "float13" in err and err.count("\n") == 1


def test_what_is_not_installed(refused, monkeypatch):
    monkeypatch.setattr(verb, "find_spec", lambda name: None if name == "uvicorn" else name)
    said = refused()
    assert "uvicorn" in said and "pip install 'orthrus-kernels[serve]', or make serve" in said
