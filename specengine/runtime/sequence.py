"""The host's record of what is being generated."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specengine import rng
from specengine.config import AUTO_NUM_SPECULATIVE_TOKENS, SamplingParams
from specengine.kernels.types.rules import Rule
from specengine.kinds import AUTO
from specengine.logits.entries import LogitEntry, build_entries
from specengine.outputs import FinishReason, TokenLogprob, TokenSource
from specengine.runtime.text import TextStream

_sequence_ids = itertools.count()
# Of a round, the way to draft of a sequence that drafts nothing.
UNDRAFTED = -1
# The most rounds that run before the host looks at the first of them, and where somebody watches a text appear: with
# UNREAD_SECONDS_A_ROUND, that is no more than 64 and 16 ms.
MAX_ROUNDS_UNREAD = 32
SMOOTH_STREAM_INTERVAL = 8
# For each round that may remain unread, whoever comes, stops or interrupts waits so long at most, and a round.
UNREAD_SECONDS_A_ROUND = 0.002


class Settled(NamedTuple):
    """What is settled of a sequence, and may be told. Replaced as a whole: an interruption finds all of a round in it,
    or nothing.

    num_tokens, num_rounds: entries of the sequence's lists that count; later ones were being written
    num_forwards: rounds that it took part in, one that found an error included
    text:         without what the tokenizer still holds back
    num_final:    leading characters of `text` that no later token changes
    """

    num_tokens: int = 0
    num_rounds: int = 0
    num_forwards: int = 0
    text: str = ""
    num_final: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None


class Place(NamedTuple):
    """Where a sequence stands. Replaced as a whole, too.

    slot:              set while it owns KV blocks
    num_preemptions:   times it lost them
    num_cached_tokens: of its prompt's, found computed when it first got them
    """

    slot: int | None = None
    num_preemptions: int = 0
    num_cached_tokens: int | None = None


_NOTHING, _NOWHERE = Settled(), Place()


class RoundCounts(NamedTuple):
    """A round of one sequence: tokens drafted and accepted, and those of its tokens that a stop left."""

    num_draft: int
    num_accepted: int
    num_kept: int


class Draft(NamedTuple):
    """A token that was drafted, and the place of who drafted it in the list of drafters."""

    token_id: int
    drafter: int


@dataclass(eq=False)
class Sequence:
    """One sample of one request. `settled` and `place` are the truth; the rest can be made to agree with them.

    num_speculative_tokens: drafts a round; may be changed while the sequence runs: the next round follows
    has_auto_k: whether it is the engine that changes it
    round_seconds, plain_seconds: then, what its rounds took, and what their tokens would have taken one by one
    text:     turns the settled tokens into text; can be built again from them
    reported: what the caller has been told
    output_ids, token_source, logprobs, rounds: see `Settled`
    drafts:   of each round, what was judged; empty where nobody wants them
    num_rounds_ahead, num_tokens_ahead: rounds whose results have not been read, and the most tokens they may emit
    ways_ahead: the way in which each of them drafts, the latest last; UNDRAFTED: none
    way, num_own_drafts: with several drafters, which of their ways (`SeveralDrafters.ways`) drafts in the next round,
              and, where a lookup goes on behind a model, how many drafts are the model's. Whoever chooses sets them
              before a step
    part:     with several drafters, the place of the only one that may draft for it; None: any
    num_prompt_forwards: forwards over chunks of its prompt, repeated ones included
    """

    request: Request
    sample_index: int
    text: TextStream
    max_new_tokens: int
    num_speculative_tokens: int
    eos_token_ids: tuple[int, ...]
    banned_until: int
    sequence_id: int = field(default_factory=lambda: next(_sequence_ids))
    settled: Settled = _NOTHING
    reported: Settled = _NOTHING
    place: Place = _NOWHERE
    output_ids: list[int] = field(default_factory=list)
    token_source: list[TokenSource] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    rounds: list[RoundCounts] = field(default_factory=list)
    drafts: list[list[Draft]] = field(default_factory=list)
    num_rounds_ahead: int = 0
    num_tokens_ahead: int = 0
    ways_ahead: list[int] = field(default_factory=list)
    num_prompt_forwards: int = 0
    has_auto_k: bool = False
    way: int = 0
    num_own_drafts: int = 0
    part: int | None = None
    round_seconds: float = 0.0
    plain_seconds: float = 0.0

    def may_use(self, part: int) -> bool:
        """Whether this of several drafters may draft for it."""
        return self.part is None or self.part == part

    @property
    def slot(self) -> int | None:
        return self.place.slot

    @property
    def seed(self) -> int:
        return rng.derive_seed(self.request.seed, self.sample_index)

    @property
    def signed_seed(self) -> int:
        """The bits of the seed, as rows of the state hold them."""
        return rng.signed_seed(self.seed)

    @cached_property
    def rule(self) -> Rule:
        """How the drafts are judged."""
        return Rule[self.params.rule.upper()]

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Committed tokens, the prompt's included."""
        return len(self.request.prompt_ids) + self.settled.num_tokens

    @property
    def token_ids(self) -> list[int]:
        return self.request.prompt_ids + self.output_ids

    def token_array(self) -> npt.NDArray[np.int32]:
        """The same as int32, in time of what was generated and a copy of the rest."""
        prompt = self.request.prompt_array
        return np.append(prompt, np.asarray(self.output_ids, dtype=np.int32)) if self.output_ids else prompt

    @property
    def num_tokens_to_compute(self) -> int:
        """Tokens whose KV must exist before the sequence decodes: all of a fresh prompt (its last row decides
        the first token), all but the last of one that has generated already (the next round feeds it)."""
        return self.num_tokens - (1 if self.output_ids else 0)

    @property
    def length_limit(self) -> int:
        """The most tokens the sequence may have, the prompt's included."""
        return len(self.request.prompt_ids) + self.max_new_tokens

    @property
    def remaining(self) -> int:
        """New tokens that may still be generated."""
        return self.max_new_tokens - self.settled.num_tokens

    def add_round_ahead(self, draft_limit: int) -> None:
        """A round of up to `draft_limit` drafts is under way."""
        self.num_rounds_ahead += 1
        self.num_tokens_ahead += draft_limit + 1
        self.ways_ahead.append(self.way if draft_limit else UNDRAFTED)

    def drop_round_ahead(self, draft_limit: int) -> None:
        """The round that has been under way longest is not any more."""
        self.num_rounds_ahead -= 1
        self.num_tokens_ahead -= draft_limit + 1
        del self.ways_ahead[:1]

    @property
    def may_run(self) -> bool:
        """Whether another round may emit something: one does, at least, in each round that is under way."""
        return self.remaining > self.num_rounds_ahead

    @property
    def max_draft_tokens(self) -> int:
        """The most drafts of the next round: what is asked for, never past the budget (a round emits up to k + 1)."""
        return min(self.num_speculative_tokens, self.remaining - self.num_rounds_ahead - 1)

    def max_num_computed(self, num_rounds: int) -> int:
        """The most tokens whose KV the rounds under way and so many others write."""
        more = num_rounds * (max(0, self.max_draft_tokens) + 1) - 1
        return min(self.num_tokens + self.num_tokens_ahead + more, self.length_limit)

    @property
    def max_rounds_unread(self) -> int:
        """Rounds that may run before the host has looked at the first: nobody wants to know, and no text ends it."""
        return 1 if self.params.stop else self.request.stream_interval

    @cached_property
    def ending_ids(self) -> tuple[int, ...]:
        """Tokens that end the output, and that `min_new_tokens` bans until position `banned_until`."""
        return tuple(sorted({*self.eos_token_ids, *self.params.stop_token_ids}))

    @property
    def logit_entries(self) -> list[LogitEntry]:
        """What is added to the sequence's logits."""
        banned = self.ending_ids if self.params.min_new_tokens else ()
        return build_entries(self.params.logit_bias, banned, self.banned_until, self.request.bad_words)

    @property
    def has_transforms(self) -> bool:
        """Whether something is done to the logits from here on, as far as the host knows."""
        return self.params.has_transforms or (self.num_tokens < self.banned_until and bool(self.ending_ids))

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Sample 0 collects them, on its first pass over the prompt."""
        return self.params.prompt_logprobs is not None and self.sample_index == 0 and not self.output_ids

    @property
    def is_finished(self) -> bool:
        return self.settled.finish_reason is not None

    def forget_unsettled(self) -> None:
        """After an interruption: drops what was being written, and what is under way."""
        settled = self.settled
        for entries in (self.output_ids, self.token_source, self.logprobs):
            del entries[settled.num_tokens :]
        for counts in (self.rounds, self.drafts):
            del counts[settled.num_rounds :]
        self.num_rounds_ahead = self.num_tokens_ahead = 0
        self.ways_ahead.clear()
        if not self.is_finished:
            self.text = self.text.rebuilt(self.output_ids)


@dataclass(eq=False)
class Request:
    """One prompt and what was asked for it.

    on_news:         called with the request when more of it is settled than its caller knows
    bad_words:       sequences of tokens that are never completed
    prompt_logprobs: entry i is of prompt token i; the first has none. Complete as far as its KV is computed
    stream_interval: the most rounds whose tokens its caller wants to be told at once
    generation_defaults: what of `params` the model's generation_config.json said
    """

    request_id: int
    index: int
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    on_news: Callable[[Request], object] = lambda _: None
    stream_interval: int = 1
    is_lossless: bool = True
    bad_words: tuple[tuple[int, ...], ...] = ()
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    arrival_time: float = field(default_factory=time.perf_counter)
    first_forward_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def prompt_array(self) -> npt.NDArray[np.int32]:
        """The prompt as int32. A prompt of many chunks is read once."""
        return np.asarray(self.prompt_ids, dtype=np.int32)

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)


def resolve_num_speculative_tokens(params: SamplingParams, *, has_drafter: bool) -> int:
    """k for a request, at first: 0 without a drafter."""
    if params.num_speculative_tokens == AUTO:
        return AUTO_NUM_SPECULATIVE_TOKENS if has_drafter else 0
    return int(params.num_speculative_tokens)
