"""The training network against the inference model, the loss, the loop, and the quick estimate of
acceptance.
"""

import dataclasses
import signal

import pytest
import torch
import torch.nn.functional as F
from small import small_config, small_model

from orthrus_kernels import Rows
from qwen3_model import InputError, Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.config import YarnScaling
from qwen3_model.prompts import read_prompts
from qwen3_model.training import loop, objective
from qwen3_model.training.agreement import estimate
from qwen3_model.training.distill import Blocks, distill, start_from_ar
from qwen3_model.training.folder import load_network
from qwen3_model.training.loop import Plan
from qwen3_model.training.network import Network, diffusion_blocks
from qwen3_model.training.optimizer import make_optimizers
from qwen3_model.training.pretrain import held_out_loss, pretrain
from qwen3_model.training.state import load_state, save_state

CLOSE = 1e-4  # of the largest logit: fp32 sums in another order over two layers
PLAN = Plan(steps=30, batch=4, length=32, lr=5e-3)
BLOCKS = Blocks(count=4, size=8, offset_decay=0.9)
SHAPES = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 1, "tie_word_embeddings": False},
        {"head_dim": 32, "num_key_value_heads": 4, "yarn": YarnScaling(4.0, 256)},
    ],
    ids=["small", "untied", "yarn"],
)


def network_of(model: Qwen3) -> Network:
    network = Network(model.config)
    wrong = network.load_state_dict(model.destinations())
    assert not wrong.missing_keys and not wrong.unexpected_keys  # the official names, all of them
    return network


def some_text(count: int, seed: int = 0, vocabulary: int = 90) -> torch.Tensor:
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


def learnable_text(count: int = 4000) -> torch.Tensor:
    """A few phrases over and over, in random order."""
    phrases = some_text(60, seed=1).view(6, 10)
    return phrases[some_text(count // 10, seed=2, vocabulary=6)].flatten().int()


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@SHAPES
@torch.no_grad()
def test_ar_logits_equal_the_inference_model(changes):
    model = small_model(**changes)
    network, ids = network_of(model), some_text(37)
    expected = model.forward(Rows.chain(ids.tolist(), 0), model.new_cache(1)).logits
    assert relative(network.head(network.ar(ids[None])[0])[0], expected) < CLOSE
    first, past = network.ar(ids[None, :20])
    states = [first]
    for i in range(20, 37):  # token by token behind the keys of the first part
        state, past = network.ar(ids[None, i : i + 1], past)
        states.append(state)
    assert relative(network.head(torch.cat(states, 1))[0], expected) < CLOSE


@SHAPES
@torch.no_grad()
def test_diffusion_logits_equal_the_inference_model(changes):
    """Blocks side by side in one training pass, at anchors that overlap, one of them without any context."""
    model = small_model(**changes)
    network, texts = network_of(model), torch.stack([some_text(40, seed) for seed in (3, 4)])
    anchors = torch.tensor([[0, 5, 31], [12, 7, 6]])
    ids, positions, mask = diffusion_blocks(texts, anchors, 8, model.config.mask_token_id)
    _, context = network.ar(texts)
    got = network.head(network.diffusion(ids, positions, context, mask)).unflatten(1, (3, 8))
    for b, text in enumerate(texts):
        for n, anchor in enumerate(anchors[b].tolist()):
            cache = model.new_cache(40)
            if anchor:
                model.prefill(text[:anchor].tolist(), cache)
            block = Rows.block(int(text[anchor]), 8, anchor, model.config.mask_token_id)
            assert relative(got[b, n], model.forward(block, cache).logits) < CLOSE


def test_initialise_depends_on_the_seed_alone():
    networks = [Network(small_config(block_size=0, mask_token_id=-1)) for _ in range(3)]
    for network, seed in zip(networks, (5, 5, 6), strict=True):
        network.initialise(seed)
    a, b, c = (network.state_dict() for network in networks)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])


