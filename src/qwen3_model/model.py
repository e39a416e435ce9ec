"""Qwen3 with both views: one forward pass over AR and diffusion rows. Read it from the bottom up.

Dimension letters: T rows, S cached length, H query heads, G key/value heads, D head size, E hidden size, F
MLP size, V vocabulary."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from orthrus_kernels import (
    PassPlan,
    PassShape,
    Rows,
    Weight,
    backend_ops,
    inverse_frequencies,
    pdl_kinds,
    rope_table,
    triton_interprets,
)
from orthrus_kernels.quantised import QuantisedWeight
from orthrus_kernels.weight import AnyWeight

from .bigram import Bigram
from .config import BLOCK_SIZES, Qwen3Config
from .errors import InputError, quoted
from .kv_cache import KVCache
from .matcher import Grammars
from .matrices import Matrices, Part, Stack
from .passes import Pass
from .quantised.stored import DIFFUSION, FindStored, all_plain
from .settings import FP8
from .text import Text

PREFILL_ROWS = 2048  # of a prompt in a pass, at most: keys and values of its layers take 302 MB at 8B
CPU_CACHE = 2 << 30  # bytes of a cache of several texts on a CPU, where nobody has said how large it is
POSITIONS_PAST_CACHE = BLOCK_SIZES[-1]  # positions past a cache's end that rows of a draft may take


@dataclass
class Attention:
    """One view's attention weights of a layer; query, key and value projections stacked."""

    qkv: AnyWeight  # [(H + 2G) D, E]
    o: AnyWeight  # [E, H D]
    q_norm: Tensor  # [D]
    k_norm: Tensor  # [D]

    @staticmethod
    def stacks(c: Qwen3Config, at: str, suffix: str) -> tuple[Stack, Stack]:
        """The modules of qkv and of o, of the layer whose names begin with `at`."""
        kv = c.num_key_value_heads * c.head_dim
        rows = {"q_proj": c.num_attention_heads * c.head_dim, "k_proj": kv, "v_proj": kv}
        qkv = {f"{at}self_attn.{name}{suffix}": n for name, n in rows.items()}
        return qkv, {f"{at}self_attn.o_proj{suffix}": c.hidden_size}

    @staticmethod
    def empty(c: Qwen3Config, at: str, suffix: str, new: Matrices) -> Attention:
        """Weights of one view, not filled in."""
        qkv, o = Attention.stacks(c, at, suffix)
        return Attention(
            new.matrix(qkv, c.hidden_size),
            new.matrix(o, c.num_attention_heads * c.head_dim),
            new.vector(c.head_dim),
            new.vector(c.head_dim),
        )

    def named(self, c: Qwen3Config, at: str, suffix: str, new: Matrices) -> Iterator[tuple[str, Part]]:
        """The official names of the weights, each with its part of the stacked weight."""
        qkv, o = Attention.stacks(c, at, suffix)
        yield from new.parts(self.qkv, qkv)
        yield from new.parts(self.o, o)
        yield f"{at}self_attn.q_norm{suffix}.weight", self.q_norm
        yield f"{at}self_attn.k_norm{suffix}.weight", self.k_norm


@dataclass
class Layer:
    """A decoder layer: norms and MLP shared by both views, attention weights of each."""

    input_norm: Tensor  # [E]
    ar: Attention
    diffusion: Attention | None
    post_norm: Tensor  # [E]
    gate_up: AnyWeight  # [2F, E]
    down: AnyWeight  # [E, F]

    @staticmethod
    def stacks(c: Qwen3Config, at: str) -> tuple[Stack, Stack]:
        """The modules of gate_up and of down, of the layer whose names begin with `at`."""
        gate_up = {f"{at}mlp.{name}": c.intermediate_size for name in ("gate_proj", "up_proj")}
        return gate_up, {f"{at}mlp.down_proj": c.hidden_size}

    @staticmethod
    def empty(c: Qwen3Config, at: str, new: Matrices) -> Layer:
        """Weights of a layer, not filled in."""
        gate_up, down = Layer.stacks(c, at)
        return Layer(
            new.vector(c.hidden_size),
            Attention.empty(c, at, "", new),
            Attention.empty(c, at, DIFFUSION, new) if c.has_diffusion_view else None,
            new.vector(c.hidden_size),
            new.matrix(gate_up, c.hidden_size),
            new.matrix(down, c.intermediate_size),
        )

    def named(self, c: Qwen3Config, at: str, new: Matrices) -> Iterator[tuple[str, Part]]:
        """The official names of the layer's weights, each with its part of the stacked weights."""
        gate_up, down = Layer.stacks(c, at)
        yield f"{at}input_layernorm.weight", self.input_norm
        yield from self.ar.named(c, at, "", new)
        if self.diffusion is not None:
            yield from self.diffusion.named(c, at, DIFFUSION, new)
        yield f"{at}post_attention_layernorm.weight", self.post_norm
        yield from new.parts(self.gate_up, gate_up)
        yield from new.parts(self.down, down)


