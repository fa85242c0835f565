"""Samples against the target's own law.

What the target says of every token of every sample, after the tokens before it, is known (`target_law`), and so is
where this one lies in a row of all tokens. If sampling is right these places are uniform from 0 to 1, and independent
of each other, whatever prompt, text and model: `NUM_CELLS` equal cells hold equal counts, which a chi-square test
judges.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from specengine.call import Call
from specengine.config import SamplingParams
from specengine.engine import Engine
from specengine.measure.checks import (
    LOSSLESS,
    NO_POWER,
    NOT_LOSSLESS,
    Check,
    DraftCounts,
    PlaceTest,
    Plan,
)
from specengine.measure.runs import generate
from specengine.measure.statistics import chi_square, total_variation, total_variation_by_chance
from specengine.measure.target_law import Beginning, lead_along, next_law, to_length
from specengine.outputs import CompletionOutput, GenerationResult

NUM_CELLS = 10
# The control: samples are none of the law at so many times their temperature.
CONTROL_TEMPERATURE = 1.5
SAMPLES_A_REQUEST = 8
NUM_TURNS = 8
# Tokens behind a prompt among which the place for samples is looked for.
NUM_PLACES = 24

# The cells' law; a last one is for tokens that cannot be.
_UNIFORM = [1 / NUM_CELLS] * NUM_CELLS + [0.0]


def choose_places(call: Call, plan: Plan, engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Each prompt, with as much of its greedy text behind it as leads to where most can be seen.

    What speculation does shows first in token 2. Where token 1 is nearly certain and something is drafted after it,
    most samples stand at one place, and much is known of what is drafted there; where token 2 is uncertain, drafts are
    rejected.
    """
    return [_choose_place(call, plan, engine, prompt) for prompt in prompts]


def _choose_place(call: Call, plan: Plan, engine: Engine, prompt: list[int]) -> list[int]:
    params = to_length(call.params, plan.num_positions)
    room = engine.max_seq_len - len(prompt) - plan.num_positions
    greedy = replace(params, temperature=0.0, acceptance="auto", num_speculative_tokens=0)
    text = generate(engine, [prompt], replace(greedy, max_new_tokens=min(room, NUM_PLACES) + 1))[0].token_ids
    certain: list[float] = []
    uncertain: list[float] = []

    def note(_: Beginning, logits: Tensor) -> None:
        probs = next_law(logits, params).probs
        certain.append(float(probs.max()))
        uncertain.append(1.0 - float((probs**2).sum()))

    lead_along(engine, prompt, params, [tuple(text)], note)
    places = [prompt + text[:at] for at in range(len(text))]
    drafting = replace(
        greedy, max_new_tokens=3, min_new_tokens=0, num_speculative_tokens=1, return_rounds=True
    )
    rounds = [result.outputs[0].rounds or [] for result in generate(engine, places, drafting)]
    values = [
        (bool(each and each[0].num_draft_tokens), certain[at] * uncertain[at + 1])
        for at, each in enumerate(rounds)
    ]
    return places[values.index(max(values))]


def check_law(call: Call, plan: Plan, engine: Engine, prompts: list[list[int]], mode: str) -> Check:
    """Draws samples by the call's parameters and tests them."""
    samples, results = _draw(call, plan, engine, prompts, mode)
    params = to_length(call.params, plan.num_positions)
    other = replace(params, temperature=params.temperature * CONTROL_TEMPERATURE)
    shape = (plan.num_positions, NUM_CELLS + 1)
    cells, control = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    chance = np.random.default_rng(call.params.seed or 0)
    for index, prompt in enumerate(prompts):
        following = _following([sample for sample in samples if sample.prompt_index == index])

        def note(before: Beginning, logits: Tensor, following: _Following = following) -> None:
            for law, counts in ((next_law(logits, params), cells), (next_law(logits, other), control)):
                for token, drafted in following[before]:
                    place = law.place(token, chance.random(), drafted)
                    cell = NUM_CELLS if place is None else min(int(place * NUM_CELLS), NUM_CELLS - 1)
                    counts[len(before), cell] += 1

        lead_along(engine, prompt, params, _longest(following), note)
    return _judge(plan, engine, mode, results, cells, _smallest_p(_test(control)))


# Samples


@dataclass(frozen=True)
class _Sample:
    """A text of a prompt.

    is_drafted: drafts were judged in its first round, which decides from token 2 on
    drafts:     what was drafted, and after which beginning
    turn:       in which it was drawn
    """

    prompt_index: int
    tokens: Beginning
    is_drafted: bool
    drafts: list[tuple[Beginning, int]]
    turn: int


