"""What clients are sent: OpenAI's bodies and chunks, made of the engine's events.

A plain answer is a stream of one event a sample. So there is one way to write a choice.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from specengine.outputs import GenerationResult, StreamEvent, TokenLogprob
from specengine.runtime.sequence import Request
from specengine.runtime.text import TokenPainter
from specengine.server.schemas import ChatRequest, CompletionRequest
from specengine.server.service import Visit
from specengine.tokenizer import REPLACEMENT, Tokenizer

# JSON has no infinity; this is what other servers say of a token that cannot be.
_LEAST_LOGPROB = -9999.0
_STATISTICS = (
    "mean_acceptance_length",
    "draft_acceptance_rate",
    "acceptance_histogram",
    "num_spec_steps",
    "num_accepted_draft_tokens",
    "num_draft_tokens",
    "num_spec_tokens",
)
_Json = dict[str, Any]


def as_events(results: Iterable[GenerationResult]) -> list[StreamEvent]:
    """Each sample as the one event that a stream would have sent, had it waited for the end."""
    return [
        StreamEvent(
            index=place,
            output_index=output.index,
            token_ids=output.token_ids,
            text_delta=output.text,
            token_source=output.token_source,
            finish_reason=output.finish_reason,
            logprobs=output.logprobs,
            rounds=output.rounds,
            stop_reason=output.stop_reason,
        )
        for place, result in enumerate(results)
        for output in result.outputs
    ]


def usage_of(results: Iterable[GenerationResult]) -> _Json:
    metrics = [result.metrics for result in results]
    num_prompt = sum(each.num_prompt_tokens for each in metrics)
    num_generated = sum(each.num_generated_tokens for each in metrics)
    num_cached = sum(min(each.num_cached_tokens, each.num_prompt_tokens) for each in metrics)
    return {**_usage(num_prompt, num_generated), "prompt_tokens_details": {"cached_tokens": num_cached}}


def _usage(num_prompt: int, num_generated: int) -> _Json:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
    }


def metrics_of(results: list[GenerationResult]) -> _Json:
    """vLLM's names. Of several samples nobody could tell whose rounds these are: null."""
    drafts, seed = None, None
    if len(results) == 1 and len(results[0].outputs) == 1:
        speculation = results[0].metrics.speculative_decoding
        drafts, seed = {name: getattr(speculation, name) for name in _STATISTICS}, results[0].seed
    return {
        "speculative_decoding": drafts,
        "seed": seed,
        "lossless": all(result.lossless for result in results),
    }


class Writer(ABC):
    """Writes one answer, in a body or in chunks."""

    prefix: str
    object_name: str
    chunk_name: str

    def __init__(self, body: CompletionRequest | ChatRequest, visit: Visit, *, model_name: str) -> None:
        self._body = body
        self._visit = visit
        self._tokenizer = visit.engine.tokenizer
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_name,
        }
        self._painters: dict[tuple[int, int], TokenPainter] = {}
        self._num_generated = 0

    def whole(self, results: list[GenerationResult]) -> _Json:
        """The answer in one body."""
        return {
            **self._head,
            "object": self.object_name,
            "choices": [self._choice(event, is_whole=True) for event in as_events(results)],
            "usage": usage_of(results),
            "metrics": metrics_of(results),
        }

    def chunks(self, events: list[StreamEvent]) -> Iterable[_Json]:
        """What a stream says next: a chunk for each sample."""
        for event in events:
            self._num_generated += len(event.token_ids)
            chunk = {
                **self._head,
                "object": self.chunk_name,
                "choices": [self._choice(event, is_whole=False)],
            }
            if self._body.stream_options.continuous_usage_stats:
                num_prompt = sum(len(request.prompt_ids) for request in self._visit.requests)
                chunk["usage"] = _usage(num_prompt, self._num_generated)
            yield chunk

    def last(self, results: list[GenerationResult]) -> Iterable[_Json]:
        """What a stream says at its end."""
        if self._body.stream_options.include_usage:
            yield {
                **self._head,
                "object": self.chunk_name,
                "choices": [],
                "usage": usage_of(results),
                "metrics": metrics_of(results),
            }

    def _choice(self, event: StreamEvent, *, is_whole: bool) -> _Json:
        sample = event.index, event.output_index
        is_first = sample not in self._painters
        request = self._visit.requests[event.index]
        if is_first:
            self._painters[sample] = TokenPainter(self._tokenizer, request.prompt_ids)
        choice = {
            "index": event.index * self._body.n + event.output_index,
            "finish_reason": event.finish_reason,
            "stop_reason": event.stop_reason,
            **self._content(event, request, is_first=is_first, is_whole=is_whole),
        }
        if self._body.return_token_ids:
            choice["token_ids"] = event.token_ids
            if is_first:
                choice["prompt_token_ids"] = request.prompt_ids
        if self._body.return_token_source:
            pieces = self._painters[sample].split(event)
            choice["token_source"] = [{"text": text, "source": source} for text, source in pieces]
        if event.rounds is not None:
            choice["rounds"] = [self._round(each._asdict()) for each in event.rounds]
        return choice

    def _round(self, each: _Json) -> _Json:
        return {**each, "draft_texts": [self._text(token) for token in each["draft_token_ids"]]}

    @abstractmethod
    def _content(self, event: StreamEvent, request: Request, *, is_first: bool, is_whole: bool) -> _Json:
        """The fields of a choice that hold its text and log-probabilities."""

    def _text(self, token_id: int) -> str:
        return token_text(self._tokenizer, token_id)


