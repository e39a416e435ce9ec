"""bench.decode without a GPU: floors against bytes counted by hand, options, and the measuring code on a tiny
model with a clock that is not one."""

import json

import pytest
import torch
from interpreter import DEVICE
from small import small_config, small_model
from torch.autograd import DeviceType

from bench import (
    decode,
    decode_measure,
    decode_report,
    passes,
    peers,
    step_profile,
)
from bench.measure import Timing, replayable
from bench.models import MODELS, WHOLE
from bench.passes import CYCLE, PASSES, SDPA, Pass, measure_passes, pass_bytes, weight_bytes
from bench.step_profile import Span
from qwen3_model import Qwen3
from tools.docs import performance

gpu_free = pytest.mark.skipif(DEVICE != "cpu", reason="what is said where there is no GPU")
TINY = (Pass("token", 1), Pass("draft-8", 0, 1, 8), Pass("verify-8", 8), Pass("mixed", 5, 2, 3))


SMALLEST = (Pass("token", 1), Pass("draft-2", 0, 1, 2))  # an interpreted pass takes a second


@pytest.fixture(autouse=True)
def few_host_calls(monkeypatch):
    monkeypatch.setattr(passes, "HOST_CALLS", 1)
    monkeypatch.setattr(passes, "HOST_ROUNDS", 1)


def tiny(backend="reference", dtype="float32", **changes):
    return small_model(dtype, backend=backend, device=DEVICE, num_hidden_layers=1, **changes)


class Clock:
    """Says 100 µs for the first call, 200 for the second; runs each once."""

    def __init__(self):
        self.calls = 0

    def __call__(self, call):
        call()
        self.calls += 1
        return Timing(100.0 * self.calls, 90.0 * self.calls, 110.0 * self.calls)


def test_bytes_of_8b_by_hand():
    """36 layers of 4096: qkv 6144 x 4096, o 4096 x 4096, MLP 3 x 4096 x 12288; head 151936 x 4096."""
    attention = 6144 * 4096 + 4096 * 4096 + 2 * 128
    shared = 3 * 4096 * 12288 + 2 * 4096
    rest = 4096 + 151936 * 4096
    config, keys_and_values = MODELS["8B"].config(), 36 * 8 * 1000 * 128 * 2 * 2
    token, draft, _, _, _, _, mixed = PASSES
    one_view = 2 * (36 * (attention + shared) + rest)
    assert round(one_view / 1e9, 1) == 15.1
    assert pass_bytes(config, token, 1000) == pass_bytes(config, draft, 1000) == one_view + keys_and_values
    assert pass_bytes(config, mixed, 1000) == one_view + 2 * 36 * attention + keys_and_values
    assert pass_bytes(config, token, 0, width=4) == 2 * one_view


@pytest.mark.parametrize("name", MODELS)
def test_a_pass_of_both_views_reads_every_weight_but_the_embedding(name):
    config = MODELS[name].config()
    model = Qwen3.from_config(config, device="meta", dtype="bfloat16")
    embedding = 0 if config.tie_word_embeddings else model.embedding.nbytes
    assert weight_bytes(config, ar=True, diffusion=True) == decode_measure.weights_bytes(model) - embedding


def test_shapes_are_the_published_ones():
    published = json.loads((decode_measure.EMBEDDED.parents[2] / "tests/fixtures/published.json").read_text())
    text = json.dumps(published)
    for name, shape in MODELS.items():
        want = {"hidden_size": shape.E, "intermediate_size": shape.F, "num_hidden_layers": shape.layers,
                "num_attention_heads": shape.H, "tie_word_embeddings": shape.tied}  # fmt: skip
        configs = [c for c in _dicts(published) if want.items() <= c.items()]
        assert configs, (name, len(text))


def _dicts(value):
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _dicts(inner)


