"""Qwen3 as a user has it: a checkpoint that is loaded, and the engine that decodes with it."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from orthrus_kernels.quantised import QuantisedWeight

from . import bigram, checkpoint, hub, selector
from .config import Qwen3Config
from .decode import many
from .decode.engine import MOST_SLOTS, MOST_TOKENS, Engine
from .decode.sequence import OnRun, Result
from .decode.stream import OnTokens
from .errors import InputError, in_memory, one_line, quoted, size_of
from .graft import Graft
from .model import Network
from .quantised.slot import Slot
from .quantised.stored import StoredWeights, by_config
from .request import Request, whole_up_to
from .settings import pick_activations, pick_backend, pick_device, pick_dtype
from .tensor_names import cache_scales
from .text import TOKENIZER, Text
from .weight_files import read_headers

_log = logging.getLogger(__name__)
_SMALLER = "give a smaller dtype, another device or a smaller checkpoint"


class Qwen3(Network):
    """A dense Qwen3, or an Orthrus-Qwen3 with its diffusion view, and what decodes with it."""

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        backend: str = "auto",
        revision: str | None = None,
        progress: bool = True,
        diffusion: str | Path | None = None,
        activations: str | None = None,
    ) -> Qwen3:
        """Load a checkpoint folder or hub id. Raises InputError when it is not a dense Qwen3 or its files are
        bad.

        device: CUDA if there, else the CPU. dtype: the checkpoint's on CUDA, fp32 on a CPU. backend:
        "reference", "triton", "torch" or "auto". revision: branch, tag or commit of a hub id. diffusion: an
        Orthrus of the same base, whose diffusion view is taken (graft.py). activations: "fp8": weights of
        8-bit floats in groups of 128 columns round all rows that they multiply to 8 bits; None: no weight
        does. Without a tokenizer.json the model has no `text` and speaks token ids only."""
        on = pick_device(device)
        if on.type == "meta":
            raise InputError("a checkpoint cannot run on device meta: use cpu, cuda or cuda:N")
        run = pick_backend(backend, on)
        rounded = pick_activations(activations, on, run)
        folder = hub.resolve(path_or_id, revision)
        headers = read_headers(folder)
        config = Qwen3Config.from_folder(folder, headers)
        stored = StoredWeights(headers, config.quantisation)
        chosen = pick_dtype(dtype, on, config.dtype, run, stored.any)
        form_of, load_into, of_view = stored.of, checkpoint.load_into, folder
        if diffusion is not None:
            graft = Graft(hub.resolve(diffusion), folder, config, stored)
            config, form_of, load_into, of_view = graft.config, graft.stored, graft.load_into, graft.folder
        # everything is checked against tensors without memory before weights take any
        plan = cls(config, torch.device("meta"), chosen, run, None, form_of, rounded)
        load_into(folder, plan.destinations())
        text = Text(folder) if os.path.lexists(folder / TOKENIZER) else None
        size = size_of(sum(weight.nbytes for weight in plan.destinations().values()))
        with in_memory(f"{path_or_id}, {size} of weights in {str(chosen)[6:]},", _SMALLER):
            model = cls(config, on, chosen, run, text, form_of, rounded)
            load_into(folder, model.destinations(), progress=progress)
            tables = bigram.load(of_view, config, on, chosen)
            model.bigram = selector.load(of_view, config, tables, model.embedding)
        if cache_scales(headers) or (config.quantisation and config.quantisation.cache_scheme):
            _log.warning(
                "%s has scales for a cache of 8 bits: they are left out, keys and values are kept in %s",
                one_line(path_or_id, 200), str(chosen)[6:],
            )  # fmt: skip
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
        activations: str | None = None,
    ) -> Qwen3:
        """A model of random weights, for tests and benchmarks: matrices N(0, 0.02^2), norms N(1, 0.1^2). They
        are quantised as the config says. activations: as of `from_pretrained`."""
        on = pick_device(device)
        run = pick_backend(backend, on)
        chosen = pick_dtype(dtype, on, config.dtype, run, config.quantisation is not None)
        rounded = pick_activations(activations, on, run)
        model = cls(config, on, chosen, run, None, by_config(config.quantisation), rounded)
        if on.type != "meta":
            generator = torch.Generator(on).manual_seed(seed)
            for weight in model.destinations().values():
                if isinstance(weight, Slot):
                    weight.randomise(0.02, generator)
                    continue
                mean, std = (1.0, 0.1) if weight.dim() == 1 else (0.0, 0.02)
                weight.normal_(mean, std, generator=generator)
        return model

    def drafts_are_numbers(self) -> bool:
        """Whether every weight of the diffusion view is finite; so where there is none. One read of them. All
        codes that were loaded are finite, so of quantised weights the scales are read."""
        views = [layer.diffusion for layer in self.layers if layer.diffusion is not None]
        read = [w for v in views for w in (v.qkv, v.o)]
        weights = [w.scale if isinstance(w, QuantisedWeight) else w.dense() for w in read]
        weights += [norm for v in views for norm in (v.q_norm, v.k_norm)]
        ends = [end for weight in weights for end in weight.aminmax()]  # NaN if one of them is
        return not ends or bool(torch.stack(ends).isfinite().all())

    _many: tuple[tuple[int, int | None], Engine] | None = None

    @cached_property
    def engine(self) -> Engine:
        """The engine of `generate`. It does not keep the model alive, so that its memory goes with the
        model."""
        return Engine(weakref.proxy(self))

    def generate(
        self,
        prompt_ids: Sequence[int],
        strategy: str = "auto",
        max_new_tokens: int | None = None,
        *,
        on_tokens: OnTokens | None = None,
        on_run: OnRun | None = None,
        **settings: Any,
    ) -> Result:
        """Decode after `prompt_ids`. The text depends on weights, prompt, settings and seed, never on
        strategy or block size (but for verify="rejection").

        strategy, max_new_tokens, settings: those of `Request` (request.py), which says what each is.
        on_tokens(ids, text): called with each accepted run; returning False stops.
        on_run(run, kept): called with the prompt's run and each cycle's, and how many of its tokens were
        kept, before on_tokens; runs then tell their trees and the target's choices (decode/sequence.py), at
        the cost of speed. Ctrl-C ends a generation with what it has.
        On CUDA one thread and stream at a time: kernels share a workspace.
        Raises InputError for impossible settings, a prompt that is empty or does not fit, logits that are not
        numbers, and a pass that does not fit into memory."""
        request = Request(strategy=strategy, max_new_tokens=max_new_tokens, **settings)
        return self.engine.generate(prompt_ids, request, on_tokens, on_run)

    def generate_many(
        self,
        prompts: Iterable[Sequence[int]],
        strategy: str = "auto",
        max_new_tokens: int | None = None,
        *,
        slots: int = 32,
        cache_tokens: int | None = None,
        progress: bool | None = None,
        **settings: Any,
    ) -> Iterator[Result]:
        """Decode after every prompt (token ids), many side by side; yields the results in order, each equal
        in every bit to that of `generate` with the same settings and seed.

        slots, cache_tokens: of the engine, as in `Engine`; it is kept for the next call. progress: a bar on
        stderr; None: where that is a terminal. The prompts of a list are all checked before the first pass;
        an iterator is read as its prompts are needed. A text whose logits are not numbers ends alone:
        `finish_reason` is "error", and `error` says why. Ctrl-C ends the texts that run with what they have,
        and the iterator behind them. On a GPU an engine of several slots first captures its graphs
        (decode/warm.py). Raises InputError, naming the prompt by its number from 0."""
        request = Request(strategy=strategy, max_new_tokens=max_new_tokens, **settings)
        if not isinstance(prompts, Iterable):
            raise InputError(f"prompts is {quoted(prompts)}; a list or an iterator of prompts was expected")
        total = None
        if isinstance(prompts, Sequence):
            many.checked(self.engine_of(slots, cache_tokens), prompts, request)
            total = len(prompts)

        def found() -> Iterator[Result]:
            engine, left = self.engine_of(slots, cache_tokens), iter(prompts)
            first = list(islice(left, 1))
            many.checked(engine, first, request)
            if first and slots > 1:
                engine.warm(progress)  # here, so that its bar is gone when the other one comes
            jobs = ((prompt, request) for prompt in chain(first, left))
            yield from many.with_bar(many.results(engine, jobs), total, progress)

        return found()

    def engine_of(self, slots: int, cache_tokens: int | None = None) -> Engine:
        """The engine of `generate_many` for so many slots, the last one's if it had as many."""
        slots = whole_up_to("slots", slots, MOST_SLOTS)  # a key of True would find the engine of 1
        if cache_tokens is not None:
            cache_tokens = whole_up_to("cache_tokens", cache_tokens, MOST_TOKENS)
        key = slots, cache_tokens
        if self._many is None or self._many[0] != key:
            self._many = None  # frees the memory before more is taken
            self._many = key, Engine(weakref.proxy(self), slots, cache_tokens)
        return self._many[1]
