"""Damaged and odd safetensors files, shards and indices: refused in one line, or read as they are.

What was read is compared with the bytes of the files, parsed here without the library."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from fuzzing import LONGEST_LINE, Finding
from raw_safetensors import SIZE

from qwen3_model import InputError
from qwen3_model.checkpoint import load_into, tensor_names

COUNT = 4000
KINDS = {
    "traceback": "only InputError is raised",
    "long line": f"a message has at most {LONGEST_LINE} characters",
    "escape": "a message is one line that can be printed",
    "other tensors": "what is loaded are the bytes of the file that the index names",
    "damaged but loaded": "a file whose header does not describe it, or that lacks a tensor, is refused",
    "half loaded": "a refusal leaves the model's tensors as they were",
    "not named": "what is no damage is loaded, or called what it is",
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
LAYER = {"self_attn.q_proj": [8, 4], "self_attn.k_norm": [2], "mlp.down_proj": [4, 6], "input_layernorm": [4]}
SHAPES = {EMBEDDING: [12, 4], "model.norm.weight": [4]} | {
    f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in LAYER.items()
}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
Tensors = dict[str, tuple[str, list[int], bytes]]  # name -> dtype, shape, content


@dataclass
class Folder:
    """A checkpoint about to be written: tensors of each file, its index, and bytes that replace a file."""

    files: dict[str, Tensors]
    weight_map: dict[str, Any] | None
    raw: dict[str, bytes | str | None] = field(default_factory=dict)  # str: what else lies there
    headers: dict[str, Callable[[dict], Any]] = field(default_factory=dict)  # changes of a header
    says: tuple[str, ...] | None = None  # one of these words belongs into the refusal
    loads: bool | None = None  # True: it must load; False: it must not


def case(rng: Random, folder: Path) -> list[Finding]:
    """A folder with one or two changes, read twice: its names, and its tensors."""
    made = _whole(rng)
    rng.choice(CHANGES)(made, rng)
    if made.says is None and made.loads is None and rng.random() < 0.3:
        rng.choice(DAMAGES)(made, rng)
    _write(made, folder)
    wanted = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    try:
        names = tensor_names(folder)
        load_into(folder, wanted, progress=False)
    except InputError as error:
        return list(_of_refusal(str(error), made, wanted))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return [Finding("traceback", f"{type(error).__name__}: {str(error)[:150]!r}")]
    return list(_of_load(folder, made, names, wanted))


def _of_refusal(said: str, made: Folder, wanted: dict[str, torch.Tensor]) -> Iterator[Finding]:
    if len(said) > LONGEST_LINE:
        yield Finding("long line", f"{len(said)} characters: {said[:100]!r}")
    if not said.isprintable():
        yield Finding("escape", ascii(said[:200]))
    if any(weight.any() for weight in wanted.values()):
        yield Finding("half loaded", said)
    if made.loads or (made.says is not None and not any(word in said for word in made.says)):
        yield Finding("not named", f"{made.says or 'to be loaded'}: {said}")


def _of_load(
    folder: Path, made: Folder, names: frozenset, wanted: dict[str, torch.Tensor]
) -> Iterator[Finding]:
    if made.loads is False or made.says is not None:
        yield Finding("not named", f"loaded, {made.says}")
    try:
        stored = _read(folder)
    except (ValueError, KeyError, TypeError, OSError, struct.error) as error:
        yield Finding("damaged but loaded", repr(error)[:200])
        return
    odd = {name for name in stored if name not in SHAPES and name != HEAD and "rotary_emb" not in name}
    if odd or SHAPES.keys() - stored.keys():
        yield Finding("damaged but loaded", f"too many or too few: {sorted(odd)[:3]}")
        return
    if names != {name for name in stored if "rotary_emb" not in name}:
        yield Finding("other tensors", "other names")
    for name, weight in wanted.items():
        dtype, shape, content = stored[name]
        if dtype not in TYPES:
            yield Finding("damaged but loaded", f"{name} is {dtype}")
            continue
        expected = torch.frombuffer(bytearray(content), dtype=TYPES[dtype]).reshape(shape).float()
        if shape != SHAPES[name] or not torch.equal(expected.view(torch.int32), weight.view(torch.int32)):
            yield Finding("other tensors", f"{name} {dtype} {shape}")


def _read(folder: Path) -> Tensors:
    """The folder's tensors by their bytes, strictly."""
    if (folder / SINGLE).exists():
        return _parse((folder / SINGLE).read_bytes())
    weight_map = json.loads((folder / INDEX).read_text("utf-8-sig"))["weight_map"]
    stored: Tensors = {}
    for shard in set(weight_map.values()):
        held = _parse((folder / shard).read_bytes())
        stored |= {name: tensor for name, tensor in held.items() if weight_map.get(name) == shard}
    if lacking := {n for n in weight_map.keys() - stored.keys() - {HEAD} if "rotary_emb" not in n}:
        raise KeyError(sorted(lacking)[0])
    return stored


