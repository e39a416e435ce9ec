"""The pictures of docs/ are what their scripts draw now, and show what the definition and the records say."""

import json
import re

import pytest
import torch

from orthrus_kernels import visible
from tools.docs import pictures


def attributes(svg: str, name: str) -> list[dict[str, str]]:
    """Of every element that has the attribute `name`."""
    found = (dict(re.findall(r'([\w-]+)="([^"]*)"', element)) for element in re.findall(r"<\w+ [^>]*>", svg))
    return [element for element in found if name in element]


def test_they_are_as_drawn_now():
    for path, svg in pictures.drawn().items():
        assert path.read_text() == svg, f"{path.name} is stale: make pictures"


def test_the_mask_is_visible():
    """Cell by cell, at its place, from the file that the README shows."""
    rows = pictures.ROWS
    shown = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    cells = attributes(pictures.MASK.read_text(), "data-row")
    for cell in cells:
        i, j = int(cell["data-row"]), int(cell["data-key"])
        assert float(cell["y"]) == pictures.TOP + i * pictures.CELL
        assert float(cell["x"]) == pictures.LEFT + (pictures.START + j) * pictures.CELL
        shown[i, j] = cell["fill"] != pictures.HIDDEN
        assert cell["fill"] in (pictures.HIDDEN, pictures.AR if rows.blocks[j] < 0 else pictures.DIFFUSION)
    assert len(cells) == len(rows) ** 2 and torch.equal(shown, visible(rows))


def test_a_leak_would_show(monkeypatch):
    leaky = visible(pictures.ROWS)
    leaky[-1, 2] ^= True
    monkeypatch.setattr(pictures, "visible", lambda rows: leaky)
    assert pictures.mask() != pictures.MASK.read_text()


def test_bars_are_as_long_as_what_was_recorded():
    run = json.loads(pictures.RUN.read_text())
    bars = attributes(pictures.SPEED.read_text(), "data-ms")
    times = {(p["model"], f"{p['us']['median'] / 1e3:.3f}") for p in [*run["passes"], *run["peers"]]}
    assert len(bars) == 3 * len(run["peers"])
    scales = [float(bar["width"]) / float(bar["data-ms"]) for bar in bars]
    assert max(scales) == pytest.approx(min(scales), rel=1e-3), "one scale for all"
    assert sum((bar["data-model"], bar["data-ms"]) in times for bar in bars) == 2 * len(run["peers"])


def test_the_command(monkeypatch, tmp_path, capsys, refused):
    for name in ("MASK", "SPEED", "BATCH", "SERVE"):
        monkeypatch.setattr(pictures, name, tmp_path / f"{name}.svg")
    monkeypatch.setattr(pictures, "ROOT", tmp_path)
    runs = {name: getattr(pictures, name) for name in ("BATCH_RUNS", "SERVE_RUNS")}
    assert pictures.main([]) == 0 and capsys.readouterr().out.count("wrote") == 4
    (tmp_path / "run.json").write_text("{}")
    for name, kept in runs.items():
        monkeypatch.setattr(pictures, name, [tmp_path / "run.json"])
        assert "KeyError" in refused(pictures.main)
        monkeypatch.setattr(pictures, name, kept)
    monkeypatch.setattr(pictures, "RUN", tmp_path / "run.json")
    assert "whole runs of bench.decode" in refused(pictures.main)
