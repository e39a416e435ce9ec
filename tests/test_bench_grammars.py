"""bench.grammars: lists without an end, models that have a tokenizer and an end, and a comparison."""

import json

import pytest
from small import small_model

pytest.importorskip("llguidance", reason="grammars need llguidance")

from bench import grammars, serve_tokenizer
from bench.models import Shape
from bench.replay import Way
from qwen3_model import Engine, InputError
from qwen3_model.matcher import Grammars
from qwen3_model.text import Text


def test_references_of_a_lists_values_are_found():
    made = grammars.hoisted({"$ref": "#/$defs/leaf", "$defs": {"leaf": {"const": 1}}})
    assert made == {"items": {"$ref": "#/$defs/leaf"}, "$defs": {"leaf": {"const": 1}}}
    assert len(grammars.lists(40)) == 40 and len({grammar.rules for grammar in grammars.lists(40)}) > 30


def test_random_weights_take_a_grammar(monkeypatch, tmp_path):
    monkeypatch.setitem(grammars.WHOLE, "toy", Shape(1, 64, 2, 64, G=1, D=32, V=300))
    model = grammars.made("toy", "cpu", tmp_path)
    assert model.grammars.matcher(grammars.lists(1)[0]) is not None and model.config.eos_token_ids == (298,)


def test_a_way_with_grammars_and_without(tmp_path, capsys, monkeypatch):
    """Every text begins a list, and goes on for as long as the clock runs."""
    monkeypatch.setattr("bench.batch_measure.SETTLE", 3)
    monkeypatch.setattr("bench.batch_measure.TOKENS", 3)
    model = small_model(eos_token_ids=(299,), vocab_size=300)
    serve_tokenizer.write(tmp_path, 300)
    model.text = Text(tmp_path)
    model.grammars = Grammars(model.text, model.config)
    engine = Engine(model, 2, 2048)
    engine.runner_for(128)
    said, seen = [], engine.submit
    monkeypatch.setattr(engine, "submit", lambda *of: said.append(seen(*of)) or said[-1])
    row = grammars.compared(engine, [[5, 6], [7]], Way("plain", "autoregressive", 0))
    assert row["cycle"] > 0 and row["with"]["tokens_per_cycle"] == row["without"]["tokens_per_cycle"] == 1
    held = [model.text.decode(text.tokens[text.prompt :]) for text in said[:4]]
    assert all(text.startswith("[") for text in held)
    assert len(grammars.line(row)) == len(grammars.HEAD) and "ms a cycle" in capsys.readouterr().out


def test_what_was_measured_before_a_mistake_is_kept(monkeypatch, tmp_path, capsys):
    row = {"ms_per_cycle": 1.0, "tokens_per_cycle": 1.0, "tokens_per_second": 9.0}
    found = {"way": "plain", "with": row, "without": row, "cycle": 1.0}

    def compared(engine, prompts, way):
        if engine.slots == 2:
            raise InputError("two are too many")
        return found

    monkeypatch.setattr(grammars, "compared", compared)
    given = ["--texts", "1", "2", "--ways", "plain", "--device", "cpu", "--json", str(tmp_path / "out.json")]
    with pytest.raises(SystemExit) as ended:
        grammars.main(given)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.err == "bench.grammars: two are too many\n"
    assert "embedded, 1 texts" in said.out
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == [found | {"model": "embedded"}]
