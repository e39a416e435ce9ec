"""What a server says no with: a status, and OpenAI's error object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from ..errors import InputError
from ..openai.answer import error_body, failed, refused
from ..openai.refusal import FieldError
from .engine_client import EngineDied


class Refusal(Exception):
    """A request that is not answered. body: OpenAI's error object."""

    def __init__(self, status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(body["error"]["message"])
        self.status, self.body, self.headers = status, body, dict(headers or {})

    def response(self) -> Response:
        """What is sent."""
        return json_response(self.body, self.status, self.headers)


def json_response(
    value: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON answer. Half a surrogate pair, which a model can write as an escape, is sent as an escape."""
    return Response(json.dumps(value, allow_nan=False).encode(), status, headers, "application/json")


def refusal(status: int, message: str, code: str | None = None, **headers: str) -> Refusal:
    """A refusal that is no field's. headers: names with _ for -."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Refusal(status, error_body(message, kind, code=code), named)


def refusal_of(error: Exception) -> Refusal:
    """What an error of a request or of its texts is answered with."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, FieldError) and error.field == "model":
        return Refusal(404, error_body(str(error), "invalid_request_error", "model", "model_not_found"))
    if isinstance(error, InputError):
        return Refusal(400, refused(error))
    if isinstance(error, EngineDied):
        return refusal(503, str(error))
    return Refusal(500, failed("the server has failed; its log says how"))


def of_status(status: int, headers: Mapping[str, str] | None) -> Refusal:
    """The refusal of a path or a method that is not there."""
    said = HTTPStatus(status).phrase.lower() if status in HTTPStatus._value2member_map_ else "refused"
    found = refusal(status, f"{said}: see /openapi.json for paths and methods")
    found.headers |= dict(headers or {})
    return found
