"""`orthrus serve` as its clients see it: time to the first token, time per token, tokens/s, goodput.

The real server, its engine in a process of its own, on a loopback port. Clients are processes of their own,
which stream completions and whose cost is measured. Closed loops: each client sends its next request when its
last has ended. Open loops: requests come by themselves, a share of what the largest closed loop has done.
Beside a closed loop stands the same list of jobs through the same engine without a server, and vLLM's engine,
where that is installed, in such a loop. Rates of closed loops are of their steady part (serve_steady.py).
Every text runs to its full length. 8B and the other shapes have random weights, prompts of random words and a
seeded tokenizer; their drafts keep what a simulated drafter's would (strong.py), and their rows say
"simulated". Prompts of the embedded checkpoint are held-out ones, and its acceptance is its own."""

from __future__ import annotations

import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qwen3_model import InputError, Qwen3Config
from qwen3_model.checkpoint import EMBEDDED, tensor_names
from qwen3_model.decode.engine import MOST_SLOTS
from qwen3_model.prompts import read_prompts
from qwen3_model.text import Text

from . import batch, lengths, report, serve_report, serve_tokenizer, vllm_peer
from .command import Parser, fail, positive, run, writable
from .measure import machine, machine_line
from .models import NAMES, WHOLE
from .serve_engine import Loop, MeasuredEngine, encoded
from .serve_jobs import Job, Seen, arrivals, body, by_client, of_loop, random_jobs
from .serve_processes import PATIENCE, Clients, Lines, NoTime
from .serve_report import PLAIN, Bounds, Row

COMMAND = "bench.serve"
SHIPPED = Path(__file__).parent / "lengths"
SETTINGS = ("loads", "open", "lengths", "prompt_tokens", "new_tokens", "each", "row_seconds", "ttft_ms",
            "token_ms", "seed")  # fmt: skip
WAYS = {PLAIN: "autoregressive", "drafted": "auto"}  # strategies of requests
LOADS, SHARES, SECONDS, ROW_SECONDS = [1, 8, 32, 64], [50, 80], 480, 10
EACH, EACH_OF_LENGTHS, LEAST_EACH = 4, 8, 3  # requests of a client; of texts of one length, of several
PROMPT_TOKENS, NEW_TOKENS, FIRST_MS, TOKEN_MS = 1000, 256, 500, 25
CPU_PROMPT_TOKENS, CPU_NEW_TOKENS = 16, 8  # where a pass takes tens of milliseconds
SPARE = 128  # positions of a cache on a CPU, for each slot, besides those of the longest job
LEAST_SECONDS = 0.5  # that are left when a row is begun
PEER_SHARE = 0.3  # of a model's time: vLLM's, where that is installed
ARRIVING = 0.6  # of a row's time: requests are sent; the rest: the last ones end
NOT_STEADY = "no whole turn lies between every first request and the end: give --each more, or --seconds"
WARM_CHARACTERS, WARM_TOKENS = 64, 8  # of the requests before the first row


