"""orthrus chat: a turn that cannot be answered is said and left out, and the conversation goes on."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
from tiny_folder import write_tiny

from qwen3_model import Qwen3
from qwen3_model.cli import chat, main

LONG = b"y " * 5000
REFUSED = "this turn is left out"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


@pytest.fixture
def talk(capsys, monkeypatch):
    """Feeds bytes to a chat; returns exit code, stdout, stderr and the prompts of its answers."""
    generate = Qwen3.generate

    def call(folder, typed: bytes, *args):
        prompts = []

        def watched(self, ids, **settings):
            prompts.append(list(ids))
            return generate(self, ids, **settings)

        monkeypatch.setattr(Qwen3, "generate", watched)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8"))
        code = main(["chat", "--model", str(folder), "--max-new-tokens", "4", *map(str, args)])
        out, err = capsys.readouterr()
        assert all(len(line) < 500 for line in err.splitlines())
        return code, out, err, prompts

    return call


def decoded(folder, prompts) -> list[str]:
    text = Qwen3.from_pretrained(folder, device="cpu").text
    return [text.decode(prompt) for prompt in prompts]


@pytest.mark.parametrize(
    ("bad", "says"),
    [(LONG, "the context only 1024"), (b"a\xffb", "not text"), (b"a\xed\xa0\x80b", "not text")],
    ids=["long", "bytes", "surrogate"],
)
def test_a_bad_turn_is_left_out_and_the_chat_goes_on(tiny, talk, bad, says):
    code, out, err, prompts = talk(tiny, b"x = 1\n" + bad + b"\nz\n", "--json")
    first, second, third = map(json.loads, out.splitlines())
    assert code == 0 and says in second["error"] and "token_ids" not in second
    assert decoded(tiny, prompts) == ["x = 1", "x = 1" + first["text"] + "z"] and len(third["token_ids"]) == 4
    lines = err.splitlines()
    assert len(lines) == 3 and says in lines[1] and REFUSED in lines[1]


def test_a_bad_turn_shows_nothing_on_stdout(tiny, talk):
    code, out, err, _ = talk(tiny, b"a\xffb\nok\n")
    assert code == 0 and out == talk(tiny, b"ok\n")[1] and err.count(REFUSED) == 1


def test_a_turn_that_the_template_refuses_is_left_out(copy, talk):
    template = "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('not that') }}{% endif %}"
    (copy / "chat_template.jinja").write_text(template + "{{ m.content }}{% endfor %}")
    code, _, err, prompts = talk(copy, b"no\nyes\n")
    assert code == 0 and decoded(copy, prompts) == ["yes"] and "not that" in err


def test_a_turn_without_a_prompt_is_left_out(copy, talk):
    (copy / "chat_template.jinja").write_text("{{ messages[-1].content if messages[-1].content != 'x' }}")
    code, _, err, prompts = talk(copy, b"x\ny\n")
    assert code == 0 and decoded(copy, prompts) == ["y"] and "empty prompt" in err


def test_a_byte_order_mark_and_line_ends_are_no_part_of_a_question(tiny, talk):
    code, _, _, prompts = talk(tiny, b"\xef\xbb\xbfdef f\r\n\r\n  \n")
    assert code == 0 and decoded(tiny, prompts) == ["def f"]


def test_a_line_that_does_not_end_is_refused(tiny, talk, monkeypatch):
    monkeypatch.setattr(chat, "LONGEST_LINE", 10)
    code, _, err, prompts = talk(tiny, b"x" * 95 + b"\nshort\n" + b"y" * 50)
    assert code == 0 and decoded(tiny, prompts) == ["short"] and err.count("more than 10 bytes") == 2


def test_the_oldest_turns_go_when_the_context_is_full(tiny, talk):
    system, line = "# keep\n", b"first, second, third, " * 20
    code, out, err, prompts = talk(tiny, (line + b"\n") * 12, "--json", "--system", system)
    turns = [json.loads(said) for said in out.splitlines()]
    assert code == 0 and len(turns) == 12 and not any("error" in turn for turn in turns)
    texts = decoded(tiny, prompts)
    assert all(text.startswith(system + line.decode()) for text in texts)
    assert max(map(len, prompts)) + 4 <= 1024 and "outgrown the context" in err
    asked = [text.count("first, ") // 20 for text in texts]
    assert asked[0] == 1 and asked == sorted(asked) and asked[-1] == asked[-2] < 12
    last = line.decode()
    assert texts[-1].endswith(turns[-2]["text"] + last) and turns[-3]["text"] + last in texts[-1]


def test_a_chat_has_no_added_specials(tiny, copy, talk):
    raw = json.loads((copy / "tokenizer.json").read_text())
    bos = "<|endoftext|>"
    raw["post_processor"] = {
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [0], "tokens": [bos]}},
    }  # fmt: skip
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    (copy / "chat_template.jinja").write_text("{{ eos_token }}{{ messages[0].content }}")
    prompts = talk(copy, b"x\n")[3]
    assert prompts == [[0, *Qwen3.from_pretrained(tiny, device="cpu").text.encode("x")]]
    assert Qwen3.from_pretrained(copy, device="cpu").text.encode("x")[0] == 0


def test_settings_that_no_turn_can_have_end_the_chat(tiny, talk):
    code, out, err, _ = talk(tiny, b"x\ny\n", "--temperature", "-1")
    assert (code, out, err.count("\n")) == (2, "", 1) and "temperature" in err


def test_ctrl_c_ends_an_answer_and_not_the_chat(tiny, talk, monkeypatch):
    states, count = Qwen3.states, iter(range(100))

    def interrupted(self, *args):
        if next(count) == 1:
            raise KeyboardInterrupt
        return states(self, *args)

    monkeypatch.setattr(Qwen3, "states", interrupted)
    code, out, _, prompts = talk(tiny, b"x\ny\n", "--json", "--strategy", "autoregressive")
    first, second = map(json.loads, out.splitlines())
    assert code == 0 and first["stats"]["finish_reason"] == "interrupted" and len(second["token_ids"]) == 4
    assert decoded(tiny, prompts)[1] == "x" + first["text"] + "y"
