"""What may be asked of one generation. Every setting is declared, checked and documented here alone: the
library's `generate` takes these names, and the command line makes its options from these declarations.

`Request` refuses what no model could do; `Request.fit` what this checkpoint cannot do, and leaves nothing
open. The ranges of the choice of a token are the choice's own (`orthrus_kernels.Sampling`)."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from .errors import InputError, quoted
from .kinds import (
    BIASES,
    FLAG,
    GRAMMAR,
    MOST_STOP_TOKENS,
    NODES,
    NUMBER,
    STRINGS,
    TOKENS,
    WHOLE,
    WHOLE_OR_NONE,
    WORD,
    Kind,
)  # fmt: skip

if TYPE_CHECKING:
    from orthrus_kernels import Sampling

    from .config import Qwen3Config
    from .grammar import Grammar

MOST_LIKELIEST = 20  # tokens told of a position
LONGEST_SALT = 512  # characters; a cache keeps it for as long as it knows the page
STRATEGIES = ("autoregressive", "lookup", "two-pass", "one-pass", "auto")
PLAIN_STRATEGIES = ("autoregressive", "lookup", "auto")  # of a model without a diffusion view
VERIFY = ("coupled", "rejection")  # how a two-pass cycle decides on its proposals
# Rows of a one-pass block: by default, and what it may have. Its first proposal is dropped.
ONE_PASS_BLOCK, LEAST_ONE_PASS_BLOCK, MOST_ONE_PASS_BLOCK = 8, 3, 64
LARGEST_BIAS = 1e30  # beside a grammar: over any temperature it stays in fp32's range
SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
    "logit_bias",
)  # fmt: skip


def _setting(
    default: Any, kind: Kind, says: str, metavar: str | None = None, repeatable: bool = False
) -> Any:
    return field(
        default=default,
        metadata={"kind": kind, "says": says, "metavar": metavar, "repeatable": repeatable},
    )


@dataclass(frozen=True, kw_only=True)
class Request:
    """The settings of one generation. Raises InputError, naming the setting, for an impossible value.

    The text depends on weights, prompt, settings and seed, never on strategy, block_size or tree_nodes (but
    for verify="rejection"). The words beside a setting are those of the command line's --help."""

    strategy: str = _setting(
        "auto", WORD, "auto, autoregressive, two-pass, one-pass, or lookup, which drafts what followed the "
        "last tokens before; changes speed, never text (default: auto, what is fastest from cycle to cycle)",
    )  # fmt: skip
    max_new_tokens: int | None = _setting(
        None, WHOLE_OR_NONE, "tokens at most (default: what fits the context)", "N"
    )
    min_tokens: int = _setting(
        0, WHOLE, "neither end tokens nor stop strings end the text before it has N tokens (default: 0)", "N"
    )
    block_size: int | None = _setting(
        None, WHOLE_OR_NONE, "rows of a draft (default: the checkpoint's; 8 in one-pass)", "K"
    )
    tree_nodes: int | Literal["auto"] = _setting(
        "auto", NODES, "verify a tree of the N likeliest nodes, 0: a chain (default: auto, what is fastest "
        "from cycle to cycle, and no draft where none pays; 19 in one-pass)", "N",
    )  # fmt: skip
    verify: str = _setting(
        "coupled", WORD, "coupled; or rejection, for comparison: rejection sampling of a chain (arXiv "
        "2211.17192) at a temperature above 0, whose text is distributed as plain sampling's but is not the "
        "same for a seed, and depends on the drafter (default: coupled)", "HOW",
    )  # fmt: skip
    stop: Sequence[str] = _setting(
        (), STRINGS, "end the text before TEXT (repeatable); token ids end with the token that completed it",
        "TEXT", repeatable=True,
    )  # fmt: skip
    stop_token_ids: Sequence[int] = _setting(
        (), TOKENS, f"token ID ends the text too (repeatable, up to {MOST_STOP_TOKENS})", "ID",
        repeatable=True,
    )  # fmt: skip
    ignore_eos: bool = _setting(False, FLAG, "the checkpoint's end tokens do not end the text")
    temperature: float = _setting(0.0, NUMBER, "0: greedy (default)", "T")
    top_k: int = _setting(0, WHOLE, "0: off (default)", "K")
    top_p: float = _setting(1.0, NUMBER, "1: off (default)", "P")
    min_p: float = _setting(0.0, NUMBER, "0: off (default)", "P")
    repetition_penalty: float = _setting(
        1.0, NUMBER, "divide or multiply logits of tokens in prompt or text; 1: off (default)", "R"
    )
    frequency_penalty: float = _setting(
        0.0, NUMBER, "subtract F times how often a token was generated; -2 to 2, 0: off (default)", "F"
    )
    presence_penalty: float = _setting(
        0.0, NUMBER, "subtract P for a token that was generated; -2 to 2, 0: off (default)", "P"
    )
    logit_bias: Mapping[int, float] | None = _setting(
        None, BIASES, "add VALUE to a token's logit; -inf bans it (repeatable)", "ID=VALUE", repeatable=True
    )
    seed: int | None = _setting(None, WHOLE_OR_NONE, "seed of the sampling (default: drawn, reported)", "S")
    top_logprobs: int = _setting(
        0, WHOLE, "tell the N likeliest tokens of the model at each token too, 0 to 20 (default: 0)", "N"
    )
    grammar: Grammar | None = _setting(
        None, GRAMMAR, "the text is JSON that fits the JSON schema in FILE (default: any text)", "FILE"
    )
    cache_salt: str = _setting(
        "",
        WORD,
        "pages of the cache are shared with texts of the same word alone (default: with all of none)",
    )

    def __post_init__(self) -> None:
        for declared in fields(self):
            value, kind = getattr(self, declared.name), declared.metadata["kind"]
            try:
                object.__setattr__(self, declared.name, kind.read(value))
            except InputError:
                raise
            except Exception:  # also what a foreign type raises that is asked for its truth or its length
                raise InputError(f"{declared.name} is {quoted(value)}; {kind.wanted} was expected") from None
        if self.strategy not in STRATEGIES:
            raise InputError(f"unknown strategy {quoted(self.strategy)}: use {', '.join(STRATEGIES)}")
        if self.verify not in VERIFY:
            raise InputError(f"verify is {quoted(self.verify)}; use {' or '.join(VERIFY)}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {quoted(self.max_new_tokens)}; it must be at least 1")
        if self.min_tokens < 0:
            raise InputError(f"min_tokens is {quoted(self.min_tokens)}; it must be at least 0")
        if len(self.cache_salt) > LONGEST_SALT:
            raise InputError(f"cache_salt has {len(self.cache_salt)} characters; at most {LONGEST_SALT}")
        if not 0 <= self.top_logprobs <= MOST_LIKELIEST:
            raise InputError(
                f"top_logprobs is {quoted(self.top_logprobs)}; it must be in 0..{MOST_LIKELIEST}"
            )
        _ = self.sampling  # refuses what is out of range

    @property
    def sampling(self) -> Sampling:
        """The settings of the choice of a token, without a seed those of seed 0."""
        from orthrus_kernels import Sampling

        chosen = {name: getattr(self, name) for name in SAMPLING}
        try:
            return Sampling(**chosen, seed=0 if self.seed is None else self.seed)
        except ValueError as error:
            raise InputError(error) from None

    def fit(self, config: Qwen3Config, prompt_tokens: int, has_text: bool) -> Request:
        """The request with nothing left open, for a checkpoint and a prompt of so many tokens.

        has_text: whether the checkpoint has a tokenizer. Raises InputError for what it cannot do."""
        strategy = self._strategy(config)
        if self.stop and not has_text:
            raise InputError("stop strings need a tokenizer, and this model has none")
        _check_biases(self.logit_bias or {}, config.vocab_size)
        _check_tokens("stop_token_ids", self.stop_token_ids, config.vocab_size)
        tree_nodes = 0 if self.verify == "rejection" and self.tree_nodes == "auto" else self.tree_nodes
        if not config.has_diffusion_view:
            tree_nodes = "auto"
        fitted = replace(
            self,
            strategy=strategy,
            max_new_tokens=self._budget(config.context_length, prompt_tokens),
            block_size=block_rows(config, self.block_size, strategy),
            tree_nodes=tree_nodes,
            seed=secrets.randbits(32) if self.seed is None else self.seed,
        )
        if fitted.verify == "rejection":
            fitted._check_rejection()
        if fitted.grammar is not None:
            fitted._check_grammar(config)
        assert fitted.max_new_tokens is not None
        if fitted.min_tokens > fitted.max_new_tokens:
            most = fitted.max_new_tokens
            raise InputError(f"min_tokens is {fitted.min_tokens}, but the text has {most} new tokens at most")
        return fitted

    def end_tokens(self, config: Qwen3Config) -> tuple[int, ...]:
        """The tokens any of which ends the text, each one once."""
        own = () if self.ignore_eos else config.eos_token_ids
        return tuple(dict.fromkeys((*own, *self.stop_token_ids)))

    def _strategy(self, config: Qwen3Config) -> str:
        if config.has_diffusion_view:
            return "two-pass" if self.verify == "rejection" and self.strategy == "auto" else self.strategy
        if self.strategy not in PLAIN_STRATEGIES:
            raise InputError(
                f"strategy {self.strategy} needs an Orthrus; this is a plain Qwen3 without a diffusion view: "
                f"use {', '.join(PLAIN_STRATEGIES)}, or distil one (orthrus distill)"
            )
        return self.strategy

    def _budget(self, context: int, prompt: int) -> int:
        if prompt >= context:
            raise InputError(
                f"the prompt has {prompt} tokens and the context only {context}: shorten the prompt"
            )
        asked = context - prompt if self.max_new_tokens is None else self.max_new_tokens
        if prompt + asked > context:
            raise InputError(
                f"prompt ({prompt} tokens) + max_new_tokens ({quoted(asked)}) is past the context of "
                f"{context}: ask for at most {context - prompt} new tokens"
            )
        return asked

    def _check_grammar(self, config: Qwen3Config) -> None:
        """A text ends where its grammar says that it may, so nothing else may hold its end back."""
        if not config.eos_token_ids:
            raise InputError("a grammar needs an end token, and this checkpoint's config.json names none")
        if self.min_tokens:
            raise InputError(f"min_tokens is {self.min_tokens}; a text with a grammar takes 0")
        if self.ignore_eos:
            raise InputError("ignore_eos is true; a text with a grammar ends with an end token")
        for token, bias in (self.logit_bias or {}).items():
            if bias < -LARGEST_BIAS:
                raise InputError(
                    f"logit_bias of token {token} is {bias}; with a grammar it must be at least "
                    f"{-LARGEST_BIAS:g}: tokens that the grammar needs cannot be banned"
                )

    def _check_rejection(self) -> None:
        if self.strategy != "two-pass":
            raise InputError(f"verify rejection takes strategy two-pass of an Orthrus, not {self.strategy}")
        if self.temperature == 0:
            raise InputError("verify rejection takes a temperature above 0: a greedy choice is not a sample")
        if self.min_tokens:
            raise InputError(f"verify rejection takes no min_tokens: it is {self.min_tokens}, use 0")
        if self.grammar is not None:
            raise InputError("verify rejection takes no grammar: use verify coupled")
        if self.top_logprobs:
            raise InputError(f"verify rejection takes no top_logprobs: it is {self.top_logprobs}, use 0")
        if self.tree_nodes != 0:
            raise InputError(
                f"verify rejection takes a chain, not a tree: tree_nodes is {self.tree_nodes}, use 0"
            )


