"""Many texts in one engine: each has the tokens and log-probabilities that it has alone, whoever runs beside
it, whatever is drafted, however few pages there are."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from inputs import examples
from scripted import ScriptedModel
from small import small_config, small_model

from orthrus_kernels import PAGE, pages_for
from qwen3_model import Engine, InputError, Request
from qwen3_model.decode import controller, groups, one_pass
from qwen3_model.decode.cycle import Cycle


def possible(settings):
    """Blocks of one-pass have three rows at least, and texts no fewer tokens than they must have."""
    if "min_tokens" in settings:
        settings["min_tokens"] = min(settings["min_tokens"], settings["max_new_tokens"])
    if settings.get("strategy") == "one-pass" and "block_size" in settings:
        settings["block_size"] = max(settings["block_size"], 3)
    return settings


SETTINGS = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 25), "seed": st.integers(0, 2**64 - 1)},
    optional={
        "strategy": st.sampled_from(["autoregressive", "lookup", "two-pass", "one-pass", "auto"]),
        "tree_nodes": st.sampled_from(["auto", 0, 3, 12]),
        "block_size": st.integers(2, 8),
        "min_tokens": st.integers(1, 20),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.lists(st.integers(0, 30), max_size=16),
        "temperature": st.sampled_from([0.0, 0.8, 1.5]),
        "top_k": st.sampled_from([0, 5]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.7, -0.3]),
        "presence_penalty": st.sampled_from([0.0, 1.5]),
        "logit_bias": st.dictionaries(st.integers(0, 30), st.sampled_from([-5.0, 3.0]), max_size=3),
    },
).map(possible)
TEXTS = st.lists(
    st.tuples(st.lists(st.integers(0, 95), min_size=1, max_size=90), SETTINGS, st.integers(0, 12)),
    min_size=1,
    max_size=12,
)


def engine_of(model, slots, pages, ahead=False):
    """ahead: each cycle is launched before the last is read, as on a GPU."""
    engine = Engine(model, slots, PAGE * pages)
    engine.runner_for(1).ahead = ahead
    return engine


def run_all(engine, texts, cancelled=None):
    """Submit each text before the step that it names, cancel some by step; returns all, ended."""
    waiting, found, steps = sorted(enumerate(texts), key=lambda text: text[1][2]), {}, 0
    while waiting or any(not text.finished for text in found.values()):
        while waiting and waiting[0][1][2] <= steps:
            nth, (prompt, settings, _) = waiting.pop(0)
            found[nth] = engine.submit(prompt, Request(**settings))
        for nth, step in (cancelled or {}).items():
            if step == steps and nth in found:
                engine.cancel(found[nth])
        engine.step()
        steps += 1
        assert steps < 5000
    return [found[nth].result() for nth in range(len(texts))]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_rows_of_an_empty_seat_stay_numbers(backend):
    """Three texts have four seats. Fresh memory is NaN here, and a weight of 0 would not keep that out of a
    sum."""
    engine = Engine(small_model("float32", backend=backend, eos_token_ids=()), 3, PAGE * 6)
    texts = [engine.submit([i, 2, 3], Request(max_new_tokens=4, strategy="two-pass")) for i in range(3)]
    while not all(text.finished for text in texts):
        engine.step()
    assert all(len(text.result().token_ids) == 4 for text in texts)


@examples(40)
@given(
    texts=TEXTS, slots=st.integers(2, 9), spare=st.integers(0, 6), skill=st.sampled_from([0.0, 0.5, 0.95]),
    world=st.integers(0, 9), cancelled=st.dictionaries(st.integers(0, 11), st.integers(0, 30), max_size=3),
    ahead=st.booleans(), chunk=st.sampled_from([50, 2048]), alike=st.sampled_from([0, 70, 140]),
)  # fmt: skip
@example(  # the texts that run change and their number does not
    texts=[([n], {"max_new_tokens": 3, "seed": 1, "strategy": "autoregressive"}, 0) for n in range(10, 14)],
    slots=2, spare=6, skill=0.5, world=0, cancelled={}, ahead=False, chunk=2048, alike=0,
)  # fmt: skip
def test_each_text_has_the_bits_it_has_alone(
    texts, slots, spare, skill, world, cancelled, ahead, chunk, alike
):
    """alike: tokens with which every second text begins."""
    texts = [([5] * (alike * (n % 2)) + prompt, *of) for n, (prompt, *of) in enumerate(texts)]
    model = ScriptedModel(small_config(eos_token_ids=(0, 7, 8, 9)), skill, seed=world)
    pages = max(pages_for(len(prompt) + how["max_new_tokens"]) for prompt, how, _ in texts) + spare
    engine = engine_of(model, slots, pages, ahead)
    engine._scheduler.chunk = chunk
    many = run_all(engine, texts, cancelled)
    for nth, ((prompt, settings, _), result) in enumerate(zip(texts, many, strict=True)):
        alone = model.generate(prompt, **settings | {"strategy": "autoregressive"})
        if result.stats.finish_reason == "cancelled":
            assert nth in cancelled
            n = len(result.token_ids)
            assert result.token_ids == alone.token_ids[:n] and result.logprobs == alone.logprobs[:n]
        else:
            assert (result.token_ids, result.logprobs) == (alone.token_ids, alone.logprobs), nth
            assert result.stats.finish_reason == alone.stats.finish_reason


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1.5}, {"temperature": 0.9, "top_p": 0.9},
     {"frequency_penalty": 0.4, "presence_penalty": -0.2}],
    ids=str,
)  # fmt: skip
def test_a_real_model(settings):
    """Of two layers, on the twins: trees of texts of different lengths in one pass."""
    model = small_model(eos_token_ids=())
    ways = ("two-pass", 12), ("one-pass", 5), ("autoregressive", 0), ("one-pass", 0), ("two-pass", 0)
    texts = []
    for i, (strategy, nodes) in enumerate((*ways, ("auto", "auto"))):
        how = {"max_new_tokens": 12, "seed": i, "strategy": strategy, "tree_nodes": nodes, **settings}
        texts.append((list(range(1, 2 + 18 * i)), how, i))
    many = run_all(engine_of(model, 4, 12), texts)
    for (prompt, how, _), result in zip(texts, many, strict=True):
        alone = model.generate(prompt, **how | {"strategy": "autoregressive"})
        assert (result.token_ids, result.logprobs) == (alone.token_ids, alone.logprobs)


@pytest.mark.parametrize("strategy", ["autoregressive", "lookup", "two-pass", "one-pass"])
def test_a_text_that_goes_on_where_another_ended_reads_its_new_tokens(strategy):
    """A real model: its pages hold keys of prompts, cycles and drafts that were kept; also beside a text that
    has them too, and with a salt of its own."""
    model = small_model(eos_token_ids=())
    how = {"max_new_tokens": 40, "seed": 3, "temperature": 0.8, "strategy": strategy}
    engine, prompt = engine_of(model, 3, 20), [4, 5] * 45
    (first,) = run_all(engine, [(prompt, how, 0)])
    turn = prompt + first.token_ids + [6] * 9
    many = run_all(engine, [(turn, how, 0), (turn[:128], how, 1), (turn, how | {"cache_salt": "x"}, 1)])
    assert [first.stats.cached_tokens, *(result.stats.cached_tokens for result in many)] == [0, 128, 64, 0]
    for ids, result in zip((prompt, turn, turn[:128], turn), (first, *many), strict=True):
        alone = model.generate(ids, **how | {"strategy": "autoregressive"})
        assert (result.token_ids, result.logprobs) == (alone.token_ids, alone.logprobs)
        assert alone.stats.cached_tokens == 0


@pytest.mark.parametrize("ahead, drafts", [
    (False, {"strategy": "two-pass"}), (True, {"strategy": "two-pass"}),
    (True, {"strategy": "one-pass", "tree_nodes": 3}),
])  # fmt: skip
def test_few_pages_preempt_the_youngest_and_change_nothing(ahead, drafts):
    model = ScriptedModel(small_config(eos_token_ids=(), max_position_embeddings=400), skill=0.9)
    engine = engine_of(model, 4, 6, ahead)
    texts = [([i + 1] * 50, {"max_new_tokens": 120, "seed": 3, **drafts}, 0) for i in range(4)]
    many = run_all(engine, texts)
    assert engine.load.preemptions > 0
    for (prompt, how, _), result in zip(texts, many, strict=True):
        assert result.token_ids == model.generate(prompt, **how).token_ids


@pytest.mark.parametrize("ahead, skill", [(False, 1.0), (True, 0.8)])
def test_a_draft_is_found_again_whoever_joins_or_leaves(ahead, skill):
    """Trees and blocks as alone, so every text keeps in each cycle what it keeps alone, though slots are used
    again and seats, their number, the form of the choice and the other strategies beside change."""
    model = ScriptedModel(small_config(eos_token_ids=()), skill)
    forms = {}, {"temperature": 0.8}, {}, {"repetition_penalty": 1.3}, {"logit_bias": {3: 2.0}}, {}, {}
    ours = {"strategy": "one-pass", "tree_nodes": 5, "block_size": 7}
    texts = [
        ([n + 1], ours | how | {"max_new_tokens": 12 + 9 * (n * 3 % 7), "seed": n}, 2 * n)
        for n, how in enumerate(forms)
    ]
    beside = {"strategy": "two-pass", "tree_nodes": 3}, {"strategy": "autoregressive"}
    texts += [([9] * 70, how | {"max_new_tokens": 20}, 5) for how in beside]
    many = run_all(engine_of(model, 5, 20, ahead), texts)
    for (prompt, how, _), result in zip(texts[: len(forms)], many, strict=False):
        alone = model.generate(prompt, **how).stats
        assert result.stats.accepted_histogram == alone.accepted_histogram
        assert set(result.stats.cycles_of) <= {"one-pass", "plain"}
    assert sum(result.stats.tokens_per_cycle for result in many[: len(forms)]) > 1.5 * len(forms)


def test_texts_of_one_pass_share_a_pass_and_others_have_their_own():
    """Two cycles a step at most. The tree and block that are asked for, as far as the rows go."""
    model, runs = ScriptedModel(small_config(eos_token_ids=()), 0.9), {}
    engine = engine_of(model, 6, 20, ahead=True)
    ways = (
        ("one-pass", 2, 5),
        ("two-pass", 4, 6),
        ("one-pass", 9, 6),
        ("autoregressive", 0, 8),
        ("auto", 5, 8),
    )
    for n, (strategy, nodes, block) in enumerate(ways):
        request = Request(strategy=strategy, tree_nodes=nodes, block_size=block, max_new_tokens=20, seed=1)
        found = runs[strategy, nodes] = []
        engine.submit([n + 1], request, on_run=lambda run, kept, found=found: found.append((run, kept)))
    model.passes.clear()
    while engine.step():
        pass
    shape = one_pass.Shape.shared([(5, 2), (6, 9)], 512 // 2)
    assert (shape.nodes, shape.anchors, shape.block) == (9, 10, 5)
    assert {len(rows.contexts) for rows in model.passes if 0 < rows.n_ar < len(rows)} == {1, 2}
    for (strategy, nodes), found in runs.items():
        trees = [run for run, _ in found[:-1] if run.tree is not None]  # the last token has no draft
        assert (strategy == "one-pass") == ({run.kind for run in trees} == {"one-pass"})
        assert all(
            run.nodes in (0, nodes) and [run.choices[i] for i in run.path] == run.tokens for run in trees
        )
        assert len(trees) > 2


@given(
    asked=st.lists(st.tuples(st.integers(3, 64), st.sampled_from(["auto", 0, 1, 19, 255])), min_size=1),
    seats=st.sampled_from([2, 4, 8, 16, 32, 64, 96, 112, 256]),
)
def test_a_shared_shape_fits_the_rows_and_leaves_a_block_and_a_node(asked, seats):
    shape, rows = one_pass.Shape.shared(asked, groups.MOST_ROWS // seats), groups.MOST_ROWS // seats
    assert (shape is None) == (seats > 96)
    if shape is not None:
        assert 1 + shape.nodes + shape.anchors * shape.block <= rows and shape.block >= 3
        assert shape.nodes >= 1 and 1 <= shape.anchors <= shape.nodes + 1
        assert shape.block <= min(block for block, _ in asked)
        if set(asked) == {(8, "auto")} and seats == 2:
            assert shape == one_pass.Shape.of(8, "auto")


def test_texts_of_several_block_sizes_learn_the_times_of_the_cycle_that_they_share():
    """Its blocks are as long as the shortest that is asked for."""
    engine = engine_of(ScriptedModel(small_config(eos_token_ids=()), 0.9), 2, 6)
    texts = [engine.submit([1, 2], Request(max_new_tokens=20, block_size=rows)) for rows in (3, 8)]
    while not any(text.finished for text in texts):
        engine.step()
    cycles = engine.runner.cycles
    assert {block for _, block, seats in cycles._times_of if seats == 2} == {3}


@pytest.mark.parametrize("ahead", [False, True])
def test_an_engine_of_one_slot_steps_through_all_texts(ahead):
    """The cycle that is in flight when a text ends is no step of its own."""
    model = ScriptedModel(small_config(eos_token_ids=()), skill=0.7)
    for engine in (Engine(model), engine_of(model, 1, 4)):
        engine.runner_for(40).ahead = ahead
        texts = [engine.submit([1, n], Request(max_new_tokens=9, strategy="two-pass")) for n in range(4)]
        while engine.step():
            pass
        assert [len(text.result().token_ids) for text in texts] == [9] * 4


def test_a_text_that_can_never_fit_is_refused_with_its_size():
    engine = engine_of(ScriptedModel(small_config()), 2, 3)
    with pytest.raises(InputError, match="213 tokens, 4 pages of 64.*3 pages, 192 tokens"):
        engine.submit([1] * 13, Request(max_new_tokens=200))
    assert engine.step() == ()


def test_what_cannot_run_beside_others_is_refused_by_name():
    settings = {"strategy": "two-pass", "verify": "rejection", "temperature": 1.0}
    with pytest.raises(InputError, match="rejection.* runs alone"):
        Engine(ScriptedModel(small_config()), 2, 640).submit([1], Request(**settings))


def test_settings_of_the_engine_are_checked():
    model = ScriptedModel(small_config())
    for slots, tokens in ((0, None), (257, None), ("2", None), (2, 0), (2, 1.5)):
        with pytest.raises(InputError, match="was expected"):
            Engine(model, slots, tokens)


def test_generate_many_reads_prompts_as_they_are_needed_and_keeps_their_order():
    """Each result is that of `generate`; the model lives as long as the iterator does."""
    read, model = [], small_model(eos_token_ids=())
    prompts = [[1] * 5, [2] * 70, [3], [4, 5], [6] * 9, [7], [8]]
    how = {"seed": 2, "temperature": 0.8, "max_new_tokens": 5}
    alone = [model.generate(prompt, **how).token_ids for prompt in prompts]

    def source():
        for prompt in prompts:
            read.append(prompt)
            yield prompt

    found = model.generate_many(source(), slots=2, cache_tokens=512, **how)
    del model
    assert next(found).token_ids == alone[0] and len(read) < len(prompts)
    assert [result.token_ids for result in found] == alone[1:]


def test_generate_many_checks_a_list_before_the_first_pass():
    model, cache = small_model(), {"slots": 2, "cache_tokens": 130}
    model.states = None
    for prompts, settings, says in (
        ([[1], [2, 400]], {}, "prompt 1: .*400"), ([[1], []], {}, "prompt 1: .*empty"),
        ([[1], [2] * 150], {"max_new_tokens": 43}, "prompt 1: .*193 tokens, 4 pages.*3 pages"),
        (5, {}, "prompts is 5"),
        ([[1]], {"verify": "rejection", "temperature": 1.0}, "prompt 0: .*runs alone"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            model.generate_many(prompts, **{"max_new_tokens": 4} | settings, **cache)
    with pytest.raises(InputError, match="slots is 0"):
        model.generate_many([[1]], slots=0)


def test_generate_many_that_is_left_or_interrupted_leaves_nothing_running(monkeypatch):
    model = small_model(eos_token_ids=())
    for _ in model.generate_many([[1], [2], [3]], slots=2, cache_tokens=512, max_new_tokens=4):
        break
    engine = model.engine_of(2, 512)
    assert not engine._scheduler
    work, calls = Engine._work, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return work(self)

    monkeypatch.setattr(Engine, "_work", interrupted)
    found = list(model.generate_many([[1]] * 9, slots=2, cache_tokens=512, max_new_tokens=50))
    assert {result.stats.finish_reason for result in found} == {"interrupted"} and len(found) == 4
    assert not engine._scheduler


def test_an_error_of_a_pass_ends_the_texts_that_run_and_says_why(monkeypatch):
    """Also one of a cache that does not fit; the engine goes on behind it."""
    model = small_model(eos_token_ids=())

    def too_large(*given):
        raise InputError("no memory")

    model.new_cache = too_large
    (result,) = model.generate_many([[1]], slots=1)
    assert (result.stats.finish_reason, result.error) == ("error", "no memory")
    del model.new_cache
    engine = model.engine_of(2, 512)
    texts = [engine.submit([n], Request(max_new_tokens=9)) for n in (1, 2, 3)]
    while len(texts[1].tokens) < 3:
        engine.step()
    with pytest.raises(InputError, match="have not ended"):
        engine.forget()
    read = engine.runner.cycles.read
    monkeypatch.setattr(engine.runner.cycles, "read", lambda launched: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    monkeypatch.setattr(engine.runner.cycles, "read", read)
    while engine.step():
        pass
    assert [text.result().stats.finish_reason for text in texts] == ["error", "error", "length"]


@pytest.mark.parametrize("slots", [1, 3])
def test_one_who_watches_beside_others_is_told_of_its_own_cycles(slots):
    model, runs = ScriptedModel(small_config(eos_token_ids=()), skill=0.8), []
    engine = engine_of(model, slots, 12, ahead=True)
    how = {"max_new_tokens": 30, "strategy": "two-pass", "tree_nodes": 5, "seed": 1}
    others = [engine.submit([n], Request(**how)) for n in range(1, slots)]
    for _ in range(4):
        engine.step()
    text = engine.submit([9], Request(**how), on_run=lambda run, kept: runs.append(run))
    while engine.step():
        pass
    told = [run for run in runs if run.tree is not None]
    assert len(told) > 3 and all([run.choices[i] for i in run.path] == run.tokens for run in told)
    assert text.result().token_ids == model.generate([9], **how).token_ids and all(t.finished for t in others)


def test_a_batch_that_grows_keeps_what_it_has_learnt(monkeypatch):
    """As on a GPU: times of "auto" are measured while cycles of other texts are in flight."""
    model = ScriptedModel(small_config(eos_token_ids=()), skill=0.95)
    engine = engine_of(model, 16, 40, ahead=True)
    cycles, launch = engine.runner.cycles, Cycle.launch
    monkeypatch.setattr(controller, "ROUNDS", 6), monkeypatch.setattr(controller, "AWAKE", 0.0)

    def timed(self, pool, timed=False):
        read = launch(self, None, False)
        return lambda: [end._replace(milliseconds=1.0 + len(self.pass_rows)) for end in read()]

    monkeypatch.setattr(Cycle, "launch", timed), monkeypatch.setattr(cycles, "pool", "a pool")
    texts = [
        engine.submit([n + 1], Request(max_new_tokens=30, strategy="auto" if n > 2 else "autoregressive"))
        for n in range(12)
    ]
    while engine.step():
        pass
    for n, text in enumerate(texts):
        want = model.generate([n + 1], strategy="autoregressive", max_new_tokens=30).token_ids
        assert text.result().token_ids == want
    assert len({seats for _, _, _, seats, *_ in cycles._cycles}) > 2


class Damaged(ScriptedModel):
    """Logits that are not numbers behind token 7."""

    def target(self, text):
        logits = super().target(text)
        return torch.full_like(logits, float("nan")) if text[-1] == 7 else logits


def test_damaged_logits_end_one_text_alone():
    model = Damaged(small_config(eos_token_ids=()), skill=0.8)
    engine, good, bad = engine_of(model, 4, 20), [([3, 4], {}), ([5], {})], [1, 7]
    texts = [engine.submit(prompt, Request(max_new_tokens=9, logit_bias={7: -1e4})) for prompt, _ in good]
    texts.append(engine.submit(bad, Request(max_new_tokens=9)))
    errors = 0
    while not all(text.finished for text in texts):
        try:
            engine.step()
        except InputError as error:
            errors, said = errors + 1, str(error)
    assert errors == 1 and texts[2].result().stats.finish_reason == "error" and "NaN" in said
    assert texts[2].result().error == said
    assert [len(text.result().token_ids) for text in texts[:2]] == [9, 9]
