"""OUT, the folder that a training writes: owned by one run from its start, looked at again before it is
replaced.

Beside OUT lie, for as long as they are needed, `.OUT.lock` (files.owned), `.OUT.XXXXXXXX` (the new checkpoint
while it is written), `OUT.new` (the new checkpoint, whole) and `.OUT.replaced` (the earlier one, on its way
out). A whole checkpoint is never removed before another is in its place. So wherever a run is killed, OUT is
the old folder or the new one, or both are there under these names and the next run says so."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..chat_template import MORE_TEMPLATES
from ..errors import InputError, one_line
from ..files import folders_made, owned, reason, resolved, sync
from .interrupts import ending_by_signals

_log = logging.getLogger(__name__)
Seen = frozenset[tuple[str, int, int]]  # name, bytes and time of the last change of what a folder holds


class OutFolder:
    """A folder that this run alone writes. path: without links."""

    def __init__(self, given: Path, path: Path) -> None:
        self.given, self.path = given, path
        self._replaced = path.with_name(f".{path.name}.replaced")
        self._seen: Seen | None = None  # what OUT held when the run began
        self._mode = 0  # and who might look into it

    def __str__(self) -> str:
        return str(self.given)

    def check_base(self, base: Path) -> None:
        """Raises InputError where OUT and a run's base are one, or one lies in the other."""
        base = base.resolve()
        if self.path == base:
            raise InputError(f"{self} is the base itself: choose another folder")
        if base.is_relative_to(self.path):
            raise InputError(f"{self} holds the base {base}: choose another folder")
        if self.path.is_relative_to(base):
            raise InputError(f"{self} lies in the base {base}: choose another folder")

    def begin(self, overwrite: bool) -> None:
        """Remember what is there. Raises InputError for what may not be replaced, and where a killed run has
        left something to look at."""
        try:
            self._recover()
            self._tell_what_is_left()
            self._seen = _seen(self.path)
            self._mode = stat.S_IMODE(self.path.stat().st_mode) if self._seen else 0
            self._temporary().rmdir()
        except OSError as error:
            raise InputError(f"{self} cannot be made ({reason(error)}): choose another folder") from None
        if self._seen and not overwrite:
            raise InputError(f"{self} is not empty: choose another folder, or --overwrite")
        if self._seen and not (self.path / "config.json").is_file():
            raise InputError(f"{self} holds no checkpoint: --overwrite replaces checkpoints only")
        folders = {entry.name for entry in self.path.iterdir() if entry.is_dir()} if self._seen else set()
        if folders - {MORE_TEMPLATES}:
            raise InputError(f"{self} holds folders too: --overwrite replaces a checkpoint's files only")
        if self._seen and not os.access(self.path, os.W_OK):
            raise InputError(f"{self} may not be changed: choose another folder")

    def put(self, fill: Callable[[Path], None]) -> None:
        """Fill a temporary folder beside OUT, then put it in OUT's place.

        OUT is replaced as it was when the run began. If anything else is there by now, all stays as it is and
        the new checkpoint is kept beside it. Raises InputError that says where."""
        new = self._written(fill)
        try:
            self._swap(new)
        except OSError as error:
            earlier = f", what {self} held is in {self._replaced}" if self._replaced.exists() else ""
            where = new if new.exists() else self.path
            raise InputError(
                f"{self} could not be replaced: {reason(error)}; the new checkpoint is in {where}{earlier}"
            ) from None

    def _written(self, fill: Callable[[Path], None]) -> Path:
        """A new checkpoint beside OUT, whole and on the disk, under a name that says what it is."""
        temporary = self._temporary()
        try:
            fill(temporary)
            mode = stat.S_IMODE(temporary.stat().st_mode)  # what the umask leaves
            for entry in temporary.rglob("*"):
                if entry.is_file():
                    entry.chmod(mode & 0o666)  # safetensors makes files that their owner alone may read
                sync(entry)
            if self._seen:  # whoever may not look into the earlier checkpoint may not look into this one
                temporary.chmod(self._mode)
            sync(temporary)
            return self._kept(temporary, "new")
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _swap(self, new: Path) -> None:
        """Put a whole folder in OUT's place. Raises OSError where OUT is not what it was, or the system
        refuses; then, and at any interruption, OUT is what it was or the new folder."""
        try:
            if self._seen and os.path.lexists(self.path):
                self._check_unchanged(self.path)
                os.rename(self.path, self._replaced)
                self._check_unchanged(self._replaced)  # now that nobody finds it
            os.rename(new, self.path)  # over an empty folder, and over nothing else
        finally:
            self._settle(new)
        sync(self.path.parent)

    def _settle(self, new: Path) -> None:
        """After a swap, done or broken off: give the earlier checkpoint its name back, or remove it."""
        if not os.path.lexists(self._replaced):
            return
        if not os.path.lexists(self.path):
            os.rename(self._replaced, self.path)
        elif not os.path.lexists(new):
            doomed = self._name()
            try:
                os.rename(self._replaced, doomed)  # a run killed from here on leaves nothing to look at
                shutil.rmtree(doomed, ignore_errors=True)
            finally:  # after Ctrl-C too
                shutil.rmtree(doomed, ignore_errors=True)

    def _recover(self) -> None:
        """After a run that was killed inside `_swap`. Raises InputError where there was one: its user should
        know before a training begins anew."""
        if not os.path.lexists(self._replaced):
            return
        if os.path.lexists(self.path):
            said = f"{self} is there, and what it held before is in {self._kept(self._replaced, 'old')}"
        else:
            os.rename(self._replaced, self.path)
            said = f"{self} has its earlier checkpoint again"
            new = max(self._left("new"), key=os.path.getmtime, default=None)
            said += f", the new one is in {new}" if new else ""
        raise InputError(f"an earlier run was killed as it replaced {self}; {said}: look, then start again")

    def _left(self, *kinds: str) -> list[Path]:
        """Folders beside OUT that runs of it have left: whole checkpoints by kind, "" for unfinished ones."""
        name = re.escape(self.path.name)
        patterns = [rf"{name}\.{kind}(-\d+)?" if kind else rf"\.{name}\.[0-9a-f]{{8}}" for kind in kinds]
        return sorted(
            folder
            for folder in self.path.parent.iterdir()
            if any(re.fullmatch(pattern, folder.name) for pattern in patterns) and folder.is_dir()
        )

    def _tell_what_is_left(self) -> None:
        """A line about what earlier runs, killed or refused at their end, have left beside OUT."""
        if left := self._left("new", "old", ""):
            names = ", ".join(folder.name for folder in left)
            _log.warning(
                "%s", one_line(f"earlier runs have left beside {self}: {names}; look and delete them")
            )

    def _check_unchanged(self, folder: Path) -> None:
        if _seen(folder) != self._seen:
            raise OSError("it has changed since this run began")

    def _name(self) -> Path:
        return self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")

    def _temporary(self) -> Path:
        """A new folder beside OUT, with the permissions that the umask leaves."""
        folder = self._name()
        folder.mkdir()
        return folder

    def _kept(self, folder: Path, kind: str) -> Path:
        """Rename a folder beside OUT to `OUT.kind`, or `OUT.kind-2` and so on where that is taken; it keeps
        its name where the system refuses. Returns its name."""
        number = 1
        while True:
            place = self.path.with_name(f"{self.path.name}.{kind}" + (f"-{number}" if number > 1 else ""))
            try:
                os.rename(folder, place)  # over an empty folder, and over nothing else
                return place
            except OSError:
                if not os.path.lexists(place):
                    return folder
            number += 1


