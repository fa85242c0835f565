"""Whatever fits the description of the interface, and whatever does not: no error is the server's."""

from __future__ import annotations

import json
from typing import Any

import hypothesis
import pytest
import schemathesis
from running_server import Running
from schemathesis.checks import not_a_server_error

PATHS = (
    *("/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"),
    *("/health", "/ready", "/metrics", "/version"),
)
# No request takes longer, whatever is asked for.
SECONDS = 10.0


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
            case.validate_response(answer, checks=[not_a_server_error])
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
