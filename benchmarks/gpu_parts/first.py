"""The first minute on a GPU: are rounds recorded, and is what they say the same however they are launched?"""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pairs import BUNDLED

from gpu_parts.context import Context, FailedError
from gpu_parts.models import read_prompts
from specengine import Engine, GenerationResult

PDL = "SPECENGINE_PDL"
DRAFT_COUNTS = (0, 4)


def run(context: Context) -> None:
    """The bundled pair, greedy: plain and with drafts, as graphs and launch by launch, with dependent launches and
    without. Raises `FailedError` where two of these differ in a token or in a bit of a log-probability."""
    settings = context.settings
    prompt_length, max_new_tokens = (24, 8) if settings.is_rehearsal else (64, 128)
    prompts = read_prompts(2, prompt_length)
    digests: dict[str, str] = {}
    for has_graphs, is_dependent in itertools.product((True, False), repeat=2):
        how = f"{'graphs' if has_graphs else 'launches'}{', dependent' * is_dependent}"
        began = time.perf_counter()
        with (
            _dependent_launches(is_dependent),
            Engine(
                BUNDLED / "target",
                BUNDLED / "draft",
                dtype=settings.dtype,
                device=settings.device,
                max_batch_size=len(prompts),
                cuda_graphs=has_graphs and settings.device == "cuda",
            ) as engine,
        ):
            engine_seconds = time.perf_counter() - began
            for k in DRAFT_COUNTS:
                results = engine.generate(
                    prompts,
                    temperature=0.0,
                    max_new_tokens=max_new_tokens,
                    ignore_eos=True,
                    num_speculative_tokens=k,
                    logprobs=0,
                    progress=False,
                )
                digest = digests[f"{how}, k = {k}"] = _digest(results)
                report = engine.graph_report
                row = {
                    "has_graphs": has_graphs,
                    "is_dependent": is_dependent,
                    "num_speculative_tokens": k,
                    "engine_seconds": round(engine_seconds, 3),
                    "num_graphs": 0 if report is None else report.num_graphs,
                    "digest": digest,
                }
                context.add({"kind": "first", **row})
                context.say(f"{how}, k = {k}: {digest}")
    if len(set(digests.values())) > 1:
        raise FailedError("; ".join(f"{how}: {digest}" for how, digest in digests.items()))


@contextmanager
def _dependent_launches(wanted: bool) -> Iterator[None]:
    """For engines that are made meanwhile."""
    before = os.environ.get(PDL)
    os.environ[PDL] = str(int(wanted))
    try:
        yield
    finally:
        if before is None:
            del os.environ[PDL]
        else:
            os.environ[PDL] = before


def _digest(results: list[GenerationResult]) -> str:
    """Of all tokens, and of every bit of their log-probabilities."""
    digest = hashlib.sha256()
    for result in results:
        for token in result.outputs[0].logprobs or ():
            digest.update(struct.pack("<id", token.token_id, token.logprob))
    return digest.hexdigest()[:16]
