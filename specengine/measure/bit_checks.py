"""Greedy and coupled text against plain decoding's, bit for bit."""

from __future__ import annotations

from dataclasses import replace

from specengine.call import Call
from specengine.config import AUTO_NUM_SPECULATIVE_TOKENS, SamplingParams
from specengine.engine import Engine
from specengine.measure.checks import BIT_MODES, LOSSLESS, NO_POWER, NOT_LOSSLESS, Check, DraftCounts, Plan
from specengine.measure.runs import generate
from specengine.outputs import CompletionOutput, GenerationResult

# Prompts that are decoded together.
BATCH_SIZE = 8
# Of the reference backend, which promises tokens and no bits.
REFERENCE_TOLERANCE = 1e-4


def count_changed(call: Call, plan: Plan, engine: Engine, prompts: list[list[int]]) -> dict[str, int]:
    """The control. By mode: how many texts an engine with `forced_acceptance=1.0` changes."""
    changed: dict[str, int] = {}
    largest = max((k for k in plan.ks if isinstance(k, int)), default=AUTO_NUM_SPECULATIVE_TOKENS)
    for mode in plan.modes:
        if mode in BIT_MODES:
            # Without what force does not go with.
            params = replace(
                _params(call, mode), logit_bias=None, bad_words=None, logits_processor=None, min_new_tokens=0
            )
            plain, forced = (
                generate(engine, prompts, replace(params, num_speculative_tokens=k)) for k in (0, largest)
            )
            changed[mode] = sum(
                one.token_ids != other.token_ids for one, other in zip(plain, forced, strict=True)
            )
    return changed


def compare_bits(
    call: Call, plan: Plan, engine: Engine, prompts: list[list[int]], mode: str, *, num_changed: int
) -> Check:
    """Every prompt with every k, alone and in a batch, with log-probabilities and without, against itself alone and
    without drafts. num_changed: see `count_changed`"""
    params = _params(call, mode)
    plain = replace(params, num_speculative_tokens=0, logprobs=1)
    expected = [generate(engine, [prompt], plain)[0].outputs[0] for prompt in prompts]
    alone = [[index] for index in range(len(prompts))]
    size = max(len(prompts), min(BATCH_SIZE, engine.config.max_batch_size))
    together = [index % len(prompts) for index in range(size)]
    results: list[GenerationResult] = []
    reason = ""
    for k in plan.ks:
        for batch, logprobs in [*((batch, 1) for batch in alone), (together, 1), (together, None)]:
            asked = replace(params, num_speculative_tokens=k, logprobs=logprobs)
            found = generate(engine, [prompts[index] for index in batch], asked)
            for index, result in zip(batch, found, strict=True):
                difference = _difference(result.outputs[0], expected[index], engine.backend_name)
                if difference and not reason:
                    reason = f"{difference} (prompt {index}, k = {k}, batch of {len(batch)})"
            results += found
    drafts = DraftCounts.of(results)
    if not reason and not all(result.lossless for result in results):
        reason = "the engine itself calls it lossy"
    weakness = drafts.weakness
    if not weakness and not num_changed:
        weakness = "drafts that are accepted by force change no text"
    return Check(
        drafter=engine.draft_name or "",
        mode=mode,
        outcome=NOT_LOSSLESS if reason else NO_POWER if weakness else LOSSLESS,
        reason=reason or weakness,
        num_texts=len(results),
        drafts=drafts,
        control=f"{num_changed} of {len(prompts)} change",
    )


def _params(call: Call, mode: str) -> SamplingParams:
    """Greedy, or coupled at the call's temperature and seed."""
    if mode == "greedy":
        return replace(call.params, temperature=0.0, acceptance="auto")
    return replace(call.params, acceptance="coupled", seed=call.params.seed or 0)


def _difference(ours: CompletionOutput, plain: CompletionOutput, backend_name: str) -> str:
    """The first thing that is not as in plain decoding; "" where all is."""
    for place, (token, other) in enumerate(zip(ours.token_ids, plain.token_ids, strict=False), 1):
        if token != other:
            return f"token {place} is {token}, {other} in plain decoding"
    if len(ours.token_ids) != len(plain.token_ids):
        return f"{len(ours.token_ids)} tokens, {len(plain.token_ids)} in plain decoding"
    ends = (ours.text, ours.finish_reason, ours.stop_reason)
    if ends != (plain.text, plain.finish_reason, plain.stop_reason):
        return "the text ends in another way than in plain decoding"
    has_bits = backend_name != "reference"
    for place, (one, two) in enumerate(zip(ours.logprobs or [], plain.logprobs or [], strict=False), 1):
        is_same = one == two if has_bits else abs(one.logprob - two.logprob) <= REFERENCE_TOLERANCE
        if not is_same:
            return f"token {place} has {one}, {two} in plain decoding"
    return ""
