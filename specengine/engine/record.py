"""What the record of a round makes of its sequences: tokens, text, ends, statistics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from specengine import ranges
from specengine.drafters.base import RowResult
from specengine.drafters.several import SeveralDrafters
from specengine.engine.logprobs import token_logprobs
from specengine.engine.rounds import Flight
from specengine.kernels.types.round import NUM_RESULT_COLUMNS, RESULT_EMITTED
from specengine.outputs import FinishReason, TokenLogprob, TokenSource
from specengine.runtime.kv_cache import TARGET, KVCache
from specengine.runtime.model_runner import ModelRunner
from specengine.runtime.sequence import Draft, RoundCounts, Sequence, Settled
from specengine.speculative import RoundOutcome

NOT_A_DISTRIBUTION = "the target's logits hold a NaN or nothing finite"


class Records:
    """Makes the host's record of a round, or of prompts' first tokens, what the device's has become.

    on_settled: called with each sequence of which more is settled now
    """

    def __init__(
        self,
        kv_cache: KVCache,
        target: ModelRunner,
        *,
        on_settled: Callable[[Sequence], None],
    ) -> None:
        self._kv_cache = kv_cache
        self._target = target
        self._on_settled = on_settled

    def collect(self, flight: Flight) -> list[RowResult | None]:
        """Reads what has become of a flight, sequence by sequence: each gets all of it, or, interrupted, nothing.

        None for those that were over before, or whose prompt goes on.
        """
        is_round = flight.drafter is not None
        with ranges.span(ranges.HOST, batch_size=len(flight.sequences), k=flight.batch.k) as span:
            rows = flight.read()[: len(flight.sequences)]
            span.note(accepted=sum(max(0, row[RESULT_EMITTED] - 1) for row in rows))
            results = [
                _row_result(sequence, row, is_round=is_round)
                for sequence, row in zip(flight.sequences, rows, strict=True)
            ]
            if flight.drafter is not None:
                for result in results:
                    if result is not None:
                        end = result.length + result.num_draft
                        self._kv_cache.manager.set_computed(result.slot, TARGET, end)
                flight.drafter.observe(flight.batch, results)
            logprobs = self._gather_logprobs(flight, results)
            drafts = _read_drafts(flight) if is_round and flight.batch.mode.wants_drafts else None
            now = time.perf_counter()
            for index, (sequence, row, result) in enumerate(
                zip(flight.sequences, rows, results, strict=True)
            ):
                if result is not None:
                    drafted = None if drafts is None else drafts[index][: result.num_draft]
                    self._settle(sequence, row, result, logprobs[index], drafted, now, is_round=is_round)
        return results

    def _settle(
        self,
        sequence: Sequence,
        row: list[int],
        result: RowResult,
        logprobs: list[TokenLogprob],
        drafts: list[Draft] | None,
        now: float,
        *,
        is_round: bool,
    ) -> None:
        num_emitted, _, is_error = row[:NUM_RESULT_COLUMNS]
        request = sequence.request
        request.first_token_time = request.first_token_time or now
        request.last_token_time = now
        if is_error:
            fail(sequence, NOT_A_DISTRIBUTION, is_round=is_round)
        else:
            tokens = row[NUM_RESULT_COLUMNS:][:num_emitted]
            extend(sequence, tokens, logprobs, result, drafts, is_round=is_round)
        self._kv_cache.manager.rollback(result.slot, max(0, sequence.num_tokens - 1))
        self._on_settled(sequence)

    def _gather_logprobs(self, flight: Flight, results: list[RowResult | None]) -> list[list[TokenLogprob]]:
        """For each sequence that wants them, the log-probabilities of the tokens that were emitted."""
        entries: list[list[TokenLogprob]] = [[] for _ in results]
        wanted = [
            (index, result.num_accepted + 1)
            for index, (sequence, result) in enumerate(zip(flight.sequences, results, strict=True))
            if result is not None and sequence.params.logprobs is not None
        ]
        if not wanted:
            return entries
        outcome = flight.outcome
        assert isinstance(outcome, RoundOutcome), "whoever wants log-probabilities is judged by logits"
        starts = outcome.row_start.tolist()
        rows = [starts[index] + place for index, count in wanted for place in range(count)]
        tokens = torch.cat([outcome.tokens[index, :count] for index, count in wanted])
        owners = [index for index, count in wanted for _ in range(count)]
        limits = [flight.sequences[index].params.logprobs or 0 for index in owners]
        # Gathering is a copy: not where every row is wanted, as in plain decoding.
        assert outcome.logits is not None, "whoever wants log-probabilities is judged by logits"
        logits = outcome.logits if len(rows) == outcome.logits.shape[0] else outcome.logits[rows]
        found = token_logprobs(
            self._target.backend, logits, tokens, limits, vocab_size=self._target.vocab_size
        )
        for owner, entry in zip(owners, found, strict=True):
            entries[owner].append(entry)
        return entries


def _read_drafts(flight: Flight) -> list[list[Draft]]:
    """Of each sequence, at least what was judged, and who drafted it."""
    tokens = flight.read_drafts()
    if isinstance(flight.drafter, SeveralDrafters):
        places = flight.drafter.who_drafts(flight.batch)
    else:
        places = [[0] * len(row) for row in tokens]
    return [[Draft(*each) for each in zip(*row, strict=False)] for row in zip(tokens, places, strict=False)]


def _row_result(sequence: Sequence, row: list[int], *, is_round: bool) -> RowResult | None:
    """None for a sequence that was over before this, or whose prompt goes on."""
    num_emitted, num_draft, is_error = row[:NUM_RESULT_COLUMNS]
    if sequence.is_finished or sequence.slot is None:
        return None
    if not (num_emitted or is_error) and not is_round:
        return None
    assert num_emitted or is_error, (
        f"sequence {sequence.sequence_id} has {sequence.num_tokens} of {sequence.length_limit} tokens, and its "
        "round emitted nothing"
    )
    return RowResult(sequence.slot, sequence.num_tokens, num_draft, max(0, num_emitted - 1))


class Ending(NamedTuple):
    """Why a sequence ends, and the stop string or token that ended it."""

    reason: FinishReason | None = None
    stop: str | int | None = None


_GOES_ON = Ending()
_DRAFT: TokenSource = "draft"
_TARGET: TokenSource = "target"


def extend(
    sequence: Sequence,
    tokens: list[int],
    logprobs: list[TokenLogprob],
    result: RowResult,
    drafts: list[Draft] | None,
    *,
    is_round: bool,
) -> None:
    """Appends what a round emitted, as far as no stop is in it. The last line makes it count, all at once.

    drafts: what the round judged of this sequence; None where nobody wants to know
    """
    before, ending = sequence.settled, _GOES_ON
    num_tokens = before.num_tokens
    for token in tokens:
        num_tokens += 1
        ending = find_ending(sequence, token, num_tokens)
        if ending is not _GOES_ON:
            ending = _close_text(sequence, ending, num_tokens)
            break
    num_kept = num_tokens - before.num_tokens
    num_drafts = min(result.num_accepted, num_kept)
    sequence.output_ids += tokens[:num_kept]
    sequence.token_source += (_DRAFT,) * num_drafts + (_TARGET,) * (num_kept - num_drafts)
    sequence.logprobs += logprobs[:num_kept]
    if is_round:
        sequence.rounds.append(RoundCounts(result.num_draft, result.num_accepted, num_kept))
        if drafts is not None and sequence.params.return_rounds:
            sequence.drafts.append(drafts)
    text = sequence.text
    sequence.settled = Settled(
        num_tokens,
        before.num_rounds + is_round,
        before.num_forwards + is_round,
        text.text,
        max(before.num_final, text.num_final),
        ending.reason,
        ending.stop,
    )


def find_ending(sequence: Sequence, token: int, num_tokens: int) -> Ending:
    """Whether the sequence ends with this token, its num_tokens-th; the text takes it in if it is part of it."""
    params = sequence.params
    if token in sequence.eos_token_ids:
        return Ending("stop")
    if token in params.stop_token_ids:
        return Ending("stop", token)
    matched = sequence.text.push(token, may_stop=num_tokens >= params.min_new_tokens)
    if matched is not None:
        return Ending("stop", matched)
    return Ending("length") if num_tokens >= sequence.max_new_tokens else _GOES_ON


def finish(sequence: Sequence, reason: FinishReason) -> None:
    """Ends a sequence where it stands."""
    settled = sequence.settled
    ending = _close_text(sequence, Ending(reason), settled.num_tokens)
    text = sequence.text.text
    sequence.settled = settled._replace(
        text=text, num_final=len(text), finish_reason=ending.reason, stop_reason=ending.stop
    )


def fail(sequence: Sequence, error: str, *, is_round: bool = False) -> None:
    """Ends a sequence with an error."""
    settled = sequence.settled
    _close_text(sequence, Ending("error"), settled.num_tokens)
    text = sequence.text.text
    sequence.settled = settled._replace(
        num_forwards=settled.num_forwards + is_round,
        text=text,
        num_final=len(text),
        finish_reason="error",
        error=error,
    )


def _close_text(sequence: Sequence, ending: Ending, num_tokens: int) -> Ending:
    """Adds to the text what the tokenizer held back, which may complete a stop string."""
    matched = sequence.text.close(may_stop=num_tokens >= sequence.params.min_new_tokens)
    return Ending("stop", matched) if matched is not None and ending.reason == "length" else ending
