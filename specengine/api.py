"""Text in, text out: `generate`, its streaming twin `stream`, and `clear_cache`."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, cast, overload

from specengine.call import Call, accepts_aliases, prepare_call
from specengine.engine import Engine
from specengine.engine_cache import EngineCache, is_in_memory, model_key
from specengine.outputs import GenerationResult, StreamEvent

# An engine holds weights and a KV cache: room to compare two pairs, each with and without its draft.
MAX_CACHED_ENGINES = 4
_engines = EngineCache(MAX_CACHED_ENGINES)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_engines.forget)


@overload
def generate(prompt: str, **options: Any) -> GenerationResult: ...
@overload
def generate(prompt: list[str], **options: Any) -> list[GenerationResult]: ...
@overload
def generate(prompt: Any, **options: Any) -> Any: ...
@accepts_aliases
def generate(
    prompt: Any,
    *,
    model: Any = None,
    draft_model: Any = None,
    max_new_tokens: int = 128,
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    logits_processor: Callable[..., Any] | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: int | Sequence[int] | None = None,
    include_stop_str_in_output: bool = False,
    ignore_eos: bool = False,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    n: int = 1,
    num_speculative_tokens: int | str = "auto",
    acceptance: str = "auto",
    streamer: Any = None,
    progress: bool | None = None,
    device: Any = "auto",
    dtype: Any = "auto",
    weight_dtype: Any = "auto",
    draft_weight_dtype: Any = "auto",
    kv_dtype: Any = "auto",
    backend: str = "auto",
    block_size: int = 16,
    num_blocks: int | None = None,
    kv_cache_bytes: int | None = None,
    max_batch_size: int = 32,
    max_seq_len: int | None = None,
    prefill_chunk_size: int = 512,
    num_threads: int | None = None,
    enable_prefix_cache: bool = True,
    cuda_graphs: bool | str = "auto",
    rounds_ahead: int | str = "auto",
    forced_acceptance: float | None = None,
    deterministic: bool = True,
    allow_pickle: bool = False,
    revision: str | None = None,
    tokenizer: Any = None,
    **aliases: Any,
) -> GenerationResult | list[GenerationResult]:
    """Continue a prompt, or each of a list; a draft model makes it faster and changes nothing.

        generate("def binary_search(items, x):").text
        generate(["Once", "Twice"], model="gpt2-medium", draft_model="distilgpt2", temperature=0.8, seed=7)

    prompt:      a string, a list of token ids, or a list of either
    model:       a directory, a name on the Hugging Face Hub or a `transformers` model; None: the bundled pair
    draft_model: the same, or a `Drafter`; without one decoding is plain
    streamer:    a function that is called with each `StreamEvent`, or an object with put() and end() like
                 transformers' `TextStreamer` (one prompt, n=1); end() comes also when the call fails
    progress:    show progress bars; None = on a terminal only

    The other arguments are the fields of `SamplingParams` (how to continue) and `EngineConfig` (how to
    compute), described there. max_tokens, assistant_model, num_assistant_tokens, stop_strings and do_sample
    are understood too.

    One prompt gives one `GenerationResult`, a list gives a list in its order. Everything is checked before a
    model is loaded: `TypeError` for an unknown name or a wrong type, `ValueError` for a value out of range or
    a contradiction. The engines of the last few models are kept: see `clear_cache`.
    """
    given = locals()
    with _ended(streamer):
        call = prepare_call(prompt, given)
        _check_streamer(streamer, call)
        with lease_engine(call) as engine:
            consumer = _event_consumer(streamer, call, engine)
            return engine.generate(call.prompt, call.params, progress=progress, streamer=consumer)


@accepts_aliases
def stream(
    prompt: Any,
    *,
    model: Any = None,
    draft_model: Any = None,
    max_new_tokens: int = 128,
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    logits_processor: Callable[..., Any] | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: int | Sequence[int] | None = None,
    include_stop_str_in_output: bool = False,
    ignore_eos: bool = False,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    n: int = 1,
    num_speculative_tokens: int | str = "auto",
    acceptance: str = "auto",
    progress: bool | None = None,
    device: Any = "auto",
    dtype: Any = "auto",
    weight_dtype: Any = "auto",
    draft_weight_dtype: Any = "auto",
    kv_dtype: Any = "auto",
    backend: str = "auto",
    block_size: int = 16,
    num_blocks: int | None = None,
    kv_cache_bytes: int | None = None,
    max_batch_size: int = 32,
    max_seq_len: int | None = None,
    prefill_chunk_size: int = 512,
    num_threads: int | None = None,
    enable_prefix_cache: bool = True,
    cuda_graphs: bool | str = "auto",
    rounds_ahead: int | str = "auto",
    forced_acceptance: float | None = None,
    deterministic: bool = True,
    allow_pickle: bool = False,
    revision: str | None = None,
    tokenizer: Any = None,
    **aliases: Any,
) -> Generator[StreamEvent, None, None]:
    """The generator twin of `generate`: yields a `StreamEvent` for whatever became final in a step.

        for event in specengine.stream("def binary_search(items, x):"):
            print(event.text_delta, end="", flush=True)

    Same arguments, checked in the call itself. The last event of each prompt carries its `GenerationResult`.
    Closing the iterator ends what is unfinished; the engine stays ready for the next call.
    """
    return _stream(prepare_call(prompt, locals()))


def _stream(call: Call) -> Generator[StreamEvent, None, None]:
    with lease_engine(call) as engine, closing(stream_events(call, engine)) as events:
        yield from events


def stream_events(call: Call, engine: Engine) -> Generator[StreamEvent, None, None]:
    """The events of a call on its engine; closing the generator ends what is unfinished."""
    return engine.stream(call.prompt, call.params)


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
        return Engine(*models, config=call.config, progress=call.progress)

    key = (model_key(call.model), model_key(call.draft_model), model_key(call.config.tokenizer), call.config)
    in_memory = [model for model in models if is_in_memory(model)]
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
