"""Requests of mixed settings, many at a time through a server, each compared with its texts decoded alone.

The client speaks HTTP/1.1 over asyncio's streams, a connection a request, so that it can go at any byte."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen3_model import Qwen3, Request
from qwen3_model.decode.sequence import Result
from qwen3_model.openai.body import CHAT, COMPLETIONS

CHOICES = (  # of a token
    {"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.9, "top_k": 20}, {"temperature": 0.7, "top_k": 50, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.05}, {"temperature": 0.8, "repetition_penalty": 1.15},
    {"temperature": 1.0, "top_p": 0.8, "logit_bias": {"11": 3.0, "17": -100.0}},
)  # fmt: skip
ENDS = ({}, {}, {"min_tokens": 5}, {"stop": ["\n\n"]}, {"stop": ["e", "return"], "min_tokens": 3})
STRATEGIES = "auto", "auto", "auto", "autoregressive", "two-pass", "one-pass"
REASONS = {"end_token": "stop", "stop_string": "stop", "length": "length"}


@dataclass(frozen=True)
class Mixed:
    """A request. settings: in the words of `Request`, which are those of a body too."""

    chat: bool
    stream: bool
    logprobs: bool
    n: int
    most: int
    prompt: str
    settings: dict[str, Any]

    def sent(self) -> bytes:
        """Its bytes."""
        body = {"n": self.n, "max_tokens": self.most, "stream": self.stream} | self.settings
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        if self.logprobs:
            body["logprobs"] = True if self.chat else 0
        body |= {"messages": _messages(self.prompt)} if self.chat else {"prompt": self.prompt}
        data = json.dumps(body).encode()
        head = (
            f"POST {CHAT if self.chat else COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data

    def alone(self, model: Qwen3) -> Heard:
        """What a client must hear: its texts, each decoded alone and without what others left in the
        cache."""
        assert model.text is not None
        chat = model.text.chat(_messages(self.prompt)) if self.chat else ""
        ids = model.text.encode(chat or self.prompt, added_specials=not self.chat)
        seed = self.settings["seed"]
        settings = {"max_new_tokens": self.most} | self.settings
        results = [
            model.engine.generate(ids, Request(**settings | {"seed": seed + i, "cache_salt": f"{seed}.{i}"}))
            for i in range(self.n)
        ]
        new = sum(len(result.token_ids) for result in results)
        return Heard([_voice(result, self.logprobs) for result in results], (len(ids), new, len(ids) + new))


@dataclass
class Voice:
    """A choice as it is heard."""

    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    reason: str | None = None


@dataclass
class Heard:
    """An answer. usage: tokens of the prompt, of the choices, of both."""

    voices: list[Voice]
    usage: tuple[int, int, int] | None = None


SMALL = {"tree_nodes": 3, "block_size": 4}  # rows of a draft, which take a CPU long


def mixed(
    prompts: Sequence[str], count: int, most: int, seed: int = 0, draft: dict[str, int] | None = None
) -> list[Mixed]:
    """Requests of up to `most` tokens a choice. draft: settings of those that draft."""
    rng = random.Random(seed)
    return [
        Mixed(
            rng.random() < 0.4, rng.random() < 0.7, rng.random() < 0.4, rng.choice([1, 1, 1, 2, 3]),
            rng.randrange(6, most + 1), rng.choice(prompts),
            _settings(rng, draft or {}) | {"seed": 10 * i},
        )
        for i in range(count)
    ]  # fmt: skip


def _settings(rng: random.Random, draft: dict[str, int]) -> dict[str, Any]:
    strategy = rng.choice(STRATEGIES)
    how = {"strategy": strategy} | rng.choice(CHOICES) | rng.choice(ENDS)
    return how if strategy == "autoregressive" else how | draft


@dataclass
class Tally:
    """What became of requests. lost: no whole answer came; hung: none in time; wrong: which ones differ."""

    equal: int = 0
    gone: int = 0  # their clients went
    lost: int = 0
    hung: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.equal} equal, {len(self.wrong)} different, {self.lost} lost, {self.hung} hung, "
            f"{self.gone} whose clients went, {self.seconds:.1f} s"
        )


async def run(
    port: int, jobs: Sequence[tuple[Mixed, Heard]], at_once: int, leave: float = 0.0, seconds: float = 60.0
) -> Tally:
    """Send requests, so many at a time. leave: the share of clients that go, each at a random byte.
    seconds: that an answer may take."""
    tally, rng, room = Tally(), random.Random(5), asyncio.Semaphore(at_once)
    cuts = [rng.randrange(4000) if rng.random() < leave else None for _ in jobs]
    began = time.perf_counter()

    async def one(asked: Mixed, want: Heard, cut: int | None) -> None:
        async with room:
            try:
                said = await asyncio.wait_for(exchange(port, asked.sent(), cut), seconds)
            except asyncio.TimeoutError:
                tally.hung += 1
                return
            except OSError:
                tally.lost += 1
                return
        if said is None:
            tally.gone += 1
        elif (got := heard(said, asked)) is None:
            tally.lost += 1
        elif got == want:
            tally.equal += 1
        else:
            tally.wrong.append(f"{asked}: {got} instead of {want}")

    await asyncio.gather(*(one(asked, want, cut) for (asked, want), cut in zip(jobs, cuts, strict=True)))
    tally.seconds = time.perf_counter() - began
    return tally


async def exchange(port: int, data: bytes, cut: int | None = None) -> bytes | None:
    """The whole answer. cut: the client goes after so many of its bytes, the first 300 of which it does not
    wait for; then None, unless the answer was shorter."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        if cut is None:
            return await reader.read()
        if cut < 300:
            await asyncio.sleep(cut / 3000)
            return None
        try:
            await reader.readexactly(cut)
        except asyncio.IncompleteReadError as error:
            return error.partial
        return None
    finally:
        writer.transport.abort() if cut and cut % 2 else writer.close()


