"""The selector: its file, what it changes in drafts and what never in texts, how it is fitted, its verb and
its bench."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_selector import drawn
from interpreter import DEVICE
from safetensors.torch import load_file, save_file
from small import small_config

from bench import oracle, trace
from bench import selector as bench_selector
from orthrus_kernels import Sampling
from qwen3_model import InputError, Qwen3, Qwen3Config, bigram, selector
from qwen3_model.bigram import FILE as TABLES_FILE
from qwen3_model.bigram import ONE_PASS, TWO_PASS, Bigram, Gate
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.cli import main
from qwen3_model.lattice import Candidates
from qwen3_model.prompts import read_prompts
from qwen3_model.quantised.scheme import WHERE, read_quantisation
from qwen3_model.quantising.written import Fp8
from qwen3_model.selector import FILE
from qwen3_model.training import calibration, selector_run
from qwen3_model.training.base import dev_prompts, load_tokenizer
from qwen3_model.training.calibration import BESIDE, blocks_of
from qwen3_model.training.folder import load_network
from qwen3_model.training.followed import Drafts, Lattice, along, by_tables, drafts_of, follow, greedy_texts
from qwen3_model.training.selector_fit import DECAY, Data, Limits, Selector, data_of, fit_selector

V, E, P, K = 24, 24, 4, 6  # of the planted data
D = 31  # offsets of a block of the embedded checkpoint


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """The embedded checkpoint with such a selector."""
    copy = tmp_path_factory.mktemp("selector") / "orthrus"
    shutil.copytree(EMBEDDED, copy, ignore=shutil.ignore_patterns(FILE))
    selector.save(copy, drawn())
    return copy


@pytest.fixture
def folder(chosen, tmp_path):
    copy = tmp_path / "orthrus"
    shutil.copytree(chosen, copy)
    return copy


# its file


def test_tables_get_its_columns(chosen):
    """u and A e, w and B e side by side, in the model's dtype; G as a linear has it."""
    stored, tables = load_file(chosen / FILE), load_file(chosen / TABLES_FILE)
    for dtype in (torch.float32, torch.bfloat16):
        found = Qwen3.from_pretrained(chosen, "cpu", dtype, progress=False)
        e, both = found.embedding.float(), found.bigram
        for mine, table, matrix in ((both.before, "before", "front"), (both.after, "after", "behind")):
            assert torch.equal(mine[:, :32], tables[table].to(dtype)) and mine.dtype == dtype
            torch.testing.assert_close(mine[:, 32:], (e @ stored[matrix].float()).to(dtype))
        assert torch.equal(both.gate.weight.dense(), stored["gate"].t().to(dtype))
        assert torch.equal(both.gate.places, stored["places"])
        assert torch.equal(both.gate.calibration, stored["calibration"])


def without(name):
    return lambda found: found.pop(name)


def put(name, tensor):
    return lambda found: found.update({name: tensor})


