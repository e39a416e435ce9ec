"""What is wrong with a request, by the field of its body."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import InputError, one_line

LONGEST_FIELD = 80  # characters of a field's name as it is told


class FieldError(InputError):
    """An impossible field of a request: the message names it. field: its name, made fit to print; a client
    may have made up one of any length."""

    def __init__(self, field: str, message: object) -> None:
        said, self.field = str(message), one_line(field, LONGEST_FIELD)
        super().__init__(said if self.field in said else f"{self.field}: {said}")


@contextmanager
def naming(field: str) -> Iterator[None]:
    """An InputError inside becomes a FieldError of this field."""
    try:
        yield
    except FieldError:
        raise
    except InputError as error:
        raise FieldError(field, error) from None
