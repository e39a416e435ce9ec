"""Replicas without a cluster: routing, texts whose replicas die, options. With Ray: test_cluster.py."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import suppress

import pytest
from serving import ScriptedEngine, Serving
from tiny_folder import write_tiny

from bench import two_servers
from orthrus_kernels import PAGE
from qwen3_model import InputError, Qwen3
from qwen3_model.cli import main, ray_options
from qwen3_model.decode.sequence import GenerationStats
from qwen3_model.openai.batch_file import batch_file
from qwen3_model.openai.body import COMPLETIONS
from qwen3_model.openai.served import Served
from qwen3_model.serve import cluster_batch
from qwen3_model.serve.engine_client import EngineDied, Refused
from qwen3_model.serve.limits import Limits
from qwen3_model.serve.messages import Ended, EngineOptions, Ran
from qwen3_model.serve.replicas import (
    ATTEMPTS,
    NoReplica,
    RemoteText,
    Replicas,
    page_key,
    picked,
    preferred,
)

NAMES = [f"replica-{i}" for i in range(5)]
RAN, END = (
    Ran([5, 6], [-1.0, -2.0], 1, "plain", 0, cached=64),
    Ended("length", GenerationStats("auto", 0), ""),
)


# Which replica


def test_prompts_have_a_key_where_they_can_share_a_page():
    prompt = list(range(PAGE))
    assert page_key(prompt, "") is None, "the last token of a prompt is read anew"
    key = page_key([*prompt, 7], "")
    assert key == page_key([*prompt, 8, 9], "") != page_key([*prompt, 7], "salt")
    assert key != page_key([*prompt[:-1], 999, 7], "")


def test_a_replica_that_goes_moves_its_own_keys_alone():
    keys = [page_key([i] * (PAGE + 1), "") for i in range(400)]
    before = {key: preferred(key, NAMES) for key in keys}
    shares = Counter(before.values())
    assert set(shares) == set(NAMES) and min(shares.values()) > 400 / 5 / 2
    after = {key: preferred(key, NAMES[1:]) for key in keys}
    assert {key for key in keys if before[key] != after[key]} == {
        key for key in keys if before[key] == NAMES[0]
    }


def test_a_busy_replica_is_passed_over():
    key = page_key([3] * (PAGE + 1), "")
    first = preferred(key, NAMES)
    loads = dict.fromkeys(NAMES, 10)
    assert picked(key, loads, 4) == first and picked(None, loads, 4) is None
    assert picked(key, loads | {first: 14}, 4) == first
    assert picked(key, loads | {first: 15}, 4) is None
    assert Replicas("x", EngineOptions(slots=2)).slack == 1


# A text there


class Said:
    """What a replica says. An exception among it is raised; None: nothing more comes."""

    def __init__(self, *items: object) -> None:
        self.items, self.cancelled = list(items), False

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.items:
            raise StopAsyncIteration
        item = self.items.pop(0)
        if item is None:
            await asyncio.Event().wait()
        if isinstance(item, ZeroDivisionError):
            raise item
        return item

    def cancel(self):
        self.cancelled = True


DEATH = ZeroDivisionError("the actor died")


def heard(*replicas: Said) -> tuple[str | None, list[object], int]:
    """Of a text: its fingerprint, its items, and how many replicas were asked."""

    async def listen():
        asked = iter(replicas)
        text = RemoteText(lambda: next(asked))
        found, items = None, list[object]()
        with suppress(EngineDied):
            found = await text.placed()
        try:
            async for item in text:
                items.append(item)
        except Exception as error:
            items.append(error)
        return found, items, len(replicas) - len(list(asked))

    return asyncio.run(listen())


def test_a_text_goes_elsewhere_before_its_first_token_alone():
    assert heard(Said("f", RAN, RAN, END)) == ("f", [RAN, RAN, END], 1)
    assert heard(Said(DEATH), Said("f", DEATH), Said("f", RAN, END)) == ("f", [RAN, END], 3)
    fingerprint, (run, *ends), asked = heard(Said("f", RAN, DEATH), Said("f", RAN, END))
    assert (fingerprint, run, asked, len(ends)) == ("f", RAN, 1, 1)
    (error,) = ends
    assert isinstance(error, EngineDied) and "has died: send it again" in str(error)


def test_a_text_is_given_up():
    fingerprint, (error,), asked = heard(*[Said(DEATH) for _ in range(ATTEMPTS + 1)])
    assert fingerprint is None and asked == ATTEMPTS and isinstance(error, NoReplica)
    assert isinstance(heard()[1][0], NoReplica)  # nobody can be asked
    refused = Refused("too long")
    assert heard(Said("f", refused)) == ("f", [refused], 1)
    silent = Said("f")  # a stream that ends without an end is no end
    assert isinstance(heard(silent, Said(DEATH), Said(DEATH))[1][0], EngineDied)


def test_a_text_does_not_change_its_fingerprint():
    """Its client may have been told."""
    other = Said("g", RAN, END)
    assert heard(Said("f", DEATH), other, Said("f", END)) == ("f", [END], 3)
    assert other.cancelled


@pytest.mark.parametrize("begun", [False, True])
def test_a_cancelled_text_ends_with_what_the_cache_had(begun):
    said = Said("f", RAN, None)

    async def listen():
        text = RemoteText(lambda: said)
        if begun:
            await text.placed()
            await anext(text)
        text.cancel()
        (end,) = [item async for item in text]
        return end, await text.placed()

    end, fingerprint = asyncio.run(listen())
    assert (end.reason, end.stats.cached_tokens) == ("cancelled", 64 if begun else 0)
    assert (said.cancelled, fingerprint) == (begun, "f" if begun else None)


# The server and the batch over such texts


class Scripted(ScriptedEngine):
    """Whose texts are replicas' texts. scripts: what the replicas say, one a text."""

    def __init__(self, *scripts: Said) -> None:
        super().__init__()
        self.scripts = list(scripts)

    def submit(self, prompt_ids, request):
        return RemoteText(lambda: self.scripts.pop(0))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model = Qwen3.from_pretrained(write_tiny(tmp_path_factory.mktemp("replicas") / "tiny"), progress=False)
    return Served("tiny", model.config, model.text)


