"""What orthrus explain tells is what the decoding did, and its text is generate's."""

from __future__ import annotations

import json
import os

import pytest
from rich.cells import cell_len
from scripted import ScriptedModel
from small import small_config
from tiny_folder import PROMPTS, write_tiny

from orthrus_kernels import DraftTree
from qwen3_model import Qwen3, checkpoint
from qwen3_model.cli import main
from qwen3_model.cli.explain_page import draw, visible
from qwen3_model.decode.sequence import Run
from qwen3_model.decode.two_pass import TwoPassCycle
from qwen3_model.explain import Cycle, explain
from qwen3_model.text import on_one_line

VARIANTS = [
    {"strategy": "autoregressive"},
    {"tree_nodes": 0},
    {"tree_nodes": 9},
    {"strategy": "one-pass", "tree_nodes": 9},
    {"tree_nodes": "auto", "temperature": 0.9},
    {"tree_nodes": 12, "temperature": 0.7, "top_k": 9, "repetition_penalty": 1.2},
    {"tree_nodes": 0, "temperature": 0.7, "repetition_penalty": 1.3},
    {"verify": "rejection", "temperature": 0.9},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("explain") / "tiny")


@pytest.fixture(scope="module")
def model(tiny):
    return Qwen3.from_pretrained(tiny, device="cpu")


@pytest.fixture
def orthrus(capsys):
    """Runs a command line; returns exit code, stdout, stderr."""

    def call(*args):
        code = main([str(arg) for arg in args])
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_cycles_add_up_to_what_generate_says(model, variant):
    prompt = model.text.encode(PROMPTS[0])
    settings = {"max_new_tokens": 18, "seed": 5} | variant
    result, cycles = explain(model, prompt, **settings)
    plain = model.generate(prompt, **settings)
    assert (result.token_ids, result.text, result.logprobs) == (plain.token_ids, plain.text, plain.logprobs)
    stats = result.stats
    assert (stats.forwards, stats.cycles, stats.nodes) == (
        plain.stats.forwards,
        plain.stats.cycles,
        plain.stats.nodes,
    )
    assert sum((cycle.tokens for cycle in cycles), []) == result.token_ids
    assert "".join(cycle.text for cycle in cycles) == result.text
    assert len(cycles) == 1 + stats.cycles and cycles[0].rows == [len(prompt)]
    assert sum(len(cycle.rows) for cycle in cycles) == stats.forwards
    trees = [cycle.run.tree for cycle in cycles if cycle.run.tree]
    assert sum(len(tree) - 1 for tree in trees) == stats.nodes
    assert bool(trees) == (variant.get("strategy") != "autoregressive")


@pytest.mark.parametrize("tree_nodes", [0, 20])
def test_a_cycle_is_what_the_passes_were_and_what_the_target_says(tree_nodes):
    model = ScriptedModel(small_config(eos_token_ids=()), skill=0.7, seed=3)
    result, cycles = explain(model, [1, 2], max_new_tokens=40, tree_nodes=tree_nodes, strategy="two-pass")
    passes, text = iter(model.passes), [1, 2]
    for cycle in cycles:
        taken = [next(passes) for _ in cycle.rows]
        assert cycle.rows == [len(rows) for rows in taken]
        if cycle.run.tree is not None:
            tree, below = cycle.run.tree, cycle.run.tree.paths()
            assert (tree.tokens, tree.parents) == (taken[-1].tokens, taken[-1].parents)
            assert list(cycle.run.choices) == [int(model.target(text + path).argmax()) for path in below]
            assert cycle.tokens == [*below[cycle.path[-1]], cycle.bonus]
            assert cycle.bonus == cycle.run.choices[cycle.path[-1]]
            left = [tree.tokens[child] for child in cycle.children()[cycle.path[-1]]]
            assert cycle.bonus not in left
        text += cycle.tokens
    assert next(passes, None) is None and text == [1, 2, *result.token_ids]
    assert max(len(cycle.path) for cycle in cycles) > 2


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.8, "seed": 2}, {"repetition_penalty": 3.0}], ids=str
)
def test_a_chain_has_the_estimates_of_the_tree_along_first_children(settings):
    drafts = []
    for nodes in (0, 60):
        model = ScriptedModel(small_config(block_size=4), skill=0.5, seed=1)
        _, cycles = explain(model, [1], max_new_tokens=9, tree_nodes=nodes, strategy="two-pass", **settings)
        tree, node, found = cycles[1].run.tree, 0, []
        while children := cycles[1].children()[node]:
            node = children[0]
            found.append((tree.tokens[node], tree.scores[node]))
        drafts.append(found)
    chain, first = drafts
    assert len(first) >= 2
    for (token, score), (wanted, its) in zip(chain, first, strict=False):
        assert token == wanted and score == pytest.approx(its, abs=1e-5)


