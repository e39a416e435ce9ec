"""OUT of a training: one owner, looked at again before the swap, and a swap that can end anywhere."""

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

from qwen3_model import InputError
from qwen3_model.training import out_folder
from qwen3_model.training.out_folder import claimed

OLD = {"config.json": b"old", "model.safetensors": b"old weights"}
NEW = {"config.json": b"new", "model.safetensors": b"new weights", "README.md": b"new"}


def write(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def fill(folder: Path) -> None:
    write(NEW, folder)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refuse(*_: object) -> None:
    pytest.fail("this was not to be reached")


@pytest.fixture
def checkpoint(tmp_path):
    return write(OLD, tmp_path / "out")


def test_a_new_folder_is_whole_and_alone(tmp_path):
    with claimed(tmp_path / "a" / "b" / "out") as out:
        out.put(fill)
    assert files_of(tmp_path / "a/b/out") == NEW and names(tmp_path / "a/b") == ["out"]


def test_a_checkpoint_is_replaced(checkpoint, tmp_path):
    with claimed(checkpoint, overwrite=True) as out:
        out.put(fill)
    assert files_of(checkpoint) == NEW and names(tmp_path) == ["out"]


def test_a_checkpoint_that_others_may_not_read_is_replaced_by_such_a_one(checkpoint):
    checkpoint.chmod(0o700)
    with claimed(checkpoint, overwrite=True) as out:
        out.put(fill)
    assert stat.S_IMODE(checkpoint.stat().st_mode) == 0o700


def test_chat_templates_in_a_folder_of_their_own_are_replaced_too(checkpoint):
    (checkpoint / "additional_chat_templates").mkdir()
    with claimed(checkpoint, overwrite=True) as out:
        out.put(lambda folder: (fill(folder), write(NEW, folder / "additional_chat_templates")))
    assert files_of(checkpoint / "additional_chat_templates") == NEW


def test_what_earlier_runs_left_is_told(checkpoint, tmp_path, caplog):
    for name in ("out.new", "out.new-2", ".out.0123abcd", "out.other", ".out.kept"):
        (tmp_path / name).mkdir()
    with claimed(checkpoint, overwrite=True):
        pass
    (said,) = [record.getMessage() for record in caplog.records]
    assert ": .out.0123abcd, out.new, out.new-2; " in said
    assert names(tmp_path) == [".out.0123abcd", ".out.kept", "out", "out.new", "out.new-2", "out.other"]


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("nowhere", "a link that leads nowhere"),
        ("itself", "a link that leads nowhere"),
        ("file", "is a file"),
        ("file/out", "file is not a folder"),
        ("/", "is a mount point"),
        ("/proc", "is a mount point"),
        (".", "is the working folder"),
        ("..", "is the working folder, or holds it"),
        ("~", "is the home folder"),
        ("full", "holds no checkpoint"),
        ("with folders", "holds folders too"),
        ("n" * 252, "name too long"),
        ("n" * 300, "name too long"),
        ("n" * 300 + "/out", "name too long"),
        ("base", "is the base itself"),
        ("link to base", "is the base itself"),
        ("base/out", "lies in the base"),
        ("over", "holds the base"),
    ],
)
def test_what_cannot_be_replaced_is_refused_before_any_work(out, words, tmp_path, monkeypatch):
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "file").write_text("mine")
    write({"notes": b"mine"}, tmp_path / "full")
    (write(OLD, tmp_path / "with folders") / "more").mkdir()
    write(OLD, tmp_path / "base")
    (tmp_path / "link to base").symlink_to("base")
    (write(OLD, tmp_path / "over") / "in").symlink_to("../base")
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    place = {"~": tmp_path / "home", ".": Path("."), "..": Path("..")}.get(out, tmp_path / out)
    base = write(OLD, tmp_path / "over" / "base") if out == "over" else tmp_path / "base"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words), claimed(place, overwrite=True, base=base):
        refuse()
    assert sorted(tmp_path.rglob("*")) == before


def test_without_overwrite_a_checkpoint_stays(checkpoint):
    with pytest.raises(InputError, match="is not empty"), claimed(checkpoint):
        refuse()


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with claimed(tmp_path / "link") as out:
        out.put(fill)
    assert files_of(tmp_path / "real") == NEW and os.readlink(tmp_path / "link") == "real"
    assert names(tmp_path) == ["link", "real"]


