"""Tokens a cycle and a forward pass by draft: a chain, and trees of several sizes, at several temperatures.
At temperatures above 0 also a chain verified by rejection sampling.

Every prompt is decoded with each setting; texts never depend on it, only the number of cycles does, but for
rejection sampling, whose texts are other samples. The interval is a bootstrap over prompts. Agreement at
offset d: the share of cycles whose first d proposals were all the target's own, or accepted."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_model import InputError, Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.generate import MOST_NODES, GenerationStats
from qwen3_model.prompts import read_prompts

from . import report
from .command import Parser, fail, positive, writable
from .measure import machine, machine_line

COMMAND = "bench.acceptance"
RESAMPLES = 2000
Progress = Callable[[str, int, int], None]  # setting, prompts done, prompts in all


@dataclass(frozen=True)
class Setting:
    """nodes: of the tree; 0 is the chain. verify: as for `generate`; rejection takes a chain."""

    temperature: float
    nodes: int
    verify: str = "coupled"

    @property
    def coupled_chain(self) -> bool:
        """Whether it is what the others are compared with."""
        return not self.nodes and self.verify == "coupled"

    def __str__(self) -> str:
        draft = f"tree {self.nodes}" if self.nodes else "chain"
        return f"{draft}{'' if self.verify == 'coupled' else f', {self.verify}'}, T {self.temperature:g}"


@dataclass(frozen=True)
class Measured:
    """One setting over all prompts."""

    setting: Setting
    stats: list[GenerationStats]

    @property
    def per_cycle(self) -> float:
        """Tokens / cycles, as a ratio of sums."""
        return _ratio(np.array([[s.cycle_tokens, s.cycles] for s in self.stats]))

    @property
    def per_forward(self) -> float:
        """Tokens / forward passes of all kinds, the prefill's too."""
        return _ratio(np.array([[s.tokens, s.forwards] for s in self.stats]))

    @property
    def nodes_per_cycle(self) -> float:
        """Proposals verified / cycles."""
        return _ratio(np.array([[s.nodes, s.cycles] for s in self.stats]))

    def interval(self, share: float = 0.95) -> tuple[float, float]:
        """Of tokens a cycle: bootstrap over prompts, percentiles of the resampled ratio of sums."""
        pairs = np.array([[s.cycle_tokens, s.cycles] for s in self.stats])
        draws = np.random.default_rng(0).integers(len(pairs), size=(RESAMPLES, len(pairs)))
        sums = pairs[draws].sum(1)
        ratios = sums[:, 0] / np.maximum(sums[:, 1], 1)
        low, high = np.quantile(ratios, [(1 - share) / 2, (1 + share) / 2])
        return float(low), float(high)

    def agreement(self) -> list[float]:
        """Share of cycles that kept at least d proposals, for d = 1, 2, ..."""
        counts = np.zeros(max((len(s.accepted_histogram) for s in self.stats), default=0))
        for s in self.stats:
            counts[: len(s.accepted_histogram)] += s.accepted_histogram
        return [float(n) for n in counts[::-1].cumsum()[::-1][1:] / max(counts.sum(), 1)]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        low, high = self.interval()
        return {
            "temperature": self.setting.temperature, "nodes": self.setting.nodes,
            "verify": self.setting.verify, "prompts": len(self.stats),
            "tokens_per_cycle": round(self.per_cycle, 4), "interval_95": [round(low, 4), round(high, 4)],
            "tokens_per_cycle_mean_per_prompt": round(
                float(np.mean([s.tokens_per_cycle for s in self.stats if s.cycles] or [0.0])), 4
            ),
            "tokens_per_forward": round(self.per_forward, 4),
            "nodes_per_cycle": round(self.nodes_per_cycle, 2),
            "agreement": [round(share, 4) for share in self.agreement()],
        }  # fmt: skip


def _ratio(pairs: np.ndarray) -> float:
    over, under = pairs.sum(0)
    return float(over / under) if under else 0.0


def measure(
    model: Qwen3, prompts: Sequence[Sequence[int]], settings: Sequence[Setting], new_tokens: int, seed: int,
    progress: Progress = lambda *_: None, **sampling: Any,
) -> Iterator[Measured]:  # fmt: skip
    """Decode every prompt with each setting, prompt i with seed + i. Raises InputError, with the prompt's
    number."""
    for setting in settings:
        stats = []
        for i, prompt in enumerate(prompts):
            try:
                result = model.generate(
                    prompt, "two-pass", new_tokens, temperature=setting.temperature, seed=seed + i,
                    tree_nodes=setting.nodes, verify=setting.verify, **sampling,
                )  # fmt: skip
            except InputError as error:
                raise InputError(f"prompt {i + 1}: {error}") from None
            stats.append(result.stats)
            progress(str(setting), i + 1, len(prompts))
        yield Measured(setting, stats)


def table(found: Sequence[Measured]) -> tuple[str, list[str], list[list[str]]]:
    """A line a setting; the gain is over the chain at the same temperature."""
    chains = {m.setting.temperature: m.per_cycle for m in found if m.setting.coupled_chain}
    lines = []
    for m in found:
        low, high = m.interval()
        chain = chains.get(m.setting.temperature)
        lines.append([
            str(m.setting), f"{m.per_cycle:.2f}", f"{low:.2f} to {high:.2f}",
            f"{m.to_dict()['tokens_per_cycle_mean_per_prompt']:.2f}", f"{m.per_forward:.2f}",
            f"{m.nodes_per_cycle:.0f}", f"{m.per_cycle / chain:.2f}x" if chain else "-",
        ])  # fmt: skip
    head = ["draft", "tokens/cycle", "95 %", "mean of prompts", "tokens/forward", "nodes/cycle", "over chain"]
    return f"two-pass, {len(found[0].stats)} prompts", head, lines