def test_a_cut_cycle_keeps_no_choice_of_its_own():
    free = ScriptedModel(small_config(eos_token_ids=()), skill=1.0).generate([1], max_new_tokens=9).token_ids
    model = ScriptedModel(small_config(eos_token_ids=(free[3],)), skill=1.0)
    _, cycles = explain(model, [1], max_new_tokens=20, strategy="two-pass", tree_nodes=0)
    last = cycles[-1]
    assert last.bonus is None and last.tokens == free[1:4] and last.path == [0, 1, 2, 3]
    assert last.outcome == "kept 3 proposed + 0 own"


def test_explain_json_is_what_generate_says_and_cycles(tiny, orthrus):
    line = (PROMPTS[0], "--model", tiny, "--temperature", 1, "--seed", 4, "--tree-nodes", 6, "--json",
            "--max-new-tokens", 20)  # fmt: skip
    code, out, err = orthrus("explain", *line)
    told, plain = json.loads(out), json.loads(orthrus("generate", *line)[1])
    assert code == 0 and err.count("\n") == 1 and told["prompt"] == PROMPTS[0]
    assert all(told[key] == plain[key] for key in ("text", "token_ids", "logprobs"))
    assert "".join(cycle["text"] for cycle in told["cycles"]) == plain["text"]
    assert sum((cycle["logprobs"] for cycle in told["cycles"]), []) == plain["logprobs"]
    drafts = [cycle for cycle in told["cycles"] if cycle["nodes"]]
    assert drafts
    for cycle in drafts:
        nodes, path = cycle["nodes"], cycle["path"]
        kept = [nodes[i]["token"] for i in path[1:]] + [cycle["bonus"]] * (cycle["bonus"] is not None)
        assert kept == cycle["tokens"] and cycle["rows"] == [8, len(nodes)]
        assert nodes[path[-1]]["choice"] == cycle["bonus"] or cycle["bonus"] is None


