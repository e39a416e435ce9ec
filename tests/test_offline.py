"""The hub's cache without the hub: what is read must be there, what is only listed need not."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from qwen3_model import InputError
from qwen3_model.hub import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHOLE = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
pytestmark = pytest.mark.skipif(
    not hasattr(huggingface_hub.errors, "IncompleteSnapshotError"), reason="older clients ask no list"
)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Makes a cache of one model that holds some files and lists some more; returns the snapshot."""

    def make(held: list[str], listed: list[str]) -> Path:
        repository = tmp_path / "models--acme--tiny"
        snapshot = repository / "snapshots" / COMMIT
        for folder in (snapshot, repository / "refs", repository / "trees"):
            folder.mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        for name in held:
            (snapshot / name).write_text("{}")
        files = {name: {"size": 2, "blob_id": "0" * 40} for name in held + listed}
        (repository / "trees" / f"{COMMIT}.json").write_text(
            json.dumps({"format_version": 1, "files": files})
        )
        return snapshot

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return make


@pytest.fixture(params=["offline", "unreachable"])
def no_hub(request, monkeypatch):
    """The two ways to be without it: HF_HUB_OFFLINE, and an address where nobody answers."""
    if request.param == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "listed", [[], ["vocab.json", "merges.txt", "consolidated.safetensors", "README.md"]]
)
def test_a_snapshot_with_all_that_is_read_is_taken(cached, listed):
    snapshot = cached(WHOLE, listed)
    assert resolve("acme/tiny") == snapshot
    assert resolve("acme/tiny", "main") == snapshot


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "name", ["generation_config.json", "chat_template.jinja", "model-00002-of-00002.safetensors"]
)
def test_a_snapshot_that_lacks_what_is_read_is_refused(cached, name):
    """Without generation_config.json the text would end elsewhere, and nothing would say so."""
    cached([held for held in WHOLE if held != name], [name])
    with pytest.raises(InputError, match=rf"cache lacks files that are read \({name}\)"):
        resolve("acme/tiny")


@pytest.mark.usefixtures("no_hub")
def test_a_model_that_is_not_cached_is_refused(cached):
    cached(WHOLE, [])
    with pytest.raises(InputError, match="cannot be reached and its cache does not hold this"):
        resolve("acme/other")
