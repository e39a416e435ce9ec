"""Options that verbs share, and what they are turned into."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import InputError, quoted
from ..kinds import BIASES, FLAG, Kind
from ..request import SAMPLING, Request

if TYPE_CHECKING:
    from ..qwen3 import Qwen3
    from ..text import Text

MOST_PROMPT = 2**26  # characters of stdin, or /dev/zero would be read until memory is full


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError instead of printing the usage and exiting."""
        if message.endswith("required: prompt"):
            message += "; one that begins with a dash goes behind --"
        elif message.endswith("expected one argument"):
            message += "; one that begins with a dash is written OPTION=VALUE"
        raise InputError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse says nothing when it cannot write."""
        (file or sys.stderr).write(message)


def new_verb(
    subparsers: argparse._SubParsersAction,
    name: str,
    summary: str,
    example: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    """Add a verb; its --help shows the summary and the example."""
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_model_options(parser: argparse.ArgumentParser, positional: bool = False) -> None:
    """--model, which may be the verb's first word instead, --revision, --diffusion, --device, --dtype,
    --activations, --backend."""
    group = parser.add_argument_group("model")
    says = "checkpoint folder or hub id (default: the embedded tiny one)"
    if positional:
        group.add_argument("model", nargs="?", metavar="PATH|ID", help=says)
    else:
        group.add_argument("--model", metavar="PATH|ID", help=says)
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    group.add_argument(
        "--diffusion", metavar="PATH|ID",
        help="an Orthrus of the same base, whose diffusion view drafts for a checkpoint without one, such as "
        "a quantised one",
    )  # fmt: skip
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there)")
    group.add_argument(
        "--dtype", help="float32, bfloat16 or float16 (default: the checkpoint's; float32 on a CPU)"
    )
    add_activations(group)
    group.add_argument(
        "--backend", default="auto",
        help="auto (triton on CUDA, else reference), reference, triton, or torch: cuBLAS and SDPA, for "
        "comparison, whose bits depend on the rows of a pass (default: auto)",
    )  # fmt: skip


def add_activations(group: argparse._ActionsContainer) -> None:
    """--activations."""
    group.add_argument(
        "--activations", metavar="fp8",
        help="fp8: round what weights of 8-bit floats multiply to 8 bits too, which changes texts, or drafts "
        "where only the diffusion view has such weights (default: never)",
    )  # fmt: skip


def add_settings(group: argparse._ActionsContainer, *names: str) -> None:
    """Options of settings of a generation, as `Request` declares them."""
    for declared in fields(Request):
        if declared.name not in names:
            continue
        kind, repeatable = declared.metadata["kind"], declared.metadata["repeatable"]
        option = f"--{declared.name.replace('_', '-')}"
        if kind is FLAG:
            group.add_argument(option, action="store_true", help=declared.metadata["says"])
            continue
        group.add_argument(
            option,
            action="append" if repeatable else "store",
            default=[] if repeatable else declared.default,
            type=partial(_read, kind, declared.metadata["metavar"]),
            metavar=declared.metadata["metavar"],
            help=declared.metadata["says"],
        )


def _read(kind: Kind, metavar: str | None, text: str) -> Any:
    """A setting's value from a word of the command line."""
    try:
        return kind.of_text(text)
    except InputError as error:  # of a file
        raise argparse.ArgumentTypeError(str(error)) from None
    except ValueError:
        wanted = f"{metavar}, for example 42=-5 or 42=-inf" if kind is BIASES else kind.wanted
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not {wanted}") from None


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Settings of the choice of a token; the defaults choose greedily."""
    add_settings(parser.add_argument_group("sampling"), *SAMPLING)


def add_draft_options(group: argparse._ActionsContainer) -> None:
    """How a cycle drafts."""
    add_settings(group, "block_size", "tree_nodes")


def add_generation_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Everything a single generation takes. The default length is cut to what fits the context."""
    group = parser.add_argument_group("decoding")
    names = "strategy", "block_size", "tree_nodes", "verify", "stop", "stop_token_ids", "ignore_eos"
    add_settings(group, *names, "min_tokens", "top_logprobs", "grammar")
    group.add_argument(
        "--max-new-tokens", type=int, metavar="N",
        help=f"(default: {max_new_tokens}, or what fits the context)",
    )  # fmt: skip
    parser.set_defaults(default_max_new_tokens=max_new_tokens)
    add_sampling_options(parser)
    add_settings(parser, "seed")


def add_generation_config(parser: argparse.ArgumentParser) -> None:
    """--generation-config: where defaults of requests come from."""
    parser.add_argument(
        "--generation-config", choices=("auto", "none"), default="auto", metavar="auto|none",
        help="auto: temperature, top_p, top_k, min_p and repetition_penalty of the checkpoint's "
        "generation_config.json where a request does not give them; none: OpenAI's defaults alone",
    )  # fmt: skip


