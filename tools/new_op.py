"""Scaffold an operation: Triton kernel, launcher and plain twin (a squared ReLU, to be replaced), its test,
and its place wherever an operation has one.

Existing files change above the marker lines `# make new-op: ...` and in their imports. All texts are made and
checked before the first is written; when one cannot be written, those before it are taken back."""

from __future__ import annotations

import ast
import builtins
import keyword
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.command import Parser, fail

COMMAND = "tools.new_op"
ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).with_name("new_op_files")
PLACEHOLDER = "OP_NAME"
LONGEST = 24  # a longer name makes lines that the formatter breaks

BACKENDS, PACKAGE = "src/orthrus_kernels/backends.py", "src/orthrus_kernels/__init__.py"
KERNEL, TEST = "src/orthrus_kernels/OP_NAME.py", "tests/kernels/test_OP_NAME.py"
CASES, LAUNCHES, AOT = "bench/cases.py", "tools/launches.py", "tests/helpers/aot_launches.py"
FILES = {KERNEL: "kernel.py.txt", TEST: "test.py.txt"}
IMPORTS = {
    BACKENDS: "from .OP_NAME import OP_NAME, OP_NAME_triton",
    PACKAGE: "from .OP_NAME import OP_NAME",
}
CASE = """
def OP_NAME(width: int, t: int, pool: Pool) -> tuple[int, dict[str, Call | NotRun]]:
    copies = pool.copies(t * width)
    x = [pool.take(t, width) for _ in range(copies)]
    out = torch.empty_like(x[0])
    return copies, {
        OURS: lambda i: KERNELS.OP_NAME(x[i], out=out),
        "torch chain": lambda i: F.relu(x[i]).square(),
    }


""".lstrip("\n")
LAUNCH = """
    op = module("OP_NAME")
    call = partial(op.OP_NAME_triton, meta(33, 12288))
    yield "12288", op, "_OP_NAME_kernel", call, ALL
""".lstrip("\n")
# (file, marker line, what goes above it)
INSERTS = (
    (BACKENDS, "    # make new-op: a field", "    OP_NAME: Op\n"),
    (BACKENDS, "    # make new-op: the twin", "    OP_NAME=OP_NAME,\n"),
    (BACKENDS, "    # make new-op: the kernel", "    OP_NAME=OP_NAME_triton,\n"),
    (PACKAGE, "    # make new-op: the name", '    "OP_NAME",\n'),
    (CASES, "# make new-op: its case", CASE),
    (CASES, "    # make new-op: its shapes",
     '    "OP_NAME": lambda s: (s.F, partial(OP_NAME, s.F), 4 * s.F),\n'),
    (LAUNCHES, "    # make new-op: a launch", '    "OP_NAME": lambda: TRITON.OP_NAME(numbers(5, 1100)),\n'),
    (AOT, "    # make new-op: a launch", LAUNCH),
)  # fmt: skip
NEXT = """
now {name} is a squared ReLU that passes everything; make it your operation, then
  make check-kernel OP={name}
  make lint test
and add its row to the table of docs/kernels.md and your expectation to bench/LOG.md (docs/adding.md)"""


class Refused(Exception):
    """Why nothing was written, in one line."""


