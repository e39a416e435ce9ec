"""Batch files: answers are those of `generate`, and a run that ends anywhere loses and repeats nothing."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from fork_server import ForkServer
from tiny_folder import PROMPTS, write_tiny

from qwen3_model import Engine, Qwen3, checkpoint
from qwen3_model.cli import main
from qwen3_model.errors import InputError
from qwen3_model.files import owned
from qwen3_model.openai import batch_file as files
from qwen3_model.openai import batch_lines
from qwen3_model.openai.answer import CompletionLogprobs
from qwen3_model.openai.batch_lines import BEGINNING, answered, read_line, unreadable

GUIDE = Path(__file__).parents[1] / "docs/checkpoints.md"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("batch") / "tiny")


@pytest.fixture(autouse=True)
def embedded(tiny, monkeypatch):
    monkeypatch.setattr(checkpoint, "EMBEDDED", tiny)


@pytest.fixture(scope="module")
def model(tiny):
    return Qwen3.from_pretrained(tiny, progress=False)


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


@pytest.fixture
def orthrus(paths, capsys):
    """Runs the verb on IN and OUT; returns exit code, stdout, stderr."""

    def call(*words):
        code = main(["batch", *map(str, paths), *map(str, words)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(orthrus, paths):
    """Runs a command that must be refused in one line before OUT changes; returns the line."""

    def call(*words):
        before = paths[1].read_bytes() if paths[1].is_file() else None
        code, out, err = orthrus(*words)
        assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
        assert (paths[1].read_bytes() if paths[1].is_file() else None) == before
        return err

    return call


def request(custom_id, **body):
    """A line of IN."""
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path, lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


def read(path):
    """The lines of OUT by custom_id, each there once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def constant(line):
    """An answer without what no two runs have in common: ids, time, and what was drafted beside whom."""
    line = json.loads(json.dumps(line))
    line.pop("id")
    if line["response"]:
        line["response"].pop("request_id")
        for name in ("id", "created"):
            line["response"]["body"].pop(name, None)
        line["response"]["body"].get("usage", {}).pop("completion_tokens_details", None)
    return line


def many(count, seed=0, longest=12):
    """Requests of mixed settings of up to `longest` tokens; every seventh is refused."""
    drawn = random.Random(seed)
    lines = []
    for i in range(count):
        body = {"prompt": drawn.choice(PROMPTS), "max_tokens": drawn.randint(1, longest), "seed": i}
        body["temperature"] = drawn.choice([0, 0.8, 1.5])
        if drawn.random() < 0.3:
            body |= {"top_k": 5, "logprobs": drawn.choice([0, 3]), "n": 2}
        if i % 7 == 6:
            body["n"] = 0
        if drawn.random() < 0.2:
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
            body.pop("logprobs", None)
        lines.append(request(f"r{i}", **body))
    return lines


def test_the_guides_example_is_answered(orthrus, paths):
    (example,) = re.findall(r"^```json\n(\{\"custom_id.*?)^```", GUIDE.read_text(), re.M | re.S)
    paths[0].write_text(example)
    code, out, err = orthrus()
    found = read(paths[1])
    assert code == 0 and set(found) == {"a", "b"} and found["a"]["response"]["body"]["seed"] == 7


@pytest.mark.parametrize("slots", [1, 5])
def test_answers_are_those_of_generate(slots, orthrus, paths, model):
    lines = many(16)
    write(paths[0], lines)
    code, out, err = orthrus("--slots", slots, "--json")
    assert code == 1 and err == "", "every seventh is an error"
    figures, found = json.loads(out), read(paths[1])
    assert set(found) == {line["custom_id"] for line in lines}
    assert (figures["requests"], figures["answered"], figures["failed"]) == (16, 16, 2)
    tokens = 0
    for line in lines:
        body, response = line["body"], found[line["custom_id"]]["response"]
        assert response["status_code"] == (400 if body.get("n") == 0 else 200)
        for i, choice in enumerate(response["body"].get("choices", [])):
            chat = "messages" in body
            prompt = body["messages"][0]["content"] if chat else body["prompt"]
            if chat:
                prompt = model.text.chat(body["messages"])
            alone = model.generate(
                model.text.encode(prompt, added_specials=not chat), max_new_tokens=body["max_tokens"],
                temperature=body["temperature"], top_k=body.get("top_k", 0), seed=body["seed"] + i,
                top_logprobs=0 if chat else body.get("logprobs", 0),
            )  # fmt: skip
            assert (choice["message"]["content"] if chat else choice["text"]) == alone.text
            if not chat and "logprobs" in body:
                told = CompletionLogprobs(model.text).push(
                    alone.token_ids, alone.logprobs, alone.top_logprobs
                )
                assert choice["logprobs"] == told
            tokens += len(alone.token_ids)
    assert figures["tokens"] == tokens and figures["tokens_per_cycle"] >= 1


