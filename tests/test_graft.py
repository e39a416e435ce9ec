"""A diffusion view on another checkpoint of the same base: folds undone, misfits refused, text untouched."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folder import edit_config, edit_tensor, write_tiny
from write_quantised import FORMS, write

from orthrus_kernels import Rows
from orthrus_kernels.quantised import QuantisedWeight
from qwen3_model import InputError, Qwen3, Qwen3Config, cli, graft
from qwen3_model.cli import main, serve
from qwen3_model.graft import column_ratios, same_numbers
from qwen3_model.quantising.rounding import fp8_blocks, fp8_values

SHAPE = {"hidden_size": 64, "intermediate_size": 96}
NORM = "model.layers.{}.input_layernorm.weight"
READS_NORM = ("q_proj", "k_proj", "v_proj")


@pytest.fixture
def orthrus(tmp_path) -> Path:
    return write_tiny(tmp_path / "orthrus", **SHAPE)


def base_of(
    orthrus: Path, folder: Path, dtype=torch.float32, folds: dict[int, torch.Tensor] | None = None
) -> Path:
    """The AR view of an Orthrus as a checkpoint of its own, with the folds of AWQ: columns of q, k and v
    multiplied by a layer's numbers, its input norm divided by them."""
    folder.mkdir()
    tensors = {n: w for n, w in load_file(orthrus / "model.safetensors").items() if "_diff" not in n}
    for layer, numbers in (folds or {}).items():
        tensors[NORM.format(layer)] /= numbers
        for projection in READS_NORM:
            tensors[f"model.layers.{layer}.self_attn.{projection}.weight"] *= numbers
    save_file({name: w.to(dtype) for name, w in tensors.items()}, folder / "model.safetensors")
    raw = json.loads((orthrus / "config.json").read_text())
    for key in ("block_size", "mask_token_id"):
        del raw[key]
    (folder / "config.json").write_text(json.dumps(raw | {"architectures": ["Qwen3ForCausalLM"]}))
    (folder / "tokenizer.json").write_bytes((orthrus / "tokenizer.json").read_bytes())
    return folder


def random_folds(seed: int = 0) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.exp2(torch.rand(64, generator=generator) * 8 - 4) for layer in range(2)}


def load(folder: Path, orthrus: Path | None = None, **settings) -> Qwen3:
    return Qwen3.from_pretrained(folder, device="cpu", progress=False, diffusion=orthrus, **settings)


