"""The lines of a batch file: requests as OpenAI's batch has them, and what is wrong with one."""

from __future__ import annotations

import codecs
import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError, foreign, one_line, quoted
from .strict_json import parse

LONGEST_LINE = 2**22  # bytes
LONGEST_ID = 512  # characters of a custom_id
FIELDS = ("custom_id", "method", "url", "body")
ANSWER_ID = "batch_req_"
# What every line of OUT begins with: by it a torn line is told from somebody else's text.
BEGINNING = f'{{"id": "{ANSWER_ID}'.encode()

Key = str | int  # a custom_id; the number of a line that has none


@dataclass(frozen=True)
class Line:
    """A line of IN. answer_id: of its answer, which follows from all that the answer follows from. wrong: why
    it is no request; "" for one, whose url and body are not looked at yet."""

    number: int
    custom_id: str | None
    answer_id: str
    url: Any = None
    body: Any = None
    wrong: str = ""

    @property
    def key(self) -> Key:
        """What tells its answer from those of others."""
        return self.number if self.custom_id is None else self.custom_id


def read_lines(path: Path, settings: str) -> Iterator[Line]:
    """The lines of a file that are not blank, one at a time. settings: of the run, all that an answer follows
    from beside its line. Raises InputError where reading fails."""
    with foreign(f"{path} cannot be read"), path.open("rb") as file:
        number = 0
        while data := _next(file):
            number += 1
            data = data.removeprefix(codecs.BOM_UTF8) if number == 1 else data
            if data.strip():
                yield read_line(data, number, settings)


def _next(file: BinaryIO) -> bytes:
    """The next line; of one that is too long as much as shows that."""
    line = rest = file.readline(LONGEST_LINE + 1)
    while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
        rest = file.readline(LONGEST_LINE + 1)
    return line


def read_line(data: bytes, number: int, settings: str) -> Line:
    """A line of IN, whatever is wrong with it."""
    custom_id = None
    answer_id = ANSWER_ID + hashlib.sha256(settings.encode() + b"\n" + data.strip()).hexdigest()[:24]
    try:
        if len(data) > LONGEST_LINE:
            raise InputError(f"line {number} has more than {LONGEST_LINE} bytes")
        raw = parse(data, f"line {number}")
        if not isinstance(raw, dict):
            raise InputError(f"line {number} is {quoted(raw)}; an object was expected")
        custom_id = _custom_id(raw, number)
        if unknown := [name for name in raw if name not in FIELDS]:
            raise InputError(f"line {number} has an unknown field {quoted(unknown[0])}")
        if missing := [name for name in FIELDS if name not in raw]:
            raise InputError(f"line {number} has no {missing[0]}")
        if raw["method"] != "POST":
            raise InputError(f"method of line {number} is {quoted(raw['method'])}; use POST")
    except InputError as error:
        return Line(number, custom_id, answer_id, wrong=str(error))
    return Line(number, custom_id, answer_id, raw["url"], raw["body"])


def _custom_id(raw: dict[str, Any], number: int) -> str:
    found = raw.get("custom_id")
    if not isinstance(found, str) or not 0 < len(found) <= LONGEST_ID:
        raise InputError(
            f"custom_id of line {number} is {quoted(found)}; a string of 1 to {LONGEST_ID} characters was "
            "expected"
        )
    return found


def answered(line: Line, status: int, body: dict[str, Any]) -> dict[str, Any]:
    """The line of OUT for a request that was read."""
    request = f"req_{secrets.token_hex(12)}"
    return _out(line, {"status_code": status, "request_id": request, "body": body}, None)


def unreadable(line: Line) -> dict[str, Any]:
    """The line of OUT for a line that is no request."""
    return _out(line, None, {"code": "invalid_line", "message": line.wrong, "line": line.number})


def _out(line: Line, response: dict[str, Any] | None, error: dict[str, Any] | None) -> dict[str, Any]:
    return {"id": line.answer_id, "custom_id": line.custom_id, "response": response, "error": error}


def read_answer(data: bytes, where: str) -> tuple[Key, str, bool]:
    """Whose answer a line of OUT is, its id, and whether the request was answered with status 200. Raises
    InputError for any other line."""
    try:
        raw = parse(data, where)
        custom_id, response, error = raw["custom_id"], raw["response"], raw["error"]
        if set(raw) == {"id", "custom_id", "response", "error"} and raw["id"].startswith(ANSWER_ID):
            key = error["line"] if custom_id is None else custom_id
            if type(key) in (str, int):
                return key, raw["id"], response is not None and response["status_code"] == 200
    except (InputError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{where} is no answer of a batch ({one_line(error, 100)})") from None
    raise InputError(f"{where} is no answer of a batch")