def identifiers(text: str, path: str) -> set[str]:
    """Names that a module binds or uses. Raises SyntaxError."""
    found = set()
    for node in ast.walk(ast.parse(text, path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    return found


def check_name(name: str, root: Path, texts: dict[str, str]) -> None:
    """Raises Refused unless `name` can name an operation of the tree. texts: the files that will change."""
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or len(name) > LONGEST:
        raise Refused(
            f"{name!r} cannot name an operation: lower-case letters, digits and _, a letter first,"
            f" {LONGEST} characters at most, no keyword; such as squared_relu"
        )
    for path in places(name, root):
        if path.exists():
            raise Refused(f"{name!r} is taken: {path.relative_to(root)} is there")
    if name in dir(builtins):
        raise Refused(f"{name!r} is taken: a builtin of Python")
    for where, text in texts.items():
        if name in identifiers(text, where):
            raise Refused(f"{name!r} is taken: {where} has that name")


def places(name: str, root: Path) -> Iterator[Path]:
    """Files and folders that may not be there. A test's file name is its alone in all of tests/."""
    yield root / "src/orthrus_kernels" / name
    yield root / KERNEL.replace(PLACEHOLDER, name)
    yield from (root / "tests").rglob(f"test_{name}.py")


def with_import(text: str, line: str, path: str) -> str:
    """`text` with an import of a sibling in its place among the others, in the order of ruff."""

    def order(line: str) -> list[str | int]:
        module = line.split()[1]
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", module)]

    lines = text.splitlines(keepends=True)
    imports = [i for i, one in enumerate(lines) if re.match(r"from \.\w+ import ", one)]
    if not imports:
        raise Refused(f"{path}: the imports `from .MODULE import ...` are not there")
    later = [i for i in imports if order(lines[i]) > order(line)]
    lines.insert(later[0] if later else imports[-1] + 1, line + "\n")
    return "".join(lines)


def with_insert(text: str, marker: str, insert: str, path: str) -> str:
    """`text` with `insert` above the one line that is the marker."""
    if text.splitlines().count(marker) != 1:
        raise Refused(f"{path}: the line `{marker.strip()}` has to be there once")
    return text.replace(f"{marker}\n", f"{insert}{marker}\n")


def plan(name: str, root: Path) -> dict[str, str]:
    """Every file that is made or changed, by path below root, with its text. Raises Refused, OSError."""
    texts = {path: (root / path).read_text() for path in dict.fromkeys(p for p, _, _ in INSERTS)}
    templates = {path: (TEMPLATES / file).read_text() for path, file in FILES.items()}
    made = {p.replace(PLACEHOLDER, name): t.replace(PLACEHOLDER, name) for p, t in templates.items()}
    try:
        check_name(name, root, texts | templates)
        for path, line in IMPORTS.items():
            texts[path] = with_import(texts[path], line.replace(PLACEHOLDER, name), path)
        for path, marker, insert in INSERTS:
            texts[path] = with_insert(texts[path], marker, insert.replace(PLACEHOLDER, name), path)
        for path, text in (made | texts).items():
            ast.parse(text, path)
    except SyntaxError as error:
        raise Refused(f"{error.filename}, line {error.lineno}: {error.msg}") from None
    return made | texts


def write(texts: dict[str, str], root: Path) -> None:
    """All of the files or none. Raises OSError."""
    before = {path: (root / path).read_bytes() if (root / path).exists() else None for path in texts}
    beside = {path: (root / path).with_name(f".{Path(path).name}.{os.getpid()}") for path in texts}
    try:
        for path, text in texts.items():
            beside[path].write_text(text)
        for path in texts:
            os.replace(beside[path], root / path)
    except BaseException:  # Ctrl-C too
        for path, old in before.items():
            if old is None:
                (root / path).unlink(missing_ok=True)
            elif (root / path).read_bytes() != old:
                (root / path).write_bytes(old)
        raise
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description=" ".join(str(__doc__).split("\n\n")[0].split()),
        epilog="example: make new-op NAME=squared_relu",
    )
    parser.add_argument("name", metavar="NAME", help="of the operation, such as squared_relu")
    name = parser.parse_args(arguments).name
    try:
        texts = plan(name, ROOT)
        write(texts, ROOT)
    except (Refused, OSError) as error:
        fail(COMMAND, str(error))
    made = [path.replace(PLACEHOLDER, name) for path in FILES]
    print(*(f"{'made' if path in made else 'changed'} {path}" for path in texts), sep="\n")
    print(NEXT.format(name=name).lstrip("\n"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
