"""HTTP by hand, as no client library sends it."""

from __future__ import annotations

import io
import json
import socket
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any

HEAD = "host: localhost\r\ncontent-type: application/json\r\n"


@dataclass(frozen=True)
class Told:
    """An answer. version: 10 or 11."""

    status: int
    headers: dict[str, str]
    body: bytes
    version: int = 11

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object, checked for its form."""
        assert self.headers["content-type"] == "application/json", self
        told = json.loads(self.body)
        assert set(told) == {"error"}
        error = told["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"], error
        assert error["type"] == ("server_error" if self.status >= 500 else "invalid_request_error"), error
        assert "\n" not in error["message"] and len(error["message"]) < 2000, error
        return error


def post(path: str, body: bytes, more: str = "", version: str = "1.1") -> bytes:
    """A request as bytes. more: header lines, each with its end."""
    return f"POST {path} HTTP/{version}\r\n{HEAD}{more}content-length: {len(body)}\r\n\r\n".encode() + body


def chunked(path: str, *chunks: bytes, more: str = "") -> bytes:
    """A request whose body comes in chunks and says no length."""
    parts = [f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n" for chunk in (*filter(None, chunks), b"")]
    return f"POST {path} HTTP/1.1\r\n{HEAD}{more}transfer-encoding: chunked\r\n\r\n".encode() + b"".join(
        parts
    )


class Client(socket.socket):
    """A connection whose answers are read one behind the other: what has come of the next one is kept."""

    def __init__(self, port: int, seconds: float = 20.0) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM)
        self.settimeout(seconds)
        self.connect(("127.0.0.1", port))
        self._reader = _Kept(socket.SocketIO(self, "rb"))

    def makefile(self, *args: Any, **more: Any) -> Any:
        """The one reader."""
        return self._reader


class _Kept(io.BufferedReader):
    def close(self) -> None:
        """An answer's end is not the connection's."""


def connected(port: int, data: bytes = b"") -> Client:
    """A connection that has sent some bytes, as many as the server takes."""
    client = Client(port)
    with suppress(BrokenPipeError, ConnectionResetError):  # refused before the end
        client.sendall(data)
    return client


def told(client: socket.socket, method: str = "POST") -> Told:
    """The next answer of a connection."""
    response = HTTPResponse(client, method=method)
    response.begin()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Told(response.status, headers, response.read(), response.version)


def ask(port: int, data: bytes, method: str = "POST") -> Told:
    """The answer to these bytes."""
    with connected(port, data) as client:
        return told(client, method)
