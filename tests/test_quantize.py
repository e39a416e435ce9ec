"""`orthrus quantize`: a literal reader reads back what is written, bit by bit; nothing half-written stays."""

from __future__ import annotations

import json
import math

import pytest
import torch
from literal_safetensors import bf16, e4m3, nibble, read
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_folder import edit_config, edit_tensor, shard, write_tiny

from orthrus_kernels import Weight
from qwen3_model import Qwen3, checkpoint
from qwen3_model.cli import main
from qwen3_model.prompts import read_prompts
from qwen3_model.quantised.slot import Slot
from qwen3_model.quantising import folder as quantising
from qwen3_model.quantising import report
from qwen3_model.quantising.rounding import (
    RATIOS,
    fp8_blocks,
    fp8_values,
    int4_groups,
    int4_values,
    rounded_up,
)
from qwen3_model.quantising.written import words

SHAPE = {"hidden_size": 64, "intermediate_size": 96}
DOWN, O_DIFF = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj_diff"


@pytest.fixture
def plain(tmp_path):
    return write_tiny(tmp_path / "plain", **SHAPE)


def quantize(*words) -> int:
    return main(["quantize", *map(str, words)])


def refused(capsys, *words) -> str:
    """The one line that a command is refused with."""
    assert quantize(*words) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1, said
    return said.err


def weight(n: int = 24, k: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-3, 1, n)[:, None]
    return (torch.randn(n, k, generator=generator) * scales).bfloat16()


# rounding


def test_fp8_codes_are_the_nearest_and_none_is_cut_off():
    """Every code of every number, by a search of all 254; the scale is the least bf16 that does."""
    given = weight(136, 136)
    given[:128, :128] = 0  # a block without a number
    given[130, 5] = 256  # / 448 lies above the nearest bf16
    codes, scale = fp8_blocks(given)
    assert codes.shape == given.shape and scale.shape == (2, 2) and (codes[:128, :128].float() == 0).all()
    values = torch.tensor([e4m3(code) for code in range(256)], dtype=torch.float64)
    for rows, columns, at in ((128, 0, (1, 0)), (0, 128, (0, 1)), (128, 128, (1, 1))):
        block = given[rows : rows + 128, columns : columns + 128]
        step, bits = float(scale[at]), scale[at].view(torch.int16).item()
        assert step >= float(block.abs().max()) / 448 > bf16(bits - 1)
        stored = codes[rows : rows + 128, columns : columns + 128].reshape(-1).view(torch.uint8).long()
        distance = (block.reshape(-1, 1).double() / step - values).abs()
        assert torch.equal(distance.gather(1, stored[:, None])[:, 0], distance.nan_to_num(math.inf).amin(1))


def test_a_tie_of_fp8_goes_to_the_even_code():
    given = torch.zeros(1, 128)
    given[0, :5] = torch.tensor([448.0, 17.0, 19.0, -17.0, 2.0**-10])  # scale 1
    codes, scale = fp8_blocks(given)
    assert scale.item() == 1 and codes[0, :5].tolist() == [448, 16, 20, -16, 0]


def test_scales_are_rounded_up_and_never_zero():
    x = torch.tensor([0.0, 1.0, 1 + 2**-20, 1e-45, 448 / 3])
    up = rounded_up(x)
    assert up.dtype == torch.bfloat16 and (up.float() >= x).all() and up[1] == 1 and up[2] == 1 + 2**-7
    assert up[0] > 0


@pytest.mark.parametrize("group", [32, 64])
def test_int4_codes_are_the_nearest_of_a_range_that_errs_least(group):
    given = weight()
    given[3] = given[3].abs()  # zero is in every range
    given[4, :group] = 0
    codes, scale, zero = (part.double() for part in int4_groups(given, group))
    numbers = given.double().view(24, -1, group)
    step, at = scale[..., None], zero[..., None]
    found = codes.view(numbers.shape)
    assert torch.equal(found, ((numbers / step).round() + at).clamp(0, 15))
    error = ((found - at) * step - numbers).square().sum(-1)
    low, high = numbers.amin(-1).clamp(max=0), numbers.amax(-1).clamp(min=0)
    for ratio in RATIOS:
        other = ((high - low) * ratio / 15).bfloat16().double().clamp(min=1e-30)[..., None]
        place = (-low[..., None] * ratio / other).round().clamp(0, 15)
        code = ((numbers / other).round() + place).clamp(0, 15)
        assert (error <= ((code - place) * other - numbers).square().sum(-1) * 1.02 + 1e-12).all()
        if ratio == 1:
            assert error.sum() < 0.97 * ((code - place) * other - numbers).square().sum()


