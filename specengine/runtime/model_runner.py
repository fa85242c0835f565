"""Runs one model's forward over the shared block table and its own KV tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specengine.kernels.program import DraftRows, DrawKeys, ForwardBatch
from specengine.models.decoder import Decoder
from specengine.ops import Backend
from specengine.runtime.batch import build_forward_batch
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

    def forward(self, batch: RunningBatch, start: Tensor, q_len: Tensor, num_logits: Tensor) -> Tensor:
        """Feeds q_len[b] tokens of each sequence from position start[b] on (`[B]` int32 each).

        Returns the fp32 logits of each sequence's last num_logits[b] tokens, `[sum(num_logits), V]`.
        """
        return self.decoder.forward(self._build(batch, start, q_len, num_logits), *self._where())

    def forward_stats(
        self, batch: RunningBatch, start: Tensor, q_len: Tensor, num_logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`forward`, and each logit row's statistics under its sequence's temperature and filters, `[rows, 4]`."""
        where = (self._build(batch, start, q_len, num_logits), *self._where())
        return self.decoder.forward_stats(*where, _keys(batch))

    def draw(
        self, batch: RunningBatch, start: Tensor, q_len: Tensor, num_logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`forward`, then the draw of each logit row by its sequence's parameters and seed; no logits are stored.

        Returns tokens and error flags, `[sum(num_logits)]` int32 each. Biases are not applied.
        """
        return self.decoder.draw(self._build(batch, start, q_len, num_logits), *self._where(), _keys(batch))

    def draft(self, batch: RunningBatch, start: Tensor, limits: list[int]) -> tuple[Tensor, Tensor]:
        """limits[b] draws in a row for each sequence, which first feeds its tokens from start[b] (`[B]` int32) on.

        Draws are staged behind the committed tokens, where the next forward reads them. Returns tokens and error
        flags, `[B, max(limits)]` int32 each, 0 beyond a sequence's limit.
        """
        wanted = torch.tensor(limits, dtype=torch.int32, device=start.device)
        rows = DraftRows(batch.tokens, batch.block_table, batch.slots, start, batch.seq_len, wanted)
        drafted = self.decoder.draft(rows, *self._where(), _keys(batch))
        if drafted is not None:
            return drafted
        tokens = batch.slots.new_zeros(batch.size, max(limits))
        error = torch.zeros_like(tokens)
        for step, chosen, part, fed in draft_steps(batch, start, limits):
            drawn, is_bad = self.draw(part, *fed)
            tokens[chosen, step], error[chosen, step] = drawn, is_bad
            part.tokens[part.slots.long(), part.seq_len.long() + step] = drawn
        return tokens, error

    def _build(self, batch: RunningBatch, start: Tensor, q_len: Tensor, num_logits: Tensor) -> ForwardBatch:
        where = (batch.slots, start, q_len, num_logits)
        tables = (batch.tokens, batch.block_table)
        return build_forward_batch(self.backend, *tables, *where, block_size=self.kv_cache.block_size)

    def _where(self) -> tuple[Tensor, int]:
        return self.kv_cache.tensors[self.model_index], self.vocab_size


def draft_steps(
    batch: RunningBatch, start: Tensor, limits: list[int]
) -> Iterator[tuple[int, list[int], RunningBatch, tuple[Tensor, Tensor, Tensor]]]:
    """Drafting step by step: the step, the rows that still draft, their batch, and what `draw` or `forward` feeds."""
    for step in range(max(limits)):
        rows = [row for row, limit in enumerate(limits) if limit > step]
        part = batch.take(rows)
        end = part.seq_len + step
        first = start[rows] if step == 0 else end - 1
        yield step, rows, part, (first, end - first, torch.ones_like(end))


def _keys(batch: RunningBatch) -> DrawKeys:
    filters = (batch.top_k, batch.top_p, batch.min_p)
    return DrawKeys(batch.temperature, *filters, batch.seeds, batch.has_filters)
