"""The draft tree: nodes of a diffusion block's proposals, best first by path probability.

A block gives a distribution at each position behind its anchor, and the positions know nothing of each other.
So a node at depth d is a choice of a candidate at each of d positions; its score is the sum of their
log-probabilities, the log of the probability that the target walks there if the drafter is right. Log-
probabilities are not above 0, so no child outranks its parent, and the best nodes are a prefix-closed tree:
the root with the nodes of highest score (best-first search over products, as in a k-best list).

Order: by score; at equal scores the node whose place was known first, a next sibling before a first child. A
chain is the tree of one candidate a position."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftTree:
    """A tree of N nodes, node 0 its root, parents before their children: what `Rows.tree` and `verify` take.

    scores: log-probability of the path from the root, by the drafter; 0 at the root."""

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    scores: list[float]

    def __len__(self) -> int:
        return len(self.tokens)

    def paths(self) -> list[list[int]]:
        """Tokens from below the root down to each node, its own last."""
        found: list[list[int]] = []
        for token, parent in zip(self.tokens, self.parents, strict=True):
            found.append([] if parent < 0 else [*found[parent], token])
        return found


def draft_tree(
    root: int, log_probabilities: Tensor, ids: Tensor, nodes: int, repeated: Tensor | None = None,
    order: Tensor | None = None,
) -> DraftTree:  # fmt: skip
    """Grow the best `nodes` nodes under `root`.

    log_probabilities [P, K] fp32, likeliest first, not above 0: of candidates ids [P, K] at the positions
    behind the root; with order: [P, K, K], [p, a] behind candidate a of the position before (any before the
    first), and order [P, K, K] says which candidate each is (rerank.py). Fewer nodes when there are fewer
    paths. Scores are summed in fp32 from the root down. repeated [P, K] fp32, not above 0: log-probabilities
    of tokens that are on the node's own path already, for a repetition penalty, not together with order.
    Raises ValueError for a negative number of nodes."""
    if nodes < 0:
        raise ValueError(f"a draft tree of {nodes} nodes: at least 0 were expected")
    names = ids.tolist()
    depth_limit, width = ids.shape
    if order is None:
        order = torch.arange(width).expand(depth_limit, width, width)
        log_probabilities = log_probabilities[:, None].expand(-1, width, -1)
    assert order is not None
    scores, which = log_probabilities.cpu(), order.tolist()
    scores = torch.where(scores.isnan(), float("-inf"), scores)  # damaged logits: impossible
    chosen = [0]  # which candidate each node is
    repeated = None if repeated is None else repeated.cpu()
    tree = DraftTree([root], [-1], [0], [0.0])
    paths = [frozenset[int]()]  # tokens of each node's path
    known = 0  # candidates seen so far, which decides between equal scores
    frontier: list[tuple[float, int, int, int]] = []  # (-score, when it was known, parent, rank)

    def offer(parent: int, rank: int) -> None:
        nonlocal known
        depth = tree.depths[parent]
        while rank < width and depth < depth_limit:
            repeats = repeated is not None and names[depth][rank] in paths[parent]
            step = scores[depth, chosen[parent], rank]
            if repeated is not None and repeats:
                step = repeated[depth, rank]
            # the tensor's addition rounds to fp32, as the kernel's does
            score = (scores.new_tensor(tree.scores[parent]) + step).item()
            heapq.heappush(frontier, (-score, known, parent, rank))
            known += 1
            if not repeats:
                break
            rank += 1  # it may be behind its next sibling, which must not wait for it

    offer(0, 0)
    while frontier and len(tree) <= nodes:
        score, _, parent, rank = heapq.heappop(frontier)
        if score == float("inf"):
            break  # what is left is impossible: banned or filtered out
        chosen.append(which[tree.depths[parent]][chosen[parent]][rank])
        tree.tokens.append(names[tree.depths[parent]][chosen[-1]])
        tree.parents.append(parent)
        tree.depths.append(tree.depths[parent] + 1)
        tree.scores.append(-score)
        paths.append(paths[parent] | {tree.tokens[-1]})
        if names[tree.depths[parent]][rank] not in paths[parent] or repeated is None:
            offer(parent, rank + 1)
        offer(len(tree) - 1, 0)
    return tree
