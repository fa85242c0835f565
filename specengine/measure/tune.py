"""What to draft with, and how much of it: `specengine tune`.

1. A survey: every way to draft generates each prompt once with a few numbers of drafts, beside plain decoding. That
   gives what rounds take and how many drafts are accepted by position, and formulas (`predictions`, `theory`) the rest.
2. A duel: those that promise most, and plain decoding, take turns on all prompts, beginning with another one each time.
   After `FIRST_REPEATS` the best `NUM_BEST` go on. What is recommended rests on these measured pairs alone.

Nothing that changes what the target says is tried unless it is asked for: another dtype, weights of 8 or 4 bits, a
lossy mode.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from specengine import bundled
from specengine.call import Call
from specengine.config import EngineConfig, SamplingParams
from specengine.drafters.registry import lookups, names_a_drafter, without_model
from specengine.engine import Engine, assembly, profiled
from specengine.kinds import AUTO
from specengine.measure.predictions import Survey, merge_rounds, summarize_rounds, survey
from specengine.measure.records import Record
from specengine.measure.runs import Case, EngineCase, Run, Shares, generate, measure, num_batches
from specengine.measure.statistics import ratio_interval
from specengine.measure.summary import seconds_a_token
from specengine.models.checkpoints import open_checkpoint
from specengine.models.loader import has_native_bf16, linear_widths, main_dtype, ungrouped_width
from specengine.outputs import GenerationResult
from specengine.profiles import (
    BUNDLED,
    VERSION,
    Gain,
    Measured,
    Profile,
    Recommendation,
    Source,
    resolve_source,
)
from specengine.profiles import Round as KnownRound
from specengine.prompt import Prompt
from specengine.weight_formats import INT4

# Those that draft from the text alone.
LOOKUPS = tuple(lookups())
MODEL_DRAFTS = (1, 2, 4, 8)
LOOKUP_DRAFTS = (2, 4, 8, 16)
# Of the duel: candidates beside plain decoding, engines for them, repeats before all but the best end, and these.
NUM_FINALISTS = 8
NUM_SETUPS = 3
FIRST_REPEATS = 2
NUM_BEST = 3
# Below this much gain plain decoding is recommended, and where the interval reaches below _RISK; by _ENOUGH, too, a
# choice that depends on clocks must be better than one number of drafts, whose text is the same again.
_ENOUGH = 1.02
_RISK = 0.97
# Rounds of a kind that a profile must have seen. A draft model's first one computes the prompt, too.
_FEWEST = 4


@dataclass(frozen=True)
class Setup:
    """An engine: what drafts, and how weights are stored; as `Engine` takes it, but for "bundled"."""

    draft_model: str | tuple[str, ...] | None = None
    draft_weight_dtype: str = "auto"
    dtype: str = "auto"
    weight_dtype: str = "auto"

    @property
    def is_lookup(self) -> bool:
        return isinstance(self.draft_model, str) and self.draft_model.partition(":")[0] in LOOKUPS

    @property
    def source(self) -> Source:
        return list(self.draft_model) if isinstance(self.draft_model, tuple) else self.draft_model


@dataclass(frozen=True)
class Candidate:
    """A setup, and how requests are drafted for. is_changed: whether the target says something else than was asked"""

    setup: Setup
    num_speculative_tokens: int | str = 0
    acceptance: str = "auto"
    is_changed: bool = False

    def is_like(self, other: Candidate) -> bool:
        """Whether they differ in the number of drafts only."""
        return replace(self, num_speculative_tokens=other.num_speculative_tokens) == other

    @property
    def label(self) -> str:
        """For people."""
        k = self.num_speculative_tokens
        parts = ["plain"] if k == 0 else [_name(self.setup), AUTO if k == AUTO else f"k = {k}"]
        if k != 0 and self.acceptance != AUTO:
            parts.append(self.acceptance)
        return ", ".join([*parts, *([_target_of(self.setup)] if self.is_changed else [])])


def _name(setup: Setup) -> str:
    """Who drafts, for people."""
    sources = setup.draft_model if isinstance(setup.draft_model, tuple) else (setup.draft_model,)
    name = "+".join(_short(str(each)) for each in sources)
    return name if setup.draft_weight_dtype == AUTO else f"{name} ({setup.draft_weight_dtype})"


def _target_of(setup: Setup) -> str:
    return "target " + " ".join(each for each in (setup.dtype, setup.weight_dtype) if each != AUTO)


def _short(source: str) -> str:
    return "draft" if source == BUNDLED else source if names_a_drafter(source) else Path(source).name


class Stand(Protocol):
    """A setup that is loaded."""

    def case(self, candidate: Candidate, *, is_watched: bool) -> Case:
        """What generates. is_watched: its measured rows have "rounds", as `summarize_rounds` makes them"""
        ...

    def describe(self) -> tuple[str | None, str | None]:
        """What the engine calls its drafter, and its checkpoint's identity."""
        ...

    def origin(self) -> dict[str, Any]:
        """Of a `Profile`: identity, machine and precision."""
        ...


