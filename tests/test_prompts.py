"""Prompt files: which lines are prompts, and what is refused with its line's number."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_model import InputError
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
def test_any_prompts_come_back(tmp_path_factory, prompts):
    file = write(tmp_path_factory.mktemp("any"), *({"prompt": prompt} for prompt in prompts))
    assert read_prompts(file) == prompts


@given(st.binary())
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("any") / "prompts.jsonl"
    file.write_bytes(content)
    try:
        assert all(read_prompts(file))
    except InputError as error:
        assert "\n" not in str(error)
