"""A streamed answer: server-sent events whose data are OpenAI's chunks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..errors import InputError
from ..openai import answer
from ..openai.answer import CompletionLogprobs
from ..openai.body import Asked
from ..openai.qwen3_text import Reader
from ..openai.served import Served
from .choices import Job, Piece
from .engine_client import EngineDied
from .errors import Refusal, refusal_of
from .site import Site

# A proxy must hand on what comes, not collect it.
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"
_json = json.JSONEncoder(allow_nan=False).encode
_TOLD = Refusal, InputError, EngineDied  # errors that are no fault of this program


class EventStream(StreamingResponse):
    """The answer to a request with stream true. Its texts end with it, whoever ends it."""

    def __init__(self, site: Site, job: Job) -> None:
        super().__init__(_events(job), media_type="text/event-stream", headers=HEADERS)
        self._site, self._job = site, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._site.end(self._job)


async def _events(job: Job) -> AsyncIterator[bytes]:
    """The events of an answer; an error in the middle is the last one."""
    asked = job.asked
    chunks = Chunks(job.served, asked)
    try:
        for chunk in chunks.first():
            yield chunk
        async for pieces in job.pieces():
            if found := [chunk for piece in pieces for chunk in chunks.of(piece)]:
                yield b"".join(found)  # where this process is behind the engine, several at a time
        if asked.include_usage:
            yield event(chunks.head | {"choices": [], "usage": answer.usage(asked, job.results())})
        yield DONE
    except Exception as error:
        yield event(refusal_of(error).body)
        if not isinstance(error, _TOLD):
            raise


def event(value: dict[str, Any]) -> bytes:
    """An event. JSON has no line end in it."""
    return f"data: {_json(value)}\n\n".encode()


class Chunks:
    """The events of an answer's chunks, all choices in one stream. Their constant head is encoded once."""

    def __init__(self, served: Served, asked: Asked) -> None:
        self.head = answer.head(served, asked, chunk=True)
        if asked.include_usage:
            self.head["usage"] = None
        self._begun = f'data: {_json(self.head)[:-1]}, "choices": ['
        self._runs = asked.include_runs
        kind = _Chat if asked.chat else _Completion
        self._voices = [kind(served, asked) for _ in asked.jobs()]

    def first(self) -> list[bytes]:
        """What comes before any token: in a chat, who speaks."""
        firsts = [(i, voice.first()) for i, voice in enumerate(self._voices)]
        return [self._chunk(i, said, None) for i, said in firsts if said is not None]

    def of(self, piece: Piece) -> list[bytes]:
        """A chunk of a piece that says something or has a run to tell, and the last one of a choice that has
        ended."""
        voice = self._voices[piece.index]
        said = voice.of(piece)
        if self._runs:
            said = (said or voice.nothing()) | {"run": _run(piece)}
        found = [] if said is None else [self._chunk(piece.index, said, None)]
        if piece.reason:
            found.append(self._chunk(piece.index, voice.nothing(), voice.finish_reason(piece.reason)))
        return found

    def _chunk(self, index: int, said: dict[str, Any], reason: str | None) -> bytes:
        choice = {"index": index} | said | {"finish_reason": reason}
        return f"{self._begun}{_json(choice)}]}}\n\n".encode()


def _run(piece: Piece) -> dict[str, Any]:
    return {"token_ids": piece.tokens, "kind": piece.kind, "nodes": piece.nodes, "forwards": piece.forwards}


class _Completion:
    """A choice of a completion, as it comes."""

    def __init__(self, served: Served, asked: Asked) -> None:
        self._logprobs = CompletionLogprobs(served.text) if asked.logprobs else None

    def first(self) -> dict[str, Any] | None:
        """Nothing."""
        return None

    def of(self, piece: Piece) -> dict[str, Any] | None:
        """The piece's text, with its tokens where they are asked for; None for neither."""
        told = piece.tokens, piece.logprobs, piece.top_logprobs
        logprobs = self._logprobs.push(*told) if self._logprobs else None
        return {"text": piece.text, "logprobs": logprobs} if piece.text or logprobs else None

    def nothing(self) -> dict[str, Any]:
        """No text."""
        return {"text": "", "logprobs": None}

    def finish_reason(self, reason: str) -> str:
        """OpenAI's word."""
        return answer.finish_reason(reason, calls=False)


class _Chat:
    """A choice of a chat, as it comes."""

    def __init__(self, served: Served, asked: Asked) -> None:
        self._text, self._wants = served.text, asked.logprobs
        self._reader = Reader(asked.tools, asked.reasons)
        self._calls = 0

    def first(self) -> dict[str, Any] | None:
        """The role."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def of(self, piece: Piece) -> dict[str, Any] | None:
        """What the piece says that is certain now, with its tokens where they are asked for; None for
        neither."""
        said = self._reader.push(piece.text)
        if piece.reason:
            said.add(self._reader.flush())
        delta: dict[str, Any] = {}
        if said.reasoning:
            delta["reasoning_content"] = said.reasoning
        if said.content:
            delta["content"] = said.content
        if said.calls:
            calls = enumerate(said.calls, self._calls)
            delta["tool_calls"] = [{"index": i} | answer.called(call) for i, call in calls]
            self._calls += len(said.calls)
        told = piece.tokens, piece.logprobs, piece.top_logprobs
        logprobs = answer.chat_logprobs(self._text, *told) if self._wants else None
        return {"delta": delta, "logprobs": logprobs} if delta or logprobs else None

    def nothing(self) -> dict[str, Any]:
        """No text."""
        return {"delta": {}, "logprobs": None}

    def finish_reason(self, reason: str) -> str:
        """OpenAI's word."""
        return answer.finish_reason(reason, calls=self._calls > 0)
