"""vLLM on dummy weights at a Qwen3 shape, beside `bench.decode --batch` and `bench.serve`.

It runs in a process of its own, so that its memory goes away with it. A step's time is the difference of two
generations of other lengths over the difference of the lengths: starting and reading prompts is in neither.
In closed loops its engine is driven as that of `bench.serve` is by itself, without vLLM's HTTP server. The
process reads what to measure as JSON from stdin and prints a JSON line for each result."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from .serve_jobs import Seen
from .serve_loop import Turn, closed, steady_seconds

NAME = "vllm"
NOT_INSTALLED = "vLLM is not installed here: there are no figures of it"
SHORT, LONG, ROUNDS = 64, 192, 3  # new tokens of the two generations, and how often
LEFT_OPEN = 2.0  # seconds that stdout is read behind the end of the process
WARM = 8  # new tokens of a batch before closed loops
ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_USE_FLASHINFER_SAMPLER": "0"}  # fmt: skip
Row = dict[str, Any]
Generate = Callable[[Sequence[tuple[int, int]]], float]  # lengths of prompts and texts -> seconds


def installed() -> bool:
    """Whether vLLM can be imported."""
    return importlib.util.find_spec(NAME) is not None


def measured(
    spec: Row,
    seconds: float,
    command: Sequence[str] = (sys.executable, "-m", "bench.vllm_peer"),
    tell: Callable[[Row], object] = lambda row: None,
) -> tuple[list[Row], str]:
    """(rows, what went wrong or nothing) of a process that measures `spec`: config, of Hugging Face's kind;
    contexts and texts, all pairs of which are measured; jobs; loops, closed ones, if there are any. It ends
    after so many seconds, and what it has measured until then is returned. tell: what is done with each row
    when it comes."""
    rows, wrong = list[Row](), ""
    with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+") as err:
        asked.write(json.dumps(spec))
        asked.seek(0)
        process = subprocess.Popen(command, stdin=asked, stdout=subprocess.PIPE, stderr=err, text=True,
                                   cwd=ROOT, env=os.environ | ENVIRONMENT)  # fmt: skip
        try:
            for line in _lines(process, time.monotonic() + seconds):
                if line.startswith('{"peer"'):
                    rows.append(json.loads(line))
                    tell(rows[-1])
            code = process.wait()
            wrong = f"it ended with exit code {code}" if code else ""
        except queue.Empty:
            wrong = f"it was ended after {seconds:.0f} s"
        finally:
            process.kill()
            process.wait()
        err.seek(0)
        last = next((line.strip() for line in reversed(err.readlines()) if line.strip()), "")
    return rows, f"{wrong}: {last[:160]}" if wrong else ""


def _lines(process: subprocess.Popen[str], until: float) -> Iterator[str]:
    """What it writes to stdout until it ends, as it comes. Raises queue.Empty when time is up
    (time.monotonic)."""
    said = queue.SimpleQueue[str]()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.put(line)

    def end() -> None:
        process.wait()
        reader.join(LEFT_OPEN)  # a process that this one has left behind may hold its stdout
        said.put("")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    threading.Thread(target=end, daemon=True).start()
    while line := said.get(timeout=max(until - time.monotonic(), 0.0)):
        yield line


def steps(generate: Generate, texts: int, context: int) -> Row:
    """A step of so many texts behind prompts of `context` tokens: median of ROUNDS."""
    generate([(context, 8)] * texts)
    rounds = [
        (generate([(context, LONG)] * texts) - generate([(context, SHORT)] * texts)) / (LONG - SHORT)
        for _ in range(ROUNDS)
    ]
    step = median(rounds)
    return {"measure": "steady", "texts": texts, "context": context, "ms_per_cycle": round(1e3 * step, 4),
            "tokens_per_second": round(texts / step, 1)}  # fmt: skip


def whole(generate: Generate, texts: int, jobs: Sequence[tuple[int, int]]) -> Row:
    """All jobs, their prompts inside the clock, behind a first generation of two for each text."""
    generate(jobs[: 2 * texts])
    seconds, tokens = generate(jobs), sum(new for _, new in jobs)
    return {"measure": "jobs", "texts": texts, "jobs": len(jobs), "tokens": tokens,
            "seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds, 1)}  # fmt: skip


def closed_loop(
    engine: Any, asked: Sequence[tuple[list[int], Any]], clients: int, limit: float
) -> list[Seen]:
    """A closed loop of so many clients in an engine's `add_request` and `step`. asked: a job's prompt and its
    sampling parameters. limit: as in `serve_loop.closed`."""
    tokens = dict[str, int]()

    def submit(job: int) -> str:
        ids, parameters = asked[job]
        prompt = {"type": "token", "prompt_token_ids": ids}  # with its type the engine takes it as it is
        engine.add_request(name := f"{clients} {job}", prompt, parameters)
        return name

    def step() -> Iterator[tuple[str, bool]]:
        for output in engine.step():
            if count := len(output.outputs[0].token_ids):  # all that there are, those of the steps before too
                tokens[output.request_id] = count
                yield output.request_id, output.finished

    def seen(turn: Turn[str]) -> Seen:
        count, all_of_them = tokens[turn.text], asked[turn.job][1].max_tokens
        wrong = "" if count == all_of_them else f"it has {count} tokens of {all_of_them}"
        return turn.seen(count, error=wrong)

    return [seen(turn) for turn in closed(len(asked), clients, limit, submit, step)]


@dataclass
class Peer:
    """vLLM's offline class on dummy weights."""

    vllm: Any
    llm: Any
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    @staticmethod
    def of(vllm: Any, folder: str, most: int, texts: int) -> Peer:
        """most: tokens of a text with its prompt; texts: at once. folder: of config.json."""
        llm = vllm.LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=most + 64,
            gpu_memory_utilization=0.9, dtype="bfloat16", max_num_seqs=texts, enable_prefix_caching=False,
        )  # fmt: skip
        return Peer(vllm, llm)

    def asked(self, lengths: Sequence[tuple[int, int]]) -> list[tuple[list[int], Any]]:
        """Random prompts of these lengths, and the sampling parameters of greedy texts of these."""
        return [
            ([self.rng.randrange(1000, 150000) for _ in range(tokens)],
             self.vllm.SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False))
            for tokens, new in lengths
        ]  # fmt: skip

    def generate(self, lengths: Sequence[tuple[int, int]]) -> float:
        """Seconds of a batch of these."""
        prompts, parameters = zip(*self.asked(lengths), strict=True)
        began = time.perf_counter()
        self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], list(parameters), use_tqdm=False)
        return time.perf_counter() - began

    def loops(self, spec: Row) -> Iterator[Row]:
        """The closed loops of a spec, behind a short batch of the widest: of each the clients and the jobs,
        until: when all have to be done (time.monotonic), most: seconds that one is steady."""
        clients, jobs = spec["loops"][-1]
        self.generate([(tokens, WARM) for tokens, _ in jobs[:clients]])
        for i, (clients, jobs) in enumerate(spec["loops"]):
            limit = steady_seconds(spec["until"], len(spec["loops"]) - i, spec["most"])
            if limit > 0:
                seen = closed_loop(self.llm.llm_engine, self.asked(jobs), clients, limit)
                yield {"measure": "closed", "clients": clients, "seen": [asdict(s) for s in seen]}


def main() -> int:
    """Measure what stdin says."""
    spec = json.load(sys.stdin)
    import vllm

    loops = spec.get("loops", [])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(spec["config"]))
        contexts, in_loops = spec["contexts"], [job for _, jobs in loops for job in jobs]
        most = max(map(sum, [*spec["jobs"], *in_loops, *((context, LONG) for context in contexts)]))
        peer = Peer.of(vllm, folder, most, max(spec["texts"]))
        for context in contexts:
            for texts in spec["texts"]:
                say(steps(peer.generate, texts, context), vllm.__version__)
        if spec["jobs"]:
            say(whole(peer.generate, max(spec["texts"]), spec["jobs"]), vllm.__version__)
        for row in peer.loops(spec) if loops else ():
            say(row, vllm.__version__)
    return 0


def say(row: Row, version: str) -> None:
    """A result on a line of its own."""
    print(json.dumps({"peer": f"{NAME} {version}"} | row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
