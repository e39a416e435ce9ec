"""What a draft tree is ranked by, at a temperature of 0.5, against its written definition: bias, penalty and
correction change logits, and a score is one of logits over the temperature. A scale that is off by it would
leave every text as it is, as would a selector's gate of another position or form. A penalty of a draft sees
the text and not the draft."""

from dataclasses import replace

import pytest
import torch
from interpreter import DEVICE
from lookup import lookup_model

from orthrus_kernels import Rows, Sampling
from orthrus_kernels.choice import gumbel
from orthrus_kernels.sampling_table import bias_row
from qwen3_model import selector
from qwen3_model.bigram import Bigram
from qwen3_model.decode.choice import CANDIDATES, Choice

T, PROMPT = 0.5, [5, 6, 7]
# So that paths hold tokens twice.
BIASES = dict.fromkeys((9, 11, 13, 17, 19), 5.0)


def model_of(backend: str):
    return lookup_model(0.5, backend, vocab_size=40, mask_token_id=39)


class Tables:
    """A model's correction: drawn, and by its written definition. D: offsets of a block."""

    def __init__(self, model, selected: bool) -> None:
        g = torch.Generator().manual_seed(1)
        v, e, d = model.config.vocab_size, model.config.hidden_size, model.config.block_size - 1
        self.u, self.w = (torch.randn(v, 4, generator=g) for _ in "uw")
        self.calibration = torch.tensor([1.0, 0.0]).repeat(2, 2, d, 1)  # of forms, at both temperatures
        drawn, self.selector = Bigram.of(self.u.to(DEVICE), self.w.to(DEVICE)), {}
        if selected:
            names = ("front", "behind", "gate")
            self.selector = {name: torch.randn(e, 3, generator=g) * e**-0.5 for name in names}
            self.selector["places"] = torch.randn(2, d, 3, generator=g)
            self.calibration[:, 1] += torch.rand(2, d, 2, generator=g)  # not as of temperature 0
            self.selector["calibration"] = self.calibration
            self.embedding = model.embedding.cpu().double()
            drawn = selector.joined(drawn, self.selector, model.embedding)
        model.bigram = drawn

    def scores(self, logs, ids, front, state, offset, known) -> torch.Tensor:
        """Of candidates with shares exp(logs) [K] behind token `front`, whose position has a state [E], at
        the offset of a block; shares leave nothing that is no candidate. Offset 0 has seen its root."""
        form, change = int(not known), self.w[ids].double() @ self.u[front].double()
        if self.selector:
            a, b, gate, places = (self.selector[n].double() for n in ("front", "behind", "gate", "places"))
            weighed = (self.embedding[front] @ a) * (1 + state.double() @ gate + places[form, offset])
            change = change + (self.embedding[ids] @ b) @ weighed
        factor, weight = self.calibration[form, 1, offset].double()
        rest = factor * torch.tensor([1e-6], dtype=torch.float64).log() + weight
        changed = factor * logs + (change / T if offset else 0)
        return (changed - torch.cat([changed, rest]).logsumexp(0)).clamp(max=0)


def penalised(logits, penalty, seen):
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def shares(logits, position, seed):
    """(log of the share among the candidates [K], ids [K]) of biased and penalised logits [V] at T."""
    noise = gumbel(seed, torch.tensor([position]), len(logits))[0].double()
    scores, ids = (logits.double() / T + noise).sort(descending=True, stable=True)
    return scores[:CANDIDATES].log_softmax(-1), ids[:CANDIDATES].tolist()


def block_of(model, root, start, count):
    """Of a diffusion block's first `count` rows: logits with the biases, and states."""
    cache = model.new_cache(64)
    cache.lengths = [start]
    rows = Rows.block(root, model.config.block_size, start, model.config.mask_token_id)
    out = model.forward(rows, cache)
    bias = bias_row(Sampling(logit_bias=BIASES), model.config.vocab_size)
    return out.logits[:count].cpu() + bias, out.states[:count].cpu()


