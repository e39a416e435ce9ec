"""Qwen3 from scratch with both views of Orthrus: checkpoints, text, the model, decoding strategies."""

from .config import Qwen3Config
from .errors import InputError
from .generate import GenerationStats, Result
from .model import Qwen3

__all__ = ["GenerationStats", "InputError", "Qwen3", "Qwen3Config", "Result"]
