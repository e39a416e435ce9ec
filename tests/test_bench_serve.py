"""bench.serve without a GPU: what it asks for and when, what its clients see of a server, the engine's own
loops, rows and tables by hand; the picture and the page of a made-up run."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import math
import pickle
import statistics
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import pytest
from interpreter import DEVICE
from serving import ScriptedEngine, Serving
from small import small_model
from test_pictures import attributes
from tiny_folder import write_tiny

from bench import (
    lengths,
    lengths_made,
    serve,
    serve_client,
    serve_engine,
    serve_report,
    serve_tokenizer,
    vllm_peer,
)
from bench.serve_client import read_answer
from bench.serve_engine import Loop, MeasuredEngine
from bench.serve_jobs import Job, Seen, arrivals, body, by_client, of_loop, random_jobs
from bench.serve_loop import closed, steady_seconds
from bench.serve_report import Bounds
from bench.serve_steady import Steady
from qwen3_model import Qwen3
from qwen3_model.openai.served import Served
from qwen3_model.serve.limits import Limits
from qwen3_model.text import Text
from tools.docs import performance, pictures
from tools.docs import serve as drawing

gpu_free = pytest.mark.skipif(DEVICE != "cpu", reason="what is said where there is no GPU")
BOUNDS = Bounds(first=100, token=11)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("bench") / "tiny")


def test_percentiles():
    assert [serve_report.percentile([3, 1, 2], share) for share in (0, 0.25, 0.5, 1)] == [1, 1.5, 2, 3]
    assert serve_report.percentile([7], 0.99) == 7
    assert serve_report.percentile(range(101), 0.99) == pytest.approx(99)


def test_arrivals_are_seeded_and_do_not_wait_for_each_other():
    """As many as the rate says, and between two of them times that are exponentially distributed: their mean
    is their deviation."""
    times = list(arrivals(50, 100, seed=3))
    assert times == list(arrivals(50, 100, seed=3)) != list(arrivals(50, 100, seed=4))
    assert times == sorted(times) and times[0] > 0 and times[-1] < 100
    assert len(times) == pytest.approx(5000, rel=0.05)
    between = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert statistics.mean(between) == pytest.approx(0.02, rel=0.05)
    assert statistics.stdev(between) == pytest.approx(0.02, rel=0.05)


def test_jobs_of_a_loop():
    assert by_client(SEEN[::-1]) == {0: [0, 2, 5, 7], 1: [1, 3, 4, 6]} and by_client([]) == {}
    assert [of_loop(clients, 3) for clients in (1, 3, 64)] == [8, 9, 192]


@pytest.mark.parametrize("name", lengths_made.MADE)
def test_shipped_lengths_are_those_that_were_made(name):
    """And fit the shortest context of the models."""
    path = lengths_made.FOLDER / f"{name}.csv"
    assert path.read_text() == lengths_made.written(name) and name in serve.shipped()
    assert len(lengths.read(path, 4096, "embedded")) == lengths_made.COUNT


def test_the_tokenizer_writes_every_id_and_a_word_is_a_token(tmp_path):
    serve_tokenizer.write(tmp_path, 3000)
    text, words = Text(tmp_path), serve_tokenizer.words(tmp_path)
    assert all(text.decode([token]) and text.is_visible(token) for token in range(3000))
    assert not text.is_visible(3000)
    jobs = random_jobs(words, [(50, 2), (7, 1)], 3, seed=1)
    assert [(len(text.encode(job.prompt)), job.new_tokens) for job in jobs] == [(50, 2), (7, 1), (50, 2)]
    assert jobs[0].prompt != jobs[2].prompt and jobs == random_jobs(words, [(50, 2), (7, 1)], 3, seed=1)
    assert text.decode(text.encode("é 日 x")) == "é 日 x"
    assert serve_tokenizer.entries(400, 1) == serve_tokenizer.entries(400, 1) != serve_tokenizer.entries(400)


SEEN = [  # of two clients: steady from 2 s on, until the second one has ended its third request
    Seen(0, 0, 0, 0.0, 0.5, 1.0, 11, "a"), Seen(1, 1, 0, 0.0, 1.0, 2.0, 11, "b"),
    Seen(2, 0, 1, 1.0, 1.5, 2.5, 11, "c"), Seen(3, 1, 1, 2.0, 2.05, 2.15, 11, "d"),
    Seen(4, 1, 2, 2.2, 2.4, 2.5, 11, "e"), Seen(5, 0, 2, 2.5, 2.55, 3.55, 11, "f"),
    Seen(6, 1, 3, 2.5, 2.51, 4.0, 0, "", "it broke"), Seen(7, 0, 3, 3.6, 3.65, 4.65, 11, "g"),
]  # fmt: skip


def test_the_steady_part_of_a_loop():
    """Whole turns of the client whose first request ended last, until a client has no more."""
    steady = Steady.of(SEEN)
    assert steady == Steady(2.0, 4.0) and steady.seconds == 2.0
    assert [steady.holds(at) for at in (2.0, 2.01, 4.0, 4.01)] == [False, True, True, False]
    assert [round(steady.tokens(s), 6) for s in SEEN] == [0, 0, 5, 11, 11, 11, 0, 4.5]
    at_once = Seen(0, 0, 1, 1.0, 2.5, 2.5, 3, "")
    assert steady.tokens(at_once) == 3 and Steady(2.5, 4.0).tokens(at_once) == 0
    alone = [s for s in SEEN if not s.client]
    assert Steady.of(alone) == Steady(1.0, 4.65), "a client alone: all but its first request"
    assert Steady.of(alone[:1]) is Steady.of([]) is None
    in_step = [Seen(0, client, turn, 0.0, 0.0, 1.0 + turn + client / 2, 1, "")
               for client in (0, 1) for turn in range(4)]  # fmt: skip
    assert Steady.of(in_step) == Steady(1.5, 3.5), "whole turns of the last client, not until 4 s"
    late = [*alone[:3], replace(SEEN[1], ended=3.6)]
    assert Steady.of(late) is None, "a client was done before the other's first request had ended"
    row = serve_report.of_closed(late, BOUNDS)
    assert row["tokens_per_second"] is row["requests_per_second"] is row["steady_s"] is row["goodput"] is None
    assert (row["tokens"], row["seconds"], row["counted"]) == (44, 3.6, 0)


def test_what_a_loop_came_to():
    """Rates are of the steady part. The requests that ended there count, but a client's first: one is within
    both bounds, one is late and slow, one late, one slow, and one broke."""
    row = serve_report.of_closed(SEEN, BOUNDS)
    assert (row["requests"], row["errors"], row["tokens"], row["seconds"]) == (8, 1, 77, 4.65)
    assert (row["steady_s"], row["tokens_per_second"]) == (2.0, 21.25)
    assert row["requests_per_second"] == pytest.approx(42.5 / 11 / 2, abs=1e-4)
    assert (row["counted"], row["goodput"]) == (5, 0.2)
    assert row["ttft_ms"] == {"p50": 125.0, "p99": 491.0} and row["token_ms"] == {"p50": 55.0, "p99": 100.0}
    opened = serve_report.of_open(SEEN, 16.0, BOUNDS)
    assert opened["counted"] == 0 and opened["goodput"] is None and opened["ttft_ms"] is None
    assert serve_report.of_open(SEEN, 8.0, BOUNDS)["counted"] == 5
    assert (opened["tokens_per_second"], opened["steady_s"]) == (round(77 / 4.65, 2), None)


WHOLE = [s for s in SEEN if not s.error]


def test_what_a_server_adds_is_told_of_the_same_jobs():
    half = {name: lambda s, name=name: getattr(s, name) / 2 for name in ("sent", "first", "ended")}
    alone = [replace(s, **{name: of(s) for name, of in half.items()}) for s in WHOLE]
    row, engine = serve_report.of_closed(WHOLE, BOUNDS), serve_report.of_closed(alone, BOUNDS)
    made = serve_report.beside_engine(row, engine, WHOLE, alone, same_text=True)
    assert made["adds"] == pytest.approx(1.0, abs=0.001) and made["identical"] == "7/7"
    assert serve_report.right(made)
    alone[3] = replace(alone[3], digest="other")
    made = serve_report.beside_engine(row, engine, WHOLE, alone, same_text=True)
    assert made["identical"] == "6/7" and not serve_report.right(made)
    made = serve_report.beside_engine(row, engine, WHOLE, alone, same_text=False)
    assert made["identical"] is None and serve_report.right(made)
    made = serve_report.beside_engine(row, engine, WHOLE, alone[:3], False)
    assert made["adds"] is None and made["identical"] is None
    unsteady = row | {"tokens_per_second": None}
    for ours, theirs in ((row, unsteady), (unsteady, row)):
        made = serve_report.beside_engine(ours, theirs, WHOLE, WHOLE, True)
        assert made["adds"] is None and made["identical"] == "7/7"
    broken = serve_report.of_closed(SEEN, BOUNDS)
    assert serve_report.beside_engine(broken, engine, SEEN, SEEN, True)["adds"] is None
    assert not serve_report.right(broken)


class Steps:
    """A batch in which every text gets a token a step; a text is its number."""

    def __init__(self, lengths):
        self.lengths, self.got, self.order = lengths, {}, []

    def submit(self, job):
        self.order.append(job)
        self.got[job] = 0
        return job

    def step(self):
        time.sleep(1e-3)
        for job in [job for job, got in self.got.items() if got < self.lengths[job]]:
            self.got[job] += 1
            yield job, self.got[job] == self.lengths[job]


def of_steps(lengths):
    steps = Steps(lengths)
    return steps.submit, steps.step


def test_a_client_takes_the_next_job_of_the_list():
    """Lengths that differ leave no client without work while there are jobs."""
    steps = Steps([6, 2, 2, 2, 2, 2])
    turns = closed(6, 2, math.inf, steps.submit, steps.step)
    assert steps.order == [0, 1, 2, 3, 4, 5]
    seen = [turn.seen(steps.lengths[turn.job]) for turn in turns]
    assert by_client(seen) == {0: [0, 4], 1: [1, 2, 3, 5]}
    assert all(0 <= s.sent < s.first <= s.ended for s in seen) and all(s.turn < 4 for s in seen)
    mine = sorted((s for s in seen if s.client == 1), key=lambda s: s.turn)
    assert all(a.ended <= b.sent for a, b in zip(mine, mine[1:], strict=False))
    assert [s.first < s.ended for s in mine] == [True] * len(mine)


def test_a_list_is_cut_when_it_has_been_steady_for_long_enough():
    """The time runs from the end of the last first text: before it nobody stops."""
    steps = Steps([9] + [2] * 50)
    done = closed(51, 2, 0.0, steps.submit, steps.step)
    assert len(done) == 6 and [turn.job for turn in done][-1] in (0, 5), "nobody begins behind the first text"
    assert Steady.of([turn.seen(1) for turn in closed(9, 3, 9.0, *of_steps([2] * 9))])
    now = time.monotonic()
    assert steady_seconds(now + 8, 2, 9.0) == pytest.approx(2.0, abs=0.1)
    assert steady_seconds(now + 800, 2, 9.0) == 9.0 and steady_seconds(now - 1, 1, 9.0) < 0


def chunked(*events: str) -> bytes:
    pieces = [f"data: {event}\n\n".encode() for event in events]
    return b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces) + b"0\r\n\r\n"


def test_an_answer_is_whole_or_an_error():
    text = ['{"choices": [{"text": "a\\n\\n"}]}', '{"choices": [{"text": "é"}, {"text": ""}]}']
    usage = '{"choices": [], "usage": {"completion_tokens": 9}}'
    assert read_answer(200, chunked(*text, usage, "[DONE]")) == (9, "a\n\né")
    with pytest.raises(ValueError, match="the stream ended with .*broke"):
        read_answer(200, chunked(*text, '{"error": {"message": "it broke"}}'))
    with pytest.raises(ValueError, match="status 429: .*come again"):
        read_answer(429, b'{"error": "come again"}')
    with pytest.raises(ValueError):
        read_answer(200, chunked(*text, usage, "[DONE]")[:-9])


def scripted(text):
    """Three runs: a token, all but the last one, the last one."""
    tokens = [40 + i for i in range(text.request.max_new_tokens)]
    assert text.request.min_tokens == len(tokens) and text.request.temperature == 0
    for run in (tokens[:1], tokens[1:-1], tokens[-1:]):
        text.run(run)
    text.end("length")


def test_clients_see_what_a_server_sends(tiny, monkeypatch):
    """Over HTTP, the app and its guard; a client's next request comes when its last has ended. A connection
    that has long been idle is not used again: the server may be closing it."""
    model = Qwen3.from_pretrained(tiny, device="cpu", progress=False)
    served = Served("tiny", model.config, model.text)
    jobs = [Job("def f(", 5), Job([3, 4], 4), Job("x" * 5000, 4)]

    async def engine():
        return ScriptedEngine(2, scripted)

    with Serving(served, engine, Limits(), None) as serving:

        def plan(**more):
            return {"port": serving.port, "begin": time.monotonic(), "patience": 20} | more

        def asked(i):
            return i, body(jobs[i], "auto", f"salt {i}")

        loop = plan(clients=[(4, [asked(0), asked(1)]), (7, [asked(2)])])
        first, long, second = sorted((a.seen(loop["begin"]) for a in asyncio.run(serve_client.closed(loop))),
                                     key=lambda s: (s.turn, s.job))  # fmt: skip
        monkeypatch.setattr(serve_client, "IDLE_SECONDS", 0.01)
        opens, opened_again = asyncio.open_connection, list[int]()

        def counted(host, port, **more):
            opened_again.append(port)
            return opens(host, port, **more)

        monkeypatch.setattr(asyncio, "open_connection", counted)
        later = plan(arrivals=[(0.0, *asked(0)), (0.3, *asked(1)), (0.6, *asked(1))])
        opened = [a.seen(later["begin"]) for a in asyncio.run(serve_client.open_loop(later))]
    assert first.digest == digest(model.text.decode(range(40, 45))) and first.tokens == 5
    assert 0 <= first.sent < first.first <= first.ended <= second.sent and second.tokens == 4
    assert "status 400" in long.error and "context" in long.error and long.tokens == 0
    assert [s.sent for s in opened] == pytest.approx([0, 0.3, 0.6], abs=1e-4)
    assert [(s.tokens, s.error) for s in opened] == [(5, ""), (4, ""), (4, "")]
    assert len(opened_again) == 3
    assert opened[1].digest == opened[2].digest == second.digest
    assert [(s.client, s.turn) for s in (first, long, second)] == [(4, 0), (7, 0), (4, 1)]
    gone = plan(arrivals=[(0.0, *asked(0))])
    assert "ConnectionRefused" in asyncio.run(serve_client.open_loop(gone))[0].seen(0).error


def test_the_engine_alone_decodes_the_loops_of_its_clients(tiny, capsys):
    """A client's next text begins when its last has ended, and texts are those of `generate`."""
    jobs = tuple(Job(prompt, new) for prompt, new in ((f"def f{i}(", 3 + i % 3) for i in range(8)))
    loops = Loop(2, "autoregressive", 4), Loop(1, "autoregressive", 1)
    options = MeasuredEngine(str(tiny), "cpu", slots=2, cache_tokens=512, tokenizer=tiny, loops=loops,
                             jobs=jobs, until=time.monotonic() + 300, most=60.0)  # fmt: skip
    assert pickle.loads(pickle.dumps(options)) == options
    model, engine = options.made()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Loop(**line["loop"]) for line in lines] == list(loops) and model.text is None
    seen = sorted((Seen(**one) for one in lines[0]["seen"]), key=lambda s: s.job)
    assert [s.job for s in seen] == list(range(8)) and [s.turn for s in seen][:4] == [0, 0, 1, 1]
    text = Text(tiny)
    for job, s in zip(jobs, seen, strict=True):
        request = {"max_new_tokens": job.new_tokens, "min_tokens": job.new_tokens, "seed": 0}
        ids = model.generate(text.encode(job.prompt), "autoregressive", **request).token_ids
        assert (s.tokens, s.digest) == (job.new_tokens, digest(text.decode(ids))), s
        assert 0 <= s.sent < s.first <= s.ended
    assert set(by_client(seen)) == {0, 1} and sorted(sum(by_client(seen).values(), [])) == list(range(8))
    asked = [(text.encode(job.prompt), job.new_tokens) for job in jobs]
    assert len(serve_engine.decode(engine, asked, loops[0], 0.0)) < 8, "no time behind the first texts"


