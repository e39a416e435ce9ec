"""The first tokens of texts whose prompts are read together: chosen on the device, read behind the next
launch, and the same as alone."""

from itertools import pairwise

import pytest
import torch
from scripted import ScriptedModel
from small import small_config, small_model

from orthrus_kernels import PAGE
from qwen3_model import Engine, InputError, Request
from qwen3_model.decode import kinds, pace
from qwen3_model.decode.scheduler import Scheduler

PROMPTS = [[3, 4, 5], [6], [7] * 70, [8, 9]]
HOW = {"max_new_tokens": 9, "strategy": "two-pass", "tree_nodes": 3, "seed": 2, "temperature": 0.8}


def engine_of(model, slots=5, pages=20, ahead=True):
    """ahead: work is launched before what came before it is read, as on a GPU."""
    engine = Engine(model, slots, PAGE * pages)
    engine.runner_for(1).ahead = ahead
    return engine


def finish(engine):
    """Step until all have ended; returns the errors on the way."""
    errors, steps = [], 0
    while True:
        steps += 1
        assert steps < 1000
        try:
            if not engine.step():
                return errors
        except InputError as error:
            errors.append(str(error))


def running(engine, prompt=(1, 2), **settings):
    """A text in the middle of its cycles, so that what is launched next is read later."""
    text = engine.submit(list(prompt), Request(**HOW | {"max_new_tokens": 60} | settings))
    while len(text.tokens) < len(prompt) + 3:
        engine.step()
    assert len(engine._unread) == 1
    return text


def same(text, model, how=HOW):
    """Whether a text has the bits that it has alone."""
    prompt = text.tokens[: text.limit - text.request.max_new_tokens]
    result, alone = text.result(), model.generate(prompt, **how)
    return (result.token_ids, result.logprobs) == (alone.token_ids, alone.logprobs)


def test_a_text_is_in_a_cycle_before_its_first_token_is_read():
    model = ScriptedModel(small_config(eos_token_ids=()))
    engine = engine_of(model)
    running(engine)
    prompts = [prompt[:50] for prompt in PROMPTS]  # together no more than a chunk beside a text
    texts = [engine.submit(prompt, Request(**HOW)) for prompt in prompts]
    engine.step()
    assert [len(launched.seated) for launched in engine._unread[0]] == [1, 4], "one pass for all"
    assert [len(text.tokens) for text in texts] == [len(prompt) for prompt in prompts], "not read"
    cycles = engine.runner.cycles
    launch, seated = cycles.launch, []
    cycles.launch = lambda of, *pieces: seated.append([text for text, _ in of]) or launch(of, *pieces)
    engine.step()
    assert seated[0][1:] == texts and [len(text.stream.token_ids) for text in texts] == [1] * 4
    assert not finish(engine) and all(same(text, model) for text in texts)


@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_told_of_a_prompt(ahead):
    """Its own rows, before any cycle's run, in the order of the texts."""
    model = ScriptedModel(small_config(eos_token_ids=()))
    engine, told = engine_of(model, ahead=ahead), []
    for nth, prompt in enumerate(PROMPTS):
        engine.submit(prompt, Request(**HOW), on_run=lambda run, kept, nth=nth: told.append((nth, run, kept)))
    finish(engine)
    for nth, (text, run, kept) in enumerate(told[:4]):
        assert (text, run.kind, tuple(run.rows), kept) == (nth, "prompt", (len(PROMPTS[nth]),), 1)
        assert (run.forwards, run.nodes, list(run.path), run.tree, sum(run.seconds)) == (1, 0, [0], None, 0)
    assert all(run.kind != "prompt" for _, run, _ in told[4:]) and len(told) > 8


@pytest.mark.parametrize("ahead", [False, True])
def test_a_text_that_ends_with_its_first_token(ahead):
    """By an end token, or as it may have no more; the others go on."""
    first = ScriptedModel(small_config(eos_token_ids=())).generate(PROMPTS[1], **HOW).token_ids[0]
    model = ScriptedModel(small_config(eos_token_ids=(first,)))
    engine = engine_of(model, ahead=ahead)
    going = running(engine) if ahead else None
    texts = [engine.submit(prompt, Request(**HOW)) for prompt in PROMPTS]
    one = engine.submit([5, 5], Request(**HOW | {"max_new_tokens": 1})) if going is None else texts[0]
    assert not finish(engine)
    assert all(same(text, model) for text in texts)
    assert texts[1].result().stats.finish_reason == "end_token" and texts[1].result().token_ids == [first]
    assert going is not None or len(one.result().token_ids) == 1
    assert engine._scheduler.pages_used == 0


class Damaged(ScriptedModel):
    """Logits that are not numbers behind token 6."""

    def target(self, text):
        logits = super().target(text)
        return torch.full_like(logits, float("nan")) if text[-1] == 6 else logits


@pytest.mark.parametrize("ahead", [False, True])
def test_logits_that_are_not_numbers_end_one_text_of_a_chunk(ahead):
    model = Damaged(small_config(eos_token_ids=()))
    how = HOW | {"logit_bias": {6: -1e4}}
    engine = engine_of(model, ahead=ahead)
    if ahead:
        running(engine, logit_bias={6: -1e4})
    texts = [engine.submit(prompt, Request(**how)) for prompt in PROMPTS[:3]]
    (error,) = finish(engine)
    assert "NaN or infinite" in error and texts[1].result().error == error
    assert [len(text.result().token_ids) for text in texts] == [9, 0, 9]
    assert engine._scheduler.pages_used == 0


