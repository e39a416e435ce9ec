"""orthrus info: sizes and the bandwidth floor of a checkpoint, from its config and the headers of its
weights."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..errors import InputError, one_line, size_of
from . import options, output, terminal

if TYPE_CHECKING:
    from ..config import Qwen3Config
    from ..quantised.stored import FindStored

H200_BANDWIDTH = 4370.0  # GB/s, one H200, measured


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = options.new_verb(
        subparsers, "info",
        "show a checkpoint's parameters, memory and bandwidth floor without loading its weights",
        "orthrus info chiennv/Orthrus-Qwen3-8B --bandwidth 3350", run,
    )  # fmt: skip
    parser.add_argument(
        "model",
        nargs="?",
        metavar="PATH|ID",
        help="checkpoint folder or hub id (default: the embedded tiny one)",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    options.add_activations(parser)
    parser.add_argument(
        "--bandwidth", type=float, default=H200_BANDWIDTH, metavar="GB/s",
        help=f"memory bandwidth of the floor (default: {H200_BANDWIDTH:.0f}, one H200, measured)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    """Print the figures."""
    from .. import checkpoint, hub
    from ..config import Qwen3Config
    from ..quantised.stored import StoredWeights, by_config
    from ..selector import ranks_of
    from ..weight_files import read_headers

    if not 1e-3 <= args.bandwidth < float("inf"):
        raise InputError(f"--bandwidth is {args.bandwidth}; a number of GB/s from 0.001 on was expected")
    folder = hub.resolve(args.model or checkpoint.EMBEDDED, args.revision)
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    headers = read_headers(folder) if on_disk else {}
    config = Qwen3Config.from_folder(folder, headers)
    scheme = config.quantisation
    stored = StoredWeights(headers, scheme).of if on_disk else by_config(scheme)
    found = figures(config, stored, args.dtype, args.bandwidth, args.activations)
    found |= {"bytes_on_disk": on_disk, "draft_tables": ranks_of(folder, config)}
    if args.json:
        output.write_json(found)
    else:
        _print(found, str(args.model or "the embedded checkpoint"))
    return 0


def figures(
    config: Qwen3Config, stored: FindStored, dtype: str | None, bandwidth: float, activations: str | None
) -> dict[str, Any]:
    """Sizes of a model and its floors at `bandwidth` GB/s. stored: which of its weights are quantised. dtype:
    of the others (None: the one that it runs in by itself on a GPU). activations: as of `from_pretrained`.

    A floor is the time to read once what the passes multiply with, context not counted: shared and AR weights
    for a token decoded plainly, and the diffusion view's pass besides for a two-pass cycle. Rows looked up in
    an untied embedding are next to nothing, a tied one is read as the head."""
    import torch

    from ..model import Network
    from ..quantised.slot import Slot
    from ..settings import pick_activations, pick_dtype

    meta, quantised = torch.device("meta"), config.quantisation is not None
    chosen = pick_dtype(dtype, meta, config.dtype, "reference", quantised)
    rounded = pick_activations(activations, meta, "reference")
    model = Network(config, meta, chosen, "reference", None, stored, rounded)
    parameters, sizes = Counter(shared=0, ar=0, diffusion=0), Counter(shared=0, ar=0, diffusion=0)
    formats = Counter[str]()
    for name, weight in model.destinations().items():
        view = "shared" if "self_attn" not in name else "diffusion" if "_diff." in name else "ar"
        parameters[view] += weight.numel()
        sizes[view] += weight.nbytes
        of = weight.stored.kind.form.format.value if isinstance(weight, Slot) else str(model.dtype)[6:]
        formats[of] += weight.nbytes
    kv_row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    kv_row *= model.dtype.itemsize
    looked_up = 0 if config.tie_word_embeddings else model.embedding.nbytes
    ar_pass = sizes["shared"] - looked_up + sizes["ar"]
    diffusion_pass = sizes["shared"] - looked_up + sizes["diffusion"]
    orthrus = config.has_diffusion_view
    return {
        "parameters": dict(parameters) | {"total": sum(parameters.values())},
        "dtype": str(model.dtype).removeprefix("torch."),
        "activations": rounded,
        "matrices_that_round": sum(weight.rounds for weight in model.codes()),
        "bytes": sum(sizes.values()),
        "bytes_by_format": dict(formats),
        "kv_bytes_per_token": kv_row,
        "kv_bytes_full_context": kv_row * config.context_length,
        "diffusion_bytes_per_block": kv_row * config.block_size if orthrus else None,
        "bandwidth_gb_per_s": bandwidth,
        "floor_ms_per_token": ar_pass / bandwidth / 1e6,
        "floor_ms_per_cycle": (ar_pass + diffusion_pass) / bandwidth / 1e6 if orthrus else None,
        "config": config.to_dict(),
    }


def _print(found: dict[str, Any], name: str) -> None:
    config, parameters = found["config"], found["parameters"]
    table = terminal.new_table(title=one_line(name))
    kind = "Orthrus (two views)" if found["floor_ms_per_cycle"] else "plain Qwen3 (no diffusion view)"
    table.add_row("kind", kind)
    table.add_row("parameters", f"{parameters['total']:,}")
    table.add_row("  shared by the views", f"{parameters['shared']:,}")
    table.add_row("  AR view", f"{parameters['ar']:,}")
    table.add_row("  diffusion view", f"{parameters['diffusion']:,}")
    table.add_row("on disk", size_of(found["bytes_on_disk"]) if found["bytes_on_disk"] else "no weights")
    if len(found["bytes_by_format"]) == 1:
        table.add_row(f"in {found['dtype']}", size_of(found["bytes"]))
    else:
        table.add_row("in memory", size_of(found["bytes"]))
        for of, count in found["bytes_by_format"].items():
            table.add_row(f"  in {of}", size_of(count))
    if found["activations"]:
        count = found["matrices_that_round"]
        table.add_row("activations", f"in {found['activations']} before {count} of the layers' products")
    table.add_row("KV cache a token", size_of(found["kv_bytes_per_token"]))
    table.add_row("KV cache, full context", size_of(found["kv_bytes_full_context"]))
    if found["diffusion_bytes_per_block"]:
        table.add_row(
            f"extra memory of a diffusion block of {config['block_size']}",
            size_of(found["diffusion_bytes_per_block"]),
        )
    if found["draft_tables"]:
        said = {"bigram": "tables of rank {}", "selector": "a selector of rank {}"}
        words = " and ".join(said[name].format(rank) for name, rank in found["draft_tables"].items())
        table.add_row("drafts are ranked by", words)
    bandwidth = found["bandwidth_gb_per_s"]
    measured = " (one H200, measured)" if bandwidth == H200_BANDWIDTH else ""
    table.add_row("floor at", f"{bandwidth:g} GB/s{measured}, weights only")
    table.add_row("  plain token", f"{found['floor_ms_per_token']:.4g} ms")
    if found["floor_ms_per_cycle"]:
        table.add_row("  two-pass cycle", f"{found['floor_ms_per_cycle']:.4g} ms")
    for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
                "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
                "tie_word_embeddings", "rope_parameters", "eos_token_id", "mask_token_id"):  # fmt: skip
        if key in config:
            table.add_row(key, one_line(config[key]))
    terminal.show(terminal.new_console(), table)
