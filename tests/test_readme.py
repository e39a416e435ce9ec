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
FIGURES = (ROOT / "docs/figures.md").read_text()
MODELS = ("8B", "4B", "1.7B", "0.6B")
COMMANDS = re.findall(r"^    (orthrus [^#\n]*)", README, re.M)
SNIPPETS = [  # those that need a server: test_serving_docs.py
    snippet
    for snippet in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    if "import OpenAI" not in snippet
]


def record(name: str) -> dict:
    """A recorded run."""
    return json.loads((ROOT / f"bench/results/{name}.json").read_text())


def tokens_of(run: dict) -> dict:
    """A plain token at context 1k, by model."""
    return {p["model"]: p for p in run["passes"] if (p["pass"], p["context"]) == ("token", 1024)}


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
    assert {"docs/demo.svg", "docs/explain.png", "docs/mask.svg", "docs/speed.svg"} <= set(links)
    assert len(README.splitlines()) <= 200, "detail goes to docs/"


def test_the_figures_are_those_of_the_record():
    """The table of the README comes of one recorded run, its first line of another, and the text agrees."""
    run, peers = record("replay-h100"), record("decode-peers-h100")
    rows = {(row["of"].split(",")[0], row["way"]): row for row in run["rows"]}
    plain, simulated = rows["embedded", "plain"], "simulated: published 4B curve"
    names = {"drafts of a chain of 31, replayed": "two-pass chain"}
    names |= {"one pass per cycle, replayed": "one-pass"}
    names |= {
        "drafts of a tree of 63, replayed": "two-pass tree 63",
        "auto as it was then, without lookup, replayed": "auto",
    }
    lines = {name: rows["embedded", way] for name, way in names.items()} | {"plain": plain}
    lines["auto, strong drafter, **simulated**"] = rows[simulated, "auto"]
    for name, row in lines.items():
        tokens = f"{row['tokens_per_cycle']:.2f} | {row['tokens_per_forward']:.2f}"
        speed, over = row["tokens_per_second"], row["tokens_per_second"] / plain["tokens_per_second"]
        assert f"| {name} | {tokens} | {speed:.0f} | {over:.2f}x |" in README, name
    (theirs,) = (p["us"]["median"] for p in peers["peers"] if p["model"] == "8B")
    assert f"`torch.compile` | 1.00 | 1.00 | {1e6 / theirs:.0f} | |" in README
    beside = tokens_of(peers)["8B"]["us"]["median"]
    assert f"plain decoding makes {1e6 / beside:.0f} in the same run" in README
    machine = run["machine"]
    assert f"{machine['date']}, commit {machine['commit']}" in README and peers["machine"]["date"] in README


def test_the_times_are_those_of_the_record():
    """A plain token, docs/figures.md: one run on each GPU, and the run that the picture shows."""
    peers, h200 = record("decode-peers-h100"), record("decode-h200")
    ours, there = tokens_of(peers), tokens_of(h200)
    theirs = {p["model"]: p["us"]["median"] for p in peers["peers"]}
    for line in (
        [f"{ours[m]['us']['median'] / 1e3:.2f}" for m in MODELS],
        [f"{100 * ours[m]['share_of_floor']:.0f} %" for m in MODELS],
        [f"{theirs[m] / ours[m]['us']['median']:.2f}x" for m in MODELS],
        [f"{there[m]['us']['median'] / 1e3:.2f}" for m in MODELS],
        [f"{100 * there[m]['share_of_floor']:.0f} %" for m in MODELS],
    ):
        assert f"| {' | '.join(line)} |" in FIGURES, line


@pytest.mark.parametrize("temperature", [0, 0.6, 1.0])
def test_the_acceptance_is_that_of_the_record(temperature):
    """docs/figures.md, tokens per cycle and per forward pass, of `make acceptance`."""
    ways = {("two-pass", "coupled", n): f"tree of {n}" for n in (16, 32, 64, 128)}
    ways |= {("two-pass", "coupled", 0): "chain", ("one-pass", "coupled", "auto"): "one-pass"}
    ways |= {("two-pass", "rejection", 0): "chain, rejection sampling"}
    for row in record("acceptance-h100")["settings"]:
        way = ways.get((row["strategy"], row["verify"], row["nodes"]))
        if way and row["temperature"] == temperature:
            figures = f"{row['tokens_per_cycle']:.2f} | {row['tokens_per_forward']:.2f}"
            assert f"| {temperature} | {way} | {figures} |" in FIGURES, way


def test_what_ranks_drafts_keeps_what_the_record_says():
    """docs/figures.md, tokens per cycle, of `python -m bench.selector`."""
    ways = record("selector-h200")["ways"]
    for name, way in (("the view alone", "no tables"), ("bigram tables, not calibrated", "tables"),
                      ("tables and selector, as it drafts", "tables and selector")):  # fmt: skip
        kept = (ways[way][draft] for draft in ("chain", "tree 31", "tree 63", "tree 127", "one-pass"))
        cells = [
            "{:.2f} ({:.2f} to {:.2f})".format(row["tokens_per_cycle"], *row["interval_95"]) for row in kept
        ]
        assert f"| {name} | {' | '.join(cells)} |" in FIGURES, name
    chain, tree, large, one = (row["tokens_per_cycle"] for row in record("acceptance-h200")["settings"])
    said = f"chain {chain:.2f}, tree of 63 {tree:.2f}, tree of 127 {large:.2f}, one-pass {one:.2f}."
    assert said in FIGURES.replace("\n", " ")


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
