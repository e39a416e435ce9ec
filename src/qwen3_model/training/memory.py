"""Whether a training can fit at all, by arithmetic, before anything is read or made.

The figures are lower bounds: what they refuse could not run anywhere near this machine. What is only a
little too large is found out by trying (`errors.in_memory`)."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..config import Qwen3Config
from ..errors import InputError, size_of
from .distill import Blocks
from .loop import Plan

ADVICE = "use a smaller --batch, --length, --blocks or model"
LEARNING = 8  # bytes beside a weight that learns, in fp32 as all are: its gradient, one moment at least
CGROUP = Path("/sys/fs/cgroup/memory.max")  # a container's limit


def check_pretraining(config: Qwen3Config, plan: Plan) -> None:
    """Raises InputError when the AR view cannot be trained by a plan: every row has its logits, and every
    matrix keeps its input for its gradient."""
    device = training_device()
    inputs = config.num_hidden_layers * (3 * config.hidden_size + config.intermediate_size)
    step = plan.batch * plan.length * (config.vocab_size + inputs) * _width(device)
    weights = _shared(config) + _attention(config)
    _check(weights * (4 + LEARNING) + step, device)


def check_distillation(config: Qwen3Config, plan: Plan, blocks: Blocks) -> None:
    """Raises InputError when a plan's blocks of a diffusion view cannot be computed: all their rows have a
    state, and a mask says which keys each of them sees."""
    device = training_device()
    rows = plan.batch * min(blocks.count, plan.length - blocks.size) * blocks.size
    states, mask = rows * config.hidden_size, rows * (plan.length + rows // plan.batch)
    weights = _shared(config) + 2 * _attention(config)
    _check(weights * 4 + states * _width(device) + mask, device)


def check_recording(needed: int, device: torch.device, advice: str) -> None:
    """Raises InputError where what is recorded for a fit takes more bytes than there are."""
    _check(needed, device, advice)


def training_device() -> torch.device:
    """Where trainings run: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def memory_of(device: torch.device) -> int:
    """Bytes that a process can have there at most."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if CGROUP.is_file() and (said := CGROUP.read_text().strip()).isdigit():
        limits.append(int(said))
    try:
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        limits += [soft] if soft != resource.RLIM_INFINITY else []
    except ImportError:  # Windows
        pass
    return min(limits)


def _check(needed: int, device: torch.device, advice: str = ADVICE) -> None:
    there = memory_of(device)
    if needed > there:
        raise InputError(
            f"this training needs at least {size_of(needed)} of memory, "
            f"and there are {size_of(there)}: {advice}"
        )


def _width(device: torch.device) -> int:
    """Bytes of a number that a step computes with: bf16 on a GPU."""
    return 2 if device.type == "cuda" else 4


def _shared(c: Qwen3Config) -> int:
    """Weights that both views use."""
    tables = 1 if c.tie_word_embeddings else 2
    return (
        tables * c.vocab_size * c.hidden_size + 3 * c.num_hidden_layers * c.hidden_size * c.intermediate_size
    )


def _attention(c: Qwen3Config) -> int:
    """Weights of a view of its own."""
    heads = 2 * (c.num_attention_heads + c.num_key_value_heads)
    return c.num_hidden_layers * heads * c.head_dim * c.hidden_size
