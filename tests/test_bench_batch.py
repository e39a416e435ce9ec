"""bench.decode --batch without a GPU: its clock, rows and tables by hand, lengths, the peer's process, and
whole runs of small models; the picture and the page of a made-up run."""

import json
import math
import re
import sys
from collections import Counter
from itertools import count
from types import SimpleNamespace

import pytest
from interpreter import DEVICE
from scripted import ScriptedModel
from small import small_config, small_model
from test_pictures import attributes

from bench import batch, batch_measure, batch_report, decode, lengths, vllm_peer
from bench.batch_measure import Job
from bench.batch_report import Rounds
from bench.replay import PLAIN
from qwen3_model import Engine, InputError
from qwen3_model.model import PREFILL_ROWS
from tools.docs import batch as drawing
from tools.docs import performance, pictures

gpu_free = pytest.mark.skipif(DEVICE != "cpu", reason="what is said where there is no GPU")
AUTO = batch.WAYS[1]


class FakeText:
    def __init__(self, prompt):
        self.tokens, self.finished = list(prompt), False
        self.stats = SimpleNamespace(cycles=0, cycle_tokens=0, nodes=0, cycles_of=Counter())


class FakePace:
    def rows(self):
        return 64


class FakeEngine:
    """Prompts take 100 s each; then a cycle takes 2 s, of which the host waits 1.5, and adds 3 tokens to each
    text that runs, with 7 nodes."""

    def __init__(self, clock, slots=3):
        self.clock, self.slots, self.cache_tokens = clock, slots, 999
        self.load = SimpleNamespace(preemptions=0)
        self.model = SimpleNamespace(config=SimpleNamespace(context_length=500))
        self.texts, self.began, self.asked = [], 0, []
        self.pace, self.beside = FakePace(), []  # tokens of prompts, in each step
        self.runner = SimpleNamespace(cycles=SimpleNamespace(pace=self.pace))

    def submit(self, prompt, request):
        self.asked.append(request)
        self.texts.append(FakeText(prompt))
        return self.texts[-1]

    def cancel(self, text):
        text.finished = True

    def step(self):
        running = [text for text in self.texts if not text.finished]
        if not running:
            return ()
        self.beside.append(self.pace.rows())
        if self.began < len(self.texts):
            self.began, self.clock.now = self.began + 1, self.clock.now + 100
        self.clock.now += 0.5
        batch_measure.Reading.wait(self)
        for text in running[: self.began]:
            text.tokens += [1, 2, 3]
            s = text.stats
            s.cycles, s.cycle_tokens, s.nodes = s.cycles + 1, s.cycle_tokens + 3, s.nodes + 7
            s.cycles_of["two-pass"] += 1
        return tuple(running)


@pytest.fixture
def clock(monkeypatch):
    made = SimpleNamespace(now=0.0)

    def wait(self):
        made.now += 1.5

    monkeypatch.setattr(batch_measure, "time", SimpleNamespace(perf_counter=lambda: made.now))
    monkeypatch.setattr(batch_measure.Reading, "wait", wait)
    return made


def test_the_clock_runs_while_all_texts_do(clock, monkeypatch):
    """Three texts of 3 tokens in 2 s: 4.5 tokens/s, whatever the prompts took, and a quarter of the time is
    the host's. Afterwards all texts are cancelled."""
    for name, value in (("SETTLE", 30), ("TOKENS", 30), ("ROUNDS", 2)):
        monkeypatch.setattr(batch_measure, name, value)
    engine = FakeEngine(clock)
    found = batch_measure.steady(engine, [[5] * 10] * 3, AUTO)
    assert all(text.finished for text in engine.texts) and [r.strategy for r in engine.asked] == ["auto"] * 3
    assert engine.asked[0].max_new_tokens == 490, "what the context holds"
    assert found.seconds == [2.0 * 10] * 2 and found.waited == [1.5 * 10] * 2
    assert found.row() == {
        "texts": 3, "tokens_per_second": 4.5, "p20": 4.5, "p80": 4.5, "ms_per_cycle": 2000.0,
        "tokens_per_cycle": 3.0, "nodes_per_cycle": 7.0, "cycles_of": {"two-pass": 1.0}, "host_share": 0.25,
        "mean_context": round(found.context),
    }  # fmt: skip
    assert engine.beside == [PREFILL_ROWS] * 3 + [64] * 30, "texts begin at about the same time"
    before = 10 + 3 * (1 + 10)  # of the youngest, which began in the last step
    assert found.context == before + 3 + 3 * 10, "the middle one, in the middle"


