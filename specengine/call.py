"""A call, checked: names, prompts, values and models, before anything is loaded or allocated."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from specengine import bundled
from specengine.config import ChatOptions, EngineConfig, ModelOptions, SamplingParams, field_names
from specengine.conversations import check_conversations, given_template
from specengine.drafters.registry import names_a_drafter
from specengine.kinds import check_bool
from specengine.prompt import check_prompts


@dataclass(frozen=True)
class Call:
    """A checked call: everything that can be refused without a model has been.

    needs_chat_template: the model must bring one, or is not loaded
    """

    prompts: list[str | list[int]]
    is_single: bool
    params: SamplingParams
    config: EngineConfig
    model: Any
    draft_model: Any
    progress: bool | None
    needs_chat_template: bool = False

    @property
    def prompt(self) -> str | list[int] | list[str | list[int]]:
        """As the caller gave it: one prompt, or a list of them."""
        return self.prompts[0] if self.is_single else self.prompts


def prepare_call(prompt: object, options: Mapping[str, Any], *, progress: bool | None = None) -> Call:
    """Checks a prompt and options under their main names. Loads nothing, allocates nothing.

    What a profile recommends stands for options that were not given.
    """
    return _prepare(*check_prompts(prompt), _completed(options), progress)


def prepare_engine(options: Mapping[str, Any]) -> Call:
    """The same of what an engine is built from: a call without prompts."""
    return _prepare([], False, _completed(options), None)


@dataclass(frozen=True)
class ChatCall:
    """A checked call about conversations.

    call:     what an engine is leased for; it has no prompts, since only a model writes a conversation out
    sampling: the options of requests and conversations that were given, which the model's own defaults complete
    """

    call: Call
    conversations: list[list[dict[str, Any]]]
    sampling: dict[str, Any]

    @property
    def messages(self) -> Any:
        """As the caller gave them: one conversation, or a list of them."""
        return self.conversations[0] if self.call.is_single else self.conversations


def prepare_chat(messages: object, options: Mapping[str, Any], *, progress: bool | None = None) -> ChatCall:
    """Checks conversations and options as `prepare_call` does, and a template that is given."""
    conversations, is_single = check_conversations(messages)
    options = _completed(options)
    chat = ChatOptions(**_select(options, ChatOptions))
    given_template(chat)
    call = _prepare([], is_single, options, progress)
    sampling = {**_select(options, SamplingParams), **_select(options, ChatOptions)}
    return ChatCall(replace(call, needs_chat_template=chat.chat_template is None), conversations, sampling)


def _completed(options: Mapping[str, Any]) -> Mapping[str, Any]:
    return options if options.get("profile") is None else _with_profile(options)


def _prepare(
    prompts: list[str | list[int]], is_single: bool, options: Mapping[str, Any], progress: bool | None
) -> Call:
    params = SamplingParams(**_select(options, SamplingParams))
    config = EngineConfig(**_select(options, EngineConfig))
    models = ModelOptions(**_select(options, ModelOptions))
    model, draft_model = _resolve_models(models.model, models.draft_model, params.num_speculative_tokens)
    if progress is not None:
        check_bool("progress", progress)
    return Call(prompts, is_single, params, config, model, draft_model, progress)


def _select(options: Mapping[str, Any], group: type) -> dict[str, Any]:
    return {name: options[name] for name in field_names(group) if name in options}


def _with_profile(options: Mapping[str, Any]) -> dict[str, Any]:
    from specengine.profiles import read_profile, with_profile

    path = EngineConfig(profile=options["profile"]).profile
    assert path is not None, "it was checked"
    return with_profile(read_profile(path), options)


# Models


def _resolve_models(model: object, draft_model: object, num_speculative_tokens: int | str) -> tuple[Any, Any]:
    """The target and the draft to load; the bundled pair where nothing is named."""
    if model is None:
        if draft_model is None:
            return bundled.target_path(), bundled.draft_path()
        drafts = draft_model if isinstance(draft_model, tuple) else (draft_model,)
        if any(_names_a_checkpoint(draft) for draft in drafts):
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
    if isinstance(model, tuple):
        return f"[{', '.join(map(_describe, model))}]"
    return repr(str(model)) if isinstance(model, str | os.PathLike) else type(model).__name__
