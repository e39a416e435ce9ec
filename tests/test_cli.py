"""Every verb through `main`, as a user calls it: what goes to stdout and stderr, and the exit code."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from tiny_folder import PROMPTS, edit_config, write_tiny

from qwen3_model import InputError, Qwen3, checkpoint
from qwen3_model.cli import VERBS, main
from qwen3_model.comparison import compare
from qwen3_model.decode.sequence import Sequence

SHELL = "import sys; from qwen3_model.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture
def embedded(tiny, monkeypatch):
    monkeypatch.setattr(checkpoint, "EMBEDDED", tiny)
    return tiny


@pytest.fixture
def orthrus(capsys):
    """Runs a command line; returns exit code, stdout, stderr."""

    def call(*args):
        code = main([str(arg) for arg in args])
        return code, *capsys.readouterr()

    return call


def stop_after(monkeypatch, passes: int) -> None:
    """Ctrl-C in the forward pass after `passes`."""
    states, count = Qwen3.states, iter(range(passes))

    def interrupted(self, *args):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return states(self, *args)

    monkeypatch.setattr(Qwen3, "states", interrupted)


@pytest.mark.parametrize("name", VERBS)
def test_help_of_every_verb_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0 and f"example: orthrus {name}" in capsys.readouterr().out


def test_help_lists_every_verb_and_does_not_wait_for_torch():
    code = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules));" + SHELL
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("False\n")
    assert all(f"\n    {name}" in done.stdout for name in VERBS)


def test_the_version_names_what_is_installed_and_does_not_wait_for_torch():
    code = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules));" + SHELL
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True)
    said, waited = done.stdout.splitlines()
    assert done.returncode == 0 and waited == "False" and torch.__version__ in said
    assert said.startswith("orthrus ") and "triton" in said and "Python 3." in said


def test_generate_streams_the_text_and_reports_on_stderr(tiny, orthrus):
    code, out, err = orthrus("generate", PROMPTS[0], "--model", tiny, "--max-new-tokens", 20)
    model = Qwen3.from_pretrained(tiny, device="cpu")
    wanted = model.generate(model.text.encode(PROMPTS[0]), max_new_tokens=20)
    assert code == 0 and out == wanted.text + "\n"
    assert (
        err.count("\n") == 1
        and " two-pass" in err
        and "plain): 20 tokens in" in err
        and "ended by length" in err
    )


def test_generate_json_is_the_result_for_every_strategy(tiny, orthrus):
    sampled = ("--temperature", 1, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01,
               "--repetition-penalty", 1.1, "--logit-bias", "7=2.5", "--logit-bias", "9=-inf",
               "--seed", 4)  # fmt: skip
    results = []
    for strategy in ("autoregressive", "two-pass"):
        code, out, _ = orthrus("generate", PROMPTS[0], "--model", tiny, "--strategy", strategy, "--json",
                               "--max-new-tokens", 30, "--block-size", 5, *sampled)  # fmt: skip
        results.append(json.loads(out))
        assert code == 0 and set(results[-1]) == {"text", "token_ids", "logprobs", "stats"}
        assert results[-1]["stats"]["strategy"] == strategy and results[-1]["stats"]["seed"] == 4
    plain, drafted = ({k: v for k, v in result.items() if k != "stats"} for result in results)
    assert plain == drafted and len(plain["token_ids"]) == 30 and 9 not in plain["token_ids"]


def test_generate_reads_stdin_as_it_is(tiny, orthrus, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPTS[0] + "\n"))
    piped = orthrus("generate", "-", "--model", tiny, "--max-new-tokens", 8)[1]
    assert piped == orthrus("generate", PROMPTS[0] + "\n", "--model", tiny, "--max-new-tokens", 8)[1]


def test_generate_stops_at_a_stop_string(tiny, orthrus):
    ends = [f"--stop={letter}" for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    code, out, err = orthrus("generate", PROMPTS[0], "--model", tiny, "--temperature", 1, "--seed", 1, *ends)
    assert code == 0 and "stop_string" in err and not any("a" <= letter <= "z" for letter in out)


def test_runs_are_marked_in_a_pipe_and_coloured_in_a_terminal(tiny, orthrus, monkeypatch):
    line = ("generate", PROMPTS[0], "--model", tiny, "--max-new-tokens", 30, "--temperature", 1, "--seed", 3)
    text = orthrus(*line)[1]
    marked = orthrus(*line, "--colour-runs")[1]
    assert marked.replace("·", "") == text != marked
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    coloured = orthrus(*line, "--colour-runs")[1]
    assert "\x1b[36m" in coloured and "\x1b[33m" in coloured and "·" not in coloured


def test_the_default_length_is_cut_to_the_context(tiny, orthrus):
    _, out, _ = orthrus("generate", "a" * 1000, "--model", tiny, "--json")
    stats = json.loads(out)["stats"]
    assert 0 < stats["tokens"] < 256 and stats["finish_reason"] == "length"


def test_ctrl_c_ends_a_generation_with_its_statistics(tiny, orthrus, monkeypatch):
    stop_after(monkeypatch, 6)
    code, out, err = orthrus("generate", PROMPTS[0], "--model", tiny, "--strategy", "autoregressive")
    assert code == 130 and "6 tokens in 6 forward passes" in err and "interrupted" in err and out


def test_ctrl_c_elsewhere_is_one_line(tiny, orthrus, monkeypatch):
    stop_after(monkeypatch, 6)
    code, out, err = orthrus("verify", tiny / "held_out.jsonl", "--model", tiny)
    assert (code, out, err) == (130, "", "orthrus: interrupted\n")


def allocate(*args, **kwargs):
    """What torch raises on a CPU that has not so much memory."""
    torch.empty(2**50, dtype=torch.uint8)


def run_out(*args, **kwargs):
    raise MemoryError


@pytest.mark.parametrize("fail, size", [(allocate, "1048576.0 GiB"), (run_out, "memory ran out: ")])
def test_memory_that_is_not_there_is_one_line(tiny, orthrus, monkeypatch, fail, size):
    monkeypatch.setattr(Qwen3, "generate", fail)
    code, out, err = orthrus("generate", PROMPTS[0], "--model", tiny)
    assert (code, out, err.count("\n")) == (2, "", 1) and "memory ran out" in err and size in err


def test_a_fault_of_the_program_is_a_traceback(tiny, monkeypatch):
    monkeypatch.setattr(Qwen3, "generate", lambda *args, **settings: {}["fault"])
    with pytest.raises(KeyError, match="fault"):
        main(["generate", PROMPTS[0], "--model", str(tiny)])


def test_a_reader_who_leaves_gets_no_traceback(tiny):
    command = [
        sys.executable,
        "-c",
        SHELL,
        "generate",
        PROMPTS[0],
        "--model",
        str(tiny),
        "--max-new-tokens",
        "900",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_chat_remembers_the_conversation(tiny, orthrus, monkeypatch):
    seen = []
    generate = Qwen3.generate
    monkeypatch.setattr(
        Qwen3, "generate", lambda self, ids, **s: seen.append(ids) or generate(self, ids, **s)
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("def add(\n\n    return first\n"))
    code, out, err = orthrus("chat", "--model", tiny, "--max-new-tokens", 6, "--system", "# code\n", "--json",
                             "--no-thinking")  # fmt: skip
    turns = [json.loads(line) for line in out.splitlines()]
    encode = Qwen3.from_pretrained(tiny, device="cpu").text.encode
    assert code == 0 and len(turns) == 2 and err.count("\n") == 2
    assert seen[0] == encode("# code\ndef add(")
    assert seen[1] == encode("# code\ndef add(" + turns[0]["text"] + "    return first")


def test_chat_streams_text(tiny, orthrus, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("def add(\n"))
    code, out, _ = orthrus("chat", "--model", tiny, "--max-new-tokens", 6)
    assert code == 0 and out.endswith("\n") and len(out) > 1


def test_verify_reports_what_it_compared(tiny, embedded, orthrus):
    code, out, err = orthrus("verify", "--max-new-tokens", 24, "--temperature", 1, "--seeds", 2, "--json",
                             "--logit-bias", "5=-inf")  # fmt: skip
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    pairs = 2 * len(PROMPTS)  # the split "test" of the embedded checkpoint's prompts
    assert (code, err) == (0, "") and found["identical"] == found["compared"] == pairs
    assert found["first_divergence"] is None and found["different_prompts"] == []
    assert found["tokens"] == 24 * pairs and found["strategy"] == "auto"
    assert sum(found["accepted_histogram"]) == found["cycles"]
    assert found["tokens_per_cycle"] == pytest.approx((found["tokens"] - pairs) / found["cycles"])
    assert found["tokens_per_forward"] == pytest.approx(found["tokens"] / found["forwards"])
    assert 1 < found["tokens_per_forward_mean_per_prompt"] < found["tokens_per_cycle_mean_per_prompt"] < 9
    assert 0 < found["distinct_8grams"] <= 1 and found["tokens_per_second_plain"] > 0


def test_verify_in_several_processes_says_the_same(embedded, orthrus):
    found = []
    for jobs in (1, 2):
        code, out, _ = orthrus("verify", "--max-new-tokens", 6, "--temperature", 1, "--jobs", jobs, "--json")
        assert code == 0
        found.append(json.loads(out))
    same = "identical", "compared", "tokens", "cycles", "forwards", "accepted_histogram", "distinct_8grams"
    assert [found[0][name] for name in same] == [found[1][name] for name in same] and found[1]["jobs"] == 2


@pytest.mark.parametrize("jobs", [0, -1, 1000])
def test_impossible_jobs(orthrus, jobs):
    code, out, err = orthrus("verify", "--limit", 1, "--jobs", jobs)
    assert code == 2 and out == "" and err.count("\n") == 1 and "--jobs" in err


def test_a_worker_that_cannot_start_ends_the_comparison(tiny):
    model, fails = Qwen3.from_pretrained(tiny, device="cpu", progress=False), partial(int, "no number")
    with pytest.raises(InputError, match="--jobs 2"):
        compare(model, [[5, 6], [7, 8]], "two-pass", load=fails, jobs=2, max_new_tokens=4)


def test_verify_prints_tables(tiny, orthrus):
    code, out, _ = orthrus(
        "verify", tiny / "held_out.jsonl", "--model", tiny, "--limit", 2, "--max-new-tokens", 9
    )
    assert code == 0 and "2/2" in out and "tokens per forward" in out and "this many or more" in out


def test_verify_side_by_side(tiny, orthrus):
    """Three texts at a time against one, plainly too; what cannot be is one line."""
    line = ("verify", tiny / "held_out.jsonl", "--model", tiny, "--max-new-tokens", 8, "--batch", 3)
    for how in (("--strategy", "two-pass", "--tree-nodes", 5), ("--strategy", "autoregressive"),
                ("--strategy", "one-pass")):  # fmt: skip
        code, out, _ = orthrus(*line, *how, "--temperature", 0.9, "--json")
        found = json.loads(out)
        assert code == 0 and found["identical"] == found["compared"] == 5 and found["batch"] == 3
    assert "3 texts side by side" in orthrus(*line)[1]
    for how, says in ((("--jobs", 2), "give one of them"), (("--batch", 0), "1 to 256 was expected")):
        code, _, err = orthrus(*line, *how)
        assert code == 2 and says in err and len(err.splitlines()) == 1


def spoil_one(monkeypatch, spoil) -> None:
    """spoil(run, i): of a text that is not plain, where the run's token i is the text's twelfth."""
    add = Sequence.add

    def lossy(self, run):
        i = 11 - len(self.tokens)
        if self.request.strategy != "autoregressive" and run.kind != "prompt" and 0 <= i < len(run.tokens):
            spoil(run, i)
        return add(self, run)

    monkeypatch.setattr(Sequence, "add", lossy)


def test_verify_sees_a_single_wrong_token(tiny, orthrus, monkeypatch):
    def spoil(run, i):
        run.tokens[i] = (run.tokens[i] + 1) % 300

    spoil_one(monkeypatch, spoil)
    line = ("verify", tiny / "held_out.jsonl", "--model", tiny, "--max-new-tokens", 16)
    code, out, _ = orthrus(*line, "--json")
    found = json.loads(out)
    assert code == 1 and found["identical"] == 0 and found["different_prompts"] == [0, 1, 2, 3, 4]
    assert found["same_tokens"] == 0
    where = found["first_divergence"]
    model = Qwen3.from_pretrained(tiny, device="cpu")
    prompt = model.text.encode(PROMPTS[0])
    assert where["prompt"] == 0 and where["position"] == 11 - len(prompt)
    plain = model.generate(prompt, strategy="autoregressive", max_new_tokens=16).token_ids
    logits = model.logits(prompt + plain[: where["position"]])
    for side, token in (("plain", int(logits.argmax())), ("drafted", (int(logits.argmax()) + 1) % 300)):
        assert where[side]["token"] == token and where[side]["logit"] == float(logits[token])
    assert "first divergence: prompt 1" in orthrus(*line)[1]


def test_verify_sees_a_single_wrong_bit_of_a_log_probability(tiny, orthrus, monkeypatch):
    def spoil(run, i):
        run.logprobs[i] = math.nextafter(run.logprobs[i], 0.0)

    spoil_one(monkeypatch, spoil)
    code, out, _ = orthrus(
        "verify", tiny / "held_out.jsonl", "--model", tiny, "--max-new-tokens", 16, "--json"
    )
    where = json.loads(out)["first_divergence"]
    assert code == 1 and where["plain"]["token"] == where["drafted"]["token"]
    assert where["plain"]["logprob"] != where["drafted"]["logprob"]


def test_info_counts_the_published_8b_right(tmp_path, orthrus):
    config = {
        "model_type": "qwen3", "architectures": ["OrthrusLM"], "vocab_size": 151936, "hidden_size": 4096,
        "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1e6,
        "tie_word_embeddings": False, "block_size": 32, "mask_token_id": 151669,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = orthrus("info", tmp_path, "--json", "--bandwidth", 1000)
    found = json.loads(out)
    attention = 36 * (4096 * 128 * (32 + 8 + 8 + 32) + 256)
    assert code == 0 and found["parameters"]["ar"] == found["parameters"]["diffusion"] == attention
    assert found["parameters"]["total"] - attention == 8_190_735_360  # Qwen3-8B
    assert found["kv_bytes_per_token"] == 147_456 and found["diffusion_bytes_per_block"] == 4.5 * 2**20
    # an untied embedding is not read
    assert found["floor_ms_per_token"] == pytest.approx((8_190_735_360 - 151936 * 4096) * 2 / 1e12 * 1e3)
    assert "one H200, measured" in orthrus("info", tmp_path)[1]


def test_info_of_a_plain_qwen3_has_no_diffusion_figures(tiny, tmp_path, orthrus):
    folder = tmp_path / "plain"
    folder.mkdir()
    shutil.copy(tiny / "config.json", folder)
    edit_config(folder, architectures=["Qwen3ForCausalLM"])
    found = json.loads(orthrus("info", folder, "--json")[1])
    assert found["diffusion_bytes_per_block"] is None and found["parameters"]["diffusion"] == 0


def test_demo_shows_runs_and_a_table(embedded, orthrus):
    code, out, _ = orthrus("demo", "--prompts", 2, "--max-new-tokens", 20)
    assert code == 0 and "function 2" in out and "·" in out and "per forward" in out and out.count("yes") == 3


def test_demo_json(embedded, orthrus):
    code, out, _ = orthrus("demo", "--prompts", 1, "--max-new-tokens", 12, "--json")
    (found,) = json.loads(out)["prompts"]
    assert code == 0 and found["identical"] and found["plain"]["token_ids"] == found["drafted"]["token_ids"]


def test_demo_passes_over_what_the_model_ends_at_once(tiny, tmp_path, orthrus, monkeypatch):
    folder = shutil.copytree(tiny, tmp_path / "ends")
    monkeypatch.setattr(checkpoint, "EMBEDDED", folder)
    model = Qwen3.from_pretrained(tiny, device="cpu")
    first = [model.generate(model.text.encode(p), max_new_tokens=1).token_ids[0] for p in PROMPTS]
    edit_config(folder, eos_token_id=first[0])
    (found,) = json.loads(orthrus("demo", "--prompts", 1, "--max-new-tokens", 3, "--json")[1])["prompts"]
    assert found["plain"]["token_ids"][0] == next(token for token in first if token != first[0])
    edit_config(folder, eos_token_id=list(range(300)))
    assert orthrus("demo")[0] == 2


def test_demo_ends_at_ctrl_c(embedded, orthrus, monkeypatch):
    stop_after(monkeypatch, 3)
    assert orthrus("demo") == (130, "", "orthrus: interrupted\n")


def test_the_embedded_checkpoint_is_the_default_and_drafts_well(orthrus):
    code, out, _ = orthrus("demo", "--prompts", 1, "--max-new-tokens", 24, "--json")
    (found,) = json.loads(out)["prompts"]
    assert code == 0 and found["identical"] and found["drafted"]["stats"]["tokens_per_cycle"] > 1.5
    assert orthrus("info")[0] == 0


def test_an_installed_command_line_runs_in_a_process_of_its_own(tiny):
    command = [sys.executable, "-c", SHELL, "generate", "-", "--model", str(tiny), "--max-new-tokens", "5"]
    done = subprocess.run(command, input=PROMPTS[0], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0 and done.stdout and "5 tokens" in done.stderr
