"""Tests run for `tests.mutations.run`, in a process of their own: which passed, and what the others ended by.

    python -m tests.mutations.probe REPORT [-x] TEST [TEST ...]

Hypothesis takes the same examples each time, so that a bug is caught always or never, and shrinks none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


class Recorder:
    """A pytest plugin: what the report says."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failures: list[dict[str, str]] = []

    def pytest_configure(self, config: pytest.Config) -> None:
        """After tests/conftest.py, whose profile this one changes."""
        from hypothesis import Phase, settings  # not sooner: pytest is to rewrite its assertions

        phases = Phase.explicit, Phase.generate
        settings.register_profile("mutations", derandomize=True, phases=phases, report_multiple_bugs=False)
        settings.load_profile("mutations")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.append(report.nodeid)

    def pytest_exception_interact(self, node, call, report) -> None:
        """Of a test, its fixtures or the collection of its file. source: where the exception was raised."""
        said = " ".join(call.excinfo.exconly(tryshort=True).split())
        source = str(call.excinfo.traceback[-1].path)
        self.failures.append(
            {"test": node.nodeid, "error": call.excinfo.typename, "source": source, "said": short(said)}
        )


def short(text: str) -> str:
    """Its two ends, where it is long: an assertion begins with what differs, a traceback ends with why."""
    return text if len(text) <= 300 else f"{text[:140]} ... {text[-140:]}"


def main(report: str, *arguments: str) -> int:
    recorder = Recorder()
    code = int(pytest.main(["-p", "no:cacheprovider", "--tb=line", "-m", "", *arguments], plugins=[recorder]))
    found = {"code": code, "passed": recorder.passed, "failures": recorder.failures}
    Path(report).write_text(json.dumps(found), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
