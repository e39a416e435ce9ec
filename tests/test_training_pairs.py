"""What training pairs with what, by hand, on a network whose states are looked up: which position teaches
which row, the token in front of it, the rows that count and how much. A pair that is off by one still lowers
a loss."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qwen3_model.training import bigram, distill, pretrain, survival, unlikelihood
from qwen3_model.training.distill import Blocks, Lessons
from qwen3_model.training.loop import Plan, Rows
from qwen3_model.training.objective import Objective
from qwen3_model.training.unlikelihood import Continuations

V, MASK, LENGTH, K = 12, 11, 24, 4
PLAN = Plan(steps=3, batch=2, length=LENGTH, lr=1e-3, seed=7)
BLOCKS = Blocks(count=5, size=K, offset_decay=0.5)


class Looked(nn.Module):
    """States are logits: of a token and its position in the AR view, of a position alone in the diffusion
    view. The likeliest token behind t is t + 1 of a cycle of 5."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.of_token, self.of_place, self.of_block = (torch.randn(64, V, generator=g) for _ in range(3))
        for t in range(V):
            self.of_token[t, (t + 1) % 5] += 12
        self.weight_diff = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vocab_size=V, hidden_size=V, mask_token_id=MASK, eos_token_ids=(9,))
        self.anchors: list[list[int]] = []  # of the last step, by row

    def ar(self, ids, past=None):
        first = past or 0
        places = torch.arange(first, first + ids.shape[1])
        return self.of_token[ids] + self.of_place[places], first + ids.shape[1]

    def diffusion(self, ids, positions, context, mask):
        self.anchors = positions[:, ::K].tolist()
        assert (ids.view(len(ids), -1, K)[:, :, 1:] == MASK).all() and context == LENGTH
        return self.of_block[positions] + self.weight_diff

    def head(self, states):
        return states


def text(count: int = 400) -> torch.Tensor:
    return torch.randint(0, 9, (count,), generator=torch.Generator().manual_seed(1))


def rows_of(step: int) -> list[list[int]]:
    return Rows(text(), LENGTH, PLAN.seed).batch(step, PLAN.batch)[:, :-1].tolist()


def pairs(network: Looked, step: int) -> list[list[tuple]]:
    """(teacher, student, token in front) of each block's rows, by their meaning: the row at offset j proposes
    the token at anchor + j + 1, as the AR view does behind anchor + j."""
    found = []
    for row, anchors in zip(rows_of(step), network.anchors, strict=True):
        for anchor in anchors:
            at = range(anchor, anchor + K - 1)
            found.append([
                (network.of_token[row[p]] + network.of_place[p], network.of_block[p], row[p]) for p in at
            ])  # fmt: skip
    return found


def divergence(teacher, student) -> float:
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def test_a_row_is_taught_by_the_position_it_proposes_from():
    network, seen = Looked(), []
    lessons = Lessons(network, text(), PLAN, BLOCKS)
    for step in (0, 1, 2):
        taught = lessons.step(step)
        flat = [pair for block in pairs(network, step) for pair in block]
        teacher, student, before = (list(column) for column in zip(*flat, strict=True))
        assert torch.equal(taught.teacher, torch.stack(teacher))
        assert torch.equal(taught.student, torch.stack(student)) and taught.before.tolist() == before
        seen.append(network.anchors)
        for anchors in network.anchors:
            assert len(set(anchors)) == BLOCKS.count and min(anchors) >= 0
            assert max(anchors) + K - 1 < LENGTH, "the last row has a teacher"
    assert seen[0] != seen[1] != seen[2] and seen[0][0] != seen[0][1], "another set each row and step"
    lessons.step(0)
    assert network.anchors == seen[0], "a function of the step alone"


def losses_of(monkeypatch, module, run):
    """(loss of a step, trained weights) of what would be trained."""
    caught = []

    def train(name, weights, loss_of, *_):
        caught.append((weights, loss_of))
        return 0, 0.0

    monkeypatch.setattr(module, "train", train)
    run()
    ((weights, loss_of),) = caught
    return lambda step: loss_of(step)[0].item(), weights


WEIGHTS = [0.5**j / ((1 + 0.5 + 0.25) / 3) for j in range(K - 1)]  # by offset, of mean 1


def test_the_loss_of_distillation(monkeypatch):
    network = Looked()
    loss, weights = losses_of(monkeypatch, distill, lambda: distill.distill(network, text(), PLAN, BLOCKS))
    assert list(weights) == ["weight_diff"]
    for step in (0, 1):
        got = loss(step)
        want = [WEIGHTS[j] * divergence(t, s) for block in pairs(network, step)
                for j, (t, s, _) in enumerate(block)]  # fmt: skip
        assert got == pytest.approx(sum(want) / len(want), rel=1e-5)