@dataclass
class Output:
    """What a pass returns; the keys and values are those of its AR rows, to be committed."""

    logits: Tensor  # [rows asked for, V] fp32
    states: Tensor  # behind the final norm, [rows asked for, E]
    keys: Tensor  # [L, T_ar, G, D]
    values: Tensor  # [L, T_ar, G, D]


class Network:
    """A dense Qwen3, or an Orthrus-Qwen3 with its diffusion view: weights and forward pass."""

    def __init__(
        self, config: Qwen3Config, device: torch.device, dtype: torch.dtype, backend: str, text: Text | None,
        stored: FindStored = all_plain, activations: str | None = None,
    ) -> None:  # fmt: skip
        """Weights without numbers, in the forms of `stored`. activations: FP8: weights that can do so round
        the rows that they multiply to 8 bits. Raises InputError where forms do not fit, and where no weight
        can round."""
        self.config, self.device, self.dtype, self.backend, self.text = config, device, dtype, backend, text
        self.ops = backend_ops(backend, pdl_kinds(device))
        # whether an engine replays CUDA graphs; False launches every kernel, for debugging
        self.use_graphs = backend == "triton" and device.type == "cuda" and not triton_interprets()
        self.bigram: Bigram | None = None  # corrects the ranks of a draft's candidates, a selector with it
        self.grammars = Grammars(text, config)
        self.activations = activations
        self._matrices = new = Matrices(device, dtype, stored, activations == FP8)
        self.embedding = torch.empty(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.layers = [Layer.empty(config, _layer(i), new) for i in range(config.num_hidden_layers)]
        self.norm = new.vector(config.hidden_size)
        tied = config.tie_word_embeddings
        self.head = Weight(self.embedding if tied else torch.empty_like(self.embedding))
        frequencies, self.rope_scale = inverse_frequencies(config.head_dim, config.rope_theta, config.yarn)
        self.frequencies = frequencies.to(device)
        if activations is not None and not any(weight.rounds for weight in self.codes()):
            raise InputError(
                "activations fp8 are for weights of 8-bit floats in groups of 128 columns, and this "
                "checkpoint has none: leave activations out (orthrus info shows how its weights are stored)"
            )

    def codes(self) -> Iterator[QuantisedWeight]:
        """The quantised ones among the matrices of the layers."""
        for layer in self.layers:
            views = [layer.ar] if layer.diffusion is None else [layer.ar, layer.diffusion]
            for weight in (layer.gate_up, layer.down, *(w for view in views for w in (view.qkv, view.o))):
                if isinstance(weight, QuantisedWeight):
                    yield weight

    def destinations(self) -> dict[str, Part]:
        """Official name of a weight -> the view of our parameters it is loaded into, a slot if it is
        quantised."""
        named: dict[str, Part] = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        for i, layer in enumerate(self.layers):
            named |= dict(layer.named(self.config, _layer(i), self._matrices))
        if not self.config.tie_word_embeddings:
            (named["lm_head.weight"],) = self.head.parts(self.config.vocab_size)
        return named

    def new_cache(self, capacity: int, sequences: int = 1, pool: int | None = None) -> KVCache:
        """An empty cache for `capacity` positions of each of `sequences` sequences; pool: of so many pages,
        which the caller hands out (kv_cache.py)."""
        table = partial(rope_table, capacity + POSITIONS_PAST_CACHE, self.frequencies, self.rope_scale)
        commit = self.ops.commit
        return KVCache(self.config, capacity, self.device, self.dtype, sequences, commit, table, pool)

    def positions_that_fit(self, most: int) -> int:
        """How many positions of a cache 0.9 of the free memory holds, `most` at most; on a CPU 2 GiB."""
        c = self.config
        each = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.dtype.itemsize
        free = CPU_CACHE
        if self.device.type == "cuda":
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            free = int(0.9 * (torch.cuda.mem_get_info(self.device)[0] + unused))
        return min(free // each, most)

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
        token_ids = checked_prompt(token_ids, self.config.vocab_size)
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
    def forward(self, rows: Rows, cache: KVCache, logits_of: Sequence[int] | None = None) -> Output:
        """One pass over AR rows, diffusion rows or both, against the committed context of their sequences.

        logits_of: indices of the rows whose logits are wanted; None: all. The cache is read, never written:
        commit the keys and values of accepted rows afterwards."""
        c, n_ar = self.config, rows.n_ar
        if n_ar < len(rows) and not c.has_diffusion_view:
            raise InputError(
                "this checkpoint is a plain Qwen3 without a diffusion view; use strategy autoregressive"
            )
        for sequence, context in rows.contexts.items():
            assert context == cache.lengths[sequence], (sequence, context, cache.lengths[sequence])
        cache.check_positions(rows)
        wanted = None if logits_of is None else torch.tensor(list(logits_of)).long().to(self.device)
        given = self.new_pass(rows, cache, logits_of=wanted)
        self.ops.lay(given.plan, given.tables)
        normed, keys, values = self.states(given, cache)
        logits = self.ops.linear(normed, self.head, out_dtype=torch.float32)
        return Output(logits, normed, keys, values)

    def new_pass(
        self,
        rows: Rows,
        cache: KVCache,
        start: Tensor | None = None,
        shape: PassShape | None = None,
        logits_of: Tensor | None = None,
    ) -> Pass:
        """A pass over a cache, in memory of its own, its tables not filled in (`ops.lay`).

        start [S] int32: where the committed length of each sequence stands; None: the rows say it. shape: of
        all passes that this memory is for; None: of these rows alone. logits_of [rows] int64: whose states
        are wanted; None: those of all rows."""
        c, plan = self.config, PassPlan.of(rows, self.device)
        plan = replace(plan, shape=shape or plan.shape, start=plan.start if start is None else start)
        tables = self.ops.new_tables(
            plan.shape, cache.rope_table.shape[1], c.num_attention_heads, c.num_key_value_heads, c.head_dim,
            self.dtype, self.device,
        )  # fmt: skip
        return Pass(plan, tables, logits_of)

    def states(self, given: Pass, cache: KVCache) -> tuple[Tensor, Tensor, Tensor]:
        """The pass without its head: (normalised states [rows asked for, E], keys, values as in Output)."""
        plan, n_ar = given.plan, given.plan.shape.n_ar
        turn = cache.rope_table[:, plan.positions]
        x = self.ops.embedding(self.embedding, plan.tokens)
        normed, keys, values = self._run_layers(x, turn, given, cache)
        if given.logits_of is not None:
            normed = self.ops.embedding(normed, given.logits_of)
        return normed, keys[:, :n_ar], values[:, :n_ar]

    def _run_layers(
        self, x: Tensor, turn: Tensor, given: Pass, cache: KVCache
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
                layer, normed, turn, given, (keys[i], values[i]), cache.keys[i], cache.values[i], cache.pages
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
        given: Pass,
        keep: tuple[Tensor, Tensor],
        k_cache: Tensor,
        v_cache: Tensor,
        pages: Tensor,
    ) -> Tensor:
        """A layer's attention over normalised rows x [T, E] against its cache [P, G, PAGE, D]: output [T, E].
        keep: takes the rows' keys and values, two [T, G, D]."""
        c, ops, ar, diff = self.config, self.ops, layer.ar, layer.diffusion or layer.ar
        heads, groups, n_ar = c.num_attention_heads, c.num_key_value_heads, given.plan.shape.n_ar
        qkv = ops.linear(x, ar.qkv, diff.qkv, n_ar).view(len(x), heads + 2 * groups, c.head_dim)
        q, k, v = ops.qk_norm_rope(
            qkv, heads, ar.q_norm, ar.k_norm, *turn, c.rms_norm_eps, diff.q_norm, diff.k_norm, n_ar, keep
        )
        out = ops.attention(q, k, v, k_cache, v_cache, pages, given.tables, c.head_dim**-0.5)
        return ops.linear(out.flatten(1), ar.o, diff.o, n_ar)


def _layer(i: int) -> str:
    """How the names of a layer's modules begin."""
    return f"model.layers.{i}."


def check_ids(ids: Sequence[int], vocabulary: int) -> None:
    """Raises InputError for a token id past the vocabulary: a kernel would read past the embedding."""
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise InputError(
            f"the prompt holds token id {quoted(wrong)}; ids of this checkpoint are 0..{vocabulary - 1}"
        )


def checked_prompt(prompt_ids: Sequence[int], vocabulary: int) -> list[int]:
    """The ids as whole numbers. Raises InputError for an empty prompt, for what is not a token id, and for an
    id past the vocabulary: a kernel would read past the embedding."""
    try:
        prompt = [operator.index(token) for token in prompt_ids]
    except TypeError:
        raise InputError(
            "the prompt must be a list of token ids: encode text first (model.text.encode)"
        ) from None
    if not prompt:
        raise InputError("the prompt is empty: give at least one token")
    check_ids(prompt, vocabulary)
    return prompt