def test_the_terminal_shows_every_cycle_in_its_width(tiny, model, orthrus, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    line = (PROMPTS[0], "--model", tiny, "--max-new-tokens", 24, "--seed", 1, "--tree-nodes", 9)
    code, out, _ = orthrus("explain", *line)
    result, cycles = explain(model, model.text.encode(PROMPTS[0]), max_new_tokens=24, seed=1, tree_nodes=9)
    assert code == 0 and max(cell_len(row) for row in out.splitlines()) <= 60
    assert out.count("\ncycle ") == result.stats.cycles and out.count("\n  → ") == len(cycles)
    assert out.splitlines()[-1].endswith(on_one_line(result.text)[-20:])
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[1;33m  → " in orthrus("explain", *line)[1]


@pytest.mark.parametrize("nodes", [0, 7])
def test_the_walk_is_the_trunk_and_what_it_left_are_branches(nodes, orthrus, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    line = ("explain", "def fibonacci(n):", "--max-new-tokens", 20, "--tree-nodes", nodes)
    cycles, stories = json.loads(orthrus(*line, "--json")[1])["cycles"], orthrus(*line)[1].split("\ncycle ")
    for cycle, story in zip(cycles[1:], stories[1:], strict=True):
        wanted = [on_one_line(cycle["nodes"][i]["text"]) for i in cycle["path"][1:]]
        trunk = " ".join(row[3:] for row in story.splitlines() if row.startswith("  ✓"))
        assert [word for word in trunk.split() if not word.endswith("%")] == wanted
        assert ("✗" in story) == (len(cycle["nodes"]) > len(cycle["path"]))


def test_labels_do_not_reach_the_terminal_as_commands(model):
    assert on_one_line("a b\n\t\x1b[31m\u202e") == "a·b↵⇥\\x1b[31m\\u202e"
    assert model.text.label(model.text.encode(" ")[0]) == "·"
    assert model.text.label(10**6) == "<1000000>"
    special = next(i for i in range(9) if model.text.decode([i]) == "")
    assert model.text.label(special).startswith("<|")
    assert visible("a\r\n\x00") == "a␍\n␀"


def test_ctrl_c_tells_what_there_is(tiny, orthrus, monkeypatch, tmp_path):
    run, count = TwoPassCycle.run, iter(range(5))

    def interrupted(self):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return run(self)

    monkeypatch.setattr(TwoPassCycle, "run", interrupted)
    page = tmp_path / "page.html"
    code, out, err = orthrus(
        "explain", PROMPTS[0], "--model", tiny, "--strategy", "autoregressive", "--html", page
    )
    assert code == 130 and out.count("\ncycle ") == 5 and "interrupted" in err
    assert page.read_text().count("<article") == 6 and "ended by interrupted" in page.read_text()


def test_a_page_that_cannot_be_written(tiny, tmp_path, orthrus, monkeypatch):
    monkeypatch.setattr(checkpoint, "EMBEDDED", None)  # refused before a model is loaded
    for path in (tmp_path, tmp_path / "missing" / "page.html"):
        code, out, err = orthrus("explain", PROMPTS[0], "--html", path)
        assert (code, out, err.count("\n")) == (2, "", 1) and str(path) in err
    page = tmp_path / "page.html"
    page.write_text("before")

    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    line = ("explain", PROMPTS[0], "--model", tiny, "--max-new-tokens", 3, "--html", page, "--json")
    code, out, err = orthrus(*line)
    assert (code, out, err.count("\n")) == (2, "", 1) and "No space" in err
    assert page.read_text() == "before" and [*tmp_path.iterdir()] == [page]


def test_a_drawing_has_every_node_once_and_none_upon_another(model):
    prompt = model.text.encode(PROMPTS[0])
    _, cycles = explain(model, prompt, max_new_tokens=20, tree_nodes=40, temperature=1.0, seed=2)
    drawn = [(cycle, draw(cycle, model.text)) for cycle in cycles]
    assert [drawing is None for _, drawing in drawn] == [cycle.run.tree is None for cycle in cycles]
    for cycle, drawing in drawn:
        if drawing is not None:
            boxes = drawing.boxes
            kinds = [box.kind for box in boxes]
            assert len(boxes) == len(cycle.run.tree) + (cycle.bonus is not None)
            assert kinds.count("kept") == len(cycle.path) - 1
            assert kinds.count("own") == (cycle.bonus is not None)
            assert len({box.y for box in boxes if box.kind in ("root", "kept", "own")}) == 1
            for line in {box.y for box in boxes}:
                row = sorted((box.x, box.x + box.width) for box in boxes if box.y == line)
                assert all(a[1] < b[0] for a, b in zip(row, row[1:], strict=False))
            assert all(box.x + box.width < drawing.width and box.y + 24 <= drawing.height for box in boxes)


def test_a_cycle_needs_nothing_but_its_run():
    """What another strategy must fill in: rows of its passes, tree, choices and path."""
    tree = DraftTree([5, 6, 7], [-1, 0, 0], [0, 1, 1], [0.0, -0.5, -1.0])
    run = Run([7, 9], [-0.1, -0.2], 2, "two-pass", 2, [0, 2], rows=(99,), tree=tree, choices=[7, 8, 9])
    cycle = Cycle(run, 2)
    assert (cycle.kind, cycle.passes, cycle.outcome) == (
        "tree of 2 nodes",
        "1 pass of 99 rows, 96 of them drafting",
        "kept 1 proposed + 1 own",
    )
    assert cycle.bonus == 9 and cycle.path == [0, 2] and cycle.chance(2) == pytest.approx(0.3679, abs=1e-4)
    run.rows = 32, 3
    assert cycle.passes == "2 passes of 32 + 3 rows"
    run.tree, run.rows = DraftTree([5], [-1], [0], [0.0]), (9,)
    assert (cycle.kind, cycle.passes) == ("no draft", "1 pass of 9 rows, 8 of them drafting")
