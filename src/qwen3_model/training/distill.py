"""Distillation of the diffusion view from a frozen Qwen3 (arXiv 2605.12825, section 3.2).

Blocks stand at random anchors of a text. A block sees the frozen AR keys strictly before its anchor and
itself; the row at offset j proposes the token at anchor + j + 1. The loss (objective.py, by default the
forward KL(p_AR || p_diffusion)) counts at every proposed position, and only the `_diff` weights, started from
their AR twins, learn."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoint
from ..config import BLOCK_SIZES, Qwen3Config
from ..errors import InputError, quoted
from .folder import load_network
from .loop import Plan, Rows, train
from .network import Network, diffusion_blocks
from .objective import OBJECTIVE, Objective, compared
from .pretrain import autocast, compiled
from .state import MOST_STEPS, SHA_OF_BASE, SHA_OF_TEXT, sha256_of
from .survival import Survival

SHAPE = "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"
SHOWN_OFFSETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 31)


@dataclass(frozen=True)
class Blocks:
    """Blocks of a training row."""

    count: int = 32
    size: int = 32
    offset_decay: float = 1.0  # the loss at offset j weighs decay^(j - 1); 1 is the paper's
    short: int = 0  # rows of the blocks of every other step, as one-pass cycles have them; 0: no such steps

    def sized(self, step: int) -> Blocks:
        """The blocks of a step: `size` rows, or as many rows in short ones."""
        if not self.short or step % 2 == 0:
            return self
        return dataclasses.replace(self, count=self.count * self.size // self.short, size=self.short)

    def check(self, length: int) -> None:
        """Raises InputError for blocks that a row of `length` tokens cannot hold."""
        if not 1 <= self.count <= MOST_STEPS:
            raise InputError(f"blocks is {quoted(self.count)}; 1 to {MOST_STEPS} a row was expected")
        if self.size not in BLOCK_SIZES:
            raise InputError(f"block size is {self.size}; {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]} was expected")
        if self.short and not 2 <= self.short <= self.size:
            raise InputError(f"short blocks are of {self.short} rows; 2 to {self.size} was expected")
        if length <= self.size:
            raise InputError(
                f"rows of {length} tokens hold no block of {self.size}: use a longer --length or a smaller "
                "--block-size"
            )
        if not 0 < self.offset_decay <= 1:
            raise InputError(f"offset decay is {self.offset_decay}; above 0, at most 1 was expected")


def start_from_ar(network: Network) -> None:
    """Copy every AR attention weight to its diffusion twin."""
    named = dict(network.named_parameters())
    with torch.no_grad():
        for name, weight in named.items():
            if "_diff" in name:
                weight.copy_(named[name.replace("_diff", "")])


def start_from(network: Network, folder: Path) -> None:
    """Take the diffusion weights of an Orthrus folder that `check_start` has passed."""
    weights = {name: w for name, w in network.state_dict().items() if "_diff" in name}
    config = Qwen3Config.from_folder(folder, checkpoint.tensor_names(folder))
    other = load_network(folder, config).state_dict()
    for name, weight in weights.items():
        weight.copy_(other[name])


def check_start(folder: Path, base: Qwen3Config) -> None:
    """Raises InputError when a folder holds no diffusion weights, or ones that do not fit the base."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: name an Orthrus folder to start from")
    names = checkpoint.tensor_names(folder)
    config = Qwen3Config.from_folder(folder, names)
    if not config.has_diffusion_view or not any("_diff" in name for name in names):
        raise InputError(f"{folder} has no diffusion weights to start from: name an Orthrus folder")
    for field in SHAPE:
        has, wanted = getattr(config, field), getattr(base, field)
        if has != wanted:
            raise InputError(f"{folder} has {field} {has}, the base {wanted}: start from an Orthrus like it")


@dataclass(frozen=True)
class Taught:
    """One step's proposals of N blocks in B rows, with what they should have been."""

    teacher: Tensor  # [B N (K - 1), E] states before the final norm
    student: Tensor  # likewise
    before: Tensor  # [B N (K - 1)] int64: the text's token in front of each proposed position