@pytest.mark.parametrize("what", PASSES, ids=lambda what: what.name)
def test_rows_of_the_passes(what):
    rows = what.rows(small_config(), 50)
    assert len(rows) == len(what) and rows.n_ar == what.ar and rows.contexts == {0: 50}
    assert rows.tokens[0] == PASSES[0].rows(small_config(), 50).tokens[0] and rows.positions[0] == 50
    assert len(set(rows.blocks) - {-1}) == what.blocks


def test_measured_passes():
    model = tiny()
    cache, clock = passes.filled_cache(model, [5, 20], 16), Clock()
    assert cache.capacity == 36 and torch.isfinite(cache.values).all()
    found = list(measure_passes(model, cache, [5, 20], TINY, clock))
    assert [m.what.name for m in found] == 2 * ["token", "draft-8", "verify-8", "mixed", CYCLE]
    assert [m.context for m in found] == [5] * 5 + [20] * 5
    token, draft, verify, mixed, cycle = found[:5]
    assert not any(m.notes for m in found)
    assert token.time == Timing(100.0, 90.0, 110.0) and token.peers == {SDPA: Timing(200.0, 180.0, 220.0)}
    assert (draft.time.median, verify.time.median, mixed.time.median) == (300, 400, 500)
    assert cycle.time == Timing(700.0, 630.0, 770.0) and cycle.bytes == draft.bytes + verify.bytes
    assert mixed.bytes == pass_bytes(model.config, mixed.what, 5, width=4)
    assert all(m.launch_us is None for m in found), "the twins capture nothing"


def test_host_times_and_peer_of_the_kernels():
    """The kernels, captured as far as a CPU can, and the peer's own attention in their model."""
    model = tiny("triton")
    model.use_graphs = True
    cache = passes.filled_cache(model, [5], 16)
    found = list(measure_passes(model, cache, [5], SMALLEST, Clock()))
    assert all(m.time and m.launch_us > 0 and m.forward_us > 0 and not m.notes for m in found)
    assert len(found) == 2 and SDPA in found[0].peers


def test_no_pass_starts_after_time_is_out():
    model = tiny()
    cache = passes.filled_cache(model, [5], 16)
    answers = iter([False, False, True])
    found = list(measure_passes(model, cache, [5, 6], TINY, Clock(), lambda: next(answers)))
    assert [m.what.name for m in found] == ["token"]


def test_other_bits_get_no_time():
    """Sums in the order of the rows: the root of a chain differs, and a peer that is far off is not timed."""
    model = tiny()
    exact = model.ops.linear

    def careless(x, *args, **settings):
        return exact(x, *args, **settings) * (1 + 2**-20 * (len(x) > 1))

    model.ops = type(model.ops)(**(vars(model.ops) | {"linear": careless}))
    cache = passes.filled_cache(model, [5], 16)
    token, draft, verify, _ = measure_passes(model, cache, [5], TINY, Clock())
    assert token.time and draft.time and verify.time is None and "WRONG" in verify.notes["ours"]
    row = decode_report.pass_row("tiny", verify, 3000.0, 100.0)
    assert decode_report.pass_tables([row])[0][2][0][5].startswith("WRONG")


def test_a_peer_far_off_is_not_timed():
    model = tiny()
    cache, result = passes.filled_cache(model, [5], 16), passes.Measured(TINY[0], 5, 1)
    near = passes.launches_of(model, cache, TINY[0], 5)()[0]
    far = -near
    passes._measure_peer(result, lambda: near[None], near, Clock())
    assert SDPA in result.peers
    passes._measure_peer(result, lambda: far[None], near, Clock())
    assert result.notes[SDPA] == "differs by 200.0%"