def definition(kind: str, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """A loss [n] as torch has it, from log-probabilities of teacher and student."""
    if kind == "kl":
        return F.kl_div(q, p.detach(), log_target=True, reduction="none").sum(-1)
    return F.nll_loss(q, p.argmax(-1), reduction="none")


@pytest.mark.parametrize("kind", sorted(objective.LOSSES))
def test_chunked_losses_equal_the_definition_with_their_gradient(kind, monkeypatch):
    network = network_of(small_model())
    teacher, student = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0))
    student = student.requires_grad_()
    p, q = (torch.log_softmax(network.head(x), -1) for x in (teacher, student))
    expected = definition(kind, p, q)
    (gradient,) = torch.autograd.grad(expected.mean(), student)
    for chunk in (1, 3, 11, 100):
        monkeypatch.setattr(objective, "LOGITS_AT_ONCE", chunk * network.config.vocab_size)
        loss, agrees = objective.compared(network, teacher, student, kind)
        assert loss.shape == (11,) and torch.equal(agrees, p.argmax(-1) == q.argmax(-1))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(loss.mean(), student)[0], gradient)
    whole, agrees = objective.compared(network, teacher, teacher, kind)
    if kind == "kl":
        assert whole.abs().max() < 1e-6  # nothing to learn from oneself
    assert agrees.all()


def test_the_losses_fall(losses):
    network = Network(small_config())
    network.initialise(0)
    pretrain(network, learnable_text(), PLAN)
    assert len(losses) == 30 and losses[-1] < 0.7 * losses[0]
    assert held_out_loss(network, learnable_text(), 32) < 0.7 * losses[0]
    start_from_ar(network)
    ar = {name: w.clone() for name, w in network.state_dict().items() if "_diff" not in name}
    losses.clear()
    distill(network, learnable_text(), PLAN, BLOCKS)
    assert len(losses) == 30 and losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(network.state_dict()[name], before) for name, before in ar.items())


@pytest.fixture
def losses(monkeypatch):
    """The loss of every step of the trainings in a test."""
    found: list[float] = []
    monkeypatch.setattr(loop._Report, "show", lambda self, *shown: found.append(shown[3].item()))
    return found


