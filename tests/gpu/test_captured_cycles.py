"""Captured cycles and prompts have the bits of plain decoding by hand, by one graph at any length: the
embedded checkpoint on a GPU."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from drawn_selector import drawn
from golden import seeded_model
from plainly import plainly

from qwen3_model import Qwen3, bigram, selector
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.decode.cycle import Slots
from qwen3_model.decode.prompt import Prompts
from qwen3_model.decode.prompt_rows import Piece
from qwen3_model.model import PREFILL_ROWS
from qwen3_model.prompts import read_prompts

pytestmark = pytest.mark.usefixtures("memory")


@cache
def loaded():
    return Qwen3.from_pretrained(EMBEDDED, "cuda", "bfloat16", progress=False)


@pytest.fixture
def model():
    """With a cache of its own, and graphs captured in this test's memory."""
    loaded().engine.forget()
    return loaded()


def prompt_of(tokens: int) -> list[int]:
    """Held-out texts, one after another."""
    texts = read_prompts(EMBEDDED / "held_out.jsonl", None, None, "test")
    found = [token for text in texts for token in loaded().text.encode(text)]
    return (found * (tokens // len(found) + 1))[:tokens]


@cache
def by_hand(prompt: int, tokens: int, **settings) -> tuple[list[int], list[float]]:
    return plainly(loaded(), prompt_of(prompt), tokens, **settings)


def same(result, plain) -> bool:
    return (result.token_ids, result.logprobs) == plain


@pytest.mark.parametrize(
    ("strategy", "nodes"),
    [("autoregressive", 0), ("lookup", 0), ("two-pass", 0), ("two-pass", 64), ("one-pass", "auto"),
     ("one-pass", 40), ("auto", "auto")],
)  # fmt: skip
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.9},
     {"temperature": 0.8, "repetition_penalty": 1.1}],
    ids=str,
)  # fmt: skip
def test_captured_cycles(model, strategy, nodes, settings):
    """After 900 tokens of several texts, past 1024 positions, where segments are wider."""
    plain, how = by_hand(900, 250, seed=5, **settings), {"seed": 5, "tree_nodes": nodes, **settings}
    for _ in "01":  # the second one's cycles are all replays
        assert same(model.generate(prompt_of(900), strategy, 250, **how), plain)
    cycles = model.engine.runner.cycles._cycles
    kinds = 4 if strategy == "auto" else 3 if nodes == "auto" else 2
    assert len(cycles) <= kinds, "beside the plain one where one token is left"
    used = [cycle for cycle in cycles.values() if cycle.launches > 2]
    assert used and all(cycle.graphs for cycle in used)


@pytest.mark.parametrize("strategy", ["autoregressive", "lookup", "two-pass", "one-pass"])
def test_one_graph_serves_every_length(model, strategy):
    """Texts that end in other key segments, a short one behind long ones, and caches of two sizes."""
    how, cycles = {"strategy": strategy, "tree_nodes": 15}, []
    for room in (2048, 4096):
        model.engine.forget()
        model.engine.runner_for(room)
        for length in (10, 240, 1000, 1900, 10):
            assert same(model.generate(prompt_of(length), max_new_tokens=60, **how), by_hand(length, 60))
            cycles.append(dict(model.engine.runner.cycles._cycles))
        assert cycles[-5].items() <= cycles[-1].items(), "a cycle was made anew"
        assert len(cycles[-1]) <= 2, "beside the plain one where one token is left"
        assert model.engine.runner.cache.capacity == room


@pytest.mark.parametrize(("strategy", "nodes"), [("two-pass", 0), ("two-pass", 31), ("one-pass", 19)])
def test_a_selector_in_captured_cycles(model, strategy, nodes, monkeypatch):
    """The text stays, and replayed cycles draft what those draft whose kernels are launched one by one."""
    tables = bigram.load(EMBEDDED, model.config, model.device, model.dtype)
    monkeypatch.setattr(model, "bigram", selector.joined(tables, drawn(), model.embedding))
    plain, told = by_hand(900, 120, seed=5), []
    for graphs in (True, False):
        monkeypatch.setattr(model, "use_graphs", graphs)
        model.engine.forget()
        for _ in "01":
            trees = []
            result = model.generate(
                prompt_of(900), strategy, 120, seed=5, tree_nodes=nodes,
                on_run=lambda run, kept, trees=trees: trees.append(run.tree and run.tree.tokens),
            )  # fmt: skip
            assert same(result, plain)
            told.append(trees)
    assert told[0] == told[1] == told[2] == told[3] and any(told[0])


