"""The server's process of `bench.serve`: the app, the server and the engine's process of `orthrus serve`,
with an engine that may have random weights. It reads what to serve from stdin, pickled, ends with stdin, and
writes JSON lines to stdout: what the engine has measured by itself, and where the server is."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import sys
import threading

from qwen3_model import InputError, Qwen3Config
from qwen3_model.openai.served import Served
from qwen3_model.serve.guard import Access
from qwen3_model.serve.limits import Limits
from qwen3_model.serve.messages import Ready
from qwen3_model.serve.server import run
from qwen3_model.serve.site import Site
from qwen3_model.text import Text

from .serve_engine import MeasuredEngine

Spec = tuple[str, Qwen3Config, MeasuredEngine, int]  # name, config, engine, texts that may wait for a slot


def main() -> int:
    """Serve until stdin or SIGTERM says that it is enough."""
    spec: Spec = pickle.load(sys.stdin.buffer)
    name, config, engine, waiting = spec
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    served = Served(name, config, Text(engine.tokenizer))
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        port = listener.getsockname()[1]

        def told(ready: Ready) -> None:
            print(json.dumps({"port": port, "warm_seconds": ready.warm_seconds}), flush=True)

        try:
            return run(Site(served, Limits(waiting)), Access(), engine, listener, told)
        except InputError as error:
            print(error, file=sys.stderr)
            return 2


def _end_with_stdin() -> None:
    """Nobody else ends this process, and its GPU, where the bench has been killed."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
