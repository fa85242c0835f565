"""Runs one model's forward over the shared block table and its own KV tensor."""

from __future__ import annotations

from torch import Tensor

from specengine.kernels.types.drafts import Staging
from specengine.kernels.types.program import DraftRows, DrawKeys, ForwardBatch, JudgedLogits
from specengine.models.decoder import Decoder
from specengine.ops.backend import Backend, RoundModel
from specengine.runtime.batch import Feed, FirstForward, build_forward_batch
from specengine.runtime.kv_cache import KVCache
from specengine.runtime.state import RunningBatch


class ModelRunner:
    """A decoder, the KV tensor it writes, and the vocabulary it may emit.

    model_index: this model's place among the cache's tensors and watermarks
    vocab_size:  ids from here on get -inf
    """

    def __init__(self, decoder: Decoder, kv_cache: KVCache, *, model_index: int, vocab_size: int) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.model_index = model_index
        self.vocab_size = vocab_size

    @property
    def backend(self) -> Backend:
        return self.decoder.backend

    @property
    def max_positions(self) -> int:
        return self.decoder.spec.max_positions

    def build(self, batch: RunningBatch, feed: Feed) -> ForwardBatch:
        """The rows of a forward that feeds tokens of the batch's sequences."""
        weights = self.decoder.weights
        entry = (batch.rows, weights.token_table, weights.position_table)
        where = (batch.tokens, batch.block_table, batch.slots, feed, entry)
        return build_forward_batch(self.backend, *where, block_size=self.kv_cache.block_size)

    def first_forward(self, num_fed: int) -> FirstForward:
        """A forward of this model that a round begins with."""
        weights = self.decoder.weights
        return FirstForward(num_fed, self.kv_cache.block_size, weights.token_table, weights.position_table)

    def forward(self, rows: ForwardBatch) -> Tensor:
        """The fp32 logits of the rows that are wanted, `[R, V]`."""
        return self.decoder.forward(rows, *self._where())

    def judge(self, rows: ForwardBatch, batch: RunningBatch) -> JudgedLogits:
        """`forward`, then what the batch's sequences ask for at each position, and statistics for draws."""
        return self.decoder.forward_stats(rows, *self._where(), draw_keys(batch))

    def draw(
        self, rows: ForwardBatch, batch: RunningBatch, staging: Staging | None = None
    ) -> tuple[Tensor, Tensor]:
        """`forward`, then the draw of each logit row by its sequence's parameters and seed; no logits are stored.

        Returns tokens and error flags, `[R]` int32 each. With `staging` the tokens are staged as drafts, too.
        """
        return self.decoder.draw(rows, *self._where(), draw_keys(batch), staging)

    def draft(self, batch: RunningBatch, start: Tensor) -> tuple[Tensor, Tensor] | None:
        """All the draws that the batch's plan asks for in one call, where the backend has it, else None.

        start: `[B]` int32, the first position that each sequence feeds

        Draws are staged behind the committed tokens, where the next forward reads them. Returns tokens and error
        flags, `[B, the most that any sequence drafts]` int32 each, 0 beyond a sequence's limit.
        """
        plan = batch.planned
        tables = (batch.tokens, batch.block_table, batch.slots)
        rows = DraftRows(*tables, start, plan.seq_len, plan.num_draft)
        return self.decoder.draft(rows, *self._where(), draw_keys(batch))

    @property
    def in_round(self) -> RoundModel:
        """This model in rounds that run in one call."""
        return self.decoder.in_round(*self._where())

    def _where(self) -> tuple[Tensor, int]:
        return self.kv_cache.tensors[self.model_index], self.vocab_size


def draw_keys(batch: RunningBatch) -> DrawKeys:
    """What the batch's draws depend on."""
    return DrawKeys(batch.rows, batch.mode.has_filters, batch.transforms)
