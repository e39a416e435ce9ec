"""Cycles on the kernels give the text of plain decoding by hand, bit for bit, and draft what the twins do."""

import gc
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from interpreter import DEVICE
from plainly import plainly
from small import small_model

from orthrus_kernels import PAGE, PassTables, attention_triton
from orthrus_kernels.layout import State
from qwen3_model import InputError
from qwen3_model.bigram import Bigram
from qwen3_model.decode import controller, one_pass
from qwen3_model.decode.controller import PLAIN
from qwen3_model.decode.cycle import Cycle
from qwen3_model.decode.graphs import capturing
from qwen3_model.decode.prompt import Prompts
from qwen3_model.decode.two_pass import TwoPassCycle

PROMPT = [5, 6, 7]
CUTS = ((0, 8),)
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1} if DEVICE == "cpu" else {}  # fewer programs
DEFAULTS = {"max_new_tokens": 5, "seed": 3, "tree_nodes": 0}
STRATEGIES = ("autoregressive", "lookup", "two-pass", "one-pass")
ON_CPU = pytest.mark.skipif(DEVICE != "cpu", reason="blocks of 8 keys, too few for a compiled dot: tests/gpu")


def model_of(backend="triton", **changes):
    return small_model("float32", backend=backend, device=DEVICE, **{"num_hidden_layers": 1} | changes)


@pytest.fixture(scope="module")
def model():
    return model_of(**HEADS)


@pytest.fixture(scope="module")
def twins():
    return model_of("reference", **HEADS)


def by_cycles(model, prompt=PROMPT, ahead=False, **settings):
    """(result, cycles) of a text from a fresh cache. ahead: each cycle is launched before the last is read,
    as on a GPU."""
    model.engine.forget()
    runner = model.engine.runner_for(len(prompt) + 40)
    runner.ahead |= ahead
    return model.generate(prompt, **DEFAULTS | settings), runner.cycles


def by_hand(model, prompt=PROMPT, max_new_tokens=5, seed=3, **settings):
    return plainly(model, prompt, max_new_tokens, seed=seed, **settings)


def same(result, plain):
    return (result.token_ids, result.logprobs) == plain


def kinds(over):
    """Of the cycles that a text had, beside the plain one where one token was left."""
    return {kind for kind, *_ in over._cycles} - {PLAIN}


SETTINGS = (
    {}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.9, "logit_bias": {9: 2.0}},
    {"repetition_penalty": 3.0, "logit_bias": {9: 40.0, 11: 39.0}},
)  # fmt: skip


@pytest.fixture(scope="module")
def plainly_decoded(model):
    """By hand, with each of SETTINGS."""
    return [by_hand(model, **settings) for settings in SETTINGS]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_same_tokens_and_log_probabilities(model, twins, plainly_decoded, strategy, settings):
    """Launched ahead or not; a cycle keeps what one of the twins does."""
    plain = plainly_decoded[SETTINGS.index(settings)]
    how = {"strategy": strategy, "block_size": 3, **settings}
    result, over = by_cycles(model, **how)
    early, _ = by_cycles(model, ahead=True, **how)
    assert same(result, plain) and same(early, plain) and result.stats.finish_reason == "length"
    assert len(kinds(over)) == (strategy != "autoregressive")
    for other in (early, by_cycles(twins, **how)[0]):
        assert other.stats.accepted_histogram == result.stats.accepted_histogram


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_who_watches_gets_the_same_cycles(model, strategy):
    """And their trees, with what the target chose behind each node."""
    runs, how = [], {"strategy": strategy, "tree_nodes": 4, "block_size": 4}
    unseen, _ = by_cycles(model, **how)
    result, _ = by_cycles(model, on_run=lambda run, kept: runs.append(run), ahead=True, **how)
    assert result.token_ids == unseen.token_ids and result.logprobs == unseen.logprobs
    assert result.stats.accepted_histogram == unseen.stats.accepted_histogram
    for run in [run for run in runs[1:] if run.kind != "plain"]:
        assert len(run.tree) == len(run.choices) == 1 + run.nodes
        assert [run.choices[node] for node in run.path] == run.tokens
    drafted = [run for run in runs if run.nodes]
    assert bool(drafted) == (strategy != "autoregressive") and {run.nodes for run in drafted} <= {
        15 if strategy == "lookup" else 4
    }


