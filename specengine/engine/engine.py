"""The engine: models, KV cache, queues, and the step that moves every running sequence one round further."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator
from collections.abc import Sequence as Collection
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from specengine import metrics, ranges
from specengine.config import AUTO_NUM_SPECULATIVE_TOKENS, EngineConfig, SamplingParams
from specengine.drafters.base import Drafter, RowResult
from specengine.drafters.no_draft import NoDrafter
from specengine.engine import assembly
from specengine.engine.assembly import Model
from specengine.engine.intake import Intake, Prompt, split_params, split_prompts
from specengine.engine.results import build_result
from specengine.engine.rounds import Flight, Rounds
from specengine.engine.scheduler import Chunk, Plan, Scheduler
from specengine.errors import SpecEngineError
from specengine.kernels.types.round import NUM_RESULT_COLUMNS, RESULT_EMITTED
from specengine.models.checkpoints import Checkpoint
from specengine.models.loader import LoadedModel
from specengine.ops.backend import Backend
from specengine.ops.load import load_backend
from specengine.outputs import FinishReason, GenerationResult, StreamEvent, TokenLogprob
from specengine.progress import progress_bar
from specengine.runtime.batch import Feed
from specengine.runtime.graphs import GraphReport
from specengine.runtime.kv_cache import TARGET
from specengine.runtime.model_runner import ModelRunner
from specengine.runtime.sequence import Request, Sequence
from specengine.runtime.state import BatchState, RoundMode, round_mode
from specengine.speculative import commit, match, verify
from specengine.tokenizer import Tokenizer


class Engine:
    """Loads a target, and optionally something that drafts for it, and generates exactly what the target would.

    model:       a directory, a name on the Hub, or a `transformers` model in memory
    draft_model: the same, or a `Drafter` object, or None for plain decoding
    config:      an `EngineConfig`; its fields can also be given one by one

    Safe to call from several threads: whoever waits for a result moves everybody's requests on.

    Raises `ModelLoadError`, `VocabularyMismatchError`, `InsufficientMemoryError`, `BackendUnavailableError`, and
    `ValueError`/`TypeError` for values that cannot be.
    """

    def __init__(
        self,
        model: Model,
        draft_model: Model | Drafter | None = None,
        *,
        config: EngineConfig | None = None,
        progress: bool | None = None,
        **config_fields: Any,
    ) -> None:
        self.config = assembly.build_config(config, config_fields)
        assembly.check_draft_model(draft_model)
        self.device = assembly.resolve_device(self.config.device)
        backend = load_backend(self.config.backend, self.device)
        self.backend_name = backend.name
        recorder = assembly.build_recorder(self.config, self.device, backend.name)
        if self.config.num_threads is not None:
            backend.set_num_threads(self.config.num_threads)
        # Whatever a config says is checked before anything is loaded.
        checkpoint = assembly.open_model(model, self.config)
        draft_checkpoint = assembly.open_draft(draft_model, self.config)
        self.max_seq_len = assembly.plan_max_seq_len(self.config, checkpoint.spec)
        tokenizer = assembly.open_given_tokenizer(self.config)
        target, draft = self._load_models(checkpoint, draft_checkpoint, tokenizer, backend, progress)
        vocab_size = assembly.shared_vocab_size(target, draft)
        kv_cache = assembly.build_kv_cache(
            target, draft, self.config, max_seq_len=self.max_seq_len, device=self.device
        )
        self.target_name = target.name
        self.tokenizer: Tokenizer | None = target.tokenizer
        self.vocab_size = vocab_size
        self.dtype = target.format.dtype
        self._kv_cache = kv_cache
        self._state = BatchState(
            num_slots=self.config.max_batch_size,
            max_seq_len=self.max_seq_len,
            device=self.device,
            backend=backend,
            forced_acceptance=self.config.forced_acceptance,
        )
        self._target = ModelRunner(target.decoder, kv_cache, model_index=TARGET, vocab_size=vocab_size)
        self._drafter = assembly.build_drafter(
            draft_model, draft, self.config, kv_cache=kv_cache, vocab_size=vocab_size
        )
        self._rounds = Rounds(
            self._state,
            self._target,
            self._drafter,
            kv_cache,
            recorder=recorder,
            is_strict=self.config.cuda_graphs is True,
            rounds_ahead=assembly.resolve_rounds_ahead(self.config, self.device),
        )
        self._intake = Intake(
            model_name=target.name,
            tokenizer=target.tokenizer,
            missing_tokenizer=checkpoint.explain_missing_tokenizer(),
            eos_token_ids=target.decoder.spec.eos_token_ids,
            vocab_size=vocab_size,
            max_seq_len=self.max_seq_len,
            kv_cache=kv_cache,
            has_drafter=self.has_drafter,
            is_lossless=self.config.forced_acceptance is None,
        )
        self._scheduler = Scheduler(
            kv_cache,
            self._state,
            chunk_size=self.config.prefill_chunk_size,
            on_release=lambda sequence: self._drafter.release(sequence.sequence_id),
            on_pressure=self._collect_one,
        )
        self._polled: dict[int, Request] = {}
        self._lock = threading.RLock()
        self._is_stepping = False
        self._doomed: list[Request] = []
        self._is_closed = False
        if self.config.cuda_graphs is True:
            self._record_rounds()

    def _load_models(
        self,
        target: Checkpoint,
        draft: Checkpoint | None,
        tokenizer: Tokenizer | None,
        backend: Backend,
        progress: bool | None,
    ) -> tuple[LoadedModel, LoadedModel | None]:
        config = self.config
        with progress_bar("loading", "bytes", enabled=progress) as update:

            def load(
                checkpoint: Checkpoint, weight_dtype: str, tokenizer: Tokenizer | None = None
            ) -> LoadedModel:
                return assembly.load(
                    checkpoint,
                    config,
                    weight_dtype=weight_dtype,
                    device=self.device,
                    backend=backend,
                    progress=update,
                    tokenizer=tokenizer,
                )

            loaded = load(target, config.weight_dtype, tokenizer)
            return loaded, None if draft is None else load(draft, config.draft_weight_dtype)

    @torch.inference_mode()
    def _record_rounds(self) -> None:
        """Records what is asked for most before anybody waits for it; other rounds when they first run."""
        counts = {0, AUTO_NUM_SPECULATIVE_TOKENS} if self.has_drafter else {0}
        for k in sorted(counts, reverse=True):
            self._rounds.record(k, RoundMode())

    # -- public -----------------------------------------------------------------------------------------------

    @property
    def has_drafter(self) -> bool:
        """Whether anything drafts: without, every request is plain decoding."""
        return not isinstance(self._drafter, NoDrafter)

    @property
    def draft_name(self) -> str | None:
        """What drafts, or None."""
        return self._drafter.name if self.has_drafter else None

    @property
    def graph_report(self) -> GraphReport | None:
        """How many rounds were recorded as CUDA graphs so far, in what time and memory; None where none are."""
        recorder = self._rounds.recorder
        return None if recorder is None else replace(recorder.report)

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that no running sequence holds."""
        return int(self._kv_cache.manager.num_free_blocks)

    def generate(
        self,
        prompts: Prompt | Collection[Prompt],
        params: SamplingParams | Collection[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        streamer: Callable[[StreamEvent], object] | None = None,
        **sampling: Any,
    ) -> GenerationResult | list[GenerationResult]:
        """Continues one prompt (text or token ids) or a list of them.

        params:   one `SamplingParams`, or one a prompt; or its fields as keywords
        streamer: called with every `StreamEvent`
        returns   one `GenerationResult`, or a list in the prompts' order
        """
        chosen, is_single = split_prompts(prompts)
        results: list[GenerationResult | None] = [None] * len(chosen)
        num_done = 0
        title = f"generating ({self.target_name})"
        with (
            progress_bar(title, "prompts", enabled=False if is_single else progress) as update,
            closing(self.stream(chosen, params, **sampling)) as events,
        ):
            for event in events:
                if streamer is not None:
                    streamer(event)
                if event.result is not None:
                    results[event.index] = event.result
                    num_done += 1
                    update(num_done, len(chosen))
        done = [result for result in results if result is not None]
        assert len(done) == len(chosen), f"{len(done)} results for {len(chosen)} prompts"
        return done[0] if is_single else done

    def stream(
        self,
        prompts: Prompt | Collection[Prompt],
        params: SamplingParams | Collection[SamplingParams] | None = None,
        **sampling: Any,
    ) -> Generator[StreamEvent, None, None]:
        """The generator twin of `generate`. Closing it early aborts what is unfinished.

        Arguments are checked at once; the requests are queued when the first event is asked for.
        """
        chosen, _ = split_prompts(prompts)
        each = split_params(params, sampling, len(chosen))
        with self._lock:
            self._check_open()
            requests = [
                self._intake.build_request(index, prompt, one)
                for index, (prompt, one) in enumerate(zip(chosen, each, strict=True))
            ]
        return self._events(requests)

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queues one prompt for `step` and returns its request id."""
        with self._lock:
            self._check_open()
            request = self._intake.build_request(0, prompt, params or SamplingParams())
            self._polled[request.request_id] = request
            self._scheduler.add(request)
            return request.request_id

    def step(self) -> list[StreamEvent]:
        """Moves every running sequence one step on; returns the events of requests made by `add_request`.

        An event's `index` is the request id. Returns [] when there is nothing to do.
        """
        with self._lock:
            self._step()
            events = []
            for request_id, request in list(self._polled.items()):
                events += [replace(event, index=request_id) for event in request.events]
                request.events.clear()
                if request.is_finished:
                    del self._polled[request_id]
            return events

    @property
    def has_work(self) -> bool:
        """Whether anything is queued or running."""
        return self._scheduler.has_work

    def abort(self, request_id: int) -> None:
        """Ends a request; its samples finish with reason "abort". Unknown or finished ids are ignored."""
        with self._lock:
            request = self._polled.get(request_id)
            if request is not None:
                self._abort(request)

    def close(self) -> None:
        """Aborts everything and gives the memory back. The engine cannot be used afterwards."""
        with self._lock:
            if self._is_closed:
                return
            try:
                self._abort(*self._scheduler.requests)
            finally:
                self._is_closed = True
                self._rounds.close()
                self._kv_cache.tensors.clear()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- stepping ---------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._is_closed:
            raise SpecEngineError("the engine is closed")

    def _events(self, requests: list[Request]) -> Generator[StreamEvent, None, None]:
        try:
            with self._lock:
                self._check_open()
                for request in requests:
                    self._scheduler.add(request)
            while True:
                with self._lock:
                    if not any(request.events for request in requests):
                        if all(request.is_finished for request in requests):
                            return
                        self._step()
                    ready = [
                        request.events.popleft() for request in requests for _ in range(len(request.events))
                    ]
                yield from ready
        finally:
            with self._lock:
                self._abort(*requests)

    def _step(self) -> None:
        try:
            self._is_stepping = True
            self._run_plan(self._scheduler.schedule())
            self._is_stepping = False  # here too: an interruption may strike the line below
        except BaseException:
            self._recover()
            raise
        finally:
            self._is_stepping = False
            doomed, self._doomed = self._doomed, []
            self._abort(*doomed)

    def _run_plan(self, plan: Plan) -> None:
        is_stuck = not (plan.chunks or plan.decoding or self._scheduler.running) and self._scheduler.has_work
        assert not is_stuck, (
            f"{len(self._scheduler.waiting)} sequences wait for {self.num_free_blocks} free blocks"
        )
        if plan.chunks:
            self._prefill(plan.chunks)
        if plan.decoding:
            self._decode(plan.decoding)
        while (flight := self._rounds.pop_due(has_launched=bool(plan.decoding))) is not None:
            self._collect(flight)
        if not self._scheduler.has_work:
            self._rounds.clear()

    def _recover(self) -> None:
        """After an interruption: what the host has committed is the truth, the rest is unreachable again."""
        self._rounds.clear()
        self._scheduler.reclaim()
        for sequence in list(self._scheduler.running):
            assert sequence.slot is not None, f"sequence {sequence.sequence_id} has no slot"
            self._state.admit(sequence)
            self._kv_cache.manager.rollback(sequence.slot, max(0, sequence.num_tokens - 1))
            if sequence.is_finished:
                self._finish(sequence)

    @torch.inference_mode()
    def _prefill(self, chunks: list[Chunk]) -> None:
        sequences = [chunk.sequence for chunk in chunks]
        wants_first = [chunk.is_last and not chunk.sequence.output_ids for chunk in chunks]
        wants_prompt = [chunk.sequence.wants_prompt_logprobs for chunk in chunks]
        num_logits = [
            chunk.length if prompt else int(first)
            for chunk, first, prompt in zip(chunks, wants_first, wants_prompt, strict=True)
        ]
        lengths = [chunk.length for chunk in chunks]
        feed = Feed(
            self._int32([chunk.start for chunk in chunks]),
            self._int32(lengths),
            self._int32(num_logits),
            sum(lengths),
            sum(num_logits),
        )
        now = time.perf_counter()
        for sequence in sequences:
            sequence.num_target_forwards += 1
            sequence.request.first_forward_time = sequence.request.first_forward_time or now
        table, mode = self._kv_cache.device_block_table(), round_mode(sequences)
        batch = self._state.plan(self._state.select(sequences, table, mode, k=0))
        batch = replace(
            batch, plan=batch.planned._replace(is_running=self._int32(list(map(int, wants_first))))
        )
        rows = self._target.build(batch, feed)
        proposal = NoDrafter().propose(batch, self._state)
        row_end = list(itertools.accumulate(num_logits))
        starts = self._int32([max(0, end - 1) for end in row_end])
        backend, outcome, logits = self._target.backend, None, None
        if not any(num_logits):
            self._target.forward(rows)
        elif batch.is_decided_by_draws and not any(wants_prompt):
            outcome = match(backend, *self._target.draw(rows, batch), starts, proposal, batch)
        else:
            judged = self._target.judge(rows, batch, feed.num_logits, batch.seq_len + 1 - feed.num_logits)
            logits = judged.raw_logits
            outcome = replace(
                verify(backend, judged.logits, judged.stats, starts, proposal, batch), logits=logits
            )
        for chunk, is_wanted, end, count in zip(chunks, wants_prompt, row_end, num_logits, strict=True):
            assert chunk.sequence.slot is not None, "a chunk's sequence has a slot"
            self._kv_cache.manager.set_computed(chunk.sequence.slot, TARGET, chunk.start + chunk.length)
            self._scheduler.publish(chunk.sequence)
            if is_wanted and logits is not None:
                self._record_prompt_logprobs(chunk, logits[end - count : end])
        if any(wants_first):
            assert outcome is not None, "a first token was drawn"
            self._rounds.push(sequences, batch, commit(outcome, batch, self._state), None)

    @torch.inference_mode()
    def _decode(self, sequences: list[Sequence]) -> None:
        self._rounds.launch(sequences)

    # -- results ----------------------------------------------------------------------------------------------

    def _collect_one(self) -> bool:
        """Reads what has been under way longest; whether there was anything."""
        flight = self._rounds.pop()
        if flight is not None:
            self._collect(flight)
        return flight is not None

    @torch.inference_mode()
    def _collect(self, flight: Flight) -> None:
        """Makes the host's record of a round, or of prompts' first tokens, what the device's has become."""
        with ranges.span(ranges.HOST, batch_size=len(flight.sequences), k=flight.batch.k) as span:
            rows = flight.results.read()[: len(flight.sequences)]
            span.note(accepted=sum(max(0, row[RESULT_EMITTED] - 1) for row in rows))
            results = [
                self._row_result(sequence, row, is_round=flight.drafter is not None)
                for sequence, row in zip(flight.sequences, rows, strict=True)
            ]
            if flight.drafter is not None:
                for result in results:
                    if result is not None:
                        end = result.length + result.num_draft
                        self._kv_cache.manager.set_computed(result.slot, TARGET, end)
                flight.drafter.observe(flight.batch, results)
            self._emit(flight, rows, results)

    def _row_result(self, sequence: Sequence, row: list[int], *, is_round: bool) -> RowResult | None:
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

    def _emit(self, flight: Flight, rows: list[list[int]], results: list[RowResult | None]) -> None:
        is_round = flight.drafter is not None
        logprobs = self._gather_logprobs(flight, results)
        now = time.perf_counter()
        for index, (sequence, row, result) in enumerate(zip(flight.sequences, rows, results, strict=True)):
            if result is None:
                continue
            request = sequence.request
            num_emitted, _, is_error = row[:NUM_RESULT_COLUMNS]
            if is_error:
                sequence.finish_reason = "error"
                sequence.error = "the target's logits hold a NaN or nothing finite"
            num_before = len(sequence.output_ids)
            for place, token in enumerate(row[NUM_RESULT_COLUMNS:][:num_emitted]):
                entry = logprobs[index][place] if logprobs[index] else None
                self._append(sequence, token, is_draft=place < result.num_accepted, logprob=entry)
                if sequence.is_finished:
                    break
            if is_round:
                sequence.num_target_forwards += 1
                if not is_error:
                    metrics.record_round(
                        sequence.metrics,
                        num_draft=result.num_draft,
                        num_accepted=result.num_accepted,
                        num_kept=len(sequence.output_ids) - num_before,
                    )
            if request.first_token_time is None:
                request.first_token_time = now
            request.last_token_time = now
            self._kv_cache.manager.rollback(result.slot, max(0, sequence.num_tokens - 1))
            if sequence.is_finished:
                self._finish(sequence)
            else:
                self._push_event(sequence)

    def _append(
        self, sequence: Sequence, token: int, *, is_draft: bool, logprob: TokenLogprob | None
    ) -> None:
        params = sequence.params
        sequence.output_ids.append(token)
        sequence.token_source.append("draft" if is_draft else "target")
        if logprob is not None:
            sequence.logprobs.append(logprob)
        may_stop = len(sequence.output_ids) >= params.min_new_tokens
        if token in sequence.eos_token_ids:
            sequence.finish_reason = "stop"
        elif token in params.stop_token_ids:
            sequence.finish_reason, sequence.stop_reason = "stop", token
        else:
            matched = sequence.text.push(token, may_stop=may_stop)
            if matched is not None:
                sequence.finish_reason, sequence.stop_reason = "stop", matched
            elif sequence.remaining <= 0:
                sequence.finish_reason = "length"

    def _finish(self, sequence: Sequence, reason: FinishReason | None = None) -> None:
        """Closes the text, reports the end, and gives the blocks back; an interrupted call may be repeated."""
        sequence.finish_reason = reason or sequence.finish_reason
        may_stop = len(sequence.output_ids) >= sequence.params.min_new_tokens
        matched = sequence.text.close(may_stop=may_stop)
        if matched is not None and sequence.finish_reason == "length":
            sequence.finish_reason, sequence.stop_reason = "stop", matched
        self._push_event(sequence)
        self._scheduler.remove(sequence)

    def _abort(self, *requests: Request) -> None:
        """Ends what is unfinished of the requests, all of it even if a drafter raises on the way.

        In the middle of a step (a drafter, a signal handler, the garbage collector closing a stream) it waits for
        the step's end.
        """
        if self._is_stepping:
            self._doomed += requests
            return
        sequences = [sequence for request in requests for sequence in request.sequences]
        with ExitStack() as cleanup:
            for sequence in reversed(sequences):
                if not sequence.is_finished:
                    cleanup.callback(self._finish, sequence, "abort")

    def _push_event(self, sequence: Sequence) -> None:
        """Reports what the sequence's last event did not, and its end only once."""
        request, num_before = sequence.request, sequence.num_reported
        if sequence.is_end_reported:
            return
        sequence.num_reported, sequence.is_end_reported = len(sequence.output_ids), sequence.is_finished
        request.events.append(
            StreamEvent(
                index=request.index,
                output_index=sequence.sample_index,
                token_ids=sequence.output_ids[num_before:],
                text_delta=sequence.text.take_delta(),
                token_source=sequence.token_source[num_before:],
                finish_reason=sequence.finish_reason,
                result=build_result(request) if request.is_finished else None,
            )
        )

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
        starts = outcome.row_start.tolist()
        rows = [starts[index] + place for index, count in wanted for place in range(count)]
        tokens = torch.cat([outcome.tokens[index, :count] for index, count in wanted])
        owners = [index for index, count in wanted for _ in range(count)]
        limits = [flight.sequences[index].params.logprobs or 0 for index in owners]
        # Gathering is a copy: not where every row is wanted, as in plain decoding.
        assert outcome.logits is not None, "whoever wants log-probabilities is judged by logits"
        logits = outcome.logits if len(rows) == outcome.logits.shape[0] else outcome.logits[rows]
        for owner, entry in zip(owners, self._logprobs(logits, tokens, limits), strict=True):
            entries[owner].append(entry)
        return entries

    def _record_prompt_logprobs(self, chunk: Chunk, logits: Tensor) -> None:
        """Row i of a chunk predicts prompt token start + i + 1; the prompt's first token has no prediction."""
        request = chunk.sequence.request
        if chunk.start == 0:
            request.prompt_logprobs = [None]
        following = request.prompt_ids[chunk.start + 1 : chunk.start + chunk.length + 1]
        limits = [request.params.prompt_logprobs or 0] * len(following)
        request.prompt_logprobs += self._logprobs(logits[: len(following)], self._int32(following), limits)

    def _logprobs(self, logits: Tensor, tokens: Tensor, limits: list[int]) -> list[TokenLogprob]:
        if not limits:
            return []
        num_top = min(max(limits), self.vocab_size)
        chosen, top_ids, top_values = self._target.backend.token_logprobs(logits, tokens, num_top)
        columns = (tokens.tolist(), chosen.tolist(), top_ids.tolist(), top_values.tolist(), limits)
        return [
            TokenLogprob(token, value, dict(zip(ids[:limit], values[:limit], strict=True)))
            for token, value, ids, values, limit in zip(*columns, strict=True)
        ]

    def _int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)
