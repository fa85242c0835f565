"""What clients are sent, as `openapi.json` describes it: the bodies and chunks that `answers` writes.

They describe, and check nothing while the server runs; tests hold real answers against them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

_Json = dict[str, Any]


class _Answer(BaseModel):
    """What is not described is not sent."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(_Answer):
    """What is wrong, for people and for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Answer):
    """Every answer that is none."""

    error: ErrorDetail


class Version(_Answer):
    """The package's."""

    version: str


class Model(_Answer):
    """What is served, by its name, its longest context, and its drafters' names."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["specengine"] = "specengine"
    max_model_len: int
    draft_models: list[str]
    has_chat_template: bool


class ModelList(_Answer):
    """One model."""

    object: Literal["list"] = "list"
    data: list[Model]


class Tokens(_Answer):
    """Ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]


class Text(_Answer):
    """Of token ids."""

    prompt: str


class PromptTokensDetails(_Answer):
    """Of the prompt's tokens."""

    cached_tokens: int


class Usage(_Answer):
    """Tokens, of all prompts and samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class SpeculativeDecoding(_Answer):
    """What drafting did for the request, in vLLM's names."""

    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: list[int]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int


class AnswerMetrics(_Answer):
    """Nulls where there are several prompts or samples."""

    speculative_decoding: SpeculativeDecoding | None
    seed: int | None
    lossless: bool


class SourcedText(_Answer):
    """A piece of the text, and who wrote it."""

    text: str
    source: str


class Round(_Answer):
    """What was drafted, and what became of it."""

    num_draft_tokens: int
    num_accepted_tokens: int
    num_tokens: int
    draft_token_ids: list[int]
    drafters: list[int]
    draft_texts: list[str]


class _Choice(_Answer):
    """A sample, or in a chunk what is new of one."""

    index: int
    finish_reason: Literal["stop", "length", "abort", "error"] | None
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    token_source: list[SourcedText] | None = None
    rounds: list[Round] | None = None


class CompletionLogprobs(_Answer):
    """Log-probabilities of tokens, and of the likeliest in their places; null where a prompt begins."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Choice):
    """Of a completion."""

    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: list[dict[str, float] | None] | None = None


class _Head(_Answer):
    """What every body and every chunk has."""

    id: str
    created: int
    model: str


class Completion(_Head):
    """A completion."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage
    metrics: AnswerMetrics


class CompletionChunk(_Head):
    """An event of a completion's stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None
    metrics: AnswerMetrics | None = None


class NamedLogprob(_Answer):
    """A token by its text, and the text's bytes."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(NamedLogprob):
    """The token that is there, and the likeliest in its place."""

    top_logprobs: list[NamedLogprob]


class ChatLogprobs(_Answer):
    """Of the answer's tokens."""

    content: list[ChatLogprob]
    refusal: None


class ChatMessage(_Answer):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatDelta(_Answer):
    """What is new of it; the role is in the first."""

    role: Literal["assistant"] | None = None
    content: str


class ChatChoice(_Choice):
    """Of a chat."""

    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatChunkChoice(_Choice):
    """Of a chat's event."""

    delta: ChatDelta
    logprobs: ChatLogprobs | None


class ChatCompletion(_Head):
    """The answer to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    metrics: AnswerMetrics


class ChatCompletionChunk(_Head):
    """An event of its stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    metrics: AnswerMetrics | None = None


CHUNKS: tuple[type[BaseModel], ...] = (CompletionChunk, ChatCompletionChunk)
_PLACE = "#/components/schemas/{model}"


def success(whole: type[BaseModel], chunk: type[BaseModel]) -> dict[int | str, _Json]:
    """The responses of a route that sends a body, or a chunk in each event."""
    content = {"anyOf": [{"$ref": _PLACE.format(model=each.__name__)} for each in (chunk, ErrorBody)]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    event = {
        "type": "object",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
        "required": ["data"],
    }
    about = "The whole, or with `stream` an event for each chunk, perhaps an error, and `data: [DONE]` at the end."
    return {
        200: {"model": whole, "description": about, "content": {"text/event-stream": {"itemSchema": event}}}
    }


def add_chunks(document: _Json) -> _Json:
    """`openapi.json` with the chunks, which no route has as its body."""
    schemas = document["components"]["schemas"]
    for chunk in CHUNKS:
        schema = chunk.model_json_schema(ref_template=_PLACE, mode="serialization")
        schemas.update({**schema.pop("$defs"), **schemas, chunk.__name__: schema})
    return document
