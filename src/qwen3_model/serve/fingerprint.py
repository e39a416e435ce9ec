"""The fingerprint of an engine: what its bits depend on, as a short hash.

Engines with equal fingerprints have the same tokens and log-probabilities for a prompt, its settings and its
seed, whatever else they serve. Weights are known by their names and shapes, and by the bits of two short
texts, which any change of a weight that matters shows in; a hash of all their bytes would take seconds a
billion."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path

import torch

import orthrus_kernels
from orthrus_kernels._triton import triton

from ..decode.engine import Engine
from ..errors import InputError
from ..model import Network
from ..request import Request

PROMPT_TOKENS, NEW_TOKENS = 40, 16  # together no more than a page, which every cache has


def fingerprint(model: Network, engine: Engine) -> str:
    """16 hexadecimal digits. The engine runs no other text meanwhile. Raises InputError where the model's
    logits are not numbers."""
    facts = {
        "config": repr(model.config),
        "dtype": str(model.dtype),
        "activations": model.activations,
        "backend": model.backend,
        "weights": {name: list(weight.shape) for name, weight in model.destinations().items()},
        "kernels": _kernels(),
        "torch": torch.__version__,
        "triton": str(getattr(triton, "__version__", "")),
        "device": device_name(model.device),
        "threads": torch.get_num_threads() if model.device.type == "cpu" else 0,
        "texts": _texts(model, engine),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def device_name(device: torch.device) -> str:
    """The GPU's name; of a CPU, what its sums depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _kernels() -> str:
    """A hash of all operations with their launch tables."""
    folder, found = Path(orthrus_kernels.__file__).parent, hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.suffix in (".py", ".json")):
        found.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def _texts(model: Network, engine: Engine) -> list[tuple[list[int], list[str]]]:
    """Tokens and the bits of their log-probabilities, of a greedy text and a sampled one."""
    vocabulary, context = model.config.vocab_size, model.config.context_length
    prompt = [(1 + 7919 * i) % vocabulary for i in range(min(PROMPT_TOKENS, context - 1))]
    new = min(NEW_TOKENS, context - len(prompt))
    texts = [
        engine.submit(
            prompt, Request(strategy="autoregressive", max_new_tokens=new, temperature=temperature, seed=1)
        )
        for temperature in (0.0, 1.0)
    ]
    while not all(text.finished for text in texts):
        engine.step()
    results = [text.result() for text in texts]
    if wrong := next((result.error for result in results if result.error), ""):
        raise InputError(wrong)
    return [(result.token_ids, [value.hex() for value in result.logprobs]) for result in results]
