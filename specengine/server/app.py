"""The routes: what is asked for over HTTP, and how it is answered."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from specengine.server.answer_schemas import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    ErrorBody,
    Model,
    ModelList,
    Text,
    Tokens,
    Version,
    add_chunks,
    success,
)
from specengine.server.answers import Writer
from specengine.server.endpoints import ENDPOINTS
from specengine.server.errors import ApiError, explain_invalid
from specengine.server.metrics import CONTENT_TYPE
from specengine.server.middleware import OPEN_PATHS, Gate
from specengine.server.page import PATHS, add_page
from specengine.server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from specengine.server.service import Service, Visit, in_thread
from specengine.tokenizer import Tokenizer

_log = logging.getLogger("specengine.server")
_LARGE_TEXT = 100_000  # characters


class _App(FastAPI):
    """Describes what streams send, too."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = add_chunks(super().openapi())
        return self.openapi_schema


def build_app(service: Service) -> FastAPI:
    """The application of a service, whose thread lives as long as the application does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(service.stop)

    app = _App(
        title="specengine",
        version=version("specengine"),
        summary="Exact speculative decoding behind OpenAI's interface",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    app.add_middleware(Gate, options=service.options, open_paths=(*OPEN_PATHS, *PATHS))
    add_error_handlers(app)
    _add_state_routes(app, service)
    _add_token_routes(app, service)
    _add_generation_routes(app, service)
    add_page(app)
    return app


# Errors


def _answer_error(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, headers=error.headers)


def add_error_handlers(app: FastAPI) -> None:
    """Every answer that is none has OpenAI's form."""

    @app.exception_handler(ApiError)
    async def _(request: Request, error: ApiError) -> Response:
        return _answer_error(error)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        return _answer_error(explain_invalid(error.errors()[0], num_outer=1))

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        return _answer_error(ApiError(error.status_code, str(error.detail), headers=error.headers))

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> Response:
        return _answer_error(ApiError(500, "the server failed; its log says more"))


# Routes


def _add_state_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """200 while the process lives."""
        return Response(status_code=200)

    @app.get("/ready", response_class=Response)
    async def ready() -> Response:
        """200 while requests are taken; 503 while the model is loaded, and while the server shuts down."""
        if not service.is_ready:
            service.engine  # noqa: B018 - raises, and says why
        return Response(status_code=200)

    @app.get("/version")
    async def get_version() -> Version:
        """The package's version."""
        return Version(version=app.version)

    plain_text = {"content": {"text/plain": {"schema": {"type": "string"}}}}

    @app.get("/metrics", response_class=Response, responses={200: plain_text})
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The model that is served."""
        model = Model(
            id=service.model_name,
            created=service.created,
            max_model_len=service.engine.max_seq_len,
            draft_models=service.engine.draft_names,
            has_chat_template=service.engine.has_chat_template,
        )
        return ModelList(data=[model])


def _add_token_routes(app: FastAPI, service: Service) -> None:
    # A text of two million characters takes a hundred times as much memory while it is worked on: one at a time.
    one_at_a_time = anyio.CapacityLimiter(1)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Tokens:
        """The token ids of a text, or of a conversation."""
        engine, tokenizer = service.engine, _tokenizer(service)
        service.check_model(body.model)

        def encode() -> list[int]:
            if body.messages is not None:
                return engine.apply_chat_template(body.messages)
            text = body.prompt or ""
            tokens = tokenizer.encode(text) if body.add_special_tokens else tokenizer.encode_part(text)
            if len(text) > _LARGE_TEXT:
                _return_memory()
            return tokens

        tokens = await in_thread(encode, limiter=one_at_a_time)
        return Tokens(count=len(tokens), max_model_len=engine.max_seq_len, tokens=tokens)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Text:
        """The text of token ids."""
        engine, tokenizer = service.engine, _tokenizer(service)
        service.check_model(body.model)
        largest = max(body.tokens, default=0)
        if largest >= engine.vocab_size:
            raise ApiError(400, f"token id {largest} is outside 0 … {engine.vocab_size - 1}", param="tokens")
        text = await in_thread(lambda: tokenizer.decode(body.tokens), limiter=one_at_a_time)
        return Text(prompt=text)


def _return_memory() -> None:
    """What large texts took goes back to the system; glibc would keep it."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _tokenizer(service: Service) -> Tokenizer:
    tokenizer = service.engine.tokenizer
    if tokenizer is None:
        raise ApiError(400, f"{service.model_name} has no tokenizer")
    return tokenizer


def _add_generation_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=success(Completion, CompletionChunk))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continues prompts. The answer is JSON, or with `stream` server-sent events."""
        return await _generate(service, request, body)

    @app.post("/v1/chat/completions", responses=success(ChatCompletion, ChatCompletionChunk))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answers a conversation. The answer is JSON, or with `stream` server-sent events."""
        return await _generate(service, request, body)


async def _generate(service: Service, request: Request, body: CompletionRequest | ChatRequest) -> Response:
    service.check_model(body.model)
    endpoint = ENDPOINTS[request.scope["path"]]
    visit = service.open(endpoint.num_prompts(body), body.n, timeout=body.timeout, streams=body.stream)
    answer: Response | None = None
    try:
        async with _watched(request, visit):
            writer = await endpoint.begin(service, visit, body)
            if body.stream:
                answer = _Stream(visit, writer, service.options.stream_period)
            else:
                answer = JSONResponse(writer.whole(await visit.results()))
        return answer
    finally:
        if not isinstance(answer, _Stream):
            visit.close()


@asynccontextmanager
async def _watched(request: Request, visit: Visit) -> AsyncIterator[None]:
    """Ends a visit whose client leaves. (A stream's response watches for that itself.)"""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        visit.abort()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


class _Stream(EventSourceResponse):
    """A visit's events, and its end, whether anybody came to read them or not."""

    def __init__(self, visit: Visit, writer: Writer, period: float) -> None:
        super().__init__(_stream(visit, writer, period))
        self._visit = visit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._visit.close()


async def _stream(visit: Visit, writer: Writer, period: float) -> AsyncIterator[str]:
    try:
        while events := await visit.events(period=period):
            for chunk in writer.chunks(events):
                yield _as_data(chunk)
        for chunk in writer.last(visit.finished):
            yield _as_data(chunk)
    except ApiError as error:
        yield _as_data(error.body)
    except Exception:
        _log.exception("a stream failed")
        yield _as_data(ApiError(500, "the server failed; its log says more").body)
    yield "data: [DONE]\n\n"


def _as_data(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"
