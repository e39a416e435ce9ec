"""Texts in turn on one cache, each with one setting other than the last one's: graphs, numbers and tables
that a text leaves behind must not reach the next one. Every setting, every strategy."""

from types import SimpleNamespace

import pytest
import torch
from interpreter import DEVICE
from lookup import fast_choices, lookup_model

from orthrus_kernels.layout import State
from qwen3_model.bigram import Bigram

FIRST = {
    "prompt_ids": [5, 6, 7], "seed": 3, "block_size": 3, "temperature": 2.0, "top_k": 0,
    "top_p": 1.0, "min_p": 0.0, "logit_bias": {},
}  # fmt: skip
TURNS = [
    {"min_p": 0.8}, {"min_p": 0.2}, {"min_p": 0.0}, {"top_p": 0.3}, {"top_p": 1.0}, {"top_k": 9},
    {"top_k": 2}, {"seed": 5}, {"top_k": 0}, {"logit_bias": {9: 2.0}}, {"logit_bias": {11: 4.0}},
    {"repetition_penalty": 50.0}, {"repetition_penalty": 1.0}, {"logit_bias": {}}, {"temperature": 0.5},
    {"bigram": 1}, {"bigram": 2}, {"prompt_ids": [5, 6, 7, 8]}, {"temperature": 0.0},
    {"logit_bias": {9: 5.0}}, {"max_new_tokens": 7}, {"block_size": 4}, {"max_new_tokens": 3},
    {"bigram": None}, {"logit_bias": {}},
]  # fmt: skip
# Block size and correction change drafts alone.
QUIET = "block_size", "bigram"


@pytest.fixture(scope="module")
def models():
    return [
        lookup_model(0.6, backend, vocab_size=32, mask_token_id=31) for backend in ("triton", "reference")
    ]


def tables(model, seed):
    g = torch.Generator().manual_seed(seed or 0)
    drawn = [2 * torch.randn(model.config.vocab_size, 5, generator=g).to(DEVICE) for _ in "uw"]
    return Bigram.of(*drawn) if seed else None


def captured(run, pool):
    """In the graphs' place: the launches as they were when they were captured."""
    cycle = run.__self__
    choice, model = cycle.slots.choice, cycle.model
    then = choice.form, model.bigram

    def replay():
        now = choice.form, model.bigram
        choice.form, model.bigram = then
        for step in run():
            step()
        choice.form, model.bigram = now

    return [(SimpleNamespace(replay=replay), lambda: None)]


def told(model, corrections, bigram=None, **settings):
    """A text: its tokens, and how many each pass kept, the prompt's first. Chains are as long as asked."""
    model.bigram, kept = corrections[bigram], []
    result = model.generate(on_tokens=lambda ids, text: kept.append(len(ids)), **settings)
    assert sum(kept) == len(result.token_ids)
    if settings["strategy"] == "two-pass" and settings["tree_nodes"] == 0:
        each = settings["block_size"] - 1
        assert result.stats.nodes == each * result.stats.cycles_of.get("two-pass", 0)
    return result.token_ids, kept


@pytest.mark.parametrize(
    "strategy, nodes, tokens",
    [("autoregressive", 0, 4), ("lookup", 0, 4), ("two-pass", 0, 4), ("two-pass", 2, 4), ("one-pass", 2, 5),
     ("auto", "auto", 4)],
)  # fmt: skip
def test_one_setting_at_a_time(models, strategy, nodes, tokens, monkeypatch):
    """Launched ahead, as on a GPU; auto is not, so that both choose the kinds of cycles alike."""
    kernels, twins = models
    fast_choices(kernels, monkeypatch)
    if DEVICE == "cpu":
        monkeypatch.setattr("qwen3_model.decode.cycle.captured_parts", captured)
    tables_of = [{seed: tables(model, seed) for seed in (None, 1, 2)} for model in models]
    for model in models:
        model.engine.forget()
    how = {"strategy": strategy, "tree_nodes": nodes}
    settings, last, drafts = FIRST | {"max_new_tokens": tokens}, None, 0
    for turn in [{}, {}, *TURNS]:
        settings |= turn
        want = told(twins, tables_of[1], **settings, **how)
        got = told(kernels, tables_of[0], **settings, **how)
        cycles = kernels.engine.runner.cycles
        kernels.engine.runner.ahead |= strategy != "auto"
        if DEVICE == "cpu" and strategy != "auto":
            cycles.pool = "of graphs that are not ones"
        if strategy == "auto" and DEVICE != "cpu":  # which kinds of cycle pay, the GPU says
            got = got[0], want[1]
        assert got == want, (turn, settings)
        if turn and not set(turn) & set(QUIET):
            assert want[0] != last, f"{turn} must change the text"
        drafts += max(want[1]) > 1
        last = want[0]
    assert (drafts > 2) == (strategy != "autoregressive"), "drafts are accepted"
    assert len(cycles) > 3, "each form of settings has its own"


@pytest.mark.parametrize("strategy", ["autoregressive", "two-pass", "one-pass"])
def test_any_end_token_of_the_list_ends_a_text_on_the_device(models, strategy, monkeypatch):
    settings = FIRST | {"strategy": strategy, "tree_nodes": 2, "max_new_tokens": 9}
    free = models[1].generate(**settings).token_ids
    end = next(i for i, token in enumerate(free) if i > 2 and token not in free[:i])
    unused = [token for token in range(31) if token not in free]
    ended = lookup_model(0.6, vocab_size=32, mask_token_id=31, eos_token_ids=(*unused[:2], free[end]))
    fast_choices(ended, monkeypatch)
    assert ended.generate(**settings).token_ids == free[: end + 1]
    state = ended.engine.runner.cycles.slots.state[0]
    assert int(state[State.FINISHED]) == 1, "finished on the device, not by the host alone"
