"""Runs one model's forward over the shared block table and its own KV tensor."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from specengine.kernels.types.program import DraftRows, DrawKeys, ForwardBatch
from specengine.models.decoder import Decoder
from specengine.ops.backend import Backend
from specengine.ops.interpreter import row_keys
from specengine.runtime.batch import Feed, build_forward_batch, row_starts
from specengine.runtime.kv_cache import KVCache
from specengine.runtime.state import RunningBatch, apply_bias


class JudgedLogits(NamedTuple):
    """raw_logits: `[R, V]` fp32 as the model gives them; logits: with every bias; stats: `[R, 4]` of those."""

    raw_logits: Tensor
    logits: Tensor
    stats: Tensor


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
        where = (batch.tokens, batch.block_table, batch.slots, feed)
        return build_forward_batch(self.backend, *where, block_size=self.kv_cache.block_size)

    def forward(self, rows: ForwardBatch) -> Tensor:
        """The fp32 logits of the rows that are wanted, `[R, V]`."""
        return self.decoder.forward(rows, *self._where())

    def forward_stats(self, rows: ForwardBatch, batch: RunningBatch) -> tuple[Tensor, Tensor]:
        """`forward`, and each logit row's statistics under its sequence's temperature and filters, `[R, 4]`."""
        return self.decoder.forward_stats(rows, *self._where(), draw_keys(batch))

    def judge(
        self, rows: ForwardBatch, batch: RunningBatch, num_rows: Tensor, first_position: Tensor
    ) -> JudgedLogits:
        """`forward_stats` with the batch's biases: sequence b's num_rows[b] logit rows decide the positions from
        first_position[b] on (`[B]` int32 each)."""
        if batch.bias is None:
            logits, stats = self.forward_stats(rows, batch)
            return JudgedLogits(logits, logits, stats)
        logits = self.forward(rows)
        biased = apply_bias(logits, batch, row_starts(num_rows), num_rows, first_position)
        judged_by, _ = row_keys(self.backend, draw_keys(batch), rows)
        return JudgedLogits(logits, biased, self.backend.filter_rows(biased, *judged_by[:4]))

    def draw(self, rows: ForwardBatch, batch: RunningBatch) -> tuple[Tensor, Tensor]:
        """`forward`, then the draw of each logit row by its sequence's parameters and seed; no logits are stored.

        Returns tokens and error flags, `[R]` int32 each. Biases are not applied.
        """
        return self.decoder.draw(rows, *self._where(), draw_keys(batch))

    def draft(self, batch: RunningBatch) -> tuple[Tensor, Tensor] | None:
        """All the draws that the batch's plan asks for in one call, where the backend has it, else None.

        Draws are staged behind the committed tokens, where the next forward reads them. Returns tokens and error
        flags, `[B, the most that any sequence drafts]` int32 each, 0 beyond a sequence's limit.
        """
        plan = batch.planned
        tables = (batch.tokens, batch.block_table, batch.slots)
        rows = DraftRows(*tables, plan.draft_start[0], plan.seq_len, plan.num_draft)
        return self.decoder.draft(rows, *self._where(), draw_keys(batch))

    def _where(self) -> tuple[Tensor, int]:
        return self.kv_cache.tensors[self.model_index], self.vocab_size


def draw_keys(batch: RunningBatch) -> DrawKeys:
    """What the batch's draws depend on."""
    return DrawKeys(batch.rows, batch.mode.has_filters)
