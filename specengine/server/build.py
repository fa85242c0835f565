"""How a command's options become a service, in whichever process it is to run."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Mapping
from typing import Any

from specengine.call import prepare_engine
from specengine.engine import Engine
from specengine.server.options import ServerOptions
from specengine.server.service import Service


def build_service(options: Mapping[str, Any], server_options: ServerOptions) -> Service:
    """Checks the options; nothing is loaded before `Service.start`.

    options: of `ModelOptions` and `EngineConfig`, as they were given
    """
    call = prepare_engine(options)

    def build() -> Engine:
        return Engine(call.model, call.draft_model, config=call.config, progress=False)

    service = Service(build, server_options, model_name=name_of_model(options))
    service.on_ready = freeze_heap
    return service


def freeze_heap() -> None:
    """What is there when the model is loaded stays: collections of garbage, each of which stops everybody, need not go
    through it."""
    gc.collect()
    gc.freeze()


def name_of_model(options: Mapping[str, Any]) -> str:
    """As it was given; the bundled pair's is the package's."""
    name = options.get("model")
    return "specengine" if name is None else str(name)


async def load(service: Service) -> None:
    """Begins to load, on the running event loop, and waits for it. Raises why the engine could not be made."""
    service.start()
    while not service.is_ready:
        if service.failure is not None:
            raise service.failure
        await asyncio.sleep(0.01)
