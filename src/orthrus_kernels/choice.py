"""The choice of a token from a row of logits: greedy, or sampled with noise that depends on (seed, position,
token id) alone.

Order: logit bias, repetition penalty (tokens of prompt and text), frequency penalty and presence penalty
(generated tokens alone), temperature, top-k, top-p on the renormalised rest, min-p; then the argmax of the
filtered logits plus Gumbel noise, which is an exact sample of their softmax (Gumbel-max). The noise is a
counter-based random number, so the choice at a position is the same for every decoding strategy: verification
at any temperature is a comparison of choices. Ties go to the lowest id everywhere. A temperature of 0 is
greedy: bias and penalties count, filters and noise do not."""

from __future__ import annotations

import torch
from torch import Tensor

from .sampling import Sampling
from .sampling_table import SamplingTable
from .seen import GENERATED
from .top_k import top_k

_MASK32 = 0xFFFFFFFF
# Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): round multipliers
# and key increments.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def choose(
    logits: Tensor, positions: Tensor, table: SamplingTable, slots: Tensor, seen: Tensor | None = None
) -> Tensor:
    """Choose a token id from every row by the settings of its slot; returns [T] int64.

    logits [T, V] fp32; positions [T] int64: the position that the chosen token will take, which keys the
    noise; slots [T] int32: whose settings in the table; -1: a padding row, which gets token 0 and is not
    read; seen [T, V] int32: what penalties see, as `seen_rows` returns it, for the rows that have one."""
    chosen = torch.zeros_like(positions)
    for sampling, rows in table.groups(slots):
        penalised = None if seen is None else seen[rows]
        chosen[rows] = candidate_scores(logits[rows], positions[rows], sampling, penalised).argmax(-1)
    return chosen


def candidate_scores(
    logits: Tensor, positions: Tensor, sampling: Sampling, seen: Tensor | None = None
) -> Tensor:
    """What a drafter ranks the tokens of rows of one setting by, [T, V]; `choose` takes the first. With noise
    the scores are perturbed: their softmax over a few candidates is the share of each in being chosen, and is
    below 1, which bare perturbed logits are not."""
    scores = filtered_scores(logits, sampling, seen)
    if sampling.temperature > 0:
        scores = scores + gumbel(sampling.seed, positions, scores.shape[1])
    return scores


