"""The model: against transformers' Qwen3, the diffusion pass against its written definition, and the same
bits however rows are batched.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_config, small_model
from strategies import mixed_passes

from orthrus_kernels import Rows, inverse_frequencies
from qwen3_model import InputError, Qwen3
from qwen3_model.config import YarnScaling

YARN = YarnScaling(factor=4.0, original_max_position_embeddings=256)


def hugging_face(model: Qwen3):
    """transformers' Qwen3 with the same weights."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.yarn:
        rope |= {"rope_type": "yarn", "factor": c.yarn.factor,
                 "original_max_position_embeddings": c.yarn.original_max_position_embeddings}  # fmt: skip
    config = transformers.Qwen3Config(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps,
        max_position_embeddings=c.max_position_embeddings, tie_word_embeddings=c.tie_word_embeddings,
        rope_parameters=rope, rope_theta=c.rope_theta, attn_implementation="eager",
    )  # fmt: skip
    peer = transformers.Qwen3ForCausalLM(config).float().eval()
    ours = {name: w for name, w in model.destinations().items() if "_diff" not in name}
    missing, unexpected = peer.load_state_dict(ours, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    peer.tie_weights()
    return peer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": False},
        {"hidden_size": 40, "head_dim": 64, "tie_word_embeddings": False},
        {"yarn": YARN},
        {"yarn": YARN, "rope_theta": 1e6, "head_dim": 64, "rms_norm_eps": 1e-5},
    ],
    ids=lambda c: ",".join(f"{k}={getattr(v, 'factor', v)}" for k, v in c.items()) or "small",
)
def test_logits_equal_transformers(changes):
    """fp32 within 1e-5 of the largest logit: whole, in chunks, and token by token."""
    model = small_model(**changes)
    peer = hugging_face(model)
    ids = torch.randint(0, 96, (45,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        want = peer(torch.tensor([ids])).logits[0]
    whole = model.forward(Rows.chain(ids, 0), model.new_cache(45)).logits
    assert ((whole - want).abs().max() / want.abs().max()).item() < 1e-5
    cache = model.new_cache(45)
    chunked = model.prefill(ids[:40], cache, chunk=7)
    assert torch.equal(chunked, whole[39])
    for i in range(40, 45):
        out = model.forward(Rows.chain([ids[i]], i), cache)
        cache.commit(out.keys, out.values, [0])
        assert torch.equal(out.logits[0], whole[i])


@pytest.mark.parametrize("yarn", [None, YARN], ids=["default", "yarn"])
def test_rope_equals_transformers_to_position_40960(yarn):
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    from orthrus_kernels import cos_sin

    rope = {"rope_type": "default", "rope_theta": 1e6}
    if yarn:
        rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    peer = Qwen3RotaryEmbedding(
        transformers.Qwen3Config(
            head_dim=128, max_position_embeddings=40961, rope_parameters=rope, rope_theta=1e6
        )
    )
    positions = torch.tensor([0, 1, 31, 4097, 40959, 40960])
    cos, sin = cos_sin(positions, *inverse_frequencies(128, 1e6, yarn))
    want_cos, want_sin = peer(torch.zeros(1), positions[None])
    # one ulp of a frequency is 2.4e-3 radians at position 40960: only equal frequencies pass
    assert torch.allclose(torch.cat([cos, cos], -1), want_cos[0], atol=1e-5)
    assert torch.allclose(torch.cat([sin, sin], -1), want_sin[0], atol=1e-5)


def literal_diffusion(model: Qwen3, context: list[int], anchor: int) -> torch.Tensor:
    """The diffusion pass as orthrus.md words it, in fp64, one layer at a time: returns logits [K, V].

    The AR view runs over the context in full; the block's rows see every AR key of the context and all rows
    of their block."""
    c, w = model.config, {name: t.double() for name, t in model.destinations().items()}
    k_size, start = c.block_size, len(context)
    freq = c.rope_theta ** (-torch.arange(0, c.head_dim, 2).double() / c.head_dim)

    def norm(x, g):
        return x * (x.square().mean(-1, True) + c.rms_norm_eps).rsqrt() * g

    def project(x, layer, view, positions):
        p = f"model.layers.{layer}.self_attn."
        q, k, v = (x @ w[f"{p}{n}_proj{view}.weight"].T for n in "qkv")
        q, k, v = (t.view(len(x), -1, c.head_dim) for t in (q, k, v))
        turn = torch.polar(torch.ones((), dtype=torch.float64), positions[:, None].double() * freq)[:, None]

        def rotate(t):
            z = torch.complex(*t.chunk(2, -1)) * turn
            return torch.cat([z.real, z.imag], -1)

        return rotate(norm(q, w[f"{p}q_norm{view}.weight"])), rotate(norm(k, w[f"{p}k_norm{view}.weight"])), v

    def attend(q, k, v, seen):
        rep = c.num_attention_heads // c.num_key_value_heads
        scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(rep, 1)) * c.head_dim**-0.5
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
        return torch.einsum("hts,shd->thd", weights, v.repeat_interleave(rep, 1)).flatten(1)

    def mlp(x, layer):
        p = f"model.layers.{layer}."
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        gate = h @ w[p + "mlp.gate_proj.weight"].T
        return (
            x
            + (gate * torch.sigmoid(gate) * (h @ w[p + "mlp.up_proj.weight"].T))
            @ w[p + "mlp.down_proj.weight"].T
        )

    embed = w["model.embed_tokens.weight"]
    ar, diff = embed[context], embed[[anchor] + [c.mask_token_id] * (k_size - 1)]
    for i in range(c.num_hidden_layers):
        g, o = w[f"model.layers.{i}.input_layernorm.weight"], f"model.layers.{i}.self_attn.o_proj"
        qa, ka, va = project(norm(ar, g), i, "", torch.arange(start))
        qd, kd, vd = project(norm(diff, g), i, "_diff", torch.arange(start, start + k_size))
        all_seen = torch.ones(k_size, start + k_size, dtype=torch.bool)
        diff = mlp(
            diff + attend(qd, torch.cat([ka, kd]), torch.cat([va, vd]), all_seen) @ w[o + "_diff.weight"].T, i
        )
        ar = mlp(
            ar + attend(qa, ka, va, torch.ones(start, start, dtype=torch.bool).tril()) @ w[o + ".weight"].T, i
        )
    return norm(diff, w["model.norm.weight"]) @ w.get("lm_head.weight", embed).T


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("tied", [True, False])
def test_diffusion_pass_is_its_written_definition(length, tied):
    model = small_model(tie_word_embeddings=tied)
    context = torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(2)).tolist()
    cache = model.new_cache(length)
    model.prefill(context, cache)
    before = cache.read(0, length)
    out = model.forward(Rows.block(5, 8, length, 96), cache)
    want = literal_diffusion(model, context, 5)
    assert ((out.logits.double() - want).abs().max() / want.abs().max()).item() < 1e-5
    assert all(map(torch.equal, cache.read(0, length), before)), "the diffusion view writes no cache"
    assert out.keys.shape[1] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=12)
