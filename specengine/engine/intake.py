"""Checks what a caller asks for and turns it into requests, before anything is queued."""

from __future__ import annotations

import itertools
import reprlib
import warnings
from collections.abc import Sequence as Collection
from typing import Any

from specengine import rng
from specengine.config import SamplingParams, field_names
from specengine.runtime.kv_cache import KVCache
from specengine.runtime.sequence import Request, Sequence, resolve_num_speculative_tokens
from specengine.runtime.text import TextStream
from specengine.tokenizer import Tokenizer

Prompt = str | Collection[int]


class Intake:
    """Builds the requests of one engine.

    missing_tokenizer: why there is no tokenizer, if more is known than that
    eos_token_ids:     ids that end a text, unless a request ignores them
    vocab_size:        ids from here on are refused
    """

    def __init__(
        self,
        *,
        model_name: str,
        tokenizer: Tokenizer | None,
        missing_tokenizer: str,
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
        max_seq_len: int,
        kv_cache: KVCache,
        has_drafter: bool,
        is_lossless: bool,
    ) -> None:
        self.eos_token_ids = tuple(token for token in eos_token_ids if token < vocab_size)
        if lost := [token for token in eos_token_ids if token >= vocab_size]:
            warnings.warn(
                f"{model_name}: eos_token_id={lost} ends no text: the tokenizer has only {vocab_size} ids",
                stacklevel=3,
            )
        why = f": {missing_tokenizer}" if missing_tokenizer else ""
        self._no_tokenizer = f"{model_name} has no tokenizer{why}"
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_seq_len = max_seq_len
        self._kv_cache = kv_cache
        self._has_drafter = has_drafter
        self._is_lossless = is_lossless
        self._request_ids = itertools.count()

    def build_request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        """A request with one sequence a sample. Raises `ValueError` or `TypeError` naming what cannot be."""
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params must be SamplingParams, got {reprlib.repr(params)}")
        self._check_params(params)
        ids = self._encode(prompt)
        max_new_tokens = min(params.max_new_tokens, self._max_seq_len - len(ids))
        self._check_fits(len(ids), max_new_tokens)
        request = Request(
            request_id=next(self._request_ids),
            index=index,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_ids=ids,
            params=params,
            seed=rng.random_seed() if params.seed is None else params.seed,
            is_lossless=self._is_lossless,
        )
        request.sequences = [
            self._build_sequence(request, sample, max_new_tokens) for sample in range(params.n)
        ]
        return request

    def _check_params(self, params: SamplingParams) -> None:
        if not self._has_drafter and params.num_speculative_tokens not in ("auto", 0):
            raise ValueError(
                f"num_speculative_tokens={params.num_speculative_tokens} needs a draft_model; this engine has none"
            )
        for name, token_ids in (
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias token id", [token for token, _ in params.logit_bias]),
        ):
            for token_id in token_ids:
                if token_id >= self._vocab_size:
                    raise ValueError(
                        f"{name} must be below the vocabulary size {self._vocab_size}, got {token_id}"
                    )
        needs_logits = params.uses_rejection or params.logprobs is not None or params.logit_bias
        if not self._is_lossless and (needs_logits or params.min_new_tokens):
            raise ValueError(
                "forced_acceptance times greedy and coupled decoding: it goes with no acceptance='rejection', "
                "logprobs, logit_bias or min_new_tokens"
            )
        if params.stop and self._tokenizer is None:
            raise ValueError(f"stop={list(params.stop)!r} needs a tokenizer, and {self._no_tokenizer}")

    def _check_fits(self, prompt_length: int, max_new_tokens: int) -> None:
        needed = self._kv_cache.blocks_for(prompt_length + max_new_tokens)
        if needed > self._kv_cache.num_usable_blocks:
            raise ValueError(
                f"a prompt of {prompt_length} tokens with max_new_tokens={max_new_tokens} needs {needed} KV blocks, "
                f"and the engine has {self._kv_cache.num_usable_blocks}; raise num_blocks or kv_cache_bytes"
            )

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("prompt must not be empty, got ''")
            if self._tokenizer is None:
                raise ValueError(
                    f"{self._no_tokenizer}; give the prompt as token ids, or a tokenizer (tokenizer=, --tokenizer), "
                    f"not {reprlib.repr(prompt)}"
                )
            ids = self._tokenizer.encode(prompt)
        else:
            ids = check_prompt_ids(prompt, self._vocab_size)
        if not ids:
            raise ValueError(f"prompt must have at least one token, got {reprlib.repr(prompt)}")
        if len(ids) >= self._max_seq_len:
            raise ValueError(
                f"prompt has {len(ids)} tokens, which leaves no room for a new one in a context of "
                f"{self._max_seq_len}"
            )
        return ids

    def _build_sequence(self, request: Request, sample_index: int, max_new_tokens: int) -> Sequence:
        params = request.params
        num_draft = resolve_num_speculative_tokens(params, has_drafter=self._has_drafter)
        eos = () if params.ignore_eos else self.eos_token_ids
        text = TextStream(
            self._tokenizer,
            request.prompt_ids,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
        )
        sequence = Sequence(
            request=request,
            sample_index=sample_index,
            text=text,
            max_new_tokens=max_new_tokens,
            num_speculative_tokens=num_draft,
            eos_token_ids=eos,
            banned_until=len(request.prompt_ids) + params.min_new_tokens,
        )
        sequence.metrics.num_spec_tokens = num_draft
        return sequence


def split_prompts(prompts: Prompt | Collection[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts as a list, and whether a single one was given."""
    if isinstance(prompts, str):
        return [prompts], True
    items = _as_list(prompts)
    if not items:
        raise ValueError("prompt must not be empty, got []")
    if all(not isinstance(item, str | list | tuple) and not hasattr(item, "__len__") for item in items):
        return [items], True
    return items, False


def split_params(
    params: SamplingParams | Collection[SamplingParams] | None, sampling: dict[str, Any], count: int
) -> list[SamplingParams]:
    """One `SamplingParams` a prompt, from any of the three forms."""
    if params is not None and sampling:
        raise TypeError(f"give params or sampling arguments, not both: {', '.join(sorted(sampling))}")
    unknown = sorted(set(sampling) - set(field_names(SamplingParams)))
    if unknown:
        raise TypeError(
            f"unknown sampling parameter {unknown[0]!r}; known: {', '.join(field_names(SamplingParams))}"
        )
    if params is None:
        return [SamplingParams(**sampling)] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Collection):
        raise TypeError(f"params must be SamplingParams or a list of them, got {reprlib.repr(params)}")
    each = list(params)
    if len(each) != count:
        raise ValueError(f"params holds {len(each)} entries for {count} prompts")
    for one in each:
        if not isinstance(one, SamplingParams):
            raise TypeError(f"params must hold SamplingParams, got {reprlib.repr(one)}")
    return each


def check_prompt_ids(prompt: Collection[int], vocab_size: int) -> list[int]:
    """Token ids as ints in 0 … vocab_size - 1."""
    ids = []
    for token in _as_list(prompt):
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise TypeError(f"prompt token ids must be integers, got {reprlib.repr(token)}")
        token_id = token.__index__()
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"prompt token id {token_id} is outside 0 … {vocab_size - 1}")
        ids.append(token_id)
    return ids


def _as_list(prompt: Any) -> list[Any]:
    """Sequences as they are, arrays and tensors through their `tolist`."""
    values = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(values, Collection) or isinstance(values, str | bytes | bytearray):
        raise TypeError(
            f"prompt must be a string, a list of token ids or a list of these, got {reprlib.repr(prompt)}"
        )
    return list(values)
