"""Execute notebooks top to bottom and write copies with text and pictures, as .ipynb and .html.

Each runs in a kernel of its own, in the folder it lies in. The files of a notebook whose cell fails stay as
they were. The notebooks themselves are never written."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.command import Parser, fail, short
from qwen3_model.cli.output import write_atomically

COMMAND = "notebooks.run"
ROOT = Path(__file__).resolve().parents[1]


def parse(arguments: Sequence[str] | None) -> Any:
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description=" ".join(str(__doc__).split()),
        epilog=f"example: python -m {COMMAND} notebooks/02_decode_by_hand.ipynb --out runs/notebooks",
    )
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK.ipynb", help="default: all here")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/notebooks", metavar="FOLDER",
                        help="where copies go (default: runs/notebooks)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="files and seconds as one JSON list on stdout")
    return parser.parse_args(arguments)


def read(path: Path) -> Any:
    """The notebook of a file; exit code 2 for what is none."""
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises whatever it stumbles over
        fail(COMMAND, f"{path} cannot be read ({short(error)}): a notebook (.ipynb) was expected")
    return notebook


def execute(notebook: Any, folder: Path) -> None:
    """Fill in the outputs of a notebook's cells, run in `folder`. Raises nbclient's CellExecutionError for a
    cell that fails."""
    from nbclient import NotebookClient
    from traitlets.config import Config

    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}  # pictures go into the notebook
    environment.setdefault("OMP_NUM_THREADS", "1")  # small matrices gain nothing from more
    with TemporaryDirectory() as sockets:  # files in place of open ports
        config = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}})
        where = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, kernel_name="python3", config=config, resources=where).execute(
            env=environment
        )


def write(notebook: Any, out: Path, name: str) -> dict[str, str]:
    """Both copies of an executed notebook; returns their paths."""
    import nbformat
    from nbconvert import HTMLExporter

    html, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": name}})
    files = {"ipynb": nbformat.writes(notebook) + "\n", "html": html}
    for kind, text in files.items():
        write_atomically(out / f"{name}.{kind}", text)
    return {kind: str(out / f"{name}.{kind}") for kind in files}


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    try:
        import ipykernel  # noqa: F401  what a kernel needs
        from nbclient.exceptions import CellExecutionError
        from nbconvert.filters import strip_ansi
    except ImportError:
        fail(COMMAND, "notebooks need nbclient, nbconvert and ipykernel: pip install -e '.[notebooks]'")
    # Now and then a message of a kernel that has ended meets a socket that is closed already. What fails in a
    # cell is told by nbclient.
    logging.getLogger("tornado.general").setLevel(logging.CRITICAL)
    paths = given.notebooks or sorted(Path(__file__).parent.glob("*.ipynb"))
    notebooks, done = [read(path) for path in paths], []
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        for path, notebook in zip(paths, notebooks, strict=True):
            began = time.perf_counter()
            execute(notebook, path.resolve().parent)
            files = write(notebook, given.out, path.stem)
            done.append({"notebook": path.stem, "seconds": round(time.perf_counter() - began, 1), **files})
            if not given.json:
                print(f"{path.stem}: {done[-1]['seconds']} s, {os.path.relpath(files['html'])}", flush=True)
    except CellExecutionError as error:
        print(f"{strip_ansi(str(error))}\n{COMMAND}: a cell of {path} failed: "
              f"{error.ename}: {error.evalue}", file=sys.stderr)  # fmt: skip
        return 1
    except OSError as error:
        fail(COMMAND, f"{given.out} cannot be written ({short(error)}): give another folder with --out")
    if given.json:
        print(json.dumps(done, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