@pytest.fixture
def ctrl_c():
    """Python's own handler: a process started in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("training", ["pretrain", "distill"])
def test_a_resumed_run_gives_the_same_weights(training, tmp_path, monkeypatch, ctrl_c):
    """Ctrl-C in step 4 of 9: the step is done whole, its state saved, and the rest goes as it would have."""
    plan, tokens = dataclasses.replace(PLAN, steps=9), learnable_text()

    def weights_after(**settings) -> dict[str, torch.Tensor]:
        network = Network(small_config())
        network.initialise(1)
        start_from_ar(network)
        if training == "pretrain":
            pretrain(network, tokens, plan, **settings)
        else:
            distill(network, tokens, plan, BLOCKS, **settings)
        return network.state_dict()

    whole, state = weights_after(), tmp_path / "state"
    with monkeypatch.context() as patch:
        patch.setattr(
            loop._Report, "show", lambda self, step, *_: step == 4 and signal.raise_signal(signal.SIGINT)
        )
        with pytest.raises(KeyboardInterrupt):
            weights_after(state=state)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    shown: list[int] = []
    monkeypatch.setattr(loop._Report, "show", lambda self, step, *_: shown.append(step))
    resumed = weights_after(state=state, resume=True)
    assert shown == [5, 6, 7, 8, 9]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    plan = dataclasses.replace(plan, batch=3)
    with pytest.raises(InputError, match="batch was 4, not 3"):
        weights_after(state=state, resume=True)
    state.write_bytes(b"not a state")
    with pytest.raises(InputError, match="damaged"):
        weights_after(state=state, resume=True)


def test_optimizer_state_goes_through_a_file(tmp_path):
    def start():
        linear = torch.nn.Linear(8, 6)
        with torch.no_grad():
            linear.weight.copy_(some_text(48).view(6, 8) / 90)
            linear.bias.zero_()
        named = dict(linear.named_parameters())
        return linear, named, make_optimizers(named.items(), 0.01, 0.1)

    def step(linear, optimizers):
        linear(torch.arange(16.0).view(2, 8)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    linear, named, optimizers = start()
    assert [type(o).__name__ for o in optimizers] == ["Muon", "AdamW"]
    for _ in range(3):
        step(linear, optimizers)
    so_far = {"step": 3, "seconds": 0.5, "of": {"name": "x"}}
    save_state(tmp_path / "s.safetensors", named, optimizers, so_far)
    step(linear, optimizers)
    other, named_again, again = start()
    progress = load_state(tmp_path / "s.safetensors", {k: w.data for k, w in named_again.items()}, again)
    assert progress == so_far
    step(other, again)
    assert torch.equal(other.weight, linear.weight) and torch.equal(other.bias, linear.bias)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_weights_that_are_no_longer_numbers_are_refused():
    network = Network(small_config())
    network.initialise(0)
    with pytest.raises(InputError, match="smaller --lr"):
        pretrain(network, learnable_text(), dataclasses.replace(PLAN, steps=3, lr=1e20))


@pytest.fixture(scope="module")
def own_texts():
    """A model without end tokens and without the correction that is learnt behind distillation, how many
    tokens of each text count, prompts, texts a block longer."""
    model = Qwen3.from_pretrained(EMBEDDED, "cpu", "float32", "torch", progress=False)
    model.bigram = None
    model.config = dataclasses.replace(model.config, eos_token_ids=())
    rows = read_prompts(EMBEDDED / "held_out.jsonl", split="dev")[::25]
    starts = [model.text.encode(row)[-64:] for row in rows]
    count = 16
    new = count + 1 + model.config.block_size
    return model, count, starts, [model.generate(prompt, max_new_tokens=new).token_ids for prompt in starts]


@pytest.mark.parametrize("ended", [False, True])
def test_the_estimate_equals_decoding(ended, own_texts):
    """Tokens per cycle of the simulated table against two-pass decoding, and agreement by offset against a
    block drafted at every position; with texts that an end token cuts short, and without.
    """
    model, count, starts, texts = own_texts
    size = model.config.block_size
    model.config = dataclasses.replace(model.config, eos_token_ids=())
    if ended:  # a token that comes in one of the texts, and maybe in others, but is no first root
        roots = {text[0] for text in texts}
        late = next(token for token in texts[1][5:] if token not in roots)
        model.config = dataclasses.replace(model.config, eos_token_ids=(late,))
    stats, agrees, known = [], torch.zeros(size - 1), torch.zeros(size - 1)
    for prompt, text in zip(starts, texts, strict=True):
        stats.append(model.generate(prompt, strategy="two-pass", max_new_tokens=count + 1).stats)
        ends = [i for i, token in enumerate(text[1:]) if token in model.config.eos_token_ids]
        whole = prompt + text[: ends[0] + 2 if ends else None]
        cache = model.new_cache(len(whole))
        model.prefill(whole[: len(prompt)], cache)
        for at in range(len(prompt), min(len(prompt) + count, len(whole) - 1)):
            block = Rows.block(whole[at], size, at, model.config.mask_token_id)
            proposed = model.forward(block, cache).logits[:-1].argmax(-1)
            wanted = torch.tensor(whole[at + 1 : at + size])
            agrees[: len(wanted)] += proposed[: len(wanted)] == wanted
            known[: len(wanted)] += 1
            model.prefill(whole[at : at + 1], cache)
    network = load_network(EMBEDDED, model.config)
    prompts = torch.tensor([prompt + text[:1] for prompt, text in zip(starts, texts, strict=True)])
    found = estimate(network, prompts, new_tokens=count)
    per_cycle = sum(s.cycle_tokens for s in stats) / sum(s.cycles for s in stats)
    assert found.tokens_per_cycle == pytest.approx(per_cycle, rel=0.02)  # a near-tie may fall otherwise
    assert 1.5 < found.tokens_per_cycle < size / 2  # neither nothing nor everything is accepted
    assert found.by_offset == pytest.approx((agrees / known.clamp(min=1)).tolist(), abs=0.02)
    assert 0 < found.distinct_8grams <= 1