def test_the_summary_and_a_second_run(orthrus, paths):
    write(paths[0], [request("a", prompt="x", max_tokens=2), "\n", request("b", prompt="y", max_tokens=2)])
    code, out, err = orthrus("--limit", 1)
    assert code == 0 and out.startswith("1 of 2 requests answered, 0 with an error; now 1: 2 tokens")
    first = paths[1].read_bytes()
    code, out, err = orthrus()
    assert code == 0 and "2 of 2" in out and "now 1" in out and paths[1].read_bytes().startswith(first)
    whole = paths[1].read_bytes()
    code, out, err = orthrus()
    assert code == 0 and "now 0: 0 tokens" in out and paths[1].read_bytes() == whole
    assert [path.name for path in sorted(paths[0].parent.iterdir())] == ["in.jsonl", "out.jsonl"]


def test_bad_lines_become_error_lines_and_the_run_goes_on(orthrus, paths):
    good = json.dumps(request("good", prompt="x", max_tokens=1))
    bad = {
        2: ("no json\n", None), 3: (json.dumps(request("", prompt="x")) + "\n", None), 4: ("5\n", None),
        5: ('{"custom_id": "a", "custom_id": "b"}\n', None), 6: ('{"custom_id": "put"}\n', "put"),
        7: (json.dumps(request("get", prompt="x") | {"method": "GET"}) + "\n", "get"),
        8: (json.dumps(request("more", prompt="x") | {"more": 1}) + "\n", "more"),
        9: ("x" * (batch_lines.LONGEST_LINE + 9) + "\n", None), 10: (json.dumps({"custom_id": 5}), None),
    }  # fmt: skip
    paths[0].write_text("\ufeff" + good + "\n" + "".join(text for text, _ in bad.values()))
    code, out, err = orthrus()
    lines = [json.loads(line) for line in paths[1].read_text().splitlines()]
    assert code == 1 and err == "" and len(lines) == 10 and "9 with an error" in out
    wrong = {line["error"]["line"]: line for line in lines if line["error"]}
    assert {number: line["custom_id"] for number, line in wrong.items()} == {n: b[1] for n, b in bad.items()}
    assert all(f"line {number}" in line["error"]["message"] for number, line in wrong.items())
    assert all(line["response"] is None for line in wrong.values())
    before = paths[1].read_bytes()
    assert orthrus()[0] == 1 and paths[1].read_bytes() == before, "they are known too"


def test_a_text_that_fails_is_an_error_of_its_own(orthrus, paths, monkeypatch):
    submit = Engine.submit

    def failing(self, prompt, request):
        text = submit(self, prompt, request)
        if request.seed == 1:
            text.error = "its numbers are none"
            self.cancel(text, "error")
        return text

    monkeypatch.setattr(Engine, "submit", failing)
    write(paths[0], [request(f"r{i}", prompt="x", max_tokens=2, seed=i) for i in range(3)])
    assert orthrus()[0] == 1
    found = read(paths[1])
    assert [found[f"r{i}"]["response"]["status_code"] for i in range(3)] == [200, 500, 200]
    assert found["r1"]["response"]["body"]["error"]["message"] == "its numbers are none"


def test_a_cache_that_does_not_fit_is_no_requests_error(refused, orthrus, paths):
    write(paths[0], [request(name, prompt="x", max_tokens=1) for name in "ab"])
    assert orthrus("--limit", 1)[0] == 0
    for slots in (1, 2):
        assert "lower cache_tokens" in refused("--slots", slots, "--cache-tokens", 2**36)


def test_what_the_engine_refuses_is_the_requests_error(orthrus, paths):
    lines = [request("long", prompt=[[1], [1] * 200], max_tokens=9), request("b", prompt="x", max_tokens=2)]
    write(paths[0], lines)
    assert orthrus("--slots", 2, "--cache-tokens", 64)[0] == 1
    found = read(paths[1])
    assert found["long"]["response"]["status_code"] == 400 and found["b"]["response"]["status_code"] == 200


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([request("a", prompt="x"), request("a", prompt="y")], "line 2 has the custom_id of an earlier line"),
        ([], "holds no requests"), (["\n", " \n"], "holds no requests"),
    ],
)  # fmt: skip
def test_an_in_that_is_refused(given, words, refused, paths):
    write(paths[0], given)
    assert words in refused()