@gpu_free
def test_random_weights_have_simulated_acceptance(monkeypatch, tmp_path, capsys):
    small = small_model("float32", backend="triton", num_hidden_layers=1, block_size=4, eos_token_ids=(),
                        num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    serve_tokenizer.write(tmp_path, 256)
    monkeypatch.setattr(serve_engine, "random_model", lambda name: small)
    monkeypatch.setattr(serve_engine, "SIMULATED_TEXTS", 2)
    monkeypatch.setattr(type(small), "positions_that_fit", lambda model, most: 256)
    jobs, until = (Job([5, 6], 6), Job([7], 6)), time.monotonic() + 300
    options = MeasuredEngine(slots=2, shape="8B", tokenizer=tmp_path, loops=(Loop(2, "auto", 1),), jobs=jobs,
                             until=until, most=9.0)  # fmt: skip
    _, engine = options.made()
    (line,) = capsys.readouterr().out.splitlines()
    assert [(s["tokens"], s["job"]) for s in json.loads(line)["seen"]] == [(6, 0), (6, 1)]
    assert isinstance(engine.runner.cycles.walks, serve_engine.Forced)


def row(**more):
    made = {
        "model": "8B", "way": "plain", "acceptance": "-", "loop": "closed", "clients": 8, "share": None,
        "rate": None, "core": 0.1, "requests": 24, "errors": 0, "tokens": 2400, "seconds": 4.0,
        "steady_s": 2.5, "tokens_per_second": 600.0, "requests_per_second": 6.0, "counted": 16,
        "ttft_ms": {"p50": 100.0, "p99": 400.0}, "token_ms": {"p50": 12.0, "p99": 14.0}, "goodput": 0.75,
        "engine": {"tokens_per_second": 618.0}, "adds": 0.03, "identical": "24/24",
    }  # fmt: skip
    return made | more


SIMULATED = {"way": "drafted", "acceptance": "simulated: a curve", "identical": None}
RUN = {
    "machine": {"gpu": "H0", "torch": "2", "triton": "3", "date": "2026-11-29", "commit": "abc",
                "command": "python -m bench --json made.json"},  # fmt: skip
    "settings": {"lengths": None, "prompt_tokens": 1000, "new_tokens": 256, "ttft_ms": 500, "token_ms": 25},
    "rows": [
        row(), row(**SIMULATED, tokens_per_second=1500.0), row(clients=64, tokens_per_second=3000.0),
        row(loop="open", clients=None, share=0.5, rate=3.0, engine=None, adds=None, identical=None),
        row(model="1.7B", ttft_ms=None, token_ms=None, goodput=None, engine=None, adds=None),
    ],
    "peers": [row(way="vLLM", peer="vllm 1", clients=64, tokens_per_second=2700.0, core=None, engine=None,
                  adds=None, identical=None, ttft_ms={"p50": 90.0, "p99": 95.0})],
}  # fmt: skip


def test_every_line_says_what_the_acceptance_is():
    found = serve_report.tables(RUN["rows"], RUN["peers"])
    assert [title.split(",")[0] for title, _, _ in found] == ["8B", "8B", "1.7B"]
    for _, head, lines in found:
        assert all(len(line) == len(head) for line in lines)
    _, head, lines = found[0]
    cells = [dict(zip(head, line, strict=True)) for line in lines]
    assert [c["way"] for c in cells] == ["plain", "drafted", "plain", "vLLM"]
    assert [c["acceptance"] for c in cells] == ["-", "simulated: a curve", "-", "-"]
    assert [c["over plain"] for c in cells] == ["1.00x", "2.50x", "1.00x", "0.90x"]
    assert [c["tokens/s"] for c in cells] == ["600", "1500", "3000", "2700"]
    assert (cells[3]["TTFT p50 ms"], cells[3]["ms/token p99"]) == ("90.0", "14.0")
    assert cells[0]["server adds"] == "3.0%" and cells[3]["client core"] == cells[3]["engine alone"] == "-"
    assert "vLLM: its engine in process, without its HTTP server" in found[0][0]
    assert not any("vLLM" in title for title, _, _ in found[1:])
    assert "simulated" in serve_report.progress(RUN["rows"][1])
    assert "64 clients, vLLM" in serve_report.progress(RUN["peers"][0])
    empty = row(tokens_per_second=None, requests_per_second=None, steady_s=None, ttft_ms=None, adds=None)
    ((_, head, (line,)),) = serve_report.tables([empty], [])
    cells = dict(zip(head, line, strict=True))
    assert cells["tokens/s"] == cells["over plain"] == cells["steady s"] == cells["requests/s"] == "-"
    assert "8 clients, plain (-): 24 requests, - tokens/s" in serve_report.progress(empty)
    assert "50% of saturation" in serve_report.progress(RUN["rows"][3])


def test_the_picture_shows_what_was_recorded(tmp_path, monkeypatch):
    svg = drawing.drawn([RUN])
    points = attributes(svg, "data-rate")
    found = {(p["data-line"], p["data-texts"], float(p["data-rate"])) for p in points}
    assert found == {
        ("plain", "8", 600.0), ("plain", "64", 3000.0), ("drafted", "8", 1500.0),
        (drawing.VLLM, "64", 2700.0), (drawing.VLLM, "64", 90.0),
        ("plain", "8", 100.0), ("plain", "64", 100.0), ("drafted", "8", 100.0),
    }  # fmt: skip
    heights = {float(p["data-rate"]): float(p["y"]) for p in points if p["data-texts"] == "64"}
    assert heights[3000.0] < heights[2700.0], "further up is more"
    assert "vLLM" not in drawing.drawn([RUN | {"peers": []}])
    with pytest.raises(ValueError, match="no rows of closed loops"):
        drawing.drawn([RUN | {"rows": RUN["rows"][3:4], "peers": []}])
    (tmp_path / "run").write_text(json.dumps(RUN))
    monkeypatch.setattr(pictures, "SERVE_RUNS", [tmp_path / "run"])
    assert pictures.drawn()[pictures.SERVE] == svg


def test_the_page_has_the_section():
    run, peers = (json.loads(path.read_text()) for path in (performance.RUN, performance.PEERS))
    many = performance.read(performance.BATCH_RUNS)
    made = performance.rewritten("<!-- serve -->\n\n<!-- end -->\n", run, peers, many, [RUN])
    assert performance.rewritten(made, run, peers, many, [RUN]) == made
    assert "## Served over HTTP" in made and "(serve.svg)" in made and "simulated" in made
    assert "| 8 | drafted | 1500 | 2.50x | 3.0% | 6.00 | 100 | 400 | 12.0 | 14.0 | 75.0% |" in made
    assert "| 64 | vLLM | 2700 | 0.90x | - | 6.00 | 90.0 | 95.0 | 12.0 | 14.0 | 75.0% |" in made
    assert "| 50% | plain | 3.00 | 600 | 100 | 400 | 12.0 | 14.0 | 75.0% |" in made
    assert "prompts of 1,000 tokens" in made and "vllm 1" in made


class FakeVllm:
    """The module: an engine whose texts get a token a step, with all that there are in each output. A text
    behind 999 tokens ends a token early."""

    __version__ = "9"

    class SamplingParams(SimpleNamespace):
        """As given."""

    def __init__(self):
        self.generated, self.asked, self.running, self.most = [], [], {}, 0

    def LLM(self, **options):  # noqa: N802
        assert options["max_num_seqs"] == 2 and options["max_model_len"] > 24
        assert options["skip_tokenizer_init"] and not options["enable_prefix_caching"]
        return SimpleNamespace(
            llm_engine=self,
            generate=lambda prompts, parameters, use_tqdm: self.generated.append(
                [len(prompt["prompt_token_ids"]) for prompt in prompts]
            ),
        )

    def add_request(self, name, prompt, parameters):
        assert isinstance(name, str) and prompt["type"] == "token" and parameters.ignore_eos
        assert parameters.temperature == 0 and not parameters.detokenize
        self.asked.append((len(prompt["prompt_token_ids"]), parameters.max_tokens))
        self.running[name] = [], parameters.max_tokens - (self.asked[-1][0] == 999)

    def step(self):
        time.sleep(1e-3)
        self.most = max(self.most, len(self.running))
        found = []
        for name, (tokens, most) in list(self.running.items()):
            tokens.append(5)
            if ended := len(tokens) == most:
                del self.running[name]
            found.append(
                SimpleNamespace(
                    request_id=name, finished=ended, outputs=[SimpleNamespace(token_ids=list(tokens))]
                )
            )
        return found


@pytest.fixture
def vllm(monkeypatch):
    fake = FakeVllm()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return fake


def told_by_peer(monkeypatch, capsys, loops, until):
    spec = {"config": {}, "texts": [1, 2], "contexts": [], "jobs": [], "loops": loops, "most": 9.0,
            "until": time.monotonic() + until}  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(spec)))
    assert vllm_peer.main() == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_peer_decodes_the_same_closed_loops(vllm, monkeypatch, capsys):
    """Its rows are made as ours are: its clients send their next request when the last has ended."""
    jobs = [(20, 4), (30, 4), (999, 4), (20, 4), (30, 4), (20, 4)]
    one, two = told_by_peer(monkeypatch, capsys, [(1, jobs[:2]), (2, jobs)], 60)
    assert vllm.generated == [[20, 30]] and vllm.most == 2 and vllm.asked == jobs[:2] + jobs
    made = serve_report.of_peer(one, "8B", BOUNDS)
    assert (made["model"], made["way"], made["clients"], made["peer"]) == ("8B", "vLLM", 1, "vllm 9")
    (first, second) = (Seen(**s) for s in one["seen"])
    assert (first.turn, second.turn, second.tokens) == (0, 1, 4) and first.ended <= second.sent < second.first
    assert made["tokens_per_second"] == pytest.approx(4 / (second.ended - first.ended), rel=0.01)
    assert made["ttft_ms"]["p50"] == pytest.approx(1e3 * (second.first - second.sent), abs=0.01)
    errors = [s["error"] for s in two["seen"] if s["error"]]
    assert errors == ["it has 3 tokens of 4"] and serve_report.of_peer(two, "8B", BOUNDS)["errors"] == 1
    assert told_by_peer(monkeypatch, capsys, [(2, jobs[:2])], -1) == [], "no time"


