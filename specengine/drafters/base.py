"""What a drafter is: anything that can propose tokens and say how it drew them.

A drafter that replays what followed the last occurrence of the current token:

    import torch
    from specengine import DraftProposal, Engine

    class EchoDrafter:
        name = "echo"

        def propose(self, batch):
            drafts = []
            for index, limit in enumerate(batch.draft_limits):
                tokens = batch.committed(index)
                earlier = [at for at in range(len(tokens) - 1) if tokens[at] == tokens[-1]]
                drafts.append(tokens[earlier[-1] + 1 :][:limit] if earlier else [])
            return DraftProposal.from_lists(drafts, device=batch.seq_len.device)

        def observe(self, batch, num_accepted):
            pass

        def release(self, sequence_id):
            pass

    with Engine("path/to/model", EchoDrafter()) as engine:
        print(engine.generate("a b c a b", max_new_tokens=8).text)

Whatever it proposes, the output is that of plain decoding: losslessness is a property of verification, as long as
the proposal tells the truth about the distribution its tokens were drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from specengine.config import MAX_NUM_SPECULATIVE_TOKENS
from specengine.runtime.state import BatchState, RunningBatch


@dataclass(frozen=True)
class DraftProposal:
    """Proposed tokens and the law they were really drawn from, after every filter.

    tokens:     `[B, k]` int32, row b's first num_tokens[b] are proposed
    num_tokens: `[B]` int32, at most the batch's `max_draft`
    log_probs:  `[B, k]` fp32, log-probability of each token under that law; None = point mass (deterministic)
    logits:     `[B, k, V]` fp32 that the tokens were drawn from, or None = point mass
    stats:      `[B, k, 4]` of the `filter_rows` op on them: maximum, threshold, log-normaliser, error

    A token v had log-probability logits[v] / T - log-normaliser if logits[v] / T >= threshold, else -inf, with T
    the request's temperature.
    """

    tokens: Tensor
    num_tokens: Tensor
    log_probs: Tensor | None = None
    logits: Tensor | None = None
    stats: Tensor | None = None

    @staticmethod
    def from_lists(
        token_lists: Sequence[Sequence[int]], *, device: torch.device | str = "cpu"
    ) -> DraftProposal:
        """A point-mass proposal: the tokens of a deterministic drafter, one list a sequence (may be empty)."""
        width = max(map(len, token_lists), default=0)
        padded = [[*tokens, *([0] * (width - len(tokens)))] for tokens in token_lists]
        return DraftProposal(
            torch.tensor(padded, dtype=torch.int32, device=device).reshape(len(padded), width),
            torch.tensor([len(tokens) for tokens in token_lists], dtype=torch.int32, device=device),
        )

    @staticmethod
    def from_probs(tokens: Tensor, num_tokens: Tensor, probs: Tensor, temperature: Tensor) -> DraftProposal:
        """A proposal whose tokens were drawn from given distributions.

        tokens `[B, k]` int32, num_tokens `[B]` int32, probs `[B, k, V]` fp32 (rows sum to 1),
        temperature `[B]` fp32 of the batch.
        """
        log_probs = probs.float().log()
        scale = torch.where(temperature > 0, temperature, 1.0)[:, None, None]
        stats = torch.zeros(*tokens.shape, 4, device=tokens.device)
        stats[..., 0] = log_probs.amax(dim=-1)
        stats[..., 1] = float("-inf")
        chosen = log_probs.gather(2, tokens.long()[..., None])[..., 0]
        return DraftProposal(tokens, num_tokens, chosen, log_probs * scale, stats)


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens for a running batch. State, if any, is the drafter's own, keyed by `batch.sequence_ids`."""

    name: str

    def propose(self, batch: RunningBatch) -> DraftProposal:
        """At most `batch.draft_limits[b]` tokens that may follow `batch.committed(b)`, for each sequence b."""

    def observe(self, batch: RunningBatch, num_accepted: Tensor) -> None:
        """Told after each round how many of its tokens were accepted (`[B]` int32)."""

    def release(self, sequence_id: int) -> None:
        """The sequence is finished, aborted or preempted: its state can go (a preempted one may come back)."""


class RoundDrafter(Protocol):
    """What drafts in an engine's rounds: the host's part, and the part that touches device state only.

    name:            for people
    draft_positions: the positions its model has; it never drafts beyond them
    may_run_ahead:   whether it drafts without having seen what the last round accepted
    """

    name: str
    draft_positions: int
    may_run_ahead: bool

    def prepare(self, batch: RunningBatch, state: BatchState) -> bool:
        """The host's part, before a round; returns whether `propose` will only read device state, at places that
        depend on the batch's size and k alone."""

    def propose(self, batch: RunningBatch, state: BatchState) -> DraftProposal:
        """The proposal for a round that has begun, staged behind the committed tokens."""

    def observe(self, batch: RunningBatch, results: Sequence[RowResult | None]) -> None:
        """Told, once the host knows, what became of each sequence of a round; None: it was over before."""

    def release(self, sequence_id: int) -> None:
        """See `Drafter`."""


