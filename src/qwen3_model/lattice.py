"""The lattice of a text: the candidates of a draft block anchored at each of its positions. What any draft of
such blocks keeps can be followed on it, without decoding again (bench/trace.py, bench/oracle.py), and its
scores be fitted to what the target says (training/calibration.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from orthrus_kernels import Rows, Sampling, alike

from .decode.choice import CANDIDATES

if TYPE_CHECKING:
    from .kv_cache import KVCache
    from .model import Network

_ROWS = {"cuda": 4096}  # of a pass; elsewhere:
_CPU_ROWS = 512
_LOGITS = 1 << 28  # numbers of a pass's logits at most: 1 GiB


class Candidates(NamedTuple):
    """Of N blocks: log-probabilities [N, P, K] fp32, ids [N, P, K] int64 and, for a model with a selector,
    the gates of their states [N, P, R'] fp32 (bigram.py)."""

    scores: Tensor
    ids: Tensor
    gates: Tensor | None

    def under_roots(self, known: bool) -> Candidates:
        """Of `lattice_of` a text, those of drafts under all its tokens but the last one. known: the blocks
        stand at the roots; else one position before, and their first proposals are dropped."""
        there = (slice(1, None),) if known else (slice(-1), slice(1, None))
        scores, ids, gates = (None if x is None else x[there].contiguous() for x in self)  # for `rerank`
        assert scores is not None and ids is not None
        return Candidates(scores, ids, gates)


def lattice(
    model: Network, cache: KVCache, whole: Sequence[int], first: int, last: int, size: int, sampling: Sampling
) -> Candidates:
    """Candidates of a block of `size` rows anchored at each position from first to before last. The cache
    holds all of `whole`; only its length is changed."""
    found, width = list[tuple[Tensor, ...]](), min(CANDIDATES, model.config.vocab_size)
    most = min(_ROWS.get(model.device.type, _CPU_ROWS), _LOGITS // model.config.vocab_size)
    anchors = max(most // (size + 1), 1)
    for start in range(first, last, anchors):
        tokens = whole[start : min(start + anchors, last)]
        n, cache.lengths[0] = len(tokens), start
        rows = Rows.tree_with_blocks(
            tokens, range(-1, n - 1), start, range(n), size, model.config.mask_token_id or 0
        )
        wanted = [n + block * size + i for block in range(n) for i in range(size - 1)]
        out = model.forward(rows, cache, logits_of=wanted)
        positions = torch.tensor([rows.positions[row] + 1 for row in wanted], device=model.device)
        parts = model.ops.candidates(out.logits, positions, *alike(sampling, out.logits), width)
        gates = None if model.bigram is None else model.bigram.gates(model.ops, out.states)
        parts = parts if gates is None else (*parts, gates)
        found.append(tuple(part.view(n, size - 1, -1) for part in parts))
    scores, ids, *gate = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Candidates(scores, ids, gate[0] if gate else None)


@torch.inference_mode()
def lattice_of(
    model: Network, prompt: Sequence[int], text: Sequence[int], size: int, sampling: Sampling
) -> Candidates:
    """Of a text of two tokens or more behind a prompt: block 0 stands at the prompt's last token, block i at
    the text's token i - 1, the last one in front of the text's last token."""
    whole = [*prompt, *text]
    cache = model.new_cache(len(whole) + size)
    model.prefill(whole, cache)
    return lattice(model, cache, whole, len(prompt) - 1, len(whole) - 1, size, sampling)


def ranks(ids: Tensor, text: Tensor) -> Tensor:
    """Which candidate of each block the text goes on with: [N, P] int64, K for none of them, -1 behind its
    end.

    ids [N, P, K]; text [N] int64 and more: block i proposes tokens i, i + 1, ... of it."""
    n, depth, width = ids.shape
    ended = torch.cat([text, text.new_full((depth,), -1)])
    truth = ended.unfold(0, depth, 1)[:n]
    same = ids == truth[..., None]
    found = torch.where(same.any(-1), same.int().argmax(-1), width)
    return torch.where(truth < 0, -1, found)


def walked(kept: Sequence[int]) -> tuple[int, int]:
    """(tokens, cycles) of a text from its first root on; kept[i]: proposals that a cycle at root i keeps."""
    at = cycles = 0
    while at < len(kept):
        at += min(kept[at] + 1, len(kept) - at)
        cycles += 1
    return at, cycles