def test_files_that_are_refused(refused, paths):
    source, out = paths
    assert "cannot be read" in refused()
    os.mkfifo(source)
    assert "not a regular file" in refused()
    source.unlink()
    write(source, [request("a", prompt="x")])
    out.hardlink_to(source)
    assert "the same file" in refused()
    out.unlink()
    out.symlink_to("/dev/full")
    assert "not a regular file" in refused()
    out.unlink()
    out.symlink_to("gone/out")
    assert "leads nowhere" in refused()
    out.unlink()
    for words in (["--slots", 0], ["--slots", 257], ["--limit", 0], ["--cache-tokens", -1]):
        assert str(words[0]) in refused(*words)
    assert main(["batch", str(source), str(out / "gone")]) == 2


ANSWER = (
    '{"id": "batch_req_1", "custom_id": "b", "response": {"status_code": 200, "body": {}}, "error": null}\n'
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("my notes", "no answer of a batch"), ("my notes\n", "no answer of a batch"), ("{}\n", "no answer"),
        ("[]\n", "no answer"), (ANSWER, "'b', which"), (ANSWER.replace('"b"', '""'), "'', which"),
        (ANSWER.replace("batch_req_", ""), "no answer"),
        (ANSWER.replace('"b"', "null"), "no answer"), (ANSWER.replace('"b"', '"a"') * 2, "a second time"),
        (ANSWER.replace('"b"', "null").replace('null}\n', '{"line": 9}}\n'), "line 9, which"),
        (ANSWER.replace("200", "200, " * 2), "no answer"), ('{"id": "mine"}', "no answer"),
        ("\x00" * 50, "no answer"),
    ],
)  # fmt: skip
def test_an_out_of_something_else_is_left_alone(text, words, refused, paths):
    write(paths[0], [request("a", prompt="x")])
    paths[1].write_text(text)
    assert words in refused()


def test_an_answer_to_a_request_that_has_changed(refused, orthrus, paths):
    """Nothing old is taken for an answer to what is asked now."""
    asked = [request(name, prompt=name, max_tokens=2, temperature=0) for name in "ab"]
    write(paths[0], [*asked, "bad\n"])
    assert orthrus()[0] == 1
    for changed in (
        [asked[0], request("b", prompt="c", max_tokens=2, temperature=0), "bad\n"],
        [*asked, "worse\n"],
    ):
        write(paths[0], changed)
        told = refused()
        assert "as " in told and "had it before" in told and ("'b'" in told or "line 3" in told)
    write(paths[0], [*asked, "  bad\n"])
    assert orthrus()[0] == 1, "white space changes nothing"
    assert "with another model or other settings" in refused("--generation-config", "none")


def test_two_runs_do_not_write_one_file(refused, paths):
    write(paths[0], [request("a", prompt="x")])
    with owned(paths[1].resolve()):
        assert "another run is writing" in refused()


def test_cut_at_any_byte_nothing_is_lost_or_repeated(paths):
    """Every length of the last two lines: what is whole stays, the rest is cut, and is waited for again."""
    source, out = paths
    write(source, [request(name, prompt="x") for name in "abc"] + ["bad\n"])
    lines = list(batch_lines.read_lines(source, ""))
    with files.batch_file(source, out, "") as batch, batch.open():
        for line in lines:
            told = unreadable(line) if line.wrong else answered(line, 200, {"choices": ["é"]})
            batch.append(line, told, ok=not line.wrong)
    whole = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 4
    for length in range(ends[1], len(whole) + 1):
        out.write_bytes(whole[:length])
        kept = sum(end <= length for end in ends)
        with files.batch_file(source, out, "") as batch:
            assert out.read_bytes() == whole[:length], "nothing is written before all is checked"
            assert batch.known == {line.key for line in lines[:kept]} and batch.failed == (kept == 4)
            with batch.open():
                assert out.read_bytes() == whole[: ends[kept - 1]]
                assert [line.number for line in batch.waiting()] == list(range(kept + 1, 5))
    for length in range(len(BEGINNING) + 3):
        out.write_bytes(whole[:length])
        with files.batch_file(source, out, "") as batch:
            assert not batch.known


