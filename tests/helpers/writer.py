"""A scripted model that would write a JSON document, with the embedded checkpoint's tokens, and what a
grammar makes of it by definition: each token is chosen with all those banned that a matcher of its own
forbids."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from scripted import ScriptedModel
from small import small_config

from orthrus_kernels import Sampling, alike
from qwen3_model import Grammar, Request
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.text import Text

VOCABULARY, END = 2085, 0  # 37 more than there are tokens
SAID = '{"name": "Ada", "age": 200, "tags": ["b", "long"], "more": null}'
PERSON = Grammar.json_schema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "long"]}, "maxItems": 4},
        },
        "required": ["name", "age"], "additionalProperties": False,
    }
)  # fmt: skip
NUMBER = Grammar.json_schema({"type": "integer"})  # may end, or go on
OBJECT = Grammar.json_object()


@cache
def text() -> Text:
    return Text(EMBEDDED)


class Writer(ScriptedModel):
    """Goes on in SAID behind the last three tokens, or the last two or one, wherever they stand in it."""

    def __init__(self, skill: float = 0.7, seed: int = 0) -> None:
        super().__init__(small_config(vocab_size=VOCABULARY, mask_token_id=3), skill, text(), seed)
        self.said = [*text().encode(SAID), END]
        self._targets: dict[tuple[int, ...], torch.Tensor] = {}

    def target(self, text):
        key = len(text), *text[-3:]
        if key not in self._targets:
            self._targets[key] = self._target(text)
        return self._targets[key]

    def _target(self, text):
        logits = super().target(text)
        ends = [
            (n, at) for at in range(len(self.said)) for n in (1, 2, 3) if self.said[:at][-n:] == text[-n:]
        ]
        _, at = max(ends, default=(0, 0))
        logits[self.said[at]] = logits.max() + 4.0
        return logits


def by_definition(model: Writer, prompt: list[int], request: Request) -> list[int]:
    """The text of a request with a grammar."""
    from llguidance import LLMatcher, LLTokenizer

    tokenizer = LLTokenizer(text().as_json(), n_vocab=VOCABULARY, eos_token=END)
    found, matcher = list[int](), LLMatcher(tokenizer, request.grammar.lark)
    while len(found) < request.max_new_tokens and END not in found:
        assert matcher.consume_tokens(found[-1:]), matcher.get_error()
        words = np.zeros(-(-VOCABULARY // 32), np.int32)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        permitted = np.unpackbits(words.view(np.uint8), bitorder="little")[:VOCABULARY].astype(bool)
        permitted[END] = matcher.is_accepting()
        assert permitted.any()
        logits = torch.where(torch.from_numpy(permitted), model.target(prompt + found), -torch.inf)[None]
        seen = torch.zeros(1, VOCABULARY, dtype=torch.int32)
        for nth, token in enumerate(prompt + found):
            seen[0, token] = seen[0, token] | 1 if nth < len(prompt) else seen[0, token] + 2
        sampling: Sampling = request.sampling
        at = torch.tensor([len(prompt) + len(found)])
        found.append(int(model.ops.choose(logits, at, *alike(sampling, logits), seen)))
    return found
