"""The engine: models, KV cache, queues, and the step that moves every running sequence one round further."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from collections.abc import Sequence as Collection
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from specengine.config import (
    AUTO_NUM_SPECULATIVE_TOKENS,
    ChatOptions,
    EngineConfig,
    SamplingParams,
    field_names,
)
from specengine.conversations import (
    ChatTemplate,
    Conversation,
    advised_sampling,
    check_conversations,
    given_template,
)
from specengine.drafters import registry
from specengine.drafters.base import Drafter, DrafterContext
from specengine.drafters.no_draft import NoDrafter
from specengine.engine import assembly, profiled
from specengine.engine.assembly import DraftModel, Model
from specengine.engine.intake import Intake
from specengine.engine.outbox import News, Outbox, build_events
from specengine.engine.rounds import Rounds
from specengine.engine.stepper import Stepper
from specengine.engine.times import RoundTimes
from specengine.errors import ModelLoadError, SpecEngineError
from specengine.models.checkpoints import Checkpoint
from specengine.models.loader import LoadedModel
from specengine.names import takes_options
from specengine.ops.backend import Backend
from specengine.ops.load import load_backend
from specengine.outputs import GenerationResult, StreamEvent
from specengine.profiles import Profile, drafts_as_recommended, with_sampling
from specengine.progress import progress_bar
from specengine.prompt import Prompt, Rendered, check_prompts
from specengine.runtime.graphs import GraphReport
from specengine.runtime.kv_cache import TARGET
from specengine.runtime.model_runner import ModelRunner
from specengine.runtime.sequence import MAX_ROUNDS_UNREAD, Request
from specengine.runtime.state import BatchState, RoundMode
from specengine.tokenizer import Tokenizer
from specengine.translation import ByText, Translation

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from specengine.option_types import ChatSamplingOptions, EngineOptions, SamplingOptions

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_EXIT_SECONDS = 5.0


def _stop_before_exit() -> None:
    """Takes every engine and keeps it: a daemon thread in the middle of a step would be ended in native code, which
    ends the process with an error."""
    deadline = time.monotonic() + _EXIT_SECONDS
    for engine in list(_engines):
        engine._hold_for_ever(deadline - time.monotonic())


atexit.register(_stop_before_exit)


class Engine:
    """Loads a target, and optionally something that drafts for it, and generates exactly what the target would.

    model:       a directory, a .gguf file, a name on the Hub, or a `transformers` model in memory; None takes the
                 profile's, and with a profile a draft_model of None is what it recommends
    draft_model: the same, a drafter's name ("self:6"), a `Drafter` object, a list of these, or None for plain decoding
    config:      an `EngineConfig`; its fields can also be given one by one

    Safe to call from several threads: whoever waits for a result moves everybody's requests on. A forked process
    builds engines of its own: those of its parent refuse at once.

    Raises `ModelLoadError`, `VocabularyMismatchError`, `InsufficientMemoryError`, `BackendUnavailableError`, and
    `ValueError`/`TypeError` for values that cannot be.
    """

    @takes_options(EngineConfig)
    def __init__(
        self,
        model: Model | None = None,
        draft_model: DraftModel = None,
        *,
        config: EngineConfig | None = None,
        progress: bool | None = None,
        **config_fields: Unpack[EngineOptions],
    ) -> None:
        profile, model, draft_model, fields = profiled.apply(config, model, draft_model, dict(config_fields))
        self.config = assembly.build_config(config, fields)
        if model is None:
            raise TypeError("an engine needs a model, or a profile, which names one; got NoneType")
        drafters = assembly.list_drafters(draft_model)
        self.device = assembly.resolve_device(self.config.device)
        backend = load_backend(self.config.backend, self.device, num_threads=self.config.num_threads)
        self.backend_name = backend.name
        recorder = assembly.build_recorder(self.config, self.device, backend.name)
        # Whatever a config says is checked before anything is loaded.
        checkpoint = assembly.open_model(model, self.config)
        for drafter in drafters:
            registry.check(drafter, checkpoint.spec)
        draft_checkpoints = [assembly.open_draft(drafter, self.config) for drafter in drafters]
        if profile is not None:
            profiled.check(profile, checkpoint, draft_checkpoints)
        max_seq_len = assembly.plan_max_seq_len(self.config, checkpoint.spec)
        tokenizer = assembly.open_given_tokenizer(self.config)
        translations = [assembly.plan_translation(checkpoint, tokenizer, each) for each in draft_checkpoints]
        heads = assembly.plan_heads(
            self.config, drafters, checkpoint, tokenizer, draft_checkpoints, translations
        )
        target, drafts = self._load_models(
            checkpoint, drafters, draft_checkpoints, tokenizer, translations, heads, backend, progress
        )
        # A draft that speaks another vocabulary shares neither ids nor blocks with the target.
        own_models = [
            draft
            for draft, translation in zip(drafts, translations, strict=True)
            if draft is not None and not isinstance(translation, ByText)
        ]
        self.draft_names = [assembly.name_drafter(drafter) for drafter in drafters]
        vocab_size = assembly.shared_vocab_size(target, own_models)
        kv_cache = assembly.build_kv_cache(
            target, own_models, self.config, max_seq_len=max_seq_len, device=self.device
        )
        self.max_seq_len = kv_cache.max_seq_len
        self.target_name = target.name
        self._chat_template = assembly.find_chat_template(checkpoint, self.config)
        self._generation_defaults = checkpoint.generation_defaults
        self.tokenizer: Tokenizer | None = target.tokenizer
        self.vocab_size = vocab_size
        self.weight_dtype = target.weight_dtype
        self.kv_dtype = str(kv_cache.tensors[0].dtype).removeprefix("torch.")
        self._kv_cache = kv_cache
        self._state = BatchState(
            num_slots=self.config.max_batch_size,
            max_seq_len=self.max_seq_len,
            device=self.device,
            backend=backend,
            forced_acceptance=self.config.forced_acceptance,
        )
        self._target = ModelRunner(target.decoder, kv_cache, model_index=TARGET, vocab_size=vocab_size)
        describe = partial(
            DrafterContext,
            target=target,
            load_model=assembly.DraftLoader(
                checkpoint, target, self.config, self.device, backend, lambda *_: None
            ),
            backend=backend,
            kv_cache=kv_cache,
            vocab_size=vocab_size,
            max_seq_len=self.max_seq_len,
            max_batch_size=self.config.max_batch_size,
            chunk_size=self.config.prefill_chunk_size,
            is_recorded=recorder is not None,
        )
        contexts = assembly.build_contexts(drafters, drafts, translations, describe)
        self._drafter = assembly.build_drafters(drafters, contexts, self.config)
        rounds_ahead = assembly.resolve_rounds_ahead(self.config, self.device)
        self._rounds = Rounds(
            self._state,
            self._target,
            self._drafter,
            kv_cache,
            recorder=recorder,
            is_strict=self.config.cuda_graphs is True,
            rounds_ahead=rounds_ahead,
        )
        self._intake = Intake(
            model_name=target.name,
            tokenizer=target.tokenizer,
            missing_tokenizer=checkpoint.explain_missing_tokenizer(),
            eos_token_ids=target.decoder.spec.eos_token_ids,
            vocab_size=vocab_size,
            max_seq_len=self.max_seq_len,
            kv_cache=kv_cache,
            drafter_names=self.draft_names,
            is_lossless=self.config.forced_acceptance is None,
        )
        self._stepper = Stepper(
            kv_cache,
            self._state,
            self._target,
            self._drafter,
            self._rounds,
            chunk_size=self.config.prefill_chunk_size,
            hides_host=rounds_ahead > 0 and self.device.type == "cuda",
        )
        if profile is not None:
            self._begin_with(profile, draft_checkpoints)
        self._scheduler = self._stepper.scheduler
        self._outbox = Outbox()
        self._lock = threading.RLock()
        self._has_changed = threading.Condition()
        self._doomed: deque[Request] = deque()
        self._is_closed = False
        self._process_id = os.getpid()
        _engines.add(self)
        if self.config.cuda_graphs is True:
            self._record_rounds()

    def _load_models(
        self,
        target: Checkpoint,
        drafters: Collection[Model | Drafter],
        drafts: Collection[Checkpoint | None],
        tokenizer: Tokenizer | None,
        translations: Collection[Translation | ByText | None],
        heads: Collection[tuple[int, ...] | None],
        backend: Backend,
        progress: bool | None,
    ) -> tuple[LoadedModel, list[LoadedModel | None]]:
        """The target, and for each drafter the model that it drafts with, if it has one of its own."""
        config = self.config
        with progress_bar("loading", "bytes", enabled=progress) as update:

            def load(
                checkpoint: Checkpoint,
                weight_dtype: str,
                head_dtype: str,
                tokenizer: Tokenizer | None = None,
                translation: Translation | None = None,
                head_tokens: tuple[int, ...] | None = None,
            ) -> LoadedModel:
                return assembly.load(
                    checkpoint,
                    config,
                    weight_dtype=weight_dtype,
                    head_dtype=head_dtype,
                    device=self.device,
                    backend=backend,
                    progress=update,
                    tokenizer=tokenizer,
                    translation=translation,
                    head_tokens=head_tokens,
                )

            loaded = load(target, config.weight_dtype, config.head_dtype, tokenizer)
            loader = assembly.DraftLoader(target, loaded, config, self.device, backend, update)
            models: list[LoadedModel | None] = []
            of_drafts = (config.draft_weight_dtype, config.draft_head_dtype)
            for drafter, draft, translation, head in zip(drafters, drafts, translations, heads, strict=True):
                if isinstance(drafter, str) and registry.names_a_drafter(drafter):
                    own = replace(loader, head_tokens=head)
                    models.append(registry.load_draft(drafter, loaded, own))
                elif draft is None:
                    models.append(None)
                elif isinstance(translation, Translation):
                    models.append(load(draft, *of_drafts, loaded.tokenizer, translation, head))
                else:
                    models.append(load(draft, *of_drafts, head_tokens=head))
            return loaded, models

    def _begin_with(self, profile: Profile, draft_checkpoints: Collection[Checkpoint | None]) -> None:
        """ "auto" starts from the profile, and requests that leave k open are drafted for as it recommends."""
        parts = getattr(self._drafter, "parts", (self._drafter,)) if self.has_drafter else ()
        keys = profiled.keys_of([part.name for part in parts], draft_checkpoints)
        profiled.begin(
            self._stepper.chooser,
            profile,
            keys,
            draft_weight_dtype=self.config.draft_weight_dtype,
            machine=profiled.describe_machine(self.device, self.config.num_threads),
            precision=profiled.describe_precision(
                self.config, self.weight_dtype, self.device, self.backend_name
            ),
        )
        if drafts_as_recommended(profile, keys):
            self._intake.complete = partial(with_sampling, profile)

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
        """What drafts, or None; of a list all of them, as in "distilgpt2+suffix"."""
        return self._drafter.name if self.has_drafter else None

    @property
    def graph_report(self) -> GraphReport | None:
        """How many rounds were recorded as CUDA graphs so far, in what time and memory; None where none are."""
        recorder = self._rounds.recorder
        return None if recorder is None else replace(recorder.report)

    @property
    def round_times(self) -> list[RoundTimes]:
        """What the latest rounds took (256 of them at most), in order."""
        return list(self._rounds.times)

    @property
    def weights(self) -> dict[str, object]:
        """The loaded tensors, in dataclasses: of the "target" and, if a model of its own drafts, the "draft"; of a list
        of drafters with several such models "draft", "draft 2" and so on."""
        weights: dict[str, object] = {"target": self._target.decoder.weights}
        for part in getattr(self._drafter, "parts", (self._drafter,)):
            draft = getattr(part, "runner", None)
            if draft is not None and (draft.kv_cache, draft.model_index) != (self._kv_cache, TARGET):
                number = len(weights)
                weights["draft" if number == 1 else f"draft {number}"] = draft.decoder.weights
        return weights

    def kv_bytes(self, num_tokens: int | None = None) -> int:
        """Memory of the KV cache, all models together: what this many tokens of one sequence take, or all of it. A
        draft model that speaks a vocabulary of its own has a cache of its own besides."""
        cache = self._kv_cache
        size = sum(tensor.nbytes for tensor in cache.tensors)
        return size if num_tokens is None else size // cache.num_blocks * cache.blocks_for(num_tokens)

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that no running sequence holds."""
        return int(self._kv_cache.manager.num_free_blocks)

    @property
    def num_blocks(self) -> int:
        """KV blocks that sequences may hold, all together."""
        return self._kv_cache.num_usable_blocks

    @property
    def num_running(self) -> int:
        """Sequences that hold KV blocks."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that are queued."""
        return len(self._scheduler.waiting)

    @takes_options(SamplingParams)
    def generate(
        self,
        prompts: Prompt | Collection[Prompt],
        params: SamplingParams | Collection[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        streamer: Callable[[StreamEvent], object] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> GenerationResult | list[GenerationResult]:
        """Continues one prompt (text or token ids) or a list of them.

        params:   one `SamplingParams`, or one a prompt; or its fields as keywords
        streamer: called with every `StreamEvent`
        returns   one `GenerationResult`, or a list in the prompts' order
        """
        self._check_open()
        requests = self._intake.build_requests(prompts, params, dict(sampling))
        return self._collect(requests, check_prompts(prompts)[1], progress, streamer)

    def _collect(
        self,
        requests: list[Request],
        is_single: bool,
        progress: bool | None,
        streamer: Callable[[StreamEvent], object] | None,
    ) -> GenerationResult | list[GenerationResult]:
        results: list[GenerationResult | None] = [None] * len(requests)
        num_done, interval = 0, 1 if streamer is not None else MAX_ROUNDS_UNREAD
        title = f"generating ({self.target_name})"
        with (
            progress_bar(title, "prompts", enabled=False if is_single else progress) as update,
            closing(self._events(_spaced(requests, interval))) as events,
        ):
            for event in events:
                if streamer is not None:
                    streamer(event)
                if event.result is not None:
                    results[event.index] = event.result
                    num_done += 1
                    update(num_done, len(requests))
        done = [result for result in results if result is not None]
        assert len(done) == len(requests), f"{len(done)} results for {len(requests)} prompts"
        return done[0] if is_single else done

    @takes_options(SamplingParams)
    def stream(
        self,
        prompts: Prompt | Collection[Prompt],
        params: SamplingParams | Collection[SamplingParams] | None = None,
        *,
        stream_interval: int = 1,
        **sampling: Unpack[SamplingOptions],
    ) -> Generator[StreamEvent, None, None]:
        """The generator twin of `generate`. Closing it early aborts what is unfinished.

        stream_interval: the most rounds whose tokens come in one event: more save the host's work between rounds,
                         where these are short

        Arguments are checked at once; the requests are queued when the first event is asked for.
        """
        return self._events(self.build_requests(prompts, params, stream_interval=stream_interval, **sampling))

    @property
    def chat_template(self) -> str | None:
        """How the model's conversations are written out, in Jinja's language; None where it does not say."""
        if isinstance(self._chat_template, ModelLoadError):
            raise self._chat_template
        return self._chat_template

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be had with the model without a template of the caller's."""
        return isinstance(self._chat_template, str)

    @takes_options(SamplingParams, ChatOptions)
    def chat(
        self,
        messages: Conversation | Collection[Conversation],
        params: SamplingParams | Collection[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        streamer: Callable[[StreamEvent], object] | None = None,
        **options: Unpack[ChatSamplingOptions],
    ) -> GenerationResult | list[GenerationResult]:
        """Answers a conversation, or each of a list of them.

        messages: a list of mappings with "role" and "content", or a list of such lists
        params:   as in `generate`; complete, so that generation_config.json adds nothing to it
        options:  fields of `SamplingParams` and `ChatOptions`

        The prompt is what the model's template makes of the messages, the result's `prompt`. A text ends with any of
        the model's end tokens, or the tokenizer's. Raises `ChatTemplateError` where there is no template, or where it
        refuses the messages.
        """
        requests, is_single = self._build_chat(messages, params, dict(options))
        return self._collect(requests, is_single, progress, streamer)

    @takes_options(SamplingParams, ChatOptions)
    def stream_chat(
        self,
        messages: Conversation | Collection[Conversation],
        params: SamplingParams | Collection[SamplingParams] | None = None,
        *,
        stream_interval: int = 1,
        **options: Unpack[ChatSamplingOptions],
    ) -> Generator[StreamEvent, None, None]:
        """The generator twin of `chat`, as `stream` is that of `generate`."""
        _check_interval(stream_interval)
        requests, _ = self._build_chat(messages, params, dict(options))
        return self._events(_spaced(requests, stream_interval))

    def advised_sampling(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What the model's generation_config.json adds to these options of a conversation; the result of `chat` tells
        it as `generation_defaults`."""
        if not options.get("generation_config", True):
            return {}
        return advised_sampling(self._generation_defaults, options, where=self.target_name)

    def apply_chat_template(self, messages: Conversation, *, chat_template: str | None = None) -> list[int]:
        """The token ids that `chat` would continue: the conversation up to where the answer begins.

        chat_template: see `ChatOptions`
        """
        return self._intake.encode(self.render_chat(messages, chat_template=chat_template))

    def render_chat(self, messages: Conversation, *, chat_template: str | None = None) -> Rendered:
        """The same as text: a prompt whose special tokens are spelled out, for `build_requests`."""
        self._check_open()
        return self._render([messages], ChatOptions(chat_template=chat_template))[0]

    def _build_chat(
        self,
        messages: Conversation | Collection[Conversation],
        params: SamplingParams | Collection[SamplingParams] | None,
        options: dict[str, Any],
    ) -> tuple[list[Request], bool]:
        self._check_open()
        conversations, is_single = check_conversations(messages)
        chat = ChatOptions(
            **{name: options.pop(name) for name in field_names(ChatOptions) if name in options}
        )
        defaults = self.advised_sampling({**vars(chat), **options}) if params is None else {}
        prompts = self._render(conversations, chat)
        chosen = prompts[0] if is_single else prompts
        requests = self._intake.build_requests(chosen, params, {**defaults, **options})
        for request in requests:
            request.generation_defaults = defaults
        return requests, is_single

    def _render(self, conversations: Collection[Conversation], options: ChatOptions) -> list[Rendered]:
        template = given_template(options)
        source = self.chat_template if template is None else template.source
        if source is None:
            raise assembly.no_chat_template(self.target_name)
        where = self.target_name if template is None else template.where
        roles = {} if self.tokenizer is None else self.tokenizer.roles
        return [ChatTemplate(source, where, roles).render(each) for each in conversations]

    @takes_options(SamplingParams)
    def build_requests(
        self,
        prompts: Prompt | Collection[Prompt],
        params: SamplingParams | Collection[SamplingParams] | None = None,
        *,
        stream_interval: int = 1,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Request]:
        """Checks prompts and turns them into ids, for `add_request`: what can be refused is refused here.

        From any thread, and without waiting for a step. Arguments are those of `stream`.
        """
        self._check_open()
        _check_interval(stream_interval)
        return _spaced(self._intake.build_requests(prompts, params, dict(sampling)), stream_interval)

    def add_request(self, prompt: Prompt | Request, params: SamplingParams | None = None) -> int:
        """Queues one prompt, or what `build_requests` made of it, for `step` and returns its request id."""
        self._check_open()
        request = (
            prompt
            if isinstance(prompt, Request)
            else self._intake.build_request(prompt, SamplingParams() if params is None else params)
        )
        request.index = request.request_id
        try:
            self._outbox.add(request)
            self._queue(self._outbox, [request])
            return request.request_id
        except BaseException:
            self._give_up([request])
            self._outbox.discard(request)
            raise

    def step(self) -> list[StreamEvent]:
        """Moves every running sequence one step on; returns the events of requests made by `add_request`.

        An event's `index` is the request id. Returns [] when there is nothing to do. What a step raises (a caller's
        drafter, Ctrl-C) ends no request: the next step goes on from what was settled, and nothing is lost.
        """
        news: list[News] = []
        try:
            with self._held():
                self._stepper.step()
                news = self._outbox.news()
                events = build_events(news)
                self._outbox.confirm(news)
            return events
        except BaseException:
            self._outbox.retract(news)
            raise

    @property
    def has_work(self) -> bool:
        """Whether anything is queued or running, or an event waits for `step` to return it."""
        return self._scheduler.has_work or bool(self._outbox)

    def wait_for_work(self, timeout: float | None = None) -> bool:
        """Blocks until `has_work`, until the engine is closed, or for `timeout` seconds; returns `has_work`.

        For a thread that drives the engine while others call `add_request` and `abort`:

            while engine.wait_for_work():
                for event in engine.step():
                    ...
        """
        with self._has_changed:
            self._has_changed.wait_for(lambda: self.has_work or self._is_closed, timeout)
            return self.has_work

    def abort(self, request_id: int) -> None:
        """Ends a request; its samples finish with reason "abort". Unknown or finished ids are ignored.

        From any thread, and without waiting: while another thread is in `step`, the request ends, and its blocks come
        back, when that step is over. Its last event is returned by the next `step`.
        """
        request = self._outbox.requests.get(request_id)
        if request is not None:
            self._give_up([request])

    def close(self) -> None:
        """Aborts everything and gives the memory back. The engine cannot be used afterwards.

        In a forked process it does nothing: the engine is the parent's.
        """
        if self._process_id != os.getpid():
            return
        with self._held():
            if self._is_closed:
                return
            try:
                self._stepper.end(*self._scheduler.requests)
            finally:
                self._is_closed = True
                self._rounds.close()
                self._kv_cache.tensors.clear()
                self._tell_waiting()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _hold_for_ever(self, seconds: float) -> None:
        """For the end of the process: no other thread begins a step again. Waits at most `seconds` for one to end."""
        if self._process_id == os.getpid():
            self._lock.acquire(timeout=max(0.0, seconds))

    # -- between threads --------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._process_id != os.getpid():
            raise SpecEngineError(
                "this engine belongs to the process that was forked: its threads are not here; build another"
            )
        if self._is_closed:
            raise SpecEngineError("the engine is closed")

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The engine for one thread alone; whoever was given up meanwhile is ended before the next has it."""
        if self._process_id != os.getpid():
            self._check_open()
        with self._lock:
            try:
                yield
            finally:
                if self._doomed:
                    self._end_doomed()
        if self._doomed:  # who was given up while the lock was being given back
            self._end_doomed()

    def _queue(self, outbox: Outbox, requests: list[Request]) -> None:
        with self._held():
            self._check_open()
            for request in requests:
                request.on_news = outbox.note
                self._scheduler.add(request)
        self._tell_waiting()

    def _tell_waiting(self) -> None:
        with self._has_changed:
            self._has_changed.notify_all()

    def _give_up(self, requests: list[Request]) -> None:
        """Nobody wants to know more of these: ends them, or leaves that to the thread that is stepping."""
        if self._process_id != os.getpid():
            return  # they are the parent's
        self._doomed.extend(request for request in requests if not request.is_finished)
        self._end_doomed()

    def _end_doomed(self) -> None:
        """In the middle of a step (a drafter, a signal handler, the garbage collector closing a stream) it waits for
        the step's end, which comes here again. So does every other thread that holds the engine."""
        while self._doomed and self._lock.acquire(blocking=False):
            try:
                if self._stepper.is_stepping:
                    return
                doomed = list(self._doomed)
                try:
                    self._stepper.end(*doomed)
                finally:
                    for request in doomed:
                        if request.is_finished:
                            self._doomed.remove(request)
            finally:
                self._lock.release()
            self._tell_waiting()

    def _events(self, requests: list[Request]) -> Generator[StreamEvent, None, None]:
        outbox = Outbox()
        try:
            self._queue(outbox, requests)
            while True:
                with self._held():
                    if not outbox:
                        if all(request.is_finished for request in requests):
                            return
                        self._stepper.step()
                    news = outbox.news()
                    events = build_events(news)
                    outbox.confirm(news)
                yield from events
        finally:
            self._give_up(requests)


def _check_interval(stream_interval: Any) -> None:
    if isinstance(stream_interval, bool) or not isinstance(stream_interval, int) or stream_interval < 1:
        raise ValueError(f"stream_interval={stream_interval!r}: expected an integer of 1 or more")


def _spaced(requests: list[Request], stream_interval: int) -> list[Request]:
    for request in requests:
        request.stream_interval = stream_interval
    return requests
