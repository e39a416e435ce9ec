"""The benches without a GPU: options, what they say, figures put together from fake timings, and that the
calls of a case do the same work."""

import functools
import json
import math
import operator

import pytest
import torch
from interpreter import DEVICE

from bench import cases as all_cases
from bench import command, kernels, report
from bench.cases import OPS, OURS, Case
from bench.measure import Pool, Timing, _read_kernel
from bench.models import MODELS, Shape
from orthrus_kernels.backends import REFERENCE

gpu_free = pytest.mark.skipif(DEVICE != "cpu", reason="what is said where there is no GPU")
ROOFS = report.Roofs(3000.0, 700.0)
TOY = Shape(layers=2, E=96, H=4, F=80, G=2, D=16, V=130)


def toy_cases(monkeypatch, rows=(3, 9), contexts=(70,)):
    monkeypatch.setitem(MODELS, "toy", TOY)
    return list(all_cases.cases(OPS, ["toy"], rows, contexts, "sm_90"))


@pytest.mark.parametrize("op", OPS)
def test_the_calls_of_a_case_compute_the_same(op, monkeypatch):
    """Ours, interpreted, against every peer that runs here; on all copies of the inputs."""
    pool = Pool(torch.device(DEVICE), 1 << 17)
    for case in (c for c in toy_cases(monkeypatch) if c.op == op):
        pool.reset()
        copies, calls = case.build(pool)
        assert copies >= 2 and next(iter(calls)) == OURS
        ran = 0
        for i in (0, copies - 1):
            got = kernels.clone(calls[OURS](i))
            for name, call in calls.items():
                if name == OURS or isinstance(call, str) or name.startswith(("cuDNN", "efficient")):
                    continue
                assert kernels.difference(got, call(i)) < kernels.TOLERANCE, (case, name)
                ran += 1
        alone = "T " in case.name  # no peer can be captured
        assert (ran == 0) if alone else (ran >= 2), case


def test_the_comparison_can_fail(monkeypatch):
    """A case whose peer computes something else is not timed, and says so."""

    def build(pool):
        x = pool.take(4, 8)
        return 2, {OURS: lambda i: x, "peer": lambda i: x.roll(1, 0)}

    class NoMeter:
        pool = Pool(torch.device("cpu"), 256)

    result = kernels.measure(Case("swiglu", "8B", "", 4, None, 64, 0, build), NoMeter())
    assert not result.times and result.notes[OURS].startswith("WRONG")
    nan = torch.full((3,), float("nan"))
    assert kernels.difference(nan, torch.ones(3)) == 1


def test_every_operation_with_a_kernel_is_measured():
    """What builds a pass is a part of every cycle that `make bench-decode` times; swiglu is a part of another
    operation."""
    built = {"new_tables", "lay", "grow", "allot", "place_blocks", "follow", "lookup", "branch"}
    built |= {"walk", "seen_rows", "permit"}
    assert set(OPS) == set(vars(REFERENCE)) - built | {"swiglu"}


def test_models_of_one_shape_share_a_case():
    got = list(all_cases.cases(["attention", "linear"], ["0.6B", "1.7B"], [1], [1024], "sm_90"))
    assert [c.model for c in got if c.op == "attention"] == ["0.6B, 1.7B"]
    assert len([c for c in got if c.op == "linear"]) == 10


def test_bytes_and_flops_of_known_cases():
    linear, attention = all_cases.cases(["linear", "attention"], ["8B"], [1], [1024], "sm_90"), None
    by_name = {c.name: c for c in linear if c.op == "linear"}
    assert by_name["down"].bytes == 2 * (4096 * 12288 + 12288 + 4096)
    assert by_name["down"].flops == 2 * 4096 * 12288
    (attention,) = all_cases.cases(["attention"], ["8B"], [1], [1024], "sm_90")
    assert attention.bytes == 1025 * 8 * 128 * 2 * 2 + 2 * 32 * 128 * 2
    assert attention.flops == 4 * 32 * 128 * 1025


