"""Dependent launches (pdl.py): compiled for sm_90, no kernel of a pass touches before its wait what another
kernel may be writing, and none computes otherwise; the settings that turn them on."""

from functools import partial

import pytest
import torch
from compiled import compiled_by
from ptx_order import sass_before_wait, touches_before_wait
from small import small_model

from orthrus_kernels import backend_ops, pdl

PREFETCH = "prefetch.global.L2"
# What a kernel may read before it waits: weights, which no kernel of a pass writes. All others: nothing.
READS = {
    "rms_norm_kernel": {"weight", "weight_diff"},
    "qk_norm_rope_kernel": {"q_norm", "k_norm", "q_norm_diff", "k_norm_diff"},
}
ASKS_L2_FOR = {
    "linear_kernel": {"p_w", "p_w_diff"}, "linear_swiglu_kernel": {"p_w"}, "head_kernel": {"w"},
}  # fmt: skip
# Parameters that are no addresses: sizes, strides and view borders choose among those pointers.
NUMBERS = {"first_diff", "n_ar", "T", "N", "F", "K", "sw_n", "prefetch"}
KERNELS = {
    "rms_norm_kernel", "qk_norm_rope_kernel", "swiglu_kernel", "embedding_kernel", "quantise_rows_kernel",
    "partial_kernel", "combine_kernel", "path_kernel", "whole_kernel", "linear_kernel",
    "linear_swiglu_kernel", "head_kernel", "merge_kernel",
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(triton_cache):
    return compiled_by("compile_pdl.py", triton_cache)


def test_one_argument_makes_every_launch_of_a_pass_a_dependent_one(compiled):
    assert {line["kernel"] for line in compiled} == KERNELS
    assert all(line["launch_pdl"] == [False, True] and line["waits_off"] == 0 for line in compiled)


def test_before_the_wait_weights_are_read_and_nothing_else(compiled):
    for line in compiled:
        kernel, found = line["kernel"], line["before_wait"]
        for opcode, made_of in found:
            allowed = {"ld.global": READS, PREFETCH: ASKS_L2_FOR}.get(opcode, {}).get(kernel, set())
            assert set(made_of) & allowed and set(made_of) <= allowed | NUMBERS, (
                line["case"],
                opcode,
                made_of,
            )
        assert bool(found) == (kernel in READS or kernel in ASKS_L2_FOR), line


def test_the_assembler_moves_nothing_over_the_wait(compiled):
    for line in compiled:
        loads = [op for op, _ in line["before_wait"] if op != PREFETCH]
        in_sass = [op for op in line["sass_before_wait"] if not op.startswith("CCTL.E.PF2")]
        assert len(in_sass) == len(loads) and all(op.startswith("LDG") for op in in_sass), line
        asks = len(loads) < len(line["before_wait"])  # in a loop, which the assembler unrolls
        assert asks == (len(in_sass) < len(line["sass_before_wait"])), line


def test_dependent_launches_compute_the_same(compiled):
    """As many floating-point and shuffle instructions of each kind: the same layouts, so the same sums."""
    assert all(line["same_arithmetic"] for line in compiled)
    assert all(line["arithmetic"] > 20 for line in compiled if line["kernel"] != "embedding_kernel")


def test_none_spills(compiled):
    assert not [line for line in compiled if line["spill_bytes"]]


NAMES = ["x", "weight"]
WEIGHT_FIRST = """
    ld.param.b64 %rd1, [_k_param_0];
    mov.b64 %rd9, _k_param_1;
    ld.param.b64 %rd2, [%rd9];
    setp.lt.s32 %p1, %r1, %r2;
    @%p1 bra $L__BB0_2;
    add.s64 %rd3, %rd2, 16;
    @%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd3 + 0 ];
$L__BB0_2:
    griddepcontrol.wait; // dummy %r11
    ld.global.b32 %r6, [%rd1];
    ret;
"""


def test_the_reader_of_ptx_finds_what_it_is_for():
    assert touches_before_wait(WEIGHT_FIRST, NAMES) == [("ld.global", ["weight"])]
    wrong = WEIGHT_FIRST.replace("add.s64 %rd3, %rd2, 16", "add.s64 %rd3, %rd1, 16")
    assert touches_before_wait(wrong, NAMES) == [("ld.global", ["x"])]
    for opcode in ("st.global.b32 [%rd1], %r3", "atom.global.gpu.acq_rel.add.u32 %r3, [%rd1], 1",
                   "cp.async.cg.shared.global [ %r3 + 0 ], [ %rd1 + 0 ], 0x10, 0x10",
                   "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                   "[%r1], [%rd1], [%r2]"):  # fmt: skip
        found = touches_before_wait(WEIGHT_FIRST.replace("mov.b64 %rd9", opcode + ";\nmov.b64 %rd9"), NAMES)
        assert len(found) == 2 and "x" in found[0][1], opcode


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        ("griddepcontrol.wait;", "@%p1 griddepcontrol.wait;", "without a predicate"),
        ("griddepcontrol.wait;", "", "one wait"),
        ("add.s64 %rd3", "@%p1 ret;\nadd.s64 %rd3", "leaves"),
        ("bra $L__BB0_2", "bra $L__BB0_7", "jumps over"),
    ],
)
def test_the_reader_of_ptx_refuses_paths_around_the_wait(before, after, what):
    with pytest.raises(ValueError, match=what):
        touches_before_wait(WEIGHT_FIRST.replace(before, after, 1), NAMES)


def test_the_reader_of_sass():
    assert sass_before_wait("LDC.64 R4 ; @P0 LDG.E.128 R8 ; STG.E R2 ; ACQBULK ; LDG.E R1 ;") == [
        "LDG.E.128",
        "STG.E",
    ]
    with pytest.raises(ValueError):
        sass_before_wait("LDG.E R1 ;")


def test_kinds_reach_their_operations():
    ops = backend_ops("triton", pdl={"rowwise", "attention", "signals"})
    dependent = {name: op.keywords for name, op in vars(ops).items() if isinstance(op, partial)}
    small = ("add_rms_norm", "embedding", "qk_norm_rope", "rms_norm", "attention")
    assert dependent == {name: {"pdl": True} for name in small} | {
        name: {"pdl": True, "early": False} for name in ("linear", "linear_swiglu", "head")
    }
    assert backend_ops("triton") == backend_ops("triton", pdl=())
    assert backend_ops("torch", pdl={"linear"}) == backend_ops("torch"), (
        "no kernels of ours, so none dependent"
    )


@pytest.mark.parametrize("kinds", [{"norms"}, {"linear", "signals"}])
def test_kinds_that_do_not_go(kinds):
    with pytest.raises(ValueError, match="rowwise, attention, signals, linear"):
        backend_ops("triton", pdl=kinds)


def test_a_model_launches_so_only_where_the_device_can(monkeypatch):
    """Turned on for every model, an interpreted one still has ordinary launches."""
    monkeypatch.setattr(pdl, "PDL", frozenset({"rowwise", "linear"}))
    assert not pdl.pdl_kinds(torch.device("cpu")) and not pdl.pdl_kinds(torch.device("meta"))
    assert small_model(backend="triton").ops == backend_ops("triton")
    monkeypatch.setattr(pdl, "triton_interprets", lambda: False)
    for key, has in {"sm_89": False, "gfx942": False, "sm_90": True, "sm_120": True}.items():
        monkeypatch.setattr(pdl.tables, "device_key", lambda _, key=key: key)
        assert bool(pdl.pdl_kinds(torch.device("cpu"))) is has, key
