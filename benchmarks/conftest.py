"""The `report` fixture: collects what the benchmarks measured, prints it at the end, appends it to `--results`."""

from __future__ import annotations

from pathlib import Path

import pytest
from measure import Report

REPORT = pytest.StashKey[Report]()


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    pytestconfig.stash[REPORT] = Report()
    return pytestconfig.stash[REPORT]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    report = config.stash.get(REPORT, None)
    if report is None or not report.rows:
        return
    terminalreporter.section("measured")
    for line in report.lines():
        terminalreporter.write_line(line)
    path = config.getoption("--results")
    if path is not None:
        report.append_to(Path(path))
        terminalreporter.write_line(f"{len(report.rows)} rows appended to {path}")
