"""Reasoning and tool calls in an answer's text: the same however the text is cut into pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_model.openai.qwen3_text import Reader, Said, read_said

WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź", "days": 2}}\n</tool_call>'
CALLED = {"name": "weather", "arguments": '{"city": "Łódź", "days": 2}'}
PIECES = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "</tool_call>", "<", "</", "<tool", "_call>", "think>", "\n",
     "\n\n", " ", "hm", "é", WEATHER, WEATHER + "\n" + WEATHER, '{"name": "f"}', "<tool_call>{}</tool_call>"]
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        ("", "", "", 0),
        ("hello <think>x</think>\n", "", "hello <think>x</think>\n", 0),
        ("<think>\nhm\n\nso\n</think>\n\nyes\n", "hm\n\nso", "yes\n", 0),
        (" \n<think>hm", "hm", "", 0),
        ("<think>\n\n</think>\n\nyes", "", "yes", 0),
        ("<think>a</think><think>b</think>", "a", "<think>b</think>", 0),
        ("<thin", "", "<thin", 0),
        (WEATHER, "", "", 1),
        (f"I ask.\n{WEATHER}\n{WEATHER}\n", "", "I ask.", 2),
        (f"<think>\nhm\n</think>\n\n{WEATHER}", "hm", "", 1),
        (f"<think>{WEATHER}", WEATHER, "", 0),
        ('<tool_call>{"name": "f"}</tool_call>', "", "", 1),
        ("a\n<tool_call>{bad}</tool_call>\nb", "", "a\n<tool_call>{bad}</tool_call>\nb", 0),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "", None, 0),
        ('<tool_call>{"name": 1, "arguments": {}}</tool_call>', "", None, 0),
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "", None, 0),
        ('<tool_call>{"name": "f", "more": 1}</tool_call>', "", None, 0),
        ('x\n<tool_call>\n{"name": "f"}', "", None, 0),
    ],
)
def test_what_a_text_says(text, reasoning, content, calls):
    said = read_said(text, tools=True, reasons=False)
    assert (said.reasoning, said.content) == (reasoning, text if content is None else content)
    assert len(said.calls) == calls and (CALLED in said.calls) == ("Łódź" in text and calls > 0)
    assert all(isinstance(json.loads(call["arguments"]), dict) for call in said.calls)


def test_without_tools_a_call_is_text():
    assert read_said(f"a\n{WEATHER}", tools=False, reasons=False) == Said(content=f"a\n{WEATHER}")


def test_reasoning_that_the_prompt_has_begun():
    assert read_said("\nhm\n</think>\n\nyes", tools=False, reasons=True) == Said("hm", "yes")
    assert read_said("hm\n", tools=False, reasons=True) == Said("hm\n")


@given(st.lists(PIECES, max_size=8).map("".join), st.data(), st.booleans(), st.booleans())
def test_every_cutting_gives_the_same(text, data, tools, reasons):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    reader, said = Reader(tools, reasons), Said()
    for first, last in zip([0, *cuts], [*cuts, len(text)], strict=True):
        said.add(reader.push(text[first:last]))
    said.add(reader.flush())
    assert said == read_said(text, tools, reasons)


def test_text_that_can_be_no_tag_is_not_held_back():
    reader = Reader(tools=True, reasons=False)
    assert [reader.push(piece).content for piece in ("a", " <", "b", "<to", "ol_x", "\n", "c")] == [
        "a", " ", "<b", "", "<tool_x", "", "\nc",
    ]  # fmt: skip
