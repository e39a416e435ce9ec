"""Tables built by the kernel are the twin's, place by place, in memory that holds other numbers before."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import examples
from interpreter import DEVICE
from plans import plans, tables_for

from orthrus_kernels import Rows
from orthrus_kernels.lay import lay
from orthrus_kernels.lay_triton import lay_triton
from orthrus_kernels.pass_tables import PassTables
from orthrus_kernels.plan import PassPlan

TABLES = ("rows", "limits", "tiles", "slots", "items", "count", "row_segments")


def on(plan, device):
    """A copy of a plan on a device; a place of a state of 4 for each sequence's start."""
    names = ("tokens", "positions", "parents", "blocks", "sequences")
    state = torch.zeros(len(plan.start), 4, dtype=torch.int32)
    state[:, 0] = plan.start
    state = state.to(device)
    copies = {name: getattr(plan, name).to(device, copy=True) for name in names}
    return replace(plan, start=state[:, 0], **copies), state


def assert_same(got, want):
    for name in TABLES:
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name


# of tables; path tiles may have fewer rows than others
FORMS = ({}, {"whole": True}, {"shared": True}, {"shared": True, "path_rows": 2})


@examples(60)
@given(plan=plans(), height=st.integers(2, 9), form=st.sampled_from(FORMS), extra=st.integers(0, 3))
def test_the_kernel_lays_what_the_twin_does(plan, height, form, extra):
    shape = replace(plan.shape, lines=plan.shape.lines + extra, depth=plan.shape.depth + extra)
    plan = replace(plan, shape=shape)
    want, got = tables_for(shape, height, **form), tables_for(shape, height, **form, device=DEVICE)
    lay(plan, want)
    there, state = on(plan, DEVICE)
    for start in (plan.start + 5, plan.start):  # nothing of the pass before is left
        there.positions.copy_(plan.positions + (start - plan.start)[plan.sequences.clamp(min=0).long()])
        state[:, 0] = start
        lay_triton(there, got)
    got.slots.masked_fill_(want.slots.to(DEVICE) == -77, -77)
    got.items[int(want.count) :] = -77
    assert_same(got, want)


@examples(30)
@given(st.data())
def test_rows_at_the_root(data):
    """Chains and blocks behind wherever their sequences have got to."""
    singles = []
    for s in data.draw(st.permutations(range(4)))[: data.draw(st.integers(1, 3))]:
        n, chain = data.draw(st.integers(1, 40)), data.draw(st.booleans())
        singles.append(Rows.chain([1] * n, 0, s) if chain else Rows.block(1, n, 0, 96, s))
    plan = PassPlan.of(Rows.batch(singles))
    state = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, 150), min_size=3, max_size=3),
                         min_size=len(plan.start), max_size=len(plan.start))), dtype=torch.int32)  # fmt: skip
    form = data.draw(st.sampled_from(FORMS))
    want, got = tables_for(plan.shape, 4, **form), tables_for(plan.shape, 4, **form, device=DEVICE)
    there, _ = on(plan, DEVICE)
    there, plan = replace(there, start=state.to(DEVICE)[:, 2]), replace(plan, start=state[:, 2])
    lay(plan, want, root=state[:, 0])
    lay_triton(there, got, root=state.to(DEVICE)[:, 0])
    assert_same(got, want)
    assert torch.equal(there.tokens.cpu(), plan.tokens) and torch.equal(there.positions.cpu(), plan.positions)


@pytest.mark.parametrize(
    "rows",
    [
        Rows.chain([1] * 600, 3000),
        Rows.tree([1] * 256, [-1, *(max(0, i - 3) for i in range(255))], 20_000),
        Rows.batch([Rows.chain([1], 700 * s, s) for s in range(64)]),
    ],
    ids=["a prompt", "a deep tree", "many sequences"],
)
def test_large_passes(rows):
    plan = PassPlan.of(rows)
    for form in FORMS:
        how = {"whole": False} | form
        want, got = (PassTables.new(plan.shape, 60_000, 16, device=d, **how) for d in ("cpu", DEVICE))
        for tables in (want, got):
            for name in TABLES:
                getattr(tables, name).fill_(-77)
        lay(plan, want)
        lay_triton(on(plan, DEVICE)[0], got)
        assert_same(got, want)


def test_a_pass_of_padding_alone():
    """Nothing to do, and nothing left of the pass before."""
    for form in FORMS:
        plan = PassPlan.of(Rows.tree([1] * 9, [-1, *(i // 2 for i in range(8))], 40))
        tables = [tables_for(plan.shape, 4, device=device, **form) for device in ("cpu", DEVICE)]
        for sequence in (0, -1):
            plan.sequences.fill_(sequence)
            lay(plan, tables[0])
            lay_triton(on(plan, DEVICE)[0], tables[1])
        assert_same(tables[1], tables[0])
        assert int(tables[0].count) == 0 and not tables[0].row_segments.any()
