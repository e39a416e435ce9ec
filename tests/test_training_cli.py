"""The verbs pretrain, distill and tiny-checkpoint: they train, resume, and refuse bad input in one line with
nothing written.
"""

import argparse
import dataclasses

import pytest
from trained import PLAN, TEXT, files_of, make_base, make_orthrus, sharded_copy

from qwen3_model import InputError, Qwen3Config
from qwen3_model.cli import distill, pretrain, tiny_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base", steps=5)


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    for verb in (pretrain, distill, tiny_checkpoint):
        verb.add(subparsers)
    return parser.parse_args(argv)


def run_verb(*argv: str) -> int:
    args = parsed(*argv)
    return args.run(args)


SMALL = ("--batch", "2", "--length", "64", "--text", *map(str, TEXT))


def test_the_verbs_train_and_resume(tmp_path):
    base, out = str(tmp_path / "base"), tmp_path / "out"
    sizes = ("--hidden-size", "64", "--layers", "1", "--vocab-size", "300")
    assert run_verb("pretrain", base, "--steps", "2", *sizes, *SMALL) == 0
    blocks = ("--blocks", "2", "--block-size", "4")
    assert run_verb("distill", base, str(out), "--steps", "2", *blocks, *SMALL) == 0
    assert Qwen3Config.from_folder(out).block_size == 4
    state = tmp_path / "out.state.safetensors"
    assert not state.exists()
    state.touch()
    again = ("distill", base, str(out), "--steps", "2", "--overwrite", *blocks, *SMALL)
    with pytest.raises(InputError, match="--resume"):
        run_verb(*again)
    with pytest.raises(InputError, match="damaged"):
        run_verb(*again, "--resume")
    state.unlink()
    assert run_verb(*again, "--resume") == 0  # nothing to go on from: from the beginning


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--steps", "0"), "steps is 0"),
        (("--seconds", "-1"), "seconds is"),
        (("--seconds", "nan"), "seconds is"),
        (("--batch", "0"), "batch is 0"),
        (("--lr", "-1"), "lr is"),
        (("--lr", "nan"), "lr is"),
        (("--seed", "-1"), "seed is"),
        (("--corpus-mb", "0"), "corpus-mb"),
        (("--length", "8", "--block-size", "8"), "hold no block"),
        (("--length", "5000"), "rows of 2 to"),
        (("--blocks", "0"), "blocks is 0"),
        (("--block-size", "1"), "block size is 1"),
        (("--offset-decay", "0"), "offset decay"),
        (("--mask-token-id", "300"), "mask token"),
        (("--text", "nowhere"), "not there"),
        (("--text", "SHORT"), "too few"),
        (("--revision", "main"), "revision"),
    ],
)
def test_distill_refuses(base, tmp_path, argv, words):
    """One line, before anything is trained or written."""
    (tmp_path / "SHORT").write_text("hardly any text")
    argv = tuple(str(tmp_path / a) if a in ("SHORT", "nowhere") else a for a in argv)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words) as error:
        run_verb("distill", str(base), str(tmp_path / "out"), "--steps", "1", *SMALL, *argv)
    assert "\n" not in str(error.value) and sorted(tmp_path.rglob("*")) == before


def test_what_may_not_be_written_or_distilled(base, tmp_path):
    full, text = tmp_path / "full", SMALL
    full.mkdir()
    (full / "mine").write_text("precious")
    steps = ("--steps", "1", "--block-size", "8", "--blocks", "2")
    for extra in ((), ("--overwrite",)):
        with pytest.raises(InputError, match="full"):
            run_verb("distill", str(base), str(full), *steps, *text, *extra)
        with pytest.raises(InputError, match="full"):
            run_verb("pretrain", str(full), "--steps", "1", *text, *extra)
        with pytest.raises(InputError, match="full"):
            run_verb("tiny-checkpoint", str(full), *extra)
        with pytest.raises(InputError, match="is a file"):
            run_verb("distill", str(base), str(full / "mine"), *steps, *text, *extra)
        with pytest.raises(InputError):
            run_verb("distill", str(base), str(base), *steps, *text, *extra)
    assert files_of(full) == {"mine": b"precious"}
    make_orthrus(base, tmp_path / "orthrus", plan=dataclasses.replace(PLAN, steps=1))
    with pytest.raises(InputError, match="Orthrus already"):
        run_verb("distill", str(tmp_path / "orthrus"), str(tmp_path / "twice"), *steps, *text)
    with pytest.raises(InputError, match="too few"):
        run_verb("pretrain", str(tmp_path / "new" / "deep"), "--steps", "1", "--text", str(full / "mine"))
    with pytest.raises(InputError, match="hidden-size"):
        run_verb("pretrain", str(tmp_path / "new"), "--hidden-size", "100", "--steps", "1", *text)
    with pytest.raises(InputError, match="seconds is"):
        run_verb("tiny-checkpoint", str(tmp_path / "new"), "--distill-seconds", "0")
    broken = sharded_copy(base, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer"):
        run_verb("distill", str(broken), str(tmp_path / "new"), *steps, *text)
    assert not (tmp_path / "new").exists() and not (tmp_path / "twice").exists()
