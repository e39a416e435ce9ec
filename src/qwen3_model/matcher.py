"""Which tokens the grammar of a text permits, behind the text and behind each node of a draft tree.

A node's mask is that of the text and the node's path: the tree is walked depth first, a token forward to a
child, a token back from it. A child that the grammar does not permit is never reached by a walk, since its
parent's choice is another token, and neither is what stands below it; nor is a child with the token of an
earlier sibling, or one that ends the text. Their masks permit all, and nobody asks for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from .config import Qwen3Config
from .errors import InputError, foreign, one_line
from .grammar import NOT_THERE, Grammar, is_there
from .grammar_compiler import check_compiles, without_place
from .text import Text

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray

MOST_COMPILED = 1024  # grammars that are remembered; the one not used for longest goes first
WORD = 32  # tokens in a word of a mask


class Matcher:
    """The state of a text in its grammar. `known` tokens of the text have been matched, the prompt's without
    a look at them. Once `failed` says why, nothing is right any more.

    A matcher of llguidance has a budget for what it has met, which copies share and a reset does not mend. So
    each text has one of its own, and where drafts have spent its budget new ones read the text and one path
    each. No other text decides whether a text can go on. A draft does where its path alone spends a budget:
    then the text fails some tokens before it might have."""

    def __init__(self, make: Callable[[], LLMatcher], ends: Iterable[int]) -> None:
        """make: a matcher at the beginning of a text. ends: tokens that end a text which may end."""
        self._make, self._ends = make, frozenset(ends)
        self._matcher: LLMatcher | None = None  # from `begin` on
        self._text: list[int] = []  # behind the prompt
        self.known, self.failed = 0, ""

    def begin(self, text: Sequence[int], prompt: int) -> None:
        """Stand behind a text whose first `prompt` tokens are its prompt."""
        self._matcher, self._text = self._make(), []
        self.known, self.failed = prompt, ""
        self.go_on(text[prompt:])

    def go_on(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens."""
        assert self._matcher is not None, "it has begun"
        self.known += len(tokens)
        self._text += tokens
        if not self._matcher.consume_tokens(list(tokens)):
            self._matcher = self._behind([])
            if self._matcher.is_error():
                self._fail(self._matcher)

    def fill(self, masks: NDArray[np.int32], tokens: Sequence[int], parents: Sequence[int]) -> None:
        """Write the mask of each node of a tree, [N, words]; masks hold ones. The text up to the root has
        been matched. tokens, parents [N]: of the tree; parents come first, the root's is below 0."""
        children: list[list[int]] = [[] for _ in tokens]
        for node in range(len(tokens) - 1, 0, -1):
            if 0 <= parents[node] < node:  # a node that no walk may find has another parent
                children[parents[node]].append(node)
        if not self._walked(masks, tokens, children):
            self._each(masks, tokens, children)

    def _walked(
        self, masks: NDArray[np.int32], tokens: Sequence[int], children: Sequence[Sequence[int]]
    ) -> bool:
        """Fill the masks by one matcher; False: it cannot, and is of no more use."""
        assert self._matcher is not None, "it has begun"
        left, path = [(0, 0)], 0  # nodes and their depths; tokens that the matcher has taken of the tree
        while left:
            node, depth = left.pop()
            if depth:
                self._matcher.rollback(path + 1 - depth)  # to the parent
                if not self._matcher.consume_token(tokens[node]):
                    return False
            path = depth
            if not self._fill(self._matcher, masks[node]):
                return False
            left += [(child, depth + 1) for child in self._permitted(masks[node], tokens, children[node])]
        self._matcher.rollback(path)
        return True

    def _each(
        self, masks: NDArray[np.int32], tokens: Sequence[int], children: Sequence[Sequence[int]]
    ) -> None:
        """Fill the masks, each by a matcher that has read the text and the node's path alone."""
        left = [(0, list[int]())]  # nodes and their paths
        while left:
            node, path = left.pop()
            matcher = self._behind(path)
            if not self._fill(matcher, masks[node]):
                return self._fail(matcher)
            found = self._permitted(masks[node], tokens, children[node])
            left += [(child, [*path, tokens[child]]) for child in found]
        self._matcher = self._behind([])
        return None

    def _behind(self, path: Sequence[int]) -> LLMatcher:
        """A new matcher behind the text and a path."""
        matcher = self._make()
        matcher.consume_tokens([*self._text, *path])
        return matcher

    def _permitted(
        self, mask: NDArray[np.int32], tokens: Sequence[int], children: Sequence[int]
    ) -> Iterable[int]:
        """The children that a walk may reach from a node with this mask."""
        found = dict[int, int]()
        for child in reversed(children):  # the first of equals counts
            token = tokens[child]
            if token not in self._ends and mask[token // WORD] >> (token % WORD) & 1:
                found.setdefault(token, child)
        return found.values()

    def _fill(self, matcher: LLMatcher, mask: NDArray[np.int32]) -> bool:
        """The mask of where a matcher stands; False: it cannot go on. A text may end where its grammar may,
        and only there."""
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():
            return False
        bits, accepting = mask.view(np.uint32), matcher.is_accepting()
        for token in self._ends:
            bit = np.uint32(1 << token % WORD)
            bits[token // WORD] = bits[token // WORD] | bit if accepting else bits[token // WORD] & ~bit
        return True

    def _fail(self, matcher: LLMatcher) -> None:
        said = one_line(without_place(matcher.get_error() or "no token is permitted"), 200)
        self.failed = f"the grammar cannot go on ({said})"


class Grammars:
    """The grammars of one model."""

    def __init__(self, text: Text | None, config: Qwen3Config) -> None:
        self._text, self._config = text, config
        self._sound: OrderedDict[str, None] = OrderedDict()  # those that have been compiled for its tokens

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher for a new text. Raises InputError for a grammar that cannot be compiled, a model without
        a tokenizer or without an end token, and where llguidance is not installed."""
        lark, tokenizer = grammar.lark, self._tokenizer
        from llguidance import LLMatcher

        if lark not in self._sound:
            with foreign("llguidance cannot compile this grammar"):
                check_compiles(lark, tokenizer)
            self._sound[lark] = None
            if len(self._sound) > MOST_COMPILED:
                self._sound.popitem(last=False)
        self._sound.move_to_end(lark)
        ends = self._config.eos_token_ids
        return Matcher(lambda: LLMatcher(tokenizer, lark, log_level=0), ends)

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
