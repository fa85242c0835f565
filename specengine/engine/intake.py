"""Checks what a caller asks for and turns it into requests, before anything is queued."""

from __future__ import annotations

import itertools
import reprlib
import sys
import warnings
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Collection
from typing import Any

from specengine import rng
from specengine.config import SamplingParams
from specengine.kernels.types.rules import Rule
from specengine.kinds import AUTO
from specengine.prompt import MAX_NUM_IDS, Prompt, Rendered, check_prompt, check_prompts
from specengine.runtime.kv_cache import KVCache
from specengine.runtime.sequence import Request, Sequence, resolve_num_speculative_tokens
from specengine.runtime.text import TextStream
from specengine.tokenizer import Tokenizer


class Intake:
    """Builds the requests of one engine.

    missing_tokenizer: why there is no tokenizer, if more is known than that
    eos_token_ids:     ids that end a text, unless a request ignores them
    vocab_size:        ids from here on are refused
    drafter_names:     what drafts, by place
    complete:          adds to sampling arguments what is not among them, where a profile recommends something
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
        drafter_names: Collection[str],
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
        # A turn may end with another token than a text does, and the tokenizer's files name it.
        ends = [*self.eos_token_ids, None if tokenizer is None else tokenizer.eos_token_id]
        self._chat_end_ids = tuple(
            dict.fromkeys(token for token in ends if token is not None and token < vocab_size)
        )
        self._vocab_size = vocab_size
        self._max_seq_len = max_seq_len
        self._kv_cache = kv_cache
        self._drafter_names = tuple(drafter_names)
        self._has_drafter = bool(drafter_names)
        self._is_lossless = is_lossless
        self._request_ids = itertools.count()
        self.complete: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None

    def build_requests(
        self,
        prompts: Prompt | Collection[Prompt],
        params: SamplingParams | Collection[SamplingParams] | None,
        sampling: dict[str, Any],
    ) -> list[Request]:
        """A request a prompt, from any form that `Engine.generate` takes."""
        chosen, is_single = check_prompts(prompts, num_ids=self._vocab_size)
        if params is None and self.complete is not None:
            sampling = self.complete(sampling)
        each = split_params(params, sampling, len(chosen))
        requests = [
            self._build(index, "prompt" if is_single else f"prompt[{index}]", prompt, one)
            for index, (prompt, one) in enumerate(zip(chosen, each, strict=True))
        ]
        self._warn_of_losses(requests)
        return requests

    def build_request(self, prompt: Prompt, params: SamplingParams) -> Request:
        """A request for one prompt. Raises `ValueError` or `TypeError` naming what cannot be."""
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params must be SamplingParams, got {reprlib.repr(params)}")
        request = self._build(0, "prompt", check_prompt("prompt", prompt, num_ids=self._vocab_size), params)
        self._warn_of_losses([request])
        return request

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt of any length."""
        return self._tokenize("prompt", prompt, MAX_NUM_IDS)

    def _build(self, index: int, name: str, prompt: str | list[int], params: SamplingParams) -> Request:
        self._check_params(params)
        ids = self._encode(name, prompt, params)
        max_new_tokens = min(params.max_new_tokens, self._max_seq_len - len(ids))
        self._check_fits(len(ids), max_new_tokens)
        request = Request(
            request_id=next(self._request_ids),
            index=index,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_ids=ids,
            params=params,
            seed=rng.random_seed() if params.seed is None else params.seed,
            is_lossless=self._is_lossless and not self._may_lose(params),
            bad_words=self._bad_words(params),
        )
        request.sequences = [
            self._build_sequence(request, sample, max_new_tokens) for sample in range(params.n)
        ]
        return request

    def _may_lose(self, params: SamplingParams) -> bool:
        """Whether drafts are kept by a lossy rule."""
        drafts = self._has_drafter and params.num_speculative_tokens != 0
        return drafts and not Rule[params.rule.upper()].is_lossless

    def _warn_of_losses(self, requests: list[Request]) -> None:
        """One warning a call."""
        modes = sorted({request.params.acceptance for request in requests if self._may_lose(request.params)})
        if modes:
            named = " and ".join(f"acceptance={mode!r}" for mode in modes)
            warnings.warn(
                f"{named}: lossy, what is generated is not distributed as the target says",
                stacklevel=level_of_caller(),
            )

    def _check_params(self, params: SamplingParams) -> None:
        if not self._has_drafter and params.num_speculative_tokens not in ("auto", 0):
            raise ValueError(
                f"num_speculative_tokens={params.num_speculative_tokens} needs a draft_model; this engine has none"
            )
        if params.only_drafter is not None and params.only_drafter not in self._drafter_names:
            known = ", ".join(map(repr, self._drafter_names)) or "none"
            raise ValueError(f"only_drafter={params.only_drafter!r} is none of this engine's: {known}")
        for name, token_ids in (
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias token id", [token for token, _ in params.logit_bias]),
            (
                "bad_words token id",
                [token for word in params.bad_words if not isinstance(word, str) for token in word],
            ),
        ):
            for token_id in token_ids:
                if token_id >= self._vocab_size:
                    raise ValueError(
                        f"{name} must be below the vocabulary size {self._vocab_size}, got {token_id}"
                    )
        needs_logits = params.rule != "match" or params.logprobs is not None or params.logit_bias
        is_changed = params.min_new_tokens or params.bad_words or params.logits_processor
        if not self._is_lossless and (needs_logits or is_changed):
            raise ValueError(
                "forced_acceptance times greedy and coupled decoding: it goes with no other acceptance, "
                "logprobs, logit_bias, bad_words, logits_processor or min_new_tokens"
            )
        texts = {
            "stop": params.stop,
            "bad_words": [word for word in params.bad_words if isinstance(word, str)],
        }
        for name, strings in texts.items():
            if strings and self._tokenizer is None:
                raise ValueError(f"{name}={list(strings)!r} needs a tokenizer, and {self._no_tokenizer}")

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """The token sequences that are banned: a string's own, and those of the string after a space."""
        words: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            if not isinstance(word, str):
                words[word] = None
                continue
            assert self._tokenizer is not None, "strings have been refused"
            for text in (word, f" {word}"):
                # Where the tokenizer has a token that the model has not, the text cannot come about in that way.
                if (ids := tuple(self._tokenizer.encode_part(text))) and max(ids) < self._vocab_size:
                    words[ids] = None
        return tuple(words)

    def _check_fits(self, prompt_length: int, max_new_tokens: int) -> None:
        needed = self._kv_cache.blocks_for(prompt_length + max_new_tokens)
        if needed > self._kv_cache.num_usable_blocks:
            raise ValueError(
                f"a prompt of {prompt_length} tokens with max_new_tokens={max_new_tokens} needs {needed} KV blocks, "
                f"and the engine has {self._kv_cache.num_usable_blocks}; raise num_blocks or kv_cache_bytes"
            )

    def _encode(self, name: str, prompt: str | list[int], params: SamplingParams) -> list[int]:
        """The prompt's ids, each of which the model has, and no more than leave room for a new one."""
        longest = self._max_seq_len - min(1, params.max_new_tokens)
        ids = self._tokenize(name, prompt, longest) if isinstance(prompt, str) else prompt
        if not ids:
            raise ValueError(f"{name} must have at least one token, got {reprlib.repr(prompt)}")
        if len(ids) > longest:
            raise ValueError(_too_long(name, f"{len(ids)} tokens", longest, self._max_seq_len))
        return ids

    def _tokenize(self, name: str, prompt: str, longest: int) -> list[int]:
        if self._tokenizer is None:
            raise ValueError(
                f"{self._no_tokenizer}; give the prompt as token ids, or a tokenizer (tokenizer=, --tokenizer), "
                f"not {reprlib.repr(prompt)}"
            )
        fewest = self._tokenizer.fewest_tokens(prompt)
        if fewest > longest:
            raise ValueError(_too_long(name, f"at least {fewest} tokens", longest, self._max_seq_len))
        encode = self._tokenizer.encode_part if isinstance(prompt, Rendered) else self._tokenizer.encode
        ids = encode(prompt)
        for token_id in ids:
            if token_id >= self._vocab_size:
                raise ValueError(
                    f"{name} holds the token {self._tokenizer.token(token_id)!r}, whose id {token_id} is outside "
                    f"0 … {self._vocab_size - 1}: the tokenizer has it, the model has not"
                )
        return ids

    def _build_sequence(self, request: Request, sample_index: int, max_new_tokens: int) -> Sequence:
        params = request.params
        num_draft = resolve_num_speculative_tokens(params, has_drafter=self._has_drafter)
        eos = self._chat_end_ids if isinstance(request.prompt, Rendered) else self.eos_token_ids
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
            has_auto_k=params.num_speculative_tokens == AUTO and self._has_drafter,
            eos_token_ids=() if params.ignore_eos else eos,
            banned_until=len(request.prompt_ids) + params.min_new_tokens,
        )
        if params.only_drafter is not None and len(self._drafter_names) > 1:
            # The way of a drafter alone has its place.
            sequence.part = sequence.way = self._drafter_names.index(params.only_drafter)
            sequence.num_own_drafts = num_draft
        return sequence


def split_params(
    params: SamplingParams | Collection[SamplingParams] | None, sampling: dict[str, Any], count: int
) -> list[SamplingParams]:
    """One `SamplingParams` a prompt, from any of the three forms."""
    if params is not None and sampling:
        raise TypeError(f"give params or sampling arguments, not both: {', '.join(sorted(sampling))}")
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


def _too_long(name: str, length: str, longest: int, context: int) -> str:
    room = "leaves no room for a new one in" if longest < context else "does not fit into"
    return f"{name} has {length}, which {room} a context of {context}"


def level_of_caller() -> int:
    """The `stacklevel` at which a warning of the function that asks points to who called this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("specengine."):
        frame, level = frame.f_back, level + 1
    return level
