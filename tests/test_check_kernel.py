"""`make check-kernel`: an edit in a small repository seen whole; by fakes, what it says and when it says
nothing about speed."""

import json
import re
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tree_copy import ROOT, copied, said_by

from bench import cases
from bench.measure import Pool, Timing
from bench.models import MODELS, Shape
from tools import check_kernel, gpu_check, time_op, trees
from tools.check_kernel import Compiled, Timed
from tools.gpu_check import Outcome

GOOD, BAD = Outcome("test_rowwise", 3, 0), Outcome("test_rowwise", 3, 1, "test_x: assert False")
LINE = {"registers": 31, "spill_bytes": 0, "shared": 0}
# Kernel tests of no one operation.
OF_ALL = {
    "test_clock", "test_cycle_times", "test_cycles", "test_draft_scores", "test_forced_walk",
    "test_model_kernels", "test_prompt", "test_prompt_rows", "test_rare_launches", "test_texts_beside",
    "test_texts_in_turn",
}  # fmt: skip


def test_every_kernel_and_every_kernel_test_belongs_to_an_operation():
    sources = [
        (ROOT / "tests/helpers" / name).read_text()
        for name in (
            "aot_launches.py",
            "compile_attention.py",
            "compile_attention_gluon.py",
            "compile_gluon.py",
        )
    ]
    kernels = {name for text in sources for name in re.findall(r"\b_\w+_kernel\b", text)}
    known = check_kernel.operations()
    assert {kernel for op in known.values() for kernel in op.kernels} == kernels and len(kernels) > 15
    files = {ROOT / "tests" / file for op in known.values() for file in op.tests}
    assert not [file for file in files if not file.exists()]
    assert set(gpu_check.kernel_tests()) - files == {ROOT / f"tests/kernels/{name}.py" for name in OF_ALL}
    assert set(cases.OPS) <= set(known)


SMALL_TEST = """
import torch
from orthrus_kernels.backends import backend_ops


def test_embedding_copies_rows(device):
    table, tokens = torch.randn(50, 1500).to(device), torch.tensor([49, 0, 7]).to(device)
    assert torch.equal(backend_ops("triton").embedding(table, tokens), table[tokens])
"""


@pytest.mark.skipif(shutil.which("git") is None, reason="the base is a commit")
@pytest.mark.slow
def test_an_edit_seen_whole(tmp_path):
    """One that needs more registers and gives wrong rows, against the commit before it."""
    root = copied(tmp_path / "tree")
    (root / "tests/kernels/test_rowwise.py").write_text(SMALL_TEST)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.invalid", "-c", "core.hooksPath=/dev/null",
           "-c", "commit.gpgsign=false"]  # fmt: skip
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "base"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    kernel = root / "src/orthrus_kernels/embedding.py"
    text = kernel.read_text().replace("token * sv + o_e", "token * sv + o_e + 1")
    kernel.write_text(text.replace("BLOCK_E = 1024", "BLOCK_E = 8192"))
    code, said = said_by(
        root,
        "-m",
        "tools.check_kernel",
        "embedding",
        "--base",
        "HEAD",
        "--processes",
        "1",
        "--json",
        "out.json",
    )
    assert code == 1 and "0 of 1 pass" in said and "no word on speed" in said, said
    found = json.loads((root / "out.json").read_text())
    (line,) = found["compiled"]
    assert line["after"]["registers"] > line["before"]["registers"] > 0 and "registers" in line["verdict"]
    assert not found["ok"] and found["speed"] == [] and "test_embedding_copies_rows" in found["failures"][0]


@pytest.fixture
def faked(monkeypatch):
    """Everything that takes long replaced; the dictionary says what it answers, and counts rounds asked."""
    said = {"tests": [GOOD], "before": {("_k", "a"): LINE}, "after": {("_k", "a"): LINE}, "timed": []}

    def timed(both, op, sizes, rounds):
        said["timed"].append((list(both.values()), op, sizes, rounds))
        return {
            name: [{"rows 1": us, "rows 2": us}] * rounds for name, us in zip(both, (10.0, 9.0), strict=True)
        }

    monkeypatch.setattr(check_kernel, "run_tests", lambda *given: said["tests"])
    monkeypatch.setattr(trees, "exported", lambda ref, root: nullcontext(Path("base")))
    monkeypatch.setattr(
        trees, "compiled", lambda tree, *rest: (said["before" if tree == Path("base") else "after"], "")
    )
    monkeypatch.setattr(trees, "timed", timed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check_kernel, "machine", lambda command: {"gpu": "fake"})
    return said


