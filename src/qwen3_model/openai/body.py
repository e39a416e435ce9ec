"""A request's JSON body: what it asks of which prompts.

Names are OpenAI's; what OpenAI lacks has vLLM's name, and what both lack this program's. Defaults are
OpenAI's, but for those that the checkpoint brings (`Served.defaults`). Every field is applied, or refused by
its name: a setting that is left out silently would be a wrong answer. A null field is one that is not
there."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError, quoted
from ..grammar import Grammar
from ..request import MOST_LIKELIEST, Request, whole_up_to
from .formats import grammar_of
from .prompts import MOST_CHOICES, conversation_prompt, plain_prompts
from .refusal import FieldError, naming
from .served import Served
from .tools import tools_of

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MOST_N = 128  # choices a prompt
MOST_STOPS, LONGEST_STOP = 4, 1000  # stop strings; characters of one
MOST_BIASES, LARGEST_BIAS = 1024, 100
MOST_TOKENS = 2**31  # that may be asked for
LONGEST_USER = 512  # characters
COMPLETION_TOKENS = 16  # of a completion that does not say how many

# The engine's settings that a body may name, in the order in which they are checked
SETTINGS = (
    "strategy", "block_size", "tree_nodes", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "frequency_penalty", "presence_penalty", "logit_bias", "stop", "stop_token_ids",
    "ignore_eos", "min_tokens", "cache_salt", "seed",
)  # fmt: skip
BOTH = (
    "model", "max_tokens", "n", "logprobs", "user", "stream", "stream_options", "response_format", *SETTINGS,
)  # fmt: skip
STREAM_OPTIONS = ("include_usage", "include_runs")  # the second is ours
OWN = {
    COMPLETIONS: ("prompt",),
    CHAT: (
        "messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs", "tools", "tool_choice",
    ),
}  # fmt: skip
# What the engine cannot do yet; clients send these values, which ask for nothing.
NEUTRAL: dict[str, Any] = {
    "echo": False, "best_of": 1, "store": False, "parallel_tool_calls": True,
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A request that can be run. request: of the first choice, its seed drawn where none was given."""

    chat: bool
    prompts: list[list[int]]
    n: int
    request: Request
    logprobs: bool  # whether the answer has them, and those of the request's top_logprobs
    stream: bool = False
    include_usage: bool = False  # at the end of a stream
    include_runs: bool = False  # with each chunk of a stream, its accepted run
    tools: bool = False  # whether a chat's answer may call some
    reasons: bool = False  # whether the prompt has begun the answer's reasoning

    def jobs(self) -> list[tuple[list[int], Request]]:
        """The prompt and the request of each choice. Choice i belongs to prompt i // n, and its seed is that
        of the first choice + i."""
        assert self.request.seed is not None
        prompts = [prompt for prompt in self.prompts for _ in range(self.n)]
        return [
            (prompt, replace(self.request, seed=self.request.seed + i)) for i, prompt in enumerate(prompts)
        ]


def read(served: Served, url: str, body: Any, streams: bool = False) -> Asked:
    """What a body asks for that was sent to COMPLETIONS or CHAT. streams: whether the answer may come in
    pieces. Raises InputError, and FieldError where the fault is a field's."""
    if not isinstance(url, str) or url not in OWN:
        raise InputError(f"url is {quoted(url)}; use {' or '.join(OWN)}")
    if not isinstance(body, Mapping):
        raise InputError(f"the body is {quoted(body)}; an object was expected")
    _check_names(url, body)
    given = {name: value for name, value in body.items() if value is not None and name not in NEUTRAL}
    check_labels(served, given)
    stream, include_usage, include_runs = _stream(given, streams)
    reasons = False
    if url == CHAT:
        prompt, reasons = conversation_prompt(served, given)
        prompts = [prompt]
    else:
        prompts = plain_prompts(served, given.get("prompt"))
    with naming("n"):
        n = whole_up_to("n", given.get("n", 1), MOST_N)
    if n * len(prompts) > MOST_CHOICES:
        raise FieldError("n", f"n times the prompts is {n * len(prompts)}; at most {MOST_CHOICES} choices")
    most = _most_tokens(url, given, served.context, prompts)
    settings = {"temperature": 1.0} | dict(served.defaults) | _settings(given)
    logprobs, settings["top_logprobs"] = _logprobs(url, given)
    grammar = grammar_of(given, reasons)
    request = _request(served, settings, most, n * len(prompts), grammar)
    with naming("min_tokens"):  # all else has been tried
        request.fit(served.config, max(map(len, prompts)), has_text=True)
    tools = bool(tools_of(given))
    return Asked(
        url == CHAT, prompts, n, request, logprobs, stream, include_usage, include_runs, tools, reasons
    )


