"""What the trainings read: a corpus every machine has, the source of Python's standard library and of
installed, permissively licensed packages; or the user's own text.
"""

from __future__ import annotations

import hashlib
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..errors import InputError, one_line

PERMISSIVE = re.compile(
    r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|0BSD|Zlib|Unlicense|HPND)\b", re.I
)
RECIPROCAL = re.compile(
    r"GPL|Mozilla|MPL|EUPL|CDDL|Eclipse|proprietary|NVIDIA|commercial|creative commons", re.I
)
SIZES = range(2_000, 200_001)  # bytes: shorter files teach little, longer ones are mostly data
HELD_OUT_SHARE = 60  # one file in so many is held out
DISTRIBUTION_SHARE = 0.15  # of the corpus at most, so that one large package does not set the style


@dataclass(frozen=True)
class Source:
    """A source file with where it comes from and on what terms."""

    path: Path
    name: str  # distribution/relative path
    distribution: str  # name and version
    licence: str
    digest: str  # sha256 of the content
    size: int  # bytes

    @property
    def held_out(self) -> bool:
        """Chosen by the file's content alone, so a copy elsewhere falls on the same side."""
        return int(self.digest[:8], 16) % HELD_OUT_SHARE == 0


def licence_of(fields: Mapping[str, str], classifiers: list[str]) -> str | None:
    """The licence a distribution declares if it is a permissive one, else None. What is not clear is left
    out.
    """
    expression = fields.get("License-Expression") or ""
    declared = [expression] + [c.split("::")[-1].strip() for c in classifiers if c.startswith("License ::")]
    if not any(declared):
        declared = [fields.get("License") or ""]
    stated = "; ".join(text for text in declared if text)
    if len(stated) > 200 or not PERMISSIVE.search(stated) or RECIPROCAL.search(stated):
        return None
    return stated


def sources(limit_bytes: int = 200_000_000) -> list[Source]:
    """Permissively licensed Python files in a fixed order, each content once, until `limit_bytes` are
    reached.
    """
    found: dict[str, Source] = {}
    for source in _candidates():
        found.setdefault(source.digest, source)
    kept, total, share = [], 0, Counter[str]()
    for source in sorted(found.values(), key=lambda s: s.digest):
        if share[source.distribution] + source.size > DISTRIBUTION_SHARE * limit_bytes:
            continue
        if total + source.size > limit_bytes:
            break
        total += source.size
        share[source.distribution] += source.size
        kept.append(source)
    return kept


def own_texts(paths: Sequence[Path]) -> list[Source]:
    """Text files as given, and those in the folders given, hidden ones left out, each content once. Raises
    InputError for a path that is not there or is not text, and when there is nothing to read.
    """
    found: dict[str, Source] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} is not there: --text takes UTF-8 text files and folders of them")
        inside = (f for f in path.rglob("*") if not any(p[0] == "." for p in f.relative_to(path).parts))
        for file in sorted(inside) if path.is_dir() else [path]:
            source = _own_text(file, path) if file.is_file() else None
            if source is not None:
                found.setdefault(source.digest, source)
    if not any(source.size for source in found.values()):
        raise InputError(f"no text in {', '.join(map(str, paths))}: --text takes UTF-8 text files")
    return list(found.values())


def _own_text(file: Path, root: Path) -> Source | None:
    """A file of the user's; None for one in a folder that is not text."""
    try:
        content = file.read_bytes()
        content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if file == root:
            raise InputError(f"{file} cannot be read as UTF-8 text: {one_line(error)}") from None
        return None
    name = file.name if file == root else f"{root.name}/{file.relative_to(root)}"
    return Source(file, name, root.name, "not stated", hashlib.sha256(content).hexdigest(), len(content))


def _candidates() -> Iterator[Source]:
    version = f"python {sys.version_info.major}.{sys.version_info.minor}"
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = (f for f in stdlib.rglob("*.py") if not {"site-packages", "dist-packages"} & set(f.parts))
    yield from _read(sorted(files), stdlib, version, "PSF-2.0")
    seen: set[str] = set()
    for dist in sorted(metadata.distributions(), key=lambda d: (d.metadata["Name"] or "").lower()):
        name = f"{dist.metadata['Name']} {dist.version}"
        stated = (key for key in ("License-Expression", "License") if key in dist.metadata)
        fields = {key: str(dist.metadata[key]) for key in stated}
        licence = licence_of(fields, dist.metadata.get_all("Classifier") or [])
        if licence is None or name in seen:
            continue
        seen.add(name)
        files = (Path(str(dist.locate_file(f))) for f in dist.files or [] if f.suffix == ".py")
        yield from _read(sorted(files), Path(str(dist.locate_file(""))), name, licence)


def _read(files: list[Path], root: Path, distribution: str, licence: str) -> Iterator[Source]:
    for path in files:
        try:
            if path.stat().st_size not in SIZES:
                continue
            content = path.read_bytes()
            content.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        name = (
            f"{distribution.split()[0]}/{path.relative_to(root) if path.is_relative_to(root) else path.name}"
        )
        digest = hashlib.sha256(content).hexdigest()
        yield Source(path, name, distribution, licence, digest, len(content))
