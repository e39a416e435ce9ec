"""bench.acceptance: figures of known statistics, a whole run on the embedded checkpoint, bad options."""

import json

import pytest
from small import small_model

from bench import acceptance
from bench.acceptance import Measured, Setting, measure, plot
from qwen3_model import GenerationStats, InputError


def stats(histogram, nodes=0):
    cycles = sum(histogram)
    kept = sum(n * (i + 1) for i, n in enumerate(histogram))
    return GenerationStats("two-pass", 0, 1 + 2 * cycles, cycles, kept + 1, kept, nodes, list(histogram))


def test_figures_by_hand():
    """10 cycles of a token, 5 of two, 5 of four: 40 tokens in 20 cycles and 41 passes."""
    m = Measured(Setting(0.0, 8), [stats([10, 5, 0, 5], nodes=160)])
    assert (m.per_cycle, m.nodes_per_cycle) == (2.0, 8.0) and m.per_forward == 41 / 41
    assert m.agreement() == [0.5, 0.25, 0.25]
    assert m.interval() == (2.0, 2.0), "one prompt, nothing to resample"


def test_the_interval_is_of_prompts():
    """Over 40 prompts that alternate between 1 and 3 tokens a cycle the mean is 2, give or take 0.3."""
    m = Measured(Setting(0.0, 0), [stats([10] if i % 2 else [0, 0, 10]) for i in range(40)])
    low, high = m.interval()
    assert m.per_cycle == 2 and 1.6 < low < 1.8 and 2.2 < high < 2.4
    narrow = Measured(Setting(0.0, 0), m.stats * 25).interval()
    assert narrow[1] - narrow[0] < (high - low) / 3


def test_a_whole_run(tmp_path, capsys):
    out, picture = tmp_path / "a.json", tmp_path / "a.png"
    arguments = ["--limit", "2", "--max-new-tokens", "16", "--nodes", "0", "16", "auto",
                 "--one-pass", "--temperatures", "0", "1", "--device", "cpu", "--json", str(out)]  # fmt: skip
    assert acceptance.main(arguments) == 0
    said, got = capsys.readouterr().out, json.loads(out.read_text())
    assert "tree 16, T 1" in said and "over chain" in said
    assert [(s["temperature"], s["nodes"], s["verify"]) for s in got["settings"]] == [
        (0, 0, "coupled"), (0, 16, "coupled"), (0, "auto", "coupled"),
        (1, 0, "coupled"), (1, 16, "coupled"), (1, "auto", "coupled"), (1, 0, "rejection")
    ]  # fmt: skip
    assert "chain, rejection, T 1" in said and got["settings"][-1]["tokens_per_cycle"] > 1
    assert [of["temperature"] for of in got["lattices"]] == [0, 1] and "oracle of the first 16" in said
    best = {of["temperature"]: of["oracle"][1]["tokens_per_cycle"] for of in got["lattices"]}
    assert all(s["tokens_per_cycle"] <= best[s["temperature"]] for s in got["settings"][:-1])
    chain, tree = got["settings"][:2]
    assert tree["tokens_per_cycle"] > chain["tokens_per_cycle"] > 1 and chain["nodes_per_cycle"] > 1
    low, high = chain["interval_95"]
    assert low <= chain["tokens_per_cycle"] <= high and chain["prompts"] == 2
    assert got["dtype"] == "float32" and "acceptance" in got["machine"]["command"]
    pytest.importorskip("matplotlib")
    settings = [Setting(0.0, n) for n in (0, 16, "auto")] + [Setting(1.0, 0), Setting(1.0, 0, "rejection")]
    plot(picture, [Measured(setting, [stats([3, 2])]).to_dict() for setting in settings], "t")
    assert picture.stat().st_size > 5000


def test_one_pass_beside_two_pass():
    """Real passes, with blocks; its gain counts forward passes. The picture leaves it out."""
    model = small_model(eos_token_ids=(), block_size=8)
    settings = [Setting(0.0, 0), Setting(0.0, 3, strategy="one-pass")]
    chain, one = measure(model, [[5, 6, 7]], settings, 9, 0)
    assert str(one.setting) == "one-pass, tree 3, T 0" and one.to_dict()["strategy"] == "one-pass"
    assert (
        one.stats[0].forwards == 1 + one.stats[0].cycles
        and chain.stats[0].forwards > 1 + chain.stats[0].cycles
    )
    _, head, lines = acceptance.table([chain, one])
    assert head[-1] == "forward, over chain" and lines[1][-1] == f"{one.per_forward / chain.per_forward:.2f}x"


def test_a_plain_qwen3_is_refused():
    plain = small_model(block_size=0, mask_token_id=None)
    with pytest.raises(InputError, match="prompt 1: strategy two-pass needs an Orthrus"):
        list(measure(plain, [[5]], [Setting(0.0, 0)], 3, 0))


def test_gains_are_over_the_coupled_chain():
    settings = [(Setting(1.0, 0, "rejection"), [4, 1]), (Setting(1.0, 0), [3, 2]), (Setting(0.0, 4), [0, 5])]
    _, _, lines = acceptance.table([Measured(setting, [stats(counts)]) for setting, counts in settings])
    assert [(line[0], line[-2]) for line in lines] == [
        ("chain, rejection, T 1", "0.86x"), ("chain, T 1", "1.00x"), ("tree 4, T 0", "-")
    ]  # fmt: skip
