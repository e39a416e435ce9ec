"""Messages are one line of bounded length that a terminal can show, whoever worded them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3_model.errors import LONGEST, InputError, foreign, in_memory, memory_asked, one_line, quoted


class Panic(BaseException):
    """As Rust's panics reach Python: no Exception."""


class Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@given(st.text(st.characters() | st.sampled_from("\x1b\x07\r\n\t\u202e\ud800\x00")), st.integers(1, 300))
def test_any_message_is_one_line_that_can_be_printed(words, times):
    said = str(InputError(words * times))
    assert len(said) <= LONGEST and said.isprintable()
    said.encode("utf-8")


def test_the_ends_of_a_long_message_are_kept():
    said = str(InputError("config.json: vocab_size is " + "9" * 10**6 + ": a whole number was expected"))
    assert said.startswith("config.json: vocab_size is 9") and said.endswith("a whole number was expected")
    assert len(said) == LONGEST and str(InputError("short")) == "short"


def test_an_error_without_words_is_called_by_its_type():
    assert one_line(KeyError()) == "KeyError" and one_line(Wordless()) == "Wordless" and one_line("") == ""


@pytest.mark.parametrize(
    "error", [ValueError("a\nb"), Panic("a\nb"), MemoryError("a b"), RecursionError("a b")]
)
def test_whatever_a_foreign_library_raises_is_an_input_error(error):
    with (
        pytest.raises(InputError, match=r"^the file is odd \(a b\): get another$"),
        foreign("the file is odd", "get another"),
    ):
        raise error


@pytest.mark.parametrize("error", [InputError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_not_foreign_passes(error):
    with pytest.raises(type(error)) as caught, foreign("the file is odd"):
        raise error
    assert caught.value is error


def test_memory_errors_of_every_library_say_how_much_was_asked_for():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory_asked(caught.value) == f"{2**30:.1f} GiB"
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, 2**3)
    assert memory_asked(caught.value) == ""
    assert (
        memory_asked(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0"))
        == "20.00 GiB"
    )
    assert (
        memory_asked(
            RuntimeError("unable to mmap 4294967296 bytes from file <x>: Cannot allocate memory (12)")
        )
        == "4.0 GiB"
    )
    assert memory_asked(MemoryError()) == ""
    assert (
        memory_asked(RuntimeError("shapes do not fit")) is None
        and memory_asked(ValueError("out of memory")) is None
    )


def test_memory_that_is_not_there_is_one_line_and_other_errors_pass():
    with (
        pytest.raises(InputError, match=r"the batch does not fit into memory \(\d+\.0 GiB .*: use a smaller"),
        in_memory("the batch", "use a smaller --batch"),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="other"), in_memory("the batch", "x"):
        raise RuntimeError("other")


def test_any_value_is_quoted_shortly():
    assert quoted("a\x1b") == "'a\\x1b'" and quoted(10**5000) == "<int>" and len(quoted("x" * 10**6)) == 80
