"""Settings are declared once: what the library takes, the command line offers and is refused agree."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import small_config

from qwen3_model import InputError, cli
from qwen3_model.kinds import MOST_NODES
from qwen3_model.request import Request
from qwen3_model.settings import pick_device

NAMES = [declared.name for declared in fields(Request)]
OPTIONS = [name for name in NAMES if name != "cache_salt"]  # a command has one text at a time
WRONG = {
    "strategy": [None, 5, [], b"auto", "magic"],
    "max_new_tokens": [0, -1, 4.5, "4", True, [4], 2.0],
    "min_tokens": [-1, None, 1.0, "3", True],
    "block_size": [4.0, "4", [4], True],
    "tree_nodes": [-1, MOST_NODES + 1, "7", 2.0, None, True, []],
    "verify": [None, 1, "typical"],
    "stop": [5, [""], "", ["a", 3], [None], b"x", range(10**12), torch.tensor([1.0, 2.0])],
    "stop_token_ids": [5, "5", b"5", [1.5], ["5"], [None], [True], range(17), [1] * 17, {5: 1}, [10**5000]],
    "ignore_eos": [None, 0, 1, "true"],
    "temperature": [None, "0.7", -1, math.nan, math.inf, 1e-40, 10**400, True, [0.7], 1j],
    "top_k": [None, -2, 10**5000, 2.0, math.inf, "5", True],
    "top_p": [None, 0.0, 1.5, math.nan, "0.9"],
    "min_p": [None, -0.1, 2.0, math.nan],
    "repetition_penalty": [None, 0.0, 1e-300, math.inf, "1"],
    "frequency_penalty": [None, 2.01, -3, math.nan, "1", True],
    "presence_penalty": [None, -2.01, 10**400, math.nan, "1", True],
    "logit_bias": [5, [(5, 1.0)], {1.5: 1.0}, {"x": 1.0}, {5: "1"}, {5: None}, {5: 10**400}, {5: math.inf},
                   {5: math.nan}, {"5": 1.0, 5: 2.0}, {True: 1.0}],
    "seed": [-1, 2**64, 1.5, "3", True, -(10**5000)],
    "top_logprobs": [-1, 21, None, 1.0, "3", True],
    "grammar": [5, {"type": "object"}, "{}", b"", True],
    "cache_salt": [None, 5, b"x", ["x"], "x" * 513],
}  # fmt: skip
CASES = [(name, value) for name, values in WRONG.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{n} {i}" for i, (n, _) in enumerate(CASES)])
def test_an_impossible_value_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=name if name != "stop" else "stop"):
        Request(**{name: value})


def test_every_setting_has_wrong_values_here():
    assert list(WRONG) == NAMES


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.just(10**400)
KEYS = st.integers() | st.text() | st.floats()
ANYTHING = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner))


@given(st.sampled_from(NAMES), ANYTHING)
def test_any_value_is_taken_or_refused_by_name(name, value):
    try:
        Request(**{name: value})
    except InputError as error:
        assert name in str(error) and len(str(error)) <= 500


def test_numbers_of_other_libraries_and_keys_of_json_are_numbers():
    asked = Request(
        temperature=np.float32(0.5), top_k=np.int64(3), seed=torch.tensor(7), max_new_tokens=np.int8(4),
        logit_bias={"65": 1, 66: -math.inf}, stop="x",
    )  # fmt: skip
    assert (asked.temperature, asked.top_k, asked.seed, asked.max_new_tokens) == (0.5, 3, 7, 4)
    assert asked.logit_bias == {65: 1.0, 66: -math.inf} and asked.stop == ("x",)
    assert asked.sampling.logit_bias == asked.logit_bias and asked.sampling.seed == 7


def test_a_setting_that_is_not_one_is_a_mistake_of_the_program():
    with pytest.raises(TypeError, match="temprature"):
        Request(temprature=1.0)


def test_a_fitted_request_leaves_nothing_open():
    fitted = Request().fit(small_config(), 10, has_text=False)
    assert (fitted.strategy, fitted.max_new_tokens, fitted.block_size) == ("auto", 1014, 8)
    assert isinstance(fitted.seed, int) and fitted.fit(small_config(), 10, has_text=False) == fitted
    plain = Request(block_size=5).fit(small_config(block_size=0, mask_token_id=-1), 10, has_text=False)
    assert (plain.strategy, plain.block_size) == ("auto", 0)


def test_the_command_line_offers_every_setting_with_its_words_and_reads_its_own_values(capsys):
    parser = cli._parser()
    args = parser.parse_args(["generate", "x"])
    assert [name for name in NAMES if hasattr(args, name)] == OPTIONS
    line = [
        "generate",
        "x",
        "--temperature",
        "0.5",
        "--tree-nodes",
        "7",
        "--logit-bias",
        "5=-inf",
        "--stop",
        "a",
    ]
    args = parser.parse_args(line)
    given = {name: getattr(args, name) for name in OPTIONS} | {"logit_bias": dict(args.logit_bias)}
    asked = Request(**given)
    assert (asked.temperature, asked.tree_nodes, asked.stop) == (0.5, 7, ("a",))
    assert asked.logit_bias == {5: -math.inf}
    with pytest.raises(SystemExit):
        parser.parse_args(["generate", "--help"])
    said = "".join(capsys.readouterr().out.split())  # lines break anywhere
    for declared in fields(Request):
        if declared.name not in OPTIONS:
            continue
        assert f"--{declared.name.replace('_', '-')}" in said
        if declared.name != "max_new_tokens":  # its default there is the verb's
            assert "".join(declared.metadata["says"].split()) in said, declared.name


@pytest.mark.parametrize("device", [[], ("cpu",), 1.5, "fridge", None])
def test_devices_of_any_type_are_refused_by_name(device):
    if device is None:
        assert pick_device(None).type in ("cpu", "cuda")
        return
    with pytest.raises(InputError, match="unknown device"):
        pick_device(device)
