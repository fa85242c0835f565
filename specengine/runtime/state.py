"""The running batch as struct-of-arrays tensors, one row a sequence slot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specengine import rng
from specengine.config import MAX_NUM_SPECULATIVE_TOKENS
from specengine.runtime.sequence import Sequence

_FOREVER = 2**31 - 1


@dataclass(frozen=True)
class LogitBias:
    """Sparse additions to the logits: entry m adds value[m] to token[m] of sequence row[m] while the position
    being decided is below until[m]. Banning a token is adding -inf."""

    row: Tensor
    token: Tensor
    value: Tensor
    until: Tensor


@dataclass(frozen=True)
class RunningBatch:
    """B running sequences as one round sees them. Tensors are `[B]` unless said otherwise.

    sequence_ids:   stable names, for drafters that keep state
    slots:          int32, rows of `tokens` and `block_table`
    seq_len:        int32, committed tokens
    max_draft:      int32, how many tokens may be drafted this round
    temperature, top_p, min_p: fp32; top_k: int32
    seeds:          int64, the bits of the 64-bit seeds
    uses_rejection: bool, rejection mode (never set on greedy rows)
    tokens:         `[S, max_seq_len + 65]` int32, committed tokens; beyond seq_len staged drafts
    block_table:    `[S, max_blocks]` int32
    bias:           sparse additions to the logits, or None
    lengths, draft_limits: seq_len and max_draft as the host knows them
    has_rejection, is_all_rejection: whether any / every row uses rejection mode
    wants_logprobs: whether any row's log-probabilities are wanted
    has_filters: whether any row has top-k, top-p or min-p
    """

    sequence_ids: tuple[int, ...]
    slots: Tensor
    seq_len: Tensor
    max_draft: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    uses_rejection: Tensor
    tokens: Tensor
    block_table: Tensor
    bias: LogitBias | None
    lengths: tuple[int, ...]
    draft_limits: tuple[int, ...]
    has_rejection: bool
    is_all_rejection: bool
    wants_logprobs: bool
    has_filters: bool

    @property
    def size(self) -> int:
        return len(self.sequence_ids)

    @property
    def is_decided_by_draws(self) -> bool:
        """Whether the target's own draws decide everything, so that nobody need see its logits."""
        may_reject = self.has_rejection and any(self.draft_limits)
        return self.bias is None and not self.wants_logprobs and not may_reject

    def committed(self, index: int) -> list[int]:
        """The committed token ids of sequence `index` of this batch, the prompt's included."""
        row: list[int] = self.tokens[int(self.slots[index]), : self.lengths[index]].tolist()
        return row

    def take(self, rows: list[int]) -> RunningBatch:
        """The batch of the given rows only; the batch itself if that is all of them."""
        if len(rows) == self.size:
            return self
        index = torch.tensor(rows, device=self.seq_len.device)
        bias = self.bias
        if bias is not None:
            new_row = torch.full((self.size,), -1, device=index.device)
            new_row[index] = torch.arange(len(rows), device=index.device)
            kept = new_row[bias.row] >= 0
            bias = replace(
                bias,
                row=new_row[bias.row][kept],
                token=bias.token[kept],
                value=bias.value[kept],
                until=bias.until[kept],
            )
        uses_rejection = self.uses_rejection[index]
        return replace(
            self,
            sequence_ids=tuple(self.sequence_ids[row] for row in rows),
            slots=self.slots[index],
            seq_len=self.seq_len[index],
            max_draft=self.max_draft[index],
            temperature=self.temperature[index],
            top_k=self.top_k[index],
            top_p=self.top_p[index],
            min_p=self.min_p[index],
            seeds=self.seeds[index],
            uses_rejection=uses_rejection,
            bias=bias,
            lengths=tuple(self.lengths[row] for row in rows),
            draft_limits=tuple(self.draft_limits[row] for row in rows),
            has_rejection=bool(uses_rejection.any()),
            is_all_rejection=bool(uses_rejection.all()),
        )


