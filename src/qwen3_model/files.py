"""Files that others may read, write or wait for at the same time: replaced whole, owned by one run."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError, one_line

try:
    import fcntl
except ImportError:  # Windows; there what appeared meanwhile is only seen before it would be replaced
    fcntl = None  # type: ignore[assignment]


def resolved(path: Path) -> Path:
    """A path with its links followed, as far as it is there. Raises InputError for a link that leads nowhere
    or to itself, and for what no file system takes as a name."""
    try:
        if os.path.lexists(path):
            return path.resolve(strict=True)
        return Path(os.path.realpath(path))
    except (OSError, RuntimeError, ValueError) as error:
        where = "a link that leads nowhere" if path.is_symlink() else "no name that can be used"
        raise InputError(f"{path} is {where} ({reason(error)}): choose another name") from None


def reason(error: Exception) -> str:
    """Why the system refused, without the file's name, which the message around it has."""
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


def check_replaceable(path: Path) -> None:
    """Raises InputError where `replacing` could not write a file: found out by writing one."""
    path = resolved(path)
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: its folder is not there")
    try:
        _check_kind(path)
        beside = _beside(path)
        _create(beside)
        beside.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path}: {reason(error)}") from None


def _check_kind(path: Path) -> None:
    """Raises InputError where a folder, a device, a pipe or a socket is in a file's place, and OSError for a
    name that is too long."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise InputError(f"cannot write {path}: it is not a file")


@contextmanager
def replacing(path: Path, permissions: int | None = None) -> Iterator[Path]:
    """A new file beside `path`, empty, that takes its place at the end of the block: whoever reads `path`,
    after a power cut too, finds the old content or the new one, never half of it. A link is followed.
    permissions: of the new file, from the first byte on; None: they follow the umask. Raises InputError where
    `path` is there and is no regular file: a device or a pipe would be gone."""
    path = resolved(path)
    beside = _beside(path)
    mode = _create(beside)
    try:
        if permissions is not None:
            mode = permissions
            beside.chmod(mode)
        yield beside
        beside.chmod(mode)  # safetensors makes files that their owner alone may read
        sync(beside)
        _check_kind(path)  # now: it may have appeared meanwhile
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file's content, or the names in a folder, on the disk. Raises OSError for a file that did not
    get there."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError:
        if stat.S_ISREG(os.fstat(file).st_mode):  # some file systems cannot do it for a folder
            raise
    finally:
        os.close(file)


@contextmanager
def owned(path: Path) -> Iterator[None]:
    """Be the one run that writes `path`, a path without links, while the block lasts.

    The owner holds a lock of the operating system on the empty file `.NAME.lock` beside it. The system lets
    go of it when the process ends, however that ends, so no lock is ever stale. Raises InputError where
    another run holds it or the file cannot be made."""
    lock = path.with_name(f".{path.name}.lock")
    file = None
    try:
        try:
            file = _locked(lock)
        except BlockingIOError:
            raise InputError(
                f"another run is writing {path}: wait for its end, or choose another name"
            ) from None
        except OSError as error:
            raise InputError(f"{path} cannot be written ({reason(error)}): choose another place") from None
        yield
    finally:
        if file is not None:
            os.close(file)
        with suppress(OSError):
            _remove_if_free(lock)


@contextmanager
def folders_made(folder: Path, refusal: str) -> Iterator[None]:
    """A folder with those above it. What of them was made here and is empty at the end is removed. Raises
    InputError("refusal (reason)") where they cannot be made."""
    missing = [f for f in (folder, *folder.parents) if not os.path.lexists(f)]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise InputError(f"{refusal}: {folder} is not a folder; choose another place") from None
        except OSError as error:
            raise InputError(f"{refusal} ({reason(error)}): choose another place") from None
        yield
    finally:
        for made in missing:
            with suppress(OSError):
                made.rmdir()


def _locked(lock: Path, create: int = os.O_CREAT) -> int:
    """The descriptor of a lock file that is now held here. Raises BlockingIOError where another has it."""
    while True:
        file = os.open(lock, os.O_RDWR | create, 0o666)
        try:
            _lock(file)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(lock)):
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its owner removed it between the two steps: that lock says nothing any more


def _remove_if_free(lock: Path) -> None:
    """Remove a lock file that nobody holds; one that holds something is somebody's. Also where a signal came
    in the middle of locking it. Raises OSError where it is held or gone."""
    file = _locked(lock, create=0)
    try:
        if os.fstat(file).st_size == 0:
            lock.unlink()
    finally:
        os.close(file)


def _lock(file: int) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # some network file systems have no locks: as on a system without them
        pass


def _beside(path: Path) -> Path:
    """A hidden name in the folder of `path` that nobody has; short, whatever the file's own is."""
    return path.with_name(f".orthrus-{secrets.token_hex(6)}")


def _create(path: Path) -> int:
    """Make an empty file; returns the permissions that the umask gives it."""
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(file).st_mode)
    finally:
        os.close(file)
