"""The promise, checked on a whole model: a token's logits are the bits of one-row decoding, wherever its row
is.

A trunk of random tokens is decoded one row a pass behind a random context. Then come random passes: a tree
that holds a stretch of the trunk as one of its paths, at any row indices, beside other branches, diffusion
blocks and rows of another sequence, on any split of the trunk into committed and in-flight tokens. The
trunk's rows must have the trunk's logits, keys and values."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial

import torch
from replayed import Replayed

from orthrus_kernels import Rows
from qwen3_model import Qwen3
from qwen3_model.kv_cache import KVCache


@dataclass
class Counts:
    """What was compared, and what differed."""

    passes: int = 0
    rows: int = 0
    different: int = 0
    first: str = ""

    def add(self, what: str, same: bool) -> None:
        """Count a row."""
        self.rows += 1
        if not same:
            self.different += 1
            self.first = self.first or what


def random_tokens(model: Qwen3, count: int, rng: random.Random) -> list[int]:
    """Token ids, none of them the mask."""
    return [rng.randrange(4, min(model.config.vocab_size, 96)) for _ in range(count)]


def filled_cache(model: Qwen3, context: int, room: int, sequences: int, rng: random.Random) -> KVCache:
    """A cache with `context` random tokens of every sequence, NaN in every place that nobody wrote, and pages
    in any order."""
    cache = model.new_cache(context + room, sequences)
    owned = cache.pages.flatten().tolist()
    cache.pages.copy_(torch.tensor(rng.sample(owned, len(owned))).view(sequences, -1))
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    for sequence in range(sequences):
        model.prefill(random_tokens(model, context, rng), cache, sequence, chunk=rng.choice([100, 512]))
    return cache


def decode_trunk(forward, cache: KVCache, trunk: list[int], context: int):
    """One row a pass: logits [n, V], keys and values [L, n, G, D] of every token of the trunk."""
    logits, keys, values = [], [], []
    for i, token in enumerate(trunk):
        out = forward(Rows.chain([token], context + i))
        cache.commit(out.keys, out.values, [0])
        logits.append(out.logits.clone())  # a replay's output is valid until the next one
        keys.append(out.keys.clone())
        values.append(out.values.clone())
    return torch.cat(logits), torch.cat(keys, 1), torch.cat(values, 1)


def random_pass(
    model: Qwen3, trunk: list[int], first: int, start: int, most: int, rng: random.Random
) -> tuple[Rows, list[int]]:
    """A pass that holds trunk[first:first + n] as a path from its root, and the rows of that path."""
    length = rng.randint(1, min(len(trunk) - first, 8))
    nodes = max(length, rng.randint(1, most))
    tokens, parents, path = [trunk[first]], [-1], [0]
    while len(tokens) < nodes:
        still = length - len(path)
        if still and rng.random() < max(0.3, still / (nodes - len(tokens))):
            parents.append(path[-1])
            tokens.append(trunk[first + len(path)])
            path.append(len(tokens) - 1)
        else:
            chain = rng.random() < 0.5  # long chains and bushes
            parents.append(len(tokens) - 1 if chain else rng.randrange(len(tokens)))
            tokens += random_tokens(model, 1, rng)
    anchors = rng.sample(range(nodes), min(rng.choice([0, 0, 1, 3, 24]), nodes))
    size = rng.randint(2, 6) if model.config.has_diffusion_view else 0
    rows = Rows.tree_with_blocks(
        tokens, parents, start, anchors if size else [], size, model.config.mask_token_id
    )
    return rows, path


def check_model(
    model: Qwen3,
    contexts: list[int],
    passes: int,
    trunk_length: int = 24,
    most: int = 64,
    seed: int = 0,
    graphs: bool = False,
) -> Counts:
    """`passes` random passes on each context. graphs: the trunk's passes, all of one shape, and what passes
    repeat a shape are replayed."""
    rng, found = random.Random(seed), Counts()
    for context in contexts:
        cache = filled_cache(model, context, trunk_length + 2, 2, rng)
        forward = Replayed(model, cache).forward if graphs else partial(model.forward, cache=cache)
        trunk = random_tokens(model, trunk_length, rng)
        logits, keys, values = decode_trunk(forward, cache, trunk, context)
        for _ in range(passes):
            first = rng.randrange(trunk_length)
            cache.lengths[0] = context + first
            rows, path = random_pass(model, trunk, first, context + first, most, rng)
            if rng.random() < 0.3:
                other = Rows.chain(random_tokens(model, rng.randint(1, 9), rng), context, sequence=1)
                both = Rows.batch([rows, other] if rng.random() < 0.5 else [other, rows])
                tree_first = both.sequences[0] == 0
                path = path if tree_first else [len(other) + i for i in path]
                rows = both
            out = forward(rows, logits_of=path)
            found.passes += 1
            for i, row in enumerate(path):
                at = first + i
                same = (
                    torch.equal(out.logits[i], logits[at])
                    and torch.equal(out.keys[:, row], keys[:, at])
                    and torch.equal(out.values[:, row], values[:, at])
                )
                found.add(f"context {context}, row {row} of {len(rows)}, {first} committed", same)
    return found


def check_prefill(model: Qwen3, context: int, chunks: list[int], seed: int = 0) -> Counts:
    """The last logits and the cache of a prompt in chunks against the prompt in one pass."""
    rng, found = random.Random(seed), Counts()
    ids = random_tokens(model, context, rng)
    whole = model.new_cache(context)
    logits = model.prefill(ids, whole, chunk=context)
    for chunk in chunks:
        cache = model.new_cache(context)
        same = torch.equal(model.prefill(ids, cache, chunk=chunk), logits)
        same = same and all(map(torch.equal, cache.read(0, context), whole.read(0, context)))
        found.passes += -(-context // chunk)
        found.add(f"prompt of {context} in chunks of {chunk}", same)
    return found
