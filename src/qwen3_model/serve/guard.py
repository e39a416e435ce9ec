"""What every request must pass before it is looked at.

A web page may send requests to a server on its reader's own machine. It cannot set the content type
application/json without asking first, which is answered with 405, and a name that it has made point to this
machine is no name that the Host header may have. No answer carries a CORS header. The server's own page
(page.py) is of its own origin, and asks as every client does."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import InputError, foreign, quoted
from ..reading import read_text
from . import page
from .errors import Refusal, refusal
from .limits import Limits
from .metrics import Metrics

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN = ("/health", "/ready", *page.FILES)  # paths that need no key: they tell nothing that is secret
HOST_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", re.IGNORECASE | re.ASCII)
GONE = 499  # nobody sees it: the client has closed the connection
REFUSED = set(range(400, 600)) - {GONE}  # statuses that a client is told
LEAST_KEY, MOST_KEYS = 16, 10_000  # characters; keys


@dataclass(frozen=True)
class Access:
    """Who may ask. hosts: names and addresses that a Host header may have. any_address: whether it may be any
    IP address, as the server listens on all of its own. keys: of clients; none: nobody needs one."""

    hosts: frozenset[str] = frozenset(LOOPBACK)
    any_address: bool = False
    keys: tuple[bytes, ...] = ()

    @staticmethod
    def at(host: str, allowed: Collection[str] = (), keys: Sequence[bytes] = ()) -> Access:
        """Of a server that listens on `host`. allowed: more names that clients call it by. Raises InputError
        for what is no name, such as one with a port."""
        for name in allowed:
            if not _address(name) and not HOST_NAME.fullmatch(name):
                raise InputError(
                    f"--allowed-host is {quoted(name)}; a name or an address was expected, without a port"
                )
        address = _address(host)
        names = {_plain(name) for name in (host, *LOOPBACK, *allowed)}
        return Access(frozenset(names), address is not None and address.is_unspecified, tuple(keys))

    def takes_host(self, header: str) -> bool:
        """Whether a Host header is one of this server's names, with any port."""
        name = _plain(_without_port(header))
        return name in self.hosts or (self.any_address and _address(name) is not None)

    def key_of(self, header: str) -> int | None:
        """Which key an Authorization header has, 0 where none is needed; None: none of them. Every key is
        compared, whatever was found, each in constant time."""
        if not self.keys:
            return 0
        kind, _, given = header.partition(" ")
        found = [hmac.compare_digest(key, given.strip().encode("latin-1")) for key in self.keys]
        return found.index(True) if kind.lower() == "bearer" and any(found) else None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def read_keys(path: Path) -> tuple[bytes, ...]:
    """The keys of a file, one a line; lines that are blank or begin with # are none. Raises InputError."""
    with foreign(f"{path} cannot be read"):
        if not path.is_file():
            raise InputError(f"{path} is missing, or no regular file: a file with a key a line was expected")
        lines = [line.strip() for line in read_text(path, 2**22).splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys or len(keys) > MOST_KEYS:
        raise InputError(f"{path} has {len(keys)} keys; 1 to {MOST_KEYS} were expected, one a line")
    for number, key in enumerate(keys, 1):
        if len(key) < LEAST_KEY or not all("!" <= c <= "~" for c in key):
            raise InputError(
                f"key {number} of {path} must have {LEAST_KEY} or more printable ASCII characters, no space"
            )
    return tuple(key.encode() for key in keys)


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, access: Access, limits: Limits, metrics: Metrics) -> None:
        self._app, self._access, self._limits, self._metrics = app, access, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or hand it on with its key's number in the state `key`, and with a body of
        bounded size."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in REFUSED:
                self._metrics.refused.labels(str(message["status"])).inc()
            await send(message)

        try:
            scope.setdefault("state", {})["key"] = self._check(scope)
        except Refusal as error:
            await error.response()(scope, receive, counted)
        else:
            await self._app(scope, self._bounded(receive), counted)

    def _check(self, scope: Scope) -> int:
        """The number of the request's key. Raises a Refusal."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._access.takes_host(host):
            raise refusal(
                403,
                f"this server is not called {quoted(_without_port(host))}: name it with --allowed-host",
                "host_not_allowed",
            )
        key = self._access.key_of(headers.get("authorization", ""))
        if key is None and scope["path"] not in OPEN:
            raise refusal(
                401, "a key of this server is needed: Authorization: Bearer KEY", "invalid_api_key",
                www_authenticate="Bearer",
            )  # fmt: skip
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise refusal(415, f"the content type is {quoted(kind)}; application/json was expected")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._limits.body_bytes:
            raise self._too_large()
        return key or 0

    def _bounded(self, receive: Receive) -> Receive:
        """Count a body that does not say how long it is. Raises a Refusal where it is read too far."""
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limits.body_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> Refusal:
        return refusal(413, f"the body has more than {self._limits.body_bytes} bytes")


def _without_port(header: str) -> str:
    """The name of a Host header; a header that is none comes back whole."""
    found = re.fullmatch(r"\[([^\[\]]*)\](:[0-9]*)?", header) or re.fullmatch(r"([^:]*)(:[0-9]*)?", header)
    return header if found is None else found[1]


def _plain(name: str) -> str:
    """A name or an address as it is compared."""
    return str(_address(name) or name.lower().rstrip("."))


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with suppress(ValueError):
        return ipaddress.ip_address(name)
    return None