@pytest.mark.parametrize("strategy", STRATEGIES if DEVICE == "cuda" else ["two-pass"])
def test_end_tokens_end_it_on_the_device(model, strategy, monkeypatch):
    tokens, logprobs = by_hand(model, temperature=1.0)
    end = tokens[3]
    first = tokens.index(end) + 1
    monkeypatch.setattr(model, "config", replace(model.config, eos_token_ids=(end,)))
    result, over = by_cycles(model, strategy=strategy, temperature=1.0, ahead=True)
    assert same(result, (tokens[:first], logprobs[:first])) and result.stats.finish_reason == "end_token"
    state = over.slots.state[0]
    assert first == 1 or int(state[State.FINISHED]) == 1, "on the device, not by the host alone"


def test_seeds_biases_and_texts_share_a_cycle(model):
    model.engine.forget()
    how = {"tree_nodes": 0, "max_new_tokens": 4}
    texts = [model.generate(PROMPT, temperature=1.0, seed=s, **how).token_ids for s in (1, 2, 1)]
    over = model.engine.runner.cycles
    cycles = len(over)
    assert texts[0] == texts[2] != texts[1] and cycles <= 2
    for token in (9, 11):
        text = model.generate(PROMPT, logit_bias={token: 99.0}, **how).token_ids
        assert text == [token] * 4 and len(over) <= cycles + 2


def short_segments(monkeypatch, folded=64, cuts=CUTS):
    """Key segments of 8 positions, and tiles of `folded` rows and query heads."""
    monkeypatch.setattr(PassTables.new, "__defaults__", (cuts,))
    monkeypatch.setattr(attention_triton, "DEFAULT_LAUNCH", (folded, 8, 4, 2))