def test_a_full_disk(orthrus, paths):
    """What was written stays, whole lines only; with room again the same command goes on."""
    lines = many(12)
    write(paths[0], lines)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, before[1]))
    try:
        code, out, err = orthrus()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = paths[1].read_bytes()
    assert code == 2 and out == "" and err.count("\n") == 1 and "answers stay" in err
    assert 0 < len(kept) <= 2500 and kept.endswith(b"\n") and 0 < len(read(paths[1])) < 12
    assert orthrus()[0] == 1 and len(read(paths[1])) == 12 and paths[1].read_bytes().startswith(kept)


def test_lines_are_synced_within_a_second(paths, monkeypatch):
    synced, now = [], [0.0]
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(files.os, "fsync", lambda file: synced.append(now[0]))
    write(paths[0], [request(name, prompt="x") for name in "abc"])
    with files.batch_file(*paths, "") as batch, batch.open():
        synced.clear()
        for line, at in zip(batch_lines.read_lines(paths[0], ""), (0.4, 0.9, 1.1), strict=True):
            now[0] = at
            batch.append(line, answered(line, 200, {}), ok=True)
        now[0] = 1.5
        batch.sync(due=1.0)
        assert synced == [1.1], "the newest line can wait"
        now[0] = 2.2
        batch.sync(due=1.0)
        assert synced == [1.1], "nothing is new"
        line = read_line(json.dumps(request("c", prompt="x")).encode(), 3, "")
        batch.append(line, answered(line, 200, {}), ok=True)
        assert synced == [1.1, 2.2]
        batch.append(line, answered(line, 200, {}), ok=True)
    assert synced == [1.1, 2.2, 2.2], "and at the end"


def test_requests_are_read_as_slots_become_free(model, paths):
    """Not the whole file at once, and answers come as they finish."""
    from qwen3_model.openai import batch
    from qwen3_model.openai.body import Served

    write(paths[0], [request(f"r{i}", prompt="x", max_tokens=60 if i == 0 else 2) for i in range(12)])
    engine = Engine(model, 2, 512)
    most, submit = [], engine.submit
    running = []

    def counted(*given):
        running.append(submit(*given))
        most.append(sum(not text.finished for text in running))
        return running[-1]

    engine.submit = counted
    served, seen = Served("tiny", model.config, model.text), []
    with files.batch_file(*paths, "") as opened, opened.open():
        counts = batch.run(engine, served, opened, lambda counts: seen.append(counts.requests))
    assert max(most) == 4 and seen == list(range(1, 13)) and counts.texts == 12
    assert list(read(paths[1])).index("r0") > 3, "the long one is overtaken"


def test_ctrl_c_keeps_what_has_finished(orthrus, paths, monkeypatch):
    """The answers that a step finished before it was interrupted are written, and no half one."""
    lines = many(12)
    write(paths[0], lines)
    step, steps = Engine.step, iter(range(12))

    def interrupted(self):
        if next(steps, None) is None:
            with monkeypatch.context() as inner:
                inner.setattr(Qwen3, "states", _interrupt)
                return step(self)
        return step(self)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "step", interrupted)
        code, out, err = orthrus("--slots", 3)
    assert code == 130 and out == "" and err.count("\n") == 1 and "the same command goes on" in err
    kept = paths[1].read_bytes()
    done = read(paths[1])
    assert 0 < len(done) < 12 and f"{len(done)} of 12 requests" in err
    assert orthrus("--slots", 3)[0] == 1 and paths[1].read_bytes().startswith(kept)
    again = paths[1].with_name("again.jsonl")
    assert main(["batch", str(paths[0]), str(again)]) == 1
    assert _constants(paths[1]) == _constants(again)


def _interrupt(*given):
    raise KeyboardInterrupt


def _constants(path):
    return {name: constant(line) for name, line in read(path).items()}


