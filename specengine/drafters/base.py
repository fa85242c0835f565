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
the proposal tells the truth about the distribution its tokens were drawn from. A drafter that wants to hear of
prompts, and of rounds in which it did not draft, is a `ListeningDrafter`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from specengine.kernels.types.drafts import DraftLaw
from specengine.models.loader import LoadedModel
from specengine.ops.backend import Backend
from specengine.runtime.kv_cache import DRAFT, KVCache
from specengine.runtime.model_runner import ModelRunner
from specengine.runtime.sequence import Sequence as HostSequence
from specengine.runtime.state import BatchState, RunningBatch


@dataclass(frozen=True)
class DraftProposal:
    """Proposed tokens and the law they were really drawn from, after every filter.

    tokens:     `[B, k]` int32, row b's first num_tokens[b] are proposed
    num_tokens: `[B]` int32
    log_probs:  `[B, k]` fp32, log-probability of each token under that law; None = point mass (deterministic)
    logits:     `[B, k, V]` fp32 that the tokens were drawn from, or None = point mass
    stats:      `[B, k, 4]` of the `filter_rows` op on them: maximum, threshold, log-normaliser, error
    has_law:    `[B]` bool, rows that were drawn from these; the others are point masses. None: all rows were

    A token v had log-probability logits[v] / T - log-normaliser if logits[v] / T >= threshold, else -inf, with T
    the request's temperature.
    """

    tokens: Tensor
    num_tokens: Tensor
    log_probs: Tensor | None = None
    logits: Tensor | None = None
    stats: Tensor | None = None
    has_law: Tensor | None = None

    @property
    def law(self) -> DraftLaw | None:
        """The law as the ops that judge take it; None: all rows are point masses."""
        if self.log_probs is None or self.logits is None or self.stats is None:
            return None
        return DraftLaw(self.log_probs, self.logits, self.stats, self.has_law)

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

    def take(self, rows: Sequence[int]) -> DraftProposal:
        """The proposal for some of the batch's rows."""
        if len(rows) == self.num_tokens.numel():
            return self
        at = torch.tensor(rows, device=self.tokens.device, dtype=torch.int64)
        parts = (self.tokens, self.num_tokens, self.log_probs, self.logits, self.stats, self.has_law)
        return DraftProposal(*[None if part is None else part[at] for part in parts])  # type: ignore[arg-type]

    def widened(self, width: int) -> DraftProposal:
        """The proposal with room for `width` tokens a row."""
        more = width - self.tokens.shape[1]
        if more <= 0:
            return self
        tokens = F.pad(self.tokens, (0, more))
        if self.log_probs is None or self.logits is None or self.stats is None:
            return DraftProposal(tokens, self.num_tokens)
        log_probs = F.pad(self.log_probs, (0, more))
        logits, stats = (F.pad(values, (0, 0, 0, more)) for values in (self.logits, self.stats))
        return DraftProposal(tokens, self.num_tokens, log_probs, logits, stats, self.has_law)

    @staticmethod
    def combine(
        batch_size: int,
        parts: Sequence[tuple[Sequence[int], DraftProposal]],
        *,
        device: torch.device | str = "cpu",
    ) -> DraftProposal:
        """One proposal of several, each with a law of its own: point masses for some rows, say, beside draws.

        parts:  the rows of the batch that a part is for, and its proposal; rows of no part draft nothing
        device: where the result is if there is no part
        """
        given = [part for _, part in parts]
        width = max((part.tokens.shape[1] for part in given), default=0)
        vocab = max((part.logits.shape[2] for part in given if part.logits is not None), default=0)
        device = given[0].tokens.device if given else device
        tokens = torch.zeros(batch_size, width, dtype=torch.int32, device=device)
        num_tokens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        log_probs = torch.zeros(batch_size, width, device=device)
        logits = torch.full((batch_size, width, vocab), float("-inf"), device=device)
        stats = torch.zeros(batch_size, width, 4, device=device)
        has_law = torch.zeros(batch_size, dtype=torch.bool, device=device)
        for rows, part in parts:
            at = torch.tensor(rows, device=device, dtype=torch.int64)
            count = part.tokens.shape[1]
            tokens[at, :count] = part.tokens.int()
            num_tokens[at] = part.num_tokens.int()
            if part.logits is not None and part.log_probs is not None and part.stats is not None:
                has_law[at] = True if part.has_law is None else part.has_law
                log_probs[at, :count] = part.log_probs
                logits[at, :count, : part.logits.shape[2]] = part.logits
                stats[at, :count] = part.stats
        if not vocab:
            return DraftProposal(tokens, num_tokens)
        return DraftProposal(tokens, num_tokens, log_probs, logits, stats, has_law)


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens for a running batch. State, if any, is the drafter's own, keyed by `batch.sequence_ids`."""

    name: str

    def propose(self, batch: RunningBatch) -> DraftProposal:
        """Tokens that may follow `batch.committed(b)`, for each sequence b; beyond `batch.draft_limits[b]` they are
        cut off."""

    def observe(self, batch: RunningBatch, num_accepted: Tensor) -> None:
        """Told after each round how many of its tokens were accepted (`[B]` int32)."""

    def release(self, sequence_id: int) -> None:
        """The sequence is finished, aborted or preempted: its state can go (a preempted one may come back)."""


@runtime_checkable
class ListeningDrafter(Drafter, Protocol):
    """A `Drafter` that hears of every token, whether it drafts or not: one that keeps an index of texts, say."""

    def hear(self, sequence_id: int, tokens: Sequence[int], num_new: int) -> None:
        """The sequence's tokens so far, the prompt's included; it has not heard of the last num_new of them.

        The first call comes with the prompt and its first token, the next with every round, also of those that
        draft nothing, and always before `propose` and `release`. `tokens` grows from call to call: read it, don't
        keep or change it. A sequence that was released and comes back is heard of from the start.
        """


