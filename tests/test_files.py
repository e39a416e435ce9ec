"""Files that are replaced whole: names, links, permissions, and what a failure leaves."""

import os
import stat

import pytest

from qwen3_model import InputError, files
from qwen3_model.cli import main
from qwen3_model.cli.output import check_file, write_atomically
from qwen3_model.files import replacing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["x", "x" * 255, "é" * 127])
def test_a_file_may_have_any_name_that_the_system_takes(name, tmp_path):
    for text in ("old", "new"):
        check_file(tmp_path / name)
        write_atomically(tmp_path / name, text)
    assert names(tmp_path) == [name] and (tmp_path / name).read_text() == "new"


@pytest.mark.parametrize(
    ("name", "words"),
    [("x" * 256, "name too long"), ("folder", "not a file"), ("gone/x", "folder is not there"),
     ("file/x", "folder is not there"), ("itself", "leads nowhere"), ("pipe", "not a file")],
)  # fmt: skip
def test_what_could_not_be_written_is_refused_before_any_work(name, words, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "itself").symlink_to("itself")
    os.mkfifo(tmp_path / "pipe")
    before = names(tmp_path)
    with pytest.raises(InputError, match=words):
        check_file(tmp_path / name)
    assert (
        main(["explain", "x", "--max-new-tokens", "1", "--device", "cpu", "--html", str(tmp_path / name)])
        == 2
    )
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and words in said.err
    assert names(tmp_path) == before


def test_what_is_no_file_is_never_replaced(tmp_path):
    """Nor what comes into the file's place while the new one is written."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    said = []
    for name in ("pipe", "link", "late"):
        try:
            with replacing(tmp_path / name):
                if name == "late":
                    os.mkfifo(tmp_path / name)
        except InputError as error:
            said.append(str(error))
    assert ["it is not a file" in words for words in said] == [True] * 3
    assert names(tmp_path) == ["late", "link", "pipe"]
    assert all(stat.S_ISFIFO((tmp_path / name).stat().st_mode) for name in names(tmp_path))


def test_a_failure_leaves_the_old_file_alone(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(file) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/file")
    (tmp_path / "there/file").write_text("old")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "there/file").read_text() == "new" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "x") as beside:
            beside.unlink()
            os.close(os.open(beside, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors does it
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask


def test_the_content_is_on_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    events, sync, replace = [], files.sync, os.replace
    monkeypatch.setattr(files, "sync", lambda path: (events.append(path), sync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    write_atomically(tmp_path / "x", "text")
    assert [e if isinstance(e, str) else e.parent == tmp_path for e in events] == [True, "replace", False]
    assert events[-1] == tmp_path


def test_a_file_that_did_not_get_to_the_disk_replaces_nothing(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("old")

    def full(_file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]
