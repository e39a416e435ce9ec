"""The file of a bigram correction: what is loaded, what is refused, what the verb writes."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from qwen3_model import InputError, Qwen3
from qwen3_model.bigram import FILE, MOST_RANK
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.cli import main


@pytest.fixture
def folder(tmp_path):
    """The embedded checkpoint without its tables, and what may stand beside them."""
    copy = tmp_path / "orthrus"
    shutil.copytree(EMBEDDED, copy, ignore=shutil.ignore_patterns("selector.safetensors"))
    (copy / FILE).unlink()
    return copy


def table(rows=2048, rank=4, dtype=torch.bfloat16):
    return torch.randn(rows, rank).to(dtype)


def test_without_the_file_there_is_no_correction(folder):
    assert Qwen3.from_pretrained(folder, "cpu", progress=False).bigram is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tables_come_in_the_models_dtype(folder, dtype):
    tables = {"before": table(), "after": table()}
    save_file(tables, folder / FILE)
    found = Qwen3.from_pretrained(folder, "cpu", dtype, progress=False).bigram
    for name, stored in tables.items():
        assert torch.equal(getattr(found, name), stored.to(getattr(torch, dtype)))


@pytest.mark.parametrize(
    "tables, word",
    [
        ({}, "holds no tensor; before, after were expected"),
        ({"before": table()}, "holds before; before, after were expected"),
        ({"before": table(), "after": table(), "more": table()}, "before, after were expected"),
        ({"before": table(), "after": table(rank=5)}, "after has shape [2048, 5]"),
        ({"before": table(7), "after": table(7)}, "shape [7, 4]"),
        ({"before": table()[0].clone(), "after": table()}, "shape [4]; [2048, 1 to 256] was expected"),
        ({n: table(rank=MOST_RANK + 1) for n in ("before", "after")}, "[2048, 257]"),
        ({n: table().to(torch.int8) for n in ("before", "after")}, "before is I8"),
        ({n: torch.full((2048, 4), float("nan")) for n in ("before", "after")}, "not finite numbers"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_does_not_fit_is_refused(folder, tables, word, capsys):
    save_file(tables, folder / FILE)
    with pytest.raises(InputError, match=".") as error:
        Qwen3.from_pretrained(folder, "cpu", progress=False)
    assert word in str(error.value) and FILE in str(error.value)
    assert main(["generate", "x", "--model", str(folder), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_cut_short_is_refused(folder):
    shutil.copyfile(EMBEDDED / FILE, folder / FILE)
    with open(folder / FILE, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match="cut short"):
        Qwen3.from_pretrained(folder, "cpu", progress=False)


def test_a_link_to_nowhere_is_refused(folder):
    """It is a file that someone meant to be there."""
    (folder / FILE).symlink_to(folder / "gone")
    with pytest.raises(InputError, match="is not a file"):
        Qwen3.from_pretrained(folder, "cpu", progress=False)


def test_the_verb_adds_tables_and_leaves_the_weights(folder, tmp_path, capsys):
    text = tmp_path / "text.py"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(300)))
    out = tmp_path / "out"
    small = ["--text", str(text), "--steps", "2", "--batch", "2", "--length", "64", "--blocks", "2",
             "--block-size", "8", "--rank", "3"]  # fmt: skip
    assert main(["bigram", str(folder), str(out), *small]) == 0
    model = Qwen3.from_pretrained(out, "cpu", progress=False)
    assert model.bigram.before.shape == (2048, 3) and model.bigram.after.any()
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    capsys.readouterr()
    for wrong, word in (
        (["--rank", "0"], "bigram rank is 0"),
        (["--block-size", "2"], "block size is 2: the correction begins"),
    ):
        assert main(["bigram", str(folder), str(tmp_path / "no"), *small, *wrong]) == 2
        said = capsys.readouterr().err
        assert word in said.splitlines()[-1] and not (tmp_path / "no").exists()