def test_a_pool_hands_out_pieces_that_do_not_overlap():
    pool = Pool(torch.device("cpu"), 1024)
    a, b = pool.take(3, 5), pool.take(100)
    assert a.data_ptr() % 16 == b.data_ptr() % 16 == 0
    assert b.storage_offset() >= a.storage_offset() + a.numel()
    with pytest.raises(ValueError, match="no 1000 numbers left"):
        pool.take(1000)
    pool.reset()
    assert pool.take(15).data_ptr() == a.data_ptr()


def test_the_roof_reads_everything():
    """Each number once: the exclusive or of all of them, by several programs."""
    x = torch.randint(2**31 - 1, (4096 * 5,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    y = torch.empty(3, dtype=torch.int32, device=DEVICE)
    _read_kernel[(3,)](x=x.to(DEVICE), y=y, n=x.numel(), BLOCK=4096)
    assert functools.reduce(operator.xor, y.tolist()) == functools.reduce(operator.xor, x.tolist())


def test_timing_is_median_and_spread():
    assert Timing.of([5.0, 1, 2, 3, 4, 6]) == Timing(3.5, 2.0, 5.0)


def fake_results(monkeypatch):
    """Times that can be checked by hand: ours twice the floor of the roof, peers three times."""
    results = []
    for case in toy_cases(monkeypatch):
        floor = case.bytes / ROOFS.read / 1e3
        times = {OURS: Timing(2 * floor, floor, 3 * floor), "peer": Timing(3 * floor, floor, 4 * floor)}
        notes = {"flex": "no time left"} if case.op == "attention" else {}
        results.append(report.Result(case, times, notes))
    results[0].times.clear()
    results[0].notes[OURS] = "WRONG: differs"
    return results


def test_tables_from_fake_timings(monkeypatch):
    made = report.tables(fake_results(monkeypatch), ROOFS)
    assert [title.split(":")[0] for title, _, _ in made] == list(OPS)
    for _, head, lines in made:
        assert all(len(line) == len(head) for line in lines)
    _, head, lines = made[0]
    assert lines[0][head.index("µs")] == "WRONG: differs" and lines[0][-1] == "-"
    assert lines[1][head.index("of roof")] == "50%" and lines[1][-1] == "1.50x"
    _, head, lines = made[OPS.index("attention")]
    assert lines[0][head.index("flex")] == "no time left" and lines[0][head.index("context")] == "70"


def test_tables_fit_80_columns(monkeypatch, capsys):
    """Columns for which there is no room stand below, again behind what tells the lines apart."""
    monkeypatch.setenv("COLUMNS", "80")
    made = report.tables(fake_results(monkeypatch), ROOFS)
    report.print_tables(made)
    said = capsys.readouterr().out
    assert "1.50x" in said and "WRONG" in said
    assert max(map(len, said.splitlines())) <= 80
    for title, head, lines in made:
        assert title in said and all(
            word in said for word in (*head, *(cell for line in lines for cell in line))
        )
    lines = [["a", "1", "xx", "yy"], ["a", "2", "xx", "yy"]]
    assert report.fitting(lines, [1, 1, 2, 2], 8) == [[0, 1, 2], [0, 1, 3]]
    assert report.fitting(lines, [1, 1, 2, 2], 12) == [[0, 1, 2, 3]]
    assert report.fitting(lines, [9, 9, 9, 9], 8) == [[0, 1, 2], [0, 1, 3]], "as narrow as can be"


def test_summary_is_a_geometric_mean_by_rows(monkeypatch):
    line = report.summary(fake_results(monkeypatch))[0]
    assert line.startswith("linear") and line.endswith("1.50 at 3, 1.50 at 9")


def test_json_of_a_run(monkeypatch, tmp_path):
    results = fake_results(monkeypatch)
    report.write_json(tmp_path / "k.json", report.to_json({"gpu": "fake"}, ROOFS, results, 4))
    got = json.loads((tmp_path / "k.json").read_text())
    assert got["roof"] == {"read_gb_s": 3000.0, "bf16_tflop_s": 700.0} and got["left_out"] == 4
    wrong, right = got["cases"][:2]
    assert wrong["us"] == {} and wrong["gb_s"] is None and wrong["notes"] == {OURS: "WRONG: differs"}
    assert right["share_of_read_roof"] == 0.5 and right["best_peer_over_ours"] == 1.5
    assert set(right["us"][OURS]) == {"median", "p20", "p80"}


def test_the_picture_is_drawn(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "roof.png", report.to_json({}, ROOFS, fake_results(monkeypatch), 0), "fake")
    assert (tmp_path / "roof.png").read_bytes()[:4] == b"\x89PNG"


def test_a_file_is_replaced_whole_or_not_at_all(monkeypatch, tmp_path):
    path = tmp_path / "t.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write_json(path, {"x": float("nan")})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        report.write_json(path, {"x": 1})
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["t.json"]


@gpu_free
def test_kernels_without_a_gpu_print_floors(capsys, tmp_path):
    out = tmp_path / "k.json"
    assert kernels.main(["--quick", "--json", str(out), "--plot", str(tmp_path / "x.png")]) == 0
    said = capsys.readouterr().out
    assert "No GPU here" in said and "floor at 3350 GB/s" in said
    got = json.loads(out.read_text())
    assert got["machine"]["gpu"] is None and got["left_out"] == len(got["cases"]) > 50
    assert {c["rows"] for c in got["cases"]} == {1, 32, 128}


def test_k_counts_1024():
    assert command.positive("40k") == 40960 and command.positive("7") == 7


@pytest.mark.parametrize("work, said", [(divmod, [0, 1]), (math.sqrt, None)])
def test_work_in_processes(work, said):
    """Worker i of 2 is called with (i, 2), and what both return is joined; one that raises leaves a line."""
    got = command.in_processes(work, (), 2, 60)
    assert got == said if said else len(got) == 1 and "TypeError" in got[0]
    assert command.in_processes(work, (), 1, 60) == []


class FakeMeter:
    """A meter of a GPU that is not there: runs each call once, says one microsecond a copy."""

    def __init__(self, pool, seconds):
        self.pool = pool

    def read_roof(self):
        return 3000.0

    def matmul_roof(self):
        return 700.0

    def time(self, call, copies):
        call(copies - 1)
        return Timing(copies, copies, copies)


def test_a_whole_run(monkeypatch, tmp_path, capsys):
    """`main` as on a GPU, toy shapes in the interpreter: all cases timed, files written, exit code 0."""
    monkeypatch.setitem(MODELS, "toy", TOY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels.launch_tables, "device_key", lambda device: "sm_90")
    monkeypatch.setattr(kernels, "machine", lambda said: {"gpu": "fake", "triton": "3", "date": "d"})
    monkeypatch.setattr(kernels, "in_processes", lambda *arguments: ["a worker's line"])
    monkeypatch.setattr(kernels, "Pool", lambda device, size: Pool(torch.device(DEVICE), 1 << 17))
    monkeypatch.setattr(kernels, "Meter", FakeMeter)
    out, picture = tmp_path / "k.json", tmp_path / "k.png"
    options = ["--models", "toy", "--rows", "3", "--contexts", "70", "--json", str(out)]
    assert kernels.main(options) == 0
    said = capsys.readouterr().out
    assert "a worker's line" in said and "read roof 3000 GB/s" in said and "left out" not in said
    got = json.loads(out.read_text())
    several = {"linear": 5, "head": 2, "choose": 9, "candidates": 4, "rerank": 2}
    assert [c["op"] for c in got["cases"]] == [op for op in OPS for _ in range(several.get(op, 1))]
    assert all(OURS in c["us"] for c in got["cases"]) and got["left_out"] == 0
    pytest.importorskip("matplotlib")
    assert kernels.main([*options[:-2], "--ops", "swiglu", "linear", "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 1000