def test_a_short_text_behind_one_that_fills_the_cache(model):
    model.generate(prompt_of(3900), max_new_tokens=150)
    assert model.engine.runner.cache.capacity == 4096
    assert same(model.generate(prompt_of(12), max_new_tokens=100), by_hand(12, 100))


def test_prompts_of_several_chunks():
    """Padded and not, of one to three chunks, each twice, since the first use of a graph's rows captures it.
    Places that are not the prompt's keep what they hold."""
    model = seeded_model("1.7B", "cuda", layers=2)
    ours, theirs = model.new_cache(5200), model.new_cache(5200)
    prompts = Prompts(Slots(model, ours, ours.sequences), torch.cuda.graph_pool_handle())
    for length in (1, 16, 17, 128, 129, 2048, 2049, 4000, 4096, 5100) * 2:
        for cache_ in (ours, theirs):
            cache_.keys.fill_(float("nan"))
            cache_.values.fill_(7.0)
        tokens, theirs.lengths = torch.randint(0, 150_000, (length,)).tolist(), [0]
        with torch.inference_mode():
            for first in range(0, length, PREFILL_ROWS):
                states = prompts.run([Piece(tokens[first : first + PREFILL_ROWS], first, 0)])
            logits = model.ops.linear(states, model.head, out_dtype=torch.float32)[0]
            assert torch.equal(logits, model.prefill(tokens, theirs, chunk=1000)), length
        for got, want in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_prompts_of_several_texts_in_a_chunk():
    """Captured at the first use of a graph's rows, replayed at the second."""
    model = seeded_model("1.7B", "cuda", layers=2)
    ours, theirs = model.new_cache(2048, sequences=16), model.new_cache(2048)
    prompts = Prompts(Slots(model, ours, ours.sequences), torch.cuda.graph_pool_handle())
    for lengths in ((1, 60, 3), (100,) * 16, (1000, 900, 1, 147), (5, 9), (700, 1348)) * 2:
        texts = [torch.randint(0, 150_000, (n,)).tolist() for n in lengths]
        with torch.inference_mode():
            states = prompts.run([Piece(text, 0, slot) for slot, text in enumerate(texts)])
            logits = model.ops.linear(states, model.head, out_dtype=torch.float32)
            for slot, text in enumerate(texts):
                theirs.lengths = [0]
                assert torch.equal(logits[slot], model.prefill(text, theirs)), (lengths, slot)
                got, want = ours.read(slot, len(text)), theirs.read(0, len(text))
                assert all(map(torch.equal, got, want)), (lengths, slot)
    assert {rows for rows, _ in prompts._chunks} == {16, 64, 1664, 2048}


def test_a_surplus_cycle_changes_nothing(model):
    model.generate([5, 6, 7], "two-pass", max_new_tokens=40, tree_nodes=0)
    runner = model.engine.runner
    now = runner.cache.keys, runner.cache.values, runner.cycles.slots.state
    before = [t.clone() for t in now]
    with torch.inference_mode():
        for cycle in runner.cycles._cycles.values():
            for _ in range(3):
                (end,) = cycle.launch(runner.cycles.pool)()
                assert end.finished and not end.run.tokens
    for old, new in zip(before, now, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


def test_a_plain_qwen3_past_the_first_cut(model):
    """With the defaults; the AR view of the checkpoint alone."""
    alone = Qwen3.from_config(
        replace(model.config, block_size=0, mask_token_id=None), device="cuda", dtype="bfloat16"
    )
    mine = model.destinations()
    for name, weight in alone.destinations().items():
        weight.copy_(mine[name])
    got = alone.generate(prompt_of(1000), max_new_tokens=60)
    assert same(got, by_hand(1000, 60)) and "lookup" in got.stats.cycles_of
    assert len(alone.engine.runner.cycles) == 2, "lookup, and plain for what it does not find"
