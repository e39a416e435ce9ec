"""Corpus, tokenizer, held-out prompts, and the trainings end to end: what is written, and what is refused."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from trained import BLOCKS, CONFIG, PLAN, files_of, make_base, make_orthrus, sharded_copy

from qwen3_model import InputError, Qwen3, Qwen3Config
from qwen3_model.training import corpus, folder, held_out, recipe, tiny
from qwen3_model.training.base import load_tokenizer, pick_mask
from qwen3_model.training.corpus import Source, licence_of, own_texts, sources
from qwen3_model.training.held_out import PROMPT_TOKENS, SPAN, held_out_prompts, span_hashes
from qwen3_model.training.tokenizer import MASK, train_tokenizer
from qwen3_model.training.unlikelihood import Continuations


@pytest.mark.parametrize(
    ("fields", "classifiers", "stated"),
    [
        ({"License-Expression": "MIT"}, [], "MIT"),
        ({"License-Expression": "Apache-2.0 OR BSD-2-Clause"}, [], "Apache-2.0 OR BSD-2-Clause"),
        ({}, ["License :: OSI Approved :: BSD License"], "BSD License"),
        ({"License": "whatever"}, ["License :: OSI Approved :: MIT License"], "MIT License"),
        ({"License": "BSD 3-Clause"}, ["Topic :: Software"], "BSD 3-Clause"),
        ({"License-Expression": "GPL-3.0-only"}, [], None),
        ({}, ["License :: OSI Approved :: GNU Lesser General Public License v3 (LGPLv3)"], None),
        ({"License-Expression": "MIT OR GPL-2.0-only"}, [], None),
        ({"License-Expression": "MIT AND MPL-2.0"}, [], None),
        ({"License": "MIT"}, ["License :: Other/Proprietary License"], None),
        ({"License": "see LICENSE.txt"}, [], None),
        ({"License": "Permitted to all who are not an emitter"}, [], None),
        ({"License": "MIT " + "whole text of a licence " * 20}, [], None),
        ({}, [], None),
    ],
)
def test_licences(fields, classifiers, stated):
    assert licence_of(fields, classifiers) == stated


def source(path: Path, content: str, distribution: str = "d 1") -> Source:
    path.write_text(content)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Source(path, f"d/{path.name}", distribution, "MIT", digest, len(content.encode()))


def test_the_corpus_takes_each_content_once_and_no_package_for_the_whole(tmp_path, monkeypatch):
    files = [source(tmp_path / f"{i}.py", f"x = {i % 90}\n" * 300, f"pkg{i % 10} 1") for i in range(100)]
    monkeypatch.setattr(corpus, "_candidates", lambda: iter(files))
    kept = sources(10**6)
    assert len(kept) == len({f.digest for f in kept}) == 90
    assert [f.digest for f in kept] == sorted(f.digest for f in kept)
    little = sources(100_000)
    assert 50_000 < sum(f.size for f in little) <= 100_000
    for package in {f.distribution for f in little}:
        assert sum(f.size for f in little if f.distribution == package) <= 15_000


def test_held_out_files_are_chosen_by_content_alone():
    def file(name: str, i: int) -> Source:
        return Source(Path(name), name, name, "MIT", hashlib.sha256(str(i).encode()).hexdigest(), 1)

    chosen = [file("a", i).held_out for i in range(6000)]
    assert chosen == [file("b", i).held_out for i in range(6000)]
    assert 70 < sum(chosen) < 130  # one in 60


def test_own_texts(tmp_path):
    (tmp_path / "in" / ".git").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("é")
    (tmp_path / "in" / "copy.txt").write_text("é")
    (tmp_path / "in" / "picture").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "in" / ".git" / "b.txt").write_text("hidden")
    (tmp_path / "c.txt").write_text("c")
    found = own_texts([tmp_path / "in", tmp_path / "c.txt"])
    assert [f.name for f in found] == ["in/a.txt", "c.txt"]
    (tmp_path / "empty").mkdir()
    for paths, words in (
        (["nowhere"], "not there"), (["in/picture"], "UTF-8"), (["empty"], "no text"), (["in", "x"], "there")
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            own_texts([tmp_path / path for path in paths])


TOKENIZER = train_tokenizer(["def f(x):\n    return x + 12345\n" * 5, "Grüße, 世界 \U0001f600\n"], 280)


@given(st.text())
def test_any_text_survives_the_tokenizer(text):
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= token < 280 for token in ids)


def test_digits_stand_alone():
    assert TOKENIZER.encode("12345").tokens == list("12345")
    with pytest.raises(InputError, match="at least 260"):
        train_tokenizer(["x"], 100)


@given(
    tokens=st.lists(st.integers(0, 2), min_size=SPAN - 1, max_size=SPAN + 30),
    again=st.integers(0, 40),
)
def test_span_hashes_are_equal_where_the_spans_are(tokens, again):
    text = np.array(tokens + tokens[:again] + tokens, np.int32)
    hashes = span_hashes(text).tolist()
    spans = [tuple(text[i : i + SPAN].tolist()) for i in range(len(text) - SPAN + 1)]
    assert len(hashes) == len(spans)
    assert len(set(hashes)) == len(set(spans)) == len(set(zip(hashes, spans, strict=True)))


def functions(seed: int, count: int = 12) -> str:
    """Source text that no other seed shares a long run with."""
    words = np.random.default_rng(seed).integers(0, 10**9, (count, 14))
    return "".join(
        f"def f{i}_{row[0]}(x):\n" + "".join(f"    x = x * {word} + {seed}\n" for word in row)
        for i, row in enumerate(words.tolist())
    )


def test_no_held_out_prompt_shares_a_span_with_the_training_text(tmp_path, monkeypatch):
    files = [source(tmp_path / f"{i}.py", functions(i), f"pkg{i} 1") for i in range(8)]
    clean = np.array(TOKENIZER.encode(functions(100)).ids, np.int32)
    before = held_out_prompts(files, TOKENIZER, clean)
    assert len({row["source"] for row in before}) == 8
    assert {row["split"] for row in before} == {"test", "dev"}
    assert not {r["source"] for r in before if r["split"] == "dev"} & {
        r["source"] for r in before if r["split"] == "test"
    }
    victim = before[len(before) // 2]["prompt"]
    ids = TOKENIZER.encode(victim).ids
    assert len(ids) in PROMPT_TOKENS and all(row["licence"] == "MIT" for row in before)
    planted = np.concatenate([clean, np.array(ids[40 : 40 + SPAN], np.int32), clean])
    after = held_out_prompts(files, TOKENIZER, planted)
    assert {r["prompt"] for r in before} - {r["prompt"] for r in after} >= {victim}
    assert after, "only what was planted goes"
    spans = {tuple(planted[i : i + SPAN].tolist()) for i in range(len(planted) - SPAN + 1)}
    for row in after:
        own = TOKENIZER.encode(row["prompt"]).ids
        assert not spans & {tuple(own[i : i + SPAN]) for i in range(len(own) - SPAN + 1)}
    short = np.concatenate([clean, np.array(ids[40 : 40 + SPAN - 1], np.int32)])  # a token less is no span
    assert victim in {r["prompt"] for r in held_out.held_out_prompts(files, TOKENIZER, short)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base", steps=5)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_distillation_leaves_the_base_bit_for_bit(base, tmp_path):
    """Base in, Orthrus out: AR tensors, tokenizer and template are the base's; the twins have moved."""
    before = files_of(base)
    found = make_orthrus(base, tmp_path / "out", plan=dataclasses.replace(PLAN, steps=3))
    assert found is not None and found.tokens_per_cycle >= 1 and len(found.by_offset) == BLOCKS.size - 1
    assert files_of(base) == before
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    assert all(same_bits(ours[name], tensor) for name, tensor in theirs.items())
    twins = sorted(ours.keys() - theirs.keys())
    assert len(twins) == 6 * CONFIG.num_hidden_layers and all("_diff" in name for name in twins)
    moved = [name for name in twins if not same_bits(ours[name], theirs[name.replace("_diff", "")])]
    assert len([n for n in moved if "proj" in n]) == 4 * CONFIG.num_hidden_layers
    written = files_of(tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert written[name] == before[name]
    facts = json.loads(written["training.json"])
    assert (facts["distill"]["steps"], facts["pretrain"]["steps"]) == (3, 5)
    assert "3 steps of 4 rows" in written["README.md"].decode()
    config = Qwen3Config.from_folder(tmp_path / "out")
    assert config.block_size == 8 and config.mask_token_id == load_tokenizer(base).token_to_id(MASK)
    text = Qwen3.from_pretrained(tmp_path / "out", device="cpu", progress=False)
    plain = Qwen3.from_pretrained(base, device="cpu", progress=False)
    settings = {"max_new_tokens": 20, "temperature": 1.0, "seed": 1}
    assert text.generate([5, 6], **settings).token_ids == plain.generate([5, 6], **settings).token_ids


def test_a_sharded_base_gives_a_sharded_orthrus(base, tmp_path):
    parts, whole = sharded_copy(base, tmp_path / "parts"), tmp_path / "whole"
    make_orthrus(parts, whole, plan=dataclasses.replace(PLAN, steps=2))
    config = Qwen3Config.from_folder(whole)
    network, out = folder.load_network(whole, config), tmp_path / "out"
    folder.save_distilled(parts, out, network, {}, "card", shard_bytes=60_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2 and {f.name for f in shards} == set(index["weight_map"].values())
    ours = {name: w for file in shards for name, w in load_file(file).items()}
    expected = load_file(whole / "model.safetensors")
    assert ours.keys() == expected.keys() == index["weight_map"].keys()
    assert all(same_bits(ours[name], w) and w.dtype == torch.float32 for name, w in expected.items())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in ours.values())
    assert all(
        sum(w.nbytes for w in load_file(f).values()) <= 60_000 or len(load_file(f)) <= 2 for f in shards
    )
    assert (out / "LICENSE").read_text() == "terms"
    Qwen3.from_pretrained(out, device="cpu", progress=False)  # the loader takes shards and index


def test_the_mask_token():
    assert pick_mask(TOKENIZER, 300, None) == TOKENIZER.token_to_id(MASK) == 3
    assert pick_mask(TOKENIZER, 300, 7) == 7
    plain = type(TOKENIZER).from_str(TOKENIZER.to_str().replace(MASK, "<|other|>"))
    assert pick_mask(plain, 281, None) == 280  # the first row that belongs to no token
    for rows, wanted in ((280, None), (281, 281), (281, -1)):
        with pytest.raises(InputError, match="mask"):
            pick_mask(plain, rows, wanted)


def stage(name: str, told: dict | None = None):
    """In place of a training: a folder like the one before, with a file of this name. told: takes what it was
    called with but for folders."""

    def run(*folders_and_more, **settings) -> None:
        if told is not None:
            told[name] = [x for x in folders_and_more if not isinstance(x, Path)], settings
        *base, out = [Path(at) for at in folders_and_more if isinstance(at, Path)]
        shutil.copytree(base[0], out) if base else out.mkdir()
        (out / name).write_text(", ".join(sorted(file.name for file in out.iterdir())))

    return run


def test_the_whole_recipe_on_the_common_corpus(tmp_path, monkeypatch):
    """run_tiny in small: held-out prompts by file, an estimate on them, the model card. What ranks drafts is
    fitted behind that; a view of three steps gives a fit nothing to go by."""
    files = [source(tmp_path / f"{i}.py", functions(i, 6), f"pkg{i % 9} 1") for i in range(250)]
    monkeypatch.setattr(corpus, "_candidates", lambda: iter(files))
    monkeypatch.setattr(recipe, "ESTIMATED_TOKENS", 40)
    monkeypatch.setattr("qwen3_model.training.rollout.OWN_PROMPT", 16)
    monkeypatch.setattr("qwen3_model.training.rollout.OWN_TOKENS", 48)
    plan = dataclasses.replace(PLAN, steps=3)
    own = Continuations(count=4, prompt=32, tokens=32, steps=2)
    told: dict = {}
    for name in ("run_calibration", "run_select"):
        monkeypatch.setattr(tiny, name, stage(name, told))
    tiny.run_tiny(
        tmp_path / "out", 60, 60, 60, 60, 50, seed=3, config=CONFIG, plans=(plan,) * 4, own=own,
        blocks=BLOCKS, select_tokens=1000, texts=7,
    )  # fmt: skip
    assert told["run_calibration"] == ([7, recipe.CORPUS_BYTES, 3], {})
    limits = dataclasses.replace(tiny.SELECTION, seconds=50, seed=3)
    assert told["run_select"] == ([limits, recipe.CORPUS_BYTES], {"tokens": 1000, "texts": 7})
    view = json.loads((tmp_path / "out" / "training.json").read_text())["distill"]
    assert (view["loss"], view["own_text"], view["seed"]) == ("ce", 1.0, 3) and "corpus" not in view
    before = (tmp_path / "out" / "run_select").read_text().split(", ")
    assert "run_calibration" in before and "bigram.safetensors" in before
    card = (tmp_path / "out" / "README.md").read_text()
    assert "rank 32, 3 steps of 4 rows" in card
    model = Qwen3.from_pretrained(tmp_path / "out", "cpu", progress=False)
    assert model.bigram is not None and model.bigram.after.any()
    assert "| pkg1 1 | MIT |" in card and "3 steps of 4 x 64 tokens" in card and "tokens a cycle" in card
    prompts = [json.loads(line) for line in (tmp_path / "out" / "held_out.jsonl").read_text().splitlines()]
    assert {row["source"] for row in prompts} <= {f.name for f in files if f.held_out}


def test_a_selector_that_cannot_be_fitted_loses_nothing_else(tmp_path, monkeypatch):
    """Twenty minutes of a GPU are in OUT before the one line says what is missing."""

    def select(*_: object, **__: object) -> None:
        raise InputError("no step was better")

    for name in ("run_pretrain", "run_unrepeat", "run_distill", "run_bigram", "run_calibration"):
        monkeypatch.setattr(tiny, name, stage(name))
    monkeypatch.setattr(tiny, "run_select", select)
    with pytest.raises(InputError, match="out has no selector, which orthrus select can fit: no step was"):
        tiny.run_tiny(tmp_path / "out", 60, 60, 60, 60, 60, select_tokens=1000)
    names = ["run_bigram", "run_calibration", "run_distill", "run_pretrain", "run_unrepeat"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    monkeypatch.setattr(tiny, "run_calibration", select)
    with pytest.raises(InputError, match="no calibration, which orthrus bigram --calibrate fits, and no sel"):
        tiny.run_tiny(tmp_path / "two", 60, 60, 60, 60, 60, select_tokens=1000)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "run_calibration", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.run_tiny(tmp_path / "three", 60, 60, 60, 60, 60, select_tokens=1000)
    names.remove("run_calibration")
    for out in ("two", "three"):
        assert sorted(file.name for file in (tmp_path / out).iterdir()) == names
    for tokens, word in ((0, "tokens is 0; 1 or more was expected"), (10**12, "use fewer --select-tokens")):
        with pytest.raises(InputError, match=word):
            tiny.run_tiny(tmp_path / "new", 60, 60, 60, 60, 60, select_tokens=tokens)
    with pytest.raises(InputError, match="seconds is 0"):
        tiny.run_tiny(tmp_path / "new", 60, 60, 60, 60, 0)
    assert not (tmp_path / "new").exists()