Open = Callable[[Setup], AbstractContextManager[Stand]]


@dataclass(frozen=True, eq=False)
class _Noted:
    """A case that says whose it is before it measures."""

    case: Case
    candidate: Candidate
    note: Callable[[Candidate], object]

    @property
    def name(self) -> str:
        return self.candidate.label

    @property
    def pair(self) -> dict[str, Any]:
        return self.case.pair

    @property
    def settings(self) -> dict[str, Any]:
        return self.case.settings

    @property
    def batch_size(self) -> int:
        return self.case.batch_size

    def warm_up(self, prompts: Sequence[Prompt]) -> Shares | None:
        return self.case.warm_up(prompts)

    def measure(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        self.note(self.candidate)
        return self.case.measure(prompts)


@dataclass(frozen=True)
class Score:
    """What the duel says of a candidate: plain seconds a token / its own, by pairs of the same prompt and repeat."""

    candidate: Candidate
    speedup: Gain
    num_pairs: int
    tokens_per_second: float


@dataclass
class Tuner:
    """One search. `run` measures; then `profile` is what comes of it.

    model:      the target, for the profile
    setups:     ways to draft, all with the same target
    precisions: (dtype, weight_dtype) of the target that may be tried besides, with the best of these
    modes:      ways to judge that may be tried besides
    repeats:    of the duel
    """

    model: str
    setups: list[Setup]
    open: Open
    prompts: Sequence[Prompt]
    acceptance: str = "auto"
    modes: Sequence[str] = ()
    precisions: Sequence[tuple[str, str]] = ()
    repeats: int = 6
    batch_size: int = 1
    run_of: Run = field(default_factory=lambda: Run.start("tune"))
    surveys: dict[Setup, Survey] = field(default_factory=dict)
    surveyed: dict[Setup, list[Record]] = field(default_factory=dict)
    duels: list[tuple[Candidate, Record]] = field(default_factory=list)
    finalists: list[Candidate] = field(default_factory=list)
    _names: dict[Setup, tuple[str | None, str | None]] = field(default_factory=dict)
    _origins: dict[Setup, dict[str, Any]] = field(default_factory=dict)

    @property
    def num_records(self) -> int:
        """That `run` yields, at most."""
        surveys = sum(1 + len(_drafts_of(setup)) for setup in self.setups)
        surveys += len(self.precisions) * (1 + len(MODEL_DRAFTS))
        rotations = (1 + self._num_finalists) * FIRST_REPEATS + (1 + NUM_BEST) * max(
            0, self.repeats - FIRST_REPEATS
        )
        return (surveys + rotations) * num_batches(len(self.prompts), self.batch_size)

    @property
    def _num_finalists(self) -> int:
        return NUM_FINALISTS + len(self.modes) + 2 * len(self.precisions)

    def run(self) -> Generator[Record, None, None]:
        """Yields every measurement."""
        for setup in self.setups:
            yield from self._survey(setup)
        best = max(self.setups, key=lambda setup: self._best(setup)[0])
        for dtype, weight_dtype in self.precisions:
            yield from self._survey(replace(best, dtype=dtype, weight_dtype=weight_dtype))
        self.finalists = self._choose_finalists()
        with ExitStack() as opened:
            stands = {
                setup: opened.enter_context(self.open(setup))
                for setup in dict.fromkeys(each.setup for each in self.finalists)
            }
            first = min(FIRST_REPEATS, self.repeats)
            yield from self._duel(stands, self.finalists, repeats=first, before=0)
            if self.repeats > first:
                plain = self.finalists[0]
                best_ones = [score.candidate for score in self.scores() if score.candidate != plain]
                yield from self._duel(
                    stands, [plain, *best_ones[:NUM_BEST]], repeats=self.repeats - first, before=first
                )

    def _survey(self, setup: Setup) -> Iterator[Record]:
        candidates = [Candidate(setup, k, self.acceptance) for k in (0, *_drafts_of(setup))]
        records: list[Record] = []
        with self.open(setup) as stand:
            self._names[setup] = stand.describe()
            self._origins[setup] = stand.origin()
            cases = [stand.case(each, is_watched=True) for each in candidates]
            for record in measure(self.run_of, cases, self.prompts, repeats=1):
                records.append(record)
                yield record
        plain = [each for each in records if each.settings["num_speculative_tokens"] == 0]
        drafted = [each for each in records if each.settings["num_speculative_tokens"] != 0]
        self.surveyed[setup] = records
        self.surveys[setup] = survey(plain, drafted, is_lookup=setup.is_lookup)

    def _duel(
        self, stands: dict[Setup, Stand], candidates: Sequence[Candidate], *, repeats: int, before: int
    ) -> Iterator[Record]:
        last: list[Candidate] = []
        cases = [
            _Noted(stands[each.setup].case(each, is_watched=False), each, last.append) for each in candidates
        ]
        for record in measure(self.run_of, cases, self.prompts, repeats=repeats):
            record = replace(record, repeat=record.repeat + before)
            self.duels.append((last[-1], record))
            yield record

    # -- what is chosen ---------------------------------------------------------------------------------------

    def _best(self, setup: Setup) -> tuple[float, int]:
        """The best predicted speed, and the number of drafts for it."""
        found = self.surveys[setup]
        return max((found.predict(k), k) for k in found.num_drafts)

    def _choose_finalists(self) -> list[Candidate]:
        """Plain decoding, then those that promise most: several numbers of drafts of the best setup, fewer of others,
        "auto", and, where both a model and a lookup drafted, both."""
        # Of one draft model in several dtypes the best.
        drafters = {setup.draft_model: setup for setup in reversed(self._by_speed())}
        ranked = sorted(drafters.values(), key=lambda setup: -self._best(setup)[0])[:NUM_SETUPS]
        chosen: list[Candidate] = []
        for place, setup in enumerate(ranked):
            found = self.surveys[setup]
            ks = sorted(found.num_drafts, key=found.predict, reverse=True)
            chosen += [Candidate(setup, k, self.acceptance) for k in ks[: NUM_SETUPS - place]]
        model = next((each for each in self._by_speed() if not each.is_lookup), None)
        lookup = next((each for each in self._by_speed() if each.is_lookup), None)
        alone = Candidate(ranked[0], "auto", self.acceptance)
        both = alone
        if model is not None and lookup is not None:
            names = (str(model.draft_model), str(lookup.draft_model))
            both = Candidate(replace(model, draft_model=names), "auto", self.acceptance)
        chosen += dict.fromkeys([alone, both])
        best_k = self._best(ranked[0])[1]
        chosen += [Candidate(ranked[0], best_k, mode) for mode in self.modes]
        for setup in self.surveys:
            if setup not in self.setups:
                k = self._best(setup)[1]
                chosen += [Candidate(setup, each, self.acceptance, is_changed=True) for each in (0, k)]
        return [Candidate(ranked[0], 0, self.acceptance), *chosen]

    def _by_speed(self) -> list[Setup]:
        return sorted(self.setups, key=lambda setup: -self._best(setup)[0])

    def name_of(self, setup: Setup) -> str:
        """Of one that was surveyed, for people."""
        return _name(setup) if setup in self.setups else f"{_name(setup)}, {_target_of(setup)}"

    def scores(self) -> list[Score]:
        """Of the duel so far, the fastest first."""
        if not self.finalists:
            return []
        plain = {
            (record.prompt_index, record.repeat): record
            for each, record in self.duels
            if each == self.finalists[0]
        }
        result = []
        for candidate in self.finalists:
            pairs = [
                (plain[place], record)
                for each, record in self.duels
                if each == candidate and (place := (record.prompt_index, record.repeat)) in plain
            ]
            if pairs:
                ratio = ratio_interval(*zip(*[map(seconds_a_token, pair) for pair in pairs], strict=True))
                gain = Gain(**dict(zip(("median", "low", "high"), ratio, strict=True)))
                speeds = [record.measured["tokens_per_second"] for _, record in pairs]
                result.append(Score(candidate, gain, len(pairs), sum(speeds) / len(speeds)))
        return sorted(result, key=lambda score: -score.speedup.median)

    def best(self) -> Score:
        """Of those that went on to the end the fastest; plain decoding where none gains.

        Where several numbers of drafts are about as fast, the smallest: it wastes least on a text that is less
        predictable than these.
        """
        scores = self.scores()
        plain = next(score for score in scores if score.candidate == self.finalists[0])
        last = [score for score in scores if score.num_pairs == plain.num_pairs]
        best = last[0]
        equal = [score for score in last if score.speedup.median * _ENOUGH > best.speedup.median]
        fixed = [score for score in equal if score.candidate.num_speculative_tokens != "auto"]
        if fixed:
            alike = [score for score in fixed if score.candidate.is_like(fixed[0].candidate)]
            best = min(alike, key=lambda score: int(score.candidate.num_speculative_tokens))
        if best.speedup.median < _ENOUGH or best.speedup.low < _RISK:
            return plain
        return best

    def reasons(self, best: Score) -> list[str]:
        """Why, in sentences: of what is recommended, or of every way to draft where none is."""
        candidate = best.candidate
        if candidate == self.finalists[0]:
            return [self._reason(setup, self._best(setup)[1], pays=False) for setup in self._by_speed()]
        setup, k = candidate.setup, candidate.num_speculative_tokens
        if k == 0:
            return ["drafting gains less than that"]
        sources = setup.draft_model if isinstance(setup.draft_model, tuple) else (setup.draft_model,)
        parts = [
            next(
                each
                for each in (setup, *self._by_speed())
                if each in self.surveys and each.draft_model == source
            )
            for source in sources
        ]
        numbers = [k if isinstance(k, int) else self._best(part)[1] for part in parts]
        return [self._reason(part, number, pays=True) for part, number in zip(parts, numbers, strict=True)]

    def _reason(self, setup: Setup, k: int, *, pays: bool) -> str:
        return f"{Candidate(setup, k).label}: {self.surveys[setup].explain(k, pays=pays)}"

    def profile(self) -> Profile:
        """What was found, for a file."""
        best = self.best()
        candidate = best.candidate
        is_plain = candidate.num_speculative_tokens == 0
        chosen = candidate.setup
        stored = (chosen.dtype, chosen.weight_dtype)
        # Times hold for the precision that is recommended, acceptance much the same for all.
        like_it = [each for each in self.surveys if (each.dtype, each.weight_dtype) == stored]
        plain_rounds = [
            record
            for setup in like_it
            for record in self.surveyed[setup]
            if record.settings["num_speculative_tokens"] == 0
        ]
        drafters = [_describe(Setup(), (None, None), None, plain_rounds)]
        for setup in [*like_it, *(each for each in self.surveys if each not in like_it)]:
            drafted = [
                record
                for record in self.surveyed[setup]
                if record.settings["num_speculative_tokens"] != 0 and setup in like_it
            ]
            drafters.append(_describe(setup, self._names[setup], self.surveys[setup], drafted))
        return Profile(
            version=VERSION,
            run=self.run_of.name,
            model=self.model,
            drafters=drafters,
            recommendation=Recommendation(
                draft_model=None if is_plain else candidate.setup.source,
                num_speculative_tokens=candidate.num_speculative_tokens,  # type: ignore[arg-type]
                dtype=chosen.dtype,
                weight_dtype=chosen.weight_dtype,
                draft_weight_dtype=self.setups[0].draft_weight_dtype
                if is_plain
                else chosen.draft_weight_dtype,
                acceptance=candidate.acceptance,
                speedup=None if candidate == self.finalists[0] else best.speedup,
                reason="; ".join(self.reasons(best)),
            ),
            **self._origins[like_it[0]],
        )


def _describe(
    setup: Setup, names: tuple[str | None, str | None], found: Survey | None, records: Sequence[Record]
) -> Measured:
    return Measured(
        draft_model=setup.source,
        name=names[0],
        identity=names[1],
        draft_weight_dtype=setup.draft_weight_dtype,
        acceptance=[] if found is None else found.acceptance,
        num_judged=0 if found is None else found.num_judged,
        rounds=[
            KnownRound(**{name: value for name, value in each.items() if name != "count"})
            for each in merge_rounds(records)
            if each["count"] >= _FEWEST
        ],
    )


def _drafts_of(setup: Setup) -> tuple[int, ...]:
    return LOOKUP_DRAFTS if setup.is_lookup else MODEL_DRAFTS


# With engines


def build_tuner(
    call: Call,
    *,
    precisions: Sequence[tuple[str, str]] = (),
    drafters: Sequence[str] = (),
    repeats: int = 6,
    batch_size: int = 1,
) -> Tuner:
    """A search for a call's pair, prompts and parameters.

    precisions: (dtype, weight_dtype) of the target that may be tried besides: they change what it says slightly
    drafters:   further ways to draft, such as "self:6"

    Raises `ValueError` for what a profile cannot name: a model or drafter in memory.
    """
    drafts = call.draft_model if isinstance(call.draft_model, tuple) else (call.draft_model,)
    sources = [name_source(each) for each in (*drafts, *drafters) if each is not None]
    config = call.config
    if not any(source.partition(":")[0] not in LOOKUPS for source in sources):
        target = open_checkpoint(call.model, revision=config.revision, allow_pickle=config.allow_pickle).spec
        sources += [name for name in without_model(target) if name not in LOOKUPS]
    base = {"dtype": config.dtype, "weight_dtype": config.weight_dtype}
    setups = [
        Setup(source, dtype, **base)
        for source in dict.fromkeys([*sources, *LOOKUPS])
        for dtype in draft_dtypes(source, config)
    ]
    modes = ["block"] if call.params.rule == "rejection" and call.params.acceptance == "auto" else []
    return Tuner(
        model=name_source(call.model),
        setups=setups,
        open=lambda setup: open_engine(call, setup, batch_size),
        prompts=call.prompts,
        acceptance=call.params.acceptance,
        modes=modes,
        precisions=[each for each in precisions if each != (config.dtype, config.weight_dtype)],
        repeats=repeats,
        batch_size=batch_size,
    )


def draft_dtypes(source: str, config: EngineConfig) -> list[str]:
    """How a draft's weights may be stored: as asked for; where nothing was, also in what reads fewer bytes."""
    asked = config.draft_weight_dtype
    is_native = config.device in (AUTO, "cpu") and config.backend in (AUTO, "native")
    if names_a_drafter(source) or asked != AUTO or not is_native:
        return [asked]
    path = resolve_source(source, is_draft=True)
    checkpoint = open_checkpoint(path, revision=config.revision, allow_pickle=config.allow_pickle)
    is_fp32 = config.dtype == "float32" or (
        config.dtype == AUTO and main_dtype(checkpoint.tensors).itemsize > 2
    )
    return [
        AUTO,
        "int8",
        *([INT4.name] if ungrouped_width(linear_widths(checkpoint.spec), INT4) is None else []),
        *(["bfloat16"] if is_fp32 and has_native_bf16() else []),
    ]


def name_source(source: Any) -> str:
    """A model's name in a profile: "bundled", an absolute directory or file, or as it was given."""
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"tune writes down what it recommends, and {type(source).__name__} has no name: give a directory, a .gguf "
            "file, a Hub name or a drafter's name"
        )
    path = Path(source).expanduser()
    if names_a_drafter(source) or not path.exists():
        return os.fspath(source)
    bundled_ones = {bundled.target_path().resolve(), bundled.draft_path().resolve()}
    return BUNDLED if path.resolve() in bundled_ones else str(path.resolve())