def test_killed_at_any_moment(tiny, paths):
    """kill -9 and Ctrl-C of a process, again and again; the same command goes on until all is answered."""
    source, out = paths
    write(source, many(20))
    server = ForkServer(tiny)
    drawn = random.Random(5)
    try:
        whole = server.run("batch", source, out)
        assert whole.code == 1 and whole.err == b"", whole.err
        undisturbed, codes = _constants(out), []
        start = server.run("batch", source, out).seconds  # with nothing left to do
        out.unlink()
        reach = 0.3  # of the time of an undisturbed run, which a busy machine does not keep to
        for nth in range(90):
            number = signal.SIGINT if nth % 4 == 3 else signal.SIGKILL
            moment = start + drawn.uniform(-0.1, reach) * (whole.seconds - start)
            before = lines_of(out)
            ended = server.run("batch", source, out, "--slots", 3, signals=[(moment, number)])
            codes.append(ended.code)
            reach *= 1.1 if lines_of(out) == before else 1.0  # a machine that became busier
            if ended.code == 1 and codes.count(-9) >= 3:
                break
            if ended.code == 1:  # too soon: once more, with less time
                out.unlink()
                codes, reach = [], reach / 2
                continue
            assert ended.code in (-9, 130), ended
    finally:
        server.close()
    assert codes.count(-9) >= 3 and codes[-1] == 1, codes
    assert _constants(out) == undisturbed


def test_ordered_answers_are_those_of_in(orthrus, paths):
    """Bad lines without a custom_id among them; what a run left out of order is ordered by the next one."""
    first, *rest = [request(f"r{i}", prompt="x", max_tokens=(9, 1, 4)[i % 3], seed=i) for i in range(9)]
    write(paths[0], [first, "bad\n", *rest])
    order = ["r0", None, *(f"r{i}" for i in range(1, 9))]
    assert orthrus("--slots", 5, "--limit", 7)[0] == 1
    before = read(paths[1])
    assert list(before) != order[:7], "a long text is overtaken"
    paths[1].chmod(0o600)
    assert orthrus("--slots", 5, "--limit", 7, "--ordered")[0] == 1
    assert list(read(paths[1])) == order[:7] and read(paths[1]) == before
    assert orthrus("--slots", 5, "--ordered")[0] == 1
    assert list(read(paths[1])) == order and paths[1].stat().st_mode & 0o777 == 0o600
    file = paths[1].stat().st_ino
    assert orthrus("--ordered")[0] == 1 and paths[1].stat().st_ino == file, "nothing is left to do"
    assert [path.name for path in sorted(paths[0].parent.iterdir())] == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_ended_while_it_is_ordered(where, orthrus, paths, monkeypatch):
    """By a full disk or Ctrl-C: OUT is as it was, and the same command goes on."""
    write(paths[0], [request(f"r{i}", prompt="x", max_tokens=9 if i == 0 else 1) for i in range(9)])
    orthrus("--slots", 5)
    before = paths[1].read_bytes()
    for error, code, said in (
        (OSError(28, "No space left on device"), 2, "9 answers stay"),
        (KeyboardInterrupt(), 130, "9 of 9 requests"),
    ):
        with monkeypatch.context() as patched:
            failing = {"write": (Path, "open"), "fsync": (os, "fsync"), "replace": (os, "replace")}[where]
            real = getattr(*failing)

            def fail(*given, real=real, error=error, **named):
                if where == "write" and "wb" not in given:
                    return real(*given, **named)
                raise error

            patched.setattr(*failing, fail)
            ended, out, err = orthrus("--ordered")
        assert (ended, out, err.count("\n")) == (code, "", 1) and said in err
        assert paths[1].read_bytes() == before and len(list(paths[0].parent.iterdir())) == 2
    assert orthrus("--ordered")[0] == 0 and list(read(paths[1])) == [f"r{i}" for i in range(9)]


CHANGES = {"shorter": lambda lines: lines[:1], "longer": lambda lines: [*lines, lines[0]]}


@pytest.mark.parametrize("change", CHANGES)
def test_an_in_that_changes_while_it_is_answered(change, paths):
    """Neither more requests are answered than were looked through, nor are answers lost."""
    lines = [request(f"r{i}", prompt="x") for i in range(3)]
    write(paths[0], lines)
    with files.batch_file(*paths, "") as batch:
        with batch.open():
            waiting = batch.waiting()
            for _ in range(2):
                batch.append(next(waiting), {"id": BEGINNING.decode()[8:] + "a", "custom_id": "?"}, True)
            write(paths[0], CHANGES[change](lines))
            with pytest.raises(
                InputError, match="has changed since this run began: the 2 answers in .* stay"
            ):
                next(waiting)
        before = paths[1].read_bytes()
        with pytest.raises(InputError, match="has changed"):
            batch.order()
    assert paths[1].read_bytes() == before and before.count(b"\n") == 2


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_an_out_that_goes_while_it_is_written(how, paths):
    write(paths[0], [request(f"r{i}", prompt="x") for i in range(3)])
    with (
        pytest.raises(InputError, match="was removed or replaced while it was written"),
        files.batch_file(*paths, "") as batch,
        batch.open(),
    ):
        waiting = batch.waiting()
        batch.append(next(waiting), {"id": "a"}, True)
        if how == "removed":
            paths[1].unlink()
        else:
            paths[1].with_suffix(".new").write_bytes(paths[1].read_bytes())
            paths[1].with_suffix(".new").replace(paths[1])
        batch.append(next(waiting), {"id": "b"}, True)


