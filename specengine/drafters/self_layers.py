"""`self:<layers>`: the target's own first layers, then its final norm and its head, as the draft model.

They compute what the target computes there: by row invariance the keys and values of a position are the same bits
whoever computed them. So the draft reads and writes the target's cache. Of the committed tokens it lacks what the
target lacks, the last one; and what it writes for the tokens that it drafts, the target's forward over them writes
again.

With a `draft_weight_dtype` that is not the target's, the layers are packed once more, their keys and values are others,
and this is a draft model like any other.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from collections.abc import Sequence as Collection

from specengine.drafters.base import DrafterContext, LoadModel, RowResult
from specengine.drafters.draft_model import DraftModelDrafter
from specengine.models.decoder import DecoderSpec
from specengine.models.loader import LoadedModel
from specengine.runtime.kv_cache import TARGET
from specengine.runtime.model_runner import ModelRunner
from specengine.runtime.sequence import Sequence
from specengine.runtime.state import BatchState, RunningBatch


def check(argument: str, target: DecoderSpec | None) -> None:
    """Raises `ValueError` unless this is a number of layers, and one that the target has."""
    if not re.fullmatch("[1-9][0-9]{0,8}", argument):
        raise ValueError(
            f"expected a number of the target's layers from 1 on after the colon, got {argument!r}"
        )
    if target is not None and int(argument) > target.num_layers:
        raise ValueError(f"the target has only {target.num_layers} layers")


def choose_argument(target: DecoderSpec) -> str | None:
    """Half of the layers; None of a single one: it would draft what the target says."""
    return str(target.num_layers // 2) if target.num_layers > 1 else None


def load_draft(argument: str, target: LoadedModel, load_model: LoadModel) -> LoadedModel | None:
    """The layers in another format than the target's; None where they are the target's own."""
    return load_model.first_layers(int(argument))


def build(context: DrafterContext) -> DraftModelDrafter:
    """The drafter on the target's cache, or, with weights of its own, on a tensor of its own."""
    build_drafter: type[DraftModelDrafter]
    if context.draft is None:
        decoder = context.target.decoder.first_layers(int(context.argument))
        build_drafter, model_index = SelfDrafter, TARGET
    else:
        decoder = context.draft.decoder
        build_drafter, model_index = DraftModelDrafter, context.model_index
    runner = ModelRunner(decoder, context.kv_cache, model_index=model_index, vocab_size=context.vocab_size)
    return build_drafter(
        runner,
        name=context.name,
        chunk_size=context.chunk_size,
        place=context.place,
        is_recorded=context.is_recorded,
    )


class SelfDrafter(DraftModelDrafter):
    """Drafts with layers of the target's on the target's own keys and values: there is nothing to catch up with, and
    nothing to note."""

    num_fed = 1

    def prepare(self, batch: RunningBatch, state: BatchState) -> Hashable | None:
        """Nothing to do."""
        return "layers", self.name

    def observe(self, batch: RunningBatch, results: Collection[RowResult | None]) -> None:
        """Nothing to do: what the cache holds is what the target computed."""

    def first_written(self, sequence: Sequence) -> int | None:
        """It writes only what the target writes after it."""
        return None
