"""Kills and collisions of trainings into odd OUT folders: nothing that was there is lost, and a run that is
resumed gives the same bits.

A training is a fifth of a second in a child forked from this process, which has imported torch and not used
it. A child is hurt at the n-th call that changes a name, or by a signal at any time; or something is done to
its OUT meanwhile; or a second child wants the same OUT. One case in forty is a process of its own."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import errno
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch._dynamo  # which optimizers import: once here, not in every child
from fuzzing import LONGEST_LINE, Finding

from qwen3_model.cli import main
from qwen3_model.training import corpus, loop, recipe

COUNT = 40
KINDS = {
    "lost": "what was there before, appeared meanwhile or was trained to the end is still there, whole",
    "not resumed bit for bit": "a resumed run writes the tensors of one that was not interrupted",
    "two owners": "two runs never write the same OUT or state",
    "litter": "after SIGTERM and SIGINT no temporary file or folder is left",
    "traceback": "every end is one line",
    "long line": f"a line of an error has at most {LONGEST_LINE} characters",
}
STEPS, PATIENCE = 5, 60.0  # seconds
SIZES = {
    "pretrain": "--hidden-size 64 --layers 1 --vocab-size 270 --batch 2 --length 32",
    "distill": "--batch 2 --length 32 --blocks 2 --block-size 4",
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
OPERATIONS = "rename", "replace", "unlink", "rmdir", "fsync"
_cache: dict[str, Path] = {}
torch.set_num_threads(1)


@dataclass
class Child:
    """A training in a process of its own."""

    pid: int
    err_file: Path
    code: int | None = None  # negative: the signal that ended it

    def wait(self, seconds: float = PATIENCE) -> Child:
        """Until it ends, or is ended for taking too long."""
        until = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
            else:
                time.sleep(0.002)
        return self

    @property
    def err(self) -> str:
        """What it said on stderr."""
        return self.err_file.read_text("utf-8", "replace")

    @property
    def trained(self) -> bool:
        """Whether its training came to its end."""
        return "pretrained " in self.err or "distilled " in self.err


def start(
    folder: Path, words: list[str], hurt: Callable[[], None] = lambda: None, save_every: float = 0.0
) -> Child:
    """Fork a child that runs a command line in `folder`. hurt: called in it before. save_every: seconds
    between states, so that a kill leaves one."""
    number, err_file = 1, folder / "err-1"
    while err_file.exists():
        number += 1
        err_file = folder / f"err-{number}"
    err_file.touch()
    (folder / "tmp").mkdir(exist_ok=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # none may meet a child that is still this process
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return Child(pid, err_file)
    code = 1
    try:
        for fd, file in ((1, "/dev/null"), (2, str(err_file))):
            os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), fd)
        sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8", buffering=1) for fd in (1, 2))  # noqa: SIM115
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        tempfile.tempdir = str(folder / "tmp")
        os.chdir(folder)
        for name in ("PRETRAIN", "DISTILL"):
            setattr(recipe, name, dataclasses.replace(getattr(recipe, name), save_every=save_every))
        hurt()
        code = main(words)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException as error:  # a traceback to who runs it in a shell
        with contextlib.suppress(BaseException):
            print(f"Traceback {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def cached(name: str) -> Path:
    """What all cases share: a text, a base, and what trainings write that nobody disturbs."""
    if "root" not in _cache:
        _cache["root"] = Path(tempfile.mkdtemp(prefix="fuzz-out-shared-"))
        atexit.register(shutil.rmtree, _cache["root"], ignore_errors=True)
        rng = random.Random(0)
        words = [f"name{rng.randrange(30)} = {rng.randrange(99)}\n" for _ in range(500)]
        (_cache["root"] / "text").write_text("".join(words))
    path = _cache["root"] / name
    if not path.exists():
        verb, seed = name.split("-")
        child = start(_cache["root"], command(verb, path, int(seed))).wait()
        assert child.code == 0, child.err
    return path


def command(verb: str, out: Path | str, seed: int) -> list[str]:
    """A small training into OUT."""
    base = [str(cached("pretrain-0"))] if verb == "distill" else []
    text = str(cached("text"))
    return [
        verb,
        *base,
        str(out),
        *SIZES[verb].split(),
        "--text",
        text,
        "--steps",
        str(STEPS),
        "--seed",
        str(seed),
    ]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes, links as what they point to."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = os.fsencode(os.readlink(path))
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def tensors_of(folder: Path) -> bytes | None:
    """The weights of a checkpoint with all its files; None for what is none."""
    there = {path.name for path in folder.iterdir()} if os.path.isdir(folder) else set()
    if not {"config.json", "tokenizer.json", "training.json", "model.safetensors"} <= there:
        return None
    return (folder / "model.safetensors").read_bytes()


@dataclass
class Scene:
    """An OUT with what lies around it. real: OUT without links."""

    folder: Path
    out: str  # as the command line gives it
    real: Path
    options: list[str]
    earlier: bool = False  # a checkpoint is there
    refused: bool = False  # before any training

    def faults(self, child: Child, before: dict[str, bytes], wanted: bytes) -> Iterator[Finding]:
        """What is wrong after a run, whatever became of it. before: the files around it. wanted: what it
        trains."""
        yield from said_faults(child)
        own = str(self.real.relative_to(self.folder)) + os.sep
        earlier = {name.removeprefix(own): c for name, c in before.items() if name.startswith(own)}
        replaceable = self.earlier and "--overwrite" in self.options
        after = tree(self.folder)
        for name, content in before.items():
            if after.get(name) != content and not (replaceable and name.startswith(own)):
                yield Finding("lost", f"{name} is gone or another (exit code {child.code})")
        places = self.real, self.real.with_name(f".{self.real.name}.replaced")
        there = [earlier.items() <= tree(place).items() for place in places if os.path.isdir(place)]
        if self.earlier and tensors_of(self.real) != wanted and not any(there):
            yield Finding("lost", f"OUT is neither what it was nor the new one: {listing(self.real.parent)}")
        elif not self.refused and not any(there) and tensors_of(self.real) not in (wanted, None):
            yield Finding("lost", f"OUT is another checkpoint: {listing(self.real)}")
        elif not self.earlier and not self.refused and tensors_of(self.real) is None and list_of(self.real):
            yield Finding("lost", f"OUT is half a checkpoint: {listing(self.real)}")
        if self.refused and (child.code == 0 or child.trained):
            yield Finding("lost", f"not refused at the start (exit code {child.code}): {child.err[-200:]}")
        state = self.real.with_name(f"{self.real.name}.state.safetensors")
        if child.trained and child.code in (0, 2) and wanted not in self.news() and not state.exists():
            yield Finding("lost", f"what was trained is nowhere (exit code {child.code}): {child.err[-200:]}")

    def news(self) -> list[bytes | None]:
        """The checkpoints in OUT and visibly beside it."""
        beside = [path for path in list_of(self.real.parent) if path.name.startswith(f"{self.real.name}.new")]
        return [tensors_of(place) for place in (self.real, *beside)]

    def litter(self) -> Iterator[Finding]:
        """What an ended run has left that is no OUT, no state and no checkpoint under a known name."""
        known = f".{self.real.name}.replaced"
        hidden = [p for p in list_of(self.real.parent) if p.name.startswith(".") and p.name != known]
        hidden += [*list_of(self.folder / "tmp"), *self.folder.rglob("*.tmp")]
        if hidden:
            yield Finding("litter", ", ".join(sorted(path.name for path in hidden)))


def list_of(folder: Path) -> list[Path]:
    """What a folder holds; nothing where there is none."""
    return sorted(folder.iterdir()) if os.path.isdir(folder) else []


def listing(folder: Path) -> str:
    """Names in a folder."""
    return ", ".join(path.name for path in list_of(folder))


def said_faults(child: Child) -> Iterator[Finding]:
    """What is wrong with how a run ended."""
    if "Traceback" in child.err or child.code == 1:
        yield Finding("traceback", f"exit code {child.code}: {child.err[-300:]!r}")
    if any(len(line) > LONGEST_LINE for line in child.err.splitlines()):
        yield Finding("long line", f"{max(map(len, child.err.splitlines()))} characters")


def scene(rng: random.Random, folder: Path) -> Scene:
    """An OUT folder of some kind."""
    (folder / "a").mkdir()
    (folder / "a" / "precious").write_bytes(rng.randbytes(20))
    kinds = {
        "fresh": 3, "empty": 1, "deep": 1, "dotted": 1, "relative": 1, "file": 1, "inside a file": 1,
        "full": 1, "checkpoint": 1, "replaced": 6, "with folders": 1, "link": 2, "linked checkpoint": 2,
        "nowhere": 1, "itself": 1, "long": 1, "too long": 1,
    }  # fmt: skip
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    real = folder / "a" / "out"
    found = Scene(folder, str(real), real, [])
    if kind in ("empty", "full", "link"):
        real.mkdir()
    if kind == "deep":
        found = Scene(folder, str(folder / "b" / "c" / "out"), folder / "b" / "c" / "out", [])
    if kind == "dotted":
        found.out = f"{folder}/tmp/../a/./out"
    if kind == "relative":
        found.out = "a/out"
    if kind == "file":
        real.write_text("x")
        found.refused = True
    if kind == "inside a file":
        real.write_text("x")
        found = Scene(folder, str(real / "out"), real / "out", [], refused=True)
    if kind == "full":
        (real / "notes").write_text("x")
        found.options, found.refused = rng.choice([[], ["--overwrite"]]), True
    if kind in ("checkpoint", "replaced", "with folders", "linked checkpoint"):
        shutil.copytree(cached("pretrain-9"), real)
        (real / "notes.txt").write_bytes(rng.randbytes(20))
        found.earlier = True
        found.options = [] if kind == "checkpoint" else ["--overwrite"]
    if kind == "checkpoint":
        found.refused = True
    if kind == "with folders":
        (real / "more").mkdir()
        (real / "more" / "notes").write_text("x")
        found.refused = True
    if kind in ("link", "linked checkpoint", "nowhere", "itself"):
        target = {"nowhere": "gone", "itself": "link"}.get(kind, "out")
        (folder / "a" / "link").symlink_to(target)
        found.out, found.refused = str(folder / "a" / "link"), kind in ("nowhere", "itself")
    if kind in ("long", "too long"):
        name = "n" * (200 if kind == "long" else rng.randrange(240, 256))
        found = Scene(folder, str(folder / "a" / name), folder / "a" / name, [], refused=kind == "too long")
    return found


def injured(rng: random.Random) -> tuple[str, Callable[[], None]]:
    """Something that befalls a child at the n-th call that changes a name: (what, how)."""
    what = rng.choice(["kill", "kill", "interrupt", "interrupt", "error"])
    operations, last = rng.choice([(("rename", "replace"), 5 + STEPS), (OPERATIONS, 40)])
    at, behind = rng.randrange(1, last), rng.random() < 0.5
    calls = 0

    def befall() -> None:
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt if what == "interrupt" else OSError(errno.EIO, os.strerror(errno.EIO))

    def wrapped(real: Callable) -> Callable:
        def call(*args: object, **settings: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at and not behind:
                befall()
            answer = real(*args, **settings)
            if calls == at and behind:
                befall()
            return answer

        return call

    def hurt() -> None:
        for name in operations:
            setattr(os, name, wrapped(getattr(os, name)))

    return what, hurt


def at_step(step: int, do: Callable[[], None]) -> Callable[[], None]:
    """Has a child do something behind a step of its training."""

    def hurt() -> None:
        loop._Report.show = lambda self, now, *_: do() if now == step else None  # type: ignore[method-assign]

    return hurt


def resumed(on: Scene, words: list[str], wanted: bytes) -> Iterator[Finding]:
    """Go on with a run that was ended: it says what there is to look at, or ends with the bits wanted."""
    again = [*words, "--resume"] + (
        [] if "--overwrite" in words or tensors_of(on.real) is None else ["--overwrite"]
    )
    for _ in range(2):
        child = start(on.folder, again).wait()
        yield from said_faults(child)
        if child.code == 0:
            break
    if child.code != 0 or tensors_of(on.real) != wanted:
        yield Finding("not resumed bit for bit", f"exit code {child.code}: {child.err[-200:]}")


def ended_early(rng: random.Random, folder: Path) -> Iterator[Finding]:
    """A training that a signal or an error ends, somewhere; then it is resumed."""
    on, verb, seed = scene(rng, folder), rng.choice(["pretrain", "pretrain", "distill"]), rng.randrange(1, 3)
    words = [*command(verb, on.out, seed), *on.options]
    wanted, before = tensors_of(cached(f"{verb}-{seed}")), tree(folder)
    assert wanted is not None
    if rng.random() < 0.6:
        what, hurt = injured(rng)
        child = start(folder, words, hurt).wait()
    else:
        number = rng.choice(SIGNALS)
        child, what = start(folder, words), number.name
        time.sleep(rng.uniform(0, 0.3))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, number)
        child.wait()
    yield from on.faults(child, before, wanted)
    if what in ("SIGTERM", "SIGINT"):
        yield from on.litter()
    if not on.refused and child.code != 0:
        yield from resumed(on, words, wanted)


def changed_meanwhile(rng: random.Random, folder: Path) -> Iterator[Finding]:
    """Something appears where OUT is to be, or happens to it or the state, while the training runs."""
    around = folder / "a"
    on = Scene(folder, str(around / "out"), around / "out", [])
    around.mkdir()
    if rng.random() < 0.6:
        shutil.copytree(cached("pretrain-9"), on.real)
        on.options = ["--overwrite"]
    how = rng.choice(
        ["notes", "a file changed", "a file", "a link", "another checkpoint", "moved away", "state"]
    )

    def do() -> None:
        if on.real.exists() and how not in ("notes", "a file changed", "state"):
            os.rename(on.real, around / "moved")
        if how in ("notes", "a file changed"):
            on.real.mkdir(exist_ok=True)
            (on.real / ("notes" if how == "notes" else "config.json")).write_text("precious")
        elif how == "a file":
            on.real.write_text("precious")
        elif how == "a link":
            (around / "other").mkdir()
            (around / "other" / "notes").write_text("precious")
            on.real.symlink_to("other")
        elif how == "another checkpoint":
            shutil.copytree(cached("pretrain-2"), on.real)
        elif how == "state":
            on.real.with_name("out.state.safetensors").unlink(missing_ok=True)
            on.real.with_name("out.state.safetensors").write_text("precious")
        (folder / "seen").write_bytes(pickle.dumps(tree(around)))

    child = start(
        folder, [*command("pretrain", on.out, 1), *on.options], at_step(rng.randrange(2, STEPS), do)
    )
    child.wait()
    yield from said_faults(child)
    after, untouched = tree(around), how in ("state", "moved away")
    for name, content in pickle.loads((folder / "seen").read_bytes()).items():
        passing = name.startswith(".") or (".state." in name and how != "state")  # the run's own
        if not (passing or (untouched and name.startswith("out/"))) and after.get(name) != content:
            yield Finding("lost", f"{how} {on.options}: {name} is gone (exit code {child.code})")
    if how != "state" and tensors_of(cached("pretrain-1")) not in on.news():
        yield Finding(
            "lost", f"{how}: the new checkpoint is nowhere (exit code {child.code}): {child.err[-200:]}"
        )
    yield from on.litter()


def collided(rng: random.Random, folder: Path) -> Iterator[Finding]:
    """A second training wants the OUT of one that is at work, or its state."""
    (folder / "a").mkdir()
    out = folder / "a" / "out"
    spelling = rng.choice([str(out), "a/out", f"{folder}/a/../a/out", "link/out", "link", "state"])
    if spelling in ("link/out", "link"):
        (folder / "link").symlink_to("a" if spelling == "link/out" else "a/out")
        if spelling == "link":
            out.mkdir()
    first, second = command("pretrain", out, 1), command("pretrain", spelling, 2)
    if spelling == "state":
        first += ["--state", str(folder / "s")]
        second = [*command("pretrain", folder / "a" / "two", 2), "--state", "s", "--resume"]
    ready, done = folder / "ready", folder / "done"

    def do() -> None:
        ready.touch()
        until = time.monotonic() + PATIENCE / 2
        while not done.exists() and time.monotonic() < until:
            time.sleep(0.005)

    one = start(folder, first, at_step(2, do), save_every=300.0)
    until = time.monotonic() + PATIENCE / 2
    while not ready.exists() and time.monotonic() < until:
        time.sleep(0.005)
    if rng.random() < 0.2:  # the owner dies: its lock says nothing any more
        os.kill(one.pid, signal.SIGKILL)
        one.wait()
        (folder / "s").unlink(missing_ok=True)
        out.with_name("out.state.safetensors").unlink(missing_ok=True)
        two = start(folder, second, save_every=300.0).wait()
        yield from said_faults(two)
        if two.code != 0:
            yield Finding("two owners", f"refused for a dead owner: {two.err[-200:]}")
        return
    two = start(folder, second, save_every=300.0).wait()
    done.touch()
    one.wait()
    yield from said_faults(one)
    yield from said_faults(two)
    if two.code != 2 or two.trained or one.code != 0:
        yield Finding("two owners", f"{spelling}: exit codes {one.code}, {two.code}: {two.err[-100:]}")
    if tensors_of(out) != tensors_of(cached("pretrain-1")):
        yield Finding("lost", f"{spelling}: OUT is not what the first wrote")


def tiny(rng: random.Random, folder: Path) -> Iterator[Finding]:
    """tiny-checkpoint, which has a temporary folder elsewhere, ended by a signal."""
    text = cached("text")
    source = corpus.Source(text, "text", "d 1", "MIT", "00000001" + "0" * 56, text.stat().st_size)

    def hurt() -> None:
        corpus._candidates = lambda: iter([source])

    words = ["tiny-checkpoint", str(folder / "out"), "--pretrain-seconds", "30", "--select-tokens", "1000"]
    child = start(folder, words, hurt)
    time.sleep(rng.uniform(0, 0.6))
    number = rng.choice([signal.SIGTERM, signal.SIGINT])
    os.kill(child.pid, number)
    child.wait()
    yield from said_faults(child)
    yield from Scene(folder, str(folder / "out"), folder / "out", []).litter()
    if child.code not in (0, 130, 143, -number):
        yield Finding("traceback", f"exit code {child.code} after {number.name}: {child.err[-200:]}")


def in_a_process(rng: random.Random, folder: Path) -> Iterator[Finding]:
    """A command as a shell starts it, ended by a signal from its first import on."""
    on = Scene(folder, str(folder / "a" / "out"), folder / "a" / "out", [])
    wanted, words = tensors_of(cached("pretrain-1")), command("pretrain", on.out, 1)
    (folder / "tmp").mkdir()
    assert wanted is not None
    program = "import sys; from qwen3_model.cli import main; sys.exit(main())"
    with open(folder / "err-1", "wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *words], stderr=err, stdout=err, cwd=folder,
            env=os.environ | {"TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    time.sleep(rng.uniform(0.5, 4.5))
    process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
    child = Child(process.pid, folder / "err-1", process.wait())
    yield from on.faults(child, {}, wanted)
    (folder / "a").mkdir(exist_ok=True)
    if child.code != 0:
        yield from resumed(on, words, wanted)


def case(rng: random.Random, folder: Path) -> Iterator[Finding]:
    """One kill or collision."""
    for name in ("text", "pretrain-0", "pretrain-9"):
        cached(name)
    kinds = {ended_early: 20, changed_meanwhile: 9, collided: 8, tiny: 2, in_a_process: 1}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    yield from kind(rng, folder)
