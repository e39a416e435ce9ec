"""The whole model on the kernels: near the twins, and row-invariant bit for bit."""

import pytest
import torch
from plainly import plainly
from promise import check_model, check_prefill
from replayed import Replayed
from small import small_model
from write_quantised import write

from orthrus_kernels import Rows
from orthrus_kernels.rows import SPARE_ROWS
from qwen3_model import Qwen3


@pytest.fixture
def model_of(device):
    return lambda dtype, backend="triton", **changes: small_model(
        dtype, backend=backend, device=str(device), **changes
    )


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_the_kernels_compute_what_the_twins_do(model_of, dtype, near):
    rows = Rows.tree_with_blocks([5, 6, 7, 8], [-1, 0, 0, 1], 20, [0, 2], 4, 96)
    logits = []
    for backend in ("reference", "triton"):
        model = model_of(dtype, backend)
        cache = model.new_cache(30)
        model.prefill(list(range(20)), cache)
        logits.append(model.forward(rows, cache).logits.double().cpu())
    assert ((logits[0] - logits[1]).abs().max() / logits[0].abs().max()).item() < near


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_bits_of_plain_decoding_in_any_pass(model_of, dtype):
    found = check_model(
        model_of(dtype, num_hidden_layers=1), [1, 20], passes=2, trunk_length=3, most=6, graphs=True
    )
    assert found.different == 0, found
    assert found.passes == 4 and found.rows >= 4


@pytest.mark.parametrize("forms", [("awq", "fp8"), ("fp8", None), ("pack", "pack")], ids=str)
def test_a_quantised_model_keeps_both(forms, tmp_path, device):
    """Each view with its own format, or none: near the twins, and row-invariant in mixed passes."""
    folder, rows = write(tmp_path, *forms).folder, Rows.tree_with_blocks([5, 6, 7], [-1, 0, 0], 9, [0], 4, 96)
    logits = []
    for backend in ("reference", "triton"):
        model = Qwen3.from_pretrained(
            folder, device=str(device), dtype="bfloat16", backend=backend, progress=False
        )
        cache = model.new_cache(20)
        model.prefill(list(range(9)), cache)
        logits.append(model.forward(rows, cache).logits.double().cpu())
    assert ((logits[0] - logits[1]).abs().max() / logits[0].abs().max()).item() < 3e-2
    found = check_model(model, [5], passes=3, trunk_length=3, most=6)
    assert found.different == 0 and found.passes == 3, found


def test_the_check_sees_kernels_that_are_not_row_invariant(model_of, monkeypatch):
    """With the sums of a linear in the order of the rows, rows differ."""
    model = model_of("float32", num_hidden_layers=1)
    exact = model.ops.linear

    def careless(x, *args, **settings):
        return exact(x, *args, **settings) * (1 + 2**-20 * (len(x) > 1))

    monkeypatch.setattr(model, "ops", type(model.ops)(**(vars(model.ops) | {"linear": careless})))
    assert check_model(model, [5], passes=3, trunk_length=3, most=6).different > 0


@pytest.mark.parametrize("logits_of", [None, [3, 1]])
def test_what_a_linear_reads_has_memory_behind_it(model_of, monkeypatch, logits_of):
    """A tile that reaches past the end of memory is copied slowly, which no result shows. More than 32 rows:
    tiles by descriptors."""
    model, behind = model_of("bfloat16", num_hidden_layers=1), []

    def noted(op):
        def run(x, *args, **settings):
            memory = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
            behind.append(memory // x.stride(0) - len(x))
            return op(x, *args, **settings)

        return run

    ops = {name: noted(getattr(model.ops, name)) for name in ("linear", "linear_swiglu")}
    monkeypatch.setattr(model, "ops", type(model.ops)(**(vars(model.ops) | ops)))
    cache = model.new_cache(30)
    model.prefill([1, 2, 3], cache)
    rows = Rows.tree_with_blocks([5, 6, 7], [-1, 0, 0], 3, [0, 2], 17, 96)
    behind.clear()
    model.forward(rows, cache, logits_of=logits_of)
    assert len(behind) == 5 and min(behind) >= SPARE_ROWS, behind  # qkv, o, gate_up, down, head


def test_a_pass_takes_each_passs_numbers(model_of):
    """Passes of one shape run from the same tensors: other tokens, positions and tables each time."""
    model = model_of("float32", num_hidden_layers=1)
    cache = model.new_cache(40)
    model.prefill(list(range(5, 25)), cache)
    replayed = Replayed(model, cache)
    for t in range(30, 34):
        rows = Rows.tree([t, 7, t + 1], [-1, 0, 0], 18 + t % 3)
        cache.lengths[0] = rows.contexts[0]
        assert torch.equal(replayed.forward(rows).logits, model.forward(rows, cache).logits)
    assert len(replayed.passes) == 1, "one shape"


def test_generations_share_a_cache(model_of):
    """Also one inside another's callback, where they take turns."""
    model = model_of("float32", num_hidden_layers=1, max_position_embeddings=3000)
    plain = [plainly(model, [5, 6, t], 3)[0] for t in (7, 8)]
    how, inner = {"max_new_tokens": 3, "tree_nodes": 0}, []
    for _ in "01":
        assert [model.generate([5, 6, t], **how).token_ids for t in (7, 8)] == plain
    slot = model.engine.runner
    outer = model.generate([5, 6, 7], **how, on_tokens=lambda *_: inner.append(
        model.generate([5, 6, 8], **how).token_ids))  # fmt: skip
    assert outer.token_ids == plain[0] and inner[0] == inner[-1] == plain[1]
    assert model.engine.runner is slot and slot.cache.capacity == 1024
    model.engine.runner_for(1025)
    assert model.engine.runner is not slot and model.engine.runner.cache.capacity == 2048


def test_prefill_in_chunks(model_of):
    assert check_prefill(model_of("bfloat16", num_hidden_layers=1), 20, [1, 7, 16]).different == 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_two_pass_decoding_is_plain_decoding(model_of, temperature):
    model = model_of("bfloat16", num_hidden_layers=1)
    settings = {"max_new_tokens": 6, "temperature": temperature, "seed": 3}
    drafted = model.generate([5, 6, 7], strategy="two-pass", tree_nodes=0, **settings)
    assert (drafted.token_ids, drafted.logprobs) == plainly(model, [5, 6, 7], **settings)


def test_torchs_own_kernels_run_for_comparison(model_of):
    model, reference = model_of("float32", "torch"), model_of("float32", "reference")
    rows = Rows.batch([Rows.tree_with_blocks([5, 6, 7], [-1, 0, 0], 0, [1], 3, 96), Rows.chain([9, 8], 0, 1)])
    logits = [m.forward(rows, m.new_cache(8, 2)).logits for m in (model, reference)]
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-4)
