"""What can be asked for, whoever brings it: a request's body, and how its answer is begun."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from specengine.engine import Engine
from specengine.server.answers import ChatWriter, CompletionWriter, Writer
from specengine.server.errors import ApiError
from specengine.server.schemas import ChatRequest, CompletionRequest
from specengine.server.service import Service, Visit, in_thread


class Endpoint(NamedTuple):
    """body: its fields; num_prompts: of one; begin: queues an admitted one, and returns who writes its answer"""

    body: type[CompletionRequest] | type[ChatRequest]
    num_prompts: Callable[[Any], int]
    begin: Callable[[Service, Visit, Any], Awaitable[Writer]]


def check_drafter(engine: Engine, name: str | None) -> None:
    """Raises `ApiError` for a drafter that the server was not started with."""
    if name is not None and name not in engine.draft_names:
        known = ", ".join(map(repr, engine.draft_names)) or "none"
        raise ApiError(400, f"draft_model={name!r} is none of this server's: {known}", param="draft_model")


async def begin_completion(service: Service, visit: Visit, body: CompletionRequest) -> Writer:
    check_drafter(visit.engine, body.draft_model)
    await visit.begin(body.prompt, body.sampling())
    return CompletionWriter(body, visit, model_name=service.model_name)


async def begin_chat(service: Service, visit: Visit, body: ChatRequest) -> Writer:
    engine = visit.engine
    check_drafter(engine, body.draft_model)
    prompt = await in_thread(lambda: engine.render_chat(body.messages))
    await visit.begin([prompt], body.sampling(engine.advised_sampling))
    return ChatWriter(body, visit, model_name=service.model_name)


ENDPOINTS = {
    "/v1/completions": Endpoint(CompletionRequest, lambda body: len(body.prompt), begin_completion),
    "/v1/chat/completions": Endpoint(ChatRequest, lambda body: 1, begin_chat),
}
