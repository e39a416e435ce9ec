"""Bad options of the benches and tools end with one line on stderr, exit code 2 and nothing on stdout."""

import shlex

import pytest

from bench import acceptance, decode, first_token, kernels
from tools import check_kernel

COMMANDS = {
    "acceptance": acceptance, "check_kernel": check_kernel, "decode": decode, "first_token": first_token,
    "kernels": kernels,
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    "arguments, word",
    [(["--json", "/nowhere/at/all.json"], "cannot write"), (["--json", "/"], "cannot write"),
     (["--nonsense"], "unrecognized arguments")],
)  # fmt: skip
def test_options_that_all_have(name, arguments, word, refused):
    operation = ["swiglu"] if name == "check_kernel" else []
    assert word in refused(COMMANDS[name].main, *operation, *arguments)


@pytest.mark.parametrize(
    "command, words, said",
    [
        (acceptance, "--nodes 256", "'256' is not auto or a number of nodes, 0 (a chain) to 255"),
        (acceptance, "--temperatures inf", "'inf' is not a temperature"),
        (acceptance, "--temperatures hot", "'hot' is not a temperature, 0 or above"),
        (acceptance, "--limit 0", "'0' is not a whole number"),
        (acceptance, "/nowhere/prompts.jsonl", "there is no file"),
        (acceptance, "--top-p 2 --limit 1 --device cpu --temperatures 1", "top_p"),
        (check_kernel, "''", "invalid choice: ''"),
        (check_kernel, "softmax", "'linear'"),
        (check_kernel, "", "required: OP"),
        (check_kernel, "swiglu --base no-such-commit", "cannot export 'no-such-commit'"),
        (check_kernel, "swiglu --base --output=x", "expected one argument"),
        (check_kernel, "swiglu --rows 0", "whole number"),
        (decode, "--contexts 0", "'0' is not a whole number"),
        (decode, "--contexts 40k", "40960 is more than 40704"),
        (decode, "--models 70B", "invalid choice: '70B'"),
        (decode, "--profile everything", "invalid choice: 'everything'"),
        (decode, "--seconds soon", "'soon' is not a whole number"),
        (decode, "--plot /", "cannot write"),
        (decode, "--models", "expected at least one argument"),
        (decode, "--strong", "--strong takes ranks"),
        (decode, "--replay t.json --shape 11 24", "--shape is of --strong"),
        (decode, "--replay a.json b.json --strong", "from one trace"),
        (decode, "--replay t.json --trees 20", "invalid choice"),
        (decode, "--trees 15", "--trees is of --replay"),
        (first_token, "--prompts 0", "'0' is not a whole number"),
        (first_token, "--models 70B", "invalid choice: '70B'"),
        (kernels, "--rows 0", "'0' is not a whole number"),
        (kernels, "--rows 5000", "more than 4096"),
        (kernels, "--contexts 1m", "'1m' is not a whole number"),
        (kernels, "--contexts 2048k", "more than 1024k"),
        (kernels, "--ops softmax", "invalid choice: 'softmax'"),
    ],
)
def test_options_of_one(command, words, said, refused):
    assert said in refused(command.main, *shlex.split(words))