@pytest.mark.parametrize("spelling", ["out", "link", "linked/out", "a/../out", "RELATIVE"])
def test_every_spelling_meets_the_same_lock(spelling, tmp_path, monkeypatch):
    for folder in ("a", "out"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "linked").symlink_to(".")
    monkeypatch.chdir(tmp_path / "a")
    second = Path("../out") if spelling == "RELATIVE" else tmp_path / spelling
    with claimed(tmp_path / "out") as out:
        with pytest.raises(InputError, match="another run is writing"), claimed(second):
            refuse()
        out.put(fill)
    assert names(tmp_path) == ["a", "link", "linked", "out"]
    with claimed(second, overwrite=True):  # and nobody is in the way any more
        pass


def in_child(do) -> int:
    """Exit code of a forked child that does something."""
    pid = os.fork()
    if not pid:
        try:
            do()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_dead_owner_owns_nothing(tmp_path):
    def die() -> None:
        with claimed(tmp_path / "out"):
            os._exit(9)

    assert in_child(die) == 9 and names(tmp_path) == [".out.lock"]
    with claimed(tmp_path / "out") as out:
        out.put(fill)
    assert names(tmp_path) == ["out"]


def test_a_lock_file_that_its_owner_has_just_removed_is_none(tmp_path, monkeypatch):
    from qwen3_model import files

    flock, calls = files.fcntl.flock, []

    def late(file: int, how: int) -> None:
        calls.append(file)
        if len(calls) == 1:  # its owner ends between our open and our lock
            (tmp_path / ".out.lock").unlink()
        flock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with claimed(tmp_path / "out"):
        assert len(calls) == 2
        with pytest.raises(InputError, match="another run"), claimed(tmp_path / "out"):
            refuse()


def test_a_file_system_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    from qwen3_model import files

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with claimed(tmp_path / "out") as out:
        out.put(fill)
    assert names(tmp_path) == ["out"]


def appears(how: str, out: Path) -> None:
    """Something happens to OUT."""
    if how in ("file", "link", "another"):
        shutil.rmtree(out, ignore_errors=True)
    if how == "notes":
        write({"notes": b"mine"}, out)
    elif how == "changed":
        write({"config.json": b"mine, later"}, out)
    elif how == "file":
        out.write_text("mine")
    elif how == "link":
        out.symlink_to(write({"notes": b"mine"}, out.with_name("other")))
    elif how == "another":
        write({"config.json": b"mine", "notes": b"mine"}, out)