def _check_names(url: str, body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name in NEUTRAL:
            neutral = NEUTRAL[name]
            same = isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
            if not same and value is not None:
                raise FieldError(name, f"{name} is {quoted(value)}, which is not supported yet")
        elif name not in BOTH + OWN[url]:
            known = any(name in names for names in OWN.values())
            wrong = f"not a field of {url}" if known else "not known"
            raise FieldError(name, f"the field {quoted(name)} is {wrong}")


def check_labels(served: Served, given: Mapping[str, Any]) -> None:
    """Raises FieldError for another model. `user` is a client's own note, which changes no answer, as with
    OpenAI."""
    model, user = given.get("model", served.name), given.get("user", "")
    if model != served.name:
        raise FieldError("model", f"model is {quoted(model)}; {quoted(served.name)} is here")
    if not isinstance(user, str) or len(user) > LONGEST_USER:
        raise FieldError("user", f"user must be a string of at most {LONGEST_USER} characters")


def _stream(given: Mapping[str, Any], streams: bool) -> tuple[bool, bool, bool]:
    """Whether the answer comes in pieces, whether its usage comes behind them, and whether each tells its
    run."""
    stream, options = given.get("stream", False), given.get("stream_options", {})
    if not isinstance(stream, bool) or (stream and not streams):
        wanted = "true or false" if streams else "false"
        raise FieldError("stream", f"stream is {quoted(stream)}; {wanted} was expected here")
    if not isinstance(options, dict) or (options and not stream):
        raise FieldError("stream_options", "stream_options must be an object, of a request with stream true")
    if unknown := [name for name in options if name not in STREAM_OPTIONS]:
        raise FieldError("stream_options", f"stream_options has an unknown field {quoted(unknown[0])}")
    for name, value in options.items():
        if not isinstance(value, bool | None):
            raise FieldError("stream_options", f"{name} of stream_options must be true or false")
    usage, runs = (bool(options.get(name)) for name in STREAM_OPTIONS)
    return stream, usage, runs


def _most_tokens(url: str, given: Mapping[str, Any], context: int, prompts: list[list[int]]) -> int:
    """Tokens of an answer at most."""
    longest = max(map(len, prompts))
    if longest >= context:
        field = "messages" if url == CHAT else "prompt"
        raise FieldError(field, f"{field} has {longest} tokens and the context only {context}: shorten it")
    asked = {}
    for name in ("max_tokens", "max_completion_tokens"):
        if name in given:
            with naming(name):
                asked[name] = whole_up_to(name, given[name], MOST_TOKENS)
    if not asked:
        return context - longest if url == CHAT else min(COMPLETION_TOKENS, context - longest)
    name, most = asked.popitem()
    if asked and asked["max_tokens"] != most:
        raise FieldError(name, f"max_tokens and {name} are the same and differ: give one of them")
    if longest + most > context:
        raise FieldError(
            name, f"{longest} tokens of prompt + {name} ({most}) are past the context of {context}: ask for "
            f"at most {context - longest}",
        )  # fmt: skip
    return most


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's settings, with OpenAI's meaning and bounds where it has them."""
    found = {name: given[name] for name in SETTINGS if name in given}
    if found.get("top_k") == -1:  # vLLM's word for off
        found["top_k"] = 0
    if "stop" in found:
        found["stop"] = _stops(found["stop"])
    if "logit_bias" in found:
        found["logit_bias"] = _biases(found["logit_bias"])
    return found


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise FieldError("stop", f"stop is {quoted(value)}; a string or a list of strings was expected")
    if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
        raise FieldError(
            "stop", f"stop takes at most {MOST_STOPS} strings of at most {LONGEST_STOP} characters each"
        )
    return stops


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        raise FieldError("logit_bias", f"logit_bias must be an object of at most {MOST_BIASES} token ids")
    for token, bias in value.items():
        number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
        if not re.fullmatch("[0-9]{1,10}", token, re.ASCII) or not number or not abs(bias) <= LARGEST_BIAS:
            raise FieldError(
                "logit_bias", f"logit_bias has {quoted(token)}: {quoted(bias)}; a token id and a number from "
                f"{-LARGEST_BIAS} to {LARGEST_BIAS} were expected",
            )  # fmt: skip
    return value


def _request(
    served: Served, settings: dict[str, Any], most: int, choices: int, grammar: Grammar | None
) -> Request:
    """The request of the first choice. Each setting is tried by itself first, beside the strategy and the
    grammar, so that an error has its name."""
    settings = settings | {"grammar": grammar}
    together = {name: settings[name] for name in ("strategy", "grammar") if name in settings}
    with naming("response_format"):
        Request(grammar=grammar).fit(served.config, 1, has_text=True)
    for name in [name for name in SETTINGS if name in settings]:
        with naming(name):
            alone = Request(**together | {name: settings[name]})
            alone.fit(served.config, 1, has_text=True)
    seed = settings.pop("seed", None)
    seed = secrets.randbits(32) if seed is None else seed
    with naming("seed"):
        Request(seed=seed + choices - 1)  # of the last choice
    return Request(**settings, seed=seed, max_new_tokens=most)


def _logprobs(url: str, given: Mapping[str, Any]) -> tuple[bool, int]:
    """Whether the chosen tokens' log-probabilities are asked for, and those of how many of the likeliest. A
    chat says so in two fields, a completion in one."""
    wanted = given.get("logprobs", False)
    if url != CHAT:
        return wanted is not False, 0 if wanted is False else _likeliest("logprobs", wanted)
    if not isinstance(wanted, bool):
        raise FieldError("logprobs", f"logprobs is {quoted(wanted)}; true or false was expected")
    likeliest = _likeliest("top_logprobs", given.get("top_logprobs", 0))
    if likeliest and not wanted:
        raise FieldError("top_logprobs", f"top_logprobs is {likeliest}; it needs logprobs true")
    return wanted, likeliest


def _likeliest(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MOST_LIKELIEST:
        raise FieldError(name, f"{name} is {quoted(value)}; 0 to {MOST_LIKELIEST} was expected")
    return value