@contextmanager
def claimed(out: Path | OutFolder, overwrite: bool = False, base: Path | None = None) -> Iterator[OutFolder]:
    """OUT, owned by this run while the block lasts, and ready to be written; one that is owned already as it
    is. Raises InputError for what could not be written or replaced, before there is anything to lose.

    overwrite: whether a checkpoint that is there may be replaced. base: a folder that must stay. Parent
    folders are made now, and removed again if nothing was written. SIGTERM ends the block as Ctrl-C does."""
    if isinstance(out, OutFolder):
        if base is not None:
            out.check_base(base)
        yield out
        return
    path = resolved(out)
    _check_place(out, path)
    place = OutFolder(out, path)
    if base is not None:
        place.check_base(base)
    with ending_by_signals(), folders_made(place.path.parent, f"{place} cannot be made"), owned(place.path):
        place.begin(overwrite)
        yield place


def _check_place(given: Path, path: Path) -> None:
    """Raises InputError for a path that cannot be a folder of its own."""
    if os.path.lexists(path) and not path.is_dir():
        raise InputError(f"{given} is a file: choose a folder that is not there yet")
    if path.name == "" or os.path.ismount(path):
        raise InputError(f"{given} is a mount point and cannot be replaced: choose a folder inside it")
    for what, folder in (("working", "."), ("home", "~")):
        if Path(os.path.realpath(os.path.expanduser(folder))).is_relative_to(path):
            raise InputError(f"{given} is the {what} folder, or holds it: choose a folder inside it")


def _seen(folder: Path) -> Seen | None:
    """What a folder holds; None for what is no folder."""
    if folder.is_symlink() or not folder.is_dir():
        return None
    about = [(entry.name, entry.stat(follow_symlinks=False)) for entry in os.scandir(folder)]
    return frozenset((name, found.st_size, found.st_mtime_ns) for name, found in about)