@ON_CPU
def test_one_cycle_serves_every_length(model, monkeypatch):
    """Over several key segments in a text: the work list grows with it."""
    short_segments(monkeypatch)
    prompt, how = list(range(5, 18)), {"max_new_tokens": 7}
    result, over = by_cycles(model, prompt, strategy="two-pass", block_size=3, **how)
    assert same(result, by_hand(model, prompt, **how))
    (cycle,) = (cycle for (kind, *_), cycle in over._cycles.items() if kind != PLAIN)
    tables, start = cycle.check.tables, int(cycle.start)
    assert start >= 13 + 3 and int(tables.count) == -(-(start + 3) // 8) == 3 < len(tables.items)


@ON_CPU
def test_one_cycle_serves_every_length_without_a_diffusion_view(monkeypatch):
    """A plain Qwen3 with the default draft, which it has none of."""
    short_segments(monkeypatch)
    plain, prompt = model_of(block_size=0, mask_token_id=None), list(range(5, 18))
    result, over = by_cycles(plain, prompt, strategy="autoregressive", tree_nodes="auto", max_new_tokens=7)
    assert same(result, by_hand(plain, prompt, 7)) and len(over) == 1


@pytest.mark.parametrize("nodes", [0, 4])
def test_blocks_too_deep_for_the_kernel_that_grows_trees(nodes):
    """A tree takes the positions that it can."""
    deep = model_of(block_size=80, max_position_embeddings=256)
    result, over = by_cycles(deep, strategy="two-pass", tree_nodes=nodes, max_new_tokens=3)
    assert same(result, by_hand(deep, max_new_tokens=3)) and kinds(over) == {nodes}


@contextmanager
def corrected_by(model, seed):
    """With random tables of a bigram correction."""
    g = torch.Generator().manual_seed(seed)
    tables = [2 * torch.randn(model.config.vocab_size, 5, generator=g).to(DEVICE, model.dtype) for _ in "uw"]
    model.bigram = Bigram.of(*tables)
    try:
        yield
    finally:
        model.bigram = None


def told(model, **settings):
    """A text, and the nodes of its cycles' trees with their parents."""
    runs = []
    result, over = by_cycles(model, on_run=lambda run, kept: runs.append(run), **settings)
    trees = [(run.tree.tokens, run.tree.parents) for run in runs if run.tree is not None]
    assert kinds(over) and trees
    return result, trees


@pytest.mark.parametrize("strategy", ["two-pass", "one-pass"])
def test_a_bigram_correction_changes_drafts_alone(model, twins, strategy):
    """The same text by cycles that verify other nodes than without it, and those of the twins."""
    settings = {"strategy": strategy, "tree_nodes": 4, "block_size": 4}
    plain, trees = told(model, **settings)
    with corrected_by(model, 1):
        corrected, others = told(model, **settings)
    with corrected_by(twins, 1):
        _, wanted = told(twins, **settings)
    assert corrected.token_ids == plain.token_ids and corrected.logprobs == plain.logprobs
    assert others == wanted and others != trees


def test_an_interrupted_capture_is_not_replayed(model, monkeypatch):
    """The second launch of a cycle captures it; whatever ends that, the next text is right."""
    captured, how = [], {"tree_nodes": 0, "max_new_tokens": 6}

    class Graph:
        def replay(self):
            captured[-1]()

    @contextmanager
    def graph(graph, pool):
        yield

    monkeypatch.setattr(model, "use_graphs", False)
    want, over = by_cycles(model, **how)
    run, calls = TwoPassCycle.run, []

    def run_but_once(self):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        captured.append(lambda: list(run(self)))
        return run(self) if self.launches == 0 else iter(())

    monkeypatch.setattr(TwoPassCycle, "run", run_but_once)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(over, "pool", "a pool")
    over._cycles.clear()
    again = [model.generate(PROMPT, **DEFAULTS | how) for _ in "01"]
    assert [result.stats.finish_reason for result in again] == ["interrupted", "length"]
    drafts = [cycle for cycle in calls if cycle.draft is not None]
    assert again[1].token_ids == want.token_ids and len(drafts) == 3 < again[1].stats.cycles, "replayed then"


def copies(over):
    return [t.clone() for t in (over.slots.cache.keys, over.slots.cache.values, over.slots.state)]


def same_copies(over, before):
    for old, new in zip(before, copies(over), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_surplus_cycle_leaves_cache_and_state(model, strategy):
    how = {"strategy": strategy, "block_size": 4, "temperature": 0.8, "repetition_penalty": 1.2}
    _, over = by_cycles(model, ahead=True, **how)
    before, counts = copies(over), over.slots.choice.counts.clone()
    with torch.inference_mode():
        for (kind, *_), cycle in over._cycles.items():
            over.again(kind)
            (end,) = cycle.launch(over.pool)()
            assert end.finished and not end.run.tokens
    same_copies(over, before)
    assert torch.equal(over.slots.choice.counts, counts)


def test_measuring_times_changes_nothing(model, monkeypatch):
    """As on a GPU: cycles of three kinds, captured and then timed in turn, before the first text's."""
    of, launch, launched, before = {1: PLAIN, 4: 3, 8: 7}, Cycle.launch, [], []
    settings = {"strategy": "auto", "tree_nodes": "auto", "block_size": 4, "temperature": 0.8}
    plain = by_hand(model, temperature=0.8)
    model.engine.forget()
    over = model.engine.runner_for(40).cycles

    def noted(self, pool, timed=False):
        kind = of[self.nodes]
        if len(launched) < 9:  # nothing but the state is said to have ended
            before[:] = before or copies(over)
        read = launch(self, None if DEVICE == "cpu" else pool, timed)  # a CPU captures nothing
        launched.append((kind, timed))

        def end():
            (found,) = read()
            if len(launched) <= 9:
                assert found.finished and not found.run.tokens
                same_copies(over, before)
            assert DEVICE == "cpu" or not timed or found.milliseconds > 0
            return [found._replace(milliseconds=4.0 + kind if timed else None)]

        return end

    monkeypatch.setattr(controller, "ROUNDS", 1), monkeypatch.setattr(controller, "AWAKE", 0.0)
    (
        monkeypatch.setattr("qwen3_model.decode.kinds.SIZES", (3, 7)),
        monkeypatch.setattr(TwoPassCycle, "launch", noted),
    )
    monkeypatch.setattr(over, "pool", over.pool or "a pool")
    for _ in "01":
        again = model.generate(PROMPT, **DEFAULTS | settings)
        assert same(again, plain)
        state = over.slots.state[0]
        assert int(state[State.LEFT]) == 0 and int(state[State.FINISHED]) == 1, "decoded here, to the end"
    every = (PLAIN, 3, 7)
    assert launched[:9] == [(k, False) for k in every for _ in "01"] + [(k, True) for k in every]
    assert len(launched) > 9 and all(timed for _, timed in launched[9:]), "measured once"
    (learnt,) = over.controllers.values()
    assert {kind: learnt.times[kind] for kind in every} == {kind: 4.0 + kind for kind in every}


def test_damaged_logits_are_said(monkeypatch):
    damaged, run = model_of(), Prompts.run

    def then_damage(self, *given):
        states = run(self, *given).clone()
        damaged.norm.fill_(float("nan"))
        return states

    monkeypatch.setattr(Prompts, "run", then_damage)
    with pytest.raises(InputError, match="NaN or infinite"):
        damaged.generate(PROMPT, tree_nodes=0, max_new_tokens=4)


@pytest.mark.parametrize(
    "strategy, tree_nodes, settings",
    [("two-pass", 0, {}), ("two-pass", 0, {"temperature": 0.8}), ("two-pass", 6, {"temperature": 0.8}),
     ("one-pass", 4, {"temperature": 0.8, "top_p": 0.9})],
)  # fmt: skip
def test_a_damaged_drafter_leaves_the_text_alone(model, strategy, tree_nodes, settings):
    """Its tokens and its scores are NaN, and ids made of them still lie in the vocabulary."""
    damaged = model_of(**HEADS)
    damaged.layers[0].diffusion.qkv.data[3, 3] = float("nan")
    result, over = by_cycles(
        damaged, strategy=strategy, tree_nodes=tree_nodes, block_size=4, max_new_tokens=4, **settings
    )
    assert same(result, by_hand(model, max_new_tokens=4, **settings)) and kinds(over)


def test_the_cache_holds_what_plain_decoding_commits(model):
    result, over = by_cycles(model, strategy="two-pass", block_size=3)
    cache, n = over.slots.cache, len(PROMPT) + len(result.token_ids) - 1
    plain = model.new_cache(n)
    with torch.inference_mode():
        model.prefill([*PROMPT, *result.token_ids[:-1]], plain)
    assert int(over.slots.start) == n
    assert all(map(torch.equal, cache.read(0, n), plain.read(0, n)))


def test_a_stopped_text_leaves_the_cache_usable(model):
    """Ended by the caller with a cycle in flight, then another text from the same cache."""
    how, calls = {"max_new_tokens": 6, "seed": 1, "tree_nodes": 0}, []
    whole, _ = by_cycles(model, ahead=True, **how)
    cut = model.generate(PROMPT, on_tokens=lambda *a: calls.append(a) or len(calls) < 2, **how)
    assert cut.stats.finish_reason == "callback" and cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert model.generate(PROMPT, **how).token_ids == whole.token_ids


@pytest.mark.parametrize(
    "tree_nodes, settings",
    [(1, {}), (6, {}), (6, {"temperature": 0.8}), (4, {"temperature": 0.8, "top_k": 5}),
     (4, {"logit_bias": {9: 2.0}})],
    ids=str,
)  # fmt: skip
def test_trees(model, twins, settings, tree_nodes):
    """The text of plain decoding, by cycles of the twins' trees."""
    how = {"strategy": "two-pass", "tree_nodes": tree_nodes, **settings}
    result, trees = told(model, **how)
    assert same(result, by_hand(model, **settings)) and trees == told(twins, **how)[1]
    stats, drafts = result.stats, result.stats.cycles_of["two-pass"]
    assert stats.nodes == tree_nodes * drafts and stats.cycles - drafts <= 1


@pytest.mark.parametrize(
    "tree_nodes, rows, corrected, settings",
    [(4, 192, True, {}), (6, 16, False, {}), (0, 192, False, {"temperature": 0.8}),
     (4, 14, True, {"temperature": 0.8, "top_k": 5}), (3, 192, False, {"logit_bias": {9: 2.0}})],
    ids=str,
)  # fmt: skip
def test_one_pass(model, twins, monkeypatch, tree_nodes, rows, corrected, settings):
    """A block at every node, or at two: the text of plain decoding, by cycles of the twins' trees, misses
    too."""
    monkeypatch.setattr(one_pass, "MOST_ROWS", rows)
    how = {"strategy": "one-pass", "tree_nodes": tree_nodes, "block_size": 5, "max_new_tokens": 9, **settings}
    found = []
    for one in (model, twins):
        with corrected_by(one, 3) if corrected else nullcontext():
            found.append(told(one, **how))
    (result, trees), (_, wanted) = found
    assert same(result, by_hand(model, max_new_tokens=9, **settings)) and trees == wanted
    assert result.stats.forwards == 1 + result.stats.cycles and "one-pass" in result.stats.cycles_of


def test_a_draft_is_not_taken_into_another_text(model):
    """The second text begins where the first one, ended by its caller, has left a draft behind: every
    proposal of it would be right there."""
    settings = {"strategy": "one-pass", "tree_nodes": 4, "block_size": 5, "logit_bias": {9: 99.0}}
    texts, kept = iter([True, False]), []
    _, over = by_cycles(
        model, ahead=True, max_new_tokens=12, on_tokens=lambda ids, text: next(texts), **settings
    )
    (cycle,) = over._cycles.values()
    at, depth = int(cycle.drafts.at[0]), cycle.shape.depth
    assert at > 0 and (cycle.drafts.ids[0, :depth, 0] == 9).all(), "a draft is left"
    stats = model.generate(
        [5] * at, max_new_tokens=4, on_tokens=lambda ids, text: kept.append(len(ids)), **settings
    ).stats
    assert kept == [1, 1, 2] and stats.nodes == 4, "the prompt's token, one without a draft, two with"


def test_other_tables_have_cycles_of_their_own(model):
    """A correction that comes or goes while the cache lives."""
    settings = DEFAULTS | {"strategy": "one-pass", "tree_nodes": 2, "block_size": 4, "max_new_tokens": 4}
    plain, over = by_cycles(model, **settings)
    with corrected_by(model, 2):
        corrected = model.generate(PROMPT, **settings)
    with corrected_by(model, 3):
        model.generate(PROMPT, **settings)
    again = model.generate(PROMPT, **settings)
    assert again.stats.accepted_histogram == plain.stats.accepted_histogram
    assert corrected.token_ids == plain.token_ids
    drafts = [cycle for (kind, *_), cycle in over._cycles.items() if kind != PLAIN]
    assert sorted(cycle.drafts.scores.dim() for cycle in drafts) == [3, 4, 4]


@pytest.mark.parametrize("block", [7, None])
def test_blocks_of_one_pass_cycles(model, block, monkeypatch):
    """As long as asked for; else as short as they are best."""
    monkeypatch.setattr(model, "config", replace(model.config, block_size=16))
    monkeypatch.setattr(one_pass, "NODES", 2)
    _, over = by_cycles(model, strategy="one-pass", tree_nodes="auto", max_new_tokens=3, block_size=block)
    assert {shape.block for shape in kinds(over)} == {block or 8}


@ON_CPU
@pytest.mark.parametrize("strategy", ["two-pass", "one-pass"])
def test_a_tree_walks_past_a_key_segment(model, monkeypatch, strategy):
    """Into the next one, which is a page; blocks deep enough for two tiles on a path."""
    short_segments(monkeypatch, folded=8, cuts=((0, PAGE),))  # tiles of 4 rows
    prompt, tokens = list(range(5, 5 + PAGE - 3)), 5 if strategy == "two-pass" else 4
    nodes = 12 if strategy == "two-pass" else 5
    result, over = by_cycles(model, prompt, strategy=strategy, tree_nodes=nodes, max_new_tokens=tokens)
    assert same(result, by_hand(model, prompt, tokens)) and len(kinds(over)) == 1


def test_nothing_is_collected_during_a_capture(monkeypatch):
    """A dead graph that the collector found would be destroyed, and the capture with it."""
    seen = []

    @contextmanager
    def graph(graph, pool):
        seen.append(gc.isenabled())
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(KeyboardInterrupt), capturing(None, None):
        raise KeyboardInterrupt
    assert seen == [False] and gc.isenabled()
