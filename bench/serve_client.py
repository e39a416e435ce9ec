"""Clients of `bench.serve`, in a process of their own: streamed completions over HTTP/1.1.

A line of JSON on stdin says what to ask for and when, a line on stdout what came back, until stdin ends.
While a loop runs, a client looks only at when an answer's bytes come; what is in them is read behind it, so
that it costs no client time that the server waits for."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .serve_jobs import Seen

LAST_CHUNK, EVENT, DONE = b"0\r\n\r\n", b"data: ", b"[DONE]"
HEAD_BYTES = 1 << 16
IDLE_SECONDS = 2.0  # after which a connection is not used again: the server closes it at 5 s, maybe just then


@dataclass
class Answer:
    """An answer as it came. first, ended: when its body began and was whole."""

    job: int
    client: int
    turn: int
    sent: float
    first: float = 0.0
    ended: float = 0.0
    status: int = 0
    body: bytes = b""
    error: str = ""

    def seen(self, began: float) -> Seen:
        """What it says. began: when the loop did."""
        times = [round(at - began, 6) for at in (self.sent, self.first, self.ended)]
        tokens, text = 0, ""
        try:
            if not self.error:
                tokens, text = read_answer(self.status, self.body)
        except (ValueError, LookupError, TypeError) as error:
            self.error = f"{type(error).__name__}: {error}"[:200]
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Seen(self.job, self.client, self.turn, *times, tokens, digest, self.error)


def read_answer(status: int, body: bytes) -> tuple[int, str]:
    """(tokens, text) of an answer's body. Raises ValueError for what is not a whole stream."""
    if status != 200:
        raise ValueError(f"status {status}: {body[:160].decode(errors='replace')}")
    events = [line[len(EVENT) :] for line in unchunked(body).split(b"\n\n") if line]
    if events[-1] != DONE:
        raise ValueError(f"the stream ended with {events[-1][:160].decode(errors='replace')}")
    *chunks, usage = map(json.loads, events[:-1])
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    return usage["usage"]["completion_tokens"], text


def unchunked(body: bytes) -> bytes:
    """What a body in HTTP's chunks says."""
    parts, at = [], 0
    while size := int(body[at : (line := body.index(b"\r\n", at))], 16):
        parts.append(body[line + 2 : line + 2 + size])
        at = line + 2 + size + 2
    return b"".join(parts)


class Connection:
    """To the server, kept for one request after another."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._used = 0.0  # when it was last

    async def open(self) -> None:
        """Connect, unless that was done a moment ago."""
        if time.monotonic() - self._used > IDLE_SECONDS:
            self.close()
        self._used = time.monotonic()
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=HEAD_BYTES)

    async def ask(self, answer: Answer, payload: bytes, patience: float) -> Answer:
        """Send a request and take its answer. patience: seconds that it may take."""
        try:
            await asyncio.wait_for(self._ask(answer, payload), patience)
        except (OSError, EOFError, ValueError, asyncio.TimeoutError, asyncio.LimitOverrunError) as error:
            answer.error = f"{type(error).__name__}: {error}"[:200]
            answer.ended = time.monotonic()
            self.close()
        return answer

    def close(self) -> None:
        """Leave the server."""
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None

    async def _ask(self, answer: Answer, payload: bytes) -> None:
        await self.open()
        assert self._streams is not None
        reader, writer = self._streams
        writer.write(payload)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        answer.status = int(head.split(b" ", 2)[1])
        if b"transfer-encoding: chunked" in head:
            pieces = bytearray()
            while not pieces.endswith(LAST_CHUNK):  # JSON's events end with two line ends: none looks like it
                piece = await reader.read(HEAD_BYTES)
                if not piece:
                    raise EOFError("the server has closed the connection in an answer")
                answer.first = answer.first or time.monotonic()
                pieces += piece
            answer.body = bytes(pieces)
        else:
            length = head.partition(b"content-length:")[2].split(b"\r", 1)[0]
            answer.body = await reader.readexactly(int(length))
        answer.ended = self._used = time.monotonic()


def payload(port: int, body: dict[str, Any]) -> bytes:
    """The bytes of a request."""
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def closed(plan: dict[str, Any]) -> list[Answer]:
    """Clients that send their next request when the last has ended."""
    port, begin, found = plan["port"], plan["begin"], list[Answer]()

    async def client(number: int, asked: Sequence[tuple[int, dict[str, Any]]]) -> None:
        ready = [(job, payload(port, body)) for job, body in asked]
        connection = Connection(port)
        await connection.open()
        await asyncio.sleep(begin - time.monotonic())
        for turn, (job, data) in enumerate(ready):
            answer = Answer(job, number, turn, time.monotonic())
            found.append(await connection.ask(answer, data, plan["patience"]))
        connection.close()

    await asyncio.gather(*(client(number, asked) for number, asked in plan["clients"]))
    return found


async def open_loop(plan: dict[str, Any]) -> list[Answer]:
    """Requests that come when they come, however many are there. A connection is used again when it is
    free. `sent` is when a request was due: a client that is late makes it wait."""
    port, begin, free = plan["port"], plan["begin"], list[Connection]()
    ready = [(begin + at, job, payload(port, body)) for at, job, body in plan["arrivals"]]
    tasks = list[asyncio.Task[Answer]]()

    async def one(answer: Answer, data: bytes) -> Answer:
        connection = free.pop() if free else Connection(port)
        await connection.ask(answer, data, plan["patience"])
        free.append(connection)
        return answer

    for due, job, data in ready:
        if (wait := due - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(Answer(job, 0, 0, due), data)))
    found = await asyncio.gather(*tasks)
    for connection in free:
        connection.close()
    return found


def main() -> int:
    """Do what stdin says."""
    for line in sys.stdin:
        plan = json.loads(line)
        loop = closed if "clients" in plan else open_loop
        cpu, began = time.process_time(), time.monotonic()
        try:
            answers = asyncio.run(loop(plan))
        except OSError as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
            continue
        core = (time.process_time() - cpu) / max(time.monotonic() - began, 1e-9)
        seen = [asdict(answer.seen(plan["begin"])) for answer in answers]
        print(json.dumps({"core": core, "seen": seen}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
