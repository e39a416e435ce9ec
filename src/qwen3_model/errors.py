"""What a user reads when something is wrong: one line of bounded length, whoever worded it.

Messages quote files and libraries that nobody here has written. `one_line` is the one place that makes them
fit to print, and `InputError` passes every message through it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 440  # characters of a message
_TAIL = 160  # of them are kept of its end, where it says what to do
# How torch (CPU, mmap, CUDA) and numpy word how much memory was asked for.
_BYTES = re.compile(r"(?:allocate|mmap) (\d+) bytes")
_UNITS = re.compile(r"allocate ([\d.]+ [KMGTP]i?B)", re.I)
_MEMORY = re.compile(r"can't allocate memory|not enough memory|cannot allocate memory|out of memory", re.I)
_OVERFLOW = re.compile(r"storage size calculation overflow|numel: integer multiplication overflow", re.I)


class InputError(ValueError):
    """Bad input: the message is one line saying what is wrong, what was expected and what to do.

    The command line prints it to stderr and exits with code 2; library callers catch it as a ValueError. The
    message is made fit to print (`one_line`), so that it may quote anything.
    """

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message))


def one_line(said: object, most: int = LONGEST) -> str:
    """A message or an exception's message on one line: white space folded, what is not printable escaped (no
    escape sequence of a downloaded file reaches a terminal), the middle left out where it is longer than
    `most` characters."""
    try:
        text = str(said)
    except Exception:  # an exception's own words can fail
        text = ""
    if not text.strip():
        text = type(said).__name__ if isinstance(said, BaseException) else ""
    if len(text) > 8 * most:  # before the work: a message can be a file
        text = text[: 4 * most] + " … " + text[-4 * most :]
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    if len(text) <= most:
        return text
    tail = min(_TAIL, most // 2)
    return text[: most - tail - 3] + " … " + text[-tail:]


def quoted(value: object, most: int = 80) -> str:
    """A value as Python writes it, for a message: short, on one line, whatever it is."""
    try:
        return one_line(repr(value), most)
    except Exception:  # a number of 5000 digits, an object whose repr fails
        return f"<{type(value).__name__}>"


@contextmanager
def foreign(what: str, advice: str = "") -> Iterator[None]:
    """Whatever a foreign library raises inside becomes an InputError: "what (its words): advice".

    Rust panics are no `Exception`, and templates, tokenizers and files can raise nearly any. InputError,
    Ctrl-C and the end of the process pass."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise InputError(f"{what} ({one_line(error, 200)})" + (f": {advice}" if advice else "")) from None


def size_of(count: int) -> str:
    """A number of bytes in the unit that shows it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def memory_asked(error: BaseException) -> str | None:
    """How much memory an error says was asked for and not had, such as "12.0 GiB"; "" where it does not say
    how much; None for an error of another kind.

    A CPU's allocator raises a bare RuntimeError, a GPU's a subclass of it, Python and numpy MemoryError."""
    if not isinstance(error, (MemoryError, RuntimeError, OSError)):
        return None
    said = str(error)
    if not (isinstance(error, MemoryError) or _MEMORY.search(said) or _OVERFLOW.search(said)):
        return None
    if found := _BYTES.search(said):
        return size_of(int(found[1]))
    found = _UNITS.search(said)
    return found[1] if found else ""


@contextmanager
def in_memory(what: str, advice: str) -> Iterator[None]:
    """Memory that is not there becomes an InputError: "what does not fit into memory (size): advice"."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        asked = memory_asked(error)
        if asked is None:
            raise
        size = f" ({asked} were asked for at once)" if asked else ""
        raise InputError(f"{what} does not fit into memory{size}: {advice}") from None
