"""What bench.budget replays is what decoding does."""

import pytest
from small import small_model

from bench import budget, budget_run
from qwen3_model.decode.budget import CHAIN, KINDS, PLAIN, TREES, Budget

COSTS = dict(zip(KINDS, (1.0, 2.1, 2.1, 2.2, 2.4, 2.7), strict=True))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_trace_has_the_cycles_of_every_kind(temperature):
    """Following a kind's outcomes from root to root gives the accepted counts of a generation."""
    model, prompt = small_model(), [5, 6, 7]
    plain = model.generate(prompt, "autoregressive", 24, temperature=temperature, seed=budget_run.SEED)
    outcomes = budget_run.trace(model, prompt, plain.token_ids, temperature)
    assert len(outcomes) == len(plain.token_ids) - 1 and all(o[PLAIN] == 1 for o in outcomes)
    for kind in (CHAIN, TREES[0], TREES[-1]):
        stats = model.generate(
            prompt, "two-pass", 24, temperature=temperature, seed=budget_run.SEED, tree_nodes=kind
        ).stats
        at, kept = 0, []
        while at < len(outcomes):
            kept.append(min(outcomes[at][kind], len(outcomes) - at))
            at += outcomes[at][kind]
        assert [kept.count(n + 1) for n in range(len(stats.accepted_histogram))] == stats.accepted_histogram


def test_replaying_counts_tokens_by_cost():
    """And none past the end of a text."""
    assert budget_run.replay([[dict.fromkeys(KINDS, 9)] * 4], COSTS, CHAIN) == pytest.approx(4 / 2.1)
    outcomes = [dict.fromkeys(KINDS, 3) | {PLAIN: 1}] * 30
    rates = budget_run.replayed([outcomes] * 20, COSTS)
    assert rates[str(PLAIN)] == 1 and rates[str(CHAIN)] == pytest.approx(3 / 2.1)
    assert rates["auto"] > 0.95 * rates[str(CHAIN)]
    with_a_fixed_kind = budget_run.replay([outcomes], COSTS, Budget({PLAIN: 1.0}))
    assert with_a_fixed_kind == 1


def test_it_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        budget.main([])
    assert ended.value.code == 2 and "times need a GPU" in capsys.readouterr().err
