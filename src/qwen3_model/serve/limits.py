"""How much may be asked of a server at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from ..openai.body import Asked
from ..openai.refusal import FieldError
from .choices import Job
from .errors import refusal

RETRY_SECONDS = "1"
# Log-probabilities of an answer that comes whole, and of a stream, whose client may read slowly and lets them
# wait; each takes about 100 bytes.
MOST_TOLD, MOST_STREAMED = 2**19, 2**22


@dataclass(frozen=True)
class Limits:
    """waiting: choices that may wait for a slot. per_key: requests of a key at a time; None: any number.
    body_bytes, body_seconds: of a request's body, and until it has come. grace: seconds that requests may go
    on when the server is asked to end. engine_seconds: that the engine may be silent while it has texts."""

    waiting: int = 256
    per_key: int | None = None
    body_bytes: int = 2**22
    body_seconds: float = 60.0
    grace: float = 30.0
    engine_seconds: float = 300.0

    def check(self, jobs: Collection[Job], reading: Counter[int], key: int, choices: int, slots: int) -> None:
        """Raises a Refusal with status 429 where a request has to come again, beside those that are there and
        those that are being read, each of which counts as one text; FieldError for more choices than there
        is ever room for. reading: requests by key. key: whose it is."""
        if choices > slots + self.waiting:
            raise FieldError("n", f"n asks for {choices} choices; at most {slots + self.waiting} find room")
        if sum(job.left for job in jobs) + reading.total() + choices > slots + self.waiting:
            raise refusal(
                429, f"more than {self.waiting} texts would wait: come again", "rate_limit_exceeded",
                retry_after=RETRY_SECONDS,
            )  # fmt: skip
        if self.per_key is not None and sum(job.key == key for job in jobs) + reading[key] >= self.per_key:
            raise refusal(
                429, f"a key has at most {self.per_key} requests at a time: wait for one of them",
                "rate_limit_exceeded", retry_after=RETRY_SECONDS,
            )  # fmt: skip


def check_told(asked: Asked) -> None:
    """Raises FieldError for more log-probabilities than an answer may have."""
    assert asked.request.max_new_tokens is not None
    texts, each = len(asked.prompts) * asked.n, 1 + asked.request.top_logprobs
    told = texts * asked.request.max_new_tokens * each
    most, stream = (MOST_STREAMED, "") if asked.stream else (MOST_TOLD, ", or stream")
    if asked.logprobs and told > most:
        name = "top_logprobs" if asked.chat and each > 1 else "logprobs"
        raise FieldError(
            name, f"{texts} choices of up to {asked.request.max_new_tokens} tokens, each with {each} "
            f"log-probabilities, have {told}; at most {most} fit an answer: lower max_tokens, n or "
            f"{name}{stream}",
        )  # fmt: skip
