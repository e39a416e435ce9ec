"""The page at `/`: a chat that shows accepted runs, and compares a text with plain decoding.

Its files are constants, the same for everybody, and hold nothing of the server; so they need no key. What the
page asks for goes through the API as every client's requests do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "web"
INDEX = "index.html"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = {
    "/" if file.name == INDEX else f"/page/{file.name}": file
    for file in sorted(FOLDER.iterdir())
    if file.suffix in KINDS
}  # by path
# Scripts and styles are files of this server alone, and no text can become either: a browser refuses every
# assignment that would parse text as HTML, because of `require-trusted-types-for`.
POLICY = "; ".join([
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
    "trusted-types 'none'",
])  # fmt: skip
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
router = APIRouter(include_in_schema=False)


def _endpoint(file: Path) -> Callable[[Request], Awaitable[Response]]:
    content, kind = file.read_bytes(), KINDS[file.suffix]

    async def sent(request: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=kind)

    return sent


for path, file in FILES.items():
    router.add_api_route(path, _endpoint(file), methods=["GET", "HEAD"])