def _parse(content: bytes) -> Tensors:
    (length,) = struct.unpack_from("<Q", content)
    head, body = content[8 : 8 + length], content[8 + length :]
    if len(head) < length:
        raise ValueError("short header")
    tensors: Tensors = {}
    for name, entry in json.loads(head.decode()).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= len(body):
            raise ValueError(f"{name[:40]!r} lies outside")
        if entry["dtype"] in SIZE and end - begin != math.prod(entry["shape"]) * SIZE[entry["dtype"]]:
            raise ValueError(f"{name[:40]!r} has another size")
        tensors[name] = entry["dtype"], entry["shape"], body[begin:end]
    return tensors


# writing


def _whole(rng: Random) -> Folder:
    """An undamaged checkpoint of one file or two shards, each tensor of any dtype."""
    tensors = {name: _tensor(rng, shape) for name, shape in SHAPES.items()}
    if rng.random() < 0.5:
        return Folder({SINGLE: tensors}, None)
    names = list(tensors)
    rng.shuffle(names)
    files = {shard: {name: tensors[name] for name in names[i::2]} for i, shard in enumerate(SHARDS)}
    return Folder(files, {name: shard for shard, held in files.items() for name in held})


def _tensor(rng: Random, shape: list[int], dtype: str | None = None) -> tuple[str, list[int], bytes]:
    dtype = dtype or rng.choice(list(TYPES))
    values = [rng.uniform(-1, 1) for _ in range(math.prod(shape))]
    if dtype not in TYPES:
        return dtype, shape, rng.randbytes(len(values) * SIZE[dtype])
    return dtype, shape, bytes(torch.tensor(values).to(TYPES[dtype]).view(torch.uint8).tolist())


def _file(tensors: Tensors, change: Callable[[dict], Any] | None) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, (dtype, shape, content) in tensors.items():
        entries[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(body), len(body) + len(content)],
        }
        body += content
    head = entries if change is None else change(entries)
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + body


def _write(made: Folder, folder: Path) -> None:
    contents: dict[str, Any] = {
        name: _file(tensors, made.headers.get(name)) for name, tensors in made.files.items()
    }
    if made.weight_map is not None:
        contents[INDEX] = json.dumps({"metadata": {}, "weight_map": made.weight_map}).encode()
    for name, content in (contents | made.raw).items():
        path = folder / name
        if content == "folder":
            path.mkdir()
        elif content == "pipe":
            os.mkfifo(path)
        elif isinstance(content, str):
            path.symlink_to(content)
        elif content is not None:
            path.write_bytes(content)


# what is damaged


def _one(made: Folder, rng: Random) -> str:
    return rng.choice(list(made.files))


def _bytes(made: Folder, rng: Random) -> None:
    """Bytes of a file changed, cut off, added or put in."""
    name = _one(made, rng)
    content = bytearray(_file(made.files[name], made.headers.get(name)))
    length = struct.unpack_from("<Q", content)[0]
    at = rng.choice([rng.randrange(8), rng.randrange(8 + length), rng.randrange(len(content))])
    match rng.randrange(6):
        case 0:
            content[at] = rng.randrange(256)
        case 1:
            content[at] ^= 1 << rng.randrange(8)
        case 2:
            del content[at:]
        case 3:
            content += rng.randbytes(rng.choice([1, 8, 1000]))
        case 4:
            content[at:at] = rng.randbytes(rng.choice([1, 4, 50]))
        case _:
            del content[at : at + rng.choice([1, 4, 50])]
    made.raw[name] = bytes(content)


