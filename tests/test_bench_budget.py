"""What bench.budget and bench.first_token measure is what decoding does."""

import json
from types import SimpleNamespace

import pytest
from small import small_model

from bench import budget, first_token
from qwen3_model import InputError
from qwen3_model.decode.controller import PLAIN


def test_every_kind_decodes_the_same_texts():
    model = small_model(eos_token_ids=())
    prompts = budget.PromptSet("some", [[5, 6, 7], [8, 9]], 1.0)
    found = {kind: budget.decode(model, prompts, kind, 12) for kind in (*budget.FIXED, "auto")}
    assert all(run["texts"] == found[PLAIN]["texts"] for run in found.values())
    assert found[PLAIN]["tokens_per_cycle"] == 1 and found[PLAIN]["cycles_of"] == {"plain": 2 * 11}
    for kind, names in ((15, {"two-pass", "plain"}), ("one-pass", {"one-pass", "plain"})):
        assert set(found[kind]["cycles_of"]) <= names and found[kind]["tokens_per_cycle"] >= 1
    with pytest.raises(InputError, match="end with their first token"):
        budget.decode(model, prompts, PLAIN, 1)


@pytest.mark.parametrize("command", [budget, first_token])
def test_it_needs_a_gpu(command, monkeypatch, refused):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "times need a GPU" in refused(command.main)


def test_the_first_token_is_timed_behind_one_call(monkeypatch, tmp_path, capsys, refused):
    """A clock that only the model's passes move: 2 s the first time, then 7, 1, 4 ms."""
    clock, costs = SimpleNamespace(now=0.0), iter([2.0, 0.007, 0.001, 0.004])
    model = small_model(max_position_embeddings=64)
    states = model.states

    def slowly(given, cache):
        clock.now += next(costs)
        return states(given, cache)

    model.states = slowly
    monkeypatch.setattr(first_token, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(first_token, "random_model", lambda name: model)
    monkeypatch.setattr(first_token, "machine", lambda command: {"gpu": "fake"})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "f.json"
    assert first_token.main(["--models", "8B", "--prompts", "40", "40", "--json", str(out)]) == 0
    (row,), said = json.loads(out.read_text())["rows"], capsys.readouterr().out
    assert row == {"model": "8B", "prompt_tokens": 40, "ms": 4.0, "calls_ms": [7.0, 1.0, 4.0]}
    assert next(costs, None) is None and "10000" in said and "gpu fake" in said
    assert max(len(line) for line in said.splitlines()) <= 80
    assert "the context only 64" in refused(first_token.main, "--prompts", "1k")