def parse(arguments: Sequence[str] | None) -> Any:
    parser = Parser(
        prog=f"python -m {COMMAND}", description=" ".join(str(__doc__).split("\n\n")[0].split()),
        epilog="example: python -m bench.serve --models embedded --loads 1 4 --seconds 20",
    )  # fmt: skip
    add = parser.add_argument
    add("--models", nargs="+", choices=[*WHOLE, "embedded"], metavar="MODEL",
        help=f"{NAMES}, embedded (default: 8B 1.7B embedded; without a GPU embedded)")  # fmt: skip
    add("--loads", nargs="+", type=positive, default=LOADS, metavar="CLIENTS",
        help="of closed loops; the largest is the number of slots (default: 1 8 32 64)")  # fmt: skip
    add("--open", nargs="*", type=positive, default=SHARES, metavar="PERCENT",
        help="of open loops: of the requests/s of the largest closed one (default: 50 80)")  # fmt: skip
    add("--lengths", metavar="FILE",
        help=f"CSV or JSON of prompt_tokens,new_tokens, or one of {', '.join(shipped())}; default: "
        f"{PROMPT_TOKENS},{NEW_TOKENS}, embedded: held-out prompts")  # fmt: skip
    add(
        "--prompt-tokens",
        type=positive,
        metavar="N",
        help=f"of a prompt, of embedded at most (default: {PROMPT_TOKENS}; on a CPU {CPU_PROMPT_TOKENS})",
    )
    add("--new-tokens", type=positive, metavar="N",
        help=f"of a text (default: {NEW_TOKENS}; on a CPU {CPU_NEW_TOKENS})")  # fmt: skip
    for name, value, metavar, says in (
        ("row-seconds", ROW_SECONDS, "S", "at most: of a closed loop's steady part, of arrivals"),
        ("seconds", SECONDS, "S", "of a model: rows get shorter to fit, and none is begun later"),
        ("ttft-ms", FIRST_MS, "MS", "goodput: time to the first token at most"),
        ("token-ms", TOKEN_MS, "MS", "goodput: time per token at most"),
    ):
        add(f"--{name}", type=positive, default=value, metavar=metavar, help=f"{says} (default: {value})")
    add("--each", type=positive, metavar="N", help="requests of a client of a closed loop, about, at least "
        f"{LEAST_EACH}: its first is outside of the steady part (default: {EACH}, with --lengths "
        f"{EACH_OF_LENGTHS})")  # fmt: skip
    add("--seed", type=int, default=0, help="of prompts and arrivals (default: 0)")
    add("--json", type=writable, metavar="FILE", help="write all figures to FILE")
    given = parser.parse_args(arguments)
    _check(parser, given)
    return given


def _check(parser: Parser, given: Any) -> None:
    """Fill in what is left open, and refuse what does not go together."""
    gpu = torch.cuda.is_available()
    given.models = list(dict.fromkeys(given.models or [*(["8B", "1.7B"] if gpu else []), "embedded"]))
    given.loads, given.open = sorted(set(given.loads)), sorted(set(given.open))
    if max(given.loads) > MOST_SLOTS:
        parser.error(f"--loads {max(given.loads)} is more than {MOST_SLOTS}")
    if given.lengths and (given.prompt_tokens or given.new_tokens):
        parser.error("--prompt-tokens and --new-tokens are of runs without --lengths")
    if not gpu and set(given.models) != {"embedded"}:
        parser.error("models of these shapes need a GPU, which is not here; --models embedded runs on a CPU")
    given.each = given.each or (EACH_OF_LENGTHS if given.lengths else EACH)
    if given.each < LEAST_EACH:
        parser.error(f"--each {given.each}: at least {LEAST_EACH}, so that a loop has a part in which every "
                     "client decodes and none for the first time")  # fmt: skip
    given.prompt_tokens = given.prompt_tokens or (PROMPT_TOKENS if gpu else CPU_PROMPT_TOKENS)
    given.new_tokens = given.new_tokens or (NEW_TOKENS if gpu else CPU_NEW_TOKENS)
    most, whose = batch.most_context(given.models)
    if (longest := given.prompt_tokens + given.new_tokens) > most:
        parser.error(f"--prompt-tokens and --new-tokens are {longest} together, and {whose} has {most}")


def shipped() -> list[str]:
    """Names of the distributions of lengths that come with the bench."""
    return sorted(path.stem for path in SHIPPED.glob("*.csv"))


def lengths_of(given: Any) -> list[lengths.Job] | None:
    """The lengths that are asked for. Raises InputError."""
    if given.lengths is None:
        return None
    path = SHIPPED / f"{given.lengths}.csv" if given.lengths in shipped() else Path(given.lengths)
    return lengths.read(path, *batch.most_context(given.models))