def plot(path: Path, found: Sequence[Measured], title: str) -> None:
    """Tokens a cycle against the tree's nodes, with intervals; agreement of the chains by offset. Rejection
    sampling is dashed, with crosses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    colours = {t: f"C{i}" for i, t in enumerate(dict.fromkeys(m.setting.temperature for m in found))}
    for temperature, verify in dict.fromkeys(map(_line, found)):
        mine = sorted((m for m in found if _line(m) == (temperature, verify)), key=lambda m: m.setting.nodes)
        coupled = verify == "coupled"
        label = f"T {temperature:g}" + ("" if coupled else f", {verify}")
        line, marker = ("-", ".") if coupled else ("--", "x")
        style = {"color": colours[temperature], "linestyle": line, "marker": marker, "label": label}
        middle = [m.per_cycle for m in mine]
        ends = [m.interval() for m in mine]
        spread = [[y - e[0] for y, e in zip(middle, ends, strict=True)],
                  [e[1] - y for y, e in zip(middle, ends, strict=True)]]  # fmt: skip
        left.errorbar([m.setting.nodes for m in mine], middle, spread, capsize=3, **style)
        for m in mine:
            if not m.setting.nodes:
                shares = m.agreement()
                right.plot(range(1, len(shares) + 1), shares, **style)
    left.set(xlabel="nodes of the tree (0: chain)", ylabel="tokens a cycle", ylim=(1, None))
    right.set(xlabel="proposals", ylabel="share of chains accepted so far", ylim=(0, 1))
    left.legend(), right.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _line(m: Measured) -> tuple[float, str]:
    """Which line of the picture a setting is on."""
    return m.setting.temperature, m.setting.verify


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a temperature, 0 or above")
    return value


def _nodes(text: str) -> int:
    if not text.isdecimal() or int(text) > MOST_NODES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of nodes, 0 (a chain) to {MOST_NODES}")
    return int(text)


def parse(arguments: Sequence[str] | None) -> Any:
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description=" ".join(str(__doc__).split("\n\n")[0].split()),
        epilog=f"example: python -m {COMMAND} --limit 50 --nodes 0 64 --temperatures 0 --json runs/a.json",
    )
    parser.add_argument(
        "prompts", nargs="?", type=Path, metavar="PROMPTS.jsonl",
        help="a prompt a line (default: the embedded checkpoint's held-out ones)",
    )  # fmt: skip
    parser.add_argument("--model", default=EMBEDDED, help="an Orthrus-Qwen3: folder or hub id")
    parser.add_argument("--device", help="cuda, cpu (default: CUDA if there)")
    parser.add_argument("--dtype", help="float32, bfloat16 (default: the checkpoint's on CUDA)")
    parser.add_argument("--backend", default="auto", help="reference, triton, torch or auto")
    parser.add_argument("--field", help="field of a line that holds the prompt")
    parser.add_argument("--split", help="lines of this split only (default of the held-out ones: test)")
    parser.add_argument("--limit", type=positive, default=100, metavar="N", help="prompts (default: 100)")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="default: 256")
    parser.add_argument("--nodes", nargs="+", type=_nodes, default=[0, 16, 32, 64, 128], metavar="N",
                        help="trees to try; 0 is the chain (default: 0 16 32 64 128)")  # fmt: skip
    parser.add_argument("--temperatures", nargs="+", type=_temperature, default=[0.0, 0.6, 1.0], metavar="T",
                        help="default: 0 0.6 1")  # fmt: skip
    parser.add_argument("--top-k", type=positive, metavar="K")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="prompt i takes S + i (default: 0)")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--plot", type=writable, metavar="FILE", help="draw both pictures into FILE")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if given.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            fail(COMMAND, "--plot needs matplotlib: pip install -e '.[bench]'")
    began = time.perf_counter()
    settings = []
    for t in dict.fromkeys(given.temperatures):
        settings += [Setting(t, n) for n in dict.fromkeys(given.nodes)]
        settings += [Setting(t, 0, "rejection")] if t > 0 else []
    found: list[Measured] = []
    try:
        held_out = given.prompts is None
        texts = read_prompts(
            EMBEDDED / "held_out.jsonl" if held_out else given.prompts, given.limit, given.field,
            given.split or ("test" if held_out else None),
        )  # fmt: skip
        model = Qwen3.from_pretrained(given.model, given.device, given.dtype, given.backend)
        if model.text is None:
            raise InputError("this checkpoint has no tokenizer.json, which prompts need")
        prompts = [model.text.encode(text) for text in texts]
        sampling = {"top_k": given.top_k or 0, "top_p": given.top_p}
        for measured in measure(
            model, prompts, settings, given.max_new_tokens, given.seed, _said, **sampling
        ):
            found.append(measured)
    except InputError as error:
        fail(COMMAND, str(error))
    facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
    report.print_tables([table(found)])
    line = f"{model.dtype}, {model.backend}, {machine_line(facts)}; {time.perf_counter() - began:.0f} s"
    print(line)
    if given.json:
        figures = {
            "machine": facts, "dtype": str(model.dtype).removeprefix("torch."), "backend": model.backend,
            "max_new_tokens": given.max_new_tokens, "settings": [m.to_dict() for m in found],
        }  # fmt: skip
        report.write_json(given.json, figures)
    if given.plot:
        plot(given.plot, found, line)
    return 0


def _said(setting: str, done: int, of: int) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(
            f"\r  {setting}: {done} of {of} prompts   ",
            end="" if done < of else "\n",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
