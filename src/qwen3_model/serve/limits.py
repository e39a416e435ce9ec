"""How much may be asked of a server at a time."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..openai.refusal import FieldError
from .choices import Job
from .errors import refusal

RETRY_SECONDS = "1"


@dataclass(frozen=True)
class Limits:
    """waiting: choices that may wait for a slot. per_key: requests of a key at a time; None: any number.
    body_bytes, body_seconds: of a request's body, and until it has come. grace: seconds that requests may go
    on when the server is asked to end."""

    waiting: int = 256
    per_key: int | None = None
    body_bytes: int = 2**22
    body_seconds: float = 60.0
    grace: float = 30.0

    def check(self, jobs: Collection[Job], key: int, choices: int, slots: int) -> None:
        """Raises a Refusal with status 429 where a request has to come again, beside those that are there;
        FieldError for more choices than there is ever room for. key: whose it is."""
        if choices > slots + self.waiting:
            raise FieldError("n", f"n asks for {choices} choices; at most {slots + self.waiting} find room")
        if sum(job.left for job in jobs) + choices > slots + self.waiting:
            raise refusal(
                429, f"more than {self.waiting} texts would wait: come again", "rate_limit_exceeded",
                retry_after=RETRY_SECONDS,
            )  # fmt: skip
        if self.per_key is not None and sum(job.key == key for job in jobs) >= self.per_key:
            raise refusal(
                429, f"a key has at most {self.per_key} requests at a time: wait for one of them",
                "rate_limit_exceeded", retry_after=RETRY_SECONDS,
            )  # fmt: skip
