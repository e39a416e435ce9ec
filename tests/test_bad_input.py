"""Bad input to the command line: exit code 2, one line on stderr, nothing on stdout."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
from tiny_folder import PROMPTS, edit_config, edit_tensor, shard, write_tiny

from qwen3_model.cli import VERBS, main

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("bad") / "tiny")


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the tiny checkpoint to damage."""
    return shutil.copytree(tiny, tmp_path / "copy")


@pytest.fixture
def refusal(capsys):
    """Runs a command line that must be refused; returns the message."""

    def call(*args) -> str:
        code = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert code == 2 and out == "", (code, out, err)
        assert err.startswith("orthrus: error: ") and err.endswith("\n") and err.count("\n") == 1, err
        return err

    return call


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--temperature", "warm"], "--temperature"),
        (["--top-p", "0"], "top_p"),
        (["--top-p", "1.5"], "top_p"),
        (["--min-p", "2"], "min_p"),
        (["--top-k", "-1"], "top_k"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
        (["--seed", "-1"], "seed"),
        (["--logit-bias", "5"], "ID=VALUE"),
        (["--logit-bias", "x=1"], "ID=VALUE"),
        (["--logit-bias", "5=inf"], "logit_bias"),
        (["--logit-bias", "100000=1"], "logit_bias"),
        (["--max-new-tokens", "5000"], "past the context of 1024"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--block-size", "1"], "block_size"),
        (["--stop", ""], "stop string"),
        (["--strategy", "magic"], "unknown strategy"),
        (["--device", "cuda:7"], "cuda:7 is not there"),
        (["--device", "fridge"], "unknown device"),
        (["--device", "meta"], "device meta"),
        (["--dtype", "int8"], "dtype"),
        (["--backend", "magic"], "unknown backend"),
        (["--revision", "main"], "revision"),
        (["--json", "--colour-runs"], "not allowed with"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
)
def test_settings(tiny, refusal, changes, message):
    assert message in refusal("generate", PROMPTS[0], "--model", tiny, *changes)


@pytest.mark.parametrize("line", [[], ["fly"], ["generate"]])
def test_command_lines(refusal, line):
    assert "orthrus" in refusal(*line)


def test_no_verb_names_them_all(refusal):
    assert all(verb in refusal() for verb in VERBS)


@pytest.mark.parametrize(
    "line, helps",
    [
        (["generate", "--x"], "behind --"),
        (["explain", "-x"], "behind --"),
        (["generate", "x", "--stop", "--y"], "OPTION=VALUE"),
    ],
)
def test_text_that_begins_with_a_dash(refusal, line, helps):
    assert helps in refusal(*line)


def test_a_prompt_behind_two_dashes_is_read(tiny, capsys):
    line = ["generate", "--model", str(tiny), "--max-new-tokens", "2", "--stop=--y", "--", "--x"]
    assert main(line) == 0 and capsys.readouterr().out


def test_prompts(tiny, refusal, monkeypatch):
    assert "empty" in refusal("generate", "", "--model", tiny)
    assert "the context only 1024" in refusal("generate", "é" * 2000, "--model", tiny)
    assert "surrogate" in refusal("generate", "\udcff", "--model", tiny)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"))
    assert "stdin" in refusal("generate", "-", "--model", tiny)


def test_stdin_without_an_end(tiny, refusal, monkeypatch):
    monkeypatch.setattr("qwen3_model.cli.options.MOST_PROMPT", 1000)
    with open("/dev/zero") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        assert "more than 1000 characters" in refusal("generate", "-", "--model", tiny)


def test_no_such_model(tmp_path, refusal):
    for verb in (["generate", "x", "--model"], ["chat", "--model"], ["info"]):
        assert "there is no folder" in refusal(*verb, tmp_path / "nothing")
    assert "config.json is missing" in refusal("info", tmp_path)


def test_not_a_qwen3(copy, refusal):
    edit_config(copy, model_type="llama")
    assert "'llama'" in refusal("generate", "x", "--model", copy)
    assert "'llama'" in refusal("info", copy)


def test_a_missing_and_a_truncated_shard(copy, refusal):
    first, second = shard(copy)
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])
    assert second.name in refusal("generate", "x", "--model", copy)
    second.write_bytes(whole[:4])
    assert second.name in refusal("generate", "x", "--model", copy)
    second.unlink()
    assert f"{second.name}, which is missing" in refusal("generate", "x", "--model", copy)


