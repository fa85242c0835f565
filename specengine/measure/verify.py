"""Whether speculation loses nothing with a pair, its drafters and parameters: `specengine verify`.

Greedy and coupled text is compared with plain decoding's, bit for bit (`bit_checks`). Text that is judged by other
rules is random, so its law is tested (`law_checks`). A test that cannot fail shows nothing, so every check has a
control that must fail: an engine that accepts drafts whatever the target says, or the same samples by the law of
another temperature.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from specengine.call import Call
from specengine.config import SamplingParams
from specengine.drafters import registry
from specengine.engine import Engine
from specengine.engine.assembly import config_for, open_model
from specengine.measure.bit_checks import compare_bits, count_changed
from specengine.measure.checks import BIT_MODES, LAW_MODES, K, Plan
from specengine.measure.law_checks import check_law, choose_places
from specengine.measure.records import Record
from specengine.measure.runs import Run, describe_pair, describe_settings, generate


def make_plan(
    call: Call, *, ks: Sequence[K], num_samples: int, num_positions: int, with_model_free: bool = True
) -> Plan:
    """What a call asks for: its drafter, and each that can run with its target without another model; the mode that it
    names, or all that are exact.

    Raises `ValueError` where nothing would draft.
    """
    drafters = [] if call.draft_model is None else [call.draft_model]
    if with_model_free:
        free = registry.without_model(open_model(call.model, call.config).spec)
        drafters += [name for name in free if name not in drafters]
    if not drafters:
        raise ValueError("there is nothing to verify: without a draft_model decoding is plain")
    asked = call.params.acceptance
    modes = [*BIT_MODES, *LAW_MODES] if asked == "auto" else list(dict.fromkeys(["greedy", asked]))
    if call.params.is_greedy:
        modes = ["greedy"]
    return Plan(drafters, modes, list(ks), num_samples, num_positions)


def verify(call: Call, plan: Plan) -> Generator[Record, None, None]:
    """Yields a record for each drafter and mode, as it is made: `measured` is `Check.to_dict()`, `prompt_index` -1 (of
    all prompts together).

    The call's seed, or 0, is the one of coupled text and the first one of samples.

    Raises `SpecEngineError` where a generation failed, `ValueError` for a prompt that leaves too little of the context.
    """
    run = Run.start("verify")
    for drafter in plan.drafters:
        changed: dict[str, int] = {}
        if any(mode in BIT_MODES for mode in plan.modes):
            with build_engine(call, drafter, forced_acceptance=1.0) as engine:
                changed = count_changed(call, plan, engine, _encode(call, engine, plan))
        with build_engine(call, drafter) as engine:
            prompts = _encode(call, engine, plan)
            places: list[list[int]] = []
            for mode in plan.modes:
                if mode in BIT_MODES:
                    check = compare_bits(call, plan, engine, prompts, mode, num_changed=changed[mode])
                else:
                    places = places or choose_places(call, plan, engine, prompts)
                    check = check_law(call, plan, engine, places, mode)
                settings = {
                    **describe_settings(engine, call.params, batch_size=engine.config.max_batch_size),
                    "num_speculative_tokens": plan.ks,
                    "acceptance": mode,
                    "num_prompts": len(prompts),
                    "num_samples": plan.num_samples,
                    "num_positions": plan.num_positions,
                    "significance": plan.significance,
                }
                pair = describe_pair(engine)
                yield Record(run.kind, run.name, run.environment, pair, settings, -1, 0, check.to_dict())


def build_engine(call: Call, drafter: Any, **changes: Any) -> Engine:
    """The call's target with a drafter, and with some of its options changed."""
    config = config_for(replace(call.config, **changes), drafter)
    return Engine(call.model, drafter, config=config, progress=False)


def _encode(call: Call, engine: Engine, plan: Plan) -> list[list[int]]:
    """The prompts as token ids, with room behind each."""
    shortest = SamplingParams(max_new_tokens=1, num_speculative_tokens=0)
    found = [result.prompt_token_ids for result in generate(engine, call.prompts, shortest)]
    for index, ids in enumerate(found):
        if len(ids) + plan.num_positions > engine.max_seq_len:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens: with {plan.num_positions} more it goes beyond the context of "
                f"{engine.max_seq_len}"
            )
    return found
