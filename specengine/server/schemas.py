"""What clients send: OpenAI's fields, vLLM's, and the library's own sampling options as these are declared.

A request is checked field by field with the library's own checks, stops at the first that is wrong, and knows no fields
but these: what would be left unheeded is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import singledispatch
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator
from pydantic.json_schema import WithJsonSchema
from pydantic_core import PydanticCustomError

from specengine import kinds
from specengine.config import MAX_NEW_TOKENS, MAX_NUM_LOGPROBS, SamplingParams, declaration
from specengine.conversations import check_conversations
from specengine.json_file import shorten
from specengine.prompt import check_prompts
from specengine.server.options import MAX_NUM_BIASED_TOKENS, MAX_NUM_SAMPLES, MAX_NUM_STOP_STRINGS

MAX_NUM_PROMPTS = 4096
MAX_NUM_MESSAGES = 4096
DEFAULT_MAX_TOKENS = 16
_Json = dict[str, Any]


# Fields as the library declares them


@singledispatch
def json_schema(kind: kinds.Kind) -> _Json:
    """What `openapi.json` says of a kind of value."""
    return {"type": "string"}


@json_schema.register
def _(kind: kinds.Integer) -> _Json:
    return {"type": "integer", "minimum": kind.low, "maximum": kind.high}


@json_schema.register
def _(kind: kinds.IntegerOrAuto) -> _Json:
    number = {"type": "integer", "minimum": kind.low, "maximum": kind.high}
    return {"anyOf": [number, {"const": kinds.AUTO}]}


@json_schema.register
def _(kind: kinds.Number) -> _Json:
    low = {"exclusiveMinimum" if kind.above_low else "minimum": kind.low}
    number = {"type": "number", **low, "maximum": kind.high}
    return {"anyOf": [number, {"const": 0}]} if kind.or_zero else number


@json_schema.register
def _(kind: kinds.Flag) -> _Json:
    return {"type": "boolean"}


@json_schema.register
def _(kind: kinds.Choice) -> _Json:
    return {"enum": list(kind.names)}


@json_schema.register
def _(kind: kinds.StopStrings) -> _Json:
    text = {"type": "string", "minLength": 1, "maxLength": kinds.MAX_STOP_STRING_LENGTH}
    return {"anyOf": [text, {"type": "array", "items": text, "maxItems": MAX_NUM_STOP_STRINGS}]}


@json_schema.register
def _(kind: kinds.BadWords) -> _Json:
    ids = {"type": "array", "items": _TOKEN_ID, "minItems": 1, "maxItems": kinds.MAX_BAD_WORD_LENGTH}
    text = {"type": "string", "minLength": 1, "maxLength": kinds.MAX_BAD_WORD_LENGTH}
    return {"type": "array", "items": {"anyOf": [text, ids]}, "maxItems": kinds.MAX_NUM_BAD_WORDS}


@json_schema.register
def _(kind: kinds.TokenIds) -> _Json:
    return {"type": "array", "items": _TOKEN_ID}


@json_schema.register
def _(kind: kinds.LogitBias) -> _Json:
    bias = {"type": "number", "minimum": -kinds.MAX_LOGIT_BIAS, "maximum": kinds.MAX_LOGIT_BIAS}
    return {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": bias,
        "maxProperties": MAX_NUM_BIASED_TOKENS,
    }


_TOKEN_ID: _Json = {"type": "integer", "minimum": 0, "maximum": kinds.MAX_TOKEN_ID}


def _checked(check: Callable[[Any], Any], schema: _Json, about: str) -> Any:
    """A field that is checked by `check`, whose `TypeError` is an error of the client's, too."""

    def validate(value: Any) -> Any:
        try:
            return check(value)
        except TypeError as error:
            raise ValueError(str(error)) from None

    return Annotated[Any, BeforeValidator(validate), WithJsonSchema(schema), Field(description=about)]


def _of_kind(name: str, kind: kinds.Kind, about: str) -> Any:
    return _checked(lambda value: kind.check(name, value), json_schema(kind), about)


