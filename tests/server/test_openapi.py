"""Whatever fits the description of the interface, and whatever does not: no error is the server's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pydantic
import pytest
import schemathesis
from running_server import Running, events_of
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from specengine.server import answer_schemas

PATHS = (
    *("/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"),
    *("/health", "/ready", "/metrics", "/version"),
)
CHECKS = [
    *(not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance),
]
# Everything that an answer can have.
WHOLE: dict[str, Any] = {
    "max_tokens": 12,
    "seed": 3,
    "num_speculative_tokens": 4,
    "return_token_ids": True,
    "return_token_source": True,
    "return_rounds": True,
}
COMPLETION = {**WHOLE, "prompt": "abab" * 6, "echo": True, "logprobs": 2, "prompt_logprobs": 1}
CHAT = {**WHOLE, "messages": [{"role": "user", "content": "abab" * 6}], "logprobs": True, "top_logprobs": 2}
# No request takes longer, whatever is asked for.
SECONDS = 10.0


@pytest.fixture(scope="module")
def server(chat_model: Path) -> Iterator[Running]:
    """Its context is short: a chat that names no length gets what is left of it."""
    with Running(chat_model, "suffix", max_seq_len=256) as running:
        yield running.ready()
        running.check_clean()


@pytest.fixture(scope="module")
def described(server: Running) -> Any:
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")


def send_examples(described: Any, path: str, num_examples: int) -> set[int]:
    """Sends what schemathesis makes up; the statuses that came back."""
    statuses: set[int] = set()
    operation = described[path][next(iter(described[path])).upper()]
    modes = schemathesis.GenerationMode

    for mode in (modes.POSITIVE, modes.NEGATIVE):

        @hypothesis.settings(
            max_examples=num_examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(operation.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            answer = case.call(timeout=SECONDS)
            case.validate_response(answer, checks=CHECKS)
            statuses.add(answer.status_code)

        try:
            send()
        except hypothesis.errors.Unsatisfiable:
            assert mode is modes.NEGATIVE  # nothing can be wrong about a request without parameters
    return statuses


@pytest.mark.parametrize("path", PATHS)
def test_no_request_breaks_the_server(server: Running, described: Any, path: str) -> None:
    """R14."""
    statuses = send_examples(described, path, 15)
    assert statuses
    assert max(statuses) < 500
    server.check_alive()


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_no_request_of_many_breaks_the_server(server: Running, described: Any, path: str) -> None:
    statuses = send_examples(described, path, 200)
    assert max(statuses) < 500
    if path.startswith(("/v1/c", "/tok", "/det")):
        assert statuses >= {200, 400}
    server.check_alive()


def test_fields_are_described_as_the_library_declares_them(server: Running) -> None:
    document = json.loads(server.ask("GET", "/openapi.json")[2])
    completion = document["components"]["schemas"]["CompletionRequest"]
    fields = completion["properties"]
    assert completion["additionalProperties"] is False
    assert completion["required"] == ["prompt"]
    assert fields["top_p"]["exclusiveMinimum"] == 0.0
    assert fields["n"]["maximum"] == 16
    assert "coupled" in fields["acceptance"]["enum"]
    assert fields["num_speculative_tokens"]["anyOf"][0]["maximum"] == 64
    assert all("description" in field for name, field in fields.items() if name != "stream_options")


def text_of(choice: dict[str, Any]) -> str:
    """Of an answer or a chunk, of a completion or a chat."""
    text = choice["text"] if "text" in choice else choice.get("message", choice.get("delta"))["content"]
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("more", [{}, {"n": 2}, {"stop": ["a"]}, {"temperature": 0}], ids=str)
@pytest.mark.parametrize(
    ("path", "body", "whole", "chunk"),
    [
        ("/v1/completions", COMPLETION, answer_schemas.Completion, answer_schemas.CompletionChunk),
        (
            "/v1/chat/completions",
            CHAT,
            answer_schemas.ChatCompletion,
            answer_schemas.ChatCompletionChunk,
        ),
    ],
)
def test_answers_are_as_they_are_described(
    server: Running, path: str, body: dict[str, Any], whole: Any, chunk: Any, more: dict[str, Any]
) -> None:
    """With everything that they can have, and nothing that is not described."""
    status, answer = server.post(path, {**body, **more})
    assert status == 200
    whole.model_validate(answer, strict=True)
    named = answer["choices"][0]
    assert named["token_ids"]
    assert named["rounds"]
    assert named["token_source"]
    usage = {"include_usage": True, "continuous_usage_stats": True}
    events = events_of(server.ask("POST", path, {**body, **more, "stream": True, "stream_options": usage})[2])
    assert events.pop() == "[DONE]"
    assert len(events) >= 2  # text, all at once on a busy machine, and what it took
    texts = ["" for _ in answer["choices"]]
    for event in events:
        chunk.model_validate(event, strict=True)
        for choice in event["choices"]:
            texts[choice["index"]] += text_of(choice)
    assert texts == [text_of(choice) for choice in answer["choices"]]
    with pytest.raises(pydantic.ValidationError, match="surprise"):
        whole.model_validate({**answer, "surprise": 1})


def test_what_streams_send_is_described(server: Running) -> None:
    document = json.loads(server.ask("GET", "/openapi.json")[2])
    schemas = document["components"]["schemas"]
    for path, name in (
        ("/v1/completions", "CompletionChunk"),
        ("/v1/chat/completions", "ChatCompletionChunk"),
    ):
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        done, other = content["text/event-stream"]["itemSchema"]["properties"]["data"]["anyOf"]
        assert done == {"const": "[DONE]"}
        places = [f"#/components/schemas/{each}" for each in (name, "ErrorBody")]
        assert other["contentSchema"] == {"anyOf": [{"$ref": place} for place in places]}
        assert schemas[name]["additionalProperties"] is False
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert named <= set(schemas)
