"""The names of options: what they are called elsewhere, and what somebody may have meant."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar, cast

from specengine.config import EngineConfig, ModelOptions, SamplingParams, declaration
from specengine.kinds import check_bool

Function = TypeVar("Function", bound=Callable[..., Any])

# Other words for a name, for all options.
ALIASES = {
    alias: item.name
    for group in (ModelOptions, SamplingParams, EngineConfig)
    for item in fields(group)
    for alias in declaration(item).aliases
}
DO_SAMPLE = "do_sample"
# Arguments of other engines' that will not come.
_BEAM_SEARCH = "beam search is out of scope: an output is what the target says or samples, token by token"
OUT_OF_SCOPE = dict.fromkeys(
    ("num_beams", "num_beam_groups", "use_beam_search", "length_penalty", "early_stopping"), _BEAM_SEARCH
)


def takes_options(*groups: type) -> Callable[[Function], Function]:
    """Gives a function with `**options` the fields of `groups` as keywords, and their aliases.

    The function gets what its caller gave, under the main names. Its signature spells every option out. Raises as
    `resolve_names` does.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        options = [
            inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=item.default,
                annotation=declaration(item).kind.accepts or item.type,
            )
            for group in groups
            for item in fields(group)
        ]
        parameters = sorted([*own, *options], key=lambda each: each.kind)
        names = [each.name for each in parameters if each.name != "self"]

        @functools.wraps(function)
        def with_main_names(*args: Any, **given: Any) -> Any:
            return function(*args, **resolve_names(given, names))

        with_main_names.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return cast(Function, with_main_names)

    return decorate


def resolve_names(given: Mapping[str, Any], valid_names: Sequence[str]) -> dict[str, Any]:
    """The arguments under their main names.

    Raises `TypeError` for a name that is neither one of `valid_names` nor an alias of one, with the closest, and
    `ValueError` for an alias that contradicts the main name.
    """
    aliases = {alias: name for alias, name in ALIASES.items() if name in valid_names}
    known = [*valid_names, *aliases, *([DO_SAMPLE] if "temperature" in valid_names else [])]
    for name in given:
        if name not in known:
            raise TypeError(_unknown_name(name, known))
    resolved = {name: value for name, value in given.items() if name in valid_names}
    for alias, name in aliases.items():
        if alias not in given:
            continue
        if name in resolved and resolved[name] != given[alias]:
            raise ValueError(
                f"{alias}={given[alias]!r} contradicts {name}={resolved[name]!r}: "
                f"{alias} is another word for {name}, give one of them"
            )
        resolved[name] = given[alias]
    return _resolve_do_sample(resolved, given.get(DO_SAMPLE))


def _resolve_do_sample(resolved: dict[str, Any], do_sample: object) -> dict[str, Any]:
    if do_sample is None:
        return resolved
    is_sampled = check_bool(DO_SAMPLE, do_sample)
    temperature = resolved.get("temperature", 1.0 if is_sampled else 0.0)
    if (temperature == 0) == is_sampled:
        raise ValueError(
            f"{DO_SAMPLE}={do_sample!r} contradicts temperature={temperature!r}: "
            "temperature 0 is greedy decoding, anything above samples"
        )
    return {**resolved, "temperature": temperature}


def _unknown_name(name: str, known: Sequence[str]) -> str:
    if name in OUT_OF_SCOPE:
        return f"{name!r}: {OUT_OF_SCOPE[name]}"
    closest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {closest[0]!r}?" if closest else ""
    return f"unknown argument {name!r}{hint}"