def _check_stop(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise TypeError(f"stop must be a string or a list of strings, got {shorten(value)}")
    if isinstance(value, list) and len(value) > MAX_NUM_STOP_STRINGS:
        raise ValueError(f"stop must hold at most {MAX_NUM_STOP_STRINGS} strings, got {len(value)}")
    return kinds.StopStrings().check("stop", value)


def _check_logit_bias(value: Any) -> Any:
    """Keys of JSON are texts."""
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias must map token ids to numbers, got {shorten(value)}")
    if len(value) > MAX_NUM_BIASED_TOKENS:
        raise ValueError(f"logit_bias must name at most {MAX_NUM_BIASED_TOKENS} tokens, got {len(value)}")
    for key in value:
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10):
            raise ValueError(f"logit_bias must have token ids as keys, got {shorten(key)}")
    return kinds.LogitBias().check("logit_bias", {int(key): bias for key, bias in value.items()})


def _check_top_k(value: Any) -> Any:
    """-1 turns it off, as in vLLM."""
    return 0 if value == -1 and not isinstance(value, bool) else _kind("top_k").check("top_k", value)


_DECLARED = {item.name: item for item in fields(SamplingParams)}


def _kind(name: str) -> kinds.Kind:
    return declaration(_DECLARED[name]).kind


# Options of the library that requests have under another name, with other limits, or not at all.
_OTHERWISE = {
    *("max_new_tokens", "min_new_tokens", "logits_processor", "logprobs", "prompt_logprobs", "n"),
    *("stop", "logit_bias", "top_k", "only_drafter"),
}
_MAX_TOKENS = kinds.Integer(0, MAX_NEW_TOKENS)
# By field: the library's option that it is.
_OPTION_OF = {name: name for name in _DECLARED if name not in _OTHERWISE} | {
    **{name: name for name in ("n", "stop", "logit_bias", "top_k")},
    "min_tokens": "min_new_tokens",
    "draft_model": "only_drafter",
}
_sampling_fields: dict[str, Any] = {
    name: (_of_kind(name, _kind(name), declaration(_DECLARED[name]).help), None)
    for name in _DECLARED
    if name not in _OTHERWISE
} | {
    "n": (_of_kind("n", kinds.Integer(1, MAX_NUM_SAMPLES), "independent samples of each prompt"), 1),
    "stop": (_checked(_check_stop, json_schema(kinds.StopStrings()), "the text ends before the first"), None),
    "logit_bias": (
        _checked(
            _check_logit_bias, json_schema(kinds.LogitBias()), "token ids, and what is added to their logits"
        ),
        None,
    ),
    "top_k": (
        _checked(_check_top_k, {"type": "integer", "minimum": -1, "maximum": 2**31 - 1}, "0 or -1: off"),
        None,
    ),
    "draft_model": (
        _of_kind("draft_model", _kind("only_drafter"), declaration(_DECLARED["only_drafter"]).help),
        None,
    ),
    "min_tokens": (_of_kind("min_tokens", _MAX_TOKENS, declaration(_DECLARED["min_new_tokens"]).help), None),
    "max_tokens": (_of_kind("max_tokens", _MAX_TOKENS, declaration(_DECLARED["max_new_tokens"]).help), None),
}


class _Body(BaseModel):
    """A request's body: null is as good as nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        given = {name: each for name, each in value.items() if each is not None}
        unknown = next((name for name in given if name not in cls.model_fields), None)
        if unknown is not None:  # the first of many
            raise PydanticCustomError(
                "unknown_field", "unknown field {name}: it would be left unheeded", {"name": shorten(unknown)}
            )
        return given


class StreamOptions(_Body):
    """What a stream says besides its tokens."""

    include_usage: bool = Field(default=False, description="a last event with usage and metrics")
    continuous_usage_stats: bool = Field(default=False, description="usage so far in every event")


_Sampling: Any = create_model("_Sampling", __base__=_Body, **_sampling_fields)


class _Generating(_Sampling):  # type: ignore[misc]
    """What both ways to generate have."""

    model: str | None = Field(default=None, description="by default the one that is served", max_length=1024)
    stream: bool = Field(default=False, description="send tokens as they come, as server-sent events")
    stream_options: StreamOptions = StreamOptions()
    timeout: float | None = Field(
        default=None,
        gt=0.0,
        le=86400.0,
        description="seconds after which the request is ended where it stands",
    )
    return_token_ids: bool = Field(
        default=False, description="the ids of prompt and new tokens beside their text"
    )
    return_token_source: bool = Field(
        default=False, description="the text in pieces, each with who wrote it: draft or target"
    )
    user: str | None = Field(default=None, max_length=1024, description="without effect")
    metadata: dict[str, Any] | None = Field(default=None, description="without effect")

    def given(self) -> dict[str, Any]:
        """The sampling options that were given, under the library's names."""
        return {
            option: getattr(self, field)
            for field, option in _OPTION_OF.items()
            if field in self.model_fields_set
        }


