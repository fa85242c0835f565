"""Turns finished requests into what the caller gets."""

from __future__ import annotations

from collections import Counter

from specengine import metrics
from specengine.outputs import (
    CompletionOutput,
    GenerationMetrics,
    GenerationResult,
    Round,
    SpeculativeDecodingMetrics,
)
from specengine.runtime.sequence import Request, Sequence


def build_result(request: Request) -> GenerationResult:
    """Everything about a finished request."""
    params = request.params
    return GenerationResult(
        prompt_token_ids=list(request.prompt_ids),
        outputs=[_build_output(sequence) for sequence in request.sequences],
        metrics=_build_metrics(request),
        prompt=request.prompt,
        prompt_logprobs=None if params.prompt_logprobs is None else list(request.prompt_logprobs),
        seed=request.seed,
        lossless=request.is_lossless,
        generation_defaults=dict(request.generation_defaults),
    )


def _build_output(sequence: Sequence) -> CompletionOutput:
    settled = sequence.settled
    logprobs = None if sequence.params.logprobs is None else list(sequence.logprobs)
    return CompletionOutput(
        index=sequence.sample_index,
        token_ids=list(sequence.output_ids),
        text=settled.text,
        finish_reason=settled.finish_reason or "abort",
        stop_reason=settled.stop_reason,
        logprobs=logprobs,
        cumulative_logprob=None if logprobs is None else sum(entry.logprob for entry in logprobs),
        token_source=list(sequence.token_source),
        seed=sequence.seed,
        error=settled.error,
        text_offsets=sequence.text.offsets(len(sequence.output_ids)),
        rounds=build_rounds(sequence, 0, settled.num_rounds) if sequence.params.return_rounds else None,
    )


def build_rounds(sequence: Sequence, first: int, end: int) -> list[Round]:
    """The rounds `first` … `end` - 1 of a sequence that keeps them."""
    rounds = []
    for counts, drafts in zip(sequence.rounds[first:end], sequence.drafts[first:end], strict=True):
        drafted, accepted = metrics.needed_drafts(*counts)
        needed = drafts[:drafted]
        tokens, places = [each.token_id for each in needed], [each.drafter for each in needed]
        rounds.append(Round(drafted, accepted, counts.num_kept, tokens, places))
    return rounds


def _build_metrics(request: Request) -> GenerationMetrics:
    """Times and counts over all samples of a request."""
    sequences = request.sequences
    started = request.first_forward_time or request.arrival_time
    last = request.last_token_time or started
    first = request.first_token_time or last
    return GenerationMetrics(
        num_prompt_tokens=len(request.prompt_ids),
        num_generated_tokens=sum(sequence.settled.num_tokens for sequence in sequences),
        num_cached_tokens=sum(sequence.place.num_cached_tokens or 0 for sequence in sequences),
        num_target_forwards=sum(
            sequence.num_prompt_forwards + sequence.settled.num_forwards for sequence in sequences
        ),
        num_preemptions=sum(sequence.place.num_preemptions for sequence in sequences),
        queue_time=started - request.arrival_time,
        prompt_time=first - started,
        decode_time=last - first,
        total_time=last - request.arrival_time,
        speculative_decoding=metrics.merge(map(_build_statistics, sequences)),
    )


def _build_statistics(sequence: Sequence) -> SpeculativeDecodingMetrics:
    most = max([sequence.num_speculative_tokens, *(counts.num_draft for counts in sequence.rounds)])
    total = SpeculativeDecodingMetrics(
        num_spec_tokens=most,
        lossless=sequence.request.is_lossless,
        round_seconds=sequence.round_seconds,
        estimated_plain_seconds=sequence.plain_seconds,
    )
    for counts, count in Counter(sequence.rounds).items():
        metrics.record_rounds(total, **counts._asdict(), count=count)
    return total
