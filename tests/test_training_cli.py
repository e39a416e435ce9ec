"""The verbs pretrain, distill and tiny-checkpoint: they train, resume, and refuse bad input in one line with
nothing written.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from trained import BLOCKS, PLAN, TEXT, files_of, make_base, make_orthrus, sharded_copy

from qwen3_model import InputError, Qwen3Config
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.cli import distill, main, pretrain, tiny_checkpoint, unrepeat
from qwen3_model.training import dataset, loop, memory, recipe
from qwen3_model.training.base import dev_prompts, load_tokenizer
from qwen3_model.training.corpus import own_texts
from qwen3_model.training.folder import _copy_others
from qwen3_model.training.objective import LOSSES, OFFSET_WEIGHTS, Objective


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
    assert facts["distill"]["machine"] in (second / "README.md").read_text()
    assert "2 earlier steps" in (second / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--start", "nowhere"), "nowhere"),
        (("--start", "BASE"), "no diffusion weights"),
        (("--start", str(EMBEDDED)), "hidden_size"),
        (("--own-text", "1.01"), "own text"),
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


def test_the_objective_is_what_the_options_say(base, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(recipe, "run_distill", lambda *_, objective, **__: seen.append(objective))
    for options in ((), ("--loss", "ce", "--offset-weights", "survival")):
        assert run_verb("distill", str(base), str(tmp_path / "out"), *options) == 0
    assert seen == [Objective(), Objective("ce", "survival")]
    assert (tuple(LOSSES), OFFSET_WEIGHTS) == (distill.LOSSES, distill.OFFSET_WEIGHTS)
    for wrong in (("--loss", "mse"), ("--offset-weights", "measured")):
        assert main(["distill", str(base), str(tmp_path / "out"), *wrong]) == 2
        assert "invalid choice" in capsys.readouterr().err
    for objective in (Objective("mse"), Objective("kl", "measured")):
        with pytest.raises(InputError, match="was expected"):
            objective.check()


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


TINY = ("--hidden-size", "64", "--layers", "1", "--vocab-size", "300", "--steps", "3")


def at_the_end(monkeypatch, do) -> None:
    """Something happens as the last step of a training ends."""
    monkeypatch.setattr(loop._Report, "show", lambda self, step, *_: do() if step == 3 else None)


def test_what_appears_in_out_while_a_training_runs_stays(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def notes() -> None:
        out.mkdir()
        (out / "notes.txt").write_text("precious")

    at_the_end(monkeypatch, notes)
    assert main(["pretrain", str(out), *TINY, *SMALL]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"the new checkpoint is in {out}.new" in said
    assert files_of(out) == {"notes.txt": b"precious"} and (tmp_path / "out.new/model.safetensors").exists()


def test_a_second_training_into_one_out_is_refused_at_once(tmp_path, monkeypatch, capsys):
    codes = []
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    other = ["--seed", "7", "--state", str(tmp_path / "another")]

    def second() -> None:
        for where in ("real", "link"):
            codes.append(main(["pretrain", str(tmp_path / where), *TINY, *SMALL, *other]))
        state = ["--state", str(tmp_path / "real.state.safetensors"), "--resume"]
        codes.append(main(["pretrain", str(tmp_path / "third"), *TINY, *SMALL, *state]))

    at_the_end(monkeypatch, second)
    assert main(["pretrain", str(tmp_path / "link"), *TINY, *SMALL]) == 0
    assert codes == [2, 2, 2] and capsys.readouterr().err.count("another run is writing") == 3
    assert json.loads((tmp_path / "real/training.json").read_text())["pretrain"]["seed"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert (tmp_path / "link").is_symlink()


@pytest.mark.usefixtures("farewells")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_farewell_signal_leaves_the_state_alone(number, tmp_path, monkeypatch):
    at_the_end(monkeypatch, lambda: signal.raise_signal(number))
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", str(tmp_path / "a" / "out"), *TINY, *SMALL])
    assert ended.value.code == 128 + number
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out.state.safetensors"]


@pytest.mark.usefixtures("farewells")
def test_a_farewell_signal_removes_the_folder_of_a_tiny_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []

    def ended(*_: object) -> None:
        seen.extend(path.name for path in tmp_path.iterdir())
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(recipe, "corpus_files", ended)
    with pytest.raises(SystemExit):
        main(["tiny-checkpoint", str(tmp_path / "out"), "--select-tokens", "1000"])
    assert any(name.startswith("orthrus-") for name in seen) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--batch", "1000000"), "needs at least [0-9,.]+ GiB of memory"),
        (("--hidden-size", "64000"), "needs at least [0-9,.]+ GiB of memory"),
        (("--vocab-size", "1000000000"), "needs at least [0-9,.]+ GiB of memory"),
        (("--batch", "1" + "0" * 30), "batch is 10+; at most"),
        (("--batch", "1" + "0" * 4000), "batch is .*; at most"),
        (("--steps", "1" + "0" * 400), "steps is .*; at most"),
        (("--layers", "1" + "0" * 30), "num_hidden_layers"),
        (("--hidden-size", "64" + "0" * 30), "num_attention_heads"),
        (("--vocab-size", "1" + "0" * 30), "vocab_size"),
        (("--seed", "1" + "0" * 30), "seed is"),
        (("--length", "1" + "0" * 30), "rows of 2 to"),
        (("--seconds", "1e999"), "seconds is inf"),
    ],
)
def test_sizes_out_of_reach_are_refused_before_any_work(argv, words, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "corpus_files", lambda *_: pytest.fail("the corpus was read"))
    with pytest.raises(InputError, match=words) as error:
        run_verb("pretrain", str(tmp_path / "out"), "--steps", "1", *SMALL, *argv)
    assert len(str(error.value)) < 500 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [("--batch", "100000000"), ("--blocks", "1" + "0" * 30)])
def test_distillations_out_of_reach_are_refused_too(argv, base, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "corpus_files", lambda *_: pytest.fail("the corpus was read"))
    with pytest.raises(InputError, match="needs at least [0-9,.]+ GiB|blocks is"):
        run_verb("distill", str(base), str(tmp_path / "out"), "--steps", "1", *SMALL, *argv)


def test_a_limit_of_the_process_counts_as_the_machines_memory(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    cpu = torch.device("cpu")
    there = memory.memory_of(cpu)
    few = 64 * 2**30 if limits[1] == resource.RLIM_INFINITY else limits[1]
    try:
        resource.setrlimit(resource.RLIMIT_AS, (min(few, there - 4096), limits[1]))
        assert memory.memory_of(cpu) < there
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_memory_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "memory_of", lambda _: 10**30)
    tiny = ("--hidden-size", "64", "--layers", "1", "--vocab-size", "300", "--steps", "1")
    monkeypatch.setattr(loop.Rows, "batch", lambda self, step, size: torch.empty(2**40, 65, dtype=torch.long))
    assert main(["pretrain", str(tmp_path / "out"), *tiny, *SMALL]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "does not fit into memory (532480.0 GiB were asked for" in said and "--batch" in said
    assert not list(tmp_path.iterdir())


SETTINGS = {
    "truncation": {"direction": "Right", "max_length": 32, "strategy": "LongestFirst", "stride": 0},
    "padding": {"strategy": {"Fixed": 5000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "x"},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_truncation_and_padding_of_a_base_are_not_obeyed(name, base, tmp_path):
    files = own_texts(TEXT)
    expected = dataset.read_corpus(files, load_tokenizer(base), own=True)
    folder = shutil.copytree(base, tmp_path / "base")
    said = json.loads((folder / "tokenizer.json").read_text()) | {name: SETTINGS[name]}
    (folder / "tokenizer.json").write_text(json.dumps(said))
    found = dataset.read_corpus(files, load_tokenizer(folder), own=True)
    assert found.training.tolist() == expected.training.tolist()


@pytest.mark.parametrize(
    "part",
    [
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    ],
    ids=["unknown", "fixed length"],
)
def test_a_tokenizer_that_fails_late_is_one_line(part, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    said = json.loads((folder / "tokenizer.json").read_text()) | part
    said |= {"added_tokens": [], "post_processor": None} if "model" in part else {}
    (folder / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match="tokenizer"):
        run_verb("distill", str(folder), str(tmp_path / "out"), "--steps", "1", *SMALL)
    assert sorted(os.listdir(tmp_path)) == ["base"]


def test_what_a_base_says_wrongly_is_refused_before_the_training(base, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "corpus_files", lambda *_: pytest.fail("the corpus was read"))
    row = json.dumps({"split": "dev", "prompt": "x"})
    for name, content in (
        ("training.json", "[1"),
        ("held_out.jsonl", row + "\n{"),
        ("held_out.jsonl", b"\xff"),
    ):
        folder = shutil.copytree(base, tmp_path / "base")
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        for verb in ("distill", "unrepeat"):
            with pytest.raises(InputError, match=name):
                run_verb(verb, str(folder), str(tmp_path / "out"), "--steps", "1", *SMALL)
        shutil.rmtree(folder)


def test_development_prompts_may_hold_any_line_separator(tmp_path):
    """In JSON they stand as they are: a line of the file ends at a line feed alone."""
    prompt = "def f(x):\u2028\u0085\x0c" * 100
    rows = [{"prompt": prompt, "split": "dev"}, {"prompt": "x", "split": "test"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = load_tokenizer(EMBEDDED)
    found = dev_prompts(tmp_path, tokenizer, 2048)
    assert found is not None and found[0].tolist() == tokenizer.encode(prompt).ids[-found.shape[1] :]


def test_chat_templates_in_a_folder_of_their_own_go_along(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    out.mkdir()
    (base / "additional_chat_templates").mkdir(parents=True)
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    _copy_others(base, out)
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