def test_a_checkpoint_that_has_changed_is_another_model(orthrus, refused, paths, tiny, tmp_path):
    """By its recommended settings or by a number of its weights; not by a file that decides nothing."""
    folder = tmp_path / "own"
    shutil.copytree(tiny, folder)
    write(paths[0], [request("a", prompt="x", max_tokens=1)])
    assert orthrus("--model", folder)[0] == 0
    (folder / "README.md").write_text("other words")
    assert orthrus("--model", folder)[0] == 0
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    assert "with another model" in refused("--model", folder)
    (folder / "generation_config.json").unlink()
    weights = next(folder.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    assert "with another model" in refused("--model", folder)


@pytest.fixture
def ended_at_last():
    """Callbacks that end what a test has started, however it ends."""
    with ExitStack() as stack:
        yield stack


def lines_of(out):
    return out.read_bytes().count(b"\n") if out.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_ten_times(paths, ended_at_last):
    """A real process, kill -9 at random moments of its work; then the answers are those of a run that nobody
    disturbed, in the order of IN. ORTHRUS_LINES requests (200), ORTHRUS_KILLS (10), on ORTHRUS_DEVICE (cpu),
    ORTHRUS_SLOTS side by side (3), of ORTHRUS_TOKENS tokens at most (12); the embedded checkpoint."""
    lines, kills, slots, tokens = (
        int(os.environ.get(f"ORTHRUS_{name}", default))
        for name, default in (("LINES", 200), ("KILLS", 10), ("SLOTS", 3), ("TOKENS", 12))
    )
    source, out = paths
    whole, drawn, asked = out.with_name("whole.jsonl"), random.Random(7), many(lines, longest=tokens)
    write(source, asked)
    words = "--slots", str(slots), "--device", os.environ.get("ORTHRUS_DEVICE", "cpu"), "--ordered"

    def begin(to):
        code = "import sys; from qwen3_model.cli import main; sys.exit(main())"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "batch", source, to, *words],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        ended_at_last.callback(process.kill)
        return process

    undisturbed = begin(whole)
    assert undisturbed.communicate()[1] == b"" and undisturbed.returncode == 1
    for at in sorted(drawn.sample(range(1, lines - slots), kills)):
        process = begin(out)
        while lines_of(out) < at:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        time.sleep(drawn.uniform(0, 0.05))
        process.kill()
        assert process.communicate() and process.returncode == -9, "it had not ended"
    last = begin(out)
    assert last.communicate()[1] == b"" and last.returncode == 1
    assert list(read(out)) == [line["custom_id"] for line in asked]
    assert _constants(out) == _constants(whole)


def test_a_terminal_is_shown_how_far_it_is(orthrus, paths, monkeypatch):
    write(paths[0], [request(f"r{i}", prompt="x", max_tokens=2, seed=i) for i in range(4)])
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, out, err = orthrus()
    assert code == 0 and "tok/s" in err and "tokens a cycle" in err and "4/4" in err


def test_the_checkpoints_settings_are_defaults(tiny, orthrus, paths, model):
    """And --generation-config none turns them off."""
    source, out = paths
    body = {"prompt": "def add(first", "seed": 1, "max_tokens": 12}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    source.write_text(json.dumps(line))
    recommended = tiny / "generation_config.json"
    recommended.write_text('{"temperature": 0.3, "top_k": 5}')
    texts = []
    try:
        for words in ([], ["--generation-config", "none"]):
            assert orthrus(*words)[0] == 0
            texts.append(json.loads(out.read_text())["response"]["body"]["choices"][0]["text"])
            out.unlink()
    finally:
        recommended.unlink()
    ids = model.text.encode("def add(first")
    settings = {"temperature": 0.3, "top_k": 5}, {"temperature": 1.0}
    alone = [model.generate(ids, max_new_tokens=12, seed=1, **more).text for more in settings]
    assert texts == alone and texts[0] != texts[1]
