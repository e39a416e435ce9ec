"""Tokens a cycle and a forward pass by draft: a chain, trees of several sizes, and what "auto" chooses, at
several temperatures. At temperatures above 0 also a chain verified by rejection sampling.

Also cycles of one pass (--one-pass). Every prompt is decoded with each setting; texts never depend on it,
only the number of cycles does, but for rejection sampling, whose texts are other samples. The interval is a
bootstrap over prompts. Agreement at offset d: the share of cycles whose first d proposals were all the
target's own, or accepted. Behind it the oracle and recall by offset (oracle.py), of the same texts."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from orthrus_kernels import Sampling
from qwen3_model import GenerationStats, InputError, Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.kinds import MOST_NODES
from qwen3_model.prompts import read_prompts

from . import oracle, report
from .bootstrap import interval, ratio
from .command import Parser, fail, positive, run, writable
from .measure import machine, machine_line

COMMAND = "bench.acceptance"
Progress = Callable[[str, int, int], None]  # setting, prompts done, prompts in all


@dataclass(frozen=True)
class Setting:
    """nodes: of the tree; 0 is the chain, "auto" what pays. verify: as for `generate`; rejection takes a
    chain."""

    temperature: float
    nodes: int | Literal["auto"]
    verify: str = "coupled"
    strategy: str = "two-pass"

    @property
    def coupled_chain(self) -> bool:
        """Whether it is what the others are compared with."""
        return (self.nodes, self.verify, self.strategy) == (0, "coupled", "two-pass")

    def __str__(self) -> str:
        draft = "auto" if self.nodes == "auto" else f"tree {self.nodes}" if self.nodes else "chain"
        draft = draft if self.strategy == "two-pass" else f"{self.strategy}, {draft}"
        return f"{draft}{'' if self.verify == 'coupled' else f', {self.verify}'}, T {self.temperature:g}"


@dataclass(frozen=True)
class Measured:
    """One setting over all prompts."""

    setting: Setting
    stats: list[GenerationStats]
    texts: list[list[int]] = field(default_factory=list)  # of each prompt

    @property
    def per_cycle(self) -> float:
        """Tokens / cycles, as a ratio of sums."""
        return ratio(self._cycles)

    @property
    def per_forward(self) -> float:
        """Tokens / forward passes of all kinds, the prefill's too."""
        return ratio(np.array([[s.tokens, s.forwards] for s in self.stats]))

    @property
    def nodes_per_cycle(self) -> float:
        """Proposals verified / cycles."""
        return ratio(np.array([[s.nodes, s.cycles] for s in self.stats]))

    @property
    def per_second(self) -> float:
        """Tokens / seconds, prefills included; the first texts of a process compile and capture."""
        return sum(s.tokens for s in self.stats) / max(sum(s.seconds for s in self.stats), 1e-9)

    def interval(self) -> tuple[float, float]:
        """Of tokens a cycle, 95 %: a bootstrap over prompts."""
        return interval(self._cycles)

    @property
    def _cycles(self) -> np.ndarray:
        return np.array([[s.cycle_tokens, s.cycles] for s in self.stats])

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
            "verify": self.setting.verify, "strategy": self.setting.strategy, "prompts": len(self.stats),
            "tokens_per_cycle": round(self.per_cycle, 4), "interval_95": [round(low, 4), round(high, 4)],
            "tokens_per_cycle_mean_per_prompt": round(
                float(np.mean([s.tokens_per_cycle for s in self.stats if s.cycles] or [0.0])), 4
            ),
            "tokens_per_forward": round(self.per_forward, 4),
            "nodes_per_cycle": round(self.nodes_per_cycle, 2),
            "tokens_per_second": round(self.per_second, 1),
            "agreement": [round(share, 4) for share in self.agreement()],
        }  # fmt: skip


def measure(
    model: Qwen3, prompts: Sequence[Sequence[int]], settings: Sequence[Setting], new_tokens: int, seed: int,
    progress: Progress = lambda *_: None, **sampling: Any,
) -> Iterator[Measured]:  # fmt: skip
    """Decode every prompt with each setting, prompt i with seed + i. Raises InputError, with the prompt's
    number."""
    for setting in settings:
        measured = Measured(setting, [])
        for i, prompt in enumerate(prompts):
            try:
                result = model.generate(
                    prompt, setting.strategy, new_tokens, temperature=setting.temperature, seed=seed + i,
                    tree_nodes=setting.nodes, verify=setting.verify, **sampling,
                ).whole()  # fmt: skip
            except InputError as error:
                raise InputError(f"prompt {i + 1}: {error}") from None
            measured.stats.append(result.stats)
            measured.texts.append(result.token_ids)
            progress(str(setting), i + 1, len(prompts))
        yield measured


