"""What the README tells a newcomer to type works as it stands there."""

import io
import json
import re
import shlex
from pathlib import Path

import pytest

from qwen3_model.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    (orthrus [^#\n]*)", README, re.M)
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.stdin", io.StringIO("def f(x):\n"))
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_python_snippets(snippet, capsys):
    exec(compile(snippet, "README.md", "exec"), {})
    assert re.search(r"^\d\.\d+ \[", capsys.readouterr().out, re.M), "statistics after the text"


def test_what_it_links_to_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    for link in links:
        assert link.startswith("http") or (ROOT / link).exists(), link
    assert {"docs/demo.svg", "docs/mask.svg", "docs/speed.svg"} <= set(links)
    assert len(README.splitlines()) <= 200, "detail goes to docs/"


def test_the_times_are_those_of_the_record():
    """The table of times and its picture come of one run of each kind (bench/results)."""
    folder, models = ROOT / "bench/results", ("8B", "4B", "1.7B", "0.6B")
    run, peers, h200 = (
        json.loads((folder / f"decode{of}.json").read_text()) for of in ("-h100", "-peers-h100", "-h200")
    )
    ours, beside, there = (
        {p["model"]: p for p in found["passes"] if (p["pass"], p["context"]) == ("token", 1024)}
        for found in (run, peers, h200)
    )
    theirs = {p["model"]: p["us"]["median"] for p in peers["peers"]}
    for line in (
        [f"{ours[m]['us']['median'] / 1e3:.2f}" for m in models],
        [f"{100 * ours[m]['share_of_floor']:.0f} %" for m in models],
        [f"{theirs[m] / beside[m]['us']['median']:.2f}x" for m in models],
        [f"{there[m]['us']['median'] / 1e3:.2f}" for m in models],
        [f"{100 * there[m]['share_of_floor']:.0f} %" for m in models],
    ):
        assert f"| {' | '.join(line)} |" in README, line


def test_there_is_something_to_check():
    assert not re.search(r"@\w+@", README), "a figure was not filled in"
    assert len(COMMANDS) >= 5 and SNIPPETS
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert f"\n{target}:" in targets, target


def test_the_tests_that_the_guides_name_exist():
    """docs/kernels.md: `test_file.py::test_name`, or `::test_name` of the file named before."""
    guide = (ROOT / "docs/kernels.md").read_text()
    sources = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    names = re.findall(r"`(test_\w+\.py)?::(test_\w+)`", guide)
    file = ""
    for named, test in names:
        file = named or file
        assert f"def {test}(" in sources[file], (file, test)
    assert len(names) > 10
    for path in re.findall(r"`((?:src|tests|bench|docs)/[\w./]+\w)`", guide):
        assert (ROOT / path).exists(), path


def test_the_index_of_the_log_names_every_entry():
    """A line for each entry, newest first, with its day and a link as GitHub spells it."""
    log = (ROOT / "bench/LOG.md").read_text()
    entries = re.findall(r"^### (\d+\. .*)\n\n\d{4}-(\d\d-\d\d)\. ", log, re.M)
    index = re.findall(r"^- \[(\d+\. .*)\]\((#\S+)\) \((\d\d-\d\d)\): \S", log, re.M)
    assert [(title, day) for title, _, day in index] == entries
    assert [int(title.split(".")[0]) for title, _ in entries] == list(range(len(entries), 0, -1))
    for title, link, _ in index:
        assert link == "#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"), title