def _length(made: Folder, rng: Random) -> None:
    name = _one(made, rng)
    content = _file(made.files[name], None)
    length = struct.unpack_from("<Q", content)[0]
    wrong = rng.choice([0, 1, length - 1, length + 1, length + 8, 2**31, 2**63, 2**64 - 1, 10**8 + 1])
    made.raw[name] = struct.pack("<Q", wrong) + content[8:]


def _entry(made: Folder, rng: Random) -> None:
    """One entry of a header says something else."""
    name, which = _one(made, rng), rng.random()
    what = rng.choice(["dtype", "shape", "data_offsets", "gone", "odd", "twice", "metadata", "pad"])
    values = {
        "dtype": ["F32", "BF16", "F64", "I8", "F8_E4M3", "F4", "f32", "", None, 3, "\x1b[2J" * 200],
        "shape": [[], [4], [0], [-1], [2**62, 4], [2**64], "4", None, [4.0], [1] * 3000, {"a": 1}],
        "data_offsets": [[0, 0], [0, 16], [16, 0], [-4, 12], [0, 2**64], [2**63, 2**63], [0], None, "0"],
        "odd": [None, [], "x", 7, {}, {"dtype": "F32"}],
        "metadata": [None, [], {"a": 1}, {"a": {"b": "c"}}, "x", {"\x1b": "y" * 10**5}],
    }  # fmt: skip
    value = rng.choice(values.get(what, [None]))

    def change(entries: dict) -> Any:
        names = [key for key in entries if key != "__metadata__"]
        chosen = names[int(which * len(names))]
        if what in ("dtype", "shape", "data_offsets"):
            entries[chosen][what] = value
        elif what == "gone":
            del entries[chosen]
        elif what == "odd":
            entries[chosen] = value
        elif what == "metadata":
            entries["__metadata__"] = value
        elif what == "pad":
            return json.dumps(entries).encode() + b" " * 999
        else:  # twice, the second with the place of another tensor
            other = json.dumps({chosen: entries[names[0]]})[1:]
            return json.dumps(entries)[:-1].encode() + b", " + other.encode()
        return entries

    made.headers[name] = change


def _names(made: Folder, rng: Random) -> None:
    """Names of tensors changed, as they stand in files and index."""
    names = rng.sample(list(SHAPES), rng.choice([1, 1, len(SHAPES)]))
    new = rng.choice(["{}\x1b]0;t\x07", "{}" + "n" * 20_000, "{}\n", "\ud7ff{}", "x.{}.y", "{}\u202e"])
    _rename(made, {name: new.format(name) for name in names})


def _rename(made: Folder, to: dict[str, str]) -> None:
    for file, tensors in made.files.items():
        made.files[file] = {to.get(name, name): tensor for name, tensor in tensors.items()}
    if made.weight_map is not None:
        made.weight_map = {to.get(name, name): shard for name, shard in made.weight_map.items()}


def _index(made: Folder, rng: Random) -> None:
    if made.weight_map is None:
        return _bytes(made, rng)
    name = rng.choice(list(made.weight_map))
    odd = ["../x.safetensors", "/etc/passwd", "x" * 300 + ".safetensors", "\x1b[2J" * 300, "", None, 3, ["a"],
           {"a": 1}, SHARDS[0], SHARDS[1], "none.safetensors", "é" * 190 + ".safetensors", "a\0.safetensors",
           INDEX]  # fmt: skip
    match rng.randrange(4):
        case 0:
            made.weight_map[name] = rng.choice(odd)
        case 1:
            del made.weight_map[name]
        case 2:
            made.weight_map[rng.choice(["ghost", "g\x1b" * 900, "model.rotary_emb.inv_freq"])] = SHARDS[0]
        case _:
            text = json.dumps({"weight_map": made.weight_map}).encode()
            at = rng.randrange(len(text))
            made.raw[INDEX] = rng.choice(
                [text[:at], text[:at] + rng.randbytes(1) + text[at + 1 :], b"", b"[]", b"{}", b"9" * 5000,
                 b'{"weight_map": []}', b'{"weight_map": 3}', b'{"weight_map": {}}', b"[" * 10**5]
            )  # fmt: skip


