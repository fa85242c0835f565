"""Text in, text out: `generate`, its streaming twin `stream`, the same for conversations, and `clear_cache`."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, cast, overload

from specengine.call import Call, ChatCall, prepare_call, prepare_chat
from specengine.config import ChatOptions, EngineConfig, ModelOptions, SamplingParams
from specengine.engine import Engine
from specengine.engine.assembly import check_has_chat_template
from specengine.engine_cache import EngineCache, is_in_memory, model_key
from specengine.names import takes_options
from specengine.outputs import GenerationResult, StreamEvent

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from specengine.option_types import CallOptions, ChatCallOptions

# An engine holds weights and a KV cache: room to compare two pairs, each with and without its draft.
MAX_CACHED_ENGINES = 4
_engines = EngineCache(MAX_CACHED_ENGINES)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_engines.forget)


_takes_all_options = takes_options(ModelOptions, SamplingParams, EngineConfig)
_takes_chat_options = takes_options(ModelOptions, SamplingParams, EngineConfig, ChatOptions)


@overload
def generate(
    prompt: str, *, streamer: Any = ..., progress: bool | None = ..., **options: Unpack[CallOptions]
) -> GenerationResult: ...
@overload
def generate(
    prompt: list[str], *, streamer: Any = ..., progress: bool | None = ..., **options: Unpack[CallOptions]
) -> list[GenerationResult]: ...
@overload
def generate(
    prompt: Any, *, streamer: Any = ..., progress: bool | None = ..., **options: Unpack[CallOptions]
) -> Any: ...
@_takes_all_options
def generate(
    prompt: Any, *, streamer: Any = None, progress: bool | None = None, **options: Any
) -> GenerationResult | list[GenerationResult]:
    """Continue a prompt, or each of a list; a draft model makes it faster and changes nothing.

        generate("def binary_search(items, x):").text
        generate(["Once", "Twice"], model="gpt2-medium", draft_model="distilgpt2", temperature=0.8, seed=7)

    prompt:   a string, a list of token ids, or a list of either
    streamer: a function that is called with each `StreamEvent`, or an object with put() and end() like
              transformers' `TextStreamer` (one prompt, n=1); end() comes also when the call fails
    progress: show progress bars; None = on a terminal only
    options:  model and draft_model: directories, .gguf files, names on the Hugging Face Hub or `transformers` models,
              the draft also a drafter's name ("self:6"), a `Drafter` or a list of these; without either the bundled
              pair, without a draft plain decoding. The others are the fields of `SamplingParams` (how to continue)
              and `EngineConfig` (how to compute), described there. max_tokens, assistant_model, num_assistant_tokens,
              stop_strings and do_sample are understood too

    One prompt gives one `GenerationResult`, a list gives a list in its order. Everything is checked before a
    model is loaded: `TypeError` for an unknown name or a wrong type, `ValueError` for a value out of range or
    a contradiction. The engines of the last few models are kept: see `clear_cache`.

    A sample whose model gave no distribution (logits with a NaN, or nothing finite) ends with `finish_reason` "error"
    and says why in `error`; the other samples and prompts of the call are not concerned.
    """
    with _ended(streamer):
        call = prepare_call(prompt, options, progress=progress)
        _check_streamer(streamer, call)
        with lease_engine(call) as engine:
            consumer = _event_consumer(streamer, call, engine)
            return engine.generate(call.prompt, call.params, progress=progress, streamer=consumer)


@_takes_all_options
def stream(
    prompt: Any, *, progress: bool | None = None, **options: Unpack[CallOptions]
) -> Generator[StreamEvent, None, None]:
    """The generator twin of `generate`: yields a `StreamEvent` for whatever became final in a step.

        for event in specengine.stream("def binary_search(items, x):"):
            print(event.text_delta, end="", flush=True)

    Same arguments, checked in the call itself. The last event of each prompt carries its `GenerationResult`.
    Closing the iterator ends what is unfinished; the engine stays ready for the next call.
    """
    return _stream(prepare_call(prompt, options, progress=progress))


def _stream(call: Call) -> Generator[StreamEvent, None, None]:
    with lease_engine(call) as engine, closing(stream_events(call, engine)) as events:
        yield from events


def stream_events(
    call: Call, engine: Engine, *, stream_interval: int = 1
) -> Generator[StreamEvent, None, None]:
    """The events of a call on its engine; closing the generator ends what is unfinished."""
    return engine.stream(call.prompt, call.params, stream_interval=stream_interval)


@_takes_chat_options
def chat(
    messages: Any, *, streamer: Any = None, progress: bool | None = None, **options: Unpack[ChatCallOptions]
) -> Any:
    """Answer a conversation, or each of a list: the model's own template writes it out, `generate` continues it.

        chat([{"role": "user", "content": "Name three colours."}], model="path/to/a/chat/model").text

    messages: a list of mappings with "role" ("system", "user", "assistant") and "content", or a list of such lists
    streamer, progress: as in `generate`; a streamer is a function of a `StreamEvent`
    options:  those of `generate`, and the fields of `ChatOptions`: chat_template (in place of the model's) and
              generation_config (False leaves the file of that name aside)

    Sampling options that are not given are as the model's generation_config.json says; the result tells which, in
    `generation_defaults`, and the prompt that the template made, in `prompt`. The answer ends with any of the model's
    end tokens. One conversation gives one `GenerationResult`, a list gives a list in its order. Errors are those of
    `generate`, and `ChatTemplateError` for a model without template, a malformed one, or one that refuses the messages.
    """
    if streamer is not None and not callable(streamer):
        raise TypeError(f"streamer must be a function of a StreamEvent, got {streamer!r}")
    chat = prepare_chat(messages, options, progress=progress)
    with lease_engine(chat.call) as engine:
        return engine.chat(chat.messages, progress=progress, streamer=streamer, **chat.sampling)


@_takes_chat_options
def stream_chat(
    messages: Any, *, progress: bool | None = None, **options: Unpack[ChatCallOptions]
) -> Generator[StreamEvent, None, None]:
    """The generator twin of `chat`, as `stream` is that of `generate`."""
    return _stream_chat(prepare_chat(messages, options, progress=progress))


def _stream_chat(chat: ChatCall) -> Generator[StreamEvent, None, None]:
    with (
        lease_engine(chat.call) as engine,
        closing(engine.stream_chat(chat.messages, **chat.sampling)) as events,
    ):
        yield from events


def clear_cache() -> None:
    """Close the engines that `generate` and `stream` keep, and free their memory.

    An engine that is in use is closed when that use ends.
    """
    _engines.clear()


@contextmanager
def lease_engine(call: Call) -> Iterator[Engine]:
    """The engine of a call, loaded or from the cache, and kept alive while the block runs."""
    models = (call.model, call.draft_model)

    def build() -> Engine:
        if call.needs_chat_template:
            check_has_chat_template(call.model, call.config)
        return Engine(*models, config=call.config, progress=call.progress)

    config = call.config
    files = (config.tokenizer, config.profile)
    key = (model_key(call.model), model_key(call.draft_model), *map(model_key, files), config)
    drafts = call.draft_model if isinstance(call.draft_model, tuple) else (call.draft_model,)
    in_memory = [model for model in (call.model, *drafts) if is_in_memory(model)]
    with _engines.lease(key, build, in_memory=in_memory) as engine:
        yield engine


def _check_streamer(streamer: object, call: Call) -> None:
    if streamer is None:
        return
    if _has_put_and_end(streamer):
        if len(call.prompts) > 1 or call.params.n > 1:
            raise ValueError(
                f"a streamer with put() and end() follows one text, got {len(call.prompts)} prompts with "
                f"n={call.params.n}; pass a function of a StreamEvent, or use specengine.stream"
            )
    elif not callable(streamer):
        raise TypeError(
            f"streamer must have put() and end(), or be a function of a StreamEvent; got {streamer!r}"
        )


def _has_put_and_end(streamer: object) -> bool:
    return not isinstance(streamer, type) and hasattr(streamer, "put") and hasattr(streamer, "end")


@contextmanager
def _ended(streamer: Any) -> Iterator[None]:
    """Whatever becomes of the call, a streamer with put() and end() hears of its end: its reader may be waiting."""
    try:
        yield
    finally:
        if _has_put_and_end(streamer):
            streamer.end()


def _event_consumer(streamer: Any, call: Call, engine: Engine) -> Callable[[StreamEvent], None] | None:
    if streamer is None or not _has_put_and_end(streamer):
        return cast("Callable[[StreamEvent], None] | None", streamer)
    return _feed_put_and_end(streamer, call.prompts[0], engine)


def _feed_put_and_end(
    streamer: Any, prompt: str | list[int], engine: Engine
) -> Callable[[StreamEvent], None]:
    """The protocol of transformers' streamers: the prompt's ids, then new ids as they come."""
    import torch

    if isinstance(prompt, str) and engine.tokenizer is not None:
        prompt = engine.tokenizer.encode(prompt)
    if not isinstance(prompt, str):
        streamer.put(torch.tensor([prompt]))

    def consume(event: StreamEvent) -> None:
        if event.token_ids:
            streamer.put(torch.tensor(event.token_ids))

    return consume