@dataclass
class Bench:
    """A run over models, and what it has measured."""

    given: Any
    sizes: list[lengths.Job] | None
    tokenizer: Path  # the folder of that of random weights
    rows: list[Row] = field(default_factory=list)
    peers: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: bool = False

    @property
    def bounds(self) -> Bounds:
        """Of goodput."""
        return Bounds(self.given.ttft_ms, self.given.token_ms)

    @property
    def wrong(self) -> bool:
        """Whether something failed or a text was not what it must be."""
        return self.failed or not all(map(serve_report.right, self.rows))

    def keep(self, row: Row) -> None:
        """Keep a row and say it."""
        self.rows.append(row)
        print(f"  {serve_report.progress(row)}", flush=True)

    def note(self, what: str, row: Row, errors: Iterable[str]) -> None:
        """Say of a row why requests failed, and that it has no steady part."""
        unsteady = row["loop"] == "closed" and row["steady_s"] is None
        said = [*filter(None, errors), *([NOT_STEADY] if unsteady else [])]
        self.notes += [f"{what}: {why}" for why in dict.fromkeys(said)]

    def to_json(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The whole run."""
        settings = {name: getattr(self.given, name) for name in SETTINGS}
        return {"machine": facts, "settings": settings, "simulated": batch.said(), "rows": self.rows,
                "peers": self.peers, "notes": self.notes}  # fmt: skip


def jobs_of(bench: Bench, name: str, config: Qwen3Config) -> list[Job]:
    """As many as the largest loop has."""
    given = bench.given
    count = max(of_loop(load, given.each) for load in given.loads)
    if name != "embedded":
        sizes = bench.sizes or [(given.prompt_tokens, given.new_tokens)]
        return random_jobs(serve_tokenizer.words(bench.tokenizer), sizes, count, given.seed)
    if bench.sizes:
        return random_jobs(range(config.vocab_size - 1), bench.sizes, count, given.seed)
    text = Text(EMBEDDED)
    texts = [
        text.decode(text.encode(prompt)[: given.prompt_tokens])
        for prompt in read_prompts(EMBEDDED / "held_out.jsonl", count, split="test")
    ]
    return [Job(texts[i % len(texts)], given.new_tokens) for i in range(count)]


@dataclass
class Served:
    """A model behind a server. until: when its rows have to be done. engine: what its engine has done by
    itself, by clients and way."""

    bench: Bench
    name: str
    jobs: list[Job]
    clients: Clients
    port: int
    until: float
    engine: dict[tuple[int, str], list[Seen]]

    def rows(self) -> None:
        """All of them."""
        given = self.bench.given
        self.warm()
        for load in given.loads:
            for way in WAYS:
                self.attempt(f"{load} clients", way, partial(self.closed, load, way))
        opened = [(percent, way) for percent in given.open for way in WAYS]
        for i, (percent, way) in enumerate(opened):
            work = partial(self.opened, percent / 100, way, len(opened) - i)
            self.attempt(f"{percent} % of saturation", way, work)

    def attempt(self, what: str, way: str, work: Callable[[], None]) -> None:
        """Measure a row, unless there is no time; a failure leaves a note."""
        what = f"{self.name}, {what}, {way}"
        if self.until - time.monotonic() < LEAST_SECONDS:
            self.bench.notes.append(f"{what}: no time left")
            return
        try:
            work()
        except InputError as error:
            self.bench.notes.append(f"{what}: {error}")
            self.bench.failed |= not isinstance(error, NoTime)

    def warm(self) -> None:
        """A short request of every client, before the first row."""
        short = [
            Job(job.prompt[:WARM_CHARACTERS], WARM_TOKENS) for job in self.jobs[: self.bench.given.loads[-1]]
        ]
        asked = [(i, [(i, body(job, WAYS[PLAIN], f"warm {i}"))]) for i, job in enumerate(short)]
        self.clients.loop(self._plan(), "clients", asked, self.until)

    def closed(self, load: int, way: str) -> None:
        """A row of so many clients, each with the jobs that it had when the engine decoded by itself."""
        alone, bounds = self.engine[load, way], self.bench.bounds
        engine = serve_report.of_closed(alone, bounds)
        if not alone or engine["seconds"] > self.until - time.monotonic():
            raise NoTime("no time left: give --seconds more")
        asked = [
            (client, [(i, body(self.jobs[i], WAYS[way], f"closed {load} {way} {i}")) for i in jobs])
            for client, jobs in by_client(alone).items()
        ]
        seen, core = self.clients.loop(self._plan(), "clients", asked, self.until)
        row = self._named(way, "closed") | {"clients": load, "share": None, "rate": None, "core": core}
        row |= serve_report.of_closed(seen, bounds)
        self.bench.note(f"{self.name}, {load} clients, {way}", row, (s.error for s in seen))
        self.bench.keep(serve_report.beside_engine(row, engine, seen, alone, self._same_text(way)))

    def opened(self, share: float, way: str, left: int) -> None:
        """A row of requests that come by themselves, as often as a share of what the largest closed loop has
        done. left: rows of the time that is left."""
        given = self.bench.given
        of = self.name, given.loads[-1], way
        most = [row["requests_per_second"] for row in self.bench.rows
                if (row["model"], row["clients"], row["way"]) == of]  # fmt: skip
        if not most or not most[0]:
            raise NoTime(f"no saturation is known: {given.loads[-1]} clients have no rate")
        row_seconds = (self.until - time.monotonic()) / left
        rate, seconds = share * most[0], min(ARRIVING * row_seconds, given.row_seconds)
        times = list(arrivals(rate, seconds, given.seed))
        asked = [
            (at, i, body(self.jobs[i % len(self.jobs)], WAYS[way], f"open {share} {way} {i}"))
            for i, at in enumerate(times)
        ]
        if not asked:
            raise NoTime(f"no request comes in {seconds:.1f} s: give --seconds more")
        seen, core = self.clients.loop(self._plan(), "arrivals", asked, self.until)
        row = self._named(way, "open") | {
            "clients": None,
            "share": share,
            "rate": round(rate, 4),
            "core": core,
        }
        row |= serve_report.of_open(seen, seconds, self.bench.bounds)
        self.bench.note(f"{self.name}, {share:.0%} of saturation, {way}", row, (s.error for s in seen))
        self.bench.keep(row | {"engine": None, "adds": None, "identical": None})

    def _plan(self) -> dict[str, Any]:
        return {"port": self.port, "patience": max(self.until - time.monotonic(), 0) + PATIENCE}

    def _same_text(self, way: str) -> bool:
        """Whether a job always has the same text: simulated walks go to texts as they come."""
        return self.name == "embedded" or way == PLAIN

    def _named(self, way: str, loop: str) -> Row:
        own = "its own" if self.name == "embedded" else f"simulated: {batch.CURVE}"
        return {"model": self.name, "way": way, "acceptance": "-" if way == PLAIN else own, "loop": loop}


def engine_of(bench: Bench, name: str, jobs: list[Job], until: float) -> MeasuredEngine:
    """The engine that a server of a model makes. until: when the model has to be done (time.monotonic)."""
    given = bench.given
    loops = tuple(Loop(load, strategy, given.each) for load in given.loads for strategy in WAYS.values())
    measured = {"loops": loops, "jobs": tuple(jobs), "until": until, "most": float(given.row_seconds)}
    slots = given.loads[-1]
    if name != "embedded":
        return MeasuredEngine(slots=slots, shape=name, tokenizer=bench.tokenizer, **measured)
    cache = None
    if not torch.cuda.is_available():  # attention without a GPU reads the whole cache, however full it is
        text = Text(EMBEDDED)
        cache = slots * (SPARE + max(len(encoded(text, job)) + job.new_tokens for job in jobs))
    return MeasuredEngine(str(EMBEDDED), slots=slots, cache_tokens=cache, tokenizer=EMBEDDED, **measured)


def one_model(bench: Bench, name: str, until: float) -> None:
    """A server of a model, and its rows until it has to be done (time.monotonic). Raises InputError where it
    does not come up."""
    embedded = name == "embedded"
    config = (Qwen3Config.from_folder(EMBEDDED, tensor_names(EMBEDDED)) if embedded
              else WHOLE[name].config())  # fmt: skip
    jobs = jobs_of(bench, name, config)
    ways = {strategy: way for way, strategy in WAYS.items()}
    with Clients.of(bench.given.loads[-1]) as clients, ExitStack() as keep:
        server = Lines("bench.serve_server", keep)
        waiting = len(jobs) + 4096  # an open loop never meets a full queue: it waits, and that is measured
        server.send(pickle.dumps((name, config, engine_of(bench, name, jobs, until), waiting)))
        alone = dict[tuple[int, str], list[Seen]]()
        while "port" not in (said := server.next(until)):
            loop, seen = Loop(**said["loop"]), [Seen(**one) for one in said["seen"]]
            alone[loop.clients, ways[loop.strategy]] = seen
            rate = serve_report.cell(serve_report.of_closed(seen, bench.bounds)[serve_report.RATE])
            told = f"{rate} tokens/s" if seen else "no time left"
            print(
                f"  {name}, the engine alone, {loop.clients} texts, {ways[loop.strategy]}: {told}", flush=True
            )
        Served(bench, name, jobs, clients, said["port"], until, alone).rows()


def peer(bench: Bench, name: str, until: float) -> None:
    """vLLM's engine at the same shape, in closed loops of the same lengths."""
    given, left = bench.given, until - time.monotonic()
    sizes = bench.sizes or [(given.prompt_tokens, given.new_tokens)]
    loops = [(load, [sizes[i % len(sizes)] for i in range(of_loop(load, given.each))])
             for load in given.loads]  # fmt: skip
    spec = {
        "config": batch.peer_config(name), "texts": given.loads, "contexts": [], "jobs": [],
        "loops": loops, "until": until, "most": given.row_seconds,
    }  # fmt: skip

    def tell(row: Row) -> None:
        bench.peers.append(made := serve_report.of_peer(row, name, bench.bounds))
        bench.note(f"{name}, {made['clients']} clients, vLLM", made, (s["error"] for s in row["seen"]))
        print(f"  {serve_report.progress(made)}", flush=True)

    _, wrong = vllm_peer.measured(spec, max(left, 1.0), tell=tell)
    if wrong:
        bench.notes.append(f"vLLM, {name}: {wrong}")


def measure(bench: Bench, facts: dict[str, Any]) -> None:
    """Every model; the file comes anew after each."""
    models = bench.given.models
    if not vllm_peer.installed():
        bench.notes.append(vllm_peer.NOT_INSTALLED)
    if set(models) != {"embedded"}:
        serve_tokenizer.write(bench.tokenizer, WHOLE["8B"].V)
    for name in models:
        peered, now = name != "embedded" and vllm_peer.installed(), time.monotonic()
        until = now + bench.given.seconds
        try:
            one_model(bench, name, until - PEER_SHARE * peered * bench.given.seconds)
            if peered:
                peer(bench, name, until)
        except InputError as error:
            bench.notes.append(f"{name}: {error}")
            bench.failed |= not isinstance(error, NoTime)
        if bench.given.json:
            report.write_json(bench.given.json, bench.to_json(facts))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    given, began = parse(arguments), time.monotonic()
    facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
    try:
        sizes = lengths_of(given)
    except InputError as error:
        fail(COMMAND, str(error))
    print(machine_line(facts), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given, sizes, Path(folder))
        measure(bench, facts)
    report.print_tables(serve_report.tables(bench.rows, bench.peers))
    print(*(f"note: {note}" for note in bench.notes), sep="\n")
    print(f"{machine_line(facts)}; {time.monotonic() - began:.0f} s")
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
