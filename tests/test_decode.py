"""Decoding with a scripted model: every strategy gives plain decoding's tokens whatever the drafter proposes,
and counts honestly.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plainly import plainly
from scripted import ScriptedModel
from small import small_config, small_model

from qwen3_model import Engine, InputError, Request
from qwen3_model.decode import one_pass
from qwen3_model.decode.kinds import LOOKUP_ROWS

SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 0.8, 1.5]),
        "top_k": st.sampled_from([0, 1, 5]),
        "top_p": st.sampled_from([1.0, 0.8, 0.3]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "logit_bias": st.dictionaries(
            st.integers(0, 30), st.sampled_from([-5.0, 3.0, float("-inf")]), max_size=3
        ),
    },
)


CASES = {
    "prompt": st.lists(st.integers(0, 96), min_size=1, max_size=6),
    "settings": SETTINGS,
    "skill": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    "n": st.integers(1, 30),
    "seed": st.integers(0, 2**64 - 1),
    "world": st.integers(0, 50),
}


@given(**CASES, block=st.integers(3, 8), nodes=st.sampled_from(["auto", 0, 1, 5, 12]))
def test_one_pass_equals_plain_decoding(prompt, settings, skill, n, seed, block, nodes, world):
    """Whatever ends the tree has, and whether a block stands at the one the walk takes."""
    model = ScriptedModel(small_config(), skill, seed=world)
    plain = model.generate(prompt, strategy="autoregressive", max_new_tokens=n, seed=seed, **settings)
    drafted = model.generate(prompt, strategy="one-pass", max_new_tokens=n, seed=seed, block_size=block,
                             tree_nodes=nodes, **settings)  # fmt: skip
    assert drafted.token_ids == plain.token_ids and drafted.logprobs == plain.logprobs
    assert drafted.stats.forwards == 1 + drafted.stats.cycles == len(model.passes)
    assert all(len(p) <= one_pass.MOST_ROWS and p.n_ar <= max(13, one_pass.NODES + 1) for p in model.passes)
    assert drafted.stats.finish_reason == plain.stats.finish_reason


def test_one_pass_of_a_perfect_drafter_and_of_a_hopeless_one():
    """Blocks of 8 give chains of 6 and a bonus token; the first pass has nothing to verify."""
    model, runs = ScriptedModel(small_config(eos_token_ids=()), skill=1.0), []
    settings = {"max_new_tokens": 1 + 1 + 4 * 7, "strategy": "one-pass", "tree_nodes": 0}
    stats = model.generate([1], on_run=lambda run, kept: runs.append(run), **settings).stats
    assert stats.accepted_histogram == [1, 0, 0, 0, 0, 0, 4] and stats.forwards == 6
    assert [run.nodes for run in runs] == [0, 0, 6, 6, 6, 6]
    assert [p.n_ar for p in model.passes] == [1, 7, 7, 7, 7, 7], "the prompt, then passes of one shape"
    assert len(set(model.passes[1].blocks)) == 1 + 7, "a block at every node"
    hopeless = ScriptedModel(small_config(eos_token_ids=()), skill=0.0)
    assert hopeless.generate([1], max_new_tokens=33, strategy="one-pass").stats.tokens_per_cycle < 1.3


def test_a_walk_that_ends_where_no_block_stands_goes_on_with_the_root(monkeypatch):
    """Blocks at the root and at the least likely node: the text stays, and behind a miss nothing
    is verified."""
    runs, settings = [], {"max_new_tokens": 40, "strategy": "one-pass", "tree_nodes": 5}
    model = ScriptedModel(small_config(eos_token_ids=()), skill=0.9)
    want = model.generate([1], **settings)
    ends = lambda parents, scores, count: [0] + [len(parents) - 1] * (count - 1)  # noqa: E731
    monkeypatch.setattr("orthrus_kernels.blocks.choose_anchors", ends)
    got = model.generate([1], on_run=lambda run, kept: runs.append(run), **settings)
    assert got.token_ids == want.token_ids and got.stats.forwards > want.stats.forwards
    assert {run.nodes for run in runs if run.kind == "one-pass"} == {0, 5}


@given(**CASES, again=st.integers(1, 3), view=st.booleans())
def test_lookup_equals_plain_decoding(prompt, settings, n, seed, world, skill, again, view):
    """With a diffusion view that it does not ask, or without one; one pass a cycle."""
    changes = {} if view else {"block_size": 0, "mask_token_id": None}
    model, prompt = ScriptedModel(small_config(**changes), skill, seed=world), prompt * again
    plain = model.generate(prompt, strategy="autoregressive", max_new_tokens=n, seed=seed, **settings)
    for strategy in ("lookup",) if view else ("lookup", "auto"):
        drafted = model.generate(prompt, strategy=strategy, max_new_tokens=n, seed=seed, **settings)
        assert drafted.token_ids == plain.token_ids and drafted.logprobs == plain.logprobs
        assert drafted.stats.forwards == 1 + drafted.stats.cycles == len(model.passes)
        assert {(len(p), p.n_ar) for p in model.passes[1:]} <= {(1, 1), (LOOKUP_ROWS, LOOKUP_ROWS)}
        assert drafted.stats.finish_reason == plain.stats.finish_reason


def test_a_text_that_repeats_fills_every_chain():
    """A bias makes every choice the same token."""
    model, how = ScriptedModel(small_config(eos_token_ids=())), {"strategy": "lookup", "max_new_tokens": 33}
    loop = model.generate([1, 7, 7], logit_bias={7: 99.0}, **how)
    assert loop.token_ids == [7] * 33 and loop.stats.accepted_histogram == [0] * 15 + [2]


@given(**CASES, block=st.integers(2, 8))
def test_two_pass_equals_plain_decoding(prompt, settings, skill, n, seed, block, world):
    model = ScriptedModel(small_config(), skill, seed=world)
    plain = model.generate(prompt, strategy="autoregressive", max_new_tokens=n, seed=seed, **settings)
    drafted = model.generate(
        prompt, strategy="two-pass", max_new_tokens=n, seed=seed, block_size=block, **settings
    )
    assert drafted.token_ids == plain.token_ids and drafted.logprobs == plain.logprobs
    assert drafted.stats.finish_reason == plain.stats.finish_reason
    for stats in (plain.stats, drafted.stats):
        assert stats.tokens == len(plain.token_ids) == 1 + stats.cycle_tokens
        assert sum(stats.accepted_histogram) == stats.cycles
        assert sum(i * c for i, c in enumerate(stats.accepted_histogram)) == stats.cycle_tokens - stats.cycles
        shares = stats.time_shares
        assert sum(shares.values()) == pytest.approx(1.0 if stats.cycles else 0.0) and shares["verify"] >= 0
    assert plain.stats.time_shares["verify"] == (1.0 if plain.stats.cycles else 0.0)
    assert plain.stats.forwards == len(plain.token_ids) and plain.stats.tokens_per_forward == 1.0
    assert drafted.stats.cycles + 1 <= drafted.stats.forwards <= 1 + 2 * drafted.stats.cycles


def test_a_perfect_drafter_fills_every_block_and_a_hopeless_one_adds_nothing():
    perfect = ScriptedModel(small_config(eos_token_ids=()), skill=1.0).generate(
        [1], max_new_tokens=33, strategy="two-pass", tree_nodes=0
    )
    assert perfect.stats.cycles == 4 and perfect.stats.accepted_histogram == [0] * 7 + [4]
    assert perfect.stats.forwards == 9 and perfect.stats.tokens_per_cycle == 8.0
    hopeless = ScriptedModel(small_config(eos_token_ids=()), skill=0.0).generate(
        [1], max_new_tokens=33, strategy="two-pass", tree_nodes=0
    )
    assert hopeless.stats.tokens_per_cycle < 1.2


def test_passes_have_one_shape_until_one_token_is_left():
    model = ScriptedModel(small_config(eos_token_ids=()), skill=1.0)
    model.generate([1], max_new_tokens=11, strategy="two-pass", tree_nodes=0)
    assert [(len(p), p.n_ar) for p in model.passes] == [(1, 1), (8, 0), (8, 8), (8, 0), (8, 8)]
    model.generate([1], max_new_tokens=2, strategy="two-pass", tree_nodes=0)
    assert [(len(p), p.n_ar) for p in model.passes] == [(1, 1), (1, 1)], "one token left: a plain pass"


def test_end_token_inside_an_accepted_run():
    model = ScriptedModel(small_config(eos_token_ids=()), skill=1.0)
    free = model.generate([1], max_new_tokens=20, strategy="two-pass").token_ids
    end = free[3]
    stopped = ScriptedModel(small_config(eos_token_ids=(95, end)), skill=1.0).generate(
        [1], max_new_tokens=20, strategy="two-pass", tree_nodes=0
    )
    assert stopped.token_ids == free[: free.index(end) + 1] and stopped.stats.finish_reason == "end_token"
    assert stopped.stats.cycle_tokens == len(stopped.token_ids) - 1 and len(stopped.logprobs) == len(
        stopped.token_ids
    )


def test_callback_sees_runs_and_may_stop():
    runs = []
    model = ScriptedModel(small_config(eos_token_ids=()), skill=1.0)
    result = model.generate(
        [1],
        strategy="two-pass",
        max_new_tokens=40,
        on_tokens=lambda ids, text: runs.append(ids) or len(runs) < 3,
    )
    assert [len(r) for r in runs] == [1, 8, 8] and sum(runs, []) == result.token_ids
    assert result.stats.finish_reason == "callback"


def test_ctrl_c_keeps_what_was_decoded():
    model = ScriptedModel(small_config(eos_token_ids=()), skill=1.0)
    whole = model.generate([1], strategy="two-pass", max_new_tokens=40).token_ids
    model.interrupt_after = 3
    result = model.generate([1], strategy="two-pass", max_new_tokens=40)
    assert result.stats.finish_reason == "interrupted" and result.token_ids == whole[:9]
    assert result.stats.cycles == 1 and len(result.logprobs) == 9
    with pytest.raises(KeyboardInterrupt):
        result.whole()
    model.interrupt_after = 99
    whole = model.generate([1], max_new_tokens=4)
    assert whole.whole() is whole


def test_ctrl_c_in_the_callback_leaves_everything_in_step():
    runs = []

    def interrupt(ids, text):
        runs.append(ids)
        if len(runs) == 3:
            raise KeyboardInterrupt

    model = ScriptedModel(small_config(eos_token_ids=()), skill=1.0)
    result = model.generate([1], strategy="two-pass", max_new_tokens=40, on_tokens=interrupt)
    assert [len(run) for run in runs] == [1, 8, 8] and result.token_ids == sum(runs, [])
    assert len(result.logprobs) == len(result.token_ids) == 1 + result.stats.cycle_tokens
    assert result.stats.cycles == 2 and result.stats.finish_reason == "interrupted"


def test_texts_take_turns_and_a_cancelled_one_leaves_the_engine():
    """Submitted together, each has the text that it has alone; the engine goes on behind a cancelled one."""
    model = ScriptedModel(small_config(eos_token_ids=()), skill=0.7)
    engine, request = Engine(model), Request(max_new_tokens=12, seed=4, temperature=0.8)
    alone = [engine.generate([1, n], request).token_ids for n in range(4)]
    first, second, third, fourth = (engine.submit([1, n], request) for n in range(4))
    assert engine.step() == (first,) and not first.finished
    with pytest.raises(InputError, match="has not ended"):
        first.result()
    engine.cancel(first)
    engine.cancel(third)
    while engine.step():
        pass
    assert second.result().token_ids == alone[1] and fourth.result().token_ids == alone[3]
    cut = first.result()
    assert cut.stats.finish_reason == "cancelled" and cut.token_ids == alone[0][: len(cut.token_ids)] != []
    assert third.result().token_ids == [] and engine.step() == ()


def test_an_error_ends_the_text_whose_step_it_was():
    """And no other: those that wait keep their place, and what a callback has started goes on."""
    model = ScriptedModel(small_config(eos_token_ids=()), skill=0.7)
    engine, request = Engine(model), Request(max_new_tokens=9)
    want, seen = engine.generate([1], request).token_ids, []
    with pytest.raises(ZeroDivisionError):
        engine.generate([1], request, lambda ids, text: 1 / 0)
    assert engine.generate([1], request).token_ids == want
    first = engine.submit([1], request, lambda ids, text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate([1], request, lambda ids, text: seen.append(ids))
    assert first.finished and first.result().stats.finish_reason == "error" and not seen
    assert engine.generate([1], request).token_ids == want and not seen, "its own text is not left behind"

    def starts_the_next_and_fails(ids, text):
        engine.cancel(failing)
        engine.step()
        raise ZeroDivisionError

    failing = engine.submit([1], request, starts_the_next_and_fails)
    following = engine.submit([1], request)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    while not following.finished:
        assert engine.step() == (following,)
    assert following.result().token_ids == want
    waiting = engine.submit([1], request)
    engine.cancel(waiting, "")
    assert waiting.result().stats.finish_reason == "cancelled" and waiting.result().stats.seconds == 0
    with pytest.raises(InputError, match="a Request was expected"):
        engine.submit([1], {"max_new_tokens": 3})


def test_infinite_logits_are_reported(monkeypatch):
    model = ScriptedModel(small_config())
    monkeypatch.setattr(model, "target", lambda text: torch.full((97,), float("inf")))
    with pytest.raises(InputError, match="NaN or infinite"):
        model.generate([1], max_new_tokens=3)


def test_seed_is_drawn_and_returned():
    model = ScriptedModel(small_config())
    first = model.generate([1], temperature=1.0, max_new_tokens=20)
    again = model.generate([1], temperature=1.0, max_new_tokens=20, seed=first.stats.seed)
    assert again.token_ids == first.token_ids
    others = {
        tuple(model.generate([1], temperature=1.0, max_new_tokens=20, seed=s).token_ids) for s in range(5)
    }
    assert len(others) > 1


def test_max_new_tokens_defaults_to_the_context():
    model = ScriptedModel(small_config(eos_token_ids=(), max_position_embeddings=20))
    for strategy in ("autoregressive", "two-pass"):
        result = model.generate([1, 2, 3], strategy=strategy)
        assert len(result.token_ids) == 17 and result.stats.finish_reason == "length"


@pytest.mark.parametrize(
    "temperature, dtype",
    [
        (0.0, "float32"),
        (0.8, "bfloat16"),
        pytest.param(0.0, "bfloat16", marks=pytest.mark.slow),
        pytest.param(0.8, "float32", marks=pytest.mark.slow),
    ],
)
def test_real_model_every_strategy_bit_for_bit(temperature, dtype):
    """Across the first key cut; log-probabilities equal as floats, so the logits' bits are. The prompt lacks
    most tokens, so that the penalty has to see what was decoded. What a strategy wrote into the pages is
    overwritten: it would stand in for keys of the same text that the next one does not commit."""
    model = small_model(dtype, eos_token_ids=())
    prompt = torch.randint(0, 30, (230,), generator=torch.Generator().manual_seed(4)).tolist()
    settings = {"max_new_tokens": 60, "temperature": temperature, "seed": 3, "repetition_penalty": 1.5}
    plain = plainly(model, prompt, **settings)
    for strategy, nodes in (("autoregressive", 0), ("two-pass", 0), ("two-pass", 7), ("one-pass", 3)):
        found = model.generate(prompt, strategy=strategy, tree_nodes=nodes, **settings)
        assert (found.token_ids, found.logprobs) == plain, strategy
        assert model.engine.runner is not None
        with torch.inference_mode():
            for pool in (model.engine.runner.cache.keys, model.engine.runner.cache.values):
                pool.fill_(3.0)


BAD = [
    ([], {}, "prompt is empty"),
    ([97], {}, "token id 97"),
    ([-1], {}, "token id -1"),
    ([1] * 1024, {}, "shorten the prompt"),
    ([1] * 1000, {"max_new_tokens": 25}, "at most 24 new tokens"),
    ([1], {"max_new_tokens": 0}, "at least 1"),
    ([1], {"strategy": "tree"}, "unknown strategy"),
    ([1], {"temperature": -1.0}, "temperature"),
    ([1], {"top_p": 0.0}, "top_p"),
    ([1], {"top_p": 1.5}, "top_p"),
    ([1], {"top_k": -2}, "top_k"),
    ([1], {"min_p": 2.0}, "min_p"),
    ([1], {"repetition_penalty": 0.0}, "repetition_penalty"),
    ([1], {"seed": -1}, "seed"),
    ([1], {"seed": 1.5}, "seed"),
    ([1], {"temperature": 1e-40}, "temperature"),
    ([1], {"temperature": None}, "temperature|not supported"),
    ([1], {"repetition_penalty": 1e-300}, "repetition_penalty"),
    ([1], {"max_new_tokens": 4.5}, "whole number"),
    (["def"], {}, "token ids"),
    ([1], {"stop": [b"x"]}, "a list of strings was expected"),
    ([1], {"logit_bias": dict.fromkeys(range(97), float("-inf"))}, "bans every token"),
    ([1], {"logit_bias": {97: 1.0}}, "logit_bias names token 97"),
    ([1], {"stop": ["x"]}, "need a tokenizer"),
    ([1], {"stop": ""}, "stop string is empty"),
    ([1], {"block_size": 1}, "takes 2 to 8"),
    ([1], {"block_size": 9}, "takes 2 to 8"),
]


@pytest.mark.parametrize(("prompt", "settings", "message"), BAD, ids=[m for _, _, m in BAD])
def test_impossible_requests_get_one_line(prompt, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        ScriptedModel(small_config()).generate(prompt, **settings)
    assert "\n" not in str(caught.value)


def test_two_pass_on_a_plain_qwen3():
    """What auto drafts there, it looks up."""
    plain = ScriptedModel(small_config(block_size=0, mask_token_id=-1))
    stats = plain.generate([1], max_new_tokens=9, tree_nodes=5).stats
    assert stats.strategy == "auto" and "lookup" in stats.cycles_of and len(plain.passes) == stats.forwards
    with pytest.raises(InputError, match="plain Qwen3 without a diffusion view"):
        plain.generate([1], strategy="two-pass", max_new_tokens=3)


def test_nan_logits_are_reported():
    model = small_model()
    model.norm.fill_(float("nan"))
    with pytest.raises(InputError, match="logits are NaN"):
        model.generate([1, 2], max_new_tokens=3)
