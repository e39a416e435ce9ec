"""What is compiled and captured ahead of texts: the list of it, and that texts find all of it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from interpreter import DEVICE
from scripted import ScriptedModel
from small import small_config, small_model

from orthrus_kernels import FORMS, Form, Sampling, attention_triton, compile_ahead
from orthrus_kernels.compile_ahead import compile_all
from orthrus_kernels.layout import Takes
from qwen3_model import Engine, InputError, Qwen3, Request
from qwen3_model.cli import main
from qwen3_model.decode import controller, cycle, cycles, many, prompt, warm
from qwen3_model.decode.choice import Choice
from qwen3_model.decode.controller import CHAIN, LOOKUP, PLAIN, TREES
from qwen3_model.decode.cycle import Cycle, Slots
from qwen3_model.decode.cycles import MOST_GRAPHS
from qwen3_model.decode.groups import seats_for
from qwen3_model.decode.kinds import seat_counts
from qwen3_model.decode.one_pass import Shape
from qwen3_model.decode.prompt import Prompts
from qwen3_model.decode.warm import Warmed, WarmStart, capture, plan_of_engine, plan_of_text

WARM = {"temperature": 0.8}
SETTINGS = (
    {}, WARM, {**WARM, "top_k": 5}, {**WARM, "top_p": 0.9, "min_p": 0.1}, {"repetition_penalty": 1.3},
    {**WARM, "logit_bias": {3: 1.0}}, {**WARM, "top_k": 90},
)  # fmt: skip


@pytest.fixture
def captures(monkeypatch):
    """Graphs on a CPU: passes that run again. What was captured, in order."""
    found, launch = [], Cycle.launch

    def again(run, pool):
        found.append(run)
        return SimpleNamespace(replay=lambda: [step() for step in run() or ()])

    def parts_again(run, pool):
        return [(again(run, pool), lambda: None)]

    def timed(self, pool, timed=False):
        read = launch(self, pool, False)
        return lambda: [end._replace(milliseconds=1.0 + len(self.pass_rows)) for end in read()]

    monkeypatch.setattr(cycle, "captured_parts", parts_again)
    monkeypatch.setattr(prompt, "captured", again)
    monkeypatch.setattr(Cycle, "launch", timed)
    monkeypatch.setattr(controller, "ROUNDS", 1), monkeypatch.setattr(controller, "AWAKE", 0.0)
    monkeypatch.setattr(cycles, "key_time", lambda *given: 0.0)  # pages hold no tokens of a scripted model
    return found


def test_the_plan_of_an_engine():
    """Every number of seats that texts can have, and chunks of every number of rows."""
    model = SimpleNamespace(config=small_config())
    plan = plan_of_engine(model, 64, 4096)
    assert plan.seats == (1, 2, 4, 8, 16, 32, 48, 64) == tuple(sorted({seats_for(n) for n in range(1, 65)}))
    assert plan.chunks[:5] == (16, 32, 64, 128, 256) and plan.chunks[-1] == 2048 and len(plan.chunks) == 19
    assert plan.kinds_of(1) == (PLAIN, LOOKUP, *TREES) and plan.kinds_of(64) == (PLAIN, LOOKUP, 5, 7)
    assert plan_of_engine(model, 4, 100).chunks == (16, 32, 64, 128, 256, 384, 512)
    plain = plan_of_engine(SimpleNamespace(config=small_config(block_size=0, mask_token_id=None)), 3, 64)
    assert plain.kinds_of(4) == (PLAIN, LOOKUP) and plain.seats == (1, 2, 4)
    forms = [Form.of(request.sampling, 97) for request in plan.requests]
    assert [form.rounded() for form in forms] == list(FORMS)


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [({"strategy": "autoregressive"}, (PLAIN,)), ({"strategy": "two-pass"}, (PLAIN, LOOKUP, *TREES)),
     ({"strategy": "two-pass", "tree_nodes": 0}, (PLAIN, CHAIN)), ({}, (PLAIN, LOOKUP, *TREES)),
     ({"strategy": "one-pass"}, (PLAIN, Shape.of(8, "auto"))), ({"strategy": "lookup"}, (PLAIN, LOOKUP))],
    ids=str,
)  # fmt: skip
def test_the_plan_of_a_text(settings, kinds):
    model = ScriptedModel(small_config(max_position_embeddings=8192))
    for tokens, chunks in ((5, (16,)), (2048, (2048,)), (2049, (16, 2048)), (4700, (640, 2048))):
        plan = plan_of_text(Engine(model).submit([1] * tokens, Request(max_new_tokens=4, **settings)))
        assert plan.kinds == kinds and plan.chunks == chunks and plan.seats == (1,)


def test_few_forms_cover_all_settings():
    """Of several slots; a text alone has the form of its own settings."""
    model = small_model()
    for settings in SETTINGS:
        own = Form.of(Sampling(**settings), 97)
        for slots in (1, 3):
            choice = Choice(model, slots)
            choice.put(0, Sampling(**settings), [1], 1)
            form = choice.form_of([0])
            assert form == own if slots == 1 else (form in FORMS and form | own == form)
    assert FORMS[0].plain and not FORMS[1].plain
    greedy = Choice(model, 1)
    greedy.put(0, Sampling(), [1], 1, ends=[7], least=5)
    assert greedy.form_of([0]) == (Takes.GREEDY | Takes.LEAST, 0) and not greedy.form_of([0]).plain


def test_all_graphs_are_held():
    model = ScriptedModel(small_config())
    for slots in (1, 5, 256):
        made = cycles.Cycles(model, model.new_cache(64, slots, 1), slots, None)
        plan = plan_of_engine(model, slots, 64)
        ahead = len(FORMS) * sum(len(plan.kinds_of(seats)) + 2 for seats in seat_counts(slots))
        assert made.most == MOST_GRAPHS + (ahead if slots > 1 else 0)


@pytest.mark.parametrize("smaller", [False, True], ids=["as it comes", "lookup and smaller trees"])
def test_nothing_is_captured_behind_the_start(captures, monkeypatch, smaller):
    """Mixed texts of a batch that grows and shrinks, as on a GPU; each is the text that it is alone. A text
    that runs keeps what it has. Prompts ride beside every kind of cycle."""
    if smaller:
        smaller_in_turn = lambda self, *beside: self.times.kinds[1 + self.times.cycles % 2]  # noqa: E731
        monkeypatch.setattr(controller.Controller, "next", smaller_in_turn)
    model = ScriptedModel(small_config(eos_token_ids=()), skill=0.9)
    engine = Engine(model, 5, 1280)
    runner = engine.runner_for(1)
    runner.ahead = True
    running = engine.submit([9, 8], Request(strategy="autoregressive", max_new_tokens=40))
    for _ in range(4):
        engine.step()
    for part in (runner.cycles, runner.prompts):
        part.pool = "a pool"
    plan = plan_of_engine(model, 5, 120)
    graphs = capture(runner, plan)
    assert graphs == len(captures) == 2 * 8 + 3 * 4 * (4 + 2), "chunks; forms, seats, kinds, two with prompts"
    jobs = []
    for n in range(24):
        strategy = ("auto", "autoregressive", "two-pass")[n % 3]
        how = SETTINGS[n % len(SETTINGS)] | {"seed": n, "strategy": strategy, "max_new_tokens": 3 + n % 11}
        jobs.append(([n + 1] * (1 + 37 * (n % 4)), Request(**how)))
    found = list(many.results(engine, jobs))
    while engine.step():
        pass
    assert len(captures) == graphs == len(runner.cycles) + len(runner.prompts)
    runner.cycles.pool = runner.prompts.pool = None
    for (ids, request), result in zip(jobs, found, strict=True):
        alone = model.run(ids, replace(request, strategy="autoregressive"))
        assert (result.token_ids, result.logprobs) == (alone.token_ids, alone.logprobs)
    assert running.result().token_ids == model.generate([9, 8], max_new_tokens=40).token_ids


@pytest.mark.parametrize(
    ("backend", "dtype", "whole"),
    [("reference", "float32", False), ("triton", "float32", False), ("triton", "bfloat16", True)],
)
def test_a_chunk_ahead_commits_nothing(monkeypatch, backend, dtype, whole):
    """Nor does it read the cache: all of its rows are padding. whole: by attention's form for prompts."""
    monkeypatch.setattr(attention_triton, "PROMPT_ROWS", 0 if whole else 1 << 20)
    model = small_model(dtype, backend=backend, device=DEVICE if backend == "triton" else "cpu")
    cache = model.new_cache(64, 2)
    for pool in (cache.keys, cache.values):
        pool.fill_(float("nan"))
    prompts = Prompts(Slots(model, cache, 2), None)
    with torch.inference_mode():
        prompts.ready(16)
    assert cache.keys.isnan().all() and cache.values.isnan().all()


