"""What bench.budget measures is what decoding does."""

import pytest
from small import small_model

from bench import budget
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


def test_it_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        budget.main([])
    assert ended.value.code == 2 and "times need a GPU" in capsys.readouterr().err
