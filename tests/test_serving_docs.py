"""What docs/serving.md, docs/grafana.json and the README's section on serving say is what the server does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from chat_cases import TEMPLATES
from forked_worker import ForkedWorker
from serving import ScriptedEngine, Serving
from tiny_folder import write_tiny

from qwen3_model import Qwen3, cli
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.openai.body import BOTH, NEUTRAL, OWN
from qwen3_model.openai.served import Served
from qwen3_model.serve import engine_client
from qwen3_model.serve.engine_client import EngineClient
from qwen3_model.serve.guard import Access
from qwen3_model.serve.limits import Limits
from qwen3_model.serve.messages import EngineOptions, Load
from qwen3_model.serve.metrics import Metrics

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs/serving.md").read_text()
DASHBOARD = json.loads((ROOT / "docs/grafana.json").read_text())
SECTION = (ROOT / "README.md").read_text().partition("\n## Serve\n")[2].partition("\n## ")[0]
(CURL,) = re.findall(r"^    (curl .*)", SECTION, re.M)
(SNIPPET,) = re.findall(r"^```python\n(.*?)^```", SECTION, re.M | re.S)
AT = "http://127.0.0.1:8000"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Aachen"}}\n</tool_call>'
SAID = f"<think>\nhm\n</think>\n\n{CALL}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("serving") / "tiny")


# The README


def test_the_snippet_as_pasted(folder, monkeypatch, capsys):
    """A small model by the embedded one's name."""
    model = Qwen3.from_pretrained(folder, progress=False)
    options = EngineOptions(model=str(folder), device="cpu", slots=2, cache_tokens=1024)
    monkeypatch.setattr(engine_client, "_spawned", ForkedWorker)
    served = Served("embedded", model.config, model.text)
    with Serving(served, lambda: EngineClient.start(options), Limits(), None) as serving:
        exec(compile(SNIPPET.replace(AT, serving.url), "README.md", "exec"), {})
    assert capsys.readouterr().out == _alone(model, SNIPPET, temperature=1.0, seed=7)


def _alone(model: Qwen3, asked: str, **settings) -> str:
    """The text of what the README asks for."""
    prompt = re.findall(r'prompt(?:=|": )"(.*?)"', asked)[0]
    return model.generate(model.text.encode(prompt), max_new_tokens=64, **settings).text


@pytest.mark.slow
def test_curl_and_snippet_at_a_server_of_the_command_line(tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = "import sys; from qwen3_model.cli import main; sys.exit(main())"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}"}
    words = [sys.executable, "-c", command, "serve", "--device", "cpu", "--port", "0"]
    model = Qwen3.from_pretrained(EMBEDDED, "cpu", progress=False)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            url = re.search(r"embedded is served at (\S+) ", server.stdout.readline())[1]
            pasted = CURL.replace(AT, url)
            assert server.stdout.readline() == pasted + "\n"
            said = json.loads(subprocess.check_output(["bash", "-c", pasted], timeout=120))
            assert said["choices"][0]["text"] == _alone(model, CURL)
            told = [sys.executable, "-c", SNIPPET.replace(AT, url)]
            streamed = subprocess.check_output(told, text=True, env=environment, timeout=120)
            assert streamed == _alone(model, SNIPPET, temperature=1.0, seed=7)
        finally:
            server.terminate()
            assert server.wait(60) == 0


# docs/serving.md


def test_the_guides_snippets(folder, tmp_path, capsys):
    """With a template that knows tools and reasoning, and an engine that calls one."""
    copy = write_tiny(tmp_path / "tools")
    (copy / "chat_template.jinja").write_text(TEMPLATES["reasoning"])
    model = Qwen3.from_pretrained(copy, progress=False)
    ids = model.text.encode(SAID)

    def script(spoken):
        spoken.run(ids)
        spoken.run([0])
        spoken.end("end_token")

    async def start():
        engine = ScriptedEngine(script=script)
        engine.ready = replace(engine.ready, longest=4096, cache_tokens=8192)
        return engine

    config = replace(model.config, eos_token_ids=(0,), max_position_embeddings=4096)
    names: dict = {}
    with Serving(Served("tiny", config, model.text), start, Limits(), None) as serving:
        for snippet in re.findall(r"^```python\n(.*?)^```", GUIDE, re.M | re.S):
            exec(compile(snippet.replace(AT, serving.url), "docs/serving.md", "exec"), names)
    out = capsys.readouterr().out
    assert "CompletionUsage(" in out and "\nhm\n" in out and 'weather {"place": "Aachen"}' in out


def test_every_field_is_told():
    table = GUIDE.partition("\n## Fields\n")[2].partition("\nRefused unless")[0]
    refused = GUIDE.partition("\nRefused unless")[2].partition("\n\n")[0]
    for name in {*BOTH, *(name for names in OWN.values() for name in names)}:
        assert re.search(rf"^\| [^|]*`{name}`", table, re.M), name
    for name in NEUTRAL:
        assert f"`{name}`" in table + refused, name


def test_the_proxy_and_the_unit():
    (unit,) = re.findall(r"^```ini\n(.*?)^```", GUIDE, re.M | re.S)
    settings = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line)
    args = cli._parser().parse_args(settings["ExecStart"].split()[1:])
    assert args.grace < float(settings["TimeoutStopSec"])
    (host,) = re.findall(r"proxy_set_header Host (\S+);", GUIDE)
    assert Access.at("127.0.0.1").takes_host(host)
    (size,) = re.findall(r"client_max_body_size (\d+)m;", GUIDE)
    assert int(size) * 2**20 == Limits().body_bytes


# Metrics


def told(text: str) -> set[str]:
    """The metrics that a text names, a histogram by its own name."""
    return {re.sub("_(bucket|sum|count)$", "", name) for name in re.findall(r"\borthrus_[a-z_]+", text)}


def test_the_metrics_are_those_of_the_server():
    exposed = Metrics(lambda: Load()).text().decode()
    there = {name for name in re.findall(r"^# TYPE (\S+)", exposed, re.M) if not name.endswith("_created")}
    assert len(there) > 10
    assert told(GUIDE.partition("\n## Metrics\n")[2]) == there
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert set().union(*map(told, expressions)) == there


def test_the_dashboard_is_one():
    """Of Grafana 11: a data source to choose, and panels beside each other."""
    assert DASHBOARD["schemaVersion"] == 39
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    covered = Counter[tuple[int, int]]()
    for panel in DASHBOARD["panels"]:
        x, y, w, h = (panel["gridPos"][side] for side in "xywh")
        assert x + w <= 24, panel["title"]
        covered.update((i, j) for i in range(x, x + w) for j in range(y, y + h))
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}
        named = set(re.findall(r"\$(\w+)", json.dumps(panel))) - {"__rate_interval"}
        assert named <= set(variables), panel["title"]
    assert set(covered.values()) == {1}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
