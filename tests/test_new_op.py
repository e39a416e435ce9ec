"""`make new-op`: what it makes passes tests, lint, bench and ahead-of-time compilation as it is, in a copy of
the tree; and when it cannot, nothing is written."""

import json
import os

import pytest
from tree_copy import copied, said_by

from tools import new_op

OP, SHORTEST, LONGEST = "probe_op", "pq", "p" * new_op.LONGEST
NAMES = (OP, SHORTEST, LONGEST, "probe10", "probe9")  # the last two: imports are sorted by number


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return copied(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def scaffolded(copy):
    for name in NAMES:
        code, said = said_by(copy, "-m", "tools.new_op", name)
        assert code == 0 and f"made src/orthrus_kernels/{name}.py" in said, said
    return copy


@pytest.mark.slow
def test_tests_and_bench_pass_as_they_are(scaffolded):
    tests = ["tests/kernels/test_probe_op.py", "tests/kernels/test_backends.py", "tests/test_check.py",
             "tests/test_bench.py"]  # fmt: skip
    chosen = f"{OP} or every_kernel_has or every_operation or print_floors"
    code, said = said_by(scaffolded, "-m", "pytest", *tests, "-k", chosen, "-p", "no:cacheprovider", "-rA")
    assert code == 0, said
    assert "test_against_fp64_and_the_twin[1088-heavy-torch.bfloat16" in said, said
    for test in ("takes_what_its_twin_takes", "every_launch_runs", "calls_of_a_case_compute_the_same"):
        assert f"{test}[{OP}]" in said, said


def test_lint_passes_with_names_of_any_length(scaffolded):
    for command in (("check",), ("format", "--check")):
        code, said = said_by(
            scaffolded, "-m", "ruff", *command, "--no-cache", "src", "bench", "tools", "tests"
        )
        assert code == 0, said


@pytest.mark.slow
def test_it_compiles_for_hopper(scaffolded):
    code, said = said_by(scaffolded, "tools/compile_op.py", f"_{OP}_kernel")
    line = json.loads(said)
    assert code == 0 and line["registers"] > 0 and line["spill_bytes"] == 0


@pytest.mark.parametrize(
    "name, word",
    [
        ("", "cannot name"), ("9x", "cannot name"), ("Relu", "cannot name"), ("a-b", "cannot name"),
        ("lambda", "no keyword"), ("a" * (new_op.LONGEST + 1), "24 characters"), ("../x", "cannot name"),
        ("swiglu", "swiglu.py is there"), ("tables", "tables is there"),
        ("rotary", "test_rotary.py is there"),
        ("sum", "a builtin"), ("norm", "bench/cases.py has that name"), ("rope_table", "__init__.py has"),
        ("triton", "has that name"),
    ],
)  # fmt: skip
def test_a_name_that_does_not_go(name, word, copy, monkeypatch, refused):
    (copy / "tests/gpu/test_rotary.py").touch()
    monkeypatch.setattr(new_op, "ROOT", copy)
    before = contents(copy)
    assert word in refused(new_op.main, name)
    assert contents(copy) == before


@pytest.mark.parametrize("path, marker", [(path, marker) for path, marker, _ in new_op.INSERTS])
def test_a_marker_that_is_not_there_once(path, marker, copy, monkeypatch, refused):
    text = (copy / path).read_text()
    monkeypatch.setattr(new_op, "ROOT", copy)
    try:
        for spoiled in (text.replace(marker, ""), text.replace(marker, f"{marker}\n{marker}")):
            (copy / path).write_text(spoiled)
            before = contents(copy)
            said = refused(new_op.main, "probe_two")
            assert path in said and marker.strip() in said
            assert contents(copy) == before
    finally:
        (copy / path).write_text(text)


def test_a_file_that_is_no_python_is_named(copy):
    text = (copy / new_op.AOT).read_text()
    try:
        (copy / new_op.AOT).write_text(text + "def (:\n")
        with pytest.raises(new_op.Refused, match="aot_launches.py, line"):
            new_op.plan("probe_two", copy)
    finally:
        (copy / new_op.AOT).write_text(text)


def test_a_disk_that_fails_half_way_leaves_everything_as_it_was(copy, monkeypatch, refused):
    monkeypatch.setattr(new_op, "ROOT", copy)
    before, replace, done = contents(copy), os.replace, []

    def failing(source, target):
        if len(done) == 4:
            raise OSError("disk full")
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(new_op.os, "replace", failing)
    assert "disk full" in refused(new_op.main, "probe_two")
    assert len(done) == 4 and contents(copy) == before
