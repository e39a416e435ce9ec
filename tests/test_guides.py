"""What the guides tell a reader to type is taken by the command line, their links lead somewhere, the
strategy that docs/adding.md shows is one, and files and functions are as short as CONTRIBUTING.md says."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from scripted import ScriptedModel
from small import small_config, small_model

from bench import acceptance, kernels
from qwen3_model import cli, request
from qwen3_model.decode import groups
from tools import check_kernel

ROOT = Path(__file__).parents[1]
GUIDES = [
    ROOT / "CONTRIBUTING.md",
    *(ROOT / f"docs/{name}.md" for name in ("adding", "checkpoints", "figures", "metrics", "serving")),
]
TEXTS = {path.name: path.read_text() for path in GUIDES}
VERBS, MADE = (
    sorted(
        {
            found
            for text in TEXTS.values()
            for pair in re.findall(pattern, text, re.M)
            for found in pair
            if found
        }
    )
    for pattern in (r"^ +(orthrus [^#\n]*)|`(orthrus [^`]* -[^`]*)`", r"^ +(make [^#\n]*)|`(make [^`]*)`")
)
OPTIONS = {"bench": kernels.parse, "acceptance": acceptance.parse, "check-kernel": check_kernel.parse}


@pytest.mark.parametrize("command", VERBS)
def test_orthrus_takes_what_the_guides_say(command):
    assert cli._parser().parse_args(shlex.split(command)[1:]).run


@pytest.mark.parametrize("command", MADE)
def test_make_takes_what_the_guides_say(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.replace("=squared_relu", "=swiglu"))[1:]
    targets = [word for word in words if "=" not in word]
    given = [value for word in words for name, _, value in [word.partition("=")] if value]
    for target in targets:
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target
    if targets[0] in OPTIONS and given:
        OPTIONS[targets[0]](shlex.split(" ".join(given)))


def test_there_are_commands_to_check():
    assert len(VERBS) > 10 and len(MADE) > 10


@pytest.mark.parametrize("name", TEXTS)
def test_what_a_guide_names_is_there(name):
    folder = ROOT if name == "CONTRIBUTING.md" else ROOT / "docs"
    for link in re.findall(r"\]\(([^)#]+)\)", TEXTS[name]):
        assert link.startswith("http") or (folder / link).exists(), link
    made = {"src/orthrus_kernels/squared_relu.py", "tests/kernels/test_squared_relu.py"}  # by make new-op
    for path in re.findall(r"`((?:src|tests|bench|tools|docs)/[\w./]+\w)`", TEXTS[name]):
        assert path in made or (ROOT / path).exists(), path


@pytest.fixture
def again(monkeypatch):
    """The strategy of docs/adding.md, registered."""
    (code,) = re.findall(r"^```python\n(.*?)^```", TEXTS["adding.md"], re.M | re.S)
    names: dict = {}
    exec(compile(code, "docs/adding.md", "exec"), names)
    fixed = groups.fixed_kind
    monkeypatch.setattr(request, "STRATEGIES", (*request.STRATEGIES, "again"))
    monkeypatch.setattr(
        groups, "fixed_kind",
        lambda text: names["Again"](text.block_size) if text.request.strategy == "again" else fixed(text),
    )  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8}, {"repetition_penalty": 1.3}])
def test_the_strategy_that_is_shown_equals_plain_decoding(settings, again):
    for seed in range(10):
        model = ScriptedModel(small_config(), seed=seed)
        prompt = [1, 2, 3, 1, 2]
        plain, drafted = (
            model.generate(prompt, strategy=name, max_new_tokens=30, seed=seed, **settings)
            for name in ("autoregressive", "again")
        )
        assert drafted.token_ids == plain.token_ids and drafted.logprobs == plain.logprobs


def test_it_finds_what_repeats(again):
    """A model that loops: whole blocks are accepted, counted, and have the bits of plain decoding."""
    model = small_model(eos_token_ids=())
    plain, drafted = (
        model.generate([3, 9, 27], strategy=name, max_new_tokens=200) for name in ("autoregressive", "again")
    )
    assert drafted.token_ids == plain.token_ids and drafted.logprobs == plain.logprobs
    assert drafted.stats.forwards == 1 + drafted.stats.cycles and drafted.stats.tokens_per_cycle > 1.5


def test_files_and_functions_are_short():
    """CONTRIBUTING.md: files of src/ up to 350 lines, functions up to 70, kernels apart."""
    lengths = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        source = path.read_text()
        lengths[path.name] = len(source.splitlines())
        assert lengths[path.name] <= 350, (path, lengths[path.name])
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                is_kernel = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
                length = node.end_lineno - node.lineno + 1
                assert is_kernel or length <= 70, (path, node.name, length)
    assert len(lengths) > 50
