"""bench.serve without a GPU: what it asks for and when, what its clients see of a server, the engine's own
loops, rows and tables by hand; the picture and the page of a made-up run."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import pickle
import statistics
import time
from dataclasses import replace

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
from bench.serve_jobs import Job, Seen, arrivals, body, dealt, of_loop, random_jobs
from bench.serve_report import Bounds
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


def test_every_job_is_some_clients_once():
    assert dealt(7, 3) == [[0, 3, 6], [1, 4], [2, 5]] and dealt(2, 3) == [[0], [1]]
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


SEEN = [
    Seen(0, 0, 0.0, 1.0, 2.0, 11, "a"), Seen(1, 1, 2.0, 2.05, 2.15, 11, "b"),
    Seen(2, 1, 2.0, 2.2, 2.3, 11, "c"), Seen(3, 1, 2.0, 2.05, 3.05, 11, "d"),
    Seen(4, 1, 2.0, 2.01, 4.0, 0, "", "it broke"),
]  # fmt: skip


def test_what_a_loop_came_to():
    """The first request of a client counts for rates alone. Of the others one is within both bounds, one is
    late, one is slow and one broke."""
    row = serve_report.of_closed(SEEN, BOUNDS)
    assert (row["requests"], row["counted"], row["errors"], row["tokens"]) == (5, 4, 1, 44)
    assert (row["seconds"], row["tokens_per_second"], row["requests_per_second"]) == (4.0, 11.0, 1.0)
    assert row["goodput"] == 0.25
    assert row["ttft_ms"] == {"p50": 50.0, "p99": 197.0} and row["token_ms"] == {"p50": 10.0, "p99": 98.2}
    opened = serve_report.of_open(SEEN, 9.0, BOUNDS)
    assert opened["counted"] == 0 and opened["goodput"] is None and opened["ttft_ms"] is None
    assert serve_report.of_open(SEEN, 8.0, BOUNDS)["counted"] == 4


def test_what_a_server_adds_is_told_of_the_same_jobs():
    alone = [replace(s, ended=s.ended / 2) for s in SEEN[:4]]
    row, engine = serve_report.of_closed(SEEN[:4], BOUNDS), serve_report.of_closed(alone, BOUNDS)
    made = serve_report.beside_engine(row, engine, SEEN[:4], alone, same_text=True)
    assert (
        made["adds"] == pytest.approx(1.0, abs=0.001)
        and made["identical"] == "4/4"
        and serve_report.right(made)
    )
    alone[3] = replace(alone[3], digest="other")
    made = serve_report.beside_engine(row, engine, SEEN[:4], alone, same_text=True)
    assert made["identical"] == "3/4" and not serve_report.right(made)
    made = serve_report.beside_engine(row, engine, SEEN[:4], alone, same_text=False)
    assert made["identical"] is None and serve_report.right(made)
    for theirs in (alone[:3], []):
        made = serve_report.beside_engine(row, engine if theirs else None, SEEN[:4], theirs, False)
        assert made["adds"] is None and made["identical"] is None
    broken = serve_report.of_closed(SEEN, BOUNDS)
    assert serve_report.beside_engine(broken, engine, SEEN, SEEN, True)["adds"] is None
    assert not serve_report.right(broken)


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
            return {"port": serving.port, "begin": time.monotonic(), "limit": 9, "patience": 20} | more

        def asked(i):
            return i, body(jobs[i], "auto", f"salt {i}")

        loop = plan(clients=[[asked(0), asked(1)], [asked(2)]])
        first, long, second = sorted((a.seen(loop["begin"]) for a in asyncio.run(serve_client.closed(loop))),
                                     key=lambda s: (s.turn, s.job))  # fmt: skip
        cut = plan(clients=[[asked(0), asked(1), asked(0)]], limit=0)
        assert [a.turn for a in asyncio.run(serve_client.closed(cut))] == [0, 1], "no third one: it is late"
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
    gone = plan(clients=[[asked(0)]], arrivals=[(0.0, *asked(0))])
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
    assert [s.job for s in seen] == list(range(8)) and [s.turn for s in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    text = Text(tiny)
    for job, s in zip(jobs, seen, strict=True):
        request = {"max_new_tokens": job.new_tokens, "min_tokens": job.new_tokens, "seed": 0}
        ids = model.generate(text.encode(job.prompt), "autoregressive", **request).token_ids
        assert (s.tokens, s.digest) == (job.new_tokens, digest(text.decode(ids))), s
        assert 0 <= s.sent < s.first <= s.ended
    for client in (seen[::2], seen[1::2]):
        assert all(a.ended <= b.sent for a, b in zip(client, client[1:], strict=False))
    asked = [(text.encode(job.prompt), job.new_tokens) for job in jobs]
    assert len(serve_engine.decode(engine, asked, loops[0], -1.0)) == 4, "late: no more than two each"


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
        "tokens_per_second": 600.0, "requests_per_second": 6.0, "counted": 16,
        "ttft_ms": {"p50": 100.0, "p99": 400.0}, "token_ms": {"p50": 12.0, "p99": 14.0}, "goodput": 0.75,
        "engine": {"tokens_per_second": 618.0}, "adds": 0.03, "identical": "24/24",
    }  # fmt: skip
    return made | more


SIMULATED = {"way": "drafted", "acceptance": "simulated: a curve", "identical": None}
RUN = {
    "machine": {"gpu": "H0", "torch": "2", "triton": "3", "date": "2026-11-29", "commit": "abc"},
    "settings": {"lengths": None, "prompt_tokens": 1000, "new_tokens": 256, "ttft_ms": 500, "token_ms": 25},
    "rows": [
        row(), row(**SIMULATED, tokens_per_second=1500.0), row(clients=64, tokens_per_second=3000.0),
        row(loop="open", clients=None, share=0.5, rate=3.0, engine=None, adds=None, identical=None),
        row(model="1.7B", ttft_ms=None, token_ms=None, goodput=None, engine=None, adds=None),
    ],
    "peers": [{"peer": "vllm 1", "model": "8B", "measure": "rounds", "texts": 64,
               "tokens_per_second": 2800.0}],
}  # fmt: skip


def test_every_line_says_what_the_acceptance_is():
    found = serve_report.tables(RUN["rows"], RUN["peers"])
    assert [title.split(",")[0] for title, _, _ in found] == ["8B", "8B", "1.7B"]
    for _, head, lines in found:
        assert all(len(line) == len(head) for line in lines)
    _, head, lines = found[0]
    cells = [dict(zip(head, line, strict=True)) for line in lines]
    assert [c["acceptance"] for c in cells] == ["-", "simulated: a curve", "-"]
    assert [c["over plain"] for c in cells] == ["1.00x", "2.50x", "1.00x"]
    assert [c["vLLM offline"] for c in cells] == ["-", "-", "2800"] and cells[0]["server adds"] == "3.0%"
    assert "simulated" in serve_report.progress(RUN["rows"][1]) and "vLLM offline" not in found[2][1]
    assert "50% of saturation" in serve_report.progress(RUN["rows"][3])


def test_the_picture_shows_what_was_recorded(tmp_path, monkeypatch):
    svg = drawing.drawn(RUN)
    points = attributes(svg, "data-rate")
    found = {(p["data-line"], p["data-texts"], float(p["data-rate"])) for p in points}
    assert found == {
        ("plain", "8", 600.0), ("plain", "64", 3000.0), ("drafted", "8", 1500.0),
        ("vLLM offline", "64", 2800.0),
        ("plain", "8", 100.0), ("plain", "64", 100.0), ("drafted", "8", 100.0),
    }  # fmt: skip
    heights = {float(p["data-rate"]): float(p["y"]) for p in points if p["data-texts"] == "64"}
    assert heights[3000.0] < heights[2800.0], "further up is more"
    assert "vLLM" not in drawing.drawn(RUN | {"peers": []})
    with pytest.raises(ValueError, match="no rows of closed loops"):
        drawing.drawn(RUN | {"rows": RUN["rows"][3:4]})
    for name in ("MASK", "SPEED", "BATCH_RUN", "SERVE", "SERVE_RUN"):
        monkeypatch.setattr(pictures, name, tmp_path / name)
    assert len(pictures.drawn()) == 2
    (tmp_path / "SERVE_RUN").write_text(json.dumps(RUN))
    assert pictures.drawn()[tmp_path / "SERVE"] == svg


def test_the_page_has_the_section_where_there_is_a_run():
    run, peers = (json.loads(path.read_text()) for path in (performance.RUN, performance.PEERS))
    page = "<!-- serve -->\n\n<!-- end -->\n"
    assert performance.rewritten(page, run, peers) == page
    made = performance.rewritten(page, run, peers, served=RUN)
    assert performance.rewritten(made, run, peers, served=RUN) == made
    assert "## Served over HTTP" in made and "(serve.svg)" in made and "simulated" in made
    assert "| 8 | drafted | 1500 | 2.50x | 3.0% | 6.00 | 100 | 400 | 12.0 | 14.0 | 75.0% | - |" in made
    assert "| 50% | plain | 3.00 | 600 | 100 | 400 | 12.0 | 14.0 | 75.0% |" in made
    assert "prompts of 1,000 tokens" in made and "vllm 1" in made


def test_a_peer_decodes_in_rounds():
    """Prompts take a second each and a step 0.25 s, whatever the number of texts."""
    asked = []

    def generate(texts):
        asked.append(list(texts))
        return len(texts) + 0.25 * max(new for _, new in texts)

    made = vllm_peer.in_rounds(generate, 2, [(9, 4), (9, 8), (9, 4)])
    assert [len(texts) for texts in asked] == [2, 2, 1]
    assert (made["tokens"], made["seconds"], made["texts"]) == (16, 6.0, 2)


@gpu_free
@pytest.mark.parametrize(
    "words, said",
    [
        ("--models 8B", "need a GPU"), ("--loads 300", "more than 256"), ("--loads 0", "whole number"),
        ("--lengths code --new-tokens 9", "without --lengths"), ("--lengths nowhere.csv", "cannot be read"),
        ("--new-tokens 4090", "embedded of --models has 4096"), ("--models 9B", "invalid choice"),
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
    words = "--models embedded --loads 1 2 --each 1 --prompt-tokens 8 --new-tokens 3 --seconds 150"
    assert serve.main([*words.split(), "--json", str(out)]) == 0
    run = json.loads(out.read_text())
    assert [(r["loop"], r["clients"] or r["share"], r["way"]) for r in run["rows"]] == [
        *(("closed", clients, way) for clients in (1, 2) for way in serve.WAYS),
        *(("open", share, way) for share in (0.5, 0.8) for way in serve.WAYS),
    ]
    for made in run["rows"]:
        assert made["errors"] == 0 and made["requests"] and math.isfinite(made["tokens_per_second"])
        assert (made["identical"] is None) == (made["loop"] == "open")
    assert "svg" in drawing.drawn(run) and "| 50% |" in performance.rewritten(
        "<!-- serve -->\n\n<!-- end -->\n",
        *(json.loads(path.read_text()) for path in (performance.RUN, performance.PEERS)),
        served=run,
    )
    assert "server adds" in capsys.readouterr().out
