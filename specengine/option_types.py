"""What editors and type checkers read of the options in config.py. Written by tools/option_types.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict


class ModelNames(TypedDict, total=False):
    """What generates."""

    model: Any
    """the target: a directory, a .gguf file or a name on the Hub; by default the bundled pair. Default: None."""
    draft_model: Any
    """what drafts for it: a model like the target, or self:<layers>; without one decoding is plain. Default: None."""
    assistant_model: Any
    """the same as draft_model."""


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams`."""

    max_new_tokens: int
    """new tokens at most. Default: 128."""
    min_new_tokens: int
    """no EOS and no stop before this many new tokens. Default: 0."""
    temperature: float
    """0 is greedy decoding, anything above samples. Default: 0.0."""
    top_k: int
    """keep the k most likely tokens; 0 turns it off. Default: 0."""
    top_p: float
    """keep the most likely tokens that together have this probability; 1 turns it off. Default: 1.0."""
    min_p: float
    """keep tokens at least this likely, relative to the likeliest; 0 turns it off. Default: 0.0."""
    repetition_penalty: float
    """above 1, tokens that the prompt or the output has grow rarer. Default: 1.0."""
    presence_penalty: float
    """is taken from the logits of tokens that the output has. Default: 0.0."""
    frequency_penalty: float
    """is taken from a token's logit for each time that the output has it. Default: 0.0."""
    logit_bias: Mapping[int, float] | None
    """token ids, and what is added to the logit of each. Default: None."""
    bad_words: str | Sequence[str | Sequence[int]] | None
    """strings, or lists of token ids, that are never completed. Default: None."""
    logits_processor: Callable[..., Any] | Sequence[Callable[..., Any]] | None
    """a function of (token ids so far, next token's logits) that returns logits, or a list of them. Default: None."""
    seed: int | None
    """same seed, same text; by default one is drawn, and the result reports it. Default: None."""
    stop: str | Sequence[str] | None
    """strings; the text ends before the first that occurs. Default: None."""
    stop_token_ids: int | Sequence[int] | None
    """ids that end the output, kept in `token_ids`. Default: None."""
    include_stop_str_in_output: bool
    """keep the stop string in the text. Default: False."""
    ignore_eos: bool
    """do not stop at the model's end-of-text token. Default: False."""
    logprobs: int | None
    """log-probability of each new token, and of this many most likely ones. Default: None."""
    prompt_logprobs: int | None
    """the same for the prompt's tokens. Default: None."""
    return_rounds: bool
    """keep what each round drafted, the rejected tokens too. Default: False."""
    n: int
    """independent samples. Default: 1."""
    num_speculative_tokens: int | str
    """draft tokens a round. Default: 'auto'."""
    only_drafter: str | None
    """of several drafters the only one that drafts for it, by the name that the engine was given. Default: None."""
    draft_confidence: float
    """a draft model stops before a token of which it is less certain; 0 turns it off. Default: 0.0."""
    acceptance: str
    """how drafts are judged; auto is coupled if a seed is given, else rejection. Default: 'auto'."""
    acceptance_threshold: float
    """of the modes threshold and typical: drafts to which the target gives more probability are kept. Default: 0.1."""
    acceptance_delta: float
    """of the mode typical: drafts above this times exp(-H) are kept too, H the target's entropy there. Default: 0.3."""
    max_tokens: int
    """the same as max_new_tokens."""
    bad_words_ids: str | Sequence[str | Sequence[int]] | None
    """the same as bad_words."""
    stop_strings: str | Sequence[str] | None
    """the same as stop."""
    num_assistant_tokens: int | str
    """the same as num_speculative_tokens."""
    assistant_confidence_threshold: float
    """the same as draft_confidence."""
    do_sample: bool | None
    """True alone means temperature 1, False greedy decoding."""


class EngineOptions(TypedDict, total=False):
    """The fields of `EngineConfig`."""

    device: Any
    """where it runs; auto is CUDA where there is one. Default: 'auto'."""
    dtype: Any
    """of the weights, unless weight_dtype or draft_weight_dtype says otherwise. Default: 'auto'."""
    weight_dtype: Any
    """storage of the target's weights. Default: 'auto'."""
    draft_weight_dtype: Any
    """storage of the draft's weights. Default: 'auto'."""
    head_dtype: Any
    """storage of the target's head, the layer with a row for every token. Default: 'auto'."""
    draft_head_dtype: Any
    """storage of the draft's head. Default: 'auto'."""
    draft_vocab_size: int | None
    """tokens that the draft's head keeps, the most frequent ones; by default all. Default: None."""
    draft_vocab_text: str | os.PathLike[str] | None
    """a text file in which tokens are counted for draft_vocab_size; by default the bundled prompts. Default: None."""
    kv_dtype: Any
    """storage of keys and values; auto is the weights' dtype. Default: 'auto'."""
    backend: str
    """auto is native on a CPU, triton on CUDA. Default: 'auto'."""
    block_size: int
    """tokens a KV block holds. Default: 16."""
    num_blocks: int | None
    """size of the KV cache in blocks. Default: None."""
    kv_cache_bytes: int | None
    """size of the KV cache in bytes, instead of num_blocks. Default: None."""
    max_batch_size: int
    """sequences that run at the same time. Default: 32."""
    max_seq_len: int | None
    """prompt and new tokens of one sequence; by default the target's context, as far as memory goes. Default: None."""
    prefill_chunk_size: int
    """prompt tokens computed in one step. Default: 512."""
    num_threads: int | None
    """CPU threads; by default as many as environment, affinity and container allow. Default: None."""
    enable_prefix_cache: bool
    """share the KV blocks of equal prompt prefixes. Default: True."""
    cuda_graphs: bool | str
    """record rounds as CUDA graphs. Default: 'auto'."""
    rounds_ahead: int | str
    """rounds that are queued before the results of earlier ones are read. Default: 'auto'."""
    forced_acceptance: float | None
    """for timing only: accept each draft token with this probability, whatever the target says. Default: None."""
    deterministic: bool
    """the same bits every time. Default: True."""
    allow_pickle: bool
    """also read `pytorch_model.bin`. Default: False."""
    revision: str | None
    """branch, tag or commit, for names on the Hub. Default: None."""
    tokenizer: Any
    """instead of the target's own: a directory, a tokenizer.json or a name on the Hub. Default: None."""
    profile: str | os.PathLike[str] | None
    """a file that `specengine tune` wrote: options that are not given are as it recommends. Default: None."""


class ChatNames(TypedDict, total=False):
    """The fields of `ChatOptions`."""

    chat_template: str | os.PathLike[str] | None
    """a Jinja template, or a file that holds one, instead of the model's own. Default: None."""
    generation_config: bool
    """sampling options that are not given are as the model's generation_config.json says. Default: True."""


class CallOptions(ModelNames, SamplingOptions, EngineOptions, total=False):
    """The options of a call that loads what it needs."""


class ChatSamplingOptions(SamplingOptions, ChatNames, total=False):
    """The options of a conversation."""


class ChatCallOptions(CallOptions, ChatNames, total=False):
    """The options of a conversation whose call loads what it needs."""
