"""What the README tells a newcomer to type works as it stands there."""

import io
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