@gpu_free
def test_transformers_step_is_ours(monkeypatch):
    """On our weights, compiled by a stand-in; off weights are refused."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(peers, "ROUNDS", 2)
    model = tiny(num_key_value_heads=2)
    calls = []

    def compiled(forward, mode):
        assert mode == "reduce-overhead"
        return lambda **given: calls.append(given["position_ids"].item()) or forward(**given)

    timing = peers.hugging_face(model, 9, compiled)
    assert timing.median > 0 and calls == list(range(9, 9 + 4 + 2 * 8))
    model.prefill = lambda *args: torch.linspace(-1, 1, model.config.vocab_size)
    with pytest.raises(ValueError, match="its logits differ"):
        peers.hugging_face(model, 9, compiled)


STEP = [
    Span("_rms_norm_kernel", 0, 1), Span("_linear_kernel", 2, 6), Span("_partial_kernel", 6, 8),
    Span("void at::native::(anonymous namespace)::copy<int>(int)", 7, 9), Span("_linear_kernel", 10, 15),
]  # fmt: skip


def test_a_profile_by_hand():
    """Two passes of 15 µs: 13 busy, 2 of gaps, and 5 between them that belong to none."""
    later = [Span(s.name, s.start + 20, s.end + 20) for s in STEP]
    made = step_profile.step_profile(STEP + later, 2)
    assert (made.us, made.gaps_us) == (15, 2)
    assert made.groups() == {"linears": 4, "head": 5, "attention": 2, "norms": 1, "the rest": 1, "gaps": 2}
    assert [k.group for k in made.kernels][:2] == ["head", "linears"]
    assert made.kernels[0].count == 1 and made.kernels[0].share == 5 / 15
    assert "at::native::copy" in [k.name for k in made.kernels]
    # a dependent launch waits from 1 on for the linear in front of it, and runs for 1
    waiting = [*STEP[:2], Span("_rms_norm_kernel", 1, 7), Span("_linear_kernel", 6.5, 10)]
    made = step_profile.step_profile(sorted(waiting, key=lambda s: s.start), 1)
    assert made.groups() == {"linears": 4, "head": 3, "attention": 0, "norms": 2, "the rest": 0, "gaps": 1}
    with pytest.raises(ValueError, match="saw 9 kernels in 2"):
        step_profile.step_profile((STEP + later)[:-1], 2)


@pytest.mark.parametrize(
    "name, group",
    [
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "linears"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "linears"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("_qk_norm_rope_kernel", "norms"),
        ("_head_kernel", "head"),
        ("_swiglu_kernel", "the rest"),
    ],
)
def test_groups_of_kernels(name, group):
    assert step_profile._group(name) == group


def test_the_profiler_sees_every_call():
    x = torch.ones(8, 8)
    spans = step_profile.record(lambda: torch.mm(x, x), 3, on=DeviceType.CPU)
    assert [s.name for s in spans].count("aten::mm") == 3
    assert all(s.end >= s.start for s in spans) and spans == sorted(spans, key=lambda s: s.start)


def test_replayable_on_a_cpu_is_the_call():
    calls = []
    again = replayable(lambda: calls.append(1), torch.device("cpu"))
    again()
    assert calls == [1, 1]


def recorded(call, count):
    call()
    return [Span(s.name, s.start + 20 * i, s.end + 20 * i) for i in range(count) for s in STEP]


def a_run(model=None):
    run = decode_report.Run(3000.0, lambda: 1.0)
    model = model or tiny()
    decode_measure.passes_of(run, "tiny", model, [5], TINY, Clock())
    decode_measure.profiles_of(run, "tiny", model, [5], TINY[:1], recorded)
    return run


def test_rows_tables_and_summary_of_a_run():
    run = a_run()
    token, draft, *_, cycle = run.passes
    floor = token["bytes"] / 3000e9 * 1e3
    assert token["floor_ms"] == round(floor, 4) and token["share_of_floor"] == round(floor * 1e3 / 100, 4)
    assert token["over_token"] == 1 and draft["over_token"] == 3 and cycle["over_token"] == 7
    assert run.left_out == 0 and not run.notes and not run.wrong
    assert run.profiles[0]["groups_us"]["gaps"] == 2
    generated = decode_measure.generate_with
    generated(run, "tiny", tiny(eos_token_ids=()), [1, 2, 3], 9)
    assert [r["tokens"] for r in run.generate] == [9, 9] and not run.wrong
    assert run.generate[0]["tokens_per_cycle"] == 1
    for _, head, lines in run.tables():
        assert lines and all(len(line) == len(head) for line in lines)
    (line,) = decode_report.summary(run.passes)
    assert line.endswith("a two-pass cycle pays from 7.00 tokens on")
    assert json.loads(json.dumps(run.to_json({}), allow_nan=False))["roof"] == {"read_gb_s": 3000.0}
    run.generate[1]["identical"] = False
    assert run.wrong


def test_rows_of_sampling_and_trees(monkeypatch):
    """Chain and tree, greedy and sampled; the cycle is timed, and the kernels of the text it ends."""
    monkeypatch.setattr(decode_measure, "PROFILED_TOKENS", 3)
    monkeypatch.setattr(decode_measure, "TREE", 3)
    model, texts = tiny(eos_token_ids=(), block_size=3), []

    def text(call, count):
        texts.append(call())
        names = ("_grow_kernel", "_linear_kernel", "_walk_kernel", "_commit_kernel", "_grow_kernel_0d1")
        return [Span(name, 0, 1 + i) for i, name in enumerate(names)]

    rows = decode_measure.choice_rows("tiny", model, [1, 2, 3], Clock())
    assert not texts and decode_report.choice_table(rows)[0][2][0][-1] == "-"
    decode_measure.add_kernels(rows, model, [1, 2, 3], text)
    assert [(r["nodes"], r["choice"]) for r in rows] == [
        (0, "greedy"), (0, "sampled"), (3, "greedy"), (3, "sampled")
    ]  # fmt: skip
    assert [t.stats.nodes for t in texts[2:]] and all(len(t.token_ids) == 3 for t in texts)
    assert rows[0]["tree_kernels_us"] == {"_grow_kernel": 3, "_walk_kernel": 3, "_commit_kernel": 4}
    assert [r["us"]["median"] for r in rows] == [100, 200, 300, 400] and rows[3]["share"] == 10 / 400
    ((_, head, lines),) = decode_report.choice_table(rows)
    assert all(len(line) == len(head) for line in lines)
    assert [line[6] for line in lines] == ["1.000", "2.000", "1.000", "1.333"]
    assert decode_report.choice_table([]) == []


def test_host_share_of_a_pass():
    m = passes.Measured(TINY[0], 5, 1000, Timing(100.0, 90.0, 110.0), launch_us=20.0, forward_us=50.0)
    row = decode_report.pass_row("tiny", m, 3000.0, 50.0)
    assert row["host_launch_share"] == 0.2 and row["over_token"] == 2
    assert decode_report.pass_tables([row])[0][2][0][10:13] == ["20.0", "20%", "50.0"]


def test_memory_table():
    row = {"model": "8B", "context": 9, "weights_bytes": 6e9, "cache_bytes": 2e9, "peak_bytes": 10e9}
    assert decode_report.memory_table([row])[0][2] == [["8B", "9", "6.00", "2.00", "10.00", "2000"]]


def test_what_fails_leaves_a_note_and_the_run_goes_on():
    run = decode_report.Run(3000.0, lambda: 60.0)
    run.attempt("a", lambda: 1 // 0, is_peer=True)
    run.attempt("b", lambda: 1 // 0, seconds=80)
    assert run.notes[0].startswith("a: ZeroDivisionError") and run.notes[1] == "b: no time left"
    assert not run.wrong
    run.attempt("c", lambda: 1 // 0)
    assert run.wrong and len(run.notes) == 3


def test_a_pass_that_fails_does_not_end_the_run():
    model = tiny()
    exact = model.ops.linear

    def small(x, *args, **settings):
        if len(x) == 11:
            raise torch.OutOfMemoryError("no room")
        return exact(x, *args, **settings)

    model.ops = type(model.ops)(**(vars(model.ops) | {"linear": small}))
    run = a_run(model)
    failed = {r["pass"]: r["notes"] for r in run.passes if r["us"] is None}
    assert failed == {"mixed": {"ours": "OutOfMemoryError: no room"}} and run.wrong
    (said,) = decode_report.reasons(run.passes)
    assert said == "not measured: tiny, mixed, context 5, ours: OutOfMemoryError: no room"


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    decode_report.plot(tmp_path / "step.png", a_run().profiles, "fake")
    assert (tmp_path / "step.png").read_bytes()[:4] == b"\x89PNG"


@gpu_free
def test_without_a_gpu_floors_are_printed(capsys, tmp_path):
    out = tmp_path / "d.json"
    assert decode.main(["--json", str(out), "--plot", str(tmp_path / "x.png")]) == 0
    said = capsys.readouterr().out
    assert "No GPU here: nothing was measured" in said and "floor at 3350 GB/s" in said
    got = json.loads(out.read_text())
    assert got["roof"] is None and got["left_out"] == len(got["passes"]) == 2 * 4 * len(PASSES)
    assert all(r["us"] is None for r in got["passes"])
    assert got["passes"][0]["floor_ms"] == round(got["passes"][0]["bytes"] / 3350e6, 4)


@pytest.mark.parametrize(
    "arguments, profiled",
    [([], None), (["--profile"], ["token"]), (["--plot", "x.png"], ["token"]),
     (["--profile", "token", "verify-64"], ["token", "verify-64"])],
)  # fmt: skip
def test_what_is_profiled(arguments, profiled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = decode.parse([*arguments, "--contexts", "4k", "1k", "4k"])
    assert given.profile == profiled and given.contexts == [1024, 4096]


@pytest.mark.parametrize("asked, contexts", [([], []), (["--contexts", "32k", "1k"], [1024, 32768])])
def test_how_long_replayed_prompts_are(asked, contexts):
    """As recorded, unless that is asked for."""
    assert decode.parse(["--replay", "t.json", *asked]).contexts == contexts


def test_passes_alone(monkeypatch, capsys, tmp_path):
    """Nothing else is measured, and what belongs to other runs is refused."""
    ran, names = [], ["token", "verify-192"]
    monkeypatch.setattr(decode, "random_model", lambda name: tiny(eos_token_ids=()))
    monkeypatch.setattr(decode, "passes_of", lambda run, name, model, contexts, found, t: ran.extend(found))
    others = []
    for name in ("generate_with", "_choices", "memory_of", "_embedded", "_hugging_face", "_profiles"):
        monkeypatch.setattr(decode, name, lambda *given, name=name: others.append(name))
    given = decode.parse(["--models", "8B", "--passes", *reversed(names)])
    run = decode.Run(1.0, lambda: 9.0)
    decode.measure(run, given, {})
    assert [what.name for what in ran] == names and others == run.notes == []
    if not torch.cuda.is_available():
        assert decode.main(["--models", "8B", "--contexts", "1k", "--passes", *names]) == 0
        assert "verify-192" in (said := capsys.readouterr().out) and "verify-64" not in said
    for more in (["--profile"], ["--plot", str(tmp_path / "x.png")], ["--replay", "x"], ["--batch", "2"]):
        with pytest.raises(SystemExit) as ended:
            decode.parse(["--passes", "token", *more])
        assert ended.value.code == 2


class FakeMeter:
    """A meter of a GPU that is not there."""

    def __init__(self, pool):
        pass

    def read_roof(self):
        return 3000.0


@gpu_free
@pytest.mark.parametrize("other_bits", [False, True])
def test_a_whole_run(other_bits, monkeypatch, tmp_path, capsys):
    """`main` as on a GPU, a tiny model in the interpreter: all figures there, file written, exit code."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(decode, "DEVICE", "cpu")
    monkeypatch.setattr(decode, "NEW_TOKENS", 3)
    monkeypatch.setattr(decode, "PASSES", TINY)
    monkeypatch.setattr(decode, "Pool", lambda device, size: None)
    monkeypatch.setattr(decode, "Meter", FakeMeter)
    monkeypatch.setattr(decode, "time_replays", lambda replay: Clock()(replay))
    monkeypatch.setattr(decode, "machine", lambda said: {"gpu": "fake", "date": "d"})
    monkeypatch.setattr(decode.launch_tables, "device_key", lambda device: "sm_90")
    monkeypatch.setattr(decode, "in_processes", lambda work, arguments, workers, limit: [f"{workers} at it"])
    monkeypatch.setattr(decode, "random_model", lambda name: tiny(eos_token_ids=()))
    monkeypatch.setattr(decode, "hugging_face", lambda model, context: Timing(2.0, 2.0, 2.0))
    if other_bits:
        monkeypatch.setattr(passes.torch, "equal", lambda a, b: False)
    out = tmp_path / "d.json"
    assert decode.main(["--models", "8B", "--contexts", "9", "--json", str(out)]) == int(other_bits)
    said = capsys.readouterr().out
    assert "at it" in said and "read roof 3000 GB/s" in said and "left out" not in said
    assert ("not measured: 8B, verify-8, context 9, ours: WRONG" in said) == other_bits
    got = json.loads(out.read_text())
    assert len(got["passes"]) == (4 if other_bits else 5) and got["left_out"] == 0
    assert [r["model"] for r in got["generate"]] == ["8B", "8B", "embedded", "embedded"]
    assert got["peers"][0]["us"]["median"] == 2.0 and len(got["notes"]) == 1
    assert "8B, context 1024: 0.00 ms a token" in got["notes"][0]