def posted(served, engine, **body):
    import httpx

    async def start():
        return engine

    with Serving(served, start, Limits(), None) as serving:
        return httpx.post(serving.url + COMPLETIONS, json={"prompt": "def add", "max_tokens": 4} | body)


def test_an_answer_tells_its_replicas_fingerprint(served):
    answer = posted(served, Scripted(Said("f2", RAN, RAN, END)))
    assert answer.status_code == 200 and answer.json()["system_fingerprint"] == "f2"
    said = posted(served, Scripted(Said("f2", RAN, DEATH)), stream=True).text
    *chunks, error = [json.loads(line[6:]) for line in said.split("\n") if line.startswith("data: {")]
    assert {chunk["system_fingerprint"] for chunk in chunks} == {"f2"} and "[DONE]" not in said
    assert "has died" in error["error"]["message"]
    assert posted(served, Scripted(*[Said(DEATH) for _ in range(ATTEMPTS)]), stream=True).status_code == 503
    both = posted(served, Scripted(Said("f", RAN, RAN, END), Said("g", RAN, RAN, END)), n=2)
    assert both.status_code == 503 and "different fingerprints" in both.json()["error"]["message"]


def test_a_line_whose_replica_dies_is_done_again(served, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"prompt": "def add", "max_tokens": 4, "seed": 3}
    rows = [{"custom_id": c, "method": "POST", "url": COMPLETIONS, "body": body} for c in "abc"]
    rows[1]["body"] = body | {"top_p": 7}
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lasting = [Said("f", RAN, DEATH) for _ in range(cluster_batch.ATTEMPTS)]
    engine = Scripted(Said("f", RAN, DEATH), lasting[0], Said("f", RAN, RAN, END), *lasting[1:])
    with batch_file(source, out, "s") as batch, batch.open():
        counts = asyncio.run(cluster_batch.run(engine, served, batch, lambda counts: None, None))
    answers = {line["custom_id"]: line["response"] for line in map(json.loads, out.read_text().splitlines())}
    assert {c: answers[c]["status_code"] for c in "abc"} == {"a": 200, "b": 400, "c": 500}
    assert answers["a"]["body"]["seed"] == 3 and "has died" in answers["c"]["body"]["error"]["message"]
    assert (counts.requests, counts.tokens, batch.failed) == (3, 4, 2) and not engine.scripts
    with batch_file(source, out, "s") as batch, batch.open():  # the same command again has nothing to do
        counts = asyncio.run(cluster_batch.run(engine, served, batch, lambda counts: None, None))
    assert counts.requests == 0 and len(batch.known) == 3


