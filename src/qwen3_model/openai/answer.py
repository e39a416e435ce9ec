"""What a request is answered with: OpenAI's objects, made of finished texts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from ..decode.sequence import Likeliest, Result
from ..errors import InputError
from ..text import INCOMPLETE, Detokenizer, Text
from .body import Asked
from .qwen3_text import Said, read_said
from .refusal import FieldError
from .served import Served

# OpenAI's word for how a text ended; other ends are no answers.
REASONS = {"end_token": "stop", "stop_string": "stop", "length": "length"}
LEAST_LOGPROB = -9999.0  # OpenAI's word for "next to impossible"; JSON has no -inf


def answer(served: Served, asked: Asked, results: Sequence[Result]) -> dict[str, Any]:
    """A `chat.completion` or a `text_completion`. results: of the choices, in their order, each ended by
    itself (a reason of REASONS)."""
    choice = _chat_choice if asked.chat else _completion_choice
    return head(served, asked) | {
        "choices": [choice(served.text, asked, i, result) for i, result in enumerate(results)],
        "usage": usage(asked, results),
    }


def head(served: Served, asked: Asked, chunk: bool = False) -> dict[str, Any]:
    """What an answer begins with, and every chunk of a stream."""
    word, kind = ("chatcmpl", "chat.completion") if asked.chat else ("cmpl", "text_completion")
    return {
        "id": f"{word}-{secrets.token_hex(12)}",
        "object": f"{kind}.chunk" if chunk and asked.chat else kind,
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": served.fingerprint,
        "seed": asked.request.seed,  # of choice 0; choice i has seed + i
    }


def usage(asked: Asked, results: Sequence[Result]) -> dict[str, Any]:
    """Tokens of the prompts, each counted once, and of the choices, an end token included; how many of them
    were accepted proposals, and how many proposals were not. Of a prompt's choices the first one counts what
    it found in the cache."""
    prompt = sum(map(len, asked.prompts))
    new = sum(len(result.token_ids) for result in results)
    accepted = sum(sum(n * count for n, count in enumerate(r.stats.accepted_histogram)) for r in results)
    proposed = sum(result.stats.nodes for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(r.stats.cached_tokens for r in results[:: asked.n])},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": proposed - accepted,
        },
    }


def refused(error: InputError) -> dict[str, Any]:
    """The body of status 400."""
    field = error.field if isinstance(error, FieldError) else None
    return error_body(str(error), "invalid_request_error", field)


def failed(said: str) -> dict[str, Any]:
    """The body of status 500: a text that could not be decoded."""
    return error_body(said, "server_error")


def error_body(message: str, kind: str, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object. kind: its type; field: of the request's body."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def finish_reason(stats_reason: str, calls: bool) -> str:
    """OpenAI's word for a reason of REASONS; an answer that calls tools has stopped for that."""
    reason = REASONS[stats_reason]
    return "tool_calls" if calls and reason == "stop" else reason


def called(call: dict[str, str]) -> dict[str, Any]:
    """A tool call of an answer."""
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": call}


def _completion_choice(text: Text, asked: Asked, index: int, result: Result) -> dict[str, Any]:
    told = result.token_ids, result.logprobs, result.top_logprobs
    logprobs = CompletionLogprobs(text).push(*told) if asked.logprobs else None
    return {
        "index": index,
        "text": result.text,
        "logprobs": logprobs,
        "finish_reason": REASONS[result.stats.finish_reason],
    }


def _chat_choice(text: Text, asked: Asked, index: int, result: Result) -> dict[str, Any]:
    said = read_said(result.text, asked.tools, asked.reasons)
    told = result.token_ids, result.logprobs, result.top_logprobs
    return {
        "index": index,
        "message": {"role": "assistant", "refusal": None} | _message(said),
        "logprobs": chat_logprobs(text, *told) if asked.logprobs else None,
        "finish_reason": finish_reason(result.stats.finish_reason, bool(said.calls)),
    }


def _message(said: Said) -> dict[str, Any]:
    """reasoning_content and tool_calls are there where the answer has some; content is null beside calls
    alone, as with OpenAI."""
    message: dict[str, Any] = {"content": said.content if said.content or not said.calls else None}
    if said.reasoning:
        message["reasoning_content"] = said.reasoning
    if said.calls:
        message["tool_calls"] = [called(call) for call in said.calls]
    return message


class CompletionLogprobs:
    """The log-probabilities of a completion as its tokens come."""

    def __init__(self, text: Text) -> None:
        self._text, self._detokenizer, self._length = text, Detokenizer(text), 0

    def push(
        self, tokens: Sequence[int], logprobs: Sequence[float], top_logprobs: Sequence[Likeliest]
    ) -> dict[str, Any]:
        """OpenAI's object for the next tokens. text_offset: characters of the text before each token.
        top_logprobs: empty where nobody asks for them; then the object's is null."""
        offsets = []
        for token in tokens:
            offsets.append(self._length)
            self._length += len(self._detokenizer.push(token))
        both = zip(zip(tokens, logprobs, strict=True), top_logprobs, strict=bool(top_logprobs))
        likeliest = [self._by_text([own, *others]) for own, others in both]
        return {
            "tokens": [piece(self._text, token) for token in tokens],
            "token_logprobs": [max(logprob, LEAST_LOGPROB) for logprob in logprobs],
            "top_logprobs": likeliest or None,
            "text_offset": offsets,
        }

    def _by_text(self, likeliest: Likeliest) -> dict[str, float]:
        """Log-probabilities by the token's text. Of tokens with the same text, such as parts of characters,
        the first one is told, so that the chosen one, which stands first, always is."""
        found = dict[str, float]()
        for token, logprob in likeliest:
            found.setdefault(piece(self._text, token), max(logprob, LEAST_LOGPROB))
        return found


def chat_logprobs(
    text: Text, tokens: Sequence[int], logprobs: Sequence[float], top_logprobs: Sequence[Likeliest]
) -> dict[str, Any]:
    """OpenAI's object for tokens. top_logprobs: empty where nobody asks for them."""
    told = zip(tokens, logprobs, top_logprobs or [[]] * len(tokens), strict=True)
    content = [
        _chat_token(text, token, logprob) | {"top_logprobs": [_chat_token(text, *one) for one in likeliest]}
        for token, logprob, likeliest in told
    ]
    return {"content": content, "refusal": None}


def _chat_token(text: Text, token: int, logprob: float) -> dict[str, Any]:
    """bytes: null for a token that is part of a character, which no string shows."""
    said = piece(text, token)
    shown = None if INCOMPLETE in said else list(said.encode())
    return {"token": said, "logprob": max(logprob, LEAST_LOGPROB), "bytes": shown}


def piece(text: Text, token: int) -> str:
    """A token's text, and the name of one that has none."""
    return text.decode([token]) or text.label(token)
