"""The same file of requests on a Ray cluster: Ray Data deals blocks of lines to actors that hold an engine each.

Blocks come back in order. Where an actor dies Ray Data begins another and deals its blocks again, as often as it takes:
their lines are there once all the same.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import pyarrow
import ray.data
from ray.exceptions import RayError

from specengine.call import prepare_engine
from specengine.errors import SpecEngineError
from specengine.server.batch import Answers, answering
from specengine.server.build import build_service
from specengine.server.options import ServerOptions
from specengine.server.ray_cluster import Share, joined, share_cluster

_Json = dict[str, Any]
# Blocks that an engine has at once: while the last lines of one are waited for, the next has begun.
_NUM_AT_ONCE = 2


class Answerer:
    """An engine in an actor, called with blocks of lines by several threads.

    server_options, seed: as of `answering`
    """

    def __init__(self, options: Mapping[str, Any], server_options: ServerOptions, seed: int) -> None:
        self._open = ExitStack()
        service = build_service(options, server_options)
        self._answer = self._open.enter_context(answering(service, seed=seed))

    def __call__(self, block: pyarrow.Table) -> pyarrow.Table:
        """ "number" and "line" of requests → "answer", as JSON."""
        numbers, lines = (block[name].to_pylist() for name in ("number", "line"))
        answers = [json.dumps(answer) for answer in self._answer(zip(numbers, lines, strict=True))]
        return pyarrow.table({"answer": pyarrow.array(answers, pyarrow.large_string())})


def answering_on_ray(
    options: Mapping[str, Any],
    server_options: ServerOptions,
    *,
    seed: int,
    num_workers: int | None,
    address: str | None,
) -> AbstractContextManager[Answers]:
    """As `answering`, by so many engines of a Ray cluster (`ray_cluster`). Checks the options at once.

    The requests are held in Ray's object store, whole.
    """
    config = prepare_engine(options).config
    made_of = {"options": options, "server_options": server_options, "seed": seed}

    @contextmanager
    def begin() -> Iterator[Answers]:
        with joined(address):
            share = share_cluster(num_workers, on_gpu=str(config.device) != "cpu")
            yield partial(_deal, share, config.max_batch_size, made_of)

    return begin()


def _deal(
    share: Share, block_size: int, made_of: dict[str, Any], requests: Iterable[tuple[int, bytes]]
) -> Iterator[_Json]:
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is raised
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    rows = [{"number": number, "line": line} for number, line in requests]
    num_blocks = min(len(rows), max(share.num_engines, math.ceil(len(rows) / block_size)))
    answered = ray.data.from_items(rows, override_num_blocks=num_blocks).map_batches(
        Answerer,
        fn_constructor_kwargs=made_of,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=min(share.num_engines, num_blocks),
            max_tasks_in_flight_per_actor=_NUM_AT_ONCE,
            max_concurrent_calls_per_actor=_NUM_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        **share.resources,
    )
    try:
        for block in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for answer in block["answer"].to_pylist():
                yield json.loads(answer)
    except RayError as error:
        raise SpecEngineError(f"Ray: {_cause(error)}") from None


def _cause(error: BaseException) -> str:
    """The last line of what Ray tells of an error elsewhere: the error itself."""
    return str(error).strip().splitlines()[-1].strip()