def _place(made: Folder, rng: Random) -> None:
    """Something else lies where a file should."""
    names = [*made.files, *([INDEX] if made.weight_map is not None else [])]
    name = rng.choice(names)
    odd: list[Any] = ["folder", "nowhere", "/dev/zero", b"", b"\0" * 64, rng.randbytes(200), None]
    made.raw[name] = rng.choice(odd if name == INDEX else [*odd, "pipe"])
    if made.raw[name] == "/dev/zero" and name == INDEX:
        made.raw[name] = "/dev/null"  # what reads the other has no end
    made.loads = False


def _swap(made: Folder, rng: Random) -> None:
    if len(made.files) == 2:
        first, second = made.files
        made.files[first], made.files[second] = made.files[second], made.files[first]


# what is whole, or has a name


def _nothing(made: Folder, rng: Random) -> None:
    made.loads = True


def _mark(made: Folder, rng: Random) -> None:
    """An index with a byte order mark."""
    if made.weight_map is not None:
        made.raw[INDEX] = b"\xef\xbb\xbf" + json.dumps({"weight_map": made.weight_map}).encode()
    made.loads = True


def _pointer(made: Folder, rng: Random) -> None:
    made.raw[rng.choice([*made.files, *([INDEX] if made.weight_map is not None else [])])] = POINTER
    made.says = ("Git LFS",)


def _prefix(made: Folder, rng: Random) -> None:
    new = rng.choice(["", "base_model.model.model.", "module.model.", "_orig_mod.model.",
                      "model.language_model.", "transformer."])  # fmt: skip
    _rename(made, {name: name.replace("model.", new, 1) for name in SHAPES})
    made.says = (f"`{new}`",) if new else ("without `model.`",)


def _stranger(made: Folder, rng: Random) -> None:
    name, made.says = rng.choice([
        ("v_head.summary.weight", ("value head",)),
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", ("merge",)),
        ("model.layers.1.mlp.down_proj.qweight", ("quantised",)),
        ("score.weight", ("classifier",)),
        ("optimizer.state.exp_avg", ("optimizer",)),
        ("model.layers.0.self_attn.q_proj.bias", ("biases",)),
    ])  # fmt: skip
    _add(made, rng, name, _tensor(rng, [4]))


def _dtype(made: Folder, rng: Random) -> None:
    file = _one(made, rng)
    name = rng.choice(list(made.files[file]))
    dtype, made.says = rng.choice(
        [("F64", ("convert",)), ("I32", ("quantised",)), ("F8_E4M3", ("quantised",))]
    )
    made.files[file][name] = _tensor(rng, SHAPES[name], dtype)


def _head(made: Folder, rng: Random) -> None:
    """A tied head in the index only, as a copy in any dtype that holds it, or another one."""
    dtype, shape, content = next(
        tensors[EMBEDDING] for tensors in made.files.values() if EMBEDDING in tensors
    )
    kind = rng.choice(["index", "copy", "wider", "other"])
    if kind == "index":
        if made.weight_map is not None:
            made.weight_map[HEAD] = rng.choice(SHARDS)
        made.loads = True
        return
    if kind == "wider":
        wide = torch.frombuffer(bytearray(content), dtype=TYPES[dtype]).float()
        dtype, content = "F32", bytes(wide.view(torch.uint8).tolist())
    if kind == "other":
        content = content[:-1] + bytes([content[-1] ^ 0x80])  # the sign of the last number
        made.says = ("differs from",)
    else:
        made.loads = True
    _add(made, rng, HEAD, (dtype, shape, content))


def _add(made: Folder, rng: Random, name: str, tensor: tuple[str, list[int], bytes]) -> None:
    file = _one(made, rng)
    made.files[file][name] = tensor
    if made.weight_map is not None:
        made.weight_map[name] = file


DAMAGES = [_bytes, _bytes, _bytes, _length, _entry, _entry, _names, _index, _place, _swap]
CHANGES = [*DAMAGES, _nothing, _mark, _pointer, _prefix, _stranger, _dtype, _head, _head]
