"""Structured answers of the server and of batch files: what `response_format` and a forced `tool_choice` ask
for is what comes, and it is what `generate` gives with the same grammar. The rest is refused by name."""

from __future__ import annotations

import json

import jsonschema
import openai
import pytest
from chat_cases import TEMPLATES
from serving import with_engine
from tiny_folder import write_tiny

from qwen3_model import Grammar, Qwen3, cli
from qwen3_model.openai.body import CHAT, COMPLETIONS, read
from qwen3_model.openai.refusal import FieldError
from qwen3_model.openai.served import Served
from qwen3_model.serve.limits import Limits
from qwen3_model.serve.messages import EngineOptions

pytest.importorskip("llguidance", reason="grammars need llguidance")

HELLO = [{"role": "user", "content": "def add(first"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"], "additionalProperties": False,
}  # fmt: skip
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


def tool(name="pick", **given):
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA} | given}


def of_schema(**given):
    return {"response_format": {"type": "json_schema", "json_schema": given}}


NAMED = {"type": "function", "function": {"name": "other"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_tiny(tmp_path_factory.mktemp("structured") / "tiny", eos_token_ids=(0,))
    (folder / "chat_template.jinja").write_text(TEMPLATES["reasoning"])
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return Qwen3.from_pretrained(folder, progress=False)


@pytest.fixture(scope="module")
def served(model):
    return Served("tiny", model.config, model.text)


@pytest.fixture(scope="module")
def client(served, folder):
    """Of a server with a real engine."""
    options = EngineOptions(model=str(folder), device="cpu", slots=4, cache_tokens=2048)
    with with_engine(served, options, Limits()) as serving:
        yield openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0)


def grammar_asked(served, **given):
    return read(served, CHAT, {"messages": HELLO} | given).request.grammar


def test_answers_fit_their_schema_and_are_those_of_generate(client, served, model):
    asked = {
        "model": "tiny",
        "messages": HELLO,
        "response_format": FORMAT,
        "seed": 3,
        "max_tokens": 60,
        "n": 3,
    }
    choices = client.chat.completions.create(**asked).choices
    jobs = read(served, CHAT, asked).jobs()
    for choice, (prompt, request) in zip(choices, jobs, strict=True):
        alone = model.engine.generate(prompt, request)
        assert choice.message.content == alone.text and choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    chunks = client.chat.completions.create(**asked | {"n": 1}, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choices[0].message.content
    free = client.completions.create(
        model="tiny", prompt="def add(first", max_tokens=60, seed=3,
        extra_body={"response_format": {"type": "json_object"}, "strategy": "one-pass", "tree_nodes": 3},
    ).choices[0]  # fmt: skip
    assert free.text.startswith("{") and (
        free.finish_reason == "length" or isinstance(json.loads(free.text), dict)
    )


@pytest.mark.parametrize("choice", ["required", NAMED], ids=str)
def test_a_call_that_is_forced_is_made(client, choice):
    tools = [tool(), tool("other", strict=True)]
    asked = {
        "model": "tiny",
        "messages": HELLO,
        "tools": tools,
        "tool_choice": choice,
        "seed": 5,
        "max_tokens": 140,
    }
    (answer,) = client.chat.completions.create(**asked).choices
    calls = answer.message.tool_calls
    assert calls and (answer.finish_reason == "length" or answer.message.content is None)
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    names = {call.function.name for call in calls}
    assert names == {"other"} and len(calls) == 1 if choice is NAMED else names <= {"pick", "other"}


def test_what_grammar_is_asked_for(served):
    assert grammar_asked(served) is grammar_asked(served, response_format={"type": "text"}) is None
    assert grammar_asked(served, response_format={"type": "json_object"}) == Grammar.json_object()
    assert grammar_asked(served, response_format=FORMAT) == Grammar.json_schema(SCHEMA)
    both = [("pick", SCHEMA), ("other", SCHEMA)]
    forced = {"tools": [tool(), tool("other")]}
    assert grammar_asked(served, **forced, tool_choice="required") == Grammar.calls(both, several=True)
    assert grammar_asked(served, **forced, tool_choice=NAMED) == Grammar.calls(both[1:], several=False)
    assert grammar_asked(served, **forced) is grammar_asked(served, **forced, tool_choice="none") is None
    bare = grammar_asked(
        served, tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="required"
    )
    assert '"properties": {}, "additionalProperties": false' in bare.lark


def test_reasoning_that_has_begun_goes_on_in_front(served, model, monkeypatch):
    """Until it ends; then the answer keeps to its schema."""
    monkeypatch.setattr("qwen3_model.openai.body.conversation_prompt", lambda *given: ([5, 6, 7], True))
    grammar = grammar_asked(served, response_format=FORMAT)
    assert grammar == Grammar.json_schema(SCHEMA).behind_thought()
    matcher = model.grammars.matcher(grammar)
    matcher.begin(model.text.encode('so {"ok" it is</think>\n\n{"ok": true, "n": 7}'), 0)
    assert not matcher.failed
    matcher.begin(model.text.encode("so</think>\n\nno"), 0)
    assert matcher.failed


@pytest.mark.parametrize(
    ("field", "given", "said"),
    [
        ("response_format", {"response_format": {"type": "xml"}}, "text, json_object, json_schema"),
        ("response_format", {"response_format": "json_object"}, "an object with a type"),
        ("response_format", {"response_format": {"type": "text", "x": 1}}, "unknown field 'x'"),
        ("response_format", {"response_format": {"type": "json_schema"}}, "name and schema"),
        ("response_format", of_schema(schema={}), "the name"),
        ("response_format", of_schema(name="x", schema=[]), "an object"),
        ("response_format", of_schema(name="x", schema={"uniqueItems": True}), r'keys: \["uniqueItems"\]'),
        ("response_format", {"response_format": FORMAT, "tools": [tool()]}, "use tool_choice none"),
        ("min_tokens", {"response_format": FORMAT, "min_tokens": 5}, "takes 0"),
        ("ignore_eos", {"response_format": FORMAT, "ignore_eos": True}, "ends with an end token"),
        ("tool_choice", {"tool_choice": "required"}, "there are no tools"),
        ("tool_choice", {"tool_choice": "any", "tools": [tool()]}, "auto, none, required or"),
        ("tool_choice", {"tool_choice": NAMED, "tools": [tool()]}, "which is none"),
        ("tools", {"tool_choice": NAMED, "tools": [tool("other"), tool("other")]}, "two tools"),
        ("tools", {"tool_choice": "required", "tools": [tool(parameters={"type": "array"})]}, "type object"),
        ("tools", {"tools": [tool(strict=True)]}, "that tool_choice forces"),
        ("tools", {"tools": [tool(parameters={"not": {}})], "tool_choice": "required"}, "Unimplemented"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_by_its_field(served, field, given, said):
    with pytest.raises(FieldError, match=said) as refused:
        grammar_asked(served, **given)
    assert refused.value.field == field and "\n" not in str(refused.value)


def test_a_line_of_a_batch(folder, tmp_path, capsys):
    given, told = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    schemas = SCHEMA, {"type": "array", "uniqueItems": True}
    lines = [
        {"custom_id": str(nth), "method": "POST", "url": COMPLETIONS,
         "body": {"prompt": "def", "max_tokens": 60, "seed": 1, "response_format": {
             "type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}}
        for nth, schema in enumerate(schemas)
    ]  # fmt: skip
    given.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cli.main(["batch", str(given), str(told), "--model", str(folder), "--device", "cpu", "--ordered"])
    first, second = (json.loads(line)["response"] for line in told.read_text().splitlines())
    jsonschema.validate(json.loads(first["body"]["choices"][0]["text"]), SCHEMA)
    assert second["status_code"] == 400 and second["body"]["error"]["param"] == "response_format"
