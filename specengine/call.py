"""A call, checked: names, prompts, values and models, before anything is loaded or allocated."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from specengine import bundled
from specengine.config import EngineConfig, SamplingParams, check_bool, field_names
from specengine.drafters.registry import names_a_drafter
from specengine.prompt import check_prompts

Function = TypeVar("Function", bound=Callable[..., Any])

ALIASES = {
    "max_tokens": "max_new_tokens",
    "assistant_model": "draft_model",
    "num_assistant_tokens": "num_speculative_tokens",
    "stop_strings": "stop",
}
DO_SAMPLE = "do_sample"


@dataclass(frozen=True)
class Call:
    """A checked call: everything that can be refused without a model has been."""

    prompts: list[str | list[int]]
    is_single: bool
    params: SamplingParams
    config: EngineConfig
    model: Any
    draft_model: Any
    progress: bool | None

    @property
    def prompt(self) -> str | list[int] | list[str | list[int]]:
        """As the caller gave it: one prompt, or a list of them."""
        return self.prompts[0] if self.is_single else self.prompts


def prepare_call(prompt: object, options: Mapping[str, Any]) -> Call:
    """Checks a prompt and options under their main names. Loads nothing, allocates nothing."""
    prompts, is_single = check_prompts(prompt)
    params = SamplingParams(**_select(options, field_names(SamplingParams)))
    config = EngineConfig(**_select(options, field_names(EngineConfig)))
    model, draft_model = _resolve_models(
        options.get("model"), options.get("draft_model"), params.num_speculative_tokens
    )
    progress = options.get("progress")
    if progress is not None:
        check_bool("progress", progress)
    return Call(prompts, is_single, params, config, model, draft_model, progress)


def _select(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    selected = {name: options[name] for name in names if name in options}
    if "device" in selected:
        selected["device"] = str(selected["device"])
    return selected


# Names


def resolve_aliases(given: Mapping[str, Any], valid_names: Sequence[str]) -> dict[str, Any]:
    """The arguments under their main names.

    Raises `TypeError` for a name that is neither, with the closest valid one, and `ValueError` for an alias
    that contradicts the main name.
    """
    for name in given:
        if name not in valid_names and name not in ALIASES and name != DO_SAMPLE:
            raise TypeError(_unknown_name(name, valid_names))
    resolved = {name: value for name, value in given.items() if name in valid_names}
    for alias, name in ALIASES.items():
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


def _unknown_name(name: str, valid_names: Sequence[str]) -> str:
    candidates = [*valid_names, *ALIASES, DO_SAMPLE]
    closest = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    hint = f"; did you mean {closest[0]!r}?" if closest else ""
    return f"unknown argument {name!r}{hint}"


def accepts_aliases(function: Function) -> Function:
    """Resolves aliases before `function` fills in defaults, while it is known what the caller really gave."""
    parameters = inspect.signature(function).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]

    @functools.wraps(function)
    def with_main_names(*args: Any, **given: Any) -> Any:
        return function(*args, **resolve_aliases(given, names))

    return cast(Function, with_main_names)


# Models


def _resolve_models(model: object, draft_model: object, num_speculative_tokens: int | str) -> tuple[Any, Any]:
    """The target and the draft to load; the bundled pair where nothing is named."""
    for name, value in (("model", model), ("draft_model", draft_model)):
        if isinstance(value, str) and not value:
            raise ValueError(f"{name} must be a directory, a name or a model, got ''")
    if model is None:
        if draft_model is None:
            return bundled.target_path(), bundled.draft_path()
        if _names_a_checkpoint(draft_model):
            raise ValueError(
                f"draft_model={_describe(draft_model)} needs a model: without one the target is the bundled "
                "one, and the draft that fits it is its own"
            )
        return bundled.target_path(), draft_model
    if draft_model is None and isinstance(num_speculative_tokens, int) and num_speculative_tokens > 0:
        raise ValueError(
            f"num_speculative_tokens={num_speculative_tokens} needs a draft_model: "
            f"model={_describe(model)} was given without one"
        )
    return model, draft_model


def _names_a_checkpoint(draft_model: object) -> bool:
    """Whether this is a checkpoint with a vocabulary of its own, not something that drafts for any target."""
    if isinstance(draft_model, str):
        return not names_a_drafter(draft_model)
    return isinstance(draft_model, os.PathLike) or hasattr(draft_model, "state_dict")


def _describe(model: object) -> str:
    return repr(str(model)) if isinstance(model, str | os.PathLike) else type(model).__name__