def test_a_peers_rows_are_told_as_they_come(tmp_path, monkeypatch, capsys):
    """And a process that it leaves behind, with its stdout, holds nobody up."""
    seen = [asdict(s) for s in SEEN]
    lines = [json.dumps({"peer": "vllm 1", "measure": "closed", "clients": n, "seen": seen}) for n in (1, 2)]
    script = tmp_path / "peer.py"
    script.write_text(
        "import json, subprocess, sys, time\nspec = json.load(sys.stdin)\nassert spec['most'] == 7\n"
        "assert [(clients, jobs[-1]) for clients, jobs in spec['loops']] == [(1, [5, 3]), (2, [5, 3])]\n"
        f"print({lines[0]!r}, flush=True)\ntime.sleep(0.5)\nprint({lines[1]!r}, flush=True)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(20)'])\n"
    )
    monkeypatch.setattr(vllm_peer, "LEFT_OPEN", 0.2)
    measured, came = vllm_peer.measured, list[float]()

    def of_script(spec, seconds, tell):
        return measured(
            spec,
            seconds,
            [sys.executable, str(script)],
            lambda row: (came.append(time.monotonic()), tell(row)),
        )

    monkeypatch.setattr(vllm_peer, "measured", of_script)
    given = SimpleNamespace(prompt_tokens=5, new_tokens=3, loads=[1, 2], each=3, row_seconds=7, ttft_ms=100,
                            token_ms=11)  # fmt: skip
    bench = serve.Bench(given, None, tmp_path)
    began = time.monotonic()
    serve.peer(bench, "8B", began + 60)
    assert time.monotonic() - began < 15 and came[1] - came[0] > 0.3
    assert bench.notes == [f"8B, {n} clients, vLLM: it broke" for n in (1, 2)] and not bench.failed
    assert [(p["clients"], p["tokens_per_second"]) for p in bench.peers] == [(1, 21.25), (2, 21.25)]
    assert "8B, 2 clients, vLLM (-): 8 requests, 21.2 tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize("installed", [True, False])
