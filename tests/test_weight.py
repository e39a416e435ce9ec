"""Weight: what kernels, twins, loading and benches ask of it; and that nothing else reads its memory."""

import ast
from pathlib import Path

import pytest
import torch
from small import small_model
from strategies import hard

import orthrus_kernels
from orthrus_kernels import Weight

SRC = Path(orthrus_kernels.__file__).parents[1]
BENCH = SRC.parent / "bench"


def test_what_a_plain_weight_says_of_itself():
    data = torch.zeros(10, 24, dtype=torch.bfloat16)
    weight, cut, one = Weight(data), Weight(data[2:7, 8:20]), Weight(data[:1, :12])
    assert (weight.shape, weight.dtype, weight.nbytes) == ((10, 24), torch.bfloat16, 480)
    assert (cut.shape, cut.nbytes, cut.row_stride) == ((5, 12), 120, 24)
    assert one.row_stride == 12, "one compilation, whatever it was cut from"
    assert weight.pointer.data_ptr() == data.data_ptr() and torch.equal(cut.dense(), data[2:7, 8:20])


def test_rows_that_copies_of_16_bytes_take():
    data = torch.zeros(10, 24, dtype=torch.bfloat16)
    assert Weight(data).describable and Weight(data).can_prefetch
    assert not Weight(data[:, 1:]).describable, "starts at an odd address"
    assert not Weight(torch.zeros(4, 12, dtype=torch.bfloat16)).describable, "its second row does"
    cut = Weight(data[:, :20])
    assert cut.describable and not cut.can_prefetch, "its rows end within a unit"
    assert list(Weight(data[2:6]).described(4, 16).block_shape) == [4, 16]


def test_parts_are_its_memory():
    weight = Weight(torch.zeros(6, 8))
    for i, part in enumerate(weight.parts(3, 1, 2)):
        part.fill_(i)
    assert weight.dense()[:, 0].tolist() == [0, 0, 0, 1, 2, 2]
    with pytest.raises(RuntimeError):
        weight.parts(3, 2)


@pytest.mark.parametrize("data", [torch.zeros(8, 4).T, torch.zeros(8), torch.zeros(2, 3, 4)])
def test_other_layouts_are_refused(data):
    with pytest.raises(AssertionError):
        Weight(data)


def test_a_model_multiplies_by_weights_alone():
    """Norms and the embedding are tensors. A checkpoint's tensors go into the memory of the weights."""
    model = small_model()
    named = model.destinations()
    for i, layer in enumerate(model.layers):
        for view, suffix in ((layer.ar, ""), (layer.diffusion, "_diff")):
            parts = [named[f"model.layers.{i}.self_attn.{n}_proj{suffix}.weight"] for n in "qkv"]
            assert isinstance(view.qkv, Weight) and torch.equal(view.qkv.dense(), torch.cat(parts))
            assert torch.equal(view.o.dense(), named[f"model.layers.{i}.self_attn.o_proj{suffix}.weight"])
        gate_up = [named[f"model.layers.{i}.mlp.{n}_proj.weight"] for n in ("gate", "up")]
        assert torch.equal(layer.gate_up.dense(), torch.cat(gate_up))
        assert torch.equal(layer.down.dense(), named[f"model.layers.{i}.mlp.down_proj.weight"])
    assert isinstance(model.head, Weight) and isinstance(model.embedding, torch.Tensor)


def test_the_linears_do_not_care_where_the_numbers_come_from():
    """Another form of a weight is another `dense`: twins and torch's own routine ask nothing else of it."""

    class Doubled(Weight):
        def dense(self):
            return 2 * self.data

    x, data = hard("normal", 3, 40), hard("normal", 16, 40, seed=1)
    for backend in ("reference", "torch"):
        ops = orthrus_kernels.backend_ops(backend)
        for op in (ops.linear, ops.linear_swiglu, lambda x, w, ops=ops: ops.head(x, w, 2)[0]):
            assert torch.equal(op(x, Doubled(data)), op(x, Weight(2 * data))), backend


def readers(tree: ast.AST) -> set[int]:
    """Lines that read an attribute `data`."""
    return {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "data"}


def test_only_its_own_file_reads_a_weights_memory():
    """In training, `.data` is a parameter's; in a chat template, a text's; in a matcher, a mask's address."""
    assert readers(ast.parse("a = weight.data.dtype")) == {1}
    files = [f for f in [*SRC.rglob("*.py"), *BENCH.rglob("*.py")] if "training" not in f.parts]
    found = {f.name for f in files if readers(ast.parse(f.read_text()))}
    assert len(files) > 100 and found == {"weight.py", "bounded_jinja.py", "matcher.py"}, found
