"""Plain `pytest` runs the tests and skips the benchmarks; `pytest --benchmark-only` does the opposite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results", metavar="PATH", help="with --benchmark-only: append what was measured as JSON lines"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Set here and not in `addopts`, where --benchmark-skip would contradict --benchmark-only."""
    if not config.getoption("--benchmark-only", default=False):
        config.option.benchmark_skip = True