@dataclass(frozen=True)
class RowResult:
    """What a round did to one sequence: committed tokens before it, drafts judged and accepted."""

    slot: int
    length: int
    num_draft: int
    num_accepted: int


class HostDrafter:
    """A `Drafter` that is not the engine's own in the rounds: what it proposes is checked, then uploaded."""

    draft_positions = 2**31 - 1
    may_run_ahead = False

    def __init__(self, drafter: Drafter, *, vocab_size: int) -> None:
        self.name = drafter.name
        self._drafter = drafter
        self._vocab_size = vocab_size
        self._uploads: dict[int, tuple[Tensor, Tensor]] = {}
        self._proposal: DraftProposal | None = None
        self._asked: RunningBatch

    def prepare(self, batch: RunningBatch, state: BatchState) -> bool:
        """Asks the drafter. The proposal's tokens are uploaded; a law stays where it is."""
        self._asked = batch = state.plan(batch.without_padding())
        proposal = self._drafter.propose(batch)
        check_proposal(proposal, batch, name=self.name, vocab_size=self._vocab_size)
        self._proposal = proposal if proposal.logits is not None else None
        if self._proposal is None:
            tokens, num_tokens = self._upload(state, batch.k)
            tokens[: batch.size, : proposal.tokens.shape[1]] = proposal.tokens
            num_tokens.zero_()
            num_tokens[: batch.size] = proposal.num_tokens
        return self._proposal is None

    def propose(self, batch: RunningBatch, state: BatchState) -> DraftProposal:
        """What was prepared."""
        proposal = self._proposal
        if proposal is None:
            count = batch.slots.numel()
            tokens, num_tokens = self._upload(state, batch.k)
            # Rows that do not run, padding's for one, still hold what was there before.
            used = torch.minimum(num_tokens[:count], batch.planned.num_draft)
            proposal = DraftProposal(tokens[:count], used)
        state.stage(batch, proposal.tokens)
        return proposal

    def observe(self, batch: RunningBatch, results: Sequence[RowResult | None]) -> None:
        """Passed on, as the public interface has it."""
        counts = [0 if result is None else result.num_accepted for result in results]
        device = batch.slots.device
        self._drafter.observe(self._asked, torch.tensor(counts, dtype=torch.int32, device=device))

    def release(self, sequence_id: int) -> None:
        """Passed on."""
        self._drafter.release(sequence_id)

    def _upload(self, state: BatchState, k: int) -> tuple[Tensor, Tensor]:
        """The place of proposals of up to `k` tokens: `[slots, k]`, and their numbers `[slots]`."""
        if k not in self._uploads:
            new = state.seq_len.new_zeros
            self._uploads[k] = new(state.num_slots, k), new(state.num_slots)
        return self._uploads[k]


def check_proposal(proposal: DraftProposal, batch: RunningBatch, *, name: str, vocab_size: int) -> None:
    """Raises `ValueError` naming the drafter if a proposal is malformed. For drafters that are not the engine's."""
    tokens, num_tokens = proposal.tokens, proposal.num_tokens
    is_shaped = tokens.dim() == 2 and tokens.shape[0] == batch.size and num_tokens.shape == (batch.size,)
    if not is_shaped or tokens.shape[1] > MAX_NUM_SPECULATIVE_TOKENS:
        raise ValueError(
            f"drafter {name!r}: tokens must be [{batch.size}, k] with k <= {MAX_NUM_SPECULATIVE_TOKENS} and "
            f"num_tokens [{batch.size}], got "
            f"{list(tokens.shape)} and {list(num_tokens.shape)}"
        )
    if bool((num_tokens > batch.max_draft).any()) or bool((num_tokens > tokens.shape[1]).any()):
        raise ValueError(
            f"drafter {name!r} proposed {num_tokens.tolist()} tokens where {list(batch.draft_limits)} were asked for"
        )
    if bool((num_tokens < 0).any()):
        raise ValueError(f"drafter {name!r}: num_tokens must not be negative, got {num_tokens.tolist()}")
    used = torch.arange(tokens.shape[1], device=tokens.device) < num_tokens[:, None]
    is_outside = ((tokens < 0) | (tokens >= vocab_size)) & used
    if bool(is_outside.any()):
        raise ValueError(
            f"drafter {name!r} proposed token id {int(tokens[is_outside][0])}, outside 0 … {vocab_size - 1}"
        )
    if (proposal.logits is None) != (proposal.stats is None) or (proposal.logits is None) != (
        proposal.log_probs is None
    ):
        raise ValueError(
            f"drafter {name!r}: log_probs, logits and stats must be given together or not at all"
        )