@dataclass(frozen=True, eq=False)
class EngineStand:
    """A setup in an engine."""

    engine: Engine
    params: SamplingParams
    batch_size: int
    is_lookup: bool
    target_identity: str
    identities: tuple[str, ...]

    def case(self, candidate: Candidate, *, is_watched: bool) -> Case:
        changes: dict[str, Any] = {"num_speculative_tokens": candidate.num_speculative_tokens}
        params = replace(
            self.params,
            **changes,
            acceptance=candidate.acceptance,
            return_rounds=is_watched and self.is_lookup,
        )
        return _TunedCase(
            self.engine,
            params,
            self.batch_size,
            candidate.label,
            is_watched=is_watched,
            is_lookup=self.is_lookup,
        )

    def describe(self) -> tuple[str | None, str | None]:
        return self.engine.draft_name, "+".join(self.identities) or None

    def origin(self) -> dict[str, Any]:
        engine = self.engine
        return {
            "identity": self.target_identity,
            "machine": profiled.describe_machine(engine.device, engine.config.num_threads),
            "precision": profiled.describe_precision(
                engine.config, engine.weight_dtype, engine.device, engine.backend_name
            ),
        }


@dataclass(frozen=True, eq=False)
class _TunedCase(EngineCase):
    """Is warmed up once; parts of rounds are those that the engine measures anyway."""

    is_watched: bool = False
    is_lookup: bool = False
    warmed: list[bool] = field(default_factory=list)

    def warm_up(self, prompts: Sequence[Prompt]) -> Shares | None:
        if not self.warmed:
            generate(self.engine, prompts, self.params)
            self.warmed.append(True)
        return None

    def measure(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        if not self.is_watched:
            return super().measure(prompts)
        kept: list[GenerationResult] = []
        row = replace(self, on_results=kept.extend, is_watched=False).measure(prompts)
        return {**row, "rounds": summarize_rounds(self._rounds(kept))}

    def _rounds(
        self, results: Sequence[GenerationResult]
    ) -> Iterator[tuple[int, int, int, float, float | None, float | None]]:
        """What the rounds of these took. Of a batch those in which all took part; of lookups in a batch none: how many
        drafts each row had is not known."""
        num_rounds = max(result.metrics.speculative_decoding.num_rounds for result in results)
        times = self.engine.round_times[-num_rounds:] if num_rounds else []
        drafted: list[int] = [each.k for each in times]
        if self.is_lookup and self.params.num_speculative_tokens:
            if self.batch_size > 1:
                return
            rounds = results[0].outputs[0].rounds
            assert rounds is not None, "they were asked for"
            drafted = [each.num_draft_tokens for each in rounds][-len(times) :]
        hides_host = self.engine.device.type == "cuda"
        for each, k in zip(times, drafted, strict=True):
            if each.batch_size == self.batch_size:
                k = max(0, k)
                seconds = max(each.device, each.host) if hides_host else each.device + each.host
                yield each.batch_size, k, each.batch_size * (k + 1), seconds, each.draft, each.verify


@contextmanager
def open_engine(call: Call, setup: Setup, batch_size: int) -> Iterator[EngineStand]:
    """The engine of a setup."""
    config = replace(
        call.config,
        dtype=setup.dtype,
        weight_dtype=setup.weight_dtype,
        draft_weight_dtype=setup.draft_weight_dtype,
        max_batch_size=batch_size,
    )
    drafts = resolve_source(setup.source, is_draft=True)
    sources = drafts if isinstance(drafts, list) else [drafts]
    target, *identities = [
        profiled.identify(open_checkpoint(each, revision=config.revision, allow_pickle=config.allow_pickle))
        for each in [call.model, *sources]
        if each is not None and not names_a_drafter(each)
    ]
    config = assembly.config_for(config, drafts)
    with Engine(call.model, drafts, config=config, progress=False) as engine:
        yield EngineStand(engine, call.params, batch_size, setup.is_lookup, target, tuple(identities))
