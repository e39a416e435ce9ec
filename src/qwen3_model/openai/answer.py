"""What a request is answered with: OpenAI's objects, made of finished texts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from ..decode.sequence import Result
from ..errors import InputError
from ..text import INCOMPLETE, Detokenizer, Text
from .body import Asked, Served
from .refusal import FieldError

# OpenAI's word for how a text ended; other ends are no answers.
REASONS = {"end_token": "stop", "stop_string": "stop", "length": "length"}
LEAST_LOGPROB = -9999.0  # OpenAI's word for "next to impossible"; JSON has no -inf


def answer(served: Served, asked: Asked, results: Sequence[Result]) -> dict[str, Any]:
    """A `chat.completion` or a `text_completion`. results: of the choices, in their order, each ended by
    itself (a reason of REASONS)."""
    choice, word, kind = _completion_choice, "cmpl", "text_completion"
    if asked.chat:
        choice, word, kind = _chat_choice, "chatcmpl", "chat.completion"
    return {
        "id": f"{word}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": served.name,
        "choices": [choice(served.text, asked, i, result) for i, result in enumerate(results)],
        "usage": usage(asked, results),
        "seed": asked.request.seed,  # of choice 0; choice i has seed + i
    }


def usage(asked: Asked, results: Sequence[Result]) -> dict[str, Any]:
    """Tokens of the prompts, each counted once, and of the choices, an end token included; how many of them
    were accepted proposals, and how many proposals were not."""
    prompt = sum(map(len, asked.prompts))
    new = sum(len(result.token_ids) for result in results)
    accepted = sum(sum(n * count for n, count in enumerate(r.stats.accepted_histogram)) for r in results)
    proposed = sum(result.stats.nodes for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": proposed - accepted,
        },
    }


def refused(error: InputError) -> dict[str, Any]:
    """The body of status 400."""
    field = error.field if isinstance(error, FieldError) else None
    return _error(str(error), "invalid_request_error", field)


def failed(said: str) -> dict[str, Any]:
    """The body of status 500: a text that could not be decoded."""
    return _error(said, "server_error", None)


def _error(message: str, kind: str, field: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": field, "code": None}}


def _completion_choice(text: Text, asked: Asked, index: int, result: Result) -> dict[str, Any]:
    return {
        "index": index,
        "text": result.text,
        "logprobs": _completion_logprobs(text, result) if asked.logprobs else None,
        "finish_reason": REASONS[result.stats.finish_reason],
    }


def _chat_choice(text: Text, asked: Asked, index: int, result: Result) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": result.text, "refusal": None},
        "logprobs": _chat_logprobs(text, result) if asked.logprobs else None,
        "finish_reason": REASONS[result.stats.finish_reason],
    }


def _completion_logprobs(text: Text, result: Result) -> dict[str, Any]:
    """text_offset: characters of the text before each token."""
    detokenizer, offsets, length = Detokenizer(text), [], 0
    for token in result.token_ids:
        offsets.append(length)
        length += len(detokenizer.push(token))
    return {
        "tokens": [_piece(text, token) for token in result.token_ids],
        "token_logprobs": [max(logprob, LEAST_LOGPROB) for logprob in result.logprobs],
        "top_logprobs": None,
        "text_offset": offsets,
    }


def _chat_logprobs(text: Text, result: Result) -> dict[str, Any]:
    """bytes: null for a token that is part of a character, which no string shows."""
    content = []
    for token, logprob in zip(result.token_ids, result.logprobs, strict=True):
        piece = _piece(text, token)
        shown = None if INCOMPLETE in piece else list(piece.encode())
        content.append(
            {"token": piece, "logprob": max(logprob, LEAST_LOGPROB), "bytes": shown, "top_logprobs": []}
        )
    return {"content": content, "refusal": None}


def _piece(text: Text, token: int) -> str:
    """A token's text, and the name of one that has none."""
    return text.decode([token]) or text.label(token)
