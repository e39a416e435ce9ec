"""What a draft tree is ranked by, at a temperature of 0.5, against its written definition: bias, penalty and
correction change logits, and a score is one of logits over the temperature. A scale that is off by it would
leave every text as it is. A penalty of a draft sees the text and not the draft."""

from dataclasses import replace

import pytest
import torch
from interpreter import DEVICE
from lookup import lookup_model

from orthrus_kernels import Rows, Sampling
from orthrus_kernels.choice import gumbel
from orthrus_kernels.sampling_table import bias_row
from qwen3_model.bigram import Bigram
from qwen3_model.decode.choice import CANDIDATES, Choice

T, PROMPT = 0.5, [5, 6, 7]
# So that paths hold tokens twice.
BIASES = dict.fromkeys((9, 11, 13, 17, 19), 5.0)


def model_of(backend: str):
    return lookup_model(0.5, backend, vocab_size=40, mask_token_id=39)


def random_tables(vocabulary: int) -> Bigram:
    g = torch.Generator().manual_seed(1)
    return Bigram.of(*(torch.randn(vocabulary, 4, generator=g).to(DEVICE) for _ in "uw"))


def penalised(logits, penalty, seen):
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def shares(logits, position, seed):
    """(log of the share among the candidates [K], ids [K]) of biased and penalised logits [V] at T."""
    noise = gumbel(seed, torch.tensor([position]), len(logits))[0].double()
    scores, ids = (logits.double() / T + noise).sort(descending=True, stable=True)
    return scores[:CANDIDATES].log_softmax(-1), ids[:CANDIDATES].tolist()


def corrected(logs, ids, front, tables):
    """The same behind token `front`, as rerank.py writes it; shares leave nothing that is no candidate."""
    after, before = tables.after.cpu().double(), tables.before.cpu().double()
    change = (after[ids] @ before[front]) / T
    changed = logs + change
    rest = torch.tensor([1e-6], dtype=torch.float64).log()
    return (changed - torch.cat([changed, rest]).logsumexp(0)).clamp(max=0)


def block_logits(model, root, start, count):
    """Of a diffusion block's first `count` rows, with the biases."""
    cache = model.new_cache(64)
    cache.lengths = [start]
    rows = Rows.block(root, model.config.block_size, start, model.config.mask_token_id)
    logits = model.forward(rows, cache).logits[:count].cpu()
    return logits + bias_row(Sampling(logit_bias=BIASES), model.config.vocab_size)


def check_tree(tree, logits, told, seed, penalty, tables):
    """Every node: the sum of its steps along its path. Returns how many nodes hold a token of the text."""
    seen = torch.zeros(logits.shape[1], dtype=torch.bool)
    seen[told] = True
    steps = [shares(penalised(row, penalty, seen), len(told) + d, seed) for d, row in enumerate(logits)]
    for node in range(1, len(tree)):
        d, token, parent = tree.depths[node] - 1, tree.tokens[node], tree.parents[node]
        logs, ids = steps[d]
        logs = corrected(logs, ids, tree.tokens[parent], tables) if d > 0 else logs
        wanted = tree.scores[parent] + logs[ids.index(token)].item()
        assert tree.scores[node] == pytest.approx(wanted, abs=1e-4), (tree, node)
    return sum(token in told for token in tree.tokens[1:])


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_a_cycles_trees(penalty, backend):
    """Without what lookup finds, whose scores are not the drafter's (test_branch.py)."""
    model, runs = model_of(backend), []
    model.ops = replace(model.ops, branch=lambda *_: None)
    model.bigram = tables = random_tables(model.config.vocab_size)
    repeats = accepted = 0
    for seed in range(4 if backend == "reference" else 2):
        runs.clear()
        model.generate(
            PROMPT, max_new_tokens=12, strategy="two-pass", tree_nodes=20, temperature=T, seed=seed,
            logit_bias=BIASES, repetition_penalty=penalty, on_run=lambda run, kept: runs.append(run),
        )  # fmt: skip
        told = [*PROMPT, *runs[0].tokens]
        for run in runs[1:]:
            if run.nodes:
                logits = block_logits(model, told[-1], len(told) - 1, max(run.tree.depths))
                repeats += check_tree(run.tree, logits, told, seed, penalty, tables)
                accepted += len(run.path) - 1
            told += run.tokens
    assert accepted > 3 and repeats > 2, (accepted, repeats)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_cycles_chains(backend):
    """Each node is the likeliest one behind the node in front of it."""
    model, runs, checked = model_of(backend), [], 0
    model.bigram = tables = random_tables(model.config.vocab_size)
    model.generate(
        PROMPT, max_new_tokens=9, strategy="two-pass", tree_nodes=0, temperature=T, seed=2,
        logit_bias=BIASES, on_run=lambda run, kept: runs.append(run),
    )  # fmt: skip
    told = [*PROMPT, *runs[0].tokens]
    for run in runs[1:]:
        if run.nodes:
            logits, front = block_logits(model, told[-1], len(told) - 1, run.nodes), told[-1]
            assert run.tree.depths == [*range(run.nodes + 1)]
            for d, token in enumerate(run.tree.tokens[1:]):
                logs, ids = shares(logits[d], len(told) + d, 2)
                logs = corrected(logs, ids, front, tables) if d > 0 else logs
                assert token == ids[int(logs.argmax())], (run.tree, d)
                front = token
            check_tree(run.tree, logits, told, 2, 1.0, tables)
            checked += run.nodes
        told += run.tokens
    assert checked > 20


@pytest.mark.parametrize("known", [True, False])
def test_a_cycles_ranks(known):
    """By the numbers and the bias that lie on the device, whatever the host says of this form."""
    model, start, count = model_of("triton"), 5, 2
    v = model.config.vocab_size
    model.bigram = tables = random_tables(v)
    choice = Choice(model, 3)
    choice.put(1, Sampling(temperature=T, seed=3, logit_bias=BIASES), PROMPT, len(PROMPT))
    choice.put(2, Sampling(temperature=3.0, seed=9, logit_bias={2: 20.0}), PROMPT, len(PROMPT))
    choice.form = choice.form_of([1])
    choice.table.samplings[1] = Sampling(temperature=1.5, seed=8, logit_bias={1: 20.0})
    slots = torch.ones(count, dtype=torch.int32, device=DEVICE)
    g = torch.Generator().manual_seed(2)
    states = torch.randn(count, model.config.hidden_size, generator=g).to(DEVICE)
    root = torch.tensor([7], dtype=torch.int32, device=DEVICE)
    positions = torch.arange(start + 1, start + 1 + count, device=DEVICE)
    scores, ids, order = (x[0] for x in choice.ranked(states, positions, root, slots, known))
    logits = (model.ops.linear(states, model.head, out_dtype=torch.float32) + choice.table.bias[1]).cpu()
    fronts = [[7] * CANDIDATES, ids[0].tolist()]
    for p in range(count):
        logs, wanted = shares(logits[p], start + 1 + p, 3)
        assert ids[p].tolist() == wanted
        for a, front in enumerate(fronts[p]):
            changed = logs if known and p == 0 else corrected(logs, wanted, front, tables)
            got = torch.empty(CANDIDATES).scatter(0, order[p, a].cpu().long(), scores[p, a].cpu())
            assert got == pytest.approx(changed, abs=1e-4), (p, a)