def test_a_models_time_has_a_part_for_vllm(installed, monkeypatch, tmp_path):
    """Where it is installed; each model has a time of its own."""
    models, peers = [], []
    monkeypatch.setattr(vllm_peer, "installed", lambda: installed)
    monkeypatch.setattr(serve.serve_tokenizer, "write", lambda *_: None)
    monkeypatch.setattr(serve, "one_model", lambda bench, *of: models.append(of))
    monkeypatch.setattr(serve, "peer", lambda bench, *of: peers.append(of))
    given = SimpleNamespace(models=["8B", "embedded"], seconds=100, json=None)
    began = time.monotonic()
    serve.measure(serve.Bench(given, None, tmp_path), {})
    left = {name: round(until - began) for name, until in models}
    assert left == {"8B": 70 if installed else 100, "embedded": 100}
    assert [(name, round(until - began)) for name, until in peers] == ([("8B", 100)] if installed else [])


def test_a_served_loop_is_its_engines(tmp_path):
    """Each client has the jobs that it had there. A loop that takes longer than there is time is not
    begun."""
    asked, seen = [], list(WHOLE)

    class Answers:
        def loop(self, plan, kind, clients, until):
            asked.append({client: [(i, body["prompt"]) for i, body in jobs] for client, jobs in clients})
            return seen, 0.1

    given = SimpleNamespace(loads=[2], open=[], ttft_ms=100, token_ms=11)
    jobs = [Job(f"p{i}", 11) for i in range(8)]
    alone = {(2, "plain"): WHOLE, (2, "drafted"): []}
    bench = serve.Bench(given, None, tmp_path)
    served = serve.Served(bench, "embedded", jobs, Answers(), 1, time.monotonic() + 60, alone)
    served.closed(2, "plain")
    assert asked == [{0: [(i, f"p{i}") for i in (0, 2, 5, 7)], 1: [(i, f"p{i}") for i in (1, 3, 4)]}]
    (made,) = bench.rows
    assert made["identical"] == "7/7" and made["adds"] == 0.0 and made["steady_s"] is not None
    served.attempt("2 clients", "drafted", partial(served.closed, 2, "drafted"))
    served.until = time.monotonic() + 3
    served.attempt("2 clients", "plain", partial(served.closed, 2, "plain"))
    said = "no time left: give --seconds more"
    assert bench.notes == [f"embedded, 2 clients, {way}: {said}" for way in ("drafted", "plain")]
    assert len(asked) == 1 and not bench.failed
    seen[1] = replace(seen[1], ended=9.0)
    served.until += 60
    served.closed(2, "plain")
    assert bench.rows[1]["adds"] is bench.rows[1]["steady_s"] is None and bench.rows[1]["identical"] == "7/7"
    assert bench.notes[2:] == [f"embedded, 2 clients, plain: {serve.NOT_STEADY}"]