def test_a_text_asks_for_its_kernels_once(monkeypatch):
    """By its form, kinds, prompt and cache; a few that are missing are left to the launches."""
    model, asked, compiled = ScriptedModel(small_config()), [], []
    lacked = iter([["a", "b", "c"], ["a", "b", "c", "d"], ["d"], [], [], ["x"], ["x"]])
    monkeypatch.setattr(warm, "replays", lambda model: True)
    monkeypatch.setattr(warm, "launches", lambda *given: asked.append(given) or {"a", "b", "c", "d", "e"})
    monkeypatch.setattr(warm, "missing", lambda found: next(lacked))
    monkeypatch.setattr(warm, "compile_all", lambda found, advance: compiled.append(found) or advance())
    start, engine = WarmStart(model, 1), Engine(model)
    runner = engine.runner_for(40)

    def before(prompt, **settings):
        start.before(engine.submit(prompt, Request(max_new_tokens=4, **settings)), runner)
        return len(asked)

    assert [before([1]), before([2, 3]), before([1], temperature=0.8)] == [1, 1, 2]
    assert before([1], temperature=0.3, seed=4) == 2 and before([1] * 20) == 3
    assert before([1], tree_nodes=3, strategy="two-pass") == 4 and compiled == [["a", "b", "c", "d"]]
    done = start.alone(None, None)
    assert (done.kernels, done.compiled, done.graphs) == (5, 0, 0) and len(asked) == 5, "x cannot be"
    assert compiled[1:] == [["x"]], "whoever asks for it has every kernel compiled"
    assert start.alone(None, None).kernels == 0


