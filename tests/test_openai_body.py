"""Bodies of requests: every field is applied or refused by its name; answers are what `generate` gives."""

from __future__ import annotations

import json
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
from chat_cases import TEMPLATES
from tiny_folder import write_tiny

from qwen3_model import InputError, Qwen3, Request
from qwen3_model.decode.sequence import GenerationStats, Result
from qwen3_model.openai import answer, body
from qwen3_model.openai.body import CHAT, COMPLETIONS, Served, read
from qwen3_model.openai.refusal import FieldError
from qwen3_model.openai.served import recommended
from qwen3_model.openai.strict_json import DEEPEST, parse
from qwen3_model.openai.tokenize import tokenized
from qwen3_model.text import Text

HELLO = [{"role": "user", "content": "def add(first"}]


def function(**given):
    return {"type": "function", "function": {"name": "weather"} | given}


TOOL = function(parameters={"type": "object", "properties": {"city": {"type": "string"}}})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Qwen3.from_pretrained(write_tiny(tmp_path_factory.mktemp("openai") / "tiny"), progress=False)


@pytest.fixture(scope="module")
def served(model):
    return Served("tiny", model.config, model.text)


def completion(served, **given):
    return read(served, COMPLETIONS, {"prompt": "def add(first"} | given)


def chat(served, **given):
    return read(served, CHAT, {"messages": HELLO} | given)


def answered(model, served, asked):
    """The answer, each choice decoded alone."""
    results = [model.engine.generate(prompt, request) for prompt, request in asked.jobs()]
    return answer.answer(served, asked, results), results


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({}, {"temperature": 1.0, "max_new_tokens": 16}),
        ({"temperature": None, "max_tokens": None, "stop": None}, {"temperature": 1.0, "max_new_tokens": 16}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_k": 5}, {"top_k": 5}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"min_p": 0.1}, {"min_p": 0.1}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        (
            {"presence_penalty": 2, "frequency_penalty": -2.0},
            {"presence_penalty": 2.0, "frequency_penalty": -2.0},
        ),
        ({"logit_bias": {"7": -100, "9": 2.5}}, {"logit_bias": {7: -100.0, 9: 2.5}}),
        ({"max_tokens": 3}, {"max_new_tokens": 3}),
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop_token_ids": [7, 7, 9], "ignore_eos": True}, {"stop_token_ids": (7, 9), "ignore_eos": True}),
        ({"stop": ["x", "yz"]}, {"stop": ("x", "yz")}),
        ({"seed": 12}, {"seed": 12}),
        ({"min_tokens": 16}, {"min_tokens": 16}),
        ({"cache_salt": "mine"}, {"cache_salt": "mine"}),
        ({"strategy": "one-pass", "block_size": 4}, {"strategy": "one-pass", "block_size": 4}),
        ({"tree_nodes": "auto"}, {"tree_nodes": "auto"}),
        ({"tree_nodes": 7}, {"tree_nodes": 7}),
        ({"user": "me", "model": "tiny", "stream": False, "best_of": 1}, {}),
    ],
)
def test_a_field_is_applied(served, given, setting):
    request = completion(served, **given).request
    assert {name: getattr(request, name) for name in setting} == setting
    assert request.seed is not None