def test_all_is_well(faked, capsys, tmp_path):
    out = tmp_path / "out.json"
    options = ["--models", "8B", "--rows", "1", "--contexts", "16k", "--rounds", "3", "--json", str(out)]
    assert check_kernel.main(["attention", *options]) == 0
    sizes = {"models": ["8B"], "rows": [1], "contexts": [16384]}
    assert faked["timed"] == [([Path("base"), ROOT], "attention", sizes, 3)]
    said = capsys.readouterr().out
    assert "3 of 3 pass" in said and "same" in said and "faster: 0.900 of the time" in said
    found = json.loads(out.read_text())
    assert found["ok"] and found["speed"][0]["before"] == [10.0] * 3 and found["base"] == "main"


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"tests": [GOOD, BAD]}, "test_x: assert False"),
        ({"after": {("_k", "a"): LINE | {"spill_bytes": 8}}}, "SPILLS"),
        ({"after": {("_k", "a"): {"error": "boom"}}}, "DOES NOT COMPILE boom"),
        ({"after": {}}, "no launch of it"),
    ],
)
def test_no_word_on_speed_while_something_fails(wrong, word, faked, capsys):
    faked |= wrong
    assert check_kernel.main(["swiglu"]) == 1
    said = capsys.readouterr().out
    assert word in said and "no word on speed" in said and not faked["timed"]


@pytest.mark.parametrize("op, gpu, word", [("swiglu", False, "no GPU here"), ("grow", True, "no case in")])
def test_why_nothing_is_timed(op, gpu, word, faked, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert check_kernel.main([op]) == 0
    assert word in capsys.readouterr().out and not faked["timed"]


def test_a_time_that_is_missing_fails(faked, monkeypatch, capsys):
    rounds = {"main": [{"rows 1": 1.0}], "new": [{"rows 1": "OutOfMemoryError: no"}]}
    monkeypatch.setattr(trees, "timed", lambda *given: rounds)
    assert check_kernel.main(["swiglu"]) == 1
    assert "rows 1: OutOfMemoryError: no" in capsys.readouterr().out


@pytest.mark.parametrize(
    "before, after, verdict",
    [
        (LINE, LINE, "same"),
        (LINE, LINE | {"registers": 40, "shared": 16}, "+9 registers, +16 B shared"),
        (LINE | {"shared": 5}, LINE, "-5 B shared"),
        ({}, LINE, "new"),
        ({"error": "x"}, LINE, "new"),
        (LINE, {}, "gone"),
        (LINE, LINE | {"spill_bytes": 4}, "SPILLS"),
        (LINE, {"error": "x"}, "DOES NOT COMPILE"),
    ],
)
def test_verdicts_on_what_was_compiled(before, after, verdict):
    got = Compiled("_k", "a", before, after)
    assert got.verdict == verdict and got.failed == verdict.isupper()


@pytest.mark.parametrize(
    "before, after, word",
    [
        ([10, 10], [9, 9.5], "faster: 0.925"),
        ([10, 10], [11, 10.5], "slower: 1.075"),
        ([10, 10], [9, 10.2], "no difference"),
        ([10, 10], [9.95, 9.95], "no difference"),
        ("-", [9, 9], "-"),
    ],
)
def test_verdicts_on_times(before, after, word):
    """Faster or slower is said where every round says so, by more than a percent."""
    assert Timed("rows 1", before, after).verdict.startswith(word)


def test_launches_that_stay_the_same_share_a_line():
    compiled = [
        Compiled("_k", str(i), LINE | {"registers": 31 + i}, LINE | {"registers": 31 + i}) for i in (0, 1)
    ]
    compiled.append(Compiled("_k", "2", LINE, LINE | {"shared": 64}))
    assert check_kernel.Found("swiglu", "main", [], compiled).lines() == [
        ["_k", "2", "31 / 0 / 0", "31 / 0 / 64", "+64 B shared"],
        ["_k", "2 launches", "31 to 32 / 0 / 0", "31 to 32 / 0 / 0", "same"],
    ]


TAKES_TURNS = """
import os, sys
for line in sys.stdin:
    with open("../log", "a") as log:
        log.write(os.getcwd()[-1])
    print('{"rows 1": 2.5}' if sys.argv[1] == "swiglu" else sys.exit(3), flush=True)
"""


def test_trees_take_turns_and_the_first_round_does_not_count(monkeypatch, tmp_path):
    (tmp_path / "time_op.py").write_text(TAKES_TURNS)
    monkeypatch.setattr(trees, "HERE", tmp_path)
    both = {name: tmp_path / name for name in "ab"}
    for folder in both.values():
        folder.mkdir()
    assert trees.timed(both, "swiglu", {}, 3) == {name: [{"rows 1": 2.5}] * 3 for name in "ab"}
    assert (tmp_path / "log").read_text() == "baabbaab"
    with pytest.raises(RuntimeError, match="exit code 3"):
        trees.timed(both, "head", {}, 1)


def test_a_round_times_every_case(monkeypatch):
    """By a meter of a GPU that is not there; one case raises, and the others have their times."""

    class FakeMeter:
        pool = Pool(torch.device("cpu"), 1 << 16)

        def time(self, call, copies):
            out = call(copies - 1)
            if len(out) == 3:
                raise ValueError("no room")
            return Timing(2.5, 2, 3)

    monkeypatch.setitem(MODELS, "toy", Shape(layers=2, E=96, H=4, F=80, G=2, D=16, V=130))
    wanted = list(cases.cases(["swiglu"], ["toy"], [1, 3], [70], "sm_90"))
    got = time_op.timed(wanted, FakeMeter())
    assert got == {"toy, rows 1": 2.5, "toy, rows 3": "ValueError: no room"}
