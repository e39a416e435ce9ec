"""Prompt files: which lines are prompts, and what is refused with its line's number."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_model import InputError, prompts
from qwen3_model.prompts import read_prompts


def write(folder: Path, *rows: object) -> Path:
    """A file of these rows; bytes are written as they are, other values as JSON."""
    file = folder / "prompts.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return file


def refusal(file: Path, **settings) -> str:
    with pytest.raises(InputError) as caught:
        read_prompts(file, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_fields_in_their_order(tmp_path):
    file = write(
        tmp_path,
        {"text": "c", "question": "b", "prompt": "a"},
        {"text": "c", "question": "b"},
        {"text": "c"},
        "d",
        b"",
        b"  ",
        {"prompt": "é\u2028\n🙂"},
    )
    assert read_prompts(file) == ["a", "b", "c", "d", "é\u2028\n🙂"]
    assert read_prompts(str(file), limit=2) == ["a", "b"]


def test_a_field_of_ones_own(tmp_path):
    file = write(tmp_path, {"prompt": "a", "body": "b"}, "c")
    assert read_prompts(file, field="body") == ["b", "c"]
    assert "line 1 has no field prompt or question or text; its fields are body" in refusal(
        write(tmp_path, {"body": "b"})
    )
    assert "line 2 has no field body; its fields are none" in refusal(
        write(tmp_path, {"body": "b"}, {}), field="body"
    )


def test_a_null_field_is_passed_over(tmp_path):
    file = write(tmp_path, {"prompt": None, "question": "b"}, {"prompt": None, "text": "c", "question": None})
    assert read_prompts(file) == ["b", "c"]
    assert "line 1, prompt is of type NoneType" in refusal(file, field="prompt")
    assert "line 1, prompt is of type NoneType" in refusal(write(tmp_path, {"prompt": None}))


def test_byte_order_marks_are_no_part_of_a_line(tmp_path):
    """Two files of an editor that begins each with one, put together."""
    mark = b"\xef\xbb\xbf"
    assert read_prompts(write(tmp_path, mark + b'{"prompt": "a"}', "b", mark + b'"c"')) == ["a", "b", "c"]


def test_stdin(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'"a"\n{"text": "b"}\n{')))
    assert read_prompts("-", limit=2) == ["a", "b"]
    assert "stdin line 1 is not JSON" in refusal("-")
    assert "stdin holds no prompts" in refusal("-")
    monkeypatch.setattr(sys, "stdin", None)
    assert "stdin is closed" in refusal("-")


def test_a_pipe_of_an_open_descriptor_is_read_and_one_with_a_name_refused(tmp_path):
    """As a shell's <(...) gives it. One with a name might wait for a writer for ever."""
    reader, writer = os.pipe()
    os.write(writer, b'"a"\n')
    os.close(writer)
    assert read_prompts(f"/dev/fd/{reader}") == ["a"]
    os.close(reader)
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe: send it to stdin" in refusal(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    assert "is a pipe: send it to stdin" in refusal(tmp_path / "link")


def test_a_file_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "MOST_BYTES", 2**20)
    assert "/dev/zero line 1 goes past 1 MiB" in refusal("/dev/zero")
    assert "line 4 goes past 1 MiB" in refusal(write(tmp_path, *["x" * (300 * 2**10)] * 5))
    assert len(read_prompts(write(tmp_path, *["x" * (300 * 2**10)] * 5), limit=3)) == 3


def test_a_git_lfs_pointer_is_named(tmp_path):
    file = write(tmp_path, b"version https://git-lfs.github.com/spec/v1", b"oid sha256:00")
    assert "is a Git LFS pointer" in refusal(file)


def test_hostile_names_are_cut(tmp_path):
    said = refusal(write(tmp_path, {f"{i}\x1b[2J" + "n" * 5000: "x" for i in range(50)}))
    assert len(said) < 500 and said.isprintable() and "has no field prompt" in said


def test_splits(tmp_path):
    rows = [{"prompt": "a", "split": "dev"}, {"prompt": "b", "split": "test"}, {"prompt": "c"}, "d"]
    file = write(tmp_path, *rows)
    assert read_prompts(file) == ["a", "b", "c", "d"]
    assert read_prompts(file, split="test") == ["b", "c", "d"]
    assert read_prompts(file, split="test", limit=1) == ["b"]
    assert "no prompts of split 'train'" in refusal(write(tmp_path, *rows[:2]), split="train")


def test_lines_past_the_limit_are_not_read(tmp_path):
    file = write(tmp_path, "a", b"{broken")
    assert read_prompts(file, limit=1) == ["a"]
    assert "line 2 is not JSON" in refusal(file, limit=2)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (b"{", "line 3 is not JSON"),
        (b"plain words", "line 3 is not JSON"),
        (b'"\xff"', "line 3 is not JSON"),
        (b"[" * 100_000, "line 3 is not JSON"),
        (b"9" * 5000, "line 3 is not JSON"),
        (3, "line 3 is of type int; a string"),
        (None, "line 3 is of type NoneType"),
        (["a"], "line 3 is of type list"),
        ({"prompt": 3, "text": "a"}, "line 3, prompt is of type int"),
        ({"prompt": ""}, "line 3, prompt is an empty prompt"),
        ("", "line 3 is an empty prompt"),
        ({"prompt": "\ud800"}, "line 3, prompt holds half a surrogate pair"),
    ],
)
def test_bad_lines_are_refused(tmp_path, row, says):
    assert says in refusal(write(tmp_path, "a", b"", row, "b"))


def test_bad_files_are_refused(tmp_path):
    assert "there is no file" in refusal(tmp_path / "missing.jsonl")
    assert "cannot be read" in refusal(tmp_path)
    assert "holds no prompts" in refusal(write(tmp_path))
    assert "holds no prompts" in refusal(write(tmp_path, b"", b""))


@pytest.mark.parametrize("limit", [0, -1])
def test_bad_limits_are_refused(tmp_path, limit):
    assert f"limit is {limit}; at least 1" in refusal(write(tmp_path, "a"), limit=limit)


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1))
def test_any_prompts_come_back(tmp_path_factory, texts):
    file = write(tmp_path_factory.mktemp("any"), *({"prompt": text} for text in texts))
    assert read_prompts(file) == texts


@given(st.binary())
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("any") / "prompts.jsonl"
    file.write_bytes(content)
    try:
        assert all(read_prompts(file))
    except InputError as error:
        assert "\n" not in str(error)