def test_texts_that_do_not_all_run_have_no_speed(clock):
    engine = FakeEngine(clock)
    step = engine.step

    def preempted():
        engine.load.preemptions += 1
        return step()

    engine.step = preempted
    with pytest.raises(InputError, match="do not fit into 999 positions"):
        batch_measure.steady(engine, [[5]] * 3, PLAIN)
    engine.step = lambda: engine.cancel(engine.texts[-1]) or step()
    with pytest.raises(InputError, match="has ended before"):
        batch_measure.steady(engine, [[5]] * 3, PLAIN)


def test_medians_are_over_rounds_and_the_floor_is_of_all_texts():
    found = Rounds(
        4, [2.0, 1.0, 4.0], [1.0, 0.5, 2.0], [40, 40, 40], [40, 20, 40], kinds=Counter(plain=25, x=75)
    )
    row = found.row()
    assert (row["tokens_per_second"], row["ms_per_cycle"], row["host_share"]) == (20.0, 200.0, 0.5)
    assert row["tokens_per_cycle"] == 1.2 and row["cycles_of"] == {"plain": 0.25, "x": 0.75}
    plain, drafted = (batch_report.beside_floor(row | {"way": w}, 30e9, 3000.0) for w in ("plain", "auto"))
    assert plain["floor_ms"] == 10.0 and plain["share_of_floor"] == 0.05 and drafted["share_of_floor"] is None


