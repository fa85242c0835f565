"""`specengine bench kernels`: the microbenchmarks of a checkout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from specengine.cli import tables
from specengine.cli.measuring import AsCsv, Out, check_out, check_outputs, collect, print_csv
from specengine.cli.options import AsJson
from specengine.cli.output import print_json

if TYPE_CHECKING:
    from rich.table import Table

    from specengine.measure.records import Record


def kernels(
    ops: Annotated[
        list[str] | None,
        typer.Argument(metavar="OP", help="by default those that a round spends its time in"),
    ] = None,
    only: Annotated[
        str | None, typer.Option("-k", metavar="EXPRESSION", help="of the benchmarks' names, as in pytest")
    ] = None,
    list_ops: Annotated[bool, typer.Option("--list", help="the ops that have a benchmark")] = False,
    out: Out = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Time single ops beside PyTorch's, each as a share of what the memory can do. Needs a checkout of the repository.

    A row says how long one call takes, how fast it reads, and how much longer the others take.
    """
    check_outputs(as_json=as_json, as_csv=as_csv)
    from specengine.measure.kernels import DEFAULT_OPS, cells, find_benchmarks, known_ops, measure_kernels

    benchmarks = find_benchmarks()
    known = known_ops(benchmarks)
    if list_ops:
        typer.echo("\n".join(known))
        return
    chosen = list(ops or DEFAULT_OPS)
    if unknown := [op for op in chosen if op not in known]:
        raise ValueError(f"there is no benchmark of {', '.join(unknown)}; there are {', '.join(known)}")
    check_out(out)
    kept = collect(
        measure_kernels(benchmarks, chosen, only),
        total=None,
        out=out,
        draw=_draw,
    )
    if as_json:
        print_json(kept.to_json())
    elif as_csv:
        print_csv(_filled([cells(record) for record in kept.records]))
    elif kept.records:
        from rich.console import Console

        Console(highlight=False).print(_draw(kept.records))
    kept.finish()


def _filled(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """With every column in every row."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name, "") for name in names} for row in rows]


def _draw(records: Sequence[Record]) -> Table:
    from specengine.measure.kernels import cells

    rows = _filled([cells(record) for record in records])
    titles = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    return tables.build_table(
        titles, [[row[name] for name in titles] for row in rows], num_names=2, wraps_names=True
    )
