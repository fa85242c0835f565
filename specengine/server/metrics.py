"""What Prometheus reads: counters that add up what the results say, gauges of the queues, histograms of times."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from specengine.engine import Engine
from specengine.engine.times import RoundTimes
from specengine.outputs import GenerationResult
from specengine.runtime.sequence import Request

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_SHORT_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
# How fast the mean latency forgets.
_NEW_SHARE = 0.1


class Metrics:
    """The metrics of one server, each labelled with its model's name; the event loop's.

    prefix:       of their names
    mean_latency: seconds that requests took lately, from their arrival to their last token
    """

    def __init__(self, model_name: str, *, prefix: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # when each began: nobody asks
        self.mean_latency = 1.0
        self._registry = CollectorRegistry()
        self._model_name, self._prefix = model_name, prefix
        self._latest_round: RoundTimes | None = None
        self._block_size = 1  # the engine's, from `watch` on
        counter, histogram = self._counter, self._histogram
        self._num_drafts = counter("spec_decode_num_drafts", "rounds in which at least one token was drafted")
        self._num_draft_tokens = counter("spec_decode_num_draft_tokens", "tokens drafted, up to a stop")
        self._num_accepted = counter(
            "spec_decode_num_accepted_tokens",
            "drafts accepted; acceptance rate = accepted_tokens / draft_tokens, and mean acceptance length = "
            "1 + accepted_tokens / drafts, over rounds with drafts",
        )
        self._num_accepted_at = Counter(
            f"{prefix}:spec_decode_num_accepted_tokens_per_pos",
            "drafts accepted at each position, from 0 on; acceptance at position i = this / drafts",
            ["model_name", "position"],
            registry=self._registry,
        )
        self._num_accepted_at.labels(model_name, "0")  # there before anything was accepted
        self._rollback_blocks = counter(
            "rollback_blocks",
            "KV positions that rejected drafts had taken, in blocks: (draft_tokens - accepted_tokens) / block size; a "
            "rollback lowers a watermark, and neither copies nor frees any",
        )
        self._num_preemptions = counter(
            "num_preemptions", "times a sequence's blocks were taken and recomputed"
        )
        self._prompt_tokens = counter(
            "prompt_tokens", "tokens of prompts, those found in the prefix cache too"
        )
        self._generation_tokens = counter("generation_tokens", "tokens generated, of all samples")
        self._finished = Counter(
            f"{prefix}:request_success",
            "samples that ended, by why: stop, length, abort or error",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._rejections = counter("admission_rejections", "requests that were answered with 429")
        self._corrupted = counter(
            "corrupted_requests",
            "requests that ended with an error: logits that are no distribution, an exception",
        )
        self._first_token = histogram("time_to_first_token_seconds", "arrival to first token", _SECONDS)
        self._each_token = histogram(
            "time_per_output_token_seconds",
            "(last token - first token) / (tokens - 1), of requests with one sample",
            _SHORT_SECONDS,
        )
        self._latency = histogram("e2e_request_latency_seconds", "arrival to last token", _SECONDS)
        self._queue = histogram("request_queue_time_seconds", "arrival to first forward", _SECONDS)
        self._prefill = histogram("request_prefill_time_seconds", "first forward to first token", _SECONDS)
        self._decode = histogram("request_decode_time_seconds", "first token to last token", _SECONDS)
        self._request_prompt = histogram("request_prompt_tokens", "tokens of a request's prompt", _TOKENS)
        self._request_generation = histogram("request_generation_tokens", "tokens generated for it", _TOKENS)
        self._draft_time = histogram("draft_time_seconds", "the part of a round that drafts", _SHORT_SECONDS)
        self._verify_time = histogram(
            "verify_time_seconds", "the target's forward of a round", _SHORT_SECONDS
        )

    def watch(self, engine: Engine) -> None:
        """Gauges that are read from this engine when somebody asks."""
        self._block_size = engine.config.block_size
        self._gauge("num_requests_running", "sequences that hold KV blocks", lambda: engine.num_running)
        self._gauge("num_requests_waiting", "sequences that are queued", lambda: engine.num_waiting)
        self._gauge(
            "kv_cache_usage_perc",
            "1 - free blocks / blocks: the share that running sequences hold",
            lambda: 1.0 - engine.num_free_blocks / engine.num_blocks,
        )

    def note_result(self, result: GenerationResult) -> None:
        """A request is finished, or was aborted."""
        metrics = result.metrics
        drafts = metrics.speculative_decoding
        num_rejected = drafts.num_draft_tokens - drafts.num_accepted_draft_tokens
        self._num_drafts.inc(drafts.num_spec_steps)
        self._num_draft_tokens.inc(drafts.num_draft_tokens)
        self._num_accepted.inc(drafts.num_accepted_draft_tokens)
        for position, count in enumerate(drafts.num_accepted_by_position):
            self._num_accepted_at.labels(self._model_name, str(position)).inc(count)
        self._rollback_blocks.inc(num_rejected / self._block_size)
        self._num_preemptions.inc(metrics.num_preemptions)
        self._prompt_tokens.inc(metrics.num_prompt_tokens)
        self._generation_tokens.inc(metrics.num_generated_tokens)
        for output in result.outputs:
            self._finished.labels(self._model_name, output.finish_reason).inc()
        if any(output.finish_reason == "error" for output in result.outputs):
            self._corrupted.inc()
        self._request_prompt.observe(metrics.num_prompt_tokens)
        self._request_generation.observe(metrics.num_generated_tokens)
        if metrics.num_generated_tokens:
            self._note_times(result)

    def _note_times(self, result: GenerationResult) -> None:
        metrics = result.metrics
        self._first_token.observe(metrics.time_to_first_token)
        if len(result.outputs) == 1 and metrics.num_generated_tokens > 1:
            self._each_token.observe(metrics.decode_time / (metrics.num_generated_tokens - 1))
        self._latency.observe(metrics.total_time)
        self._queue.observe(metrics.queue_time)
        self._prefill.observe(metrics.prompt_time)
        self._decode.observe(metrics.decode_time)
        self.mean_latency += _NEW_SHARE * (metrics.total_time - self.mean_latency)

    def note_error(self, request: Request) -> None:
        """A request was given up."""
        self._corrupted.inc()

    def note_rejection(self) -> None:
        self._rejections.inc()

    def note_step(self, engine: Engine) -> None:
        """Rounds have run: what they took, each once."""
        times = engine.round_times
        known = self._latest_round
        for each in takewhile(lambda each: each is not known, reversed(times)):
            if each.k and each.draft is not None:
                self._draft_time.observe(each.draft)
            if each.verify is not None:
                self._verify_time.observe(each.verify)
        self._latest_round = times[-1] if times else None

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, help: str) -> Counter:
        counter = Counter(f"{self._prefix}:{name}", help, ["model_name"], registry=self._registry)
        return counter.labels(self._model_name)

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            f"{self._prefix}:{name}", help, ["model_name"], buckets=buckets, registry=self._registry
        )
        return histogram.labels(self._model_name)

    def _gauge(self, name: str, help: str, read: Any) -> None:
        gauge = Gauge(f"{self._prefix}:{name}", help, ["model_name"], registry=self._registry)
        gauge.labels(self._model_name).set_function(read)
