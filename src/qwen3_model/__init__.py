"""Qwen3 from scratch with both views of Orthrus: checkpoints, text, the model, decoding strategies."""

# Nothing is imported here, so that Ctrl-C soon reaches the command line.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from .config import Qwen3Config
    from .decode.engine import Engine
    from .decode.sequence import GenerationStats, Result
    from .errors import InputError
    from .grammar import Grammar
    from .qwen3 import Qwen3
    from .request import Request

_HOMES = {
    "Engine": "decode.engine",
    "GenerationStats": "decode.sequence",
    "Grammar": "grammar",
    "InputError": "errors",
    "Qwen3": "qwen3",
    "Qwen3Config": "config",
    "Request": "request",
    "Result": "decode.sequence",
}

__all__ = [
    "Engine", "GenerationStats", "Grammar", "InputError", "Qwen3", "Qwen3Config", "Request", "Result",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for: `orthrus --help` should not wait for torch."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