def test_a_tensor_of_a_wrong_shape(copy, refusal):
    edit_tensor(copy, Q_PROJ, lambda weight: weight[:-1])
    assert Q_PROJ in refusal("generate", "x", "--model", copy)


@pytest.mark.parametrize("verb", [["generate", "x"], ["generate", "x", "--json"], ["verify"], ["chat"]])
def test_nan_in_the_logits(copy, refusal, monkeypatch, verb):
    edit_tensor(copy, Q_PROJ, lambda weight: torch.full_like(weight, torch.nan))
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n"))
    prompts = [copy / "held_out.jsonl"] if verb == ["verify"] else []
    assert "NaN" in refusal(*verb, *prompts, "--model", copy)


def test_two_pass_on_a_plain_qwen3(tmp_path, refusal):
    plain = write_tiny(tmp_path / "plain", block_size=0, mask_token_id=-1)
    assert "plain Qwen3" in refusal("generate", "x", "--model", plain, "--strategy", "two-pass")
    line = ("verify", plain / "held_out.jsonl", "--model", plain)
    assert "plain Qwen3" in refusal(*line, "--strategy", "two-pass")
    assert "compared with itself" in refusal(*line, "--strategy", "autoregressive")
    assert main(["generate", "x", "--model", str(plain), "--max-new-tokens", "2"]) == 0


def test_no_tokenizer_and_no_chat_template(copy, refusal):
    (copy / "chat_template.jinja").unlink()
    assert "has no chat template" in refusal("chat", "--model", copy)
    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal("chat", "--model", copy)
    assert "tokenizer.json" in refusal("generate", "x", "--model", copy)


def test_prompts_files(tiny, tmp_path, refusal):
    def verify(*args):
        return refusal("verify", *args, "--model", tiny)

    assert "there is no file" in verify(tmp_path / "none.jsonl")
    assert "cannot be read" in verify(tmp_path)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "x"}) + "\n{\n")
    assert "line 2" in verify(bad)
    bad.write_bytes(b"\xff\n")
    assert "line 1" in verify(bad)
    held_out = tiny / "held_out.jsonl"
    assert "no prompts" in verify(held_out, "--split", "none")
    assert "no field" in verify(held_out, "--field", "question")
    assert "limit" in verify(held_out, "--limit", 0)
    assert "--seeds" in verify(held_out, "--seeds", 0)
    assert "prompt 1: " in verify(held_out, "--max-new-tokens", 5000)
    said = verify(held_out, "--strategy", "one-pass", "--block-size", 65)
    assert "one-pass of this checkpoint takes 3 to" in said, "not plain decoding, which goes beside it"


def test_info_and_demo(tiny, tmp_path, refusal, monkeypatch):
    monkeypatch.setattr("qwen3_model.checkpoint.EMBEDDED", tiny)
    assert "--bandwidth" in refusal("info", tiny, "--bandwidth", "0")
    assert "dtype" in refusal("info", tiny, "--dtype", "int8")
    assert "--prompts" in refusal("demo", "--prompts", "0")
    assert "past the context" in refusal("demo", "--max-new-tokens", "5000")


def test_a_cache_that_does_not_fit(copy, refusal):
    edit_config(copy, max_position_embeddings=2**30)
    assert "GiB" in refusal("generate", "x", "--max-new-tokens", 2**30 - 9, "--model", copy)


def test_a_disk_that_is_full(tiny):
    with open("/dev/full", "w") as full:
        code = "import sys; from qwen3_model.cli import VERBS, main; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", code, "info", str(tiny)], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "space" in done.stderr
