"""Pieces of prompts behind the trees of a verify pass: they have the bits of `prefill`, the texts that decode
have the bits that they have without them, and no other place of the cache is written."""

import pytest
import torch
from interpreter import DEVICE
from small import small_model

from orthrus_kernels import FORMS, Sampling
from orthrus_kernels.layout import State
from qwen3_model.decode.cycle import Slots
from qwen3_model.decode.prompt_rows import Piece
from qwen3_model.decode.two_pass import TwoPassCycle

DECODING = {4: [3, 4, 5, 6, 7], 1: list(range(20, 53))}  # texts by slots
PROMPTS = {3: list(range(9, 30)), 0: [8], 5: [1, 2, 3]}
# What three launches carry: the end of a prompt behind its beginning, and nothing in the last one.
CARRIED = [[(0, 0, 1), (3, 0, 15)], [(3, 15, 21), (5, 0, 3)], []]


def running(model, riders, nodes, block):
    """A cycle of three seats, two of them taken, and its slots; pages hold NaN where nothing is committed."""
    cache = model.new_cache(100, sequences=7)
    for pool in (cache.keys, cache.values):
        pool.fill_(float("nan"))
    slots = Slots(model, cache, 7)
    for slot, tokens in DECODING.items():
        model.prefill(tokens[:-1], cache, slot)
        slots.choice.put(slot, Sampling(), tokens, len(tokens))
        slots.put(slot, {State.START: len(tokens) - 1, State.ROOT: tokens[-1], State.LEFT: 50,
                         State.FINISHED: 0, State.ROOM: 100, State.NODES: 99}, tokens)  # fmt: skip
    slots.choice.form = FORMS[0]
    cycle = TwoPassCycle(slots, 3, nodes, block, riders=riders)
    cycle.seat(list(DECODING))
    return cycle, slots


def launched(cycle):
    return [(end.run.tokens, end.run.logprobs) for end in cycle.launch(None)()[:2]]


@pytest.mark.parametrize(("nodes", "block"), [(-1, 0), (0, 3), (3, 3)], ids=["plain", "chain", "tree"])
@pytest.mark.parametrize(("backend", "dtype"), [("reference", "bfloat16"), ("triton", "float32")])
def test_pieces_ride_behind_trees(backend, dtype, nodes, block):
    model = small_model(dtype, backend=backend, device=DEVICE, num_hidden_layers=1)
    with torch.inference_mode():
        alone, _ = running(model, 0, nodes, block)
        cycle, slots = running(model, 18, nodes, block)
        states = {}
        for carried in CARRIED:
            pieces = [Piece(PROMPTS[slot][first:end], first, slot) for slot, first, end in carried]
            cycle.riders.fill(pieces)
            assert launched(cycle) == launched(alone)
            states |= {of.slot: state.clone() for of, state in zip(pieces, cycle.riders.states, strict=False)}
        for slot, tokens in PROMPTS.items():
            own = model.new_cache(100)
            logits = model.ops.linear(states[slot][None], model.head, out_dtype=torch.float32)[0]
            assert torch.equal(logits, model.prefill(tokens, own)), slot
            for got, want in zip(slots.cache.read(slot, 100), own.read(0, len(tokens)), strict=True):
                assert torch.equal(got[:, :, : len(tokens)], want) and got[:, :, len(tokens) :].isnan().all()
        for slot in DECODING:
            for got, want in zip(slots.cache.read(slot, 100), alone.slots.cache.read(slot, 100), strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert slots.cache.read(2, 100)[0].isnan().all()
