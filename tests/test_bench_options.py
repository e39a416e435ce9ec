"""Bad options of the benches and tools end with one line on stderr, exit code 2 and nothing on stdout."""

import argparse
import os
import shlex
import socket
import stat

import pytest

from bench import (
    acceptance,
    command,
    decode,
    first_token,
    grammars,
    kernels,
    levers,
    linears,
    selector,
    serve,
    tune_codes,
)
from tools import check_kernel

COMMANDS = {
    "acceptance": acceptance, "check_kernel": check_kernel, "decode": decode, "first_token": first_token,
    "grammars": grammars,
    "kernels": kernels, "levers": levers, "linears": linears, "selector": selector, "serve": serve,
    "tune_codes": tune_codes,
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
        (grammars, "--ways trees", "invalid choice: 'trees'"),
        (grammars, "--models 70B", "invalid choice: '70B'"),
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
        (decode, "--selectors 64", "--selectors is of --replay"),
        (decode, "--replay t.json --selectors 0 257", "--selectors are ranks of 0 to 256"),
        (decode, "--replay t.json --seconds 9", "--seconds is of runs without"),
        (decode, "--replay t.json --contexts 40k --tokens 900", "--contexts 40960 is more than 39804"),
        (decode, "--contexts 41k", "--contexts 41984 is more than 40704"),
        (decode, "--replay t.json --plot p.png", "--plot is of runs without"),
        (decode, "--prompts 3", "--prompts is of --replay and --batch"),
        (decode, "--tokens 3", "--tokens is of --replay and --batch"),
        (decode, "--batch 2 --plot p.png", "--plot is of runs without"),
        (decode, "--batch 2 --profile", "--profile is of runs without"),
        (decode, "--batch 2 --workers 3", "--workers is of runs without"),
        (decode, "--batch 2 --trees 15", "--trees is of --replay"),
        (decode, "--batch 2 --shape 11 24", "--shape is of --strong"),
        (decode, "--batch 2 --models 8B --prompts 3", "--prompts with --batch is of embedded"),
        (decode, "--batch 2 --models 8B --tokens 3", "--tokens with --batch is of embedded"),
        (decode, "--batch 2 --models embedded --lengths l --prompts 3", "without --lengths"),
        (decode, "--batch 2 --lengths l --contexts 1k", "--contexts with --batch is of random weights"),
        (decode, "--batch 2 --models embedded --contexts 1k", "--contexts with --batch is of random weights"),
        (first_token, "--prompts 0", "'0' is not a whole number"),
        (first_token, "--models 70B", "invalid choice: '70B'"),
        (levers, "--arms recipe own+more", "'own+more' is not 'recipe' or some of own, survival"),
        (levers, "--seconds 0", "--seconds is 0.0"),
        (kernels, "--rows 0", "'0' is not a whole number"),
        (kernels, "--rows 5000", "more than 4096"),
        (kernels, "--contexts 1m", "'1m' is not a whole number"),
        (kernels, "--contexts 2048k", "more than 1024k"),
        (kernels, "--ops softmax", "invalid choice: 'softmax'"),
    ],
)
def test_options_of_one(command, words, said, refused):
    assert said in refused(command.main, *shlex.split(words))


def test_what_is_no_file_is_never_replaced(tmp_path, monkeypatch, refused):
    """Devices, pipes and sockets stay; a link to a file is one."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        os.symlink("pipe", "link")
        for name in ("pipe", "socket", "link"):
            for option in ("--json", "--plot"):
                assert "it is not a file" in refused(kernels.main, option, name)
            assert not stat.S_ISREG(os.stat(name).st_mode)
    with pytest.raises(argparse.ArgumentTypeError, match="leads nowhere"):
        os.symlink("nowhere", "broken")
        command.writable("broken")
    os.symlink("file.json", "good")
    (tmp_path / "file.json").write_text("old")
    assert kernels.main(["--quick", "--ops", "swiglu", "--json", str(command.writable("good"))]) == 0
    assert os.path.islink("good") and '"cases"' in (tmp_path / "file.json").read_text()