def test_a_text_that_is_cancelled_before_its_first_token_is_read():
    """The next text takes its slot at once."""
    model = ScriptedModel(small_config(eos_token_ids=()))
    engine = engine_of(model, slots=3)
    running(engine)
    texts = [engine.submit(prompt, Request(**HOW)) for prompt in PROMPTS]
    engine.step()
    assert [len(launched.seated) for launched in engine._unread[0]] == [1, 2]
    engine.cancel(texts[0])
    assert not finish(engine)
    assert texts[0].result().token_ids == [] and texts[0].result().stats.finish_reason == "cancelled"
    assert all(same(text, model) for text in texts[1:]) and engine._scheduler.pages_used == 0


def test_a_text_that_is_preempted_before_its_first_token_is_read(monkeypatch):
    """The scheduler does not admit such a text; here it is made to. Its prompt is read again, and what was
    chosen behind it before is dropped."""
    model = ScriptedModel(small_config(eos_token_ids=()), skill=0.9)
    engine = engine_of(model, slots=3, pages=3)
    old = running(engine, [1] * 50)
    monkeypatch.setattr(Scheduler, "_admissible", lambda self, rows, ahead: bool(self._waiting))
    text = engine.submit([2, 3], Request(**HOW))
    engine.step()
    assert [of for of, _ in engine._unread[0][1].seated] == [text]
    going = Scheduler._going
    monkeypatch.setattr(Scheduler, "_admissible", lambda *given: False)
    monkeypatch.setattr(
        Scheduler, "_going", lambda self, ahead: ([], []) if text in self.texts else going(self, ahead)
    )
    monkeypatch.setattr(Scheduler, "grown", lambda *given: None)
    engine.step()
    assert engine.load.preemptions == 1 and len(text.tokens) == 2
    monkeypatch.undo()
    assert not finish(engine) and same(text, model) and len(old.result().token_ids) == 60


@pytest.mark.parametrize(
    "settings", [{"repetition_penalty": 1.5}, {"temperature": 0.9, "top_p": 0.9}], ids=str
)
def test_a_real_model(settings):
    """Prompts over several chunks, of which one holds the end of the first and the others."""
    model = small_model(eos_token_ids=())
    engine, how = engine_of(model), HOW | settings
    engine._scheduler.chunk = 80
    prompts = [1] * 100, [2], [3] * 20, [4] * 50
    texts = [engine.submit(prompt, Request(**how)) for prompt in prompts]
    assert not finish(engine)
    assert all(same(text, model, how | {"strategy": "autoregressive"}) for text in texts)


def test_an_error_of_a_chunk_ends_its_texts_alone(monkeypatch):
    model = ScriptedModel(small_config(eos_token_ids=()))
    engine = engine_of(model)
    engine._scheduler.chunk = 4
    texts = [engine.submit(prompt, Request(**HOW)) for prompt in PROMPTS]
    monkeypatch.setattr(engine.runner.prompts, "run", lambda pieces: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    monkeypatch.undo()
    assert [text.result().stats.finish_reason for text in texts[:2]] == ["error"] * 2
    assert not finish(engine) and all(same(text, model) for text in texts[2:])


@pytest.mark.parametrize(("strategy", "room"), [("two-pass", 16), ("one-pass", 999)])
def test_more_than_a_pass_has_rows_for_is_a_chunk_behind_the_cycle(monkeypatch, strategy, room):
    """So is what comes beside texts that draft in one pass. Either way its first token is read with the
    cycle's, and the next cycle has the text."""
    model = ScriptedModel(small_config(eos_token_ids=()))
    engine = engine_of(model)
    running(engine, strategy=strategy)
    monkeypatch.setattr(kinds, "riders_beside", lambda rows: room)
    chunks, run = [], engine.runner.prompts.run
    engine.runner.prompts.run = lambda pieces: chunks.append(len(pieces[0].tokens)) or run(pieces)
    text = engine.submit([7] * 40, Request(**HOW))
    engine.step()
    assert chunks == [40] and [len(launched.seated) for launched in engine._unread[0]] == [1, 1]
    assert not finish(engine) and same(text, model)


@pytest.mark.parametrize("ahead", [False, True])
def test_few_rows_of_several_cycles_ride_together(monkeypatch, ahead):
    """Where many keys take long; nobody's bits are others."""
    model = ScriptedModel(small_config(eos_token_ids=()))
    engine = engine_of(model, ahead=ahead)
    old = engine.submit([1, 2], Request(**HOW | {"max_new_tokens": 60, "strategy": "autoregressive"}))
    while len(old.tokens) < 10:
        engine.step()
    monkeypatch.setattr(pace, "LEAST", 16)
    monkeypatch.setattr(pace, "AT_ONCE", 32)
    monkeypatch.setattr(kinds, "riders_beside", lambda rows: 40)
    own, cycle, carried = engine.runner.cycles.pace, engine.runner.cycle, []
    own.first, own.key = {}, 1e9
    monkeypatch.setattr(
        engine.runner, "cycle",
        lambda seated, parts: carried.append(sum(of.end - of.first for of in parts)) or cycle(seated, parts),
    )  # fmt: skip
    engine.step()
    text = engine.submit([7] * 140, Request(**HOW))
    assert not finish(engine) and same(text, model) and len(old.result().token_ids) == 60
    rode = [(nth, rows) for nth, rows in enumerate(carried) if rows]
    assert [rows for _, rows in rode] == [40, 32, 32, 32, 4], "the first ones see no keys but their own"
    apart = [after - before for (before, _), (after, _) in pairwise(rode)]
    assert apart == [1, 1, 2, 2], "some were saved up before"
