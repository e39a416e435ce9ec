"""The endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from ..errors import InputError, quoted
from ..openai import answer
from ..openai.body import CHAT, COMPLETIONS, read
from ..openai.formats import may_compile
from ..openai.strict_json import parse
from ..openai.tokenize import tokenized
from .beside import Beside
from .choices import Job
from .errors import json_response, refusal
from .guard import GONE
from .limits import check_told
from .site import Site
from .streams import EventStream

LARGE = 2**16  # bytes of a body that takes so long that small ones must not wait for it
T = TypeVar("T")
router = APIRouter()
_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
}


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> Response:
    """Whether the server lives: 503 once the engine's process has died."""
    alive = _site(request).alive
    return json_response({"status": "ok" if alive else "the engine has died"}, 200 if alive else 503)


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether a request would be answered: 503 while the engine is made, and while the server ends."""
    is_ready = _site(request).ready
    return json_response({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counts for Prometheus."""
    return Response(_site(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The one model, with the length of its context, and whether it answers conversations."""
    site = _site(request)
    return json_response({"object": "list", "data": [await site.beside.run(lambda: _card(site))]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """It, by its name."""
    site = _site(request)
    if name != site.served.name:
        said = f"there is no model {quoted(name)}; {quoted(site.served.name)} is here"
        raise refusal(404, said, "model_not_found")
    return json_response(await site.beside.run(lambda: _card(site)))


@router.post("/tokenize", openapi_extra=_BODY)
async def tokenize(request: Request) -> Response:
    """The token ids of a prompt or of a conversation, as vLLM has it."""
    served = _site(request).served
    return await _read(request, lambda body: json_response(tokenized(served, body)))


@router.post(COMPLETIONS, openapi_extra=_BODY)
async def completions(request: Request) -> Response:
    """Go on with texts."""
    return await _answered(request, COMPLETIONS)


@router.post(CHAT, openapi_extra=_BODY)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    return await _answered(request, CHAT)


def _card(site: Site) -> dict[str, Any]:
    card = {"id": site.served.name, "object": "model", "created": 0, "owned_by": "orthrus"}
    return card | {"max_model_len": site.served.context, "converses": site.served.text.converses}


def _site(request: Request) -> Site:
    return request.app.state.site


async def _answered(request: Request, url: str) -> Response:
    site = _site(request)
    site.check_ready()
    asked = await _read(request, lambda body: read(site.served, url, body, streams=True))
    check_told(asked)
    job, streams = site.begin(asked, request.state.key), False
    try:
        await _unless_gone(request, job.place())
        streams = asked.stream
        return EventStream(site, job) if streams else await _unless_gone(request, _whole(site, job))
    finally:
        if not streams:
            site.end(job)


async def _whole(site: Site, job: Job) -> Response:
    async for _ in job.pieces():
        pass
    results = job.results()
    return await site.beside.run(lambda: json_response(answer.answer(job.served, job.asked, results)))


async def _read(request: Request, use: Callable[[Any], T]) -> T:
    """use(body): beside the loop, so that a long prompt holds nobody up. Raises a Refusal where the body does
    not come, its client goes, or too many come at a time, and InputError."""
    site = _site(request)
    with site.reading(request.state.key):
        try:
            data = await asyncio.wait_for(request.body(), site.limits.body_seconds)
        except asyncio.TimeoutError:
            raise refusal(408, "the body did not come in time", connection="close") from None
        if not data:
            raise InputError("the body is empty; a JSON object was expected")
        beside = site.beside_large if len(data) > LARGE else site.beside
        return await _unless_gone(request, _used(site, beside, data, use))


async def _used(site: Site, beside: Beside, data: bytes, use: Callable[[Any], T]) -> T:
    def parsed() -> tuple[Any, list[T]]:
        body = parse(data, "the body")
        return body, [] if may_compile(body) else [use(body)]

    body, found = await beside.run(parsed)
    return found[0] if found else await site.beside_grammars.run(lambda: use(body))


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work comes to. It is given up where the client goes before, which nobody else would notice:
    then a Refusal is raised, for nobody. Work that waits for its place is never begun."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise refusal(GONE, "the client has gone")
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await future


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
