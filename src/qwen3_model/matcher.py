"""Which tokens the grammar of a text permits, behind the text and behind each node of a draft tree.

A node's mask is that of the text and the node's path: the tree is walked depth first, a token forward to a
child, a token back from it. A child that the grammar does not permit is never reached by a walk, since its
parent's choice is another token, and neither is what stands below it; nor is a child with the token of an
earlier sibling, or one that ends the text. Their masks permit all, and nobody asks for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from .config import Qwen3Config
from .errors import InputError, foreign, one_line
from .grammar import NOT_THERE, Grammar, is_there
from .grammar_compiler import compiled
from .text import Text

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray

MOST_COMPILED = 64  # grammars that are kept; the one not used for longest goes first
WORD = 32  # tokens in a word of a mask


class Matcher:
    """The state of a text in its grammar. `known` tokens of the text have been matched, the prompt's without
    a look at them. Once `failed` says why, nothing is right any more."""

    def __init__(self, matcher: LLMatcher, ends: Iterable[int]) -> None:
        """matcher: at the beginning, this text's own. ends: tokens that end a text which may end."""
        self._matcher, self._ends = matcher, frozenset(ends)
        self.known, self.failed = 0, ""

    def begin(self, text: Sequence[int], prompt: int) -> None:
        """Stand behind a text whose first `prompt` tokens are its prompt."""
        self._matcher.reset()
        self.known, self.failed = prompt, ""
        self.go_on(text[prompt:])

    def go_on(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens."""
        self.known += len(tokens)
        if not self._matcher.consume_tokens(list(tokens)):
            self._fail()

    def fill(self, masks: NDArray[np.int32], tokens: Sequence[int], parents: Sequence[int]) -> None:
        """Write the mask of each node of a tree, [N, words]; masks hold ones. The text up to the root has
        been matched. tokens, parents [N]: of the tree; parents come first, the root's is below 0."""
        children: list[list[int]] = [[] for _ in tokens]
        for node in range(len(tokens) - 1, 0, -1):
            if 0 <= parents[node] < node:  # a node that no walk may find has another parent
                children[parents[node]].append(node)
        left, path = [(0, 0)], 0  # nodes and their depths; tokens that the matcher has taken of the tree
        while left and not self.failed:
            node, depth = left.pop()
            if depth:
                self._matcher.rollback(path + 1 - depth)  # to the parent
                if not self._matcher.consume_token(tokens[node]):
                    return self._fail()
            path = depth
            self._fill(masks[node])
            found = dict[int, int]()
            for child in reversed(children[node]):  # the first of equals counts
                token = tokens[child]
                if token not in self._ends and masks[node, token // WORD] >> (token % WORD) & 1:
                    found.setdefault(token, child)
            left += [(child, depth + 1) for child in found.values()]
        self._matcher.rollback(path)
        return None

    def _fill(self, mask: NDArray[np.int32]) -> None:
        """The mask of where the matcher stands. A text may end where its grammar may, and only there."""
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            return self._fail()
        bits, accepting = mask.view(np.uint32), self._matcher.is_accepting()
        for token in self._ends:
            bit = np.uint32(1 << token % WORD)
            bits[token // WORD] = bits[token // WORD] | bit if accepting else bits[token // WORD] & ~bit
        return None

    def _fail(self) -> None:
        said = one_line(self._matcher.get_error() or "no token is permitted", 200)
        self.failed = f"the grammar cannot go on ({said})"


class Grammars:
    """The grammars of one model, compiled for its tokens."""

    def __init__(self, text: Text | None, config: Qwen3Config) -> None:
        self._text, self._config = text, config
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher for a new text. Raises InputError for a grammar that cannot be compiled, a model without
        a tokenizer or without an end token, and where llguidance is not installed."""
        if grammar.lark not in self._compiled:
            self._compiled[grammar.lark] = compiled(grammar.lark, self._tokenizer)
            if len(self._compiled) > MOST_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar.lark)
        return Matcher(self._compiled[grammar.lark].deep_copy(), self._config.eos_token_ids)

    def prepare(self) -> None:
        """Read the tokenizer now, which takes a second for a large vocabulary; what is wrong with it, a text
        with a grammar is told."""
        with suppress(InputError):
            _ = self._tokenizer

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        if self._text is None:
            raise InputError("a grammar needs a tokenizer, and this model has none")
        if not is_there():
            raise InputError(NOT_THERE)
        from llguidance import LLTokenizer

        ends, vocabulary = list(self._config.eos_token_ids), self._config.vocab_size
        with foreign("llguidance cannot read this checkpoint's tokenizer"):
            return LLTokenizer(self._text.as_json(), n_vocab=vocabulary, eos_token=ends)
