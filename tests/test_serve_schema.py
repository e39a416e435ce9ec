"""Requests that schemathesis makes of the server's own OpenAPI: none fails it, and every answer has its form.
`make test-slow`."""

from __future__ import annotations

import json

import httpx
import hypothesis
import pytest
from hypothesis import strategies as st
from serving import ScriptedEngine, Serving
from tiny_folder import write_tiny

from qwen3_model.config import Qwen3Config
from qwen3_model.openai.body import BOTH, CHAT, COMPLETIONS, NEUTRAL, OWN
from qwen3_model.openai.served import Served
from qwen3_model.serve.limits import Limits
from qwen3_model.text import Text

schemathesis = pytest.importorskip("schemathesis")

EXAMPLES = 60  # of an operation


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    folder = write_tiny(tmp_path_factory.mktemp("schema") / "tiny")

    def script(text):
        text.run([5] * text.request.max_new_tokens)
        text.end("length")

    async def start():
        return ScriptedEngine(slots=500, script=script)

    served = Served("tiny", Qwen3Config.from_folder(folder), Text(folder))
    with Serving(served, start, Limits(), None) as serving:
        yield serving


def checked(status, body, path):
    """The status of an answer, whose form is looked at: JSON, and OpenAI's where it is an error."""
    assert status != 500, body
    if status >= 400 and path not in ("/health", "/ready"):
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return status


@pytest.mark.slow
def test_requests_of_our_own_openapi(serving):
    schema = schemathesis.openapi.from_url(f"{serving.url}/openapi.json")
    found, asked = [], set()
    for operation in schema.get_all_operations():
        operation = operation.ok()
        asked.add(operation.label)

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(max_examples=EXAMPLES, deadline=None, database=None)
        def ask(case):
            answer = case.call(timeout=20)
            found.append(checked(answer.status_code, answer.content, case.path))

        ask()
    assert "POST /v1/chat/completions" in asked and {200, 400} <= set(found)
    print(f"\n{len(found)} requests of {len(asked)} operations: {sorted(set(found))}")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 600) | st.floats(-3, 3) | st.text(max_size=9)
    | st.sampled_from([2**63, 2**64, "auto", "user", "tool", "\ud800", "text", 1e300, -1]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "type", "function", "name", "text", "7"]), inner),
    max_leaves=8,
)  # fmt: skip
GOOD = {"prompt": "def add(first", "messages": [{"role": "user", "content": "add"}]}


@pytest.mark.slow
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_any_value_of_any_field(serving, path):
    """And answers that stream are whole."""
    found = {}

    @hypothesis.given(st.dictionaries(st.sampled_from([*BOTH, *OWN[path], *NEUTRAL]), VALUES, max_size=3))
    @hypothesis.settings(max_examples=700, deadline=None, database=None)
    def ask(fields):
        body = {name: GOOD[name] for name in OWN[path] if name in GOOD} | fields
        headers = {"content-type": "application/json"}
        answer = http.post(serving.url + path, content=json.dumps(body).encode(), headers=headers)
        status = checked(answer.status_code, answer.content, path)
        found[status] = found.get(status, 0) + 1
        if answer.headers["content-type"].startswith("text/event-stream"):
            assert answer.content.endswith(b"data: [DONE]\n\n"), answer.content

    with httpx.Client(timeout=20) as http:
        ask()
    print(f"\n{found}")
    assert found[200] > 5 and found[400] > 100