def test_the_loss_by_survival_of_the_likeliest_token(monkeypatch):
    """Measured at steps 0 and 2 here, and kept between them."""
    measured = iter([[0.9, 0.5, 0.25], [0.2, 0.5, 0.5], [0.0, 0.0, 0.0]])
    monkeypatch.setattr(survival, "greedy_texts", lambda *_: SimpleNamespace(text=torch.zeros(1)))
    monkeypatch.setattr(survival, "agreements", lambda *_: (next(measured),))
    monkeypatch.setattr(survival, "chances_of", lambda chances: chances)
    monkeypatch.setattr(survival, "EVERY", 2)
    network, kept, plan = Looked(), {}, Objective("ce", "survival")
    network.config.block_size, network.config.context_length = K, 64
    prompts = torch.zeros(1, 8, dtype=torch.long)
    loss, _ = losses_of(
        monkeypatch,
        distill,
        lambda: distill.distill(network, text(), PLAN, BLOCKS, objective=plan, prompts=prompts, kept=kept),
    )
    # by hand: dE/da_j = S_(j-1) (1 + R_j), the first of each the largest; the floor is 0.15
    first, second = [1 + 0.5 * 1.25, 0.9 * 1.25, 0.9 * 0.5], [1 + 0.5 * 1.5, 0.2 * 1.5, 0.2 * 0.5]
    for step, worth in ((0, first), (1, first), (2, second), (3, second)):
        weights = [max(w / worth[0], 0.15) for w in worth]
        got = loss(step)
        want = [weights[j] / (sum(weights) / 3) * -float(s.double().log_softmax(-1)[t.argmax()])
                for block in pairs(network, step) for j, (t, s, _) in enumerate(block)]  # fmt: skip
        assert got == pytest.approx(sum(want) / len(want), rel=1e-5)
        assert list(kept.values()) == [[0.9, 0.5, 0.25] if step < 2 else [0.2, 0.5, 0.5]]


def test_the_loss_of_the_correction(monkeypatch):
    """Behind the token in front of each position; row 0, which has seen it, has no part in it."""
    network = Looked()
    loss, weights = losses_of(
        monkeypatch, bigram, lambda: bigram.learn_bigram(network, text(), PLAN, BLOCKS, 3)
    )
    u, w = weights["embed_before"], weights["embed_after"]
    w.data.normal_(generator=torch.Generator().manual_seed(2))
    for step in (0, 1):
        got = loss(step)
        want = [WEIGHTS[j] * divergence(t, s + w.data @ u.data[front]) for block in pairs(network, step)
                for j, (t, s, front) in enumerate(block) if j > 0]  # fmt: skip
        assert got == pytest.approx(sum(want) / len(want), rel=1e-5)


def cross_entropy(network: Looked, step: int) -> float:
    """Of each token behind the one before it."""
    found = []
    for row in Rows(text(), LENGTH, PLAN.seed).batch(step, PLAN.batch).tolist():
        for p, (token, following) in enumerate(zip(row, row[1:], strict=False)):
            logits = (network.of_token[token] + network.of_place[p]).double()
            found.append(-float(logits.log_softmax(-1)[following]))
    assert len(found) == PLAN.batch * LENGTH
    return sum(found) / len(found)


def test_the_loss_of_pretraining(monkeypatch):
    network = Looked()
    loss, _ = losses_of(monkeypatch, pretrain, lambda: pretrain.pretrain(network, text(), PLAN))
    for step in (0, 1):
        assert loss(step) == pytest.approx(cross_entropy(network, step), rel=1e-5)


OWN = Continuations(distinct=0.9, soft=0.5, count=4, prompt=6, tokens=20, steps=2)


def continued(network: Looked, prompt: list[int]) -> list[int]:
    out = list(prompt)
    for _ in range(OWN.tokens):
        out.append(int((network.of_token[out[-1]] + network.of_place[len(out) - 1]).argmax()))
    return out


def repeated(new: list[int]) -> list[bool]:
    """Of the runs of 8 tokens up to an end token: whether they have been there before."""
    known = new.index(9) + 1 if 9 in new else len(new)
    runs = [tuple(new[i - 7 : i + 1]) for i in range(7, known)]
    return [run in runs[:i] for i, run in enumerate(runs)]


def test_the_loss_on_repeated_tokens(monkeypatch):
    """A token's chance is that behind the one before it; half of a set of continuations a step."""
    network = Looked()
    loss, _ = losses_of(monkeypatch, unlikelihood, lambda: unlikelihood.unrepeat(network, text(), PLAN, OWN))
    network.of_token[7, 9] += 30  # some texts end
    for step in range(4):
        got = loss(step)
        prompts = Rows(text(), OWN.prompt, PLAN.seed + 1).batch(step // 2, OWN.count)[:, :-1].tolist()
        texts = [continued(network, prompt) for prompt in prompts]
        marked = [repeated(t[OWN.prompt :]) for t in texts]
        shares = [1 - sum(marks) / len(marks) for marks in marked if marks]
        weight = min(max((OWN.distinct - sum(shares) / len(shares)) / OWN.soft, 0), 1)
        mine = slice(step % 2 * 2, step % 2 * 2 + 2)
        unlikely = 0.0
        for t, marks in zip(texts[mine], marked[mine], strict=True):
            for i, mark in enumerate(marks):
                at = OWN.prompt + 7 + i
                logits = (network.of_token[t[at - 1]] + network.of_place[at - 1]).double()
                unlikely -= mark * math.log1p(-float(logits.softmax(-1)[t[at]]))
        want = cross_entropy(network, step) + weight * unlikely / (2 * OWN.tokens)
        assert got == pytest.approx(want, rel=1e-4) and unlikely > 1 and weight > 0


def test_a_view_that_does_not_learn_runs_without_gradients(monkeypatch):
    """A compiled graph that has had gradients and runs once without any gives none from then on (torch 2.11):
    tables learnt between two distillations have one of their own."""
    network, modes = Looked(), []
    run = network.diffusion
    monkeypatch.setattr(network, "diffusion", lambda *a: modes.append(torch.is_grad_enabled()) or run(*a))
    for work, learns in ((distill.distill, True), (lambda *a: bigram.learn_bigram(*a, 3), False)):
        modes.clear()
        work(network, text(), PLAN, BLOCKS)
        assert modes and set(modes) == {learns}
