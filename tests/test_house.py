"""How the files of src/ stand on each other: without circles, and no floor asks one above it.

Every import counts: inside functions and for type checkers too."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"


def named(path: Path) -> str:
    """A file's module."""
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


FILES = {named(path): path for path in sorted(SRC.rglob("*.py"))}


def imports(module: str) -> set[str]:
    """The modules of src/ that a module's file imports."""
    path, found = FILES[module], set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            inner = {alias.name: f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else base for name in inner.values()}
    return found & FILES.keys() - {module}


@cache
def whole_graph() -> dict[str, set[str]]:
    """What each module imports."""
    return {module: imports(module) for module in FILES}


def circles(graph: dict[str, set[str]]) -> set[str]:
    """What is left when modules that import nothing that is left are taken away, again and again."""
    left = dict(graph)
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    return set(left)


def test_no_file_needs_itself():
    assert len(whole_graph()) > 100 and sum(map(len, whole_graph().values())) > 300, "imports are found"
    assert circles(whole_graph()) == set()
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}


MODEL = "qwen3_model."
FLOORS = [
    ("orthrus_kernels", ["qwen3_model"]),
    (MODEL + "decode", [MODEL + name for name in ("qwen3", "cli", "training", "comparison", "explain")]),
    (MODEL + "model", [MODEL + name for name in ("qwen3", "decode", "cli", "training")]),
    (MODEL + "training", [MODEL + "cli"]),
    (MODEL + "openai", [MODEL + name for name in ("qwen3", "cli", "training", "comparison", "explain")]),
]


@pytest.mark.parametrize(("floor", "above"), FLOORS, ids=[floor for floor, _ in FLOORS])
def test_no_floor_asks_one_above(floor, above):
    def inside(module, names):
        return any(module == name or module.startswith(name + ".") for name in names)

    mine = [module for module in FILES if inside(module, [floor])]
    assert mine and all(any(inside(module, [name]) for module in FILES) for name in above)
    assert [(m, of) for m in mine for of in whole_graph()[m] if inside(of, above)] == []