@gpu_free
@pytest.mark.parametrize(
    "words, said",
    [
        ("--models 8B", "need a GPU"), ("--loads 300", "more than 256"), ("--loads 0", "whole number"),
        ("--lengths code --new-tokens 9", "without --lengths"), ("--lengths nowhere.csv", "cannot be read"),
        ("--new-tokens 4090", "embedded of --models has 4096"), ("--models 9B", "invalid choice"),
        ("--each 2", "--each 2: at least 3"),
    ],
)  # fmt: skip
def test_options(words, said, refused, monkeypatch):
    monkeypatch.setattr(serve, "machine", lambda command: {})
    monkeypatch.setattr(serve, "machine_line", lambda facts: "")
    assert said in refused(serve.main, *words.split())


@gpu_free
@pytest.mark.slow
def test_a_whole_run(tmp_path, capsys):
    """Processes and all, on a CPU: every row is there, texts are the engine's own, and the file draws."""
    out = tmp_path / "s.json"
    words = "--models embedded --loads 1 2 --each 3 --prompt-tokens 8 --new-tokens 3 --seconds 150"
    assert serve.main([*words.split(), "--json", str(out)]) == 0
    run = json.loads(out.read_text())
    assert [(r["loop"], r["clients"] or r["share"], r["way"]) for r in run["rows"]] == [
        *(("closed", clients, way) for clients in (1, 2) for way in serve.WAYS),
        *(("open", share, way) for share in (0.5, 0.8) for way in serve.WAYS),
    ]
    for made in run["rows"]:
        assert made["errors"] == 0 and made["requests"] and math.isfinite(made["tokens_per_second"])
        assert (made["identical"] is None) == (made["loop"] == "open")
    assert "svg" in drawing.drawn([run]) and "| 50% |" in drawing.section([run], performance.markdown)
    assert "server adds" in capsys.readouterr().out