def check_tree(tree, block, told, seed, penalty, tables, known=True):
    """Every node: the sum of its steps along its path. Returns how many nodes hold a token of the text.
    block: logits and states of the positions behind the root."""
    logits, states = block
    seen = torch.zeros(logits.shape[1], dtype=torch.bool)
    seen[told] = True
    steps = [shares(penalised(row, penalty, seen), len(told) + d, seed) for d, row in enumerate(logits)]
    for node in range(1, len(tree)):
        d, token, parent = tree.depths[node] - 1, tree.tokens[node], tree.parents[node]
        logs, ids = steps[d]
        logs = tables.scores(logs, ids, tree.tokens[parent], states[d], d + (not known), known)
        wanted = tree.scores[parent] + logs[ids.index(token)].item()
        assert tree.scores[node] == pytest.approx(wanted, abs=1e-4), (tree, node)
    return sum(token in told for token in tree.tokens[1:])


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("penalty, selected", [(1.0, False), (1.7, False), (1.0, True)])
def test_a_cycles_trees(penalty, selected, backend):
    """Without what lookup finds, whose scores are not the drafter's (test_branch.py)."""
    model, runs = model_of(backend), []
    model.ops = replace(model.ops, branch=lambda *_: None)
    tables = Tables(model, selected)
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
                block = block_of(model, told[-1], len(told) - 1, max(run.tree.depths))
                repeats += check_tree(run.tree, block, told, seed, penalty, tables)
                accepted += len(run.path) - 1
            told += run.tokens
    assert accepted > 3 and repeats > 2, (accepted, repeats)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_one_pass_trees_of_a_selector(backend):
    """Ranked behind the bonus token by the states of a block that stood one position before it."""
    model, runs, checked, seed = model_of(backend), [], 0, 1
    tables = Tables(model, True)
    model.generate(
        PROMPT, max_new_tokens=10, strategy="one-pass", tree_nodes=6, temperature=T, seed=seed,
        logit_bias=BIASES, on_run=lambda run, kept: runs.append(run),
    )  # fmt: skip
    told = [*PROMPT, *runs[0].tokens]
    for run in runs[1:]:
        if run.nodes:
            block = block_of(model, told[-2], len(told) - 2, model.config.block_size)
            check_tree(run.tree, tuple(x[1:] for x in block), told, seed, 1.0, tables, known=False)
            checked += run.nodes
        told += run.tokens
    assert checked > 10


@pytest.mark.parametrize("backend, selected", [("reference", False), ("triton", False), ("triton", True)])
def test_a_cycles_chains(backend, selected):
    """Each node is the likeliest one behind the node in front of it."""
    model, runs, checked = model_of(backend), [], 0
    tables = Tables(model, selected)
    model.generate(
        PROMPT, max_new_tokens=9, strategy="two-pass", tree_nodes=0, temperature=T, seed=2,
        logit_bias=BIASES, on_run=lambda run, kept: runs.append(run),
    )  # fmt: skip
    told = [*PROMPT, *runs[0].tokens]
    for run in runs[1:]:
        if run.nodes:
            block, front = block_of(model, told[-1], len(told) - 1, run.nodes), told[-1]
            assert run.tree.depths == [*range(run.nodes + 1)]
            for d, token in enumerate(run.tree.tokens[1:]):
                logs, ids = shares(block[0][d], len(told) + d, 2)
                logs = tables.scores(logs, ids, front, block[1][d], d, True)
                assert token == ids[int(logs.argmax())], (run.tree, d)
                front = token
            check_tree(run.tree, block, told, 2, 1.0, tables)
            checked += run.nodes
        told += run.tokens
    assert checked > 20


@pytest.mark.parametrize("known", [True, False])
def test_a_cycles_ranks(known):
    """By the numbers and the bias that lie on the device, whatever the host says of this form."""
    model, start, count = model_of("triton"), 5, 2
    tables = Tables(model, True)
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
    scores, ids, order = (x[0] for x in choice.ranked(states, positions[None], root, slots[None], known))
    logits = (model.ops.linear(states, model.head, out_dtype=torch.float32) + choice.table.bias[1]).cpu()
    fronts = [[7] * CANDIDATES, ids[0].tolist()]
    for p in range(count):
        logs, wanted = shares(logits[p], start + 1 + p, 3)
        assert ids[p].tolist() == wanted
        for a, front in enumerate(fronts[p]):
            changed = tables.scores(logs, wanted, front, states[p].cpu(), p + (not known), known)
            got = torch.empty(CANDIDATES).scatter(0, order[p, a].cpu().long(), scores[p, a].cpu())
            assert got == pytest.approx(changed, abs=1e-4), (p, a)