def test_every_setting_is_there_for_requests():
    """But for those that have OpenAI's names, as what makes a grammar, and rejection sampling, which runs
    alone."""
    declared = {field.name for field in fields(Request)}
    assert declared - {"max_new_tokens", "top_logprobs", "verify", "grammar"} == set(body.SETTINGS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"), ("temperature", -1), ("temperature", True), ("top_p", 0), ("top_k", 1.5),
        ("top_k", -2), ("min_p", 2), ("repetition_penalty", 0), ("max_tokens", 0), ("max_tokens", "5"),
        ("max_tokens", 5000), ("max_tokens", 2**40), ("stop", ""), ("stop", ["a"] * 5), ("stop", {"a": 1}),
        ("stop", 5), ("stop", ["x" * 1001]), ("stop", [1]), ("n", 0), ("n", 129), ("n", True), ("seed", -1),
        ("seed", 2**64), ("seed", 1.5), ("logprobs", 21), ("logprobs", -1), ("logprobs", True),
        ("logprobs", 1.0), ("top_logprobs", 5), ("logit_bias", [1]),
        ("logit_bias", {"x": 1}), ("logit_bias", {" 1": 1}), ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": True}), ("logit_bias", {"300": 1}),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("strategy", "magic"), ("strategy", 1), ("tree_nodes", 256), ("block_size", 99), ("model", "gpt"),
        ("user", 5), ("presence_penalty", 2.5), ("presence_penalty", False), ("frequency_penalty", -2.01),
        ("stream", True), ("stream", 0), ("echo", True), ("best_of", 2), ("suffix", "x"),
        ("response_format", {"type": "object"}), ("tools", [{}]), ("verify", "rejection"),
        ("max_new_tokens", 5), ("messages", HELLO), ("max_completion_tokens", 5), ("ignore_eos", 1),
        ("stop_token_ids", 5), ("stop_token_ids", list(range(17))), ("stop_token_ids", [300]),
        ("stop_token_ids", [True]),
        ("cache_salt", 5), ("min_tokens", -1), ("min_tokens", 17), ("min_tokens", 5000),
        ("prompt", ""), ("prompt", []), ("prompt", [[]]), ("prompt", [1, "a"]), ("prompt", ["a", 1]),
        ("prompt", 5), ("prompt", [300]), ("prompt", [1, True]), ("prompt", "\ud800"), ("prompt", None),
        ("prompt", [1] * 1024), ("prompt", ["a"] * 257), ("prompt", [[1], [10**30]]),
    ],
)  # fmt: skip
def test_a_field_is_refused_by_its_name(served, field, value):
    with pytest.raises(FieldError, match=field) as refused:
        completion(served, **{field: value})
    assert refused.value.field == field and "\n" not in str(refused.value)
    said = answer.refused(refused.value)["error"]
    assert said["param"] == field and said["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("messages", None, "missing"), ("messages", [], "at least one"), ("messages", ["x"], "an object"),
        ("messages", [{"role": "critic", "content": "x"}], "role"),
        ("messages", [{"role": "tool", "content": "x"}], "tool_call_id"),
        ("messages", [{"role": "tool", "content": "x", "tool_call_id": "c"}], "knows no tools"),
        ("messages", [{"role": "user"}], "content"),
        ("messages", [{"role": "user", "content": "x", "name": "me"}], "name"),
        ("messages", [{"role": "user", "content": "x", "tool_calls": [{}]}], "tool_calls"),
        ("messages", [{"role": "user", "content": "x", "reasoning_content": "y"}], "of user"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "image_url"),
        ("messages", [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}], "no other"),
        ("messages", [{"role": "user", "content": "é" * 2000}], "the context only 1024"),
        ("messages", [{"role": "user", "content": "\ud800"}], "surrogate"),
        ("chat_template_kwargs", [], "an object"),
        ("chat_template_kwargs", {"chat_template": "x"}, "cannot set chat_template"),
        ("chat_template_kwargs", {"tokenizer": "x"}, "cannot set tokenizer"),
        ("chat_template_kwargs", {"messages": []}, "cannot set messages"),
        ("chat_template_kwargs", {"thinking": True}, "use enable_thinking"),
        ("chat_template_kwargs", {"eos_token": "x"}, "belongs to the template"),
        ("top_logprobs", 3, "needs logprobs true"), ("top_logprobs", 21, "0 to 20"),
        ("top_logprobs", True, "0 to 20"), ("top_logprobs", "3", "0 to 20"), ("logprobs", 0, "true or false"),
        ("prompt", "x", "not a field"),
        ("max_completion_tokens", 0, "from 1"), ("tool_choice", "auto", "no tools"),
        ("tool_choice", "required", "no tools"),
        ("tool_choice", {"type": "function"}, "auto, none, required or"),
        ("tools", [TOOL], "knows no tools"), ("tools", {}, "a list"), ("tools", [{}], "type"),
        ("tools", [TOOL | {"x": 1}], "type"), ("tools", [function(name="a b")], "name"),
        ("tools", [function(strict=True)], "strict"), ("tools", [function(parameters=[])], "schema"),
        ("tools", [function(description=1)], "description"), ("tools", [function(x=1)], "unknown"),
        ("stream_options", {"include_usage": True}, "stream true"), ("parallel_tool_calls", False, "not"),
    ],
)  # fmt: skip
def test_a_field_of_a_chat_is_refused_by_its_name(served, field, value, words):
    with pytest.raises(FieldError, match=words) as refused:
        chat(served, **{field: value})
    assert refused.value.field == field


