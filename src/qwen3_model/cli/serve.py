"""orthrus serve: answer OpenAI's requests over HTTP, many side by side."""

from __future__ import annotations

import argparse
import shlex
import socket
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..files import reason
from . import options, ray_options

if TYPE_CHECKING:
    from ..openai.served import Served
    from ..serve.guard import Access
    from ..serve.limits import Limits
    from ..serve.messages import EngineOptions, Ready
    from ..serve.server import Start

SLOTS, CPU_SLOTS = 32, 4  # by default
EXTRA = ("fastapi", "uvicorn", "prometheus_client")
MOST_PORT, MOST_WAITING, MOST_GRACE = 65535, 2**20, 86400


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = options.new_verb(
        subparsers, "serve", "answer OpenAI's requests over HTTP, many side by side",
        "orthrus serve --model chiennv/Orthrus-Qwen3-1.7B --slots 64 --port 8000", run,
    )  # fmt: skip
    options.add_model_options(parser)
    options.add_generation_config(parser)
    options.add_engine_options(parser, SLOTS, CPU_SLOTS)
    ray_options.add_ray_options(parser, autoscales=True)
    _add_access(parser.add_argument_group("who may ask"))
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max-waiting", type=int, default=256, metavar="N",
        help="texts that may wait for a slot; a request beyond gets status 429 (default: 256)",
    )  # fmt: skip
    group.add_argument(
        "--max-per-key", type=int, metavar="N", help="requests of a key at a time (default: any number)"
    )
    group.add_argument(
        "--grace", type=float, default=30.0, metavar="S",
        help="seconds that requests may go on after SIGTERM or Ctrl-C (default: 30)",
    )  # fmt: skip
    group.add_argument(
        "--engine-timeout", type=float, default=300.0, metavar="S",
        help="seconds without a step after which an engine that has texts counts as dead (default: 300)",
    )  # fmt: skip


def _add_access(group: argparse._ActionsContainer) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    group.add_argument(
        "--api-key-file", metavar="FILE", help="keys that clients must have one of, one a line"
    )
    group.add_argument(
        "--insecure", action="store_true", help="listen on an address that others reach, without keys"
    )
    group.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME",
        help="a name besides --host that clients call this server by (repeatable)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; 0 after SIGTERM, 130 after Ctrl-C, 1 where the engine has died."""
    _check_extra()
    from ..serve.server import run as serve
    from ..serve.site import Site

    limits, access, name = _limits(args), _access(args), options.served_name(args)
    ray_options.check(args, autoscales=True)
    with _listener(args.host, args.port) as listener:
        folder = options.checkpoint_folder(args)
        served, start = served_by(args, name, folder), _start(args, name, folder)

        def told(ready: Ready) -> None:
            print(_ready_line(args, served, access, listener, ready), flush=True)

        return serve(Site(served, limits), access, start, listener, told)


def _check_extra() -> None:
    """Raises InputError where what serves HTTP is not installed."""
    if lacking := [name for name in EXTRA if find_spec(name) is None]:
        raise InputError(
            f"orthrus serve needs {lacking[0]}, which is not installed: pip install "
            "'orthrus-kernels[serve]', or make serve"
        )


def _limits(args: argparse.Namespace) -> Limits:
    from ..serve.limits import Limits

    options.check_engine_options(
        args, ("--port", args.port, 0, MOST_PORT), ("--max-waiting", args.max_waiting, 0, MOST_WAITING),
        ("--max-per-key", args.max_per_key, 1, MOST_WAITING), ("--grace", args.grace, 0, MOST_GRACE),
        ("--engine-timeout", args.engine_timeout, 1, MOST_GRACE),
    )  # fmt: skip
    return Limits(args.max_waiting, args.max_per_key, grace=args.grace, engine_seconds=args.engine_timeout)


def _access(args: argparse.Namespace) -> Access:
    """Raises InputError for an empty word, and for an address that others reach where nobody needs a key."""
    from ..serve.guard import Access, is_loopback, read_keys

    for option, value in (("--host", args.host), ("--api-key-file", args.api_key_file)):
        if value is not None and not value.strip():
            raise InputError(f"{option} is empty: give one, or leave the option out")
    keys = read_keys(Path(args.api_key_file)) if args.api_key_file is not None else ()
    if not keys and not args.insecure and not is_loopback(args.host):
        raise InputError(
            f"others reach {args.host}, and anyone could use this server: give --api-key-file, or --insecure"
        )
    return Access.at(args.host, args.allowed_host, keys)


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises InputError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()  # two sockets may bind to a port, and one may listen
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        said = reason(error) if isinstance(error, OSError) else str(error)
        raise InputError(
            f"cannot listen on {host} port {port} ({said}): choose another --port or --host"
        ) from None
    return listener


def served_by(args: argparse.Namespace, name: str, folder: Path) -> Served:
    """What requests are read for: config and tokenizer, without weights. Raises InputError."""
    from .. import checkpoint, graft, hub
    from ..config import Qwen3Config
    from ..openai.served import Served
    from ..text import Text

    config = Qwen3Config.from_folder(folder, checkpoint.tensor_names(folder))
    if args.diffusion is not None:
        config = graft.with_view(config, folder, hub.resolve(args.diffusion))
    defaults = options.recommended_settings(args, folder)
    return Served(name, config, Text(folder), defaults)


def _start(args: argparse.Namespace, name: str, folder: Path) -> Start:
    """What makes the engine, or those of a cluster."""
    if args.ray:
        from ..serve.cluster import Fleet

        times = {"grace": args.grace, "engine_seconds": args.engine_timeout}
        return partial(Fleet.start, ray_options.replicas(args, name, (SLOTS, CPU_SLOTS), **times))
    from ..serve.engine_client import EngineClient

    return partial(EngineClient.start, _engine(args, folder))


def _engine(args: argparse.Namespace, folder: Path) -> EngineOptions:
    from ..serve.messages import EngineOptions
    from ..settings import pick_device

    slots = args.slots or (CPU_SLOTS if pick_device(args.device).type == "cpu" else SLOTS)
    return EngineOptions(
        str(folder), args.device, args.dtype, args.backend, slots=slots, cache_tokens=args.cache_tokens,
        diffusion=args.diffusion, activations=args.activations,
    )  # fmt: skip


def _ready_line(
    args: argparse.Namespace, served: Served, access: Access, listener: socket.socket, ready: Ready
) -> str:
    """Where the server is, a command that asks it something, and where a browser shows its page."""
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    words = ["curl", f"{url}/v1/completions", "-H", "content-type: application/json"]
    if access.keys:
        words += ["-H", "authorization: Bearer KEY"]
    words += ["-d", '{"prompt": "def fibonacci(n):", "max_tokens": 64, "temperature": 0}']
    rounded = f"activations {args.activations}, " if args.activations else ""
    return (
        f"{served.name} is served at {url} ({ready.device}, {rounded}{ready.slots} slots, "
        f"{ready.cache_tokens} tokens of cache, fingerprint {ready.fingerprint})\n{shlex.join(words)}\n"
        f"In a browser: {url}/"
    )
