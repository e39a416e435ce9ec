"""The app of a server: endpoints, what stands in front of them, and how errors are told."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ..errors import InputError
from . import page
from .engine_client import EngineDied
from .errors import Refusal, of_status, refusal_of
from .guard import GONE, Access, Guard
from .routes import router
from .site import Site


def build(site: Site, access: Access | None = None) -> FastAPI:
    """An app, for one event loop. The site may get its engine later. access: who may ask; None: this machine,
    without a key."""
    app = FastAPI(title="orthrus serve", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.site = site
    app.include_router(router)
    app.include_router(page.router)
    app.add_middleware(Guard, access=access or Access(), limits=site.limits, metrics=site.metrics)
    for kind in (Refusal, InputError, EngineDied, Exception):
        app.add_exception_handler(kind, _told)
    app.add_exception_handler(HTTPException, _of_path)
    app.add_exception_handler(ClientDisconnect, _gone)
    return app


async def _told(request: Request, error: Exception) -> Response:
    return refusal_of(error).response()


async def _of_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return of_status(error.status_code, error.headers).response()


async def _gone(request: Request, error: Exception) -> Response:
    """Of a client that has gone while it sent its request."""
    return Response(status_code=GONE)