def whole_up_to(name: str, value: int, most: int) -> int:
    """A whole number from 1 to `most`. Raises InputError, naming it."""
    try:
        number = WHOLE.read(value)
        if 1 <= number <= most:
            return number
    except (TypeError, OverflowError):  # of what is no whole number, or has more than MOST_BITS
        pass
    raise InputError(f"{name} is {quoted(value)}; a whole number from 1 to {most} was expected")


def block_rows(config: Qwen3Config, block_size: int | None, strategy: str) -> int:
    """Rows of a strategy's blocks, its default for None; 0 without a diffusion view. Raises InputError."""
    least, most = 2, config.block_size
    if strategy == "one-pass":
        least, most = LEAST_ONE_PASS_BLOCK, min(most, MOST_ONE_PASS_BLOCK)
        if most < least:
            raise InputError(
                f"strategy one-pass takes blocks of {least} rows or more, this checkpoint's have {most}"
            )
    if block_size is None or not most:
        return min(most, ONE_PASS_BLOCK) if strategy == "one-pass" else most
    if not least <= block_size <= most:
        raise InputError(
            f"block_size is {quoted(block_size)}; {strategy} of this checkpoint takes {least} to {most}"
        )
    return block_size


def _check_tokens(name: str, tokens: Iterable[int], vocabulary: int) -> None:
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise InputError(f"{name} names token {quoted(token)}; this checkpoint's are 0..{vocabulary - 1}")


def _check_biases(biases: Mapping[int, float], vocabulary: int) -> None:
    _check_tokens("logit_bias", biases, vocabulary)
    if sum(bias == -math.inf for bias in biases.values()) == vocabulary:
        raise InputError("logit_bias bans every token: leave at least one")