def _draw(
    call: Call, plan: Plan, engine: Engine, prompts: list[list[int]], mode: str
) -> tuple[list[_Sample], list[GenerationResult]]:
    """In turns: what is drafted in one depends on no sample of a later one, whatever a drafter remembers. Every request
    has a seed of its own, and several samples; the settings of k take turns too."""
    params = replace(
        to_length(call.params, plan.num_positions), acceptance=mode, n=SAMPLES_A_REQUEST, return_rounds=True
    )
    num_requests = -(-plan.num_samples // SAMPLES_A_REQUEST)
    samples: list[_Sample] = []
    results: list[GenerationResult] = []
    for turn in range(NUM_TURNS):
        numbers = range(turn * num_requests // NUM_TURNS, (turn + 1) * num_requests // NUM_TURNS)
        asked = [_request(call, plan, params, number, len(prompts)) for number in numbers]
        indices = [number % len(prompts) for number in numbers]
        found = _generate_each(engine, [prompts[index] for index in indices], asked)
        samples += [
            _sample(index, output, turn)
            for index, result in zip(indices, found, strict=True)
            for output in result.outputs
        ]
        results += found
    return samples, results


def _request(call: Call, plan: Plan, params: SamplingParams, number: int, num_prompts: int) -> SamplingParams:
    k = plan.ks[number // num_prompts % len(plan.ks)]
    return replace(params, seed=((call.params.seed or 0) + number) % 2**64, num_speculative_tokens=k)


def _generate_each(
    engine: Engine, prompts: list[list[int]], asked: list[SamplingParams]
) -> list[GenerationResult]:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="acceptance="
        )  # that a mode is lossy is what the check says
        return generate(engine, prompts, asked)


def _sample(prompt_index: int, output: CompletionOutput, turn: int) -> _Sample:
    tokens, rounds = tuple(output.token_ids), output.rounds or []
    drafts: list[tuple[Beginning, int]] = []
    start = 1
    for each in rounds:
        for place, draft in enumerate(each.draft_token_ids):
            drafts.append(((*tokens[:start], *each.draft_token_ids[:place]), draft))
        start += each.num_tokens
    return _Sample(prompt_index, tokens, bool(rounds and rounds[0].num_draft_tokens), drafts, turn)


# After each beginning: the tokens that samples went on with, each with what had been drafted there in earlier turns.
_Following = dict[Beginning, list[tuple[int, dict[int, int]]]]


def _following(samples: list[_Sample]) -> _Following:
    """Of the samples of one prompt. Whether a sample is drafted for depends on its first token only: so all first
    tokens count, and the others of those that are. In the others, which decode plainly, nothing could be seen."""
    following: _Following = defaultdict(list)
    drafted: defaultdict[Beginning, Counter[int]] = defaultdict(Counter)
    for turn in range(NUM_TURNS):
        drawn = [sample for sample in samples if sample.turn == turn]
        for sample in drawn:
            for at in range(len(sample.tokens) if sample.is_drafted else 1):
                before = sample.tokens[:at]
                following[before].append((sample.tokens[at], dict(drafted.get(before, {}))))
        for sample in drawn:
            for before, draft in sample.drafts:
                drafted[before][draft] += 1
    return following


def _longest(following: _Following) -> list[Beginning]:
    """The beginnings that no other goes on with."""
    inner = {text[:-1] for text in following if text}
    return sorted(text for text in following if text not in inner)


# Tests


def _test(cells: np.ndarray) -> list[PlaceTest]:
    """Each position, and all but the first together."""
    named = [(f"token {at}", row) for at, row in enumerate(cells, 1)]
    named.append((f"tokens 2 to {len(cells)}", cells[1:].sum(axis=0)))
    return [
        PlaceTest(name, int(row.sum()), *chi_square(row.tolist(), _UNIFORM))
        for name, row in named
        if row.any()
    ]


def _smallest_p(tests: list[PlaceTest]) -> float:
    return min((test.p_value for test in tests), default=1.0)


def _judge(
    plan: Plan,
    engine: Engine,
    mode: str,
    results: list[GenerationResult],
    cells: np.ndarray,
    control_p: float,
) -> Check:
    tests, drafts, after_first = _test(cells), DraftCounts.of(results), cells[1:].sum(axis=0)
    worst = min(tests, key=lambda test: test.p_value)
    num_placed = int(after_first.sum())
    reason = weakness = ""
    if worst.p_value < plan.significance:
        reason = f"{worst.name}: chi-square {worst.statistic:.1f}, {worst.degrees} degrees of freedom"
    elif not all(result.lossless for result in results):
        reason = "a lossy mode: likely tokens come as often as they are drafted"
    if drafts.weakness or not num_placed:
        weakness = drafts.weakness or "nothing was drafted"
    elif control_p >= plan.significance:
        weakness = f"too few samples: those of {CONTROL_TEMPERATURE:g} times the temperature would pass too"
    return Check(
        drafter=engine.draft_name or "",
        mode=mode,
        outcome=NOT_LOSSLESS if reason else NO_POWER if weakness else LOSSLESS,
        reason=reason or weakness,
        num_texts=sum(len(result.outputs) for result in results),
        drafts=drafts,
        control=f"p = {control_p:.1g}",
        tests=tests,
        distance=total_variation(after_first.tolist(), _UNIFORM) if num_placed else None,
        distance_by_chance=total_variation_by_chance(_UNIFORM, num_placed) if num_placed else None,
    )
