"""The calibration of drafts: what is fitted, what is stored, and the verb that does both."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from orthrus_kernels import Sampling
from qwen3_model import InputError, Qwen3
from qwen3_model.bigram import CALIBRATION, FILE, TWO_PASS, Bigram
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.cli import main
from qwen3_model.lattice import Candidates
from qwen3_model.training import calibration
from qwen3_model.training.calibration import Blocks, blocks_of, fit
from qwen3_model.training.held_out import apart


def drawn(n, factors, weights, seed):
    """Blocks of 4 candidates whose target says what a calibration of these factors and weights makes likely,
    each offset by itself."""
    g = torch.Generator().manual_seed(seed)
    logs = torch.randn(n, len(factors), 5, generator=g).mul(1.5).log_softmax(-1)
    true = torch.stack([torch.tensor(factors), torch.tensor(weights)], -1)
    blocks = Blocks(logs, torch.zeros_like(logs), torch.zeros(n, len(factors), dtype=torch.int64))
    said = torch.multinomial(blocks.scores(true).exp().flatten(0, 1), 1, generator=g).view(n, -1)
    return Blocks(logs, blocks.change, said)


def test_the_fit_finds_what_the_target_goes_by(monkeypatch):
    monkeypatch.setattr(calibration, "_SMOOTH", 0.1)
    factors, weights = [1.8, 1.4, 1.0], [-0.5, 0.6, 0.2]
    found = fit([drawn(4000, factors, weights, seed) for seed in range(2)])
    assert found[:, 0].tolist() == pytest.approx(factors, rel=0.12)
    assert found[:, 1].tolist() == pytest.approx(weights, abs=0.25)


def test_what_counts_of_a_block():
    """Up to the first offset whose token is no candidate, or whose path is too unlikely; cycles begin behind
    the last one that was kept."""
    logs = torch.tensor([0.5, 0.2, 0.001, 0.199, 0.1]).log().expand(5, 3, 5)
    said = torch.tensor([[0, 4, 0], [2, 0, 0], [0, 0, 0], [0, 1, -1], [3, -1, -1]])
    blocks = Blocks(logs.contiguous(), torch.zeros(5, 3, 5), said)
    counts, begins = blocks.reached(torch.tensor([1.0, 0.0]).repeat(3, 1))
    assert counts.tolist() == [
        [True, True, False], [True, False, False], [True] * 3, [True, True, False], [True, False, False]
    ]  # fmt: skip
    assert begins.tolist() == [True, False, True, False, False]


def test_blocks_of_a_text():
    """The tables change candidates behind the text's own tokens, but not behind the root that a block saw."""
    g = torch.Generator().manual_seed(0)
    text, ids = torch.tensor([3, 1, 4, 1, 5]), torch.randint(0, 9, (5, 3, 4), generator=g)
    ids[1, 0, 2], ids[2, 1, 3] = 1, 1
    scores = torch.randn(5, 3, 4, generator=g).log_softmax(-1) - 0.5
    tables = Bigram.of(*(torch.randn(9, 2, generator=g) for _ in "uw"))
    lattice = Candidates(scores, ids, None)
    found = blocks_of(tables, lattice, text, Sampling(temperature=0.5), TWO_PASS)
    assert found.said[0, 0] == ids[1, 0].tolist().index(1) and found.said.shape == (4, 3)
    assert found.said[1, 1] == ids[2, 1].tolist().index(1) and found.said[3].tolist()[1:] == [-1, -1]
    # block 2 stands at text[1]; behind its offset 1, text[3], stands text[2]
    want = 2.0 * tables.after[ids[2, 1]] @ tables.before[4]
    assert torch.allclose(found.change[1, 1, :4], want) and not found.change[:, 0].any()
    assert torch.allclose(found.logs.exp().sum(-1), torch.ones(4, 3))


