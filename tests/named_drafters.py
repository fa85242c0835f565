"""Drafters that tests put into the registry: one on the host, one that drafts with the target itself."""

from __future__ import annotations

from typing import Any

from scripted_drafters import RandomDrafter

from specengine.drafters.base import DrafterContext
from specengine.drafters.draft_model import DraftModelDrafter
from specengine.runtime.kv_cache import DRAFT
from specengine.runtime.model_runner import ModelRunner

contexts: list[DrafterContext] = []


def build(context: DrafterContext) -> Any:
    """Random ids; with a draft, what that says."""
    contexts.append(context)
    if context.draft is None:
        return RandomDrafter(vocab_size=context.vocab_size)
    runner = ModelRunner(
        context.draft.decoder, context.kv_cache, model_index=DRAFT, vocab_size=context.vocab_size
    )
    return DraftModelDrafter(runner, name="twin", chunk_size=context.chunk_size)


def load_draft(argument: str, target: Any, load_model: Any) -> Any:
    """`name:target` drafts with the target's own weights, `name:PATH` with a model, `name` with none."""
    if not argument:
        return None
    return target if argument == "target" else load_model(argument)
