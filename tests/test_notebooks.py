"""The notebooks run from top to bottom, and are committed without outputs."""

import json
import os
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MODULES = "nbclient", "nbconvert", "ipykernel", "matplotlib"


def of_type(notebook, kind):
    """Cells of a notebook's JSON."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


@pytest.fixture
def run():
    for module in MODULES:
        pytest.importorskip(module)
    from notebooks import run

    return run


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_to_its_end(path, run, tmp_path, capfd):
    assert run.main([str(path), "--out", str(tmp_path), "--json"]) == 0
    said, warned = capfd.readouterr()
    assert not warned
    (files,) = json.loads(said)
    cells = of_type(json.loads(Path(files["ipynb"]).read_text()), "code")
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(cell["execution_count"] for cell in cells)
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}, "no warnings"
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures >= 4 and Path(files["html"]).read_text().count("<img") == pictures


def test_there_are_four():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_is_committed(path):
    """Clear them: .venv/bin/jupyter nbconvert --clear-output --inplace notebooks/*.ipynb"""
    notebook = json.loads(path.read_text())
    for cell in of_type(notebook, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None, cell["source"]


@pytest.mark.parametrize("then", ["1", "raise KeyError('gone')"], ids=["ends", "fails"])
def test_a_cell_that_fails_leaves_the_old_copy_and_no_kernel_stays(then, run, tmp_path, capfd):
    import nbformat

    code = f"import os, pathlib\npathlib.Path('pid').write_text(str(os.getpid()))\n{then}"
    path, out = tmp_path / "small.ipynb", tmp_path / "out"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), path)
    out.mkdir()
    (out / "small.html").write_text("old")
    failed = run.main([str(path), "--out", str(out)])
    said, warned = capfd.readouterr()
    if then == "1":
        assert failed == 0 and said.startswith("small: ") and said.endswith("out/small.html\n")
        assert (out / "small.html").read_text() != "old"
    else:
        assert failed == 1 and not said
        assert warned.endswith(f"notebooks.run: a cell of {path} failed: KeyError: 'gone'\n")
        assert [f.name for f in out.iterdir()] == ["small.html"] and (out / "small.html").read_text() == "old"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"nbformat": 4, "nbformat_minor": 5, "cells": 3}'])
def test_what_is_no_notebook_is_refused(text, run, tmp_path, capfd):
    path = tmp_path / "no.ipynb"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as end:
        run.main([str(path), "--out", str(tmp_path / "out")])
    assert end.value.code == 2 and capfd.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_none_is_refused(run, tmp_path, capfd):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        run.main([str(NOTEBOOKS[0]), "--out", str(tmp_path / "file")])
    assert end.value.code == 2 and capfd.readouterr().err.count("\n") == 1