def add_engine_options(parser: argparse.ArgumentParser, slots: int, cpu_slots: int) -> None:
    """How requests call the model, and the engine of many texts: --served-model-name, --slots,
    --cache-tokens. slots, cpu_slots: the defaults on a GPU and on a CPU."""
    parser.add_argument(
        "--served-model-name", metavar="NAME",
        help="what requests call the model, if they do (default: --model, or embedded)",
    )  # fmt: skip
    parser.add_argument(
        "--slots", type=int, metavar="N", help=f"texts side by side (default: {slots}; on a CPU {cpu_slots})"
    )
    parser.add_argument(
        "--cache-tokens", type=int, metavar="N",
        help="positions that the cache holds for all texts (default: what 0.9 of the free memory holds)",
    )  # fmt: skip


def check_engine_options(args: argparse.Namespace, *others: tuple[str, float | None, int, int]) -> None:
    """Raises InputError for an option out of range. others: more of them, as (option, value, least, most)."""
    from ..decode.engine import MOST_SLOTS, MOST_TOKENS

    for name, value, least, most in (
        ("--slots", args.slots, 1, MOST_SLOTS), ("--cache-tokens", args.cache_tokens, 1, MOST_TOKENS),
        *others,
    ):  # fmt: skip
        if value is not None and not least <= value <= most:
            raise InputError(f"{name} is {value}; {least} to {most} was expected")


def served_name(args: argparse.Namespace) -> str:
    """What requests call the model, if they do. Raises InputError for a name that is empty."""
    if args.served_model_name == "":
        raise InputError("--served-model-name is empty: give a name, or leave it out")
    return args.served_model_name or args.model or "embedded"


def checkpoint_folder(args: argparse.Namespace) -> Path:
    """The folder of the checkpoint that --model names, downloaded where it is a hub id. Raises InputError."""
    from .. import checkpoint, hub

    return hub.resolve(checkpoint.EMBEDDED if args.model is None else args.model, args.revision)


def recommended_settings(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Defaults of requests to the checkpoint of a folder, as --generation-config says. Raises InputError."""
    from ..openai.served import recommended

    return {} if args.generation_config == "none" else recommended(folder)


def model_loader(args: argparse.Namespace, progress: bool = True) -> Callable[[], Qwen3]:
    """Loads the model that --model and its companions name, shown on stderr; picklable. Raises InputError."""
    from .. import checkpoint
    from ..qwen3 import Qwen3

    path = checkpoint.EMBEDDED if args.model is None else args.model
    return partial(
        Qwen3.from_pretrained, path, args.device, args.dtype, args.backend, args.revision, progress,
        args.diffusion, args.activations,
    )  # fmt: skip


def load_model(args: argparse.Namespace) -> Qwen3:
    """The model that --model and its companions name. Raises InputError."""
    from ..settings import pick_threads

    model = model_loader(args)()
    pick_threads(model.device, model.config.hidden_size)
    return model


def read_prompt(prompt: str) -> str:
    """The prompt, or stdin as it is for "-". Raises InputError when stdin is not text, or has no end."""
    if prompt != "-":
        return prompt
    try:
        read = sys.stdin.read(MOST_PROMPT + 1)
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not text: {error}") from None
    if len(read) > MOST_PROMPT:
        raise InputError(f"stdin has more than {MOST_PROMPT} characters: no context holds so long a prompt")
    return read


def encode(model: Qwen3, prompt: str) -> list[int]:
    """Token ids of a prompt. Raises InputError when the checkpoint has no tokenizer."""
    return text_of(model).encode(prompt)


def text_of(model: Qwen3) -> Text:
    """The model's tokenizer and chat template. Raises InputError when the checkpoint came without."""
    if model.text is None:
        raise InputError("this checkpoint has no tokenizer.json, which text needs: add its base model's")
    return model.text


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `generate` from the sampling options."""
    return {name: getattr(args, name) for name in SAMPLING} | {"logit_bias": dict(args.logit_bias)}


def generation_settings(args: argparse.Namespace, model: Qwen3, prompt_tokens: int) -> dict[str, Any]:
    """Keyword arguments of `generate` from the options of a single generation."""
    budget = args.max_new_tokens
    if budget is None:  # at least 1, so that generate itself refuses a prompt that fills the context
        budget = max(min(args.default_max_new_tokens, model.config.context_length - prompt_tokens), 1)
    return sampling_settings(args) | {
        "strategy": args.strategy,
        "max_new_tokens": budget,
        "block_size": args.block_size,
        "tree_nodes": args.tree_nodes,
        "verify": args.verify,
        "stop": args.stop,
        "stop_token_ids": args.stop_token_ids,
        "ignore_eos": args.ignore_eos,
        "min_tokens": args.min_tokens,
        "top_logprobs": args.top_logprobs,
        "grammar": args.grammar,
        "seed": args.seed,
    }
