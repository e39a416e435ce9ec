"""Attention in Gluon over torch: indices, masks and the protocol between warps (gluon_threads.py); and when
it is chosen. Its bits: tests/gpu/test_attention_gluon.py."""

from dataclasses import replace

import pytest
import test_attention as twin
import torch
from gluon_threads import ATTENTION, Threads
from plans import padded

from orthrus_kernels import PassPlan, PassShape, Rows, attention, lay
from orthrus_kernels import attention_either as either
from orthrus_kernels import attention_gluon as module
from orthrus_kernels.attention_compared import Inputs
from orthrus_kernels.attention_gluon import attention_gluon, new_tables_gluon, takes
from orthrus_kernels.pass_tables import PassTables
from orthrus_kernels.tiles import ROW_TILE

QUERIES = torch.empty(0, 32, 128, dtype=torch.bfloat16)  # of 8B
CPU, SCALE = torch.device("cpu"), 128**-0.5


@pytest.fixture
def threads(monkeypatch):
    """The kernel over torch, on a GPU of 5 multiprocessors."""
    kernel = Threads("_attention_gluon_kernel", ATTENTION)
    monkeypatch.setattr(module, "_attention_gluon_kernel", kernel)
    monkeypatch.setattr(module, "multiprocessors", lambda device: 5)
    return kernel


