"""Quantised checkpoints: what a literal writer wrote is loaded code for code, and what this project does not
compute is refused in one line before anything is copied."""

import json
import logging
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_folder import shard
from torch.utils._python_dispatch import TorchDispatchMode
from write_quantised import (
    EIGHT_BITS,
    FORMS,
    GROUP,
    SYMMETRIC,
    Matrix,
    Written,
    awq,
    e4m3,
    fp8,
    gptq,
    pack_quantized,
    random_matrix,
    word,
    write,
)

from orthrus_kernels.quantised import Format, QuantisedWeight
from qwen3_model import InputError, Qwen3, Qwen3Config
from qwen3_model.matrices import Matrices
from qwen3_model.quantised import slot
from qwen3_model.quantised.scheme import read_quantisation
from qwen3_model.quantised.slot import Slot
from qwen3_model.quantised.stored import StoredWeights, by_config
from qwen3_model.training.folder import load_network
from qwen3_model.weight_files import Header

Q, OUT, DOWN = (
    f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
)
Q_DIFF = Q + "_diff"
PUBLISHED = json.loads((Path(__file__).parent / "fixtures/published.json").read_text())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of each form, written once; tests that change one write it again."""
    made: dict[str, Written] = {}

    def of(form: str) -> Written:
        if form not in made:
            made[form] = write(tmp_path_factory.mktemp("forms"), form)
        return made[form]

    return of


def load(folder, **settings) -> Qwen3:
    return Qwen3.from_pretrained(folder, device="cpu", progress=False, **settings)


def refusal(made: Written, monkeypatch=None) -> str:
    """The line that loading fails with; where monkeypatch is given nothing may have been copied before."""
    if monkeypatch is not None:
        monkeypatch.setattr(Slot, "fill", lambda *_: pytest.fail("copied before all was checked"))
    with pytest.raises(InputError) as caught:
        load(made.save())
    said = str(caught.value)
    assert "\n" not in said and len(said) < 500
    return said


def rows(part: Slot) -> slice:
    return slice(part.first, part.first + part.shape[0])


def assert_holds(part: Slot, form: str, m: Matrix) -> None:
    """Every code, scale and zero point of a part of a loaded weight is what was written."""
    weight, mine, (n, k) = part.weight, rows(part), m.shape
    assert weight.codes()[mine].tolist() == m.codes and part.shape == (n, k)
    starts = range(0, k, weight.group)
    assert weight.scale[:, mine].t().tolist() == [[m.scale(r, c) for c in starts] for r in range(n)]
    if form not in EIGHT_BITS and form not in SYMMETRIC:
        assert weight.zero is not None and weight.zero[:, mine].t().tolist() == m.zero
    else:
        assert weight.zero is None


# what is loaded


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_loaded_code_for_code(written, form):
    made = written(form)
    model, plain = load(made.folder), made.plain
    parts = model.destinations()
    assert len(made.matrices) == 7 and parts.keys() == plain.destinations().keys()
    for module, (_, m) in made.matrices.items():
        part = parts[f"{module}.weight"]
        assert isinstance(part, Slot)
        assert_holds(part, form, m)
    for name, part in parts.items():
        if isinstance(part, torch.Tensor):
            assert torch.equal(part, plain.destinations()[name]), name
    ids = [1, 2, 3, 50, 4]
    torch.testing.assert_close(model.logits(ids), plain.logits(ids), rtol=1e-4, atol=1e-5)
    assert model.generate(ids, max_new_tokens=9).token_ids == plain.generate(ids, max_new_tokens=9).token_ids


def test_scales_are_kept_as_stored_and_bytes_are_counted(written):
    wanted = {"fp8": torch.bfloat16, "awq": torch.float16, "channel": torch.float32, "pack": torch.bfloat16}
    for form, dtype in wanted.items():
        model = load(written(form).folder)
        down = model.layers[0].down
        assert isinstance(down, QuantisedWeight) and down.scale_dtype == dtype, form
        assert model.destinations()[f"{DOWN}.weight"].nbytes == down.nbytes
        qkv = [model.destinations()[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkv"]
        assert sum(part.nbytes for part in qkv) == model.layers[0].ar.qkv.nbytes


@pytest.mark.parametrize("form", ["awq", "gptq", "pack"])
def test_zero_points_beside_scales_of_fp32(tmp_path, form):
    """Scales that need all bits of fp32 leave no room for zero points: the numbers are kept in 8 bits."""
    m = random_matrix(40, 128, form, random.Random(3))
    name = "weight_scale" if form == "pack" else "scales"
    scale = torch.rand(FORMS[form][0](m)[name].shape) / 7
    part = of_matrix(tmp_path, form, m, **{name: scale})
    by_group = scale if form == "pack" else scale.t()
    zero = torch.tensor(m.zero).repeat_interleave(part.weight.group, 1)
    assert part.weight.format is Format.E4M3 and torch.equal(part.weight.scale, by_group.t())
    assert torch.equal(part.weight.values(), (torch.tensor(m.codes) - zero).float())


def test_a_modules_tensors_may_lie_in_two_files(tmp_path):
    made = write(tmp_path, "awq")
    shard(made.folder)
    model = load(made.folder)
    for module, (form, m) in made.matrices.items():
        assert_holds(model.destinations()[f"{module}.weight"], form, m)


def header_of(file: Path, tensor: torch.Tensor) -> Header:
    kinds = {torch.int32: "I32", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16",
             torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}  # fmt: skip
    return Header(file, kinds[tensor.dtype], tuple(tensor.shape))


def of_matrix(tmp_path, form: str, m: Matrix, **changed: torch.Tensor) -> Slot:
    """The slot of one matrix, filled from a file; changed: tensors in place of its own."""
    tensors = {f"m.{name}": t.contiguous() for name, t in (FORMS[form][0](m) | changed).items()}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    headers = {name: header_of(file, t) for name, t in tensors.items()}
    scheme = read_quantisation({"quantization_config": FORMS[form][1]})
    new = Matrices(torch.device("cpu"), torch.bfloat16, StoredWeights(headers, scheme).of)
    stack = {"m": m.shape[0]}
    part = dict(new.parts(new.matrix(stack, m.shape[1]), stack))["m.weight"]
    assert isinstance(part, Slot)
    part.fill({name.removeprefix("m."): t for name, t in tensors.items()})
    return part


@pytest.mark.parametrize("form", ["fp8", "block", "awq", "gptq", "pack"])
@pytest.mark.parametrize(("n", "k", "group"), [(152, 192, 64), (132, 352, 32), (20, 256, 128)])
def test_partial_blocks_and_rows_at_a_time(tmp_path, monkeypatch, form, n, k, group):
    """152 rows are a block and a part of one, 192 columns too; 352 end in the middle of a group of 64."""
    monkeypatch.setattr(slot, "CODES_AT_ONCE", 40 * k)
    m = random_matrix(n, k, form, random.Random(k))
    part = of_matrix(tmp_path, form, m)
    assert part.weight.group == (group if form in EIGHT_BITS else GROUP)
    assert_holds(part, form, m)


@pytest.mark.parametrize(("forms", "sizes", "shared"), [
    (("fp8", "fp8", "fp8"), (256, 128, 60), 128), (("block", "block"), (128, 152), 128),
    (("tensor", "tensor"), (128, 20), 128), (("channel", "channel"), (128, 128), 1),
    (("fp8", "fp8"), (152, 128), 1), (("channel", "tensor"), (128, 128), 1), (("awq", "awq"), (128, 128), 1),
], ids=["fp8", "block", "tensor", "channel", "parts-of-blocks", "channel-and-tensor", "awq"])  # fmt: skip
def test_rows_of_a_block_share_a_factor_where_each_part_begins_one(
    tmp_path, monkeypatch, forms, sizes, shared
):
    """Repacked 40 rows at a time, which end inside blocks."""
    k, rng = 192 if forms[0] in EIGHT_BITS else 64, random.Random(5)
    monkeypatch.setattr(slot, "CODES_AT_ONCE", 40 * k)
    matrices = [random_matrix(n, k, form, rng) for form, n in zip(forms, sizes, strict=True)]
    stored = [FORMS[form][0](m) for form, m in zip(forms, matrices, strict=True)]
    names = [f"m{i}" for i in range(len(sizes))]
    headers = {
        f"{module}.{name}": header_of(tmp_path, tensor)
        for module, tensors in zip(names, stored, strict=True)
        for name, tensor in tensors.items()
    }
    scheme = read_quantisation({"quantization_config": FORMS[forms[0]][1]})
    new = Matrices(torch.device("cpu"), torch.bfloat16, StoredWeights(headers, scheme).of)
    stack = dict(zip(names, sizes, strict=True))
    weight = new.matrix(stack, k)
    assert isinstance(weight, QuantisedWeight) and weight.factor_rows == shared
    parts = [part for _, part in new.parts(weight, stack)]
    for part, tensors in zip(parts, stored, strict=True):
        part.fill(tensors)
    for part, form, m in zip(parts, forms, matrices, strict=True):
        assert_holds(part, form, m)
    assert sum(part.nbytes for part in parts) == weight.nbytes
    told = Matrices(torch.device("meta"), torch.bfloat16, by_config(scheme)).matrix(stack, k)
    assert told.factor_rows == shared, "by the config alone"


class Largest(TorchDispatchMode):
    """The largest memory that a tensor made inside has, those that were there before left out."""

    def __init__(self, there: list[torch.Tensor]) -> None:
        super().__init__()
        self.there, self.bytes = {tensor.untyped_storage().data_ptr() for tensor in there}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.there:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("form", ["fp8", "awq", "gptq", "pack"])
def test_repacking_takes_memory_for_some_rows_alone(tmp_path, monkeypatch, form):
    """8 bytes a code are the most that one tensor takes: 34 MB, whatever the weight is."""
    m = random_matrix(128, 128, form, random.Random(2))
    part = of_matrix(tmp_path, form, m)
    tensors = {name: tensor.contiguous() for name, tensor in FORMS[form][0](m).items()}
    weight = part.weight
    there = [weight.words, weight.factors, *tensors.values()]
    monkeypatch.setattr(slot, "CODES_AT_ONCE", 16 * 128)
    with Largest(there) as largest:
        part.fill(tensors)
    assert 16 * 128 <= largest.bytes <= 8 * 16 * 128
    assert_holds(part, form, m)


def test_words_as_the_formats_are_told_of():
    """By hand: AWQ's order, GPTQ's zeros minus one, a bias of 8, and numbers of e4m3."""
    eight = Matrix([[i] * GROUP for i in range(8)], lambda n, c: 1.0, [[8]] * 8)
    assert awq(eight)["qweight"].tolist() == [[0x75316420]] * GROUP
    assert gptq(eight)["qzeros"].tolist() == [[0x77777777]]
    assert pack_quantized(eight)["weight_packed"][7].tolist() == [0x77777777] * 4
    assert pack_quantized(eight)["weight_zero_point"].tolist() == [[word([8] * 8)]]
    assert [e4m3(code) for code in (0x00, 0x01, 0x38, 0x7E, 0xB8)] == [0, 2**-9, 1, 448, -1]
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert all(e4m3(code) == every[code] for code in range(256) if code & 127 != 127)


# diffusion views


@pytest.mark.parametrize(
    ("form", "diffusion"), [("awq", "fp8"), ("fp8", "pack"), ("pack", "channel"), ("gptq", "gptq")]
)
def test_a_diffusion_view_has_a_form_of_its_own(tmp_path, form, diffusion):
    made = write(tmp_path, form, diffusion)
    model = load(made.folder)
    for module, (of, m) in made.matrices.items():
        assert_holds(model.destinations()[f"{module}.weight"], of, m)
    assert model.drafts_are_numbers()
    model.layers[0].diffusion.qkv.factors[0, 0] = 0x7FC00000  # NaN
    assert not model.drafts_are_numbers()


def test_a_quantised_diffusion_view_beside_a_plain_base(tmp_path):
    made = write(tmp_path, "fp8", "fp8")
    for module in [module for module in made.matrices if not module.endswith("_diff")]:
        _, m = made.matrices.pop(module)
        for name in ("weight_scale_inv", "weight"):
            del made.tensors[f"{module}.{name}"]
        made.tensors[f"{module}.weight"] = m.dense("fp8")
    del made.config["quantization_config"]
    model = load(made.save())
    assert len(made.matrices) == 4 and model.config.quantisation is None
    for module, (of, m) in made.matrices.items():
        assert_holds(model.destinations()[f"{module}.weight"], of, m)


def test_gptq_of_a_diffusion_view_needs_the_config_for_its_zeros(tmp_path, monkeypatch):
    said = refusal(write(tmp_path, "awq", "gptq"), monkeypatch)
    assert f"{Q_DIFF} is stored as gptq, and config.json tells of awq" in said


# what headers and config must agree on


def test_stacks_are_of_one_kind(tmp_path, monkeypatch):
    made = write(tmp_path, "pack")
    made.put(Q, "pack symmetric", random_matrix(64, 32, "pack symmetric", random.Random(1)))
    assert f"{Q} has no zero points though config.json calls it asymmetric" in refusal(made, monkeypatch)
    made = write(tmp_path, "fp8")
    del made.tensors[f"{Q}.weight_scale_inv"]
    made.tensors[f"{Q}.weight"] = torch.ones(64, 32)
    said = refusal(made, monkeypatch)
    assert f"{Q} is plain, model.layers.0.self_attn.k_proj is fp8 in groups of 32" in said and "alike" in said
    made = write(tmp_path, "fp8", "fp8")
    made.put(Q_DIFF, "pack", random_matrix(64, 32, "pack", random.Random(1)))
    assert f"{Q_DIFF} is pack-quantized" in refusal(made, monkeypatch)
    made = write(tmp_path, "awq")
    made.tensors[f"{Q}.scales"] = made.tensors[f"{Q}.scales"].float()
    assert "float32 scales" in refusal(made, monkeypatch)


def test_modules_outside_a_stack_may_be_plain(tmp_path):
    made = write(tmp_path, "awq")
    _, m = made.matrices.pop(OUT)
    made.tensors = {name: t for name, t in made.tensors.items() if not name.startswith(OUT + ".")}
    made.tensors[f"{OUT}.weight"] = m.dense("awq")
    model = load(made.save())
    assert torch.equal(model.layers[0].ar.o.dense(), m.dense("awq"))
    assert isinstance(model.layers[0].ar.qkv, QuantisedWeight)


@pytest.mark.parametrize("listed", [OUT, "model.layers.0.self_attn", "o_proj"])
def test_a_module_that_is_not_to_be_converted_must_be_plain(tmp_path, monkeypatch, listed):
    made = write(tmp_path, "awq")
    made.config["quantization_config"] = FORMS["awq"][1] | {"modules_to_not_convert": ["lm_head", listed]}
    assert "lists it among modules that are not converted" in refusal(made, monkeypatch)


def test_parts_of_words_are_no_modules(tmp_path):
    made, listed = write(tmp_path, "awq"), ["model.layers.0.mlp.gate", "proj", "re:.*o_proj"]
    made.config["quantization_config"] = FORMS["awq"][1] | {"modules_to_not_convert": listed}
    layer = load(made.save()).layers[0]
    assert all(isinstance(of, QuantisedWeight) for of in (layer.ar.qkv, layer.ar.o, layer.gate_up))


@pytest.mark.parametrize(
    ("form", "config", "says"),
    [
        ("gptq", "awq", "q_proj is stored as gptq, and config.json tells of awq"),
        ("awq", "gptq", "q_proj is stored as awq, and config.json tells of gptq"),
        ("fp8", "channel", "q_proj is stored as fp8, and config.json tells of float-quantized"),
        ("pack", "pack symmetric", "q_proj has zero points though config.json calls it symmetric"),
        ("gptq v2", "gptq symmetric", "has zero points other than 8 though config.json calls it symmetric"),
        ("fp8", None, "config.json tells of none (quantization_config is missing)"),
    ],
)
def test_another_form_than_the_configs_is_refused(tmp_path, form, config, says):
    made = write(tmp_path, form)
    made.config["quantization_config"] = FORMS[config][1] if config else None
    assert says in refusal(made)


def test_a_config_of_plain_weights_is_refused(tmp_path):
    made = write(tmp_path, "fp8")
    made.tensors = {name: weight.clone() for name, weight in made.plain.destinations().items()}
    assert "no module has tensors of codes: remove it" in refusal(made)


def damage(name: str, change):
    def edit(made: Written) -> None:
        made.tensors[name] = change(made.tensors[name])

    return edit


def removed(name: str):
    return lambda made: made.tensors.pop(name)


def added(name: str, tensor: torch.Tensor):
    return lambda made: made.tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("form", "edit", "says"),
    [
        ("awq", removed(f"{OUT}.qzeros"), f"lacks {OUT}.qzeros of a weight that is stored as awq"),
        ("awq", damage(f"{OUT}.qzeros", lambda t: t[:1]), "qzeros has shape [1, 4]; [2, 4] was expected"),
        ("awq", damage(f"{OUT}.scales", lambda t: t[:1]), "32 columns a scale were expected"),
        ("awq", damage(f"{OUT}.scales", lambda t: t.double()), "scales is F64; F16, BF16, F32 was expected"),
        ("awq", damage(f"{OUT}.qweight", lambda t: t.t()), "qweight has shape [4, 64]; [64, 4] was expected"),
        ("awq", added("lm_head.qweight", torch.ones(2)), "lm_head.qweight, the tensors of a quantised"),
        ("awq", added("model.norm.scales", torch.ones(2)), "model.norm.scales, the tensors of a quantised"),
        ("gptq", damage(f"{OUT}.g_idx", lambda t: t.flip(0)), "(act-order), which is not supported"),
        (
            "fp8",
            damage(f"{OUT}.weight_scale_inv", lambda t: t.half()),
            "is F16; BF16, F32 was expected of fp8",
        ),
        ("fp8", damage(f"{OUT}.weight_scale_inv", lambda t: t.repeat(2, 1)), "has shape [2, 1]; [1, 1]"),
        ("fp8", damage(f"{OUT}.weight", lambda t: t.float()), f"{OUT}.weight is F32; F8_E4M3 was expected"),
        ("fp8", added(f"{OUT}.input_scale", torch.ones(1)), "static scale of activations (input_scale)"),
        ("pack", damage(f"{OUT}.weight_shape", lambda t: t + 1), "holds [33, 65]; [32, 64] was expected"),
        ("pack", removed(f"{OUT}.weight_shape"), "lacks model.layers.0.self_attn.o_proj.weight_shape"),
        ("pack", added(f"{OUT}.weight_g_idx", torch.arange(64)), "weight_g_idx is I64; I32 was expected"),
        ("pack", added(f"{OUT}.weight_g_idx", torch.arange(64).int() % 2), "(act-order)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_a_byte_is_copied(tmp_path, monkeypatch, form, edit, says):
    made = write(tmp_path, form)
    edit(made)
    assert says in refusal(made, monkeypatch)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_that_are_no_numbers_are_refused(tmp_path, code):
    made = write(tmp_path, "fp8")
    made.tensors[f"{DOWN}.weight"].view(torch.uint8)[3, 70] = code
    assert f"{DOWN} holds codes that are no numbers" in refusal(made)


def test_trivial_g_idx_is_accepted_whatever_desc_act_says(tmp_path):
    made = write(tmp_path, "gptq")
    made.config["quantization_config"] = FORMS["gptq"][1] | {"desc_act": True}
    assert isinstance(load(made.save()).layers[0].ar.o, QuantisedWeight)
    made = write(tmp_path, "pack")
    plain = load(made.save()).layers[0].ar.o
    made.tensors[f"{OUT}.weight_g_idx"] = (torch.arange(64) // GROUP).int()
    assert torch.equal(load(made.save()).layers[0].ar.o.codes(), plain.codes())


# what a config may say


def compressed(form: str, **changes):
    raw = FORMS[form][1]
    group = raw["config_groups"]["group_0"]
    weights = group["weights"] | {name: v for name, v in changes.items() if name in group["weights"]}
    rest = {name: v for name, v in changes.items() if name not in group["weights"]}
    return raw | {"config_groups": {"group_0": group | rest | {"weights": weights}}}


TWO = {"a": FORMS["pack"][1]["config_groups"]["group_0"],
       "b": FORMS["pack symmetric"][1]["config_groups"]["group_0"]}  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"quant_method": "gguf"}, "quant_method is 'gguf'; GGUF has an arithmetic of its own"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes rounds weights to tables"),
        ({"quant_method": "mxfp4"}, "weights of 4-bit floats (NVFP4, MXFP4) are not read"),
        ({"quant_method": "modelopt"}, "quant_method is 'modelopt'"),
        ({}, "quant_method is None; fp8, awq, gptq or compressed-tensors was expected"),
        ({"quant_method": ["fp8"]}, "quant_method is ['fp8']"),
        ("fp8", "quantization_config is 'fp8'; an object was expected"),
        (FORMS["fp8"][1] | {"activation_scheme": "static"}, "activation_scheme is 'static'; dynamic was"),
        (FORMS["fp8"][1] | {"scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0'"),
        (FORMS["fp8"][1] | {"fmt": "e5m2"}, "fmt is 'e5m2'"),
        (FORMS["fp8"][1] | {"weight_block_size": [64, 64]}, "weight_block_size is [64, 64]"),
        (FORMS["fp8"][1] | {"modules_to_not_convert": "lm_head"}, "a list of names was expected"),
        (FORMS["awq"][1] | {"bits": 8}, "bits is 8; 4 was expected"),
        (FORMS["awq"][1] | {"group_size": 16}, "group_size is 16; 32, 64, 128 was expected"),
        (FORMS["awq"][1] | {"group_size": -1}, "group_size is -1"),
        (FORMS["awq"][1] | {"version": "gemv"}, "version is 'gemv'; gemm was expected"),
        (FORMS["awq"][1] | {"zero_point": False}, "zero_point is False; true was expected"),
        (FORMS["gptq"][1] | {"bits": 8}, "bits is 8; 4 was expected"),
        (FORMS["gptq"][1] | {"dynamic": {"-:.*down": {}}}, "dynamic is"),
        (FORMS["gptq"][1] | {"checkpoint_format": "marlin"}, "checkpoint_format is ['marlin']"),
        (FORMS["gptq"][1] | {"format": "gptq_v2"}, "checkpoint_format is ['gptq', 'gptq_v2']"),
        (FORMS["gptq"][1] | {"is_marlin_format": True}, "checkpoint_format"),
        (FORMS["gptq"][1] | {"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        (FORMS["gptq"][1] | {"lm_head": True}, "lm_head is True; a head in 16 bits was expected"),
        (FORMS["gptq"][1] | {"sym": "no"}, "sym is 'no'; true or false was expected"),
        (FORMS["pack"][1] | {"format": "nvfp4-pack-quantized"}, "weights of 4-bit floats"),
        (FORMS["pack"][1] | {"format": "mixed-precision"}, "format is 'mixed-precision'"),
        (FORMS["pack"][1] | {"config_groups": TWO}, "one scheme for all of them was expected"),
        (FORMS["pack"][1] | {"config_groups": {}}, "config_groups is []; one scheme"),
        (FORMS["pack"][1] | {"config_groups": [1]}, "config_groups is [1]; an object was expected"),
        (FORMS["pack"][1] | {"config_groups": {"a": {}}}, "strategy is None; group was expected"),
        (FORMS["pack"][1] | {"sparsity_config": "dense"}, "sparsity_config is 'dense'; an object was"),
        (FORMS["pack"][1] | {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config is"),
        (FORMS["pack"][1] | {"transform_config": {"x": 1}}, "transform_config is"),
        (compressed("pack", num_bits=8), "num_bits is 8; 4 was expected"),
        (compressed("pack", strategy="channel"), "strategy is 'channel'; group was expected"),
        (compressed("pack", format="int-quantized"), "format of a config group is 'int-quantized'"),
        (compressed("channel", type="int"), "type is 'int'; float was expected"),
        (compressed("channel", strategy="group"), "strategy is 'group'"),
        (compressed("block", block_structure=[1, 128]), "block_structure is [1, 128]"),
        (compressed("channel", input_activations={"dynamic": False}), "since scales are never static"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(raw, says):
    with pytest.raises(InputError) as caught:
        read_quantisation({"quantization_config": raw})
    said = str(caught.value)
    assert says in said and "\n" not in said and len(said) <= 440
    assert "expected" in said


def test_dynamic_activations_are_left_in_16_bits():
    raw = compressed("channel", input_activations={"dynamic": True, "num_bits": 8, "strategy": "token"})
    assert read_quantisation({"quantization_config": raw}).form == "float-quantized"
    same = {"a": TWO["a"], "b": TWO["a"] | {"targets": ["re:.*"]}}
    assert (
        read_quantisation({"quantization_config": FORMS["pack"][1] | {"config_groups": same}}).group == GROUP
    )


@pytest.mark.parametrize("where", ["config", "tensor"])
def test_scales_of_a_cache_are_left_out_with_a_word(tmp_path, caplog, where):
    made = write(tmp_path, "channel")
    if where == "config":
        scheme = {"num_bits": 8, "type": "float"}
        made.config["quantization_config"] = FORMS["channel"][1] | {"kv_cache_scheme": scheme}
    else:
        made.tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    with caplog.at_level(logging.WARNING):
        load(made.save())
    assert [r.message for r in caplog.records if "scales for a cache of 8 bits" in r.message] != []


def test_the_config_is_written_back_as_it_was(written):
    config = load(written("pack").folder).config
    assert config.to_dict()["quantization_config"] == FORMS["pack"][1]
    assert Qwen3Config.from_dict(config.to_dict()) == config and hash(config)


def test_training_takes_plain_weights(written):
    folder = written("awq").folder
    with pytest.raises(InputError, match="is quantised: train with the bf16"):
        load_network(folder, Qwen3Config.from_folder(folder))


# how it runs


def test_rows_are_bf16_on_kernels_and_anything_on_twins(tmp_path):
    made = write(tmp_path, "awq")
    made.config["dtype"] = "float16"
    made.save()
    assert load(made.folder).dtype == torch.float32
    assert load(made.folder, dtype="float16").layers[0].down.dtype == torch.float16
    from qwen3_model.settings import pick_dtype

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pick_dtype(None, cuda, "float16", "triton", True) == torch.bfloat16
    assert pick_dtype(None, cpu, "float16", "triton", True) == torch.bfloat16
    assert pick_dtype(None, cuda, "float16", "torch", True) == torch.bfloat16
    assert pick_dtype(None, cuda, "float16", "triton", False) == torch.float16
    with pytest.raises(InputError, match="dtype float16 is not supported with quantised weights on backend"):
        pick_dtype("float16", cuda, "float16", "triton", True)


@pytest.mark.parametrize(("form", "format"), [("fp8", Format.E4M3), ("gptq symmetric", Format.INT4)])
def test_random_weights_are_quantised_as_the_config_says(written, form, format):
    config = load(written(form).folder).config
    model = Qwen3.from_config(config, seed=3, device="cpu")
    again = Qwen3.from_config(config, seed=3, device="cpu")
    qkv = model.layers[0].ar.qkv
    assert qkv.format is format and 0.015 < float(qkv.dense().float().std()) < 0.025
    assert torch.equal(qkv.words, again.layers[0].ar.qkv.words) and torch.isfinite(model.logits([1, 2])).all()
    on_meta = Qwen3.from_config(config, device="meta", dtype="float32").destinations()
    assert {n: w.nbytes for n, w in on_meta.items()} == {n: w.nbytes for n, w in model.destinations().items()}


def test_what_an_orthrus_of_8b_takes():
    """fp8 in both views, and int4 with a diffusion view in fp8: 4 bytes a block of 128 x 128 in fp8, and a
    group of 128 in int4. In bf16 it is 19.4 GB."""
    (model,) = (model for model in PUBLISHED["models"] if model["name"] == "chiennv/Orthrus-Qwen3-8B")
    config = Qwen3Config.from_dict(model["config"], PUBLISHED["generation_config"])
    raws = [FORMS["fp8"][1], FORMS["awq"][1] | {"group_size": 128}]
    eight, four = (by_config(read_quantisation({"quantization_config": raw})) for raw in raws)

    def bytes_of_model(base) -> int:
        def stored(module, n, k):
            diffusion = module.endswith("_diff")
            return eight(module.removesuffix("_diff"), n, k) if diffusion else base(module, n, k)

        network = Qwen3(config, torch.device("meta"), torch.bfloat16, "reference", None, stored)
        return sum(part.nbytes for part in network.destinations().values())

    assert 10.9e9 < bytes_of_model(eight) <= 11.0e9 and 7.6e9 < bytes_of_model(four) <= 7.7e9


def test_transformers_reads_the_same_numbers(tmp_path):
    """fp8 is the one form that transformers decodes without further packages."""
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    m = random_matrix(128, 256, "fp8", random.Random(5))
    theirs = finegrained.Fp8Dequantize(None).convert(fp8(m))["weight"]
    assert (
        torch.equal(of_matrix(tmp_path, "fp8", m).weight.dense(), theirs) and theirs.dtype == torch.bfloat16
    )