class BatchState:
    """Owns the per-slot tensors. A row means nothing until `admit` fills it."""

    def __init__(self, *, num_slots: int, max_seq_len: int, device: torch.device) -> None:
        self.device = device
        # Rounds write up to k + 1 tokens past the committed ones, wherever those end.
        width = max_seq_len + MAX_NUM_SPECULATIVE_TOKENS + 1
        self.tokens = torch.zeros(num_slots, width, dtype=torch.int32, device=device)
        self.seq_len = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.temperature = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.top_p = torch.ones(num_slots, dtype=torch.float32, device=device)
        self.min_p = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self.seeds = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.uses_rejection = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self._selected_slots: list[int | None] | None = None
        self._selection: tuple[Tensor, Tensor, dict[str, Tensor]]

    def admit(self, sequence: Sequence) -> None:
        """Fills the row of a sequence that has just been given a slot."""
        slot, params = sequence.slot, sequence.params
        assert slot is not None, f"sequence {sequence.sequence_id} has no slot"
        self._selected_slots = None
        ids = torch.tensor(sequence.token_ids, dtype=torch.int32)
        self.tokens[slot, : ids.numel()] = ids.to(self.device)
        self.seq_len[slot] = sequence.num_tokens
        self.temperature[slot] = params.temperature
        self.top_k[slot] = params.top_k
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.seeds[slot] = rng.signed_seed(sequence.seed)
        self.uses_rejection[slot] = params.uses_rejection

    def select(self, sequences: Iterable[Sequence], block_table: Tensor, *, may_draft: bool) -> RunningBatch:
        """The rows of `sequences`, in order; `may_draft=False` is a round with k = 0."""
        chosen = list(sequences)
        slots, index, constants = self._select_slots([sequence.slot for sequence in chosen])
        limits = tuple(sequence.max_draft_tokens if may_draft else 0 for sequence in chosen)
        params = [sequence.params for sequence in chosen]
        rejection = [each.uses_rejection for each in params]
        bias = _build_bias(chosen, self.device)
        return RunningBatch(
            sequence_ids=tuple(sequence.sequence_id for sequence in chosen),
            slots=slots,
            seq_len=self.seq_len[index],
            max_draft=torch.tensor(limits, dtype=torch.int32, device=self.device),
            tokens=self.tokens,
            block_table=block_table,
            bias=bias,
            lengths=tuple(sequence.num_tokens for sequence in chosen),
            draft_limits=limits,
            has_rejection=any(rejection),
            is_all_rejection=all(rejection),
            wants_logprobs=any(each.logprobs is not None for each in params),
            has_filters=any(each.has_filters for each in params),
            **constants,
        )

    def _select_slots(self, slots: list[int | None]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The slots as int32 and int64, and those rows of what only `admit` changes; the last answer is kept."""
        if slots != self._selected_slots:
            of_slots = torch.tensor(slots, dtype=torch.int32, device=self.device)
            index = of_slots.long()
            names = ("temperature", "top_k", "top_p", "min_p", "seeds", "uses_rejection")
            self._selection = of_slots, index, {name: getattr(self, name)[index] for name in names}
            self._selected_slots = slots
        return self._selection

    def stage(self, batch: RunningBatch, drafted: Tensor) -> None:
        """Writes drafted tokens `[B, k]` behind the committed ones, where the next forward reads them."""
        self._write(batch, drafted)

    def commit(self, batch: RunningBatch, emitted: Tensor, num_emitted: Tensor) -> None:
        """Appends emitted[b, : num_emitted[b]] to each sequence (`[B, k + 1]`, `[B]`)."""
        self._write(batch, emitted)
        self.seq_len[batch.slots.long()] = batch.seq_len + num_emitted

    def _write(self, batch: RunningBatch, columns: Tensor) -> None:
        if columns.shape[1]:
            offset = torch.arange(columns.shape[1], device=self.device)
            self.tokens[batch.slots.long()[:, None], batch.seq_len.long()[:, None] + offset] = columns


def _build_bias(sequences: list[Sequence], device: torch.device) -> LogitBias | None:
    entries: list[tuple[int, int, float, int]] = []
    for row, sequence in enumerate(sequences):
        entries += [(row, token, value, _FOREVER) for token, value in sequence.params.logit_bias]
        if sequence.num_tokens < sequence.banned_until:
            entries += [(row, token, float("-inf"), sequence.banned_until) for token in sequence.ending_ids]
    if not entries:
        return None
    rows, tokens, values, until = zip(*entries, strict=True)
    return LogitBias(
        torch.tensor(rows, device=device),
        torch.tensor(tokens, device=device),
        torch.tensor(values, dtype=torch.float32, device=device),
        torch.tensor(until, device=device),
    )


def apply_bias(
    logits: Tensor, batch: RunningBatch, row_start: Tensor, num_rows: Tensor, first_position: Tensor
) -> Tensor:
    """The logits with the batch's sparse additions; the input is left as it is.

    logits:         `[R, V]` fp32, rows row_start[b] … row_start[b] + num_rows[b] - 1 belong to sequence b
    first_position: `[B]`, the absolute position that a sequence's first row decides
    """
    bias = batch.bias
    if bias is None or not logits.shape[0]:
        return logits
    offset = torch.arange(int(num_rows.max()), device=logits.device)
    is_used = (offset < num_rows[bias.row][:, None]) & (
        first_position[bias.row][:, None] + offset < bias.until[:, None]
    )
    row = (row_start[bias.row].long()[:, None] + offset)[is_used]
    token = bias.token[:, None].expand_as(is_used)[is_used]
    value = bias.value[:, None].expand_as(is_used)[is_used]
    return logits.clone().index_put((row, token), value, accumulate=True)