class Lessons:
    """The blocks of every step: a function of (seed, step) alone."""

    def __init__(self, network: Network, tokens: Tensor, plan: Plan, blocks: Blocks) -> None:
        self.network, self.plan, self.blocks = network, plan, blocks
        self.rows = Rows(tokens, plan.length, plan.seed)
        self._ar, self._diffusion = compiled(network.ar), compiled(network.diffusion)

    def weighted(self, loss: Tensor, step: int, weights: Tensor | None = None) -> Tensor:
        """The loss [n (K - 1)] of a step's proposals as [n, K - 1], weighed by offset: by `weights` of the
        longest blocks' offsets, or by the blocks' decay."""
        offsets = torch.arange(self.blocks.sized(step).size - 1, device=loss.device)
        weight = self.blocks.offset_decay ** offsets.float() if weights is None else weights[: len(offsets)]
        return loss.unflatten(0, (-1, len(offsets))) * (weight / weight.mean())

    def step(self, step: int) -> Taught:
        """Both views over the blocks of a step."""
        plan, blocks, config = self.plan, self.blocks.sized(step), self.network.config
        offsets = torch.arange(blocks.size - 1, device=self.rows.tokens.device)
        ids = self.rows.batch(step, plan.batch)[:, :-1]
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
        # without replacement; the last rows of a block must have a teacher
        anchors = torch.stack(
            [torch.randperm(plan.length - blocks.size, generator=generator)[: blocks.count] for _ in ids]
        ).to(ids.device)
        block_ids, positions, mask = diffusion_blocks(ids, anchors, blocks.size, config.mask_token_id)
        with torch.no_grad():
            teacher, context = self._ar(ids)
        # Where no weight of the view learns (bigram.py), a graph of its own: one that was compiled with
        # gradients and runs without any gives none from then on (torch 2.11).
        with torch.set_grad_enabled(any(w.requires_grad for w in self.network.parameters())):
            student = self._diffusion(block_ids, positions, context, mask).unflatten(1, (-1, blocks.size))
        taught = (anchors[..., None] + offsets).flatten(1)
        teacher = teacher.gather(1, taught[..., None].expand(-1, -1, config.hidden_size))
        return Taught(
            teacher.flatten(0, 1), student[:, :, :-1].flatten(0, 2), ids.gather(1, taught).flatten()
        )


def distill(
    network: Network,
    tokens: Tensor,
    plan: Plan,
    blocks: Blocks,
    state: Path | None = None,
    resume: bool = False,
    started: str | None = None,
    objective: Objective = OBJECTIVE,
    prompts: Tensor | None = None,
    kept: dict[str, list[float]] | None = None,
) -> tuple[int, float]:
    """Train the `_diff` weights of a network whose AR weights are loaded. Returns steps and seconds.

    started: what the weights were taken from; a run is resumed from the same only. prompts [B, P]: held-out
    ones on the network's device, for weights by survival; what was measured comes into `kept`. Raises
    InputError."""
    network.requires_grad_(False)
    weights = {name: w for name, w in network.named_parameters() if "_diff" in name}
    for weight in weights.values():
        weight.requires_grad_()
    lessons, kept = Lessons(network, tokens, plan, blocks), {} if kept is None else kept
    survival = Survival(network, prompts, kept) if objective.offset_weights == "survival" else None

    def loss_of(step: int):
        by_offset = survival.weights(step) if survival else None
        with autocast(tokens.device):
            taught = lessons.step(step)
            loss, agrees = compared(network, taught.teacher, taught.student, objective.loss)
        shares = agrees.unflatten(0, (-1, blocks.sized(step).size - 1))
        return lessons.weighted(loss, step, by_offset).mean(), lambda: agreement_words(shares)

    mask = network.config.mask_token_id
    about = {"tokens": len(tokens), "mask_token_id": mask, **dataclasses.asdict(blocks)}
    about |= {"start": started, SHA_OF_TEXT: sha256_of([tokens]), **dataclasses.asdict(objective)}
    if state is not None:  # seconds for a large base
        fixed = (w for name, w in network.named_parameters() if "_diff" not in name)
        about[SHA_OF_BASE] = sha256_of(fixed)
    return train("distill", weights, loss_of, plan, about, state, resume, kept)


def agreement_words(agrees: Tensor) -> str:
    """Agreement at the shown offsets, from agrees [n, K - 1]."""
    by_offset = agrees.float().mean(0)
    shown = [f"{by_offset[o - 1].item():.2f}" for o in SHOWN_OFFSETS if o <= len(by_offset)]
    return "agreement " + " ".join(shown)
