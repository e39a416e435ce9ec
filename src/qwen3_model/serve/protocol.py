"""HTTP/1.1 as uvicorn speaks it, but that what is no HTTP is answered as OpenAI answers, and that nobody is
waited for who begins a request, or begins to read its answer, and does not go on."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import sys
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from ..errors import one_line
from .errors import refusal

HEAD_SECONDS = 20.0  # from a connection's beginning, or the last answer, to the next request's headers
MOST_CONNECTIONS = 8192  # open at a time
SPARE_FILES = 128  # open files that are no client's connection
UNREAD_SECONDS = 60.0  # in which a client reads nothing of what waits for it
LINGER_SECONDS = 2.0  # that a client has to read why it is refused: a close drops what is on its way


def raise_file_limit() -> None:
    """Let this process have as many open files, and so connections, as it may have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):  # then fewer connections are taken
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def most_connections() -> int:
    """That may be open at a time: as many as there may be files, without the spare ones."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    files = MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else soft - SPARE_FILES
    return max(min(files, MOST_CONNECTIONS), 1)


class Protocol(H11Protocol):
    """A connection."""

    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: Any) -> None:
        """Wait for a request; where too many connections are open, close this one at once."""
        super().connection_made(transport)
        # No token waits for the receipt of what was sent before, up to 40 ms. asyncio sees to that where a
        # socket names its protocol.
        with suppress(OSError):  # the client has gone
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > most_connections():
            self._refused = True
            transport.abort()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        for timer in (self._timer, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Have the time run while much waits for the client."""
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        """The client has read."""
        if self._unread is not None:
            self._unread.cancel()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Take what comes, unless it was refused."""
        if not self._refused:
            super().data_received(data)

    def handle_events(self) -> None:
        """Look at what has come."""
        super().handle_events()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP: the error that is being handled says what is wrong."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._refuse(status, f"this is no HTTP request ({one_line(error or msg, 200)})")

    def _watch(self) -> None:
        """Have the time run while a request's headers are waited for."""
        waits = self.conn.their_state is h11.IDLE
        if self._refused:
            return
        if waits and self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._late)
        elif not waits and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        if self.conn.trailing_data[0]:
            self._refuse(408, "the request's headers did not come in time")
        else:
            self.transport.close()

    def _wait_for_reader(self) -> None:
        before = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(UNREAD_SECONDS, self._look_at_reader, before)

    def _look_at_reader(self, before: int) -> None:
        """Close the connection of a client that has read nothing since `before` bytes waited. A close that
        waits until all is sent would not end."""
        if self.transport.get_write_buffer_size() < before:
            self._wait_for_reader()
        else:
            self.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        """Answer, if nothing was answered yet, and close."""
        self._refused = True
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = json.dumps(refusal(status, message).body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
        response = h11.Response(
            status_code=status, headers=[*headers, ("connection", "close")],
            reason=STATUS_PHRASES.get(status, b""),
        )  # fmt: skip
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()
        self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)