def difference(plan, inputs, form):
    """Largest difference from the twin over its largest output, of rows that are not padding. form: of
    Gluon's tables; from the states of the shared one Triton's kernel goes on."""
    q, k, v, *caches = (inputs.q, inputs.k, inputs.v, inputs.k_cache, inputs.v_cache, inputs.pages)
    outputs, capacity = [], int(plan.positions.max()) + 100
    for run, height, of in (
        (attention_gluon, 128 * k.shape[1] // q.shape[1], form),
        (attention, ROW_TILE, "whole"),
    ):
        how = {"whole": of == "whole", "shared": of == "shared"}
        tables = PassTables.new(plan.shape, capacity, height, device=CPU, **how)
        tables.items.fill_(2**30)
        lay(plan, tables)
        outputs.append(run(q, k, v, *caches, tables, SCALE).double())
    used = plan.sequences >= 0
    got, want = (output[used] for output in outputs)
    return ((got - want).abs().max() / want.abs().max()).item()


TREE = Rows.tree_with_blocks([1] * 9, [-1, 0, 0, 1, 1, 3, 2, 5, 7], 330, [2, 5, 8], 6, 96)
SEVERAL = Rows.batch([TREE, Rows.chain([1] * 40, 64, 1), Rows.chain([1], 5, 2)])
PASSES = {  # rows, query heads
    "a tree with blocks beside chains": (SEVERAL, 8),
    "a chain of two tiles across a cut": (Rows.chain([1] * 40, 250), 16),
    "many rows of a tile": (Rows.chain([1] * 130, 33), 2),
}


@pytest.mark.parametrize("form", ["partial", "shared", "whole"])
@pytest.mark.parametrize("name", PASSES)
def test_against_the_twin(name, form, threads):
    """Pages in any order; NaN in foreign pages and behind contexts."""
    rows, heads = PASSES[name]
    if form == "whole" and len(rows.contexts) > 1:
        pytest.skip("prompts only")
    inputs = Inputs.random(rows, heads, 2, CPU)
    assert difference(PassPlan.of(rows), inputs, form) < 1.5e-2
    assert threads.programs in (4, 5)


@pytest.mark.parametrize("form", ["partial", "shared"])
@pytest.mark.parametrize("rows, places", [(TREE, [0, 12]), (Rows.chain([1] * 70, 240), [70])])
def test_padding_is_left_alone(rows, places, form, threads):
    """It holds NaN, also right behind a chain."""
    plan = padded(PassPlan.of(rows), places)
    used = plan.sequences >= 0
    inputs = Inputs.random(rows, 8, 2, CPU)
    wide = [t.new_full((len(used), *t.shape[1:]), float("nan")) for t in (inputs.q, inputs.k, inputs.v)]
    for t, of in zip(wide, (inputs.q, inputs.k, inputs.v), strict=True):
        t[used] = of
    spread = Inputs(wide[0], wide[1], wide[2], inputs.k_cache, inputs.v_cache, inputs.pages)
    assert difference(plan, spread, form) < 1.5e-2


@pytest.mark.parametrize("work, programs", [(1, 5), (5, 5), (8, 5), (12, 5), (20, 5), (33, 4)])
def test_every_pair_is_taken_once(work, programs, monkeypatch):
    """And of pairs that get shorter no program has all the longest."""
    import gluon_threads

    copy = gluon_threads.loaded(ATTENTION)
    items = torch.arange(2 * work, dtype=torch.int32)
    gluon_threads._memory.clear()
    tables = type("Tables", (), {
        "count": gluon_threads.address(torch.tensor([work])), "items": gluon_threads.address(items),
        "groups": 1, "programs": programs, "WHOLE": False,
    })  # fmt: skip
    taken = []
    for gluon_threads._program[0] in range(programs):
        taken.append([int(copy.work_at(tables, i)[0]) // 2 for i in range(copy.share_of(tables))])
    assert sorted(i for of in taken for i in of) == list(range(work))
    lengths = [sum(work - i for i in of) for of in taken]
    assert max(lengths) - min(lengths) <= work


def test_which_passes_it_takes():
    tree, bf16 = PassShape(192, 192, 192, 30, 1), torch.bfloat16
    assert takes(tree, 8192, 32, 8, 128, bf16)
    for refused in ((32, 8, 64, bf16), (32, 8, 128, torch.float32), (24, 8, 128, bf16)):
        assert not takes(tree, 8192, *refused)
    assert not takes(tree, 8191, 32, 8, 128, bf16), "few keys"
    assert not takes(replace(tree, sequences=2), 8192, 32, 8, 128, bf16), "many texts"
    assert takes(PassShape(64, 64, 3, 64, 8), 64, 32, 8, 128, bf16), "prompts"
    assert not takes(PassShape(63, 63, 1, 63, 1), 8192, 32, 8, 128, bf16), "few rows"
    for n, heads, whole in (
        (192, 32, False),
        (256, 32, False),
        (257, 32, True),
        (512, 16, False),
        (4096, 16, True),
    ):
        tables = new_tables_gluon(PassShape(n, n, 1, n, 1), 4096, heads, 8, CPU)
        assert (tables.whole, tables.tile_rows) == (whole, 128 * 8 // heads), (n, heads)
    tables = new_tables_gluon(PassShape(512, 512, 512, 30, 1), 4096, 32, 8, CPU)
    assert tables.shared and not tables.whole, "a tree"


@pytest.fixture
def hopper(monkeypatch):
    """As on a Hopper GPU."""
    monkeypatch.setattr(either, "triton_interprets", lambda: False)
    monkeypatch.setattr(either.launch_tables, "device_key", lambda device: "sm_90")
    monkeypatch.setattr(either, "_verdicts", {})
    return monkeypatch


def chosen():
    """Whether tables for a wide tree are made for Gluon, and taken to it."""
    tables = either.new_tables_either(PassShape(192, 192, 192, 30, 1), 8192, 32, 8, 128, torch.bfloat16, CPU)
    taken = either.is_for_gluon(tables, QUERIES, 8)
    assert taken == (tables.tile_rows == 32)
    return taken


def test_it_runs_where_its_bits_are_tritons(hopper, capsys):
    asked = []
    hopper.setattr(either, "differences", lambda *of: asked.append(of) or "")
    assert chosen() and chosen() and len(asked) == 1
    assert capsys.readouterr().err == ""


def test_it_does_not_run_where_a_bit_differs_or_where_it_fails(hopper, capsys):
    hopper.setattr(either, "differences", lambda *of: "other bits, form whole")
    assert not chosen() and not chosen()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Triton's attention runs" in said and "form whole" in said
    either._verdicts.clear()

    def fails(*of):
        raise RuntimeError("no\nkernel")

    hopper.setattr(either, "differences", fails)
    assert not chosen()
    assert "RuntimeError: no kernel" in capsys.readouterr().err


def forms_of_trees():
    """(for Gluon, shared) of tables for a tree, for Gluon where it is long."""
    tree, how = PassShape(192, 192, 192, 30, 1), (32, 8, 128, torch.bfloat16, CPU)
    made = [either.new_tables_either(tree, capacity, *how) for capacity in (1024, 8192)]
    return [(tables.tile_rows == 32, tables.shared) for tables in made]


def test_trees_share_pages_in_gluon_where_that_changes_no_bit(hopper, capsys):
    """Each comparison runs once; where the shared form differs or fails, Gluon's trees take the partial one
    as Triton's do, and one line says so."""
    asked = []
    hopper.setattr(either, "_is_compiled", lambda device: True)
    hopper.setattr(either, "shared_differs", lambda *of: asked.append(of) or "")
    hopper.setattr(either, "differences", lambda *of: asked.append(of[3]) or "")
    assert forms_of_trees() == [(False, False), (True, True)] == forms_of_trees()
    assert asked == [(32, 8, 128, torch.bfloat16, CPU), ("partial", "whole", "shared")]
    assert capsys.readouterr().err == ""

    def fails(*of):
        raise RuntimeError("out of registers")

    for differs, said in (
        (lambda *of: "other bits", "other bits"),
        (fails, "RuntimeError: out of registers"),
    ):
        either._verdicts.clear()
        hopper.setattr(either, "shared_differs", differs)
        assert forms_of_trees() == [(False, False), (True, False)] == forms_of_trees()
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and "trees attend in the partial form" in line and said in line
    assert asked[2:] == [("partial", "whole")] * 2


def test_the_switch(hopper):
    hopper.setattr(either, "differences", lambda *of: "")
    hopper.setenv("ORTHRUS_GLUON", "off")
    assert not chosen()
    hopper.setenv("ORTHRUS_GLUON", "sometimes")
    with pytest.raises(ValueError, match="ORTHRUS_GLUON is on or off"):
        chosen()


def test_tables_of_tritons_prompts_are_tritons_until_gluon_is_trusted(hopper):
    """Their tiles are as tall."""
    prompt = PassTables.new(PassShape(300, 300, 1, 300, 1), 4096, 32, True, CPU)
    assert not either.is_for_gluon(prompt, QUERIES, 8)
    hopper.setattr(either, "differences", lambda *of: "")
    assert chosen() and either.is_for_gluon(prompt, QUERIES, 8)
    for other in (QUERIES[..., :64], QUERIES.float()):
        assert not either.is_for_gluon(prompt, other, 8), "another model's"


def test_inputs_that_it_does_not_take_are_refused(threads):
    rows = Rows.chain([1] * 3, 5)
    q, k, v, *caches = twin.inputs(rows, torch.bfloat16)
    tables = PassTables.new(PassPlan.of(rows).shape, 100, 64, False, CPU)
    with pytest.raises(AssertionError):
        attention_gluon(q, k, v, *caches, torch.zeros(1, 1, dtype=torch.int32), tables, SCALE)