def _check_prompt(value: Any) -> list[Any]:
    if isinstance(value, list) and len(value) > MAX_NUM_PROMPTS and isinstance(value[0], str | list):
        raise ValueError(f"prompt must hold at most {MAX_NUM_PROMPTS} prompts, got {len(value)}")
    return check_prompts(value)[0]


_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "items": _TOKEN_ID, "minItems": 1}
_PROMPT = {
    "anyOf": [
        _TEXT,
        _IDS,
        {"type": "array", "items": {"anyOf": [_TEXT, _IDS]}, "minItems": 1, "maxItems": MAX_NUM_PROMPTS},
    ]
}


class CompletionRequest(_Generating):
    """`POST /v1/completions`"""

    prompt: _checked(_check_prompt, _PROMPT, "a text, a list of token ids, or a list of these")  # type: ignore[valid-type]
    echo: bool = Field(default=False, description="the prompt first, and with logprobs those of its tokens")
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_NUM_LOGPROBS,
        description="log-probabilities of tokens, and of so many likeliest",
    )
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_NUM_LOGPROBS,
        description="those of the prompt's tokens, as a list of mappings",
    )
    best_of: int | None = Field(default=None, ge=1, le=MAX_NUM_SAMPLES, description="only as many as n")
    suffix: Literal[""] | None = Field(default=None, description="not available")

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of={self.best_of} is not available: leave it out, or n as large")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1, got 0: only echo needs no new token")
        return self

    def sampling(self) -> dict[str, Any]:
        """What the engine is asked for: the library's options, with a server's defaults."""
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        scored = self.logprobs if self.echo and self.logprobs is not None else self.prompt_logprobs
        if scored is None and max_tokens == 0:
            scored = 0
        return {
            "temperature": 1.0,
            **self.given(),
            "max_new_tokens": max_tokens,
            "logprobs": self.logprobs,
            "prompt_logprobs": scored,
        }


def _check_messages(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MAX_NUM_MESSAGES:
        raise ValueError(f"messages must hold at most {MAX_NUM_MESSAGES} messages, got {len(value)}")
    conversations, is_single = check_conversations(value)
    if not is_single:
        raise ValueError("messages must be one conversation: a list of messages")
    return conversations[0]


_MESSAGES: _Json = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_NUM_MESSAGES,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"type": "string", "minLength": 1}, "content": {"type": "string"}},
    },
}


class _ResponseFormat(_Body):
    type: Literal["text"] = "text"


class ChatRequest(_Generating):
    """`POST /v1/chat/completions`"""

    messages: _checked(_check_messages, _MESSAGES, "the conversation, with texts as contents")  # type: ignore[valid-type]
    logprobs: bool = Field(default=False, description="log-probabilities of tokens")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_NUM_LOGPROBS, description="and of so many likeliest; with logprobs"
    )
    max_completion_tokens: _of_kind("max_completion_tokens", _MAX_TOKENS, "another name of max_tokens") = None  # type: ignore[valid-type]
    response_format: _ResponseFormat | None = Field(default=None, description="text only")

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    def sampling(self, advised: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> dict[str, Any]:
        """As of a completion; `advised` completes what was given as the model's makers would."""
        given = self.given()
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if most is not None:
            given["max_new_tokens"] = most
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        return {"temperature": 1.0, "max_new_tokens": MAX_NEW_TOKENS, **advised(given), **given}


class TokenizeRequest(_Body):
    """`POST /tokenize`: a text, or a conversation as the model's template writes it."""

    model: str | None = Field(default=None, max_length=1024)
    prompt: str | None = Field(default=None, description="a text")
    messages: _checked(_check_messages, _MESSAGES, "or a conversation") = None  # type: ignore[valid-type]
    add_special_tokens: bool = Field(default=True, description="those that the tokenizer puts around a text")

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages")
        return self


class DetokenizeRequest(_Body):
    """`POST /detokenize`"""

    model: str | None = Field(default=None, max_length=1024)
    tokens: _checked(  # type: ignore[valid-type]
        lambda value: _check_ids(value), {"type": "array", "items": _TOKEN_ID}, "token ids"
    )


def _check_ids(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise TypeError(f"tokens must be a list of token ids, got {shorten(value)}")
    return kinds.check_ids("tokens", value)
