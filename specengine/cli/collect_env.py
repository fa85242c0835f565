"""`specengine collect-env`: what a bug report needs to know."""

from __future__ import annotations

from specengine.cli.options import AsJson
from specengine.cli.output import print_sections


def collect_env(as_json: AsJson = False) -> None:
    """Versions, processor, threads and build, for a bug report."""
    from specengine.measure.environment import collect_environment

    print_sections(collect_environment(), as_json=as_json)
