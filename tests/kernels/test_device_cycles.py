"""Cycles on the device keep what the host's loop keeps, bit for bit."""

import gc
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from interpreter import DEVICE
from qwen3_model.decode.budget import CHAIN, KINDS, ONE_PASS, PLAIN, Budget
from qwen3_model.graphs import capturing
from small import small_model

from orthrus_kernels import PassTables, attention_triton
from qwen3_model import InputError
from qwen3_model.bigram import Bigram
from qwen3_model.decode import costs, device, one_pass

PROMPT = [5, 6, 7]
CUTS = ((0, 8),)
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1} if DEVICE == "cpu" else {}  # fewer programs
DEFAULTS = {"prompt_ids": PROMPT, "max_new_tokens": 5, "seed": 3, "tree_nodes": 0}


@pytest.fixture(scope="module")
def model():
    return small_model("float32", backend="triton", device=DEVICE, num_hidden_layers=1, **HEADS)


def both(model, **settings):
    """Results of the host's loop and of the device's cycles."""
    results = []
    for graphs in (False, True):
        model.use_graphs, model.use_cycles, model.spare_cache = graphs, graphs, None
        results.append(model.generate(**(DEFAULTS | settings)))
    assert model.spare_cache is not None
    return results, model.spare_cache.cycles


def plainly(model, **settings):
    """Plain decoding by the host's loop, to hold others against; the device's is held against it below."""
    model.use_graphs = model.use_cycles = False
    return model.generate(**DEFAULTS | settings | {"strategy": "autoregressive"})


@pytest.mark.parametrize("strategy", device.STRATEGIES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.9, "logit_bias": {9: 2.0}}],
    ids=str,
)
def test_same_tokens_and_log_probabilities(model, strategy, settings):
    (host, on_device), cycles = both(model, strategy=strategy, block_size=3, **settings)
    assert on_device.token_ids == host.token_ids and on_device.logprobs == host.logprobs
    assert on_device.stats.finish_reason == host.stats.finish_reason == "length"
    assert on_device.stats.cycles == host.stats.cycles and len(cycles) == 1


def test_a_repetition_penalty_stays_on_the_host(model):
    (host, other), cycles = both(model, strategy="two-pass", repetition_penalty=1.3)
    assert other.token_ids == host.token_ids and len(cycles) == 0


def test_one_who_watches_gets_the_hosts_loop(model):
    """on_run: a record of the device does not tell the tree."""
    runs = []
    (host, other), cycles = both(model, strategy="two-pass", on_run=lambda run, kept: runs.append(run))
    assert len(cycles) == 0 and other.token_ids == host.token_ids
    assert [len(run.tree) for run in runs if run.nodes] == [run.rows[1] for run in runs if run.nodes] != []


@pytest.mark.parametrize("strategy", device.STRATEGIES if DEVICE == "cuda" else ["two-pass"])
def test_end_tokens_end_it_on_the_device(model, strategy, monkeypatch):
    (host, _), _ = both(model, strategy=strategy, temperature=1.0)
    end = host.token_ids[3]
    first = host.token_ids.index(end) + 1
    changed = type(model.config)(**{**vars(model.config), "eos_token_ids": (end,)})
    monkeypatch.setattr(model, "config", changed)
    (host, on_device), cycles = both(model, strategy=strategy, temperature=1.0)
    assert on_device.token_ids == host.token_ids and len(host.token_ids) == first
    assert on_device.stats.finish_reason == "end_token"
    assert first == 1 or int(cycles._state[3]) == 1, "finished on the device, not by the host alone"


def test_seeds_biases_and_texts_share_a_cycle(model):
    model.use_graphs, model.use_cycles, model.spare_cache = True, True, None
    texts = [
        model.generate(PROMPT, tree_nodes=0, max_new_tokens=4, temperature=1.0, seed=s).token_ids
        for s in (1, 2, 1)
    ]
    assert texts[0] == texts[2] != texts[1] and len(model.spare_cache.cycles) == 1
    for token in (9, 11):
        text = model.generate(PROMPT, tree_nodes=0, max_new_tokens=2, logit_bias={token: 99.0}).token_ids
        assert text == [token] * 2 and len(model.spare_cache.cycles) == 2


def short_segments(monkeypatch, folded=64):
    """Key segments of 8 positions, and tiles of `folded` rows and query heads."""
    monkeypatch.setattr(PassTables.new, "__defaults__", (CUTS,))
    monkeypatch.setattr(attention_triton, "DEFAULT_LAUNCH", (folded, 8, 4, 2))