def refusal(base: Path, orthrus: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(base, orthrus)
    return str(caught.value)


def diffusion_logits(model: Qwen3, context: list[int]) -> torch.Tensor:
    """Logits of a block's rows behind a context, [K, V]."""
    cache = model.new_cache(64)
    model.prefill(context, cache)
    rows = Rows.block(7, model.config.block_size, len(context), model.config.mask_token_id)
    return model.forward(rows, cache).logits


# the fold


def test_a_folded_base_drafts_as_the_unfolded_one(orthrus, tmp_path):
    """Both views' logits, in fp32, within 1e-5 of the largest."""
    whole, context = load(orthrus), [5, 9, 77, 31, 200]
    grafted = load(base_of(orthrus, tmp_path / "base", folds=random_folds()), orthrus)
    assert grafted.config == whole.config
    for one in (diffusion_logits, Qwen3.logits):
        wanted = one(whole, context)
        assert (one(grafted, context) - wanted).abs().max() <= 1e-5 * wanted.abs().max(), one


def test_without_a_fold_no_bit_changes(orthrus, tmp_path):
    whole, grafted = load(orthrus), load(base_of(orthrus, tmp_path / "base"), orthrus)
    for name, weight in whole.destinations().items():
        assert torch.equal(grafted.destinations()[name], weight), name
    assert torch.equal(diffusion_logits(grafted, [1, 2, 3]), diffusion_logits(whole, [1, 2, 3]))


@pytest.mark.parametrize("options", [["--format", "fp8"], ["--format", "int4", "--group", "32"]])
def test_beside_a_quantised_base_the_view_is_fp8_of_folded_weights(orthrus, tmp_path, options, capsys):
    folds = random_folds()
    base, out = base_of(orthrus, tmp_path / "base", folds=folds), tmp_path / "quantised"
    assert main(["quantize", str(base), str(out), *options]) == 0
    model = load(out, orthrus)
    learnt = load_file(orthrus / "model.safetensors")
    for i, layer in enumerate(model.layers):
        assert layer.diffusion is not None
        for stack, projections in ((layer.diffusion.qkv, READS_NORM), (layer.diffusion.o, ("o_proj",))):
            assert isinstance(stack, QuantisedWeight)
            given = [learnt[f"model.layers.{i}.self_attn.{name}_diff.weight"] for name in projections]
            ratios = learnt[NORM.format(i)] / (learnt[NORM.format(i)] / folds[i])
            folded = [w * ratios if len(projections) == 3 else w for w in given]
            wanted = torch.cat([fp8_values(*fp8_blocks(w)) for w in folded])
            assert torch.equal(stack.dense(), wanted)
        for norm in ("q_norm", "k_norm"):
            name = f"model.layers.{i}.self_attn.{norm}_diff.weight"
            assert torch.equal(getattr(layer.diffusion, norm), learnt[name])
    words = ["--model", out, "--diffusion", orthrus, "--device", "cpu", "--strategy", "two-pass"]
    words = ["verify", orthrus / "held_out.jsonl", *words, "--max-new-tokens", 12, "--json"]
    assert main([str(word) for word in words]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["identical"] == said["compared"] == 5


@pytest.mark.parametrize("form", FORMS)
def test_beside_a_base_of_every_form(tmp_path, form):
    """The same model with plain weights of the same numbers has the grafted one's logits and text."""
    made = write(tmp_path / "base", form)
    orthrus, numbers, context = tmp_path / "orthrus", random_folds()[0][:32], [5, 9, 77, 31]
    orthrus.mkdir()
    (orthrus / "config.json").write_text(json.dumps(made.plain.config.to_dict()))
    save_file({n: w.clone() for n, w in made.plain.destinations().items()}, orthrus / "model.safetensors")
    made.tensors = {name: w for name, w in made.tensors.items() if "_diff" not in name}
    made.tensors[NORM.format(0)] /= numbers
    made.config |= {"block_size": None, "mask_token_id": None, "architectures": ["Qwen3ForCausalLM"]}
    grafted, plain = load(made.save(), orthrus), made.plain.destinations()
    ratios = plain[NORM.format(0)] / made.tensors[NORM.format(0)]
    plain[NORM.format(0)].copy_(made.tensors[NORM.format(0)])
    for name, weight in plain.items():
        if "proj_diff" in name:
            weight.copy_(fp8_values(*fp8_blocks(weight if "o_proj" in name else weight * ratios)))
    for one in (diffusion_logits, Qwen3.logits):
        wanted = one(made.plain, context)
        assert (one(grafted, context) - wanted).abs().max() <= 1e-5 * wanted.abs().max(), one
    texts = [grafted.generate(context, strategy, 8) for strategy in ("autoregressive", "two-pass")]
    assert texts[0].token_ids == texts[1].token_ids and texts[0].logprobs == texts[1].logprobs


def test_a_base_in_fp16_is_taken(orthrus, tmp_path):
    """As AWQ writes it: the least of the embedding's numbers have fewer digits there."""
    edit_tensor(orthrus, "model.embed_tokens.weight", lambda w: (w * 1e-3).bfloat16().float())
    base = base_of(orthrus, tmp_path / "base", torch.float16)
    assert load(base, orthrus).config.has_diffusion_view


def test_the_bigram_correction_comes_along(orthrus, tmp_path):
    table = torch.ones(300, 4)
    save_file({"before": table, "after": table.clone()}, orthrus / "bigram.safetensors")
    base = base_of(orthrus, tmp_path / "base")
    assert load(base, orthrus).bigram.gate is None
    d = json.loads((orthrus / "config.json").read_text())["block_size"] - 1
    places, calibration = torch.zeros(2, d, 3), torch.ones(2, 2, d, 2)
    found = {name: torch.ones(SHAPE["hidden_size"], 3) for name in ("front", "behind", "gate")}
    save_file(found | {"places": places, "calibration": calibration}, orthrus / "selector.safetensors")
    assert load(base, orthrus).bigram.before.shape == (300, 4 + 3)


# what does not fit


def test_ratios():
    ones = torch.ones(3)
    assert column_ratios(ones, ones.half(), "here") is None
    found = column_ratios(torch.tensor([0.0, 2.0, -3.0]), torch.tensor([0.0, 64.0, -0.046875]), "here")
    assert found is not None and found.tolist() == [1.0, 1 / 32, 64.0]
    for learnt, base in ((1.0, 0.0), (0.0, 1.0), (1.0, -1.0), (65.0, 1.0), (1.0, 65.0), (float("nan"), 1.0)):
        with pytest.raises(InputError, match="here: column 1 is"):
            column_ratios(torch.tensor([1.0, learnt]), torch.tensor([1.0, base]), "here")


def test_numbers_are_compared_in_the_coarser_dtype():
    numbers = torch.tensor([1.0, 3e-7, 1 + 2**-7]).bfloat16()
    assert same_numbers(numbers, numbers.half()) and same_numbers(numbers.half(), numbers)
    assert same_numbers(numbers, numbers.float() * (1 + 2**-12))
    assert not same_numbers(numbers, numbers + torch.tensor([0, 0, 2**-7]).bfloat16())


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("model.embed_tokens.weight", lambda w: w + 0.01, "was learnt for another base"),
        ("model.layers.1.self_attn.k_norm.weight", lambda w: w * 1.1, "was learnt for another base"),
        ("model.layers.1.input_layernorm.weight", lambda w: w * 100, "more than 64 times apart"),
        ("model.layers.0.input_layernorm.weight", lambda w: w * float("nan"), "more than 64 times apart"),
    ],
)
def test_another_base_is_refused(orthrus, tmp_path, name, change, says):
    base = base_of(orthrus, tmp_path / "base")
    edit_tensor(base, name, change)
    said = refusal(base, orthrus)
    assert says in said and name in said