def test_jobs_are_decoded_with_their_prompts_inside_the_clock(monkeypatch):
    """On an engine of two slots, after the first four of the list; each text has the tokens it has alone."""
    model = ScriptedModel(small_config(eos_token_ids=()), 0.5, seed=3)
    jobs = [Job([1 + i, 2, 3], 3 + i) for i in range(5)]
    ticks = count()  # a second each time that somebody looks
    monkeypatch.setattr(batch_measure, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    row, texts = batch_measure.decode(Engine(model, 2, 640), jobs, AUTO)
    assert [len(text) for text in texts] == [3, 4, 5, 6, 7] and row["tokens"] == 25 and row["jobs"] == 5
    seconds = row["seconds"]
    waited = (seconds - 1) / 2
    assert waited >= 7 and row["host_share"] == round(1 - waited / seconds, 4), "one wait a cycle at least"
    assert row["texts"] == 2 and row["tokens_per_second"] == round(25 / seconds, 1)
    assert texts[4] == model.generate([5, 2, 3], "autoregressive", 7, seed=0).token_ids


ROW = {
    "model": "8B", "measure": "steady", "way": "plain", "acceptance": "-", "context": 1000, "texts": 1,
    "tokens_per_second": 200.0, "p20": 190.0, "p80": 210.0, "ms_per_cycle": 5.0, "tokens_per_cycle": 1.0,
    "nodes_per_cycle": 0.0, "cycles_of": {"plain": 1.0}, "host_share": 0.04, "mean_context": 1100,
    "floor_ms": 4.0, "share_of_floor": 0.8,
}  # fmt: skip
SIMULATED = {
    "way": "auto",
    "acceptance": "simulated: a curve",
    "share_of_floor": None,
    "tokens_per_cycle": 4.0,
}
OWN = {
    "model": "embedded", "measure": "jobs", "way": "plain", "acceptance": "its own", "identical": "9/9",
    "texts": 1, "jobs": 9, "tokens": 90, "seconds": 1.5, "tokens_per_second": 60.0, "host_share": 0.3,
}  # fmt: skip
RUN = {
    "machine": {"gpu": "H0", "torch": "2", "triton": "3", "date": "2026-11-29", "commit": "abc",
                "command": "python -m bench --json made.json"},  # fmt: skip
    "roof": {"read_gb_s": 4000.0},
    "rows": [
        ROW, ROW | SIMULATED | {"tokens_per_second": 700.0},
        ROW | {"texts": 64, "tokens_per_second": 6400.0, "floor_ms": 8.0},
        ROW | SIMULATED | {"texts": 64, "tokens_per_second": 7000.0}, ROW | {"model": "1.7B"},
        OWN, OWN | {"way": "auto", "tokens_per_second": 90.0},
    ],
    "peers": [{"peer": "vllm 1", "model": "8B", "measure": "steady", "context": 1000, "texts": 64,
               "ms_per_cycle": 10.0, "tokens_per_second": 6000.0}],
}  # fmt: skip


def test_every_line_of_the_tables_says_what_the_acceptance_is():
    found = batch_report.tables(RUN["rows"], RUN["peers"])
    assert [title.split(",")[0] for title, _, _ in found] == ["8B", "1.7B", "embedded"]
    for _, head, lines in found:
        assert all(len(line) == len(head) for line in lines)
    _, head, lines = found[0]
    assert [line[2] for line in lines] == ["-", "simulated: a curve"] * 2
    assert [line[6] for line in lines] == ["1.00x", "3.50x", "1.00x", "1.09x"]
    assert head[-1] == "vLLM tokens/s" and [line[-1] for line in lines] == ["-", "-", "6000", "6000"]
    assert "vLLM tokens/s" not in found[1][1] and found[2][2][1][4] == "1.50x"
    assert "simulated" in batch_report.progress(RUN["rows"][1])


def test_lengths_of_a_user(tmp_path):
    """The same jobs from a CSV with or without names, JSON pairs and JSON objects."""
    jobs = [(1000, 100), (5, 7)]
    for name, text in {
        "a.csv": "prompt_tokens,new_tokens\n1000,100\n\n 5 , 7\n", "b.csv": "1000,100\n5,7",
        "c.json": "[[1000,100],[5,7]]",
        "d.json": json.dumps([dict(zip(lengths.HEAD, job, strict=True)) for job in jobs]),
        "e.JSON": "\ufeff[[1000,100],[5,7]]",
        "f.csv": '\ufeff"prompt_tokens","new_tokens"\r\n"1000","100"\r\n5, "7"\r\n',
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        assert lengths.read(tmp_path / name, 2000, "a model") == jobs, name


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("a.csv", None, "cannot be read"), ("a.csv", "", "holds no jobs"), ("a.json", "{}", "holds no jobs"),
        ("a.json", "[", "cannot be read"), ("a.csv", "5,7\n5", "job 2"), ("a.csv", "5,x", "whole numbers"),
        ("a.json", "[[5, 1.5]]", "whole numbers"), ("a.json", "[3]", "whole numbers"),
        ("a.json", "[{}]", "whole numbers"), ("a.csv", "0,7", "at least 1"),
        ("a.csv", "40700,7", "at most 40704 together"), ("a.json", '["12", "34"]', "job 1: two whole"),
        ("a.json", '[["5", 7]]', "whole numbers"), ("a.json", "[[true, 7]]", "whole numbers"),
        ("a.csv", "5,1_0", "whole numbers"), ("a.csv", "5,7,9", "whole numbers"),
        ("a.csv", '"5,7', "cannot be read"), ("a.csv", "5," + "7" * 5000, "cannot be read"),
        ("a.csv", "5,7\n" * 60, "larger than the 200 bytes"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_lengths(name, text, said, tmp_path, monkeypatch, refused):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(batch, "machine", lambda command: {})
    if "larger" in said:
        monkeypatch.setattr(lengths, "MOST_BYTES", 200)
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    assert said in refused(decode.main, "--batch", "2", "--lengths", str(path))


def test_the_peers_process(tmp_path):
    """Its rows are what it printed, until it failed or its time was up; its noise is not."""
    script = tmp_path / "peer.py"
    rows = [{"peer": "vllm 1", "texts": 1}, {"peer": "vllm 1", "texts": 8}]
    says = "\n".join(f"print({json.dumps(row)!r}, flush=True)" for row in rows)
    head = "import json, sys, time\nassert json.load(sys.stdin)['texts'] == [1, 8]\nprint('noise')\n" + says
    for end, said, seconds in (
        ("", "", 60), ("\nraise ValueError('no room')", "exit code 1: ValueError: no room", 60),
        ("\ntime.sleep(60)", "it was ended after 3 s", 3),
    ):  # fmt: skip
        script.write_text(head + end)
        found, wrong = vllm_peer.measured({"texts": [1, 8]}, seconds, [sys.executable, str(script)])
        assert found == rows and said in wrong and bool(said) == bool(wrong)


def test_a_peers_step_is_a_difference_of_two_generations():
    """Prompts take a second each and a step 0.25 s, whatever the number of texts."""
    asked = []

    def generate(texts):
        asked.append(list(texts))
        return len(texts) + 0.25 * max(new for _, new in texts)

    row = vllm_peer.steps(generate, 8, 1000)
    assert row["ms_per_cycle"] == 250.0 and row["tokens_per_second"] == 32.0
    assert {n for texts in asked for n, _ in texts} == {1000} and {len(texts) for texts in asked} == {8}
    jobs = [(9, 4)] * 10
    row = vllm_peer.whole(generate, 2, jobs)
    assert asked[-2:] == [jobs[:4], jobs] and row["tokens"] == 40 and row["seconds"] == 11.0


@gpu_free
def test_a_whole_run(monkeypatch, tmp_path, capsys):
    """As on a GPU, a tiny model in the interpreter: drafted rows are simulated, plain ones are not; with
    `--lengths` whole lists of texts."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(batch, "Pool", lambda device, size: None)
    monkeypatch.setattr(batch, "Meter", lambda pool: SimpleNamespace(read_roof=lambda: 3000.0))
    monkeypatch.setattr(batch, "machine", lambda command: {"gpu": "fake", "command": command})
    monkeypatch.setattr(batch, "SIMULATED_TEXTS", 3)
    monkeypatch.setattr(batch, "GROWTH", 60)
    for name, value in (("SETTLE", 1), ("TOKENS", 2), ("ROUNDS", 2), ("MOST_NEW", 100)):
        monkeypatch.setattr(batch_measure, name, value)
    small = small_model("float32", backend="triton", num_hidden_layers=1, block_size=4, eos_token_ids=(),
                        num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    monkeypatch.setattr(batch, "random_model", lambda name: small)
    monkeypatch.setattr(batch, "Engine", lambda model, slots, tokens: Engine(model, slots, tokens or 256))
    out = tmp_path / "b.json"
    common = ["--models", "8B", "--json", str(out)]
    assert decode.main(["--batch", "2", "1", "--contexts", "5", *common]) == 0
    said, got = capsys.readouterr().out, json.loads(out.read_text())
    measured = [(r["texts"], r["way"]) for r in got["rows"]]
    assert measured == [(texts, way) for texts in (1, 2) for way in ("plain", "auto")]
    for row in got["rows"]:
        drafted = row["way"] == "auto"
        assert ("simulated" in row["acceptance"]) == drafted and (row["share_of_floor"] is None) == drafted
        assert (row["tokens_per_cycle"] > 1) == drafted and row["mean_context"] >= 7
    lines = [line for line in said.splitlines() if re.search(r"\bauto\b", line)]
    assert len(lines) >= 4 and "simulated" in lines[0] and "vLLM is not installed" in said
    (tmp_path / "jobs.csv").write_text("5,3\n4,3\n7,2\n")
    assert decode.main(["--batch", "2", "--lengths", str(tmp_path / "jobs.csv"), *common]) == 0
    got = json.loads(out.read_text())
    measured = [(r["measure"], r["way"], r["tokens"]) for r in got["rows"]]
    assert measured == [("jobs", "plain", 8), ("jobs", "auto", 8)]
    assert "3 jobs" in capsys.readouterr().out


@gpu_free
def test_the_embedded_checkpoint_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "b.json"
    words = "--batch 1 2 --models embedded --prompts 2 --tokens 2 --json"
    assert decode.main([*words.split(), str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(r["texts"], r["way"], r["identical"], r["acceptance"]) for r in rows] == [
        (texts, way, "2/2", "its own") for texts in (1, 2) for way in ("plain", "auto")
    ]
    assert "held" not in capsys.readouterr().err


@gpu_free
def test_lengths_with_the_embedded_checkpoint(tmp_path, capsys, refused):
    """Prompts of these lengths, whose texts are the same everywhere; more than its context is refused."""
    out, file, common = (
        tmp_path / "b.json",
        tmp_path / "jobs.csv",
        ["--batch", "1", "2", "--models", "embedded"],
    )
    file.write_text("5,2\n9,1\n4,2\n")
    assert decode.main([*common, "--lengths", str(file), "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(r["measure"], r["jobs"], r["identical"]) for r in rows] == [("jobs", 3, "3/3")] * 4
    assert all(3 <= r["tokens"] <= 5 for r in rows)
    file.write_text("5,2\n4000,97")
    assert "job 2: 4000 and 97 tokens; at least 1 each and at most 4096 together" in refused(
        decode.main, *common, "--lengths", str(file)
    )


def test_jobs_of_lengths_are_random_prompts_of_these_lengths():
    jobs = batch.random_jobs(SimpleNamespace(config=small_config()), [(5, 2), (9, 1)])
    assert [(len(job.prompt), job.new_tokens) for job in jobs] == [(5, 2), (9, 1)]
    assert jobs[0].prompt != jobs[1].prompt[:5]


def test_fewer_prompts_than_asked_for_are_said(monkeypatch):
    monkeypatch.setattr(batch, "read_prompts", lambda path, count, split: ["x"] * min(count, 3))
    model = SimpleNamespace(text=SimpleNamespace(encode=lambda text: [7]))
    bench = batch.Bench(SimpleNamespace(notes=[]), [1], [], None, None)
    assert len(batch.held_out(bench, model, 3, 4)) == 3 and not bench.run.notes
    assert len(batch.held_out(bench, model, 100000, 4)) == 3
    assert bench.run.notes == ["embedded: 3 prompts in place of 100000: no more are held out"]


def test_other_texts_make_the_exit_code_1():
    bench = batch.Bench(SimpleNamespace(failed=False), [1], [], None, None, [OWN, ROW])
    assert not bench.wrong
    bench.rows.append(OWN | {"identical": "8/9"})
    assert bench.wrong


@gpu_free
@pytest.mark.parametrize(
    "words, said",
    [
        ("--batch 8", "need a GPU"), ("--batch 0", "whole number"), ("--batch 300", "more than 256"),
        ("--lengths a.csv", "--lengths is of --batch"), ("--models embedded", "is of --batch"),
        ("--batch 2 --replay t.json", "two benches"), ("--batch", "at least one argument"),
    ],
)  # fmt: skip
def test_options(words, said, refused):
    assert said in refused(decode.main, *words.split())


def test_the_picture_shows_what_was_recorded(tmp_path, monkeypatch):
    """Every figure is a point at its height; further up is faster; what nobody measured is not named."""
    svg = drawing.drawn([RUN])
    points = attributes(svg, "data-rate")
    found = {(p["data-line"], p["data-texts"], float(p["data-rate"])) for p in points}
    assert found >= {
        (drawing.FLOOR, "1", 250.0), (drawing.FLOOR, "64", 8000.0),
        ("plain", "1", 200.0), ("plain", "64", 6400.0),
        ("drafted, simulated", "1", 700.0), ("drafted, simulated", "64", 7000.0), ("vLLM", "64", 6000.0),
    }  # fmt: skip
    first = [p for p in points if float(p["x"]) < drawing.LEFT + drawing.WIDTH]
    heights = [(math.log(float(p["data-rate"])), float(p["y"])) for p in first]
    slopes = {round((b - d) / (a - c), 1) for a, b in heights for c, d in heights if a - c > 0.1}
    assert len(slopes) == 1 and max(slopes) < 0
    alone = drawing.drawn([RUN | {"peers": []}])
    assert "vLLM" not in alone.split("<rect")[4] and "simulated" in svg
    with pytest.raises(ValueError, match="no steady rows"):
        drawing.drawn([RUN | {"rows": [OWN]}])
    (tmp_path / "run").write_text(json.dumps(RUN))
    monkeypatch.setattr(pictures, "BATCH_RUNS", [tmp_path / "run"])
    assert pictures.drawn()[pictures.BATCH] == svg


def test_of_several_runs_the_first_shows_what_both_have():
    older = json.loads(json.dumps(RUN).replace("6400.0", "5400.0"))
    older["rows"] += [row | {"context": 8000} for row in older["rows"] if row["measure"] == "steady"]
    rates = [p["data-rate"] for p in attributes(drawing.drawn([RUN, older]), "data-rate")]
    assert rates.count("6400.0") == 1 and rates.count("5400.0") == 1, "the older run's at 8000 alone"
    page = drawing.section([RUN, older], performance.markdown)
    assert page.count("**8B, context 1000**") == page.count("**8B, context 8000**") == 1
    assert page.count("The embedded checkpoint") == page.count("| 6,400 |") == page.count("| 5,400 |") == 1


def test_the_page_has_the_section():
    run, peers = (json.loads(path.read_text()) for path in (performance.RUN, performance.PEERS))
    served = performance.read(performance.SERVE_RUNS)
    made = performance.rewritten("<!-- batch -->\n\n<!-- end -->\n", run, peers, [RUN], served)
    assert performance.rewritten(made, run, peers, [RUN], served) == made
    assert "## Many texts at once" in made and "(batch.svg)" in made
    assert "| 64 | 8,000 | 6,400 | 80% | 7,000 | 1.09x | 4.00 | 4.0% | 6,000 |" in made
    assert "| 1 | auto | 90 | 1.50x | 9/9 |" in made and "simulated" in made
