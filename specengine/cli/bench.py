"""`specengine bench`: measurements of the user's own pair."""

from __future__ import annotations

import typer

from specengine.cli.bench_compare import compare
from specengine.cli.bench_kernels import kernels
from specengine.cli.bench_latency import latency
from specengine.cli.bench_sweep import sweep

bench = typer.Typer(
    rich_markup_mode=None,
    help="Measure plain decoding against speculative, on your own pair and prompts.",
    no_args_is_help=True,
)
# Adding one: a file bench_<name>.py with a function of its name, and a line.
bench.command()(latency)
bench.command()(sweep)
bench.command()(compare)
bench.command()(kernels)