def test_the_page_on_performance_is_made_from_the_recorded_runs():
    run, peers = (json.loads(path.read_text()) for path in (performance.RUN, performance.PEERS))
    page = performance.PAGE.read_text()
    all_runs = run, peers, *map(performance.read, (performance.BATCH_RUNS, performance.SERVE_RUNS))
    assert performance.rewritten(page, *all_runs) == page
    assert performance.rewritten("<!-- memory -->\nold\n<!-- end -->\n", *all_runs).count("| 8B |") == 1
    with pytest.raises(KeyError, match="no table is called 'nothing'"):
        performance.rewritten("<!-- nothing -->\n<!-- end -->", *all_runs)


@pytest.mark.parametrize("text", ["[]", "{}", "no JSON", '{"roof": null, "passes": [], "machine": {}}'])
def test_what_is_no_run_leaves_the_page_alone(text, tmp_path, refused):
    before, file = performance.PAGE.read_text(), tmp_path / "run.json"
    file.write_text(text)
    assert "give whole runs of bench.decode" in refused(performance.main, "--run", str(file))
    assert performance.PAGE.read_text() == before


def test_shapes_in_codes():
    """8B in 8 and 4 bits: the bytes of a token, and a model whose views are both quantised."""
    dense = weight_bytes(WHOLE["8B"].config(), ar=True, diffusion=False)
    head = 2 * WHOLE["8B"].V * WHOLE["8B"].E
    for name, least, most in (("8B-fp8", 0.5, 0.52), ("8B-int4", 0.25, 0.28)):
        config = WHOLE[name].config()
        codes = weight_bytes(config, ar=True, diffusion=False) - head
        assert least < codes / (dense - head) < most, name
        layer = Qwen3.from_config(config, device="meta").layers[0]
        assert {of.scheme.format.value for of in (layer.ar.qkv, layer.gate_up)} == {name.partition("-")[2]}
        assert layer.diffusion.qkv.scheme.format.value == "fp8"
