"""Qwen3 with both views: one forward pass over AR and diffusion rows. Read it from the bottom up.

Dimension letters: T rows, S cached length, H query heads, G key/value heads, D head size, E hidden size, F
MLP size, V vocabulary."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from orthrus_kernels import (
    Rows,
    Weight,
    backend_ops,
    inverse_frequencies,
    pdl_kinds,
    rope_table,
    triton_interprets,
)

from . import bigram, checkpoint, hub
from . import generate as generation
from .config import BLOCK_SIZES, Qwen3Config
from .errors import InputError, in_memory, one_line, size_of
from .kv_cache import KVCache
from .pass_inputs import PassInputs
from .settings import pick_backend, pick_device, pick_dtype
from .text import TOKENIZER, Text

NewTensor = Callable[..., Tensor]  # torch.empty on the model's device and in its dtype
PREFILL_ROWS = 384  # of a prompt in a pass: three row tiles of most linears; keys and values are 57 MB at 8B
_log = logging.getLogger(__name__)
_SMALLER = "give a smaller dtype, another device or a smaller checkpoint"
ROWS_BEHIND = BLOCK_SIZES[-1]  # positions past a cache's end that rows of a draft may take


@dataclass
class Attention:
    """One view's attention weights of a layer; query, key and value projections stacked."""

    qkv: Weight  # [(H + 2G) D, E]
    o: Weight  # [E, H D]
    q_norm: Tensor  # [D]
    k_norm: Tensor  # [D]

    @staticmethod
    def empty(c: Qwen3Config, new: NewTensor) -> Attention:
        """Weights of one view, not filled in."""
        heads, groups = c.num_attention_heads, c.num_key_value_heads
        return Attention(
            Weight(new((heads + 2 * groups) * c.head_dim, c.hidden_size)),
            Weight(new(c.hidden_size, heads * c.head_dim)),
            new(c.head_dim),
            new(c.head_dim),
        )

    def named(self, c: Qwen3Config, suffix: str) -> Iterator[tuple[str, Tensor]]:
        """The official names of the weights, each with its part of the stacked weight."""
        kv = c.num_key_value_heads * c.head_dim
        q, k, v = self.qkv.parts(c.num_attention_heads * c.head_dim, kv, kv)
        (o,) = self.o.parts(c.hidden_size)
        for name, view in (("q_proj", q), ("k_proj", k), ("v_proj", v), ("o_proj", o),
                           ("q_norm", self.q_norm), ("k_norm", self.k_norm)):  # fmt: skip
            yield f"self_attn.{name}{suffix}.weight", view


@dataclass
class Layer:
    """A decoder layer: norms and MLP shared by both views, attention weights of each."""

    input_norm: Tensor  # [E]
    ar: Attention
    diffusion: Attention | None
    post_norm: Tensor  # [E]
    gate_up: Weight  # [2F, E]
    down: Weight  # [E, F]

    @staticmethod
    def empty(c: Qwen3Config, new: NewTensor) -> Layer:
        """Weights of a layer, not filled in."""
        return Layer(
            new(c.hidden_size),
            Attention.empty(c, new),
            Attention.empty(c, new) if c.has_diffusion_view else None,
            new(c.hidden_size),
            Weight(new(2 * c.intermediate_size, c.hidden_size)),
            Weight(new(c.hidden_size, c.intermediate_size)),
        )

    def named(self, c: Qwen3Config) -> Iterator[tuple[str, Tensor]]:
        """The official names of the layer's weights, each with its part of the stacked weights."""
        yield "input_layernorm.weight", self.input_norm
        yield from self.ar.named(c, "")
        if self.diffusion is not None:
            yield from self.diffusion.named(c, "_diff")
        yield "post_attention_layernorm.weight", self.post_norm
        gate, up = self.gate_up.parts(c.intermediate_size, c.intermediate_size)
        (down,) = self.down.parts(c.hidden_size)
        yield "mlp.gate_proj.weight", gate
        yield "mlp.up_proj.weight", up
        yield "mlp.down_proj.weight", down


@dataclass
class Output:
    """What a pass returns; the keys and values are those of its AR rows, to be committed."""

    logits: Tensor  # [rows asked for, V] fp32
    keys: Tensor  # [L, T_ar, G, D]
    values: Tensor  # [L, T_ar, G, D]