def test_other_misfits_are_called_what_they_are(orthrus, tmp_path):
    base = base_of(orthrus, tmp_path / "base")
    assert "has a diffusion view of its own" in refusal(orthrus, orthrus)
    assert "has no diffusion view to graft" in refusal(base, base)
    other = write_tiny(tmp_path / "other", hidden_size=64, intermediate_size=128)
    assert "intermediate_size is 96 in" in refusal(base, other)
    quantised = tmp_path / "quantised"
    assert main(["quantize", str(orthrus), str(quantised), "--format", "fp8"]) == 0
    assert "give the Orthrus in 16 or 32 bits" in refusal(base, quantised)
    edit_tensor(orthrus, "model.layers.0.self_attn.q_proj_diff.weight", lambda w: w[1:])
    assert "has shape [63, 64]" in refusal(base, orthrus)


def test_a_server_knows_the_view_by_the_configs_alone(orthrus, tmp_path):
    base = base_of(orthrus, tmp_path / "base")
    words = "serve", "--model", str(base), "--diffusion", str(orthrus), "--device", "cpu", "--slots", "1"
    args = cli._parser().parse_args(words)
    assert serve.served_by(args, "name", base).config.block_size == 8
    model, _engine = replace(serve._engine(args, base), cache_tokens=64).made()
    assert model.config.block_size == 8
    config = Qwen3Config.from_folder(base)
    edit_config(orthrus, rope_parameters={"rope_theta": 5.0, "rope_type": "default"})
    with pytest.raises(InputError, match="rope_theta is"):
        graft.with_view(config, base, orthrus)