def test_words_hold_eight_codes_the_first_lowest():
    codes = torch.arange(20, dtype=torch.uint8)[None] % 16
    (row,) = words(codes).tolist()
    assert [nibble(word & 0xFFFFFFFF, i) for word in row for i in range(8)] == [
        *range(16),
        0,
        1,
        2,
        3,
        0,
        0,
        0,
        0,
    ]


# folders


def literal_fp8(tensors, module: str) -> list[list[float]]:
    """The numbers of a matrix in Qwen's form."""
    codes, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale_inv"]
    n, k = codes.shape
    assert (codes.dtype, scale.dtype) == ("F8_E4M3", "BF16")
    assert scale.shape == (math.ceil(n / 128), math.ceil(k / 128))
    return [[e4m3(codes.at(i, j)) * scale.bf16(i // 128, j // 128) for j in range(k)] for i in range(n)]


def literal_int4(tensors, module: str, group: int) -> list[list[float]]:
    """The numbers of a matrix in compressed-tensors' packed form."""
    packed, scale, zero, shape = (
        tensors[f"{module}.weight_{part}"] for part in ("packed", "scale", "zero_point", "shape")
    )
    n, k = shape.numbers
    assert (packed.dtype, scale.dtype, zero.dtype, shape.dtype) == ("I32", "BF16", "I32", "I64")
    assert (packed.shape, scale.shape, zero.shape) == ((n, k // 8), (n, k // group), (n // 8, k // group))

    def number(i: int, j: int) -> float:
        code = nibble(packed.at(i, j // 8), j % 8)
        return (code - nibble(zero.at(i // 8, j // group), i % 8)) * scale.bf16(i, j // group)

    return [[number(i, j) for j in range(k)] for i in range(n)]


def expected(given: torch.Tensor, form: str, group: int) -> torch.Tensor:
    return fp8_values(*fp8_blocks(given)) if form == "fp8" else int4_values(*int4_groups(given, group))


@pytest.mark.parametrize(
    ("base", "diff", "options"),
    [
        ("fp8", "fp8", ["--format", "fp8"]),
        ("fp8", None, ["--format", "fp8", "--diff", "none"]),
        ("int4", "fp8", ["--format", "int4", "--group", 32]),
        ("int4", "int4", ["--format", "int4", "--group", 32, "--diff", "same"]),
    ],
)
def test_a_literal_reader_finds_every_number(plain, tmp_path, base, diff, options):
    out = tmp_path / "out"
    assert quantize(plain, out, *options, "--json") == 0
    before, after = load_file(plain / "model.safetensors"), read(out / "model.safetensors")
    for name, given in before.items():
        module = name.removesuffix(".weight")
        form = None if "proj" not in name else diff if "_diff" in name else base
        if form is None:
            stored = after.pop(name)
            assert stored.shape == given.shape and stored.numbers == given.flatten().tolist(), name
            continue
        numbers = literal_fp8(after, module) if form == "fp8" else literal_int4(after, module, 32)
        assert torch.equal(torch.tensor(numbers), expected(given, form, 32)), name
        for tensor in [tensor for tensor in after if tensor.rpartition(".")[0] == module]:
            del after[tensor]
    assert not after
    raw, stated = (json.loads((folder / "config.json").read_text()) for folder in (plain, out))
    scheme, apart = stated.pop("quantization_config"), stated.pop("diffusion_weights", None)
    assert stated == raw
    left_out = scheme["modules_to_not_convert" if base == "fp8" else "ignore"]
    assert left_out[0] == "lm_head" and (O_DIFF in left_out) == (diff != base) and DOWN not in left_out
    assert (apart or {}).get("quant_method") == ("fp8" if (base, diff) == ("int4", "fp8") else None)


def test_shards_stay_shards_and_other_files_come_along(plain, tmp_path, capsys):
    shards, out = shard(plain), tmp_path / "deep" / "out"
    (plain / "bigram.safetensors").write_bytes(b"tables")
    (plain / "selector.safetensors").write_bytes(b"a selector")
    (plain / "pytorch_model.bin").write_bytes(b"other weights")
    (plain / "additional_chat_templates").mkdir()
    (plain / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert quantize(plain, out, "--format", "fp8", "--json") == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for file in shards:
        held = read(out / file.name)
        assert {name for name, place in index["weight_map"].items() if place == file.name} == set(held)
        names = {name.removesuffix("_scale_inv") for name in held}
        assert names == set(load_file(file))
    for file in plain.rglob("*"):
        if (
            file.is_file()
            and file.suffix not in (".bin",)
            and "model" not in file.name
            and "config" not in file.name
        ):
            assert (out / file.relative_to(plain)).read_bytes() == file.read_bytes(), file
    assert not (out / "pytorch_model.bin").exists()
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((out / "quantization.json").read_text())
    assert said["bytes_after"] == index["metadata"]["total_size"] < said["bytes_before"]
    errors = list(said["worst_relative_errors"].values())
    assert len(errors) == 10 and errors == sorted(errors, reverse=True) and 0.02 < errors[-1] < 0.04


def test_a_plain_qwen3_has_no_view_to_speak_of(tmp_path, capsys):
    bare = write_tiny(tmp_path / "bare", block_size=0, mask_token_id=-1, **SHAPE)
    assert quantize(bare, tmp_path / "out", "--format", "fp8") == 0
    assert "diffusion view" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "quantization.json").read_text())["diffusion"] is None
    assert Qwen3.from_pretrained(tmp_path / "out", device="cpu").logits([1, 2]).isfinite().all()


def test_the_table_is_printed(plain, tmp_path, capsys):
    assert quantize(plain, tmp_path / "out", "--format", "int4", "--group", 32) == 0
    said = capsys.readouterr().out
    assert (
        "int4, groups of 32; diffusion view: fp8" in said
        and "relative error" in said
        and "22 matrices" in said
    )


# refusals: one line, and nothing stays


def test_what_does_not_fit_is_refused_by_name(plain, tmp_path, capsys):
    out = tmp_path / "out"
    said = refused(capsys, plain, out, "--format", "int4")
    assert "--group 128 does not divide the 96 columns" in said and "; --group 32 does" in said
    assert "belongs to --format int4" in refused(capsys, plain, out, "--format", "fp8", "--group", 64)
    assert "--format" in refused(capsys, plain, out) and "invalid choice" in refused(
        capsys, plain, out, "--format", "gguf"
    )
    assert "lies in the base" in refused(capsys, plain, plain / "out", "--format", "fp8")
    assert "is not empty" in refused(capsys, plain, plain, "--format", "fp8")
    assert "device meta" in refused(capsys, plain, out, "--format", "fp8", "--device", "meta")
    assert "there is no folder" in refused(capsys, tmp_path / "nothing", out, "--format", "fp8")
    bare = write_tiny(tmp_path / "bare", block_size=0, mask_token_id=-1, **SHAPE)
    assert "has no diffusion view" in refused(capsys, bare, out, "--format", "fp8", "--diff", "same")
    odd = write_tiny(tmp_path / "odd", hidden_size=64, intermediate_size=40)
    assert "has 40 columns; a multiple of 32 was expected" in refused(capsys, odd, out, "--format", "fp8")
    edit_config(plain, quantization_config={"quant_method": "fp8"})
    assert "quanti" in refused(capsys, plain, out, "--format", "fp8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "odd", "plain"]


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused(plain, tmp_path, capsys, name, value):
    edit_tensor(plain, name, lambda weight: weight.index_fill(0, torch.tensor([1]), value))
    assert f"{name} holds NaN or infinite numbers" in refused(
        capsys, plain, tmp_path / "out", "--format", "fp8"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        (SafetensorError("No space left on device"), 2, "No space left"),
        (OSError(28, "No space left on device"), 2, "No space left"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_breaks_off_leaves_nothing(plain, tmp_path, capsys, monkeypatch, fault, code, says):
    shard(plain)
    written = []

    def save_file(tensors, path, metadata):
        if written:
            raise fault
        written.append(path)
        path.write_bytes(b"a whole shard")

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    assert quantize(plain, tmp_path / "out", "--format", "fp8") == code
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and said.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["plain"] and written


def test_memory_is_that_of_a_shard(plain, tmp_path, monkeypatch):
    """Tensors are read one at a time: each is rounded before the next one is read."""
    order: list[str] = []
    real = quantising._stored

    def stored(file, name, *rest):
        order.append(f"round {name}")
        return real(file, name, *rest)

    real_read = quantising._tensors

    def tensors(*given):
        for name, tensor in real_read(*given):
            order.append(f"read {name}")
            yield name, tensor

    monkeypatch.setattr(quantising, "_stored", stored)
    monkeypatch.setattr(quantising, "_tensors", tensors)
    assert quantize(plain, tmp_path / "out", "--format", "fp8") == 0
    reads = [step[5:] for step in order[::2]]
    assert order == [step for name in reads for step in (f"read {name}", f"round {name}")]


# what is made of it


FORMS = [
    ["--format", "fp8"],
    ["--format", "int4", "--group", 32],
    ["--format", "int4", "--group", 32, "--diff", "same"],
]


@pytest.mark.parametrize("options", FORMS)
def test_the_loader_has_every_number_and_drafts_stay_lossless(plain, tmp_path, capsys, options):
    out, form = tmp_path / "out", options[1]
    assert quantize(plain, out, *options) == 0
    model, given = (
        Qwen3.from_pretrained(out, device="cpu", progress=False),
        load_file(plain / "model.safetensors"),
    )
    for name, slot in model.destinations().items():
        if "proj" not in name:
            assert torch.equal(slot, given[name])
            continue
        assert isinstance(slot, Slot)
        rows = slot.weight.dense()[slot.first : slot.first + len(given[name])]
        of = form if "_diff" not in name or "same" in options else "fp8"
        assert torch.equal(rows, expected(given[name], of, 32)), name
    capsys.readouterr()
    assert main(["verify", str(plain / "held_out.jsonl"), "--model", str(out), "--device", "cpu", "--json",
                 "--strategy", "two-pass", "--max-new-tokens", "12"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert found["identical"] == found["compared"] == 5


def test_the_report_measures_both(plain, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "NEW_TOKENS", 8)
    out = tmp_path / "out"
    measured = ["--report", plain / "held_out.jsonl", "--device", "cpu"]
    assert quantize(plain, out, "--format", "fp8", *measured) == 0
    said = capsys.readouterr().out
    found = json.loads((out / "quantization.json").read_text())["measured"]
    before, after = (Qwen3.from_pretrained(folder, device="cpu", progress=False) for folder in (plain, out))
    divergence, losses = [], []
    for line in (plain / "held_out.jsonl").read_text().splitlines():
        ids = before.text.encode(json.loads(line)["prompt"])
        for n in range(1, len(ids)):
            p, q = (model.logits(ids[:n]).double().log_softmax(-1) for model in (before, after))
            divergence.append(sum(float(p[i].exp() * (p[i] - q[i])) for i in range(len(p))))
            losses.append((-float(p[ids[n]]), -float(q[ids[n]])))
    assert found["scored_tokens"] == len(losses) and found["prompts"] == 5
    assert found["kl_divergence"] == pytest.approx(sum(divergence) / len(losses), rel=1e-3)
    for side, name in enumerate(("before", "after")):
        mean = sum(loss[side] for loss in losses) / len(losses)
        assert found[f"perplexity_{name}"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["identical"] == found["compared"] == 5 and found["tokens_per_cycle_after"] >= 1
    assert "5/5, bit for bit" in said and "nats a token" in said


def test_prompts_that_cannot_be_read_are_refused_before_any_work(plain, tmp_path, capsys):
    said = refused(capsys, plain, tmp_path / "out", "--format", "fp8", "--report", tmp_path / "none.jsonl")
    assert "there is no file" in said and not (tmp_path / "out").exists()


def test_prompts_that_cannot_be_measured_leave_a_whole_folder(plain, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text(json.dumps("d"))
    said = refused(capsys, plain, out, "--format", "fp8", "--report", prompts, "--device", "cpu")
    assert "no prompt has two tokens" in said
    assert json.loads((out / "quantization.json").read_text())["format"] == "fp8"


def test_info_counts_bytes_by_format(plain, tmp_path, capsys):
    out = tmp_path / "out"
    assert quantize(plain, out, "--format", "int4", "--group", 32) == 0
    capsys.readouterr()
    assert main(["info", str(out), "--json", "--bandwidth", "1000"]) == 0
    found = json.loads(capsys.readouterr().out)
    shapes = {name: weight.shape for name, weight in load_file(plain / "model.safetensors").items()}
    numbers = {diff: sum(math.prod(s) for n, s in shapes.items() if "proj" in n and ("_diff" in n) == diff)
               for diff in (False, True)}  # fmt: skip
    others = sum(math.prod(shape) for name, shape in shapes.items() if "proj" not in name)
    sizes = found["bytes_by_format"]
    assert sizes["int4"] == numbers[False] // 2 + numbers[False] // 32 * 4  # a factor a group
    # Parts of qkv are no whole blocks, so that each row has a factor a group of 64; the rows of o share them.
    lines = {n: s[0] if "o_proj" not in n else -(-s[0] // 128) for n, s in shapes.items() if "proj_diff" in n}
    factors = sum(count * shapes[name][1] // 64 for name, count in lines.items())
    assert sizes["fp8"] == numbers[True] + factors * 4 and found["dtype"] == "bfloat16"
    assert sizes["bfloat16"] == 2 * others and found["bytes"] == sum(sizes.values())
    norms_of_view = 2 * sum(math.prod(s) for n, s in shapes.items() if "_norm_diff" in n)
    read = found["bytes"] - sizes["fp8"] - norms_of_view
    assert found["floor_ms_per_token"] == pytest.approx(read / 1e9)
    assert main(["info", str(out)]) == 0 and "in int4" in capsys.readouterr().out


def test_transformers_reads_the_fp8_form(plain, tmp_path):
    """By its own dequantisation; to load such a model it needs the package accelerate."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = pytest.importorskip("transformers").AutoConfig
    out = tmp_path / "out"
    assert quantize(plain, out, "--format", "fp8") == 0
    assert config.from_pretrained(out).quantization_config["weight_block_size"] == [128, 128]
    tensors, given = load_file(out / "model.safetensors"), load_file(plain / "model.safetensors")
    for name in given:
        if "proj" in name:
            pair = tensors[name], tensors[name + "_scale_inv"]
            found = fp8.Fp8Dequantize(None)._dequantize_one(*pair, output_dtype=torch.float32)
            assert torch.equal(found, expected(given[name], "fp8", 0)), name


def test_compressed_tensors_reads_the_int4_form(plain, tmp_path):
    unpack = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers").unpack_from_int32
    out = tmp_path / "out"
    assert quantize(plain, out, "--format", "int4", "--group", 32) == 0
    tensors, given = load_file(out / "model.safetensors"), load_file(plain / "model.safetensors")
    for name in given:
        if "proj" in name and "_diff" not in name:
            shape, scale = tensors[f"{name}_shape"], tensors[f"{name}_scale"]
            codes = unpack(tensors[f"{name}_packed"], 4, shape)
            zero = unpack(tensors[f"{name}_zero_point"], 4, torch.Size(scale.shape), packed_dim=0)
            groups = codes.float().view(*scale.shape, -1) - zero.float()[..., None]
            found = (groups * scale.float()[..., None]).view(codes.shape)
            assert torch.equal(found, expected(given[name], "int4", 32)), name


def drafted(folder, prompts) -> tuple[int, int]:
    """Tokens and cycles of the chain on prompts. Numbers of quantised weights are taken out of their codes
    once: on a CPU each product would do it again."""
    model = Qwen3.from_pretrained(folder, device="cpu", progress=False)
    for layer in model.layers:
        for part in (layer, layer.ar, layer.diffusion):
            for name in ("gate_up", "down") if part is layer else ("qkv", "o"):
                setattr(part, name, Weight(getattr(part, name).dense()))
    stats = [model.generate(model.text.encode(p), "two-pass", 64, tree_nodes=0).stats for p in prompts]
    return sum(each.cycle_tokens for each in stats), sum(each.cycles for each in stats)


@pytest.fixture(scope="module")
def in_bf16() -> tuple[list[str], float]:
    """Held-out prompts, and tokens a cycle on them of the embedded checkpoint as it is."""
    prompts = read_prompts(checkpoint.EMBEDDED / "held_out.jsonl", 24, None, "test")
    tokens, cycles = drafted(checkpoint.EMBEDDED, prompts)
    return prompts, tokens / cycles


@pytest.mark.slow
@pytest.mark.parametrize(("form", "options", "least"), [("fp8", [], 0.95), ("int4", ["--group", 64], 0.93)])
def test_the_embedded_view_keeps_its_acceptance(tmp_path, in_bf16, form, options, least):
    """The chain's tokens a cycle, as shares of those in bf16: quantising changes texts, so these scatter."""
    out, (prompts, before) = tmp_path / "out", in_bf16
    assert quantize(checkpoint.EMBEDDED, out, "--format", form, "--device", "cpu", *options) == 0
    tokens, cycles = drafted(out, prompts)
    assert tokens / cycles >= least * before, (tokens / cycles, before)
    words = ["verify", "--model", out, "--device", "cpu", "--limit", 2, "--max-new-tokens", 16]
    assert main([str(word) for word in (*words, "--strategy", "two-pass")]) == 0