def heard(said: bytes, asked: Mixed) -> Heard | None:
    """What an answer says; None for one that is torn or an error."""
    head, _, body = said.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        return None
    if not asked.stream:
        return _of_whole(body, asked)
    events = _unchunked(body).split(b"\n\n")
    if events[-2:] != [b"data: [DONE]", b""]:
        return None
    found = Heard([Voice() for _ in range(asked.n)])
    for event in events[:-2]:
        chunk = json.loads(event.removeprefix(b"data: "))
        if chunk["usage"] is not None:
            found.usage = _usage(chunk["usage"])
        for choice in chunk["choices"]:
            voice = found.voices[choice["index"]]
            voice.text += choice["delta"].get("content", "") if asked.chat else choice["text"]
            voice.logprobs += _logprobs(choice["logprobs"], asked.chat)
            voice.reason = voice.reason or choice["finish_reason"]
    return found


def _of_whole(body: bytes, asked: Mixed) -> Heard | None:
    try:
        answer = json.loads(body)
    except ValueError:
        return None
    voices = [
        Voice(
            choice["message"]["content"] if asked.chat else choice["text"],
            _logprobs(choice["logprobs"], asked.chat), choice["finish_reason"],
        )
        for choice in answer["choices"]
    ]  # fmt: skip
    return Heard(voices, _usage(answer["usage"]))


def _unchunked(body: bytes) -> bytes:
    """As much as there is."""
    found, at = b"", 0
    while (end := body.find(b"\r\n", at)) > at and (size := int(body[at:end], 16)):
        found += body[end + 2 : end + 2 + size]
        at = end + size + 4
    return found


def _logprobs(found: dict[str, Any] | None, chat: bool) -> list[float]:
    if found is None:
        return []
    return [token["logprob"] for token in found["content"]] if chat else found["token_logprobs"]


def _usage(found: dict[str, Any]) -> tuple[int, int, int]:
    return found["prompt_tokens"], found["completion_tokens"], found["total_tokens"]


def _voice(result: Result, logprobs: bool) -> Voice:
    told = [max(logprob, -9999.0) for logprob in result.logprobs] if logprobs else []
    return Voice(result.text, told, REASONS[result.stats.finish_reason])


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]