@pytest.mark.parametrize("says", ["import sys; sys.stdin.readline()", "raise SystemExit", "print(); input()"])
def test_processes_that_die_leave_kernels_to_their_launches(says, monkeypatch):
    """At once, with a line unread, or behind the first kernel; with more lines than a pipe holds."""
    monkeypatch.setattr(compile_ahead, "_WORKER", says)
    told = []
    compile_all(["x" * 5000] * 60, lambda: told.append(1), processes=2)
    assert len(told) <= 2


def test_nothing_is_warmed_without_a_text(monkeypatch):
    """Nor for a prompt that is refused."""
    model, warmed = small_model(), []
    monkeypatch.setattr(Engine, "warm", lambda engine, progress=None: warmed.append(engine.slots))
    assert list(model.generate_many([], slots=3, cache_tokens=512)) == []
    with pytest.raises(InputError, match="prompt 0"):
        next(model.generate_many(iter([[]]), slots=3, cache_tokens=512))
    assert warmed == []
    assert len(list(model.generate_many(iter([[1]]), slots=3, cache_tokens=512, max_new_tokens=2))) == 1
    assert warmed == [3]
    for slots in (True, 3.0):
        with pytest.raises(InputError, match="slots"):
            model.generate_many([[1]], slots=slots, cache_tokens=512)


def test_on_a_cpu_there_is_nothing_to_do():
    model = small_model()
    for slots in (1, 4):
        engine = Engine(model, slots)
        assert engine.warm() == Warmed() and engine.runner is None


def test_the_verb(capsys, monkeypatch):
    assert main(["warm", "--device", "cpu", "--slots", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "nothing to compile: backend reference on cpu" in out
    assert main(["warm", "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["compiled"] == told["graphs"] == 0 and told["model"] == "embedded" and told["slots"] == 1
    assert main(["warm", "--slots", "257"]) == 2 and "1 to 256" in capsys.readouterr().err
    monkeypatch.setattr(Engine, "warm", lambda self, progress=None: Warmed(140, 131, 64, 12.34))
    monkeypatch.setattr("qwen3_model.decode.runner.replays", lambda model: True)
    assert main(["warm", "--device", "cpu", "--slots", "16"]) == 0
    assert capsys.readouterr().out == "131 kernels compiled, 9 were there, 64 graphs captured: 12.3 s\n"


def test_generate_many_warms_up_before_its_bar(monkeypatch):
    model, warmed = small_model(eos_token_ids=()), []
    monkeypatch.setattr(Engine, "warm", lambda self, progress=None: warmed.append((self.slots, progress)))
    for slots in (1, 2):
        found = Qwen3.generate_many(
            model, [[1]], slots=slots, cache_tokens=64, max_new_tokens=2, progress=False
        )
        assert len(list(found)) == 1
    assert warmed == [(2, False)]
