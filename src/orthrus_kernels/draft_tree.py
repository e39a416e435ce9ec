"""The draft tree: nodes of a diffusion block's proposals, best first by path probability.

A block gives a distribution at each position behind its anchor, and the positions know nothing of each other.
So a node at depth d is a choice of a candidate at each of d positions; its score is the sum of their
log-probabilities, the log of the probability that the target walks there if the drafter is right. Log-
probabilities are not above 0, so no child outranks its parent, and the best nodes are a prefix-closed tree:
the root with the nodes of highest score (best-first search over products, as in a k-best list).

Order: by score; at equal scores the node whose place was known first, a next sibling before a first child. A
chain is the tree whose nodes have one child each, the likeliest."""

from __future__ import annotations

import heapq
import itertools
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
    root: int, log_probabilities: Tensor, ids: Tensor, nodes: int, order: Tensor | None = None,
    children: int | None = None,
) -> DraftTree:  # fmt: skip
    """Grow the best `nodes` nodes under `root`.

    log_probabilities [P, K] fp32, likeliest first, not above 0: of candidates ids [P, K] at the positions
    behind the root; with order: [P, K, K], [p, a] behind candidate a of the position before (any before the
    first), and order [P, K, K] says which candidate each is (rerank.py). children: of a node at most, the
    likeliest; None: K. Fewer nodes when there are fewer paths. Scores are summed in fp32 from the root down.
    Raises ValueError for a negative number of nodes."""
    if nodes < 0:
        raise ValueError(f"a draft tree of {nodes} nodes: at least 0 were expected")
    names = ids.tolist()
    depth_limit, width = ids.shape
    most = width if children is None else min(children, width)
    if order is None:
        order = torch.arange(width).expand(depth_limit, width, width)
        log_probabilities = log_probabilities[:, None].expand(-1, width, -1)
    scores, which = log_probabilities.cpu(), order.tolist()
    scores = torch.where(scores.isnan(), float("-inf"), scores)  # damaged logits: impossible
    chosen = [0]  # which candidate each node is
    tree = DraftTree([root], [-1], [0], [0.0])
    frontier: list[tuple[float, int, int, int]] = []  # (-score, when it was known, parent, rank)
    known = itertools.count()  # which decides between equal scores

    def offer(parent: int, rank: int) -> None:
        depth = tree.depths[parent]
        if rank < most and depth < depth_limit:
            # the tensor's addition rounds to fp32, as the kernel's does
            score = scores.new_tensor(tree.scores[parent]) + scores[depth, chosen[parent], rank]
            heapq.heappush(frontier, (-score.item(), next(known), parent, rank))

    offer(0, 0)
    while frontier and len(tree) <= nodes:
        score, _, parent, rank = heapq.heappop(frontier)
        if score == float("inf"):
            break  # what is left is impossible: banned or filtered out
        depth = tree.depths[parent]
        chosen.append(which[depth][chosen[parent]][rank])
        tree.tokens.append(names[depth][chosen[-1]])
        tree.parents.append(parent)
        tree.depths.append(depth + 1)
        tree.scores.append(-score)
        offer(parent, rank + 1)
        offer(len(tree) - 1, 0)
    return tree