def test_a_batch_ends_where_no_replica_takes_texts(served, tmp_path):
    """Its line has no answer, and is asked again by the next run."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    row = {"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": {"prompt": "x"}}
    source.write_text(json.dumps(row))
    engine = Scripted(*[Said(DEATH) for _ in range(ATTEMPTS)])
    with batch_file(source, out, "s") as batch, batch.open(), pytest.raises(InputError, match="goes on"):
        asyncio.run(cluster_batch.run(engine, served, batch, lambda counts: None, None))
    assert out.read_text() == ""


# Options


@pytest.fixture
def refused(capsys, monkeypatch):
    monkeypatch.setattr(ray_options, "find_spec", lambda name: object())

    def call(*words):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1, (out, err)
        return err

    return call


@pytest.mark.parametrize("verb", [("serve",), ("batch", "in", "out")], ids=["serve", "batch"])
def test_what_ray_cannot_do_is_refused(refused, verb, monkeypatch):
    assert "--replicas belongs to --ray" in refused(*verb, "--replicas", 2)
    assert "Ray chooses" in refused(*verb, "--ray", "--device", "cuda:1")
    for wrong in ("0", "x", "-1", "2:1", "1:", "1025", "1:2:3", "٣"):
        assert "--replicas is " in refused(*verb, "--ray", f"--replicas={wrong}")
    monkeypatch.setattr(ray_options, "find_spec", lambda name: None)
    assert "pip install 'orthrus-kernels[cluster]', or make cluster" in refused(*verb, "--ray")


def test_a_batch_has_a_number_of_replicas(refused):
    assert "--replicas is '1:2'; 1 to 1024 was expected" in refused(
        "batch", "in", "out", "--ray", "--replicas", "1:2"
    )


def test_what_the_options_ask_for(tmp_path, monkeypatch):
    """On any machine: a folder by its whole path, a hub id as it is."""
    from qwen3_model.cli import _parser

    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["--ray", "--replicas", "2:5", "--device", "cuda", "--model", "model", "--diffusion", "a/b"]
    args = _parser().parse_args(["serve", *words, "--dtype", "bfloat16", "--cache-tokens", "640"])
    found = ray_options.replicas(args, "my model", (32, 4), grace=5.0, engine_seconds=7.0)
    engine = EngineOptions(
        str(tmp_path / "model"), "cuda", "bfloat16", slots=32, cache_tokens=640, diffusion="a/b"
    )
    assert found == Replicas("my-model", engine, 2, 5, 5.0, 7.0)
    args = _parser().parse_args(["batch", "in", "out", "--ray", "--device", "cpu"])
    assert ray_options.replicas(args, "m", (32, 4)) == Replicas("m", EngineOptions(device="cpu", slots=4))


# What a cluster costs


def test_two_servers_are_compared(served, capsys):
    scripts = [[Said("f", RAN, RAN, RAN, END) for _ in range(3)] for _ in "ab"]

    async def start():
        return Scripted(*scripts.pop())

    with Serving(served, start, Limits(), None) as first, Serving(served, start, Limits(), None) as second:
        words = ["--requests", "2", "--tokens", "6", "--processes", "pytest", "nobody's"]
        assert two_servers.main([first.url, second.url, *words]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith("http")]
    assert [row[0] for row in rows] == [first.url, second.url] and float(rows[1][3]) == 0.0
    assert all(float(figure) >= 0 for row in rows for figure in row[1:]) and "medians of 2 streams" in out
    with pytest.raises(SystemExit):
        two_servers.main([first.url, second.url])
    assert "does not answer" in capsys.readouterr().err