def token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    """A token by itself: as text, or as the vocabulary spells it where it is none."""
    if tokenizer is None:
        return ""
    text = tokenizer.decode([token_id])
    return tokenizer.token(token_id) if not text or REPLACEMENT in text else text


class CompletionWriter(Writer):
    """Of `/v1/completions`."""

    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"
    _body: CompletionRequest

    def __init__(self, body: CompletionRequest, visit: Visit, *, model_name: str) -> None:
        super().__init__(body, visit, model_name=model_name)
        self._offsets: dict[tuple[int, int], int] = {}

    def _content(self, event: StreamEvent, request: Request, *, is_first: bool, is_whole: bool) -> _Json:
        is_echoed = self._body.echo and is_first
        text, tokens, entries = (
            event.text_delta,
            event.token_ids,
            list[TokenLogprob | None](event.logprobs or ()),
        )
        if is_echoed:
            prompt = request.prompt
            if prompt is None:
                prompt = "" if self._tokenizer is None else self._tokenizer.decode(request.prompt_ids)
            text, tokens = prompt + text, request.prompt_ids + tokens
            entries = [*request.prompt_logprobs, *entries]
        sample = event.index, event.output_index
        logprobs = None
        if self._body.logprobs is not None:
            logprobs, self._offsets[sample] = self._logprobs(tokens, entries, self._offsets.get(sample, 0))
        content: _Json = {"text": text, "logprobs": logprobs}
        if self._body.prompt_logprobs is not None and is_first:
            content["prompt_logprobs"] = [
                None
                if entry is None
                else {str(token): max(value, _LEAST_LOGPROB) for token, value in _likely(entry)}
                for entry in request.prompt_logprobs
            ]
        return content

    def _logprobs(
        self, tokens: list[int], entries: list[TokenLogprob | None], offset: int
    ) -> tuple[_Json, int]:
        """The lists of tokens that start at `offset` of the text, and where the next one does."""
        texts, offsets = [self._text(token) for token in tokens], []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [
                None if entry is None else max(entry.logprob, _LEAST_LOGPROB) for entry in entries
            ],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in entries],
            "text_offset": offsets,
        }, offset

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By text. Of two tokens with one text the likelier counts."""
        found: dict[str, float] = {}
        for token, value in _likely(entry):
            text = self._text(token)
            found[text] = max(value, _LEAST_LOGPROB, found.get(text, _LEAST_LOGPROB))
        return found


def _likely(entry: TokenLogprob) -> list[tuple[int, float]]:
    """The likeliest tokens, and the one that is there."""
    return list({**entry.top, entry.token_id: entry.logprob}.items())


class ChatWriter(Writer):
    """Of `/v1/chat/completions`."""

    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"
    _body: ChatRequest

    def _content(self, event: StreamEvent, request: Request, *, is_first: bool, is_whole: bool) -> _Json:
        logprobs = None
        if event.logprobs is not None:
            logprobs = {"content": [self._entry(entry) for entry in event.logprobs], "refusal": None}
        role = {"role": "assistant"} if is_first or is_whole else {}
        content = {**role, "content": event.text_delta}
        if is_whole:
            return {"message": {**content, "refusal": None}, "logprobs": logprobs}
        return {"delta": content, "logprobs": logprobs}

    def _entry(self, entry: TokenLogprob) -> _Json:
        top = [self._named(token, value) for token, value in entry.top.items()]
        return {**self._named(entry.token_id, entry.logprob), "top_logprobs": top}

    def _named(self, token_id: int, logprob: float) -> _Json:
        text = self._text(token_id)
        return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(text.encode())}