class Qwen3:
    """A dense Qwen3, or an Orthrus-Qwen3 with its diffusion view."""

    def __init__(
        self, config: Qwen3Config, device: torch.device, dtype: torch.dtype, backend: str, text: Text | None
    ) -> None:
        new = partial(torch.empty, device=device, dtype=dtype)
        self.config, self.device, self.dtype, self.backend, self.text = config, device, dtype, backend, text
        self.ops = backend_ops(backend, pdl_kinds(device))
        # whether generate replays passes as CUDA graphs; False launches every kernel, for debugging
        self.use_graphs = backend == "triton" and device.type == "cuda" and not triton_interprets()
        # and whole cycles, without the host between them
        self.use_cycles = self.use_graphs
        self.spare_cache: KVCache | None = None  # captured.lent_cache
        self.bigram: bigram.Bigram | None = None  # corrects the ranks of a draft tree's candidates
        self.embedding = new(config.vocab_size, config.hidden_size)
        self.layers = [Layer.empty(config, new) for _ in range(config.num_hidden_layers)]
        self.norm = new(config.hidden_size)
        tied = config.tie_word_embeddings
        self.head = Weight(self.embedding if tied else torch.empty_like(self.embedding))
        frequencies, self.rope_scale = inverse_frequencies(config.head_dim, config.rope_theta, config.yarn)
        self.frequencies = frequencies.to(device)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        backend: str = "auto",
        revision: str | None = None,
        progress: bool = True,
    ) -> Qwen3:
        """Load a checkpoint folder or hub id. Raises InputError when it is not a dense Qwen3 or its files are
        bad.

        device: CUDA if there, else the CPU. dtype: the checkpoint's on CUDA, fp32 on a CPU. backend:
        "reference", "triton", "torch" or "auto". revision: branch, tag or commit of a hub id. Without a
        tokenizer.json the model has no `text` and speaks token ids only."""
        on = pick_device(device)
        if on.type == "meta":
            raise InputError("a checkpoint cannot run on device meta: use cpu, cuda or cuda:N")
        run = pick_backend(backend, on)
        folder = hub.resolve(path_or_id, revision)
        config = Qwen3Config.from_folder(folder, checkpoint.tensor_names(folder))
        chosen = pick_dtype(dtype, on, config.dtype)
        # everything is checked against tensors without memory before weights take any
        plan = cls(config, torch.device("meta"), chosen, run, None)
        checkpoint.load_into(folder, plan.destinations())
        text = Text(folder) if os.path.lexists(folder / TOKENIZER) else None
        size = size_of(sum(weight.nbytes for weight in plan.destinations().values()))
        with in_memory(f"{path_or_id}, {size} of weights in {str(chosen)[6:]},", _SMALLER):
            model = cls(config, on, chosen, run, text)
            checkpoint.load_into(folder, model.destinations(), progress=progress)
            model.bigram = bigram.load(folder, config, on, chosen)
        if not model.drafts_are_numbers():
            _log.warning(
                "the diffusion view of %s holds NaN or infinite weights: the text is right, and drafts are "
                "lost; download or train it again", one_line(path_or_id, 200),
            )  # fmt: skip
        return model

    @classmethod
    def from_config(
        cls,
        config: Qwen3Config,
        seed: int = 0,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        backend: str = "auto",
    ) -> Qwen3:
        """A model of random weights, for tests and benchmarks: matrices N(0, 0.02^2), norms N(1, 0.1^2)."""
        on = pick_device(device)
        model = cls(config, on, pick_dtype(dtype, on, config.dtype), pick_backend(backend, on), None)
        if on.type != "meta":
            generator = torch.Generator(on).manual_seed(seed)
            for weight in model.destinations().values():
                mean, std = (1.0, 0.1) if weight.dim() == 1 else (0.0, 0.02)
                weight.normal_(mean, std, generator=generator)
        return model

    def destinations(self) -> dict[str, Tensor]:
        """Official tensor name -> the view of our parameters it is loaded into."""
        named = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        for i, layer in enumerate(self.layers):
            named |= {f"model.layers.{i}.{name}": view for name, view in layer.named(self.config)}
        if not self.config.tie_word_embeddings:
            (named["lm_head.weight"],) = self.head.parts(self.config.vocab_size)
        return named

    def drafts_are_numbers(self) -> bool:
        """Whether every weight of the diffusion view is finite; so where there is none. One read of them."""
        views = [layer.diffusion for layer in self.layers if layer.diffusion is not None]
        weights = [w for v in views for w in (v.qkv.dense(), v.o.dense(), v.q_norm, v.k_norm)]
        ends = [end for weight in weights for end in weight.aminmax()]  # NaN if one of them is
        return not ends or bool(torch.stack(ends).isfinite().all())

    def new_cache(self, capacity: int, sequences: int = 1) -> KVCache:
        """An empty cache for `capacity` positions of each of `sequences` sequences."""
        turns = partial(rope_table, capacity + ROWS_BEHIND, self.frequencies, self.rope_scale)
        return KVCache(self.config, capacity, self.device, self.dtype, sequences, self.ops.commit, turns)

    generate = generation.generate

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits [V] fp32 for the token after `token_ids`, by the AR view."""
        cache = self.new_cache(len(token_ids))
        return self.prefill(token_ids, cache)

    def prefill(
        self, token_ids: Sequence[int], cache: KVCache, sequence: int = 0, chunk: int = PREFILL_ROWS
    ) -> Tensor:
        """Append tokens to a sequence of the cache, `chunk` rows a pass, and return the last one's logits [V]
        fp32.

        Any chunking gives the same bits. Raises InputError for an empty prompt and for ids past the
        vocabulary, ValueError for more tokens than the cache has room for.
        """
        if not token_ids:
            raise InputError("the prompt is empty: give at least one token")
        generation.check_ids(token_ids, self.config.vocab_size)
        cache.check_room(len(token_ids), sequence)
        for first in range(0, len(token_ids), chunk):
            part = token_ids[first : first + chunk]
            last = first + len(part) == len(token_ids)
            rows = Rows.chain(part, cache.lengths[sequence], sequence)
            out = self.forward(rows, cache, logits_of=[len(part) - 1] if last else [])
            cache.commit(out.keys, out.values, range(len(part)), sequence)
            logits = out.logits
            del out  # its keys and values go before the next pass makes its own
        return logits[0]

    @torch.inference_mode()
    def forward(
        self, rows: Rows, cache: KVCache, logits_of: Sequence[int] | None = None, repeats: bool = True
    ) -> Output:
        """One pass over AR rows, diffusion rows or both, against the committed context of their sequences.

        logits_of: indices of the rows whose logits are wanted; None: all. repeats: passes of this shape come
        again, so that a graph of it pays; no tree is like the one before. The cache is read, never written:
        commit the keys and values of accepted rows afterwards."""
        c, n_ar = self.config, rows.n_ar
        if n_ar < len(rows) and not c.has_diffusion_view:
            raise InputError(
                "this checkpoint is a plain Qwen3 without a diffusion view; use strategy autoregressive"
            )
        for sequence, context in rows.contexts.items():
            assert context == cache.lengths[sequence], (sequence, context, cache.lengths[sequence])
        cache.check_positions(rows)
        prepared = self.ops.prepare_rows(
            rows, c.num_attention_heads, c.num_key_value_heads, c.head_dim, self.dtype, torch.device("cpu")
        )
        wanted = None if logits_of is None else torch.tensor(list(logits_of), dtype=torch.int64)
        inputs = PassInputs(torch.tensor([rows.tokens, rows.positions]), prepared, n_ar, wanted)
        if cache.passes is not None and repeats:
            return cache.passes.run(inputs)
        return self.compute(inputs.on(self.device), cache)

    def compute(self, inputs: PassInputs, cache: KVCache) -> Output:
        """The pass itself, on inputs that lie on the model's device: only launches, nothing from the host."""
        normed, keys, values = self.states(inputs, cache)
        return Output(self.ops.linear(normed, self.head, out_dtype=torch.float32), keys, values)

    def states(self, inputs: PassInputs, cache: KVCache) -> tuple[Tensor, Tensor, Tensor]:
        """The pass without its head: (normalised states [rows asked for, E], keys, values as in Output)."""
        tokens, positions = inputs.ids
        turn = cache.turns[:, positions]
        x = self.ops.embedding(self.embedding, tokens)
        normed, keys, values = self._run_layers(x, turn, inputs, cache)
        if inputs.logits_of is not None:
            normed = self.ops.embedding(normed, inputs.logits_of)
        return normed, keys[:, : inputs.n_ar], values[:, : inputs.n_ar]

    def _run_layers(
        self, x: Tensor, turn: Tensor, inputs: PassInputs, cache: KVCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All layers, one after another, over embedded rows x [T, E]. Returns the last layer's states behind
        the final norm, [T, E], and keys and values of every layer, two [L, T, G, D].
        turn: cosine and sine of the rows' positions, [2, T, D/2]."""
        ops, eps = self.ops, self.config.rms_norm_eps
        normed = ops.rms_norm(x, self.layers[0].input_norm, eps)
        norms_after = [layer.input_norm for layer in self.layers[1:]] + [self.norm]
        shape = len(self.layers), len(x), self.config.num_key_value_heads, self.config.head_dim
        keys, values = x.new_empty(shape), x.new_empty(shape)
        for i, (layer, norm_after) in enumerate(zip(self.layers, norms_after, strict=True)):
            a = self._attention(
                layer, normed, turn, inputs, (keys[i], values[i]), cache.keys[i], cache.values[i]
            )
            normed, x = ops.add_rms_norm(a, x, layer.post_norm, eps)
            mlp = ops.linear(ops.linear_swiglu(normed, layer.gate_up), layer.down)
            normed, x = ops.add_rms_norm(mlp, x, norm_after, eps)
        return normed, keys, values

    def _attention(
        self,
        layer: Layer,
        x: Tensor,
        turn: Tensor,
        inputs: PassInputs,
        keep: tuple[Tensor, Tensor],
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor:
        """A layer's attention over normalised rows x [T, E] against its cache [B, G, S, D]: output [T, E].
        keep: takes the rows' keys and values, two [T, G, D]."""
        c, ops, ar, diff = self.config, self.ops, layer.ar, layer.diffusion or layer.ar
        heads, groups, n_ar = c.num_attention_heads, c.num_key_value_heads, inputs.n_ar
        qkv = ops.linear(x, ar.qkv, diff.qkv, n_ar).view(len(x), heads + 2 * groups, c.head_dim)
        q, k, v = ops.qk_norm_rope(
            qkv, heads, ar.q_norm, ar.k_norm, *turn, c.rms_norm_eps, diff.q_norm, diff.k_norm, n_ar, keep
        )
        out = ops.attention(q, k, v, k_cache, v_cache, inputs.rows, c.head_dim**-0.5)
        return ops.linear(out.flatten(1), ar.o, diff.o, n_ar)