@given(rows=mixed_passes(max_start=270), seed=st.integers(0, 5))
def test_mixed_pass_equals_separate_passes(dtype, rows, seed):
    """Every AR node equals one-row decoding of its path, every block a draft pass after its committed path:
    bit for bit.
    """
    model = small_model(dtype, seed=seed)
    start = rows.contexts[0]
    context = torch.randint(0, 96, (start,), generator=torch.Generator().manual_seed(seed)).tolist()
    cache = model.new_cache(start + len(rows))
    if context:
        model.prefill(context, cache, chunk=64)
    together = model.forward(rows, cache)
    firsts = [i for i in range(len(rows)) if rows.blocks[i] < 0 or rows.blocks[i] != rows.blocks[i - 1]]
    for i in firsts:
        above = [rows.tokens[j] for j in rows.ancestors(i)]
        alone = model.new_cache(start + len(rows))
        if context + above:
            model.prefill(context + above, alone, chunk=50)
        if rows.blocks[i] < 0:
            single = model.forward(Rows.chain([rows.tokens[i]], start + len(above)), alone)
            assert torch.equal(together.keys[:, i], single.keys[:, 0])
            assert torch.equal(together.values[:, i], single.values[:, 0])
        else:
            size = rows.blocks.count(rows.blocks[i])
            single = model.forward(Rows.block(rows.tokens[i], size, start + len(above), 96), alone)
        assert torch.equal(together.logits[i : i + len(single.logits)], single.logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_has_the_same_bits_for_any_chunking(dtype):
    model = small_model(dtype)
    ids = torch.randint(0, 96, (530,), generator=torch.Generator().manual_seed(3)).tolist()
    results = []
    for chunk in (530, 384, 100, 33, 1):
        cache = model.new_cache(530)
        results.append((model.prefill(ids, cache, chunk=chunk), *cache.read(0, 530)))
    for logits, keys, values in results[1:]:
        assert (
            torch.equal(logits, results[0][0])
            and torch.equal(keys, results[0][1])
            and torch.equal(values, results[0][2])
        )


def test_decoded_keys_serve_as_a_prefix():
    model = small_model("bfloat16")
    ids = list(range(1, 60))
    cache = model.new_cache(80)
    model.prefill(ids[:20], cache)
    for i in range(20, 50):
        out = model.forward(Rows.chain([ids[i]], i), cache)
        cache.commit(out.keys, out.values, [0])
    assert torch.equal(model.prefill(ids[50:], cache), model.logits(ids))


def test_ids_past_the_vocabulary_are_refused():
    model = small_model()
    for ids in ([97], [5, -1]):
        with pytest.raises(InputError, match=r"ids of this checkpoint are 0\.\.96"):
            model.logits(ids)


def test_logits_only_for_the_rows_asked_for():
    model = small_model()
    rows = Rows.chain([4, 5, 6, 7], 0)
    every = model.forward(rows, model.new_cache(4)).logits
    some = model.forward(rows, model.new_cache(4), logits_of=[2, 0]).logits
    none = model.forward(rows, model.new_cache(4), logits_of=[]).logits
    assert torch.equal(some, every[[2, 0]]) and none.shape == (0, 97) and every.dtype == torch.float32


def test_diffusion_rows_on_a_plain_qwen3():
    model = small_model(block_size=0, mask_token_id=-1)
    assert not any("_diff" in name for name in model.destinations())
    with pytest.raises(InputError, match="plain Qwen3 without a diffusion view"):
        model.forward(Rows.block(1, 4, 0, 96), model.new_cache(8))


def test_random_weights_follow_the_seed():
    a, b, other = (Qwen3.from_config(small_config(), seed=s, device="cpu").destinations() for s in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_backend_device_and_dtype_are_checked(monkeypatch):
    monkeypatch.setattr("qwen3_model.settings.triton_runs_on", lambda device: False)  # no interpreter
    for changes, message in (
        ({"backend": "triton"}, "takes a CUDA device"),
        ({"backend": "magic"}, "unknown backend"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:7"}, "is not there"),
        ({"dtype": "int8"}, "not supported"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            Qwen3.from_config(small_config(), **{"device": "cpu"} | changes)
        assert "\n" not in str(caught.value)


def test_what_a_cache_has_no_room_for():
    """Refused by name, before a table is read past its end."""
    model = small_model()
    for tokens in (101, 900):
        with pytest.raises(ValueError, match=f"positions 0..{tokens - 1} do not fit a cache of 100"):
            model.prefill([5] * tokens, model.new_cache(100))
    cache = model.new_cache(4)
    deepest = cache.rope_table.shape[1] - 1
    block = Rows.block(5, deepest + 1, 0, model.config.mask_token_id)
    assert torch.isfinite(model.forward(block, cache, logits_of=[deepest]).logits).all()
    with pytest.raises(ValueError, match=f"at position {deepest + 1}; with a cache of 4"):
        model.forward(Rows.block(5, deepest + 2, 0, model.config.mask_token_id), cache)
