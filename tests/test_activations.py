"""activations="fp8" of a model: applied to all weights that can round their rows, in both views, whatever the
number of rows; or refused in a line, and never dropped."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from small import small_config

from orthrus_kernels.quantised import Format
from qwen3_model import InputError, Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.cli import main
from qwen3_model.prompts import read_prompts
from qwen3_model.quantised.scheme import WHERE, read_quantisation
from qwen3_model.quantising.written import Fp8, Int4
from qwen3_model.serve.fingerprint import fingerprint
from qwen3_model.serve.messages import EngineOptions

FIT = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "max_position_embeddings": 128}


def quantised(form=None, **how) -> Qwen3:
    """A small random model; of a form its matrices are in groups of 128 columns."""
    config = {WHERE: (form or Fp8()).config([])}
    return Qwen3.from_config(small_config(**FIT, quantisation=read_quantisation(config)), device="cpu", **how)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded checkpoint in fp8, whose down projections have groups of 64 columns."""
    out = tmp_path_factory.mktemp("fp8") / "out"
    assert main(["quantize", str(EMBEDDED), str(out), "--format", "fp8", "--device", "cpu", "--json"]) == 0
    return out


def test_activations_are_applied_and_drafts_stay_lossless(folder, capsys):
    """To all weights in groups of 128. The texts are another model's, drafted as plain."""
    model = Qwen3.from_pretrained(folder, "cpu", progress=False, activations="fp8")
    for layer in model.layers:
        both = layer.ar, layer.diffusion
        assert all(weight.rounds for of in both for weight in (of.qkv, of.o)) and layer.gate_up.rounds
        assert not layer.down.rounds and layer.down.group == 64
    plain = Qwen3.from_pretrained(folder, "cpu", progress=False)
    assert not any(weight.rounds for weight in plain.codes()) and plain.activations is None
    ids = list(range(5, 25))
    logits, wide = model.logits(ids), plain.logits(ids)
    assert not torch.equal(logits, wide) and (logits - wide).norm() < 0.1 * wide.norm()
    capsys.readouterr()
    words = ["verify", "--model", folder, "--device", "cpu", "--activations", "fp8", "--limit", 2,
             "--max-new-tokens", 8, "--json", "--strategy", "two-pass"]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["identical"] == found["compared"] == 2 and found["activations"] == "fp8"


def test_what_the_kernels_say_is_what_one_row_says():
    """A pass of several rows on the interpreted kernels, row by row, and near the twins' in bf16."""
    kernels, twins = (
        quantised(backend=backend, dtype="bfloat16", activations="fp8") for backend in ("triton", "reference")
    )
    ids = [7, 3, 50, 20, 11]
    cache = kernels.new_cache(len(ids))
    at_once = kernels.prefill(ids, cache)
    one_by_one = kernels.new_cache(len(ids))
    assert torch.equal(kernels.prefill(ids, one_by_one, chunk=1), at_once)
    assert torch.allclose(at_once, twins.logits(ids), atol=0.02, rtol=0.02)


def test_a_mixed_checkpoint_rounds_where_it_can():
    """Beside a base of 4 bits the diffusion view alone."""
    model = quantised(Int4(128), activations="fp8")
    for weight in model.codes():
        assert weight.rounds == (weight.format is Format.E4M3)
    assert sum(weight.rounds for weight in model.codes()) == 2 * len(model.layers)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"activations": "int8"}, "activations 'int8' are not supported: use fp8, or leave them out"),
        ({"activations": "fp8", "backend": "torch"}, "are not for backend torch"),
        ({"activations": "fp8", "backend": "triton", "dtype": "float16"}, "dtype float16 is not supported"),
    ],
)
def test_what_cannot_round_is_refused(how, says):
    with pytest.raises(InputError, match=says):
        quantised(**how)


def test_a_gpu_of_another_kind_is_refused(monkeypatch):
    from qwen3_model import settings

    monkeypatch.setattr(settings, "device_key", lambda device: "sm_80")
    with pytest.raises(InputError, match="for GPUs of type sm_90 .H100, H200., and cuda is sm_80"):
        settings.pick_activations("fp8", torch.device("cuda"), "triton")
    assert settings.pick_activations("fp8", torch.device("cuda"), "reference") == "fp8"


@pytest.mark.parametrize(
    "words",
    [["generate", "x"], ["info"], ["serve", "--port", "0"], ["verify"], ["chat"], ["explain", "x"], ["demo"],
     ["warm"], ["batch", "in.jsonl", "out.jsonl"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_a_checkpoint_without_such_weights_is_refused(words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    body = {"model": "x", "prompt": "a", "max_tokens": 2}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    assert main([*words, "--activations", "fp8"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "8-bit floats in groups of 128 columns, and this checkpoint has none" in said[-1]
    assert said[-1].startswith("orthrus: error: ")
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"], "nothing half-written"


def test_who_shows_it(folder, capsys):
    assert main(["info", str(folder), "--activations", "fp8"]) == 0
    assert "in fp8 before 40 of the layers" in capsys.readouterr().out
    assert main(["info", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["activations"] is None and found["matrices_that_round"] == 0


def test_the_fingerprint_differs():
    names = [
        fingerprint(model, model.engine_of(1, 64))
        for model in (quantised(), quantised(activations="fp8"), quantised(activations="fp8"))
    ]
    assert names[0] != names[1] == names[2]


def test_the_fingerprint_has_the_setting(monkeypatch):
    """And not only the bits of two short texts, which another setting may leave as they are."""
    of = importlib.import_module("qwen3_model.serve.fingerprint")
    monkeypatch.setattr(of, "_texts", lambda model, engine: [])
    assert fingerprint(quantised(), None) != fingerprint(quantised(activations="fp8"), None)


def test_an_engines_process_is_told(folder):
    options = EngineOptions(model=folder, device="cpu", cache_tokens=64, activations="fp8")
    model, _ = options.made()
    assert model.activations == "fp8" and any(weight.rounds for weight in model.codes())


def drafted(folder, activations: str | None) -> float:
    """Tokens a cycle of the chain on held-out prompts."""
    model = Qwen3.from_pretrained(folder, "cpu", progress=False, activations=activations)
    prompts = read_prompts(EMBEDDED / "held_out.jsonl", 24, None, "test")
    stats = [model.generate(model.text.encode(p), "two-pass", 64, tree_nodes=0).stats for p in prompts]
    return sum(each.cycle_tokens for each in stats) / sum(each.cycles for each in stats)


@pytest.mark.slow
def test_the_embedded_view_keeps_its_acceptance(folder):
    """As a share of the plain checkpoint's; texts differ, so it scatters."""
    before, with_rounding = drafted(EMBEDDED, None), drafted(folder, "fp8")
    print(f"{with_rounding:.3f} tokens a cycle, in 16 bits {before:.3f}: {with_rounding / before:.3f}")
    assert with_rounding >= 0.93 * before