@pytest.mark.skipif(DEVICE != "cpu", reason="blocks of 8 keys, too few for a compiled dot: see tests/gpu")
def test_one_cycle_serves_every_length(model, monkeypatch):
    """Over several key segments in a text: the work list grows with it."""
    short_segments(monkeypatch)
    (host, on_device), cycles = both(
        model, strategy="two-pass", block_size=3, prompt_ids=list(range(5, 18)), max_new_tokens=6
    )
    assert on_device.token_ids == host.token_ids and on_device.logprobs == host.logprobs
    (cycle,) = cycles._cycles.values()
    tables, start = cycle.check.inputs.tables, int(cycles._state[0])
    assert start == 13 + 5 and int(tables.count) == -(-(start + 3) // 8) == 3 < len(tables.items)


@pytest.mark.skipif(DEVICE != "cpu", reason="blocks of 8 keys, too few for a compiled dot: see tests/gpu")
def test_one_cycle_serves_every_length_without_a_diffusion_view(monkeypatch):
    """A plain Qwen3 with the default draft, which it has none of."""
    short_segments(monkeypatch)
    plain = small_model("float32", backend="triton", device=DEVICE, num_hidden_layers=1, block_size=0,
                        mask_token_id=None)  # fmt: skip
    (host, on_device), cycles = both(
        plain, strategy="autoregressive", tree_nodes="auto", prompt_ids=list(range(5, 18)), max_new_tokens=7
    )
    assert on_device.token_ids == host.token_ids and on_device.logprobs == host.logprobs
    assert len(cycles._cycles) == 1


def test_blocks_too_deep_for_the_kernel_that_grows_trees(monkeypatch):
    """Trees of the host's loop; auto has none. On a GPU the costs of every kind that is left are measured."""
    deep = small_model("float32", backend="triton", device=DEVICE, num_hidden_layers=1, block_size=80,
                       max_position_embeddings=256)  # fmt: skip
    plain = plainly(deep, max_new_tokens=2)
    for nodes in (4, "auto"):
        (_, result), cycles = both(deep, strategy="two-pass", tree_nodes=nodes, max_new_tokens=2)
        assert result.token_ids == plain.token_ids and result.logprobs == plain.logprobs
        assert {key[0] for key in cycles._cycles} <= {PLAIN, CHAIN} and (nodes == "auto") == bool(len(cycles))


@contextmanager
def corrected_by(model, seed):
    """With random tables of a bigram correction."""
    g = torch.Generator().manual_seed(seed)
    tables = [2 * torch.randn(model.config.vocab_size, 5, generator=g).to(DEVICE, model.dtype) for _ in "uw"]
    model.bigram = Bigram(*tables)
    try:
        yield
    finally:
        model.bigram = None


def test_a_bigram_correction_changes_drafts_alone(model):
    """The same text; host and cycle verify other nodes than without it, and the same ones as each other."""
    settings = {"strategy": "two-pass", "tree_nodes": 4, "block_size": 4}
    plain = both(model, **settings)[0]
    with corrected_by(model, 1):
        host, cycle = both(model, **settings)[0]
    assert host.token_ids == cycle.token_ids == plain[0].token_ids and host.logprobs == cycle.logprobs
    assert host.stats.accepted_histogram == cycle.stats.accepted_histogram


def test_an_interrupted_capture_is_not_replayed(model, monkeypatch):
    """The second launch of a cycle captures it; whatever ends that, the next text is right."""
    captured = []

    class Graph:
        def replay(self):
            captured[-1]()

    @contextmanager
    def graph(graph, pool):
        yield

    model.use_graphs, model.use_cycles, model.spare_cache = True, True, None
    want = model.generate(PROMPT, tree_nodes=0, max_new_tokens=4).token_ids
    model.spare_cache = None
    run, calls = device.TwoPassCycle.run, []

    def run_but_once(self):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        captured.append(lambda: run(self))
        if len(calls) == 1:
            run(self)

    monkeypatch.setattr(device.TwoPassCycle, "run", run_but_once)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    launch = device.Cycle.launch
    monkeypatch.setattr(device.Cycle, "launch", lambda self, pool, timed: launch(self, "a pool", timed))
    assert model.generate(PROMPT, tree_nodes=0, max_new_tokens=4).stats.finish_reason == "interrupted"
    assert model.generate(PROMPT, tree_nodes=0, max_new_tokens=4).token_ids == want and len(calls) == 3


def test_a_surplus_cycle_leaves_cache_and_state(model):
    _, cycles = both(model, strategy="two-pass", block_size=3)
    cache, (cycle,) = model.spare_cache, cycles._cycles.values()
    before = cache.keys.clone(), cache.values.clone(), cycles._state.clone()
    with torch.inference_mode():
        end = cycle.launch(cycles._pool)()
    assert end.finished and not end.run.tokens
    for old, new in zip(before, (cache.keys, cache.values, cycles._state), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


def test_measuring_costs_changes_nothing(model, monkeypatch):
    """As on a GPU: cycles of three kinds, captured and then timed in turn, behind them the first text."""
    settings = {"strategy": "auto", "block_size": 4, "temperature": 0.8, "tree_nodes": "auto"}
    (host, _), cycles = both(model, **settings)
    watched = model.spare_cache.keys, model.spare_cache.values, cycles._state
    shape = one_pass.Shape.of(4, "auto")
    of = {1: PLAIN, 16: 15, shape.nodes + 1: ONE_PASS}
    kinds, launch, launched, before = tuple(of.values()), device.Cycle.launch, [], []

    def noted(self, pool, timed=False):
        before[:] = before or [t.clone() for t in watched]
        kind = of[len(self.choices)]
        read = launch(self, None if DEVICE == "cpu" else pool, timed)  # a CPU captures nothing
        launched.append((kind, timed))

        def end():
            found = read()
            if len(launched) <= 3 * len(kinds):
                assert found.finished and not found.run.tokens
            assert DEVICE == "cpu" or not timed or found.milliseconds > 0
            return replace(found, milliseconds=4.0 + kind if timed else None)

        return end

    def measured(*given):
        found = measured_costs(*given)
        for old, new in zip(before, watched, strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
        assert found == {kind: 4.0 + kind for kind in kinds}
        return found

    measured_costs = device.measured_costs
    monkeypatch.setattr(costs, "ROUNDS", 1), monkeypatch.setattr(costs, "AWAKE", 0.0)
    monkeypatch.setattr(device, "KINDS", kinds), monkeypatch.setattr(device, "measured_costs", measured)
    monkeypatch.setattr(device.Cycle, "launch", noted)
    monkeypatch.setattr(cycles, "_pool", cycles._pool or "a pool")
    cycles.budgets.clear()
    for _ in "01":
        again = model.generate(**DEFAULTS | settings)
        assert again.token_ids == host.token_ids and again.logprobs == host.logprobs
        assert cycles._state[2:].tolist() == [0, 1], "decoded here, to the end"
    assert launched[:9] == [(k, False) for k in kinds for _ in "01"] + [(k, True) for k in kinds]
    assert len(launched) > 9 and all(timed for _, timed in launched[9:]), "measured once"


def test_damaged_logits_are_said(model, monkeypatch):
    damaged = small_model("float32", backend="triton", device=DEVICE, num_hidden_layers=1)
    damaged.use_graphs = damaged.use_cycles = True
    prefill = damaged.prefill

    def then_damage(*args, **kwargs):
        logits = prefill(*args, **kwargs).clone()
        damaged.norm.fill_(float("nan"))
        return logits

    monkeypatch.setattr(damaged, "prefill", then_damage)
    with pytest.raises(InputError, match="NaN or infinite"):
        damaged.generate(PROMPT, tree_nodes=0, max_new_tokens=4)


@pytest.mark.parametrize(
    "strategy, tree_nodes, settings",
    [("two-pass", 0, {}), ("two-pass", 0, {"temperature": 0.8}), ("two-pass", 6, {"temperature": 0.8}),
     ("one-pass", 4, {"temperature": 0.8, "top_p": 0.9})],
)  # fmt: skip
def test_a_damaged_drafter_leaves_the_text_alone(model, strategy, tree_nodes, settings):
    """Its tokens and its scores are NaN, and ids made of them still lie in the vocabulary."""
    damaged = small_model("float32", backend="triton", device=DEVICE, num_hidden_layers=1, **HEADS)
    damaged.layers[0].diffusion.qkv[3, 3] = float("nan")
    settings = settings | {"max_new_tokens": 4, "block_size": 4}
    plain = plainly(model, **settings)
    (host, on_device), cycles = both(damaged, strategy=strategy, tree_nodes=tree_nodes, **settings)
    assert on_device.token_ids == host.token_ids == plain.token_ids
    assert on_device.logprobs == host.logprobs == plain.logprobs and len(cycles) >= 1


def test_the_cache_holds_what_plain_decoding_commits(model):
    (host, _), _ = both(model, strategy="two-pass", block_size=3)
    cache, n = model.spare_cache, len(PROMPT) + len(host.token_ids) - 1
    model.use_graphs = False
    plain = model.new_cache(n)
    model.prefill([*PROMPT, *host.token_ids[:-1]], plain)
    assert cache.lengths == [n]
    assert torch.equal(cache.keys[:, :, :, :n], plain.keys) and torch.equal(
        cache.values[:, :, :, :n], plain.values
    )


def test_a_stopped_text_leaves_the_cache_usable(model):
    """Ended by the caller with a cycle in flight, then another text from the same cache."""
    model.use_graphs, model.use_cycles, model.spare_cache = True, True, None
    whole = model.generate(PROMPT, tree_nodes=0, max_new_tokens=4, seed=1)
    calls = []
    cut = model.generate(
        PROMPT, tree_nodes=0, max_new_tokens=4, seed=1, on_tokens=lambda *a: calls.append(a) or len(calls) < 2
    )
    assert cut.stats.finish_reason == "callback" and cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert model.generate(PROMPT, tree_nodes=0, max_new_tokens=4, seed=1).token_ids == whole.token_ids


@pytest.mark.parametrize(
    "tree_nodes, settings",
    [(1, {}), (6, {}), (6, {"temperature": 0.8}), (4, {"temperature": 0.8, "top_k": 5}),
     (4, {"logit_bias": {9: 2.0}})],
    ids=str,
)  # fmt: skip
def test_trees(model, settings, tree_nodes):
    """Grown on the device: the text of plain decoding, and cycles of the host's trees."""
    plain = plainly(model, **settings)
    (host, on_device), cycles = both(model, strategy="two-pass", tree_nodes=tree_nodes, **settings)
    for result in (host, on_device):
        assert result.token_ids == plain.token_ids and result.logprobs == plain.logprobs
    assert {key[0] for key in cycles._cycles} == {tree_nodes}
    assert on_device.stats.nodes == tree_nodes * on_device.stats.cycles
    assert on_device.stats.accepted_histogram == host.stats.accepted_histogram


@pytest.mark.parametrize(
    "tree_nodes, rows, corrected, settings",
    [(4, 192, True, {}), (6, 16, False, {}), (0, 192, False, {"temperature": 0.8}),
     (4, 14, True, {"temperature": 0.8, "top_k": 5}), (3, 192, False, {"logit_bias": {9: 2.0}})],
    ids=str,
)  # fmt: skip
def test_one_pass(model, monkeypatch, tree_nodes, rows, corrected, settings):
    """A block at every node, or at two: the text of plain decoding, and as many tokens in each cycle as in
    the host's loop, misses too."""
    monkeypatch.setattr(one_pass, "MOST_ROWS", rows)
    plain = plainly(model, max_new_tokens=9, **settings)
    kept = []
    with corrected_by(model, 3) if corrected else nullcontext():
        (host, on_device), cycles = both(
            model, strategy="one-pass", tree_nodes=tree_nodes, block_size=5, max_new_tokens=9,
            on_tokens=lambda ids, text: kept.append(len(ids)), **settings,
        )  # fmt: skip
    for result in (host, on_device):
        assert result.token_ids == plain.token_ids and result.logprobs == plain.logprobs
    assert {key[0] for key in cycles._cycles} == {ONE_PASS}
    ends = list(accumulate(kept))  # of the loop's cycles, then of the device's
    loop, cycle = ends[: ends.index(9)], [end - 9 for end in ends[ends.index(9) + 1 :]]
    # with fewer tokens left than a tree is deep, the loop's is less deep
    assert [end for end in loop if end <= 5] == [end for end in cycle if end <= 5]
    assert on_device.stats.forwards == 1 + on_device.stats.cycles and "one-pass" in on_device.stats.cycles_of


def test_a_draft_is_not_taken_into_another_text(model):
    """The second text begins where the first one, ended by its caller, has left a draft behind: every
    proposal of it would be right there."""
    settings = DEFAULTS | {"strategy": "one-pass", "tree_nodes": 4, "block_size": 5, "logit_bias": {9: 99.0}}
    model.use_graphs, model.use_cycles, model.spare_cache = True, True, None
    texts = iter([True, False])
    model.generate(**settings | {"max_new_tokens": 12}, on_tokens=lambda ids, text: next(texts))
    (draft,) = model.spare_cache.cycles._drafts.values()
    at = int(draft.at)
    assert at > 0 and (draft.ids[:, 0] == 9).all(), "a draft is left"
    kept = []
    stats = model.generate(
        **settings | {"prompt_ids": [5] * at, "max_new_tokens": 3},
        on_tokens=lambda ids, text: kept.append(len(ids)),
    ).stats
    assert kept == [1, 1, 1] and stats.nodes == 4, "the prefill's token, one without a draft, one with"


def test_other_tables_have_cycles_of_their_own(model):
    """A correction that comes or goes while the cache lives."""
    settings = DEFAULTS | {"strategy": "one-pass", "tree_nodes": 2, "block_size": 4, "max_new_tokens": 4}
    model.use_graphs, model.use_cycles, model.spare_cache = True, True, None
    plain = model.generate(**settings)
    with corrected_by(model, 2):
        corrected = model.generate(**settings)
    assert model.generate(**settings).stats.accepted_histogram == plain.stats.accepted_histogram
    assert corrected.token_ids == plain.token_ids
    assert {len(draft.scores.shape) for draft in model.spare_cache.cycles._drafts.values()} == {2, 3}


@pytest.mark.parametrize(("strategy", "rows"), [("one-pass", 7), ("auto", 8)])
def test_blocks_of_one_pass_cycles(model, strategy, rows, monkeypatch):
    """As long as asked for; beside others as short as they are best."""
    wide = type(model.config)(**{**vars(model.config), "block_size": 16})
    monkeypatch.setattr(model, "config", wide)
    monkeypatch.setattr(one_pass, "NODES", 2)
    monkeypatch.setattr(Budget, "next", lambda self: ONE_PASS)
    model.use_graphs, model.use_cycles, model.spare_cache = True, True, None
    block = {"block_size": 7} if strategy == "one-pass" else {}
    model.generate(**DEFAULTS | {"strategy": strategy, "tree_nodes": "auto", "max_new_tokens": 3} | block)
    assert {key[2].block for key in model.spare_cache.cycles._cycles if key[0] == ONE_PASS} == {rows}


def test_a_budget_changes_the_kind_of_cycle(model, monkeypatch):
    """Plain, two-pass and one-pass cycles in one text, each in its turn; a one-pass cycle behind another kind
    has no draft."""
    plain = plainly(model, max_new_tokens=12)
    turns = iter([15, PLAIN, ONE_PASS, ONE_PASS, 15, ONE_PASS] * 9)
    monkeypatch.setattr(Budget, "next", lambda self: next(turns))
    observed = []
    monkeypatch.setattr(Budget, "observe", lambda self, known: observed.append(known))
    model.use_graphs, model.use_cycles, model.spare_cache = True, True, None
    settings = DEFAULTS | {"strategy": "auto", "tree_nodes": "auto", "block_size": 5, "max_new_tokens": 12}
    on_device = model.generate(**settings)
    cycles = model.spare_cache.cycles
    assert on_device.token_ids == plain.token_ids and on_device.logprobs == plain.logprobs
    # the costs of all are measured on a GPU
    assert {key[0] for key in cycles._cycles} == ({15, PLAIN, ONE_PASS} if DEVICE == "cpu" else set(KINDS))
    of = on_device.stats.cycles_of
    assert set(of) == {"plain", "two-pass", "one-pass"} and sum(of.values()) == on_device.stats.cycles
    assert on_device.stats.forwards == 1 + on_device.stats.cycles + of["two-pass"]
    assert observed[1:3] == [{PLAIN: 1}, {}] and list(observed[3]) == [ONE_PASS]


@pytest.mark.skipif(DEVICE != "cpu", reason="blocks of 8 keys, too few for a compiled dot")
@pytest.mark.parametrize("strategy", ["two-pass", "one-pass"])
def test_a_tree_walks_past_a_key_segment(model, monkeypatch, strategy):
    """Over several segments; blocks deep enough for two tiles on a path."""
    short_segments(monkeypatch, folded=8)  # tiles of 4 rows
    (host, on_device), cycles = both(
        model,
        strategy=strategy,
        tree_nodes=12 if strategy == "two-pass" else 5,
        prompt_ids=list(range(5, 15)),
        max_new_tokens=5 if strategy == "two-pass" else 4,
    )
    assert on_device.token_ids == host.token_ids and on_device.logprobs == host.logprobs
    assert len(cycles._cycles) == 1


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