def test_what_is_no_request(served):
    for url, given in (("/v1/embeddings", {}), (None, {}), (["x"], {}), (CHAT, []), (CHAT, None)):
        with pytest.raises(InputError, match=r"url|body"):
            read(served, url, given)


def test_the_name_of_an_unknown_field_is_told_in_part(served):
    with pytest.raises(FieldError, match="not known") as refused:
        completion(served, **{"x" * 10_000 + "y": 1})
    told = answer.refused(refused.value)["error"]
    assert len(told["param"]) <= 80 and told["param"].startswith("xxx") and told["param"].endswith("xy")
    assert len(told["message"]) < 500


def test_a_text_that_no_context_holds_costs_no_tokenizing(served, monkeypatch):
    """Neither a prompt, nor one of several, nor a conversation, and for /tokenize as little."""
    most = served.text.longest_token * served.context
    with pytest.raises(FieldError, match="tokens and the context only 1024"):
        completion(served, prompt="é" * (most // 2))
    monkeypatch.setattr(served.text, "_tokenizer", None)
    long = "é" * (most // 2 + 1)
    said = f"bytes; the context of 1024 tokens holds at most {most}"
    for prompt in (long, [long, "x"]):
        with pytest.raises(FieldError, match=said):
            completion(served, prompt=prompt)
    told = [{"role": "user", "content": long}]
    with pytest.raises(FieldError, match=said):
        chat(served, messages=told)
    for given in ({"prompt": long}, {"messages": told}):
        with pytest.raises(FieldError, match=said):
            tokenized(served, given)


def test_the_longest_token_of_a_vocabulary(served, tmp_path):
    text = served.text
    tokens = text._tokenizer.get_vocab_size()
    longest = max(len(text.decode([token]).encode()) for token in range(tokens))
    assert text.longest_token == max(longest, len("<|endoftext|>"))
    folder = write_tiny(tmp_path / "tiny")
    file = folder / "tokenizer.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"normalizer": {"type": "NFC"}}))
    assert Text(folder).longest_token == 3 * text.longest_token, "what is composed was longer"
    added = "語" * 20
    (folder / "added_tokens.json").write_text(json.dumps({added: tokens}))
    assert Text(folder).longest_token == 3 * 60 and Text(folder).encode(added * 1000, context=1000)


def test_two_names_of_one_length(served):
    asked = chat(served, max_tokens=4, max_completion_tokens=4)
    assert asked.request.max_new_tokens == 4 and chat(served).request.max_new_tokens == 1021
    with pytest.raises(FieldError, match="differ"):
        chat(served, max_tokens=4, max_completion_tokens=5)


def test_a_completion_that_does_not_say_how_long_ends_with_the_context(served):
    assert completion(served, prompt=[1] * 1020).request.max_new_tokens == 4


def test_prompts_of_every_form(model, served):
    ids = model.text.encode("def add(first")
    assert completion(served).prompts == completion(served, prompt=ids).prompts == [ids]
    assert completion(served, prompt=["def add(first", "x"]).prompts == [ids, model.text.encode("x")]
    assert completion(served, prompt=[[1, 2], [3]]).prompts == [[1, 2], [3]]


def test_a_conversation_is_the_templates(model, served):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(served, messages=[{"role": "system", "content": "s"}, {"role": "user", "content": parts}])
    whole = [{"role": "system", "content": "s"}, {"role": "user", "content": "a\nb"}]
    assert asked.prompts == [model.text.encode(model.text.chat(whole), added_specials=False)]


def test_names_go_to_the_template(served, monkeypatch):
    seen = {}
    monkeypatch.setattr(type(served.text), "chat", lambda self, m, **names: seen.update(names) or "x")
    chat(served, chat_template_kwargs={"enable_thinking": False})
    assert seen == {"enable_thinking": False}


def test_choices_are_their_prompts_with_the_next_seeds(model, served):
    asked = completion(served, prompt=["def add(first", "return"], n=2, seed=2**64 - 4, max_tokens=5)
    told, results = answered(model, served, asked)
    for i, choice in enumerate(told["choices"]):
        alone = model.generate(asked.prompts[i // 2], max_new_tokens=5, temperature=1.0, seed=2**64 - 4 + i)
        assert choice["index"] == i and choice["text"] == alone.text == results[i].text
    with pytest.raises(FieldError, match="seed"):
        completion(served, prompt=["def add(first", "return"], n=2, seed=2**64 - 3)


def test_a_seed_is_drawn_and_repeats_the_answer(model, served):
    drawn = {completion(served).request.seed for _ in range(4)}
    assert len(drawn) > 1
    first, _ = answered(model, served, chat(served, max_tokens=9))
    again, _ = answered(model, served, chat(served, max_tokens=9, seed=first["seed"]))
    assert [c["message"]["content"] for c in first["choices"]] == [
        c["message"]["content"] for c in again["choices"]
    ]


def test_a_completion_has_openais_form(model, served):
    asked = completion(served, max_tokens=30, logprobs=0, seed=1, strategy="two-pass", tree_nodes=6)
    told, (result,) = answered(model, served, asked)
    assert told["object"] == "text_completion" and told["id"].startswith("cmpl-") and told["model"] == "tiny"
    (choice,) = told["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == result.logprobs and choice["finish_reason"] == "length"
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == 30
    assert logprobs["text_offset"][0] == 0 and sorted(logprobs["text_offset"]) == logprobs["text_offset"]
    usage, stats = told["usage"], result.stats
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(asked.prompts[0]), 30)
    assert usage["total_tokens"] == len(asked.prompts[0]) + 30
    details = usage["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == stats.cycle_tokens - stats.cycles > 0
    assert sum(details.values()) == stats.nodes
    json.dumps(told, allow_nan=False)


def test_a_chat_has_openais_form(model, served):
    told, (result,) = answered(model, served, chat(served, max_tokens=8, logprobs=True, temperature=0))
    (choice,) = told["choices"]
    assert told["object"] == "chat.completion" and told["id"].startswith("chatcmpl-")
    assert choice["message"] == {"role": "assistant", "content": result.text, "refusal": None}
    found = choice["logprobs"]["content"]
    assert [token["logprob"] for token in found] == result.logprobs
    assert all(t["bytes"] is None or bytes(t["bytes"]).decode() == t["token"] for t in found)
    assert chat(served).logprobs is False and chat(served, n=2).n == 2


@pytest.mark.parametrize(
    "given", [{"top_logprobs": 0}, {"logprobs": False}, {"logprobs": True, "top_logprobs": 0}]
)
def test_who_asks_for_no_likeliest_tokens_pays_for_none(served, given):
    assert (
        chat(served, **given).request.top_logprobs == completion(served, logprobs=0).request.top_logprobs == 0
    )


def likeliest_of(model, asked):
    """The one choice's likeliest tokens as `generate` tells them: their names and log-probabilities."""
    ((prompt, request),) = asked.jobs()
    alone = model.engine.generate(prompt, request)
    assert request.top_logprobs and len(alone.top_logprobs) == len(alone.token_ids)
    return alone, [[(answer.piece(model.text, t), p) for t, p in told] for told in alone.top_logprobs]


def test_a_chat_tells_the_likeliest_tokens(model, served):
    asked = chat(served, max_tokens=8, logprobs=True, top_logprobs=20, seed=3)
    told, _ = answered(model, served, asked)
    found = told["choices"][0]["logprobs"]["content"]
    _, wanted = likeliest_of(model, asked)
    assert [[(one["token"], one["logprob"]) for one in place["top_logprobs"]] for place in found] == wanted
    for one in [one for place in found for one in place["top_logprobs"]]:
        assert bytes(one["bytes"]).decode() == one["token"] if one["bytes"] else "\ufffd" in one["token"]


def test_a_completion_tells_the_likeliest_tokens_by_their_text(model, served):
    asked = completion(served, max_tokens=8, logprobs=20, seed=3)
    told, _ = answered(model, served, asked)
    found = told["choices"][0]["logprobs"]
    alone, wanted = likeliest_of(model, asked)
    assert any(len(dict(place)) < len(place) for place in wanted), "some have the same text"
    for own, logprob, place, names in zip(
        found["tokens"], alone.logprobs, found["top_logprobs"], wanted, strict=True
    ):
        assert place == dict(reversed([(own, logprob), *names])), "the chosen one, then the likeliest"
    assert any(own not in dict(names) for own, names in zip(found["tokens"], wanted, strict=True))


def test_the_end_has_openais_word(model, served):
    whole = completion(served, max_tokens=40, seed=1)
    _, (result,) = answered(model, served, whole)
    stop = result.text[8:11]
    told, _ = answered(model, served, completion(served, max_tokens=40, seed=1, stop=[stop]))
    (choice,) = told["choices"]
    assert choice["finish_reason"] == "stop" and choice["text"] == result.text[: result.text.find(stop)]
    assert answer.REASONS["end_token"] == "stop"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": NaN}', "NaN"), (b'{"a": -Infinity}', "Infinity"), (b'{"a": 1e999}', "past what"),
        (b'{"a": 1, "a": 1}', "twice"), (b'{"a": {"b": 1, "b": 2}}', "twice"), (b'{"a": "\xff"}', "utf-8"),
        (b"[" * 100000, "deeper"), (b"[" * 66 + b"]" * 66, "deeper"),
        (b'{"a":' * 66 + b"1" + b"}" * 66, "deeper"),
        (b"1" * 5000, "not JSON"), (b"{'a': 1}", "not JSON"), (b"{} {}", "not JSON"), (b"", "not JSON"),
    ],
)  # fmt: skip
def test_json_is_read_strictly(text, words):
    with pytest.raises(InputError, match=words) as refused:
        parse(text, "line 7")
    assert str(refused.value).startswith("line 7 ")


def test_many_names_are_looked_through_once():
    """Of a body of 1 MB; comparing each name with all before it took minutes."""
    names = ",".join(f'"{n}": 1' for n in (*range(100_000), 99_999))
    began = time.perf_counter()
    with pytest.raises(InputError, match="'99999' stands in an object twice"):
        parse(f"{{{names}}}".encode(), "it")
    assert time.perf_counter() - began < 10


def test_json_that_nests_as_deep_as_it_may():
    assert parse(b"[" * DEEPEST + b"]" * DEEPEST, "it") and parse(b'{"a": [1.5, "\\u00e9"]}', "it")


GENERATION = {
    "do_sample": False,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": None,
    "eos_token_id": 0,
}


@pytest.fixture
def generation(tmp_path):
    def made(**changes):
        (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION | changes))
        return recommended(tmp_path)

    return made


def test_the_checkpoints_settings_are_defaults(served, generation):
    assert recommended(Path("nowhere")) == {}
    found = generation(repetition_penalty=1.1)
    assert found == {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}
    there = replace(served, defaults=found)
    request = completion(there, top_k=-1, temperature=None).request
    assert (request.temperature, request.top_k, request.top_p) == (0.6, 0, 0.95)
    assert request.repetition_penalty == 1.1 and completion(there, temperature=0).request.temperature == 0.0


@pytest.mark.parametrize("changes", [{"temperature": "hot"}, {"top_p": 2}, {"top_k": [1]}, {"min_p": True}])
def test_settings_of_a_checkpoint_that_are_none(generation, changes):
    with pytest.raises(InputError, match=r"generation_config.json: .*--generation-config none"):
        generation(**changes)


def test_a_stream_is_for_those_who_can_send_one(served):
    def asked(**given):
        return read(served, CHAT, {"messages": HELLO} | given, streams=True)

    assert asked(stream=True).stream and not asked().stream and not asked(stream=True).include_usage
    assert asked(stream=True, stream_options={"include_usage": True}).include_usage
    both = asked(stream=True, stream_options={"include_usage": None, "include_runs": True})
    assert both.include_runs and not both.include_usage and not asked(stream=True).include_runs
    for options in ([], {"include_usage": 1}, {"include_runs": "yes"}, {"include_obfuscation": False}):
        with pytest.raises(FieldError, match="stream_options"):
            asked(stream=True, stream_options=options)
    with pytest.raises(FieldError, match="stream"):
        asked(stream=1)


def test_the_engine_may_have_less_than_the_context(served):
    small = replace(served, longest=100)
    assert chat(small).request.max_new_tokens == 97
    with pytest.raises(FieldError, match="context of 100"):
        chat(small, max_tokens=98)


@pytest.fixture(scope="module")
def with_tools(served, tmp_path_factory):
    """The checkpoint with a template as Qwen3's, and a Text that says what was rendered."""
    folder = write_tiny(tmp_path_factory.mktemp("tools") / "tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATES["reasoning"])
    return replace(served, text=Text(folder))


def rendered(monkeypatch, served, **given):
    """What the template makes of a chat, and what is asked for."""
    seen, chat_of = [], type(served.text).chat
    monkeypatch.setattr(
        type(served.text), "chat", lambda *args, **names: seen.append(chat_of(*args, **names)) or seen[-1]
    )
    asked = chat(served, **given)
    return seen[-1], asked


def test_tools_are_shown_and_told(with_tools, monkeypatch):
    said, asked = rendered(monkeypatch, with_tools, tools=[TOOL])
    assert '"name": "weather"' in said and asked.tools
    said, asked = rendered(monkeypatch, with_tools, tools=[TOOL], tool_choice="none")
    assert "weather" not in said and not asked.tools
    assert not chat(with_tools, tools=[], tool_choice="none").tools
    calls = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "x"}'}}]
    told = [
        *HELLO,
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": calls},
        {"role": "tool", "content": "sun", "tool_call_id": "c1"},
    ]
    said, _ = rendered(monkeypatch, with_tools, messages=told)
    assert '"city": "x"' in said and "sun" in said


@pytest.mark.parametrize("calls", [[], [{}], [1], "x", [{"id": "c", "function": {"name": "f"}}],
                                   [{"id": "c", "function": {"name": "f", "arguments": "[]"}}],
                                   [{"id": "c", "function": {"name": "f", "arguments": "{"}}]])  # fmt: skip
def test_calls_that_are_none(with_tools, calls):
    with pytest.raises(FieldError, match="messages"):
        chat(with_tools, messages=[*HELLO, {"role": "assistant", "tool_calls": calls}])


def test_an_answer_that_thinks_and_calls(with_tools):
    asked = chat(with_tools, tools=[TOOL])
    text = '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"a": 1}}\n</tool_call>'
    stats = GenerationStats("auto", 1, finish_reason="end_token", cached_tokens=2)
    told = answer.answer(replace(with_tools, fingerprint="f1"), asked, [Result([5], text, [0.0], stats)])
    (choice,) = told["choices"]
    (call,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {
        "role": "assistant", "content": None, "refusal": None, "reasoning_content": "hm",
    }  # fmt: skip
    assert call["function"] == {"name": "weather", "arguments": '{"a": 1}'} and call["id"].startswith("call_")
    assert choice["finish_reason"] == "tool_calls" and told["system_fingerprint"] == "f1"
    assert told["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert answer.finish_reason("length", True) == "length"