def test_pieces_of_held_out_prompts_are_left_out():
    """49 tokens alike are few enough."""
    g = torch.Generator().manual_seed(0)
    pieces = torch.randint(0, 2000, (5, 128), generator=g)
    prompts = [[1, 2, *pieces[3, 30:80].tolist(), 5], pieces[1, 70:119].tolist()]
    assert torch.equal(apart(pieces, prompts), pieces[[0, 1, 2, 4]])
    assert torch.equal(apart(pieces, []), pieces)


@pytest.fixture
def folder(tmp_path):
    copy = tmp_path / "orthrus"
    shutil.copytree(EMBEDDED, copy, ignore=shutil.ignore_patterns("selector.safetensors"))
    stored = load_file(copy / FILE)
    stored.pop(CALIBRATION, None)
    save_file(stored, copy / FILE)
    return copy


def changed(folder, calibration):
    save_file(load_file(folder / FILE) | {CALIBRATION: calibration}, folder / FILE)
    return Qwen3.from_pretrained(folder, "cpu", progress=False)


def test_a_folder_without_one_changes_nothing(folder):
    found = Qwen3.from_pretrained(folder, "cpu", progress=False).bigram.calibration
    assert found[..., 0].eq(1).all() and found[..., 1].eq(0).all() and found.shape[1] >= 31


@pytest.mark.parametrize(
    "wrong, word",
    [(torch.ones(2, 30, 2), "shape [2, 30, 2]"), (torch.zeros(2, 31, 2), "not above 0"),
     (torch.full((2, 31, 2), float("nan")), "not finite")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(folder, wrong, word):
    with pytest.raises(InputError, match=".") as error:
        changed(folder, wrong)
    assert word in str(error.value) and FILE in str(error.value)


def test_drafts_read_the_set_of_their_temperature(folder):
    """And promise by it; the text stays. A factor near 0 makes all candidates alike."""
    plain = Qwen3.from_pretrained(folder, "cpu", progress=False)
    own = torch.tensor([1.0, 0.0]).repeat(2, 31, 1)
    own[1, :, 0] = 1e-3
    flat, prompt = changed(folder, own), [5, 6, 7, 8]

    def told(model, temperature):
        runs = []
        result = model.generate(
            prompt, "two-pass", 12, tree_nodes=15, temperature=temperature, seed=1,
            on_run=lambda run, kept: runs.append(run),
        )  # fmt: skip
        return result.token_ids, [run.tree.scores for run in runs if run.tree is not None]

    assert told(plain, 0.0) == told(flat, 0.0)
    (text, scores), (same, others) = told(plain, 0.8), told(flat, 0.8)
    assert text == same and scores != others


def test_the_verb(folder, tmp_path, capsys, monkeypatch):
    """It keeps weights and tables, and says what it fitted on."""
    monkeypatch.setattr(calibration, "OWN_TOKENS", 24)
    monkeypatch.setattr(calibration, "ROUNDS", 1)
    text, out = tmp_path / "text.py", tmp_path / "out"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(300)))
    small = ["--calibrate", "--text", str(text), "--texts", "2"]
    assert main(["bigram", str(folder), str(out), *small]) == 0
    before, after = load_file(folder / FILE), load_file(out / FILE)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert after[CALIBRATION].shape == (2, 31, 2) and after[CALIBRATION].dtype == torch.float32
    assert not torch.equal(after[CALIBRATION][0], after[CALIBRATION][1])
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    facts = json.loads((out / "training.json").read_text())
    assert facts["bigram"]["rank"] == 32 and facts["bigram"][CALIBRATION]["texts"] == 2
    assert "verify" not in facts, "measured without it"
    capsys.readouterr()
    (folder / FILE).unlink()
    for options, word in (
        (small, "no bigram tables"), ([*small[:-1], "0"], "texts is 0"),
        ([*small, "--steps", "3"], "leave out"),
        (small[1:], "--texts is of --calibrate"),
    ):  # fmt: skip
        assert main(["bigram", str(folder), str(tmp_path / "no"), *options]) == 2
        said = capsys.readouterr().err
        assert word in said.splitlines()[-1] and not (tmp_path / "no").exists()
