"""What `specengine report` measures where it is given no file: a grid of k and temperature, and traced generations."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from statistics import fmean
from typing import Any

from specengine.call import Call
from specengine.config import SamplingParams
from specengine.drafters.registry import names_a_drafter
from specengine.engine import Engine
from specengine.errors import SpecEngineError
from specengine.measure.records import Record
from specengine.measure.runs import (
    EngineCase,
    Run,
    describe_pair,
    describe_settings,
    generate,
    measure,
    measured,
)
from specengine.measure.token_trace import TracedToken, trace

TRACED_TOKENS = 120
_TRACED_K = 5


def count_report_records(
    call: Call, ks: Sequence[int], temperatures: Sequence[float], *, repeats: int
) -> int:
    """Records that `measure_report` yields."""
    return len(call.prompts) * (repeats * (len(ks) + 1) * len(temperatures) + 2)


def measure_report(
    call: Call, ks: Sequence[int], temperatures: Sequence[float], *, repeats: int
) -> Generator[Record, None, None]:
    """Yields a row of the kind `report` for each generation of the grid, plain decoding besides, then two of the kind
    `trace` a prompt: k left to the engine, at the first temperature; and a constant k at temperature 1.

    Raises `SpecEngineError` where a generation failed.
    """
    with ExitStack() as engines:
        engine = engines.enter_context(
            Engine(call.model, call.draft_model, config=call.config, progress=False)
        )
        run = Run.start("report")
        for temperature in temperatures:
            params = replace(call.params, temperature=temperature)
            cases = [EngineCase(engine, replace(params, num_speculative_tokens=k)) for k in (0, *ks)]
            yield from measure(run, cases, call.prompts, repeats=repeats)
        draft_engine = _open_draft(call, engine, engines)
        traced = Run("trace", run.name, run.environment)
        for how in _traced(call.params, temperatures[0]):
            for index in range(len(call.prompts)):
                yield _trace(traced, engine, draft_engine, call.prompts[index], index, how)


def _traced(params: SamplingParams, temperature: float) -> Iterator[SamplingParams]:
    common = replace(params, max_new_tokens=TRACED_TOKENS, min_new_tokens=0, return_rounds=True)
    yield replace(common, temperature=temperature, num_speculative_tokens="auto")
    yield replace(common, temperature=1.0, num_speculative_tokens=_TRACED_K)


def _open_draft(call: Call, engine: Engine, engines: ExitStack) -> Engine | None:
    """An engine whose model is the draft, where that is a model with the target's vocabulary."""
    draft = call.draft_model
    if (
        draft is None
        or isinstance(draft, list | tuple)
        or (isinstance(draft, str) and names_a_drafter(draft))
    ):
        return None
    config = replace(call.config, weight_dtype=call.config.draft_weight_dtype or call.config.weight_dtype)
    try:
        found = engines.enter_context(Engine(draft, config=config, progress=False))
    except (SpecEngineError, TypeError, ValueError):
        return None  # a drafter that is no model
    mine, theirs = engine.tokenizer, found.tokenizer
    if mine is None or theirs is None:
        return found
    return found if mine.vocabulary_fingerprint == theirs.vocabulary_fingerprint else None


def _trace(
    run: Run,
    engine: Engine,
    draft_engine: Engine | None,
    prompt: Any,
    index: int,
    params: SamplingParams,
) -> Record:
    [result] = generate(engine, [prompt], params)
    tokens = trace(engine, draft_engine, result)
    row = {
        **measured([result], peak_bytes=None),
        "shares": None,
        "prompt": result.prompt,
        "text": result.text,
        "drafted_by_round": [each.num_draft_tokens for each in result.outputs[0].rounds or []],
        "similarity": _similarity(tokens),
        "tokens": [token.to_dict() for token in tokens],
    }
    settings = describe_settings(engine, params, batch_size=1)
    return Record(run.kind, run.name, run.environment, describe_pair(engine), settings, index, 0, row)


def _similarity(tokens: Sequence[TracedToken]) -> float | None:
    """Mean over the text; None where it is not known."""
    found = [token.similarity for token in tokens if token.similarity is not None]
    return fmean(found) if found else None
