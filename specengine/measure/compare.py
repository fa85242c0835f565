"""The engine beside `transformers`, with and without drafts: `specengine bench compare`.

One prompt at a time, as assisted generation takes them; both sides get the same token ids, dtype and number of threads,
and take turns (`runs`). Where decoding is greedy every text is compared with the engine's plain one.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from specengine.call import Call
from specengine.engine import Engine, assembly
from specengine.errors import SpecEngineError
from specengine.measure import summary
from specengine.measure.latency import K, by_size, with_plain
from specengine.measure.records import Record
from specengine.measure.rival import NAME, RivalCase, explain_no_drafts, load_rival
from specengine.measure.runs import Case, EngineCase, Run, measure
from specengine.measure.statistics import ratio_interval
from specengine.measure.summary import Interval, numbers, plain_of, seconds_a_token
from specengine.prompt import Prompt

OURS = "specengine"


@dataclass(frozen=True, kw_only=True)
class Contestant(summary.Summary):
    """All measurements of one side with one k. speedup: against the engine's plain decoding.

    by:          "specengine" or "transformers"
    ours_faster: seconds a token of this one / of the engine's with the same k, by pairs; None for the engine itself
    """

    by: str
    k: K
    ours_faster: Interval | None

    def flat(self) -> dict[str, Any]:
        columns = super().flat()
        faster = columns.pop("ours_faster")
        ends = (None,) * 3 if faster is None else (faster.median, faster.low, faster.high)
        names = ("ours_faster", "ours_faster_low", "ours_faster_high")
        return {
            "by": columns.pop("by"),
            "num_speculative_tokens": columns.pop("k"),
            **columns,
            **dict(zip(names, ends, strict=True)),
        }


@dataclass(frozen=True)
class Difference:
    """Where a greedy text first differs from the engine's plain one.

    position:       of the first token that differs
    token, plain:   ids there; None where that text has ended
    """

    by: str
    k: K
    prompt_index: int
    position: int
    token: int | None
    plain: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    call: Call, ks: Sequence[K], *, repeats: int, warn: Callable[[str], object]
) -> Generator[Record, None, None]:
    """Yields a record for each generation, as it is made.

    warn: told where `transformers` cannot draft for this pair: then it decodes plainly only
    """
    draft_model = call.draft_model
    if reason := explain_no_drafts(draft_model):
        warn(reason)
        draft_model = None
    with (
        Engine(call.model, call.draft_model, config=call.config, progress=False) as engine,
        load_rival(engine, call.model, draft_model) as rival,
    ):
        prompts = [_encode(engine, prompt) for prompt in call.prompts]
        eos_token_ids = assembly.open_model(call.model, call.config).spec.eos_token_ids
        cases: list[Case] = []
        for k in with_plain(ks):
            params = replace(call.params, num_speculative_tokens=k)
            cases.append(EngineCase(engine, params, keeps_tokens=True))
            theirs = RivalCase(rival, engine, params, eos_token_ids)
            if k == 0 or (rival.drafts and _can_run(theirs, prompts[0], warn)):
                cases.append(theirs)
        yield from measure(Run.start("compare"), cases, prompts, repeats=repeats)


def count_measurements(call: Call, ks: Sequence[K], *, repeats: int) -> int:
    """Records that `compare` yields, if `transformers` can do all of it."""
    num_plain = 2
    num_drafting = (1 if explain_no_drafts(call.draft_model) else 2) * (len(with_plain(ks)) - 1)
    return (num_plain + num_drafting) * len(call.prompts) * repeats


def _encode(engine: Engine, prompt: Prompt) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    if engine.tokenizer is None:
        raise SpecEngineError(f"{engine.target_name} has no tokenizer: texts cannot be read")
    return engine.tokenizer.encode(prompt)


def _can_run(case: RivalCase, prompt: Prompt, warn: Callable[[str], object]) -> bool:
    try:
        case.warm_up([prompt])
    except SpecEngineError as error:
        warn(f"left out: {error}")
        return False
    return True


# What comes of it


def summarize(records: Sequence[Record]) -> list[Contestant]:
    """Of one run: the engine with every k, then `transformers`."""
    groups: defaultdict[tuple[str, K], list[Record]] = defaultdict(list)
    for record in records:
        groups[_side(record), record.settings["num_speculative_tokens"]].append(record)
    plain = plain_of(record for record in records if _side(record) == OURS)
    keys = sorted(groups, key=lambda key: (key[0] != OURS, by_size(key[1])))
    return [
        Contestant(
            by=by,
            k=k,
            ours_faster=None if by == OURS else _ratio(groups[by, k], groups[OURS, k]),
            **numbers(groups[by, k], plain),
        )
        for by, k in keys
    ]


def _side(record: Record) -> str:
    return NAME if record.pair["backend"] == NAME else OURS


def _ratio(theirs: Sequence[Record], ours: Sequence[Record]) -> Interval | None:
    """Their seconds a token over ours, by pairs of the same prompt and repeat."""
    own = {(record.prompt_index, record.repeat): seconds_a_token(record) for record in ours}
    pairs = [
        (seconds_a_token(record), own[record.prompt_index, record.repeat])
        for record in theirs
        if (record.prompt_index, record.repeat) in own
    ]
    return Interval(*ratio_interval(*zip(*pairs, strict=True))) if pairs else None


def differences(records: Sequence[Record]) -> list[Difference]:
    """Of the greedy ones of a run: the first token of each text that is not the engine's plain one, each once."""
    greedy = [record for record in records if record.settings["temperature"] == 0]
    plain = plain_of(record for record in greedy if _side(record) == OURS)
    texts = {index: record.measured["token_ids"][0] for (index, _), record in reversed(plain.items())}
    found: dict[Difference, None] = {}
    for record in greedy:
        expected, got = texts.get(record.prompt_index), record.measured["token_ids"][0]
        if expected is None or got == expected:
            continue
        pairs = itertools.zip_longest(got, expected)
        position, (token, own) = next((at, pair) for at, pair in enumerate(pairs) if pair[0] != pair[1])
        k = record.settings["num_speculative_tokens"]
        found[Difference(_side(record), k, record.prompt_index, position, token, own)] = None
    return list(found)
