"""Where a checkpoint is: a local folder, or a hub id that is downloaded or found in the hub's cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub

from .errors import InputError, one_line, quoted

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
OF_OTHERS = ["*/*.safetensors", "*/*.json", "*/*.txt"]  # weights of other formats lie in subfolders
# Of these, what decides the text. The rest is for other programs, or for speed.
READ_FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja", "adapter_config.json",
    "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors",
]  # fmt: skip


def resolve(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: an existing one, or a hub id ("owner/name") downloaded or found in
    the hub's cache.

    revision: branch, tag or commit of a hub id. Raises InputError when there is neither, or the hub refuses.
    """
    name = str(path_or_id)
    folder = os.path.expanduser(name)
    if name and os.path.isdir(folder):
        if revision is not None:
            raise InputError(
                f"revision {quoted(revision)} was given with the local folder {name}: "
                "revisions belong to hub ids, leave it out"
            )
        return Path(folder)
    if name and os.path.exists(folder):
        raise InputError(f"{name} is a file; a checkpoint folder or a hub id (owner/name) was expected")
    if not HUB_ID.fullmatch(name) or ".." in name:
        raise InputError(
            f"there is no folder {quoted(name)}, and it is not a hub id: "
            "give a checkpoint folder or owner/name"
        )
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    """The snapshot folder of a hub id. Raises InputError in one line for whatever keeps it from coming."""
    at = f"{name} at revision {quoted(revision)}" if revision is not None else name
    try:
        return _snapshot(name, revision, HUB_FILES)
    except hub.GatedRepoError:
        reason = "the hub wants a login with access to it: request access, then run `hf auth login`"
    except hub.RepositoryNotFoundError:
        reason = "it is neither a local folder nor a public model of the hub: check the spelling"
    except hub.RevisionNotFoundError:
        reason = "the hub has no such revision: give a branch, tag or commit of this model"
    except Exception as error:  # the hub's client lets errors of its HTTP library through, which one varies
        try:
            return _snapshot(name, revision, READ_FILES, local_files_only=True)
        except Exception as in_cache:
            reason = _why_not_in_cache(in_cache, error)
    raise InputError(f"cannot get {at}: {reason}") from None


def _snapshot(name: str, revision: str | None, files: list[str], local_files_only: bool = False) -> Path:
    """A snapshot with all of these files that the hub lists, of the hub or of its cache alone."""
    return Path(
        huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=files,
            ignore_patterns=OF_OTHERS,
            local_files_only=local_files_only,
        )
    )


def _why_not_in_cache(in_cache: Exception, of_hub: Exception) -> str:
    if hasattr(in_cache, "snapshot_path"):  # of huggingface_hub 2; before, a snapshot counted as whole
        lacking = re.search(r"missing \((.*?)\)", str(in_cache))
        return (
            "the hub cannot be reached, and its cache lacks files that are read "
            f"({one_line(lacking[1] if lacking else in_cache, 200)}): download them once"
        )
    if isinstance(of_hub, hub.LocalEntryNotFoundError):
        return (
            "there is no such local folder, the hub cannot be reached and its cache does not hold this: "
            "check the spelling and the connection"
        )
    return one_line(of_hub, 240)
