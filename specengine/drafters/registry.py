"""Drafters by name: what `draft_model="name"` or `"name:argument"` means, for every caller alike.

A drafter's module has

    def build(context: DrafterContext) -> Drafter | RoundDrafter

and, if it drafts with a model whose keys and values lie in the target's blocks,

    def load_draft(argument: str, target: LoadedModel, load_model: LoadModel) -> LoadedModel | None

whose result `build` finds in its context, and, if not every argument can be,

    def check(argument: str, target: DecoderSpec | None) -> None

which raises `ValueError` with what is wrong: it is called before anything is read, and again when the target's config
has been. One that needs an argument says which one fits a target, if any does:

    def choose_argument(target: DecoderSpec) -> str | None

A module is imported when an engine wants it.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specengine.drafters.base import Drafter, DrafterContext, LoadModel, RoundDrafter
    from specengine.models.decoder import DecoderSpec
    from specengine.models.loader import LoadedModel

# Adding a drafter: one file, and its name here.
DRAFTERS: dict[str, str] = {
    "ngram": "specengine.drafters.ngram",
    "self": "specengine.drafters.self_layers",
    "suffix": "specengine.drafters.suffix",
}


def names_a_drafter(draft_model: object) -> bool:
    """Whether this is a drafter's name, not that of a checkpoint."""
    return isinstance(draft_model, str) and split(draft_model)[0] in DRAFTERS


def check(draft_model: object, target: DecoderSpec | None = None) -> None:
    """Raises `ValueError` for the argument of a named drafter that cannot be, as far as is known without the target or
    with its config."""
    if not isinstance(draft_model, str) or not names_a_drafter(draft_model):
        return
    name, argument = split(draft_model)
    check_argument = getattr(importlib.import_module(DRAFTERS[name]), "check", None)
    if check_argument is None:
        return
    try:
        check_argument(argument, target)
    except ValueError as error:
        raise ValueError(f"draft_model={draft_model!r}: {error}") from None


def lookups() -> list[str]:
    """The names of those that need no model at all, not even a part of the target: they look up in the text."""
    return [
        name
        for name, module in DRAFTERS.items()
        if not hasattr(importlib.import_module(module), "choose_argument")
    ]


def without_model(target: DecoderSpec) -> list[str]:
    """Every drafter that can run with this target and nothing else, with its argument."""
    names: list[str] = []
    for name, module in DRAFTERS.items():
        choose_argument = getattr(importlib.import_module(module), "choose_argument", None)
        if choose_argument is None:
            names.append(name)
        elif (argument := choose_argument(target)) is not None:
            names.append(f"{name}:{argument}")
    return names


def is_named(draft_model: str, module: ModuleType) -> bool:
    """Whether this drafter is the module's."""
    return DRAFTERS.get(split(draft_model)[0]) == module.__name__


def split(draft_model: str) -> tuple[str, str]:
    """Name and argument of `name:argument`."""
    name, _, argument = draft_model.partition(":")
    return name, argument


def load_draft(draft_model: str, target: LoadedModel, load_model: LoadModel) -> LoadedModel | None:
    """The model that a named drafter drafts with, or None if it has none."""
    name, argument = split(draft_model)
    load = getattr(importlib.import_module(DRAFTERS[name]), "load_draft", None)
    return None if load is None else load(argument, target, load_model)


def build(draft_model: str, context: DrafterContext) -> Drafter | RoundDrafter:
    """The drafter of that name."""
    drafter: Drafter | RoundDrafter = importlib.import_module(DRAFTERS[split(draft_model)[0]]).build(context)
    return drafter
