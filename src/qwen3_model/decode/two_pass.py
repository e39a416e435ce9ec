"""The published cycle (arXiv 2605.12825, section 3.3) with a chain: a diffusion pass proposes, an AR pass
verifies.

Proposals are chosen from the diffusion view's logits by the same settings and the same noise as the target's
choices, which makes the two agree as often as they can; the text is the target's whatever they are."""

from __future__ import annotations

from orthrus_kernels import Rows, verify

from . import autoregressive
from .state import Decoding, Run


def cycle(decoding: Decoding) -> Run:
    """Draft a block after the root, verify it, commit what the target agrees with and the bonus token."""
    count = min(decoding.block_size, decoding.remaining) - 1
    if count < 1:  # room for the bonus token only: nothing to propose
        return autoregressive.cycle(decoding)
    return verify_chain(decoding, draft_chain(decoding, count))


def draft_chain(decoding: Decoding, count: int) -> list[int]:
    """Propose `count` tokens after the root, one from each row of a diffusion block."""
    config = decoding.model.config
    block = Rows.block(decoding.root, decoding.block_size, decoding.start, config.mask_token_id)
    logits = decoding.model.forward(block, decoding.cache, logits_of=range(count)).logits
    if decoding.sampling.repetition_penalty == 1.0:
        return decoding.choose(logits, [[0] * i for i in range(count)])
    proposals: list[int] = []  # the penalty makes each proposal depend on those before it
    for row in logits:
        proposals += decoding.choose(row[None], [proposals])
    return proposals


def verify_chain(decoding: Decoding, proposals: list[int]) -> Run:
    """Run root and proposals through the AR view, commit the accepted ones and choose the bonus token."""
    chain = Rows.chain([decoding.root, *proposals], decoding.start)
    out = decoding.model.forward(chain, decoding.cache)
    choices = decoding.choose(out.logits, [proposals[:i] for i in range(len(chain))])
    path, bonus = verify(chain.tokens, chain.parents, choices)
    decoding.cache.commit(out.keys, out.values, path)
    return decoding.extend([chain.tokens[i] for i in path[1:]] + [bonus], out.logits[path], forwards=2)
