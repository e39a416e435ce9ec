"""The verbs pretrain, distill and tiny-checkpoint: they train, resume, and refuse bad input in one line with
nothing written.
"""

import argparse
import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from trained import BLOCKS, PLAN, TEXT, files_of, make_base, make_orthrus, sharded_copy

from qwen3_model import InputError, Qwen3Config
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.cli import distill, pretrain, tiny_checkpoint, unrepeat
from qwen3_model.training import recipe
from qwen3_model.training.corpus import own_texts


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base", steps=5)


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    for verb in (pretrain, unrepeat, distill, tiny_checkpoint):
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


def test_a_distillation_goes_on_from_an_earlier_one(base, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    blocks = ("--blocks", "2", "--block-size", "4", *SMALL)
    assert run_verb("distill", str(base), str(first), "--steps", "2", *blocks) == 0
    none = ("--steps", "1", "--lr", "1e-9")
    assert run_verb("distill", str(base), str(second), "--start", str(first), *none, *blocks) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    for name, weight in before.items():  # but for a step of 1e-9, which a weight near 0 can show
        torch.testing.assert_close(after[name], weight, rtol=0, atol=2e-9)
    facts = json.loads((second / "training.json").read_text())
    assert facts["distill"]["started_from"]["steps"] == 2
    assert "2 earlier steps" in (second / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--start", "nowhere"), "nowhere"),
        (("--start", "BASE"), "no diffusion weights"),
        (("--start", str(EMBEDDED)), "hidden_size"),
        (("--own-text", "1"), "own text"),
        (("--own-text", "-0.1"), "own text"),
        (("--own-text", "nan"), "own text"),
        (("--start", "LYING"), "no diffusion weights"),
    ],
)
def test_impossible_starts_and_shares(base, tmp_path, options, words):
    lying = tmp_path / "lying"  # its config speaks of a diffusion view, its tensors do not
    shutil.copytree(base, lying)
    config = json.loads((lying / "config.json").read_text())
    config |= {"architectures": ["OrthrusLM"], "block_size": 8, "mask_token_id": 3}
    (lying / "config.json").write_text(json.dumps(config))
    named = {"BASE": str(base), "LYING": str(lying)}
    with pytest.raises(InputError, match=words):
        run_verb("distill", str(base), str(tmp_path / "out"), *(named.get(o, o) for o in options), *SMALL)
    assert not (tmp_path / "out").exists()


def test_a_base_is_an_orthrus_by_its_tensors_too(base, tmp_path):
    make_orthrus(base, tmp_path / "orthrus", plan=dataclasses.replace(PLAN, steps=1))
    config = json.loads((tmp_path / "orthrus/config.json").read_text())
    config["architectures"] = ["Qwen3ForCausalLM"]
    (tmp_path / "orthrus/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="Orthrus already"):
        run_verb("distill", str(tmp_path / "orthrus"), str(tmp_path / "out"), *SMALL)


@pytest.mark.parametrize("distinct", ["0", "2", "nan"])
def test_unrepeat_refuses_an_impossible_share(base, tmp_path, distinct):
    with pytest.raises(InputError, match="distinct is"):
        run_verb("unrepeat", str(base), str(tmp_path / "out"), "--distinct", distinct, *SMALL)
    assert not (tmp_path / "out").exists()


def test_a_pretrained_base_with_held_out_prompts_gets_a_card(base, tmp_path, monkeypatch):
    """No step of `unrepeat` is needed before a distillation."""
    files = own_texts(TEXT)
    monkeypatch.setattr(recipe, "corpus_files", lambda *_: files)
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    rows = [{"split": "dev", "prompt": file.path.read_text()[:900]} for file in files[:4]]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = dataclasses.replace(PLAN, steps=1)
    recipe.run_distill(folder, tmp_path / "out", None, plan=plan, blocks=BLOCKS)
    assert "Tiny Orthrus" in (tmp_path / "out/README.md").read_text()
