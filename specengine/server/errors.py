"""Errors as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """What a client is told instead of an answer.

    status:  of HTTP
    param:   the field of the request that is to blame
    code:    for programs; by default the status's name
    headers: of the answer
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.headers = status, param, headers
        self.code = code or HTTPStatus(status).name.lower()

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def explain_invalid(first: Mapping[str, Any], *, num_outer: int = 0) -> ApiError:
    """What pydantic found wrong first, of `errors()`.

    num_outer: names at the beginning of its place that are none of the body's fields
    """
    param = ".".join(str(part) for part in first["loc"][num_outer:]) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        param, message = None, f"the body is no JSON: {first.get('ctx', {}).get('error', message)}"
    elif first["type"] not in ("value_error", "unknown_field") and param is not None:
        message = f"{param}: {message}"
    return ApiError(400, message, param=param)
