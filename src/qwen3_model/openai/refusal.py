"""What is wrong with a request, by the field of its body."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import InputError


class FieldError(InputError):
    """An impossible field of a request: the message names it."""

    def __init__(self, field: str, message: object) -> None:
        said = str(message)
        super().__init__(said if field in said else f"{field}: {said}")
        self.field = field


@contextmanager
def naming(field: str) -> Iterator[None]:
    """An InputError inside becomes a FieldError of this field."""
    try:
        yield
    except FieldError:
        raise
    except InputError as error:
        raise FieldError(field, error) from None
