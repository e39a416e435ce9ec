"""`make mutations`: its page says what it plants, every bug applies, and nothing but an assertion about
values counts as caught.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutations import run as mutations
from tests.mutations.run import Outcome, before, check_all, judge
from tests.mutations.table import BUGS, Bug

ROOT = Path(__file__).parents[1]


def test_the_page_lists_the_bugs():
    assert mutations.PAGE.read_text() == mutations.page(BUGS), "python -m tests.mutations.run --write"
    assert len({bug.name for bug in BUGS}) == len(BUGS)


def test_it_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(mutations, "PAGE", tmp_path / "page.md")
    assert mutations.main(["--write"]) == 0
    assert mutations.PAGE.read_text() == mutations.page(BUGS)


def test_every_bug_applies_and_names_a_test():
    check_all(ROOT, BUGS)
    for bug in BUGS:
        for test in filter(None, (bug.test, bug.unseen)):
            file, name = test.split("[")[0].split("::")
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test


BUG = Bug("caught", "toy.py", "x + 1", "x + 2", "test_toy.py::test_f", "why", unseen="test_toy.py::test_kind")
PASSED, FAILED = "tests/test_toy.py::test_kind", "tests/test_toy.py::test_f[1]"


def report(passed=(PASSED,), test=FAILED, error="AssertionError", in_src=False) -> dict:
    """What a probe reports; without a failure where `test` is empty."""
    failure = {"test": test, "error": error, "in_src": in_src, "said": "assert 3 == 2"}
    return {"passed": passed, "failures": [failure] if test else [], "said": "exit code 0: 1 passed"}


@pytest.mark.parametrize(
    ("planted", "caught", "said"),
    [
        (report(), True, "assert 3 == 2"),
        (report(test=""), False, "does not see it: exit code 0"),
        (
            report(error="AttributeError"),
            False,
            "not by an assertion of test_toy.py::test_f: .*Attrib",
        ),
        (report(in_src=True), False, "not by an assertion"),
        (report(test="tests/test_toy.py::test_further"), False, "not by an assertion"),
        (report(test="tests/test_toy.py", error="CollectError"), False, "not by an assertion"),
        (report(passed=(), test=PASSED), False, "test_kind should not see it"),
    ],
)
def test_what_counts_as_caught(planted, caught, said):
    got = judge(BUG, planted)
    assert got[0] == caught and re.search(said, got[1])


@pytest.mark.parametrize(
    ("clean", "said"),
    [
        (report(passed=(PASSED, FAILED), test=""), "^$"),
        (report(test=""), "test_f did not run without the bug: exit code 0"),
        (report(), "test_f fails without the bug: assert 3 == 2"),
        (report(passed=(FAILED,), test=PASSED), "test_kind fails without the bug"),
    ],
)
def test_what_must_be_so_without_the_bug(clean, said):
    assert re.search(said, before(BUG, clean))


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """A repository of one function and its tests, and three bugs for it."""
    for name in ("src", "docs"):
        (tmp_path / name).mkdir()
    for name in ("bench", "tools", "tests/mutations"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("results", "__pyc*"))
    (tmp_path / "README.md").touch()
    (tmp_path / "src/toy.py").write_text("def f(x):\n    return x + 1\n")
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\ntestpaths = ["tests"]\n')
    (tmp_path / "tests/test_toy.py").write_text(
        "import pytest\nfrom toy import f\n\n"
        "@pytest.mark.parametrize('x', [1, 2])\ndef test_f(x):\n    assert f(x) == x + 1\n\n"
        "def test_kind():\n    assert isinstance(f(1), int)\n"
    )
    bugs = BUG, replace(BUG, name="harmless", new="1 + x"), replace(BUG, name="a broken import", new="x +")
    monkeypatch.setattr(mutations, "ROOT", tmp_path)
    monkeypatch.setattr(mutations, "BUGS", bugs)
    return tmp_path


@pytest.mark.slow
def test_the_command(toy, capsys):
    source = (toy / "src/toy.py").read_text()
    assert mutations.main(["--json", "--processes", "2"]) == 1
    out, err = capsys.readouterr()
    found = {bug["name"]: bug for bug in json.loads(out)["bugs"]}
    assert [name for name, bug in found.items() if bug["caught"]] == ["caught"]
    assert "assert 3 == (1 + 1)" in found["caught"]["said"]
    assert "does not see it" in found["harmless"]["said"]
    assert "SyntaxError" in found["a broken import"]["said"]
    assert "NOT CAUGHT: harmless" in err and err.count("\n") == 3
    assert (toy / "src/toy.py").read_text() == source


def test_the_table(capsys):
    caught = Outcome(BUG, True, "assert 3 == 2", 1.0)
    mutations.print_outcomes([caught, replace(caught, caught=False, said="nobody saw it")], 2.0)
    out = capsys.readouterr().out
    assert "test_toy.py::test_f" in out and "NOT CAUGHT" in out and "caught: nobody saw it" in out
    assert out.endswith("1 of 2 bugs caught; 2 s\n")


def test_what_does_not_apply_is_an_error(monkeypatch, refused, tmp_path):
    assert "no bug is called 'typo'" in refused(mutations.main, "--only", "typo")
    assert "leave out --only" in refused(mutations.main, "--only", BUGS[0].name, "--write")
    monkeypatch.setattr(mutations, "PAGE", tmp_path / "page.md")
    for change, said in (
        ({"old": "no such text"}, "0 times, not once"),
        ({"old": "import"}, "times, not once"),
        ({"file": "gone.py"}, "No such file"),
    ):
        monkeypatch.setattr(mutations, "BUGS", (BUGS[0], replace(BUGS[1], **change)))
        for arguments in ([], ["--write"]):
            assert said in refused(mutations.main, *arguments)
    assert not mutations.PAGE.exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_bug_is_caught(capsys):
    code = mutations.main(["--json"])
    missed = [b for b in json.loads(capsys.readouterr().out)["bugs"] if not b["caught"]]
    assert code == 0 and not missed
