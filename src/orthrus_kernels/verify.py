"""Verification: walk the draft from its root along the target's own choices.

The walk steps into the child that carries the target's choice and stops where there is none; that last choice
is the bonus token. Because proposals never enter the choice, the text is the target's whatever was proposed.
"""

from __future__ import annotations

from collections.abc import Sequence


def verify(tokens: Sequence[int], parents: Sequence[int], choices: Sequence[int]) -> tuple[list[int], int]:
    """Returns the accepted path (row indices, the root first) and the bonus token.

    tokens, parents: the draft tree, node 0 its root; choices[i]: the target's token after node i. Of siblings
    that carry the same token the first is taken. The acceptance length is len(path) - 1, the tokens of a
    cycle len(path)."""
    path = [0]
    for node in range(1, len(tokens)):  # children come after their parents, so one sweep walks the tree
        if parents[node] == path[-1] and tokens[node] == choices[path[-1]]:
            path.append(node)
    return path, choices[path[-1]]
