"""Where a checkpoint is: local folders, hub ids, and what the hub refuses, said in one line."""

from pathlib import Path

import huggingface_hub.errors as errors
import pytest

from qwen3_model import InputError
from qwen3_model.hub import resolve


def test_local_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve("owner/name") == Path("owner/name") and resolve(tmp_path) == tmp_path
    with pytest.raises(InputError, match="revisions belong to hub ids"):
        resolve("owner/name", "main")
    (tmp_path / "file.safetensors").touch()
    with pytest.raises(InputError, match="is a file; a checkpoint folder"):
        resolve("file.safetensors")


@pytest.mark.parametrize(
    "name", ["", "nothing", "./a/b", "/no/such", "a/b/c", "a/..", "../b", "a\0b/c", "a b/c", "x" * 9999]
)
def test_what_is_no_folder_and_no_hub_id(name):
    with pytest.raises(InputError, match="no folder .* not a hub id"):
        resolve(name)


def test_a_hub_id_is_downloaded_without_pickle(tmp_path, monkeypatch):
    asked = {}

    def download(name, **settings):
        asked.update(settings, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("owner/name", "v1") == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    assert asked["allow_patterns"] == ["*.safetensors", "*.json", "*.txt", "*.jinja"]


def hub_error(name: str) -> Exception:
    """An error of the hub's client, made without a server's answer."""
    error = getattr(errors, name).__new__(getattr(errors, name))
    error.args = ("first line\nsecond line",)
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (hub_error("RepositoryNotFoundError"), "neither a local folder nor a public model"),
        (hub_error("GatedRepoError"), "wants a login"),
        (hub_error("RevisionNotFoundError"), "no such revision"),
        (hub_error("LocalEntryNotFoundError"), "cannot be reached"),
        (OSError("disk\nfull"), "disk full"),
        (RuntimeError("of an HTTP library"), "of an HTTP library"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_hub_refuses_is_said_in_one_line(monkeypatch, error, says):
    def download(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(InputError, match=says) as caught:
        resolve("owner/name", "v1")
    assert "\n" not in str(caught.value) and "owner/name at revision 'v1'" in str(caught.value)