def filtered_scores(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Scores [T, V] whose softmax a sampled choice is drawn from: bias, penalties, temperature and
    filters applied, -inf for what is filtered out. Greedily: bias and penalties alone."""
    scores = penalise(logits, sampling, seen)
    return filter_logits(scores / sampling.temperature, sampling) if sampling.temperature > 0 else scores


def candidates(
    logits: Tensor, positions: Tensor, table: SamplingTable, slots: Tensor, k: int, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What a draft tree is grown from: (log-probabilities [T, k] fp32, token ids [T, k] int64), likeliest
    first; arguments as for `choose`. With noise they are shares among these k. A padding row gets zeros.
    Raises ValueError when k is not in 1..V."""
    log_probabilities, ids = logits.new_zeros(len(logits), k), positions.new_zeros(len(logits), k)
    for sampling, rows in table.groups(slots):
        penalised = None if seen is None else seen[rows]
        scores = candidate_scores(logits[rows], positions[rows], sampling, penalised)
        best, ids[rows] = top_k(scores, k)
        if sampling.temperature > 0:
            log_probabilities[rows] = best.log_softmax(-1)
        else:  # as from the head, to the bit
            log_probabilities[rows] = scores.gather(1, ids[rows]) - log_sum_exp(scores)[:, None]
    return log_probabilities, ids


def penalise(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    """Add the logit bias. Divide positive and multiply negative logits of all tokens seen by the repetition
    penalty (arXiv 1909.05858). Of generated tokens subtract the frequency penalty times how often, then the
    presence penalty."""
    if sampling.logit_bias:
        logits = logits.clone()
        for token, bias in sampling.logit_bias.items():
            logits[:, token] += bias
    if sampling.penalises and seen is not None:
        penalty, generated = sampling.repetition_penalty, (seen // GENERATED).float()
        logits = torch.where(seen > 0, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        logits = logits - sampling.frequency_penalty * generated
        logits = logits - sampling.presence_penalty * (generated > 0)
    return logits


def filter_logits(scaled: Tensor, sampling: Sampling) -> Tensor:
    """Set tokens outside top-k, top-p and min-p to -inf. scaled [T, V]: logits over temperature.

    Rows go one at a time: a tile of one row is as constant as any, and a vocabulary is wide enough to fill
    it."""
    if not sampling.filters:
        return scaled
    return torch.stack([_filter_row(row, sampling) for row in scaled])


def _filter_row(row: Tensor, sampling: Sampling) -> Tensor:
    ordered, ids = torch.sort(
        row, descending=True, stable=True
    )  # stable: equal logits stay in the order of their ids
    if sampling.top_k:
        ordered, ids = ordered[: sampling.top_k], ids[: sampling.top_k]
    probabilities = torch.softmax(ordered, dim=-1)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_p < 1:
        before = (
            probabilities.cumsum(-1) - probabilities
        )  # the likeliest token has nothing before it and always stays
        kept &= before < sampling.top_p
    if sampling.min_p > 0:
        kept &= probabilities >= sampling.min_p * probabilities[0]
    kept[0] = True
    out = torch.full_like(row, float("-inf"))
    out[ids[kept]] = ordered[kept]
    return out


def gumbel(seed: int, positions: Tensor, vocabulary: int, stream: int = 0) -> Tensor:
    """Gumbel(0, 1) noise [T, vocabulary] fp32 of (seed, position, token id), another one in each stream.

    -log(-log1p(-u)) with u = (r + 1/2) 2^-32: large values, where the winner among many tokens lies, come
    from small u, which fp32 resolves finely; the plain -log(-log u) has steps of 1 % there. u is kept below
    1, or the smallest value would be -inf."""
    ids = torch.arange(vocabulary, device=positions.device)
    r = random_bits(seed, positions, ids, stream)
    u = ((r.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def random_bits(seed: int, positions: Tensor, ids: Tensor, stream: int = 0) -> Tensor:
    """32 random bits [T, V] (int64, 0 <= r < 2^32) for positions [T] and token ids [V].

    Philox 4x32-10 with the 64-bit seed as key and the counter (id // 4, position, stream, 0); id % 4 picks
    the word. stream: what the noise is for; 0 is the choice, rejection.py has others."""
    groups = torch.arange(int(ids.max()) // 4 + 1, device=ids.device)
    zeros = torch.zeros(len(positions), len(groups), dtype=torch.int64, device=ids.device)
    words = _philox(seed, (zeros + groups, zeros + positions[:, None], zeros + stream, zeros))
    return torch.stack(words, dim=-1).flatten(1)[:, ids]


def _philox(
    seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _MASK32, seed >> 32
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _KEY_STEPS[0]) & _MASK32, (key1 + _KEY_STEPS[1]) & _MASK32
    return c0, c1, c2, c3


def _multiply(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product: the int64 product wraps modulo 2^64, which leaves both
    intact.
    """
    product = x * constant
    return (product >> 32) & _MASK32, product & _MASK32


def likeliest(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of every row of logits [T, V] fp32, largest first, their token ids, and `log_sum_exp`:
    [T, k] fp32, [T, k] int64, [T] fp32. Raises ValueError when k is not in 1..V."""
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"likeliest: k is {k}, the vocabulary has {logits.shape[1]} tokens")
    values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k], log_sum_exp(logits)


def log_sum_exp(logits: Tensor) -> Tensor:
    """Of every row of logits [T, V] fp32; returns [T] fp32. A row at a time: a tile of constant height."""
    rows = [torch.logsumexp(row, dim=-1) for row in logits]
    return torch.stack(rows) if rows else logits.new_zeros(0)