@runtime_checkable
class LookupDrafter(ListeningDrafter, Protocol):
    """A `ListeningDrafter` that can look up at once what may follow, also behind what another has drafted."""

    def follow(self, sequence_id: int, drafted: Sequence[int], limit: int) -> Sequence[int]:
        """At most `limit` tokens that may follow what it has heard of the sequence and then `drafted`, as a point mass.

        An engine asks this, sequence by sequence, in the place of `propose`. It changes nothing, and takes
        microseconds: in a list of drafters it is also asked before rounds for which another drafts in the end.
        """


@runtime_checkable
class RoundDrafter(Protocol):
    """What drafts in an engine's rounds: the host's part, and the part that touches device state only.

    name:            for people
    draft_positions: the positions its model has; it never drafts beyond them
    may_run_ahead:   whether it drafts without having seen what the last round accepted
    """

    name: str
    draft_positions: int
    may_run_ahead: bool

    def prepare(self, batch: RunningBatch, state: BatchState) -> Hashable | None:
        """The host's part, before a round.

        None: the round must run from Python. Else `propose` will only read device state, at places that depend on
        the batch's size, its k, its mode and the key that is returned: a round of the same may be a recording of
        this one. A batch of padding alone is asked for the key of ordinary rounds.
        """

    def source(self, batch: RunningBatch, state: BatchState) -> DraftSource | None:
        """Where `propose` would have its drafts from in the round that was prepared, and in every other of its size,
        k, mode and key; None: only `propose` knows. A model that is named feeds the last `num_fed` committed tokens
        first, and `propose` takes that forward from the batch where it has been begun. Asked only where a round may
        run in one call, or a forward be begun with it."""

    def propose(self, batch: RunningBatch, state: BatchState) -> DraftProposal:
        """The proposal for a round that has begun, staged behind the committed tokens."""

    def observe(self, batch: RunningBatch, results: Sequence[RowResult | None]) -> None:
        """Told, once the host knows, what became of each sequence of a round; None: it was over before.

        Its own drafts are the first batch.draft_limits[b]: others may have followed, or, where that is 0, taken its
        place.
        """

    def hear(self, sequence: HostSequence) -> None:
        """The host's record of a sequence has grown: by its prompt's first token, or a round, whoever drafted."""

    def release(self, sequence_id: int) -> None:
        """See `Drafter`."""

    def first_written(self, sequence: HostSequence) -> int | None:
        """The first position whose keys and values it writes in the next round, in blocks that it shares with the
        target; None: it writes none. Blocks from there on are the sequence's own by then."""


class DraftSource(NamedTuple):
    """Where the drafts of a round come from: a model draws them, or they are given, or, with neither, there are none.

    num_fed: the last committed tokens, 1 or 2, that the model's first forward feeds
    given:   as `propose` would read them: `[slots, k]` and `[slots]` int32, the same memory every time
    """

    model: ModelRunner | None = None
    num_fed: int = 2
    given: tuple[Tensor, Tensor] | None = None


class RowResult(NamedTuple):
    """What a round did to one sequence: committed tokens before it, drafts judged and accepted."""

    slot: int
    length: int
    num_draft: int
    num_accepted: int


class Way(NamedTuple):
    """A way to draft for a sequence: one drafter, by its place in a list; or one, and a lookup behind its drafts."""

    part: int
    tail: int | None = None


# With the one drafter that there is.
ALONE = Way(0)


class LoadModel(Protocol):
    """Loads what drafts, as the engine's configuration says of drafts."""

    def __call__(self, source: str | Path | torch.nn.Module) -> LoadedModel:
        """A model of its own, its tokenizer included."""

    def first_layers(self, num_layers: int) -> LoadedModel | None:
        """The target's first layers, final norm and head, read again and packed as `draft_weight_dtype` says; None
        where that is how the target has them."""


@dataclass(frozen=True)
class DrafterContext:
    """What a drafter that is asked for by name may be built of.

    name:       what was asked for, `name` or `name:argument`: what the drafter may be called
    argument:   what follows the colon, or ""
    target:     the target, its tokenizer included
    draft:      what the drafter's module loaded (`load_draft`), its tokenizer included: its keys and values are a
                tensor of the cache's, in the target's blocks; None: it has no such tensor
    foreign:    a draft model that speaks a vocabulary of its own, and so has neither ids nor blocks of the target's
    load_model: loads another model as the engine's configuration says of drafts
    model_index: which of the cache's tensors is its own, if it has a model
    place:      its place in a list of drafters
    is_recorded: whether rounds are recorded
    backend:    computes every op
    kv_cache:   keys and values of target and draft, and the blocks that sequences own
    vocab_size: ids that may be proposed: 0 … vocab_size - 1
    max_seq_len, max_batch_size: the longest sequence, and the most that run at a time
    chunk_size: the most tokens of a forward that catches up
    num_bytes:  memory that it may keep for itself
    """

    name: str
    argument: str
    target: LoadedModel
    draft: LoadedModel | None
    load_model: LoadModel
    backend: Backend
    kv_cache: KVCache
    vocab_size: int
    max_seq_len: int
    max_batch_size: int
    chunk_size: int
    num_bytes: int = 256 << 20
    model_index: int = DRAFT
    foreign: LoadedModel | None = None
    place: int = 0
    is_recorded: bool = True
