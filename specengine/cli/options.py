"""The library's options on the command line, built from their declaration in specengine/config.py.

A command says which groups it takes:

    @takes(ModelOptions, SamplingParams, EngineConfig)
    def generate(options: dict[str, Any], ...) -> None:

and gets what was given as one dict, under the library's names, beside parameters of its own. What was not given, and
whose default is the library's, is not in it: a profile may say it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import Field, fields
from typing import Annotated, Any

import typer

from specengine.config import Option, declaration
from specengine.kinds import Flag, FlagOrAuto, Kind, Unavailable

AsJson = Annotated[
    bool, typer.Option("--json", help="one JSON object on stdout, in ASCII, and nothing else besides")
]

_CONTEXT = "typer_context"


def takes(
    *groups: type,
    only: Collection[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    open_defaults: Collection[str] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds the options of `groups` to a command whose first parameter is a dict of those that were given.

    only:     names of those to take, where not all of them say something
    defaults: where the command's differ from the library's
    open_defaults: names of those of `defaults` that the command itself puts in, where nothing else says a value
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        items = [item for group in groups for item in _written(group) if only is None or item.name in only]
        options = [_parameter(item, (defaults or {}).get(item.name, item.default)) for item in items]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            context: typer.Context = given.pop(_CONTEXT)
            values = {item.name: given.pop(item.name) for item in items}
            changed = {item.name for item in items if values[item.name] != item.default} - {*open_defaults}
            typed = {name for name in values if not _is_default(context, name)}
            command(_chosen([item for item in items if item.name in changed | typed], values), **given)

        context = inspect.Parameter(_CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        run.__signature__ = inspect.Signature([*own, context, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {}
        return run

    return decorate


def _is_default(context: typer.Context, name: str) -> bool:
    """Whether nobody wrote an option. By name: typer may carry a click of its own."""
    source = context.get_parameter_source(name)
    return source is None or source.name in ("DEFAULT", "DEFAULT_MAP")


def _chosen(items: list[Field[Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, as the library takes it."""
    chosen = {}
    for item in items:
        value, kind = given[item.name], _kind(item)
        if value is not None and value != []:
            chosen[item.name] = kind.gather(value) if kind.is_repeated else value
    return chosen


def _written(group: type) -> Iterator[Field[Any]]:
    return (item for item in fields(group) if _kind(item).is_written)


def _kind(item: Field[Any]) -> Kind:
    """Of a field's values; what is not available in this version has its form already."""
    kind = declaration(item).kind
    return kind.kind if isinstance(kind, Unavailable) else kind


def _parameter(item: Field[Any], default: object) -> inspect.Parameter:
    about, kind = declaration(item), _kind(item)
    name = f"--{item.name.replace('_', '-')}"
    annotation: Any
    if isinstance(kind, Flag):
        is_open = isinstance(kind, FlagOrAuto)
        default = default if isinstance(default, bool) else None
        settings = typer.Option(
            f"{name}/--no-{name[2:]}", *about.flags, help=_help(about), show_default=bool(default)
        )
        annotation = Annotated[bool | None, settings] if is_open else Annotated[bool, settings]
    else:
        settings = typer.Option(
            name, *about.flags, parser=_parser(kind), metavar=kind.metavar, help=_help(about)
        )
        annotation = Annotated[list[str] | None, settings] if kind.is_repeated else Annotated[Any, settings]
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _help(about: Option) -> str:
    notes = [note for note in (about.kind.range, "repeatable" if about.kind.is_repeated else "") if note]
    return about.help + (f" ({'; '.join(notes)})" if notes else "")


def _parser(kind: Kind) -> Callable[[Any], Any]:
    def parse(text: Any) -> Any:
        if not isinstance(text, str):
            return text  # a default
        try:
            return kind.parse(text)
        except ValueError as error:
            raise typer.BadParameter(f"{error}.") from None

    return parse