@pytest.mark.parametrize(
    "harm, word",
    [
        (without("gate"), "front, behind, gate were expected"),
        (without("places"), "lacks places"),
        (without("calibration"), "lacks calibration: fit it anew, with orthrus select"),
        (put("more", torch.zeros(2)), "front, behind, gate were expected"),
        (put("front", torch.zeros(255, 5)), "front has shape [255, 5]"),
        (put("behind", torch.zeros(256, 4)), "behind has shape [256, 4]"),
        (put("places", torch.zeros(2, 30, 5)), "places has shape [2, 30, 5]"),
        (put("calibration", torch.ones(2, D, 2)), "calibration has shape [2, 31, 2]"),
        (put("gate", torch.zeros(256, 5).to(torch.int8)), "gate is I8"),
        (put("gate", torch.full((256, 5), float("nan"))), "not finite numbers: fit them anew"),
        (put("calibration", torch.zeros(2, 2, D, 2)), "not above 0: fit it anew, with orthrus select"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_does_not_fit_is_refused(folder, harm, word, capsys):
    found = load_file(folder / FILE)
    harm(found)
    save_file(found, folder / FILE)
    assert main(["generate", "x", "--model", str(folder), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert word in said and FILE in said and said.count("\n") == 1
    assert main(["info", str(folder)]) == 2 and word in capsys.readouterr().err


def test_a_file_that_cannot_be_read_and_one_without_tables(folder, capsys):
    with open(folder / FILE, "r+b") as file:
        file.truncate(999)
    with pytest.raises(InputError, match="cut short"):
        Qwen3.from_pretrained(folder, "cpu", progress=False)
    assert main(["info", str(folder)]) == 2 and "cut short" in capsys.readouterr().err
    selector.save(folder, drawn())
    (folder / TABLES_FILE).unlink()
    with pytest.raises(InputError, match="there is no bigram.safetensors: copy that too"):
        Qwen3.from_pretrained(folder, "cpu", progress=False)


def test_info_says_how_drafts_are_ranked(chosen, capsys):
    for at, rank in ((EMBEDDED, 64), (chosen, 5)):
        want = {"bigram": 32, "selector": rank}
        assert main(["info", str(at), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["draft_tables"]
        assert {name: found[name] for name in want} == want
    assert main(["info", str(chosen)]) == 0
    assert "a selector" in capsys.readouterr().out


# what it changes


@pytest.fixture(scope="module")
def model(chosen):
    found = Qwen3.from_pretrained(chosen, "cpu", "float32", "torch", progress=False)
    found.ops = replace(found.ops, branch=lambda *_: None)  # what lookup finds is no draft of these blocks
    prompts = read_prompts(EMBEDDED / "held_out.jsonl", 12, split="dev")
    return found, [found.text.encode(prompts[0])[-40:], found.text.encode(prompts[9])[-23:]]


HOW = {
    "chain": {"strategy": "two-pass", "tree_nodes": 0}, "tree": {"strategy": "two-pass", "tree_nodes": 15},
    "one-pass": {"strategy": "one-pass", "tree_nodes": 9},
}  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, pytest.param(0.8, marks=pytest.mark.slow)])
def test_texts_stay_and_drafts_change(chosen, temperature):
    """Alone and side by side, in every strategy: tokens and log-probabilities of plain decoding."""
    ours = Qwen3.from_pretrained(chosen, "cpu", "float32", "reference", progress=False)
    prompts, tables = [[5, 6, 7, 8], [11, 12, 900]], ours.bigram

    same = {"max_new_tokens": 6, "temperature": temperature, "seed": 1, "block_size": 8}

    def told(**how):
        results = ours.generate_many(prompts, slots=2, cache_tokens=768, **same, **how)
        return [(result.token_ids, result.logprobs) for result in results]

    def trees(**how):
        runs = []
        ours.generate(prompts[0], on_run=lambda run, kept: runs.append(run), **same, **how)
        return [run.tree.tokens for run in runs if run.tree is not None]

    plain = told(strategy="autoregressive")
    for how in HOW.values():
        assert told(**how) == plain
        ours.bigram = Bigram.of(tables.before[:, :32].contiguous(), tables.after[:, :32].contiguous())
        without_it, ours.bigram = trees(**how), tables
        assert trees(**how) != without_it


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_beside_weights_that_round_their_rows(backend):
    """Gates are of bf16 states, whatever the layers multiply by: drafts stay plain decoding's text."""
    read = read_quantisation({WHERE: Fp8().config([])})
    fit = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_hidden_layers": 1}
    ours = Qwen3.from_config(
        small_config(**fit, quantisation=read), 0, DEVICE if backend == "triton" else "cpu", "bfloat16",
        backend, "fp8",
    )  # fmt: skip
    v, d = ours.config.vocab_size, ours.config.block_size - 1
    tables = Bigram.of(*(torch.randn(v, 4, device=ours.device, dtype=ours.dtype) for _ in "uw"))
    how = {"max_new_tokens": 4, "temperature": 1.0, "seed": 2}
    plain, drafts = ours.generate([5, 6, 7], "autoregressive", **how), []
    for mine in (tables, selector.joined(tables, drawn(3, 128, d), 50 * ours.embedding)):
        ours.bigram, runs = mine, []
        result = ours.generate(
            [5, 6, 7], "two-pass", tree_nodes=5, on_run=lambda r, _, s=runs: s.append(r), **how
        )
        assert result.token_ids == plain.token_ids and result.logprobs == plain.logprobs
        drafts.append([run.tree.tokens for run in runs if run.tree is not None])
    assert drafts[0] != drafts[1]


def test_a_trace_follows_it(model):
    """Offline lattices, ranked with their gates, say what cycles keep."""
    ours, prompts = model
    found = trace.record(ours, prompts[:1], 16, "selected")
    drafts, _ = bench_selector.held_out(load_network(EMBEDDED, ours.config), prompts[:1], 16)
    ranked = by_tables(ours.bigram)
    two, one = follow(drafts[TWO_PASS], ranked, [31]), follow(drafts[ONE_PASS], ranked, [19])
    for nodes, of, name in ((0, two, trace.CHAIN), (31, two, "31"), (19, one, None)):
        how = {"strategy": "one-pass" if of is one else "two-pass", "tree_nodes": nodes}
        runs = []
        ours.generate(prompts[0], max_new_tokens=16, on_run=lambda run, _, r=runs: r.append(run), **how)
        tokens = [len(run.tokens) for run in runs[1:]]
        assert of.pairs(nodes).tolist() == [[sum(tokens), len(tokens)]]
        if name is not None:
            assert trace_kept(found.texts[0], name) == tokens
    best = oracle.of_drafts(drafts[TWO_PASS])
    assert (best[:, 1] <= two.pairs(31)[:, 1]).all()


def trace_kept(text, kind):
    """Tokens of each cycle along a trace."""
    at, found = 0, []
    while at < text.tokens - 1:
        found.append(min(text.kept[kind][at], text.tokens - 1 - at))
        at += found[-1]
    return found


def test_calibrations_see_its_gates():
    """Blocks of both forms: factors of the formula by position, none at a root that the block has seen."""
    g = torch.Generator().manual_seed(1)
    text, n = torch.tensor([3, 1, 4, 1, 5, 2]), 6
    lattice = Candidates(
        torch.randn(n, 3, 4, generator=g).log_softmax(-1) - 0.5,
        torch.randint(0, 9, (n, 3, 4), generator=g), torch.randn(n, 3, 2, generator=g),
    )  # fmt: skip
    before, after = (torch.randn(9, 5, generator=g) for _ in "uw")
    places = torch.randn(2, 4, 2, generator=g)
    tables = Bigram(before, after, torch.ones(2, 4, 2), Gate(None, places, torch.ones(2, 2, 4, 2)))
    for form, block, drop in ((TWO_PASS, 2, 0), (ONE_PASS, 1, 1)):  # of root text[1]
        found = blocks_of(tables, lattice, text, Sampling(temperature=0.5), form)
        for p in range(3 - drop):
            row = p + drop
            weighed = torch.cat([torch.ones(3), 1 + lattice.gates[block, row] + places[form, row]])
            want = 2.0 * after[lattice.ids[block, row]] @ (before[text[1 + p]] * weighed)
            want = torch.zeros(4) if p == 0 and form == TWO_PASS else want
            torch.testing.assert_close(found.change[1, p, :4], want)
            names = lattice.ids[block, row].tolist()
            token = int(text[2 + p])
            assert found.said[1, p] == (names.index(token) if token in names else 4)


# how it is fitted


def planted(seed: int, m: int = 1500) -> Data:
    """Behind token a comes 3 a + 1 or 5 a + 2, as the sign of the state's first number says; the view finds
    all candidates alike, and both are among them."""
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(m, P, E, generator=g)
    fronts, truth, ids = [torch.randint(V, (m,), generator=g)], [], []
    for p in range(P):
        two = torch.stack([(3 * fronts[p] + 1) % V, (5 * fronts[p] + 2) % V], -1)
        said = torch.where(states[:, p, 0] > 0, two[:, 0], two[:, 1])
        others = torch.stack([(two[:, 0] + d) % V for d in (5, 7, 11, 13)], -1)
        names = torch.cat([two, others], -1)
        ids.append(names.gather(1, torch.rand(m, K, generator=g).argsort(-1)))
        truth.append(said)
        fronts.append(said)
    blocks = Lattice(
        torch.full((m, P, K), -2.0),
        torch.stack(ids, 1),
        torch.stack(fronts[:P], 1),
        torch.stack(truth, 1),
        states,
    )
    return Data(blocks, torch.ones(m, P), [m])


NOTHING = Bigram.of(torch.zeros(V, 3), torch.zeros(V, 3))


@pytest.fixture(scope="module")
def fitted():
    """A selector of an embedding whose rows are small: (selector, how it was fitted, embedding)."""
    embedding = 0.05 * torch.randn(V, E, generator=torch.Generator().manual_seed(1))
    data, dev = planted(2), planted(3, 300)
    torch.manual_seed(0)
    made = Selector(embedding, NOTHING, 20, D)
    limits = Limits(steps=100, rate=2e-2, batch=128)
    return made, fit_selector(made, [data, data], [dev, dev], limits, every=20), embedding


def chains(ranked, data: Data) -> float:
    """Proposals that a chain keeps."""
    return float(np.mean(follow(Drafts(data.blocks, True, data.each), ranked, []).kept[0][0]))


def test_the_selector_learns_what_tables_cannot(fitted):
    """Tables know the pair of tokens and not which of them. What is stored ranks as what was fitted; a gate
    of another position is worth nothing."""
    made, fit, embedding = fitted
    assert sum(fit.after) < 0.5 * sum(fit.before) and fit.best > 0
    ranked, test = by_tables(selector.joined(NOTHING, made.found(), embedding)), planted(5, 200)
    moved = Lattice(*test.blocks.tensors[:4], test.blocks.states.roll(1, 1))
    kept = chains(ranked, test)
    # position 0 has seen its root and is ranked by the view alone, which here says nothing
    assert 1.5 * chains(ranked, Data(moved, test.weight, test.each)) < kept < P
    with torch.no_grad():
        for form in (TWO_PASS, ONE_PASS):
            behind = made.scores(form, test.blocks).exp()[..., :K]
            scores, order = ranked(Drafts(test.blocks, form == TWO_PASS, test.each))
            first = torch.zeros(200, 1, K).scatter(-1, order[:, 0, :1].long(), scores[:, 0, :1].exp())
            torch.testing.assert_close(behind[:, :1], first, rtol=1e-3, atol=1e-4)


def test_what_is_best_on_the_development_texts_is_kept(fitted):
    made, fit, _ = fitted
    dev = planted(3, 300)
    assert [made.loss(form, dev, slice(None)).item() for form in (0, 1)] == pytest.approx(fit.after, rel=1e-4)
    assert fit.best <= fit.steps == 100 and sum(fit.after) < sum(fit.before)


def test_offsets_that_are_not_fitted_are_as_the_last_one():
    made = Selector(torch.randn(V, E), NOTHING, 2, D)
    with torch.no_grad():
        made.places += torch.arange(D)[:, None]
    assert made.found()["places"][TWO_PASS, 13:, 0].unique().tolist() == [13, 14]
    assert made.found()["places"][ONE_PASS, 5:, 0].unique().tolist() == [5, 6]


def test_what_counts_in_the_loss():
    """Behind a token that is no candidate nothing counts; a block inside another's draft counts little."""
    blocks = planted(9, 3).blocks.map(torch.clone)
    blocks.truth[1, 1], blocks.truth[2, 2:] = V + 1, -1
    ones = by_tables(NOTHING)
    weight = data_of(blocks, [3], TWO_PASS, ones).weight
    powers = [DECAY**p for p in range(P)]
    runs = follow(Drafts(blocks, True, [3]), ones, [63]).kept[63][0]
    first = [
        1.0 if i == 0 or i == runs[0] + 1 or (runs[0] == 0 and i == 2 + runs[1]) else BESIDE for i in range(3)
    ]
    want = [[first[0] * x for x in powers], [first[1] * x for x in powers[:2]] + [0, 0],
            [first[2] * x for x in powers[:2]] + [0, 0]]  # fmt: skip
    torch.testing.assert_close(weight, torch.tensor(want), rtol=1e-6, atol=0)


# its verb


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Options of a fit on few short texts."""
    monkeypatch.setattr(calibration, "ROUNDS", 1)
    monkeypatch.setattr(selector_run, "OWN_TOKENS", 24)
    monkeypatch.setattr(selector_run, "WINDOW", 4)
    text = tmp_path / "text.py"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(400)))
    few = "--tokens 72 --texts 1 --rank 3 --steps 4 --batch 8 --lr 1e-3"
    return ["--text", str(text), *few.split()]


@pytest.mark.parametrize("prompts", [pytest.param(2, marks=pytest.mark.slow), 0])
def test_the_verb(folder, tmp_path, quick, capsys, prompts):
    """The best step by development prompts, else by own text that is held back. Weights and tables stay,
    with and without a calibration."""
    lines = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    dev = [line for line in lines if line["split"] == "dev"][:prompts]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in dev))
    if not prompts:
        (folder / "held_out.jsonl").unlink()
        learnt = {name: t for name, t in load_file(folder / TABLES_FILE).items() if name != "calibration"}
        save_file(learnt, folder / TABLES_FILE)
    out = tmp_path / "out"
    assert main(["select", str(folder), str(out), *quick]) == 0
    for name in ("model.safetensors", TABLES_FILE):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    found, facts = load_file(out / FILE), json.loads((out / "training.json").read_text())
    assert found["front"].shape == (256, 3) and found["front"].dtype == torch.bfloat16
    assert found["places"].shape == (2, D, 3)
    assert found["calibration"].shape == (2, 2, D, 2) and found["calibration"].unique().numel() > 20
    said = facts["selector"]
    assert (said["rank"], said["tokens"], said["blocks"], said["steps"]) == (3, 72, 12, 4)
    assert said["best_by"] == ("dev prompts" if prompts else "own text") and "verify" not in facts
    assert "loss" in capsys.readouterr().err
    assert Qwen3.from_pretrained(out, "cpu", progress=False).bigram.before.shape[1] == 32 + 3


@pytest.mark.parametrize("text", [False, True])
def test_which_texts_calibrate_it(folder, tmp_path, quick, monkeypatch, text):
    """Those behind development prompts, as the view has learnt the corpus; with --text those behind pieces of
    that, as they are what the user will decode."""
    lines = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    dev = [line for line in lines if line["split"] == "dev"][:2]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in dev))
    prompts = dev_prompts(folder, load_tokenizer(folder), 2048).tolist()
    files, whole, seen = [Path(quick[1])], selector_run.corpus_for, []

    def corpus_for(config, tokenizer, size, text, began):
        return whole(config, tokenizer, size, text or files, began)

    def calibrated(base, found, behind, began):
        seen.append(behind.tolist())
        raise InputError("enough")

    monkeypatch.setattr(selector_run, "corpus_for", corpus_for)
    monkeypatch.setattr(selector_run, "_calibration", calibrated)
    assert main(["select", str(folder), str(tmp_path / "no"), *(quick if text else quick[2:])]) == 2
    assert len(seen) == 1 and len(seen[0]) == 1 and (seen[0] == prompts[:1]) is not text


def test_what_the_verb_refuses(folder, tmp_path, quick, capsys):
    """In one line, before anything is written."""
    for more, word in (
        (["--rank", "0"], "selector rank is 0; 1 to 256"),
        (["--tokens", "0"], "tokens is 0"),
        (["--texts", "0"], "texts is 0"),
        (["--steps", "0"], "steps is 0"),
        (["--seconds", "-1"], "seconds is -1"),
        (["--lr", "2"], "lr is 2.0"),
        (["--tokens", "90000"], "give more text (--text, --corpus-mb), or fewer --tokens"),
        (["--tokens", str(10**15)], "of memory, and there are"),
    ):
        assert main(["select", str(folder), str(tmp_path / "no"), *quick, *more]) == 2
        said = capsys.readouterr().err
        assert word in said.splitlines()[-1] and not (tmp_path / "no").exists(), (more, said)
    save_file(drawn() | {"gate": torch.full((256, 5), float("nan"))}, folder / FILE)
    assert main(["select", str(folder), str(tmp_path / "no"), *quick]) == 2
    said = capsys.readouterr().err.splitlines()
    assert f"Remove {folder / FILE} before it is fitted anew" in said[-1] and len(said) < 3, "before the fit"
    (folder / TABLES_FILE).unlink()
    (folder / FILE).unlink()
    assert main(["select", str(folder), str(tmp_path / "no"), *quick]) == 2
    assert "has no bigram tables: orthrus bigram learns them first" in capsys.readouterr().err


@pytest.mark.parametrize("known", [True, False])
def test_other_tables_leave_it_out(folder, tmp_path, monkeypatch, capsys, known):
    """It belongs to those that it was fitted beside, whether training.json tells of it or not."""
    monkeypatch.setattr(calibration, "OWN_TOKENS", 8)
    monkeypatch.setattr(calibration, "ROUNDS", 1)
    facts = json.loads((folder / "training.json").read_text())
    more = {"selector": {"rank": 5}} if known else {}
    (folder / "training.json").write_text(json.dumps(facts | more))
    text, out = tmp_path / "text.py", tmp_path / "out"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(300)))
    assert main(["bigram", str(folder), str(out), "--calibrate", "--text", str(text), "--texts", "1"]) == 0
    assert not (out / FILE).exists() and "orthrus select fits one anew" in capsys.readouterr().err
    assert "selector" not in json.loads((out / "training.json").read_text())
    assert load_file(out / TABLES_FILE)["before"].shape == (2048, 32)


def test_texts_that_say_too_little_are_refused(folder, tmp_path, monkeypatch, capsys):
    """A folder with such a calibration would not load."""
    monkeypatch.setattr(calibration, "OWN_TOKENS", 8)
    monkeypatch.setattr(calibration, "fit", lambda texts: torch.full((D, 2), float("inf")))
    text, out = tmp_path / "text.py", tmp_path / "out"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(300)))
    assert main(["bigram", str(folder), str(out), "--calibrate", "--text", str(text), "--texts", "1"]) == 2
    assert "1 texts are too few to calibrate on: use more --texts" in capsys.readouterr().err
    assert not out.exists()


# its bench


def test_the_bench(chosen, tmp_path, capsys):
    file = tmp_path / "s.json"
    few = ["--prompts", "1", "--new", "12", "--device", "cpu", "--json", str(file)]
    assert bench_selector.main(["--model", str(chosen), *few]) == 0
    found, said = json.loads(file.read_text()), capsys.readouterr().out
    ways = found["ways"]
    assert list(ways) == ["no tables", "tables", bench_selector.CALIBRATED, bench_selector.SELECTED]
    assert all(w["tree 63"]["tokens_per_cycle"] <= found["oracle"]["two-pass"] for w in ways.values())
    assert ways[bench_selector.CALIBRATED]["tree 31"]["gain"] == [1, 1, 1] and "oracle of 16" in said


def test_the_embedded_one_ranks_better():
    """Texts stay without it, so only this shows that the one which is shipped fits its tables and its model:
    right first candidates of three texts' blocks are 438 by the tables and 453 by it."""
    network = load_network(EMBEDDED, Qwen3Config.from_folder(EMBEDDED)).requires_grad_(False)
    tables = bigram.load(EMBEDDED, network.config, torch.device("cpu"), torch.float32)
    both = selector.load(EMBEDDED, network.config, tables, network.model.embed_tokens.weight)
    encode = load_tokenizer(EMBEDDED).encode_batch
    prompts = [e.ids for e in encode(read_prompts(EMBEDDED / "held_out.jsonl", 3, split="test"))]
    texts = greedy_texts(network, prompts, 48, 8)
    drafts = drafts_of(along(network, texts, 8, states=True), texts.counts, True)
    old, new = (int(follow(drafts, by_tables(way), []).first[:, 0].sum()) for way in (tables, both))
    assert new > 445 and new > 1.02 * old > 430