def table(found: Sequence[Measured]) -> tuple[str, list[str], list[list[str]]]:
    """A line a setting; gains are over the two-pass chain at the same temperature."""
    chains = {m.setting.temperature: m for m in found if m.setting.coupled_chain}
    lines = []
    for m in found:
        low, high = m.interval()
        chain = chains.get(m.setting.temperature)
        lines.append([
            str(m.setting), f"{m.per_cycle:.2f}", f"{low:.2f} to {high:.2f}",
            f"{m.to_dict()['tokens_per_cycle_mean_per_prompt']:.2f}", f"{m.per_forward:.2f}",
            f"{m.nodes_per_cycle:.0f}", f"{m.per_second:.0f}",
            *((f"{m.per_cycle / chain.per_cycle:.2f}x", f"{m.per_forward / chain.per_forward:.2f}x")
              if chain else ("-", "-")),
        ])  # fmt: skip
    head = ["draft", "tokens/cycle", "95 %", "mean of prompts", "tokens/forward", "nodes/cycle",
            "tokens/s", "cycle, over chain", "forward, over chain"]  # fmt: skip
    return f"drafts, {len(found[0].stats)} prompts", head, lines


def plot(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """`draw_acceptance` as a picture. rows: of `Measured.to_dict`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, sides = pyplot.subplots(1, 2, figsize=(11, 4.5))
    draw_acceptance(*sides, rows)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_acceptance(left: Any, right: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Tokens a cycle against the nodes verified a cycle, with intervals; agreement of the chains by offset.
    Rejection sampling is dashed, with crosses; "auto" is a star. Of two-pass cycles. left, right:
    matplotlib's axes."""
    rows = [row for row in rows if row.get("strategy", "two-pass") == "two-pass"]
    colours = {t: f"C{i}" for i, t in enumerate(dict.fromkeys(row["temperature"] for row in rows))}
    for row in (row for row in rows if row["nodes"] == "auto"):
        star = {"color": colours[row["temperature"]], "markersize": 11}
        left.plot(row["nodes_per_cycle"], row["tokens_per_cycle"], "*", **star)
    fixed = sorted((row for row in rows if row["nodes"] != "auto"), key=lambda row: row["nodes"])
    for temperature, verify in dict.fromkeys((row["temperature"], row["verify"]) for row in rows):
        mine = [row for row in fixed if (row["temperature"], row["verify"]) == (temperature, verify)]
        label = f"T {temperature:g}" + ("" if verify == "coupled" else f", {verify}")
        line, marker = ("-", ".") if verify == "coupled" else ("--", "x")
        style = {"color": colours[temperature], "linestyle": line, "marker": marker, "label": label}
        middle = [row["tokens_per_cycle"] for row in mine]
        spread = [[abs(y - row["interval_95"][end]) for y, row in zip(middle, mine, strict=True)]
                  for end in (0, 1)]  # fmt: skip
        if mine:
            left.errorbar([row["nodes"] for row in mine], middle, spread, capsize=3, **style)
        for row in (row for row in mine if row["nodes"] == 0):
            right.plot(range(1, len(row["agreement"]) + 1), row["agreement"], **style)
    left.set(
        xlabel="nodes of the tree (0: chain; star: auto's mean)", ylabel="tokens a cycle", ylim=(1, None)
    )
    right.set(xlabel="proposals", ylabel="share of chains accepted so far", ylim=(0, 1))
    for side in (left, right):
        if side.get_legend_handles_labels()[0]:
            side.legend()


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a temperature, 0 or above")
    return value


def _nodes(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) > MOST_NODES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not auto or a number of nodes, 0 (a chain) to {MOST_NODES}"
        )
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
    parser.add_argument("--nodes", nargs="+", type=_nodes, metavar="N",
                        default=[0, 16, 32, 64, 128, "auto"],
                        help="trees to try; 0 is the chain (default: 0 16 32 64 128 auto)")  # fmt: skip
    parser.add_argument(
        "--one-pass",
        nargs="*",
        type=_nodes,
        default=["auto"],
        metavar="N",
        help="one-pass cycles with such trees; auto, the default: of their default size",
    )
    parser.add_argument("--no-oracle", action="store_true", help="leave out the oracle and recall by offset")
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
        settings += [Setting(t, n, strategy="one-pass") for n in dict.fromkeys(given.one_pass)]
    found: list[Measured] = []
    lattices: list[oracle.Lattice] = []
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
        if not given.no_oracle:
            seeds = range(given.seed, given.seed + len(prompts))
            for t in dict.fromkeys(given.temperatures):
                texts = next(m.texts for m in found if m.setting.temperature == t)  # the first is coupled
                samplings = [Sampling(temperature=t, seed=seed, **sampling) for seed in seeds]
                said = partial(_said, f"oracle, T {t:g}")
                lattices.append(oracle.measure(model, prompts, texts, samplings, said))
    except InputError as error:
        fail(COMMAND, str(error))
    facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
    report.print_tables([table(found), *(t for of in lattices for t in oracle.tables(of))])
    line = f"{model.dtype}, {model.backend}, {machine_line(facts)}; {time.perf_counter() - began:.0f} s"
    print(line)
    if given.json:
        figures = {
            "machine": facts, "dtype": str(model.dtype).removeprefix("torch."), "backend": model.backend,
            "max_new_tokens": given.max_new_tokens, "settings": [m.to_dict() for m in found],
            "lattices": [of.to_dict() for of in lattices],
        }  # fmt: skip
        report.write_json(given.json, figures)
    if given.plot:
        on = f"{facts['gpu'] or 'CPU'}, {str(model.dtype).removeprefix('torch.')}, {facts['date']}"
        plot(given.plot, [m.to_dict() for m in found], f"{len(prompts)} prompts, {on}")
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
    sys.exit(run(COMMAND, main))