@pytest.mark.parametrize("how", ["notes", "changed", "file", "link", "another"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_stays_and_the_new_checkpoint_is_kept(how, overwrite, tmp_path):
    out = tmp_path / "out"
    if overwrite:
        write(OLD, out)
    write({"config.json": b"taken"}, tmp_path / "out.new")
    with claimed(out, overwrite) as place:
        appears(how, out)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(InputError, match=r"could not be replaced.*new checkpoint is in \S*out\.new-2$"):
            place.put(fill)
    del before[tmp_path / ".out.lock"]
    assert {path: path.read_bytes() for path in before} == before
    assert files_of(tmp_path / "out.new-2") == NEW
    assert out.is_symlink() == (how == "link") and not [n for n in names(tmp_path) if n.startswith(".")]


def test_a_checkpoint_that_was_moved_away_meanwhile_is_none_to_replace(checkpoint, tmp_path):
    with claimed(checkpoint, overwrite=True) as out:
        os.rename(checkpoint, tmp_path / "moved")
        out.put(fill)
    assert files_of(checkpoint) == NEW and files_of(tmp_path / "moved") == OLD


def test_what_slips_in_behind_the_last_look_is_given_back(checkpoint, tmp_path, monkeypatch):
    rename, calls = os.rename, []

    def late(source: Path, target: Path) -> None:
        calls.append(source)
        if Path(source) == checkpoint and len(calls) == 2:
            write({"notes": b"mine"}, checkpoint)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with claimed(checkpoint, overwrite=True) as out, pytest.raises(InputError, match="has changed"):
        out.put(fill)
    assert files_of(checkpoint) == OLD | {"notes": b"mine"} and names(tmp_path) == ["out", "out.new"]


def interrupt_rename(monkeypatch, at: int, behind: bool, error: BaseException) -> None:
    rename, calls = os.rename, []

    def broken(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == at and not behind:
            raise error
        rename(source, target)
        if len(calls) == at and behind:
            raise error

    monkeypatch.setattr(os, "rename", broken)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(errno.EIO, "broken disk")])
def test_a_swap_that_is_interrupted_leaves_the_old_folder_or_the_new(
    at, behind, error, checkpoint, tmp_path, monkeypatch
):
    interrupt_rename(monkeypatch, at, behind, error)
    with pytest.raises((KeyboardInterrupt, SystemExit, InputError)):
        with claimed(checkpoint, overwrite=True) as out:
            out.put(fill)
        if isinstance(error, OSError) and at == 1:  # the new folder only kept its hidden name
            raise KeyboardInterrupt
    assert files_of(checkpoint) in (OLD, NEW)
    if (at, behind) != (4, False):  # the earlier one could not be removed and is still there, whole
        assert [n for n in names(tmp_path) if n not in ("out", "out.new")] == []
    else:
        assert files_of(tmp_path / ".out.replaced") == OLD and files_of(checkpoint) == NEW
    if files_of(checkpoint) == OLD and at > 1:
        assert files_of(tmp_path / "out.new") == NEW


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("behind", [False, True])
def test_a_run_killed_in_its_swap_is_found_by_the_next(at, behind, checkpoint, tmp_path, monkeypatch):
    def die() -> None:
        rename, calls = os.rename, []

        def deadly(source: Path, target: Path) -> None:
            if target != earlier:  # which is taken: the try changes nothing
                calls.append(source)
            if len(calls) == at and not behind:
                os._exit(9)
            rename(source, target)
            if len(calls) == at and behind:
                os._exit(9)

        os.rename = deadly
        with claimed(checkpoint, overwrite=True) as out:
            out.put(fill)

    earlier = write({"config.json": b"kept before"}, tmp_path / "out.new")
    os.utime(earlier, (0, 0))
    assert in_child(die) == 9
    there = [files_of(path) for path in tmp_path.iterdir() if path.is_dir()]
    assert OLD in there or files_of(checkpoint) == NEW
    between = (at, behind) in ((2, True), (3, False))
    assert checkpoint.exists() != between
    behind_the_swap = (at, behind) in ((3, True), (4, False))
    if between or behind_the_swap:
        with pytest.raises(InputError, match="an earlier run was killed as it replaced") as error:
            claimed(checkpoint, overwrite=True).__enter__()
        kept = "out.new-2" if between else "out.old"
        assert f"{tmp_path}/{kept}" in str(error.value)
        assert files_of(checkpoint) == (OLD if between else NEW)
        assert files_of(tmp_path / kept) == (NEW if between else OLD)
    with claimed(checkpoint, overwrite=True) as out:  # and the one behind it goes on
        out.put(lambda folder: write({"config.json": b"newest"}, folder))
    assert files_of(checkpoint) == {"config.json": b"newest"}
    assert files_of(earlier) == {"config.json": b"kept before"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, InputError("full")])
def test_a_folder_that_is_not_whole_is_never_seen(error, checkpoint, tmp_path):
    def broken(folder: Path) -> None:
        write({"config.json": b"half"}, folder)
        raise error

    with pytest.raises((KeyboardInterrupt, OSError, InputError)), claimed(checkpoint, True) as out:
        out.put(broken)
    assert files_of(checkpoint) == OLD and names(tmp_path) == ["out"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_are_those_of_the_umask(umask, tmp_path):
    def private(folder: Path) -> None:
        fill(folder)
        (folder / "model.safetensors").chmod(0o600)  # as safetensors makes its files

    before = os.umask(umask)
    try:
        with claimed(tmp_path / "out") as out:
            out.put(private)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    for file in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask


def test_all_is_on_the_disk_before_a_name_changes(checkpoint, monkeypatch):
    events: list[object] = []
    sync, rename = out_folder.sync, os.rename
    monkeypatch.setattr(out_folder, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("RENAME"), rename(a, b)))
    with claimed(checkpoint, overwrite=True) as out:
        out.put(fill)
    first = events.index("RENAME")
    assert set(events[:first]) >= set(NEW) and len(events[:first]) == len(NEW) + 1  # the folder itself, last
    assert events[-2:] == ["RENAME", checkpoint.parent.name]


def test_parent_folders_go_if_nothing_was_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path / "a" / "b" / "out"):
        assert names(tmp_path) == ["a"]
        raise KeyboardInterrupt
    assert names(tmp_path) == []
