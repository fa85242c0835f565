"""Law O: an interruption at any line of a step changes nothing for anybody: whoever steps on gets every request as it
would have been, its statistics included."""

from __future__ import annotations

import importlib
import inspect
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import tiny_models
from law_helpers import (
    LISTS_OF_DRAFTERS,
    NAMED_DRAFTERS,
    CheckpointFactory,
    EngineFactory,
    Tally,
    assert_idle,
    assert_same,
    drafters_of,
)

from specengine import translation
from specengine.config import SamplingParams
from specengine.drafters import host, registry, retokenized, several
from specengine.engine import Engine, record
from specengine.engine.stepper import Stepper
from specengine.outputs import GenerationResult, StreamEvent
from specengine.runtime.sequence import Sequence

HOLDS_FOR_REPLAYED_ROUNDS = True
COMMON = {"ignore_eos": True, "num_speculative_tokens": 3}
REQUESTS = [
    ("def f(x):", SamplingParams(max_new_tokens=9, logprobs=2, prompt_logprobs=1, **COMMON)),
    (
        "the same beginning, and then",
        SamplingParams(max_new_tokens=7, n=2, temperature=0.9, seed=4, return_rounds=True, **COMMON),
    ),
    ("é" * 5, SamplingParams(max_new_tokens=8, temperature=1.2, seed=3, acceptance="rejection", **COMMON)),
    ("the same beginning, too", SamplingParams(max_new_tokens=24, stop=["qq", "!?"], **COMMON)),
    ("abc", SamplingParams(max_new_tokens=0, prompt_logprobs=0, ignore_eos=True)),
]
Line = tuple[str, int, int]  # file, line, and the how many-th time that it runs


class Told:
    """What the caller of `step` has been told of each request, by the order of the requests."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.texts: dict[tuple[int, int], str] = {}
        self.results: dict[int, GenerationResult] = {}

    def take(self, events: list[StreamEvent]) -> None:
        for event in events:
            at = (self.ids.index(event.index), event.output_index)
            self.tokens[at] = self.tokens.get(at, []) + event.token_ids
            self.texts[at] = self.texts.get(at, "") + event.text_delta
            if event.result is not None:
                assert at[0] not in self.results, "a request ended twice"
                self.results[at[0]] = event.result


def run(engine: Engine, on_line: Callable[[str, int], None] | None = None) -> Told:
    """Every request at once, stepped to the end, whatever interrupts a step. Nothing is found in the prefix cache but
    what the run itself has put there. on_line: is told of every line of the package that a step runs"""
    engine._kv_cache.manager.reset_prefix_cache()
    told = Told([engine.add_request(prompt, params) for prompt, params in REQUESTS])
    for _ in range(1000):
        try:
            with traced(on_line) if on_line else nullcontext():
                events = engine.step()
            told.take(events)
        except KeyboardInterrupt:
            continue
        if not engine.has_work:
            return told
    raise AssertionError("the engine never comes to an end")


def statistics(result: GenerationResult) -> list[Any]:
    """All but the times, and the forwards that an interruption made needed again. What a later sample finds computed
    depends on how far the first has come by then."""
    metrics = result.metrics
    cached = metrics.num_cached_tokens if len(result.outputs) == 1 else None
    counts = (cached, metrics.num_preemptions, metrics.speculative_decoding)
    return [counts, *(output.token_source for output in result.outputs)]


def assert_told_the_same(told: Told, expected: Told) -> None:
    assert told.results.keys() == expected.results.keys(), "a request has no end"
    for index, truth in expected.results.items():
        assert_same(told.results[index], truth)
        assert statistics(told.results[index]) == statistics(truth)
    assert told.tokens == expected.tokens
    assert told.texts == expected.texts


@contextmanager
def traced(on_line: Callable[[str, int], None]) -> Iterator[None]:
    """Calls `on_line` at every line of the package that runs."""

    def inside(frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            on_line(frame.f_code.co_filename, frame.f_lineno)
        return inside

    def outside(frame: FrameType, event: str, arg: object) -> Any:
        return inside if "/specengine/" in frame.f_code.co_filename else None

    sys.settrace(outside)
    try:
        yield
    finally:
        sys.settrace(None)


def lines_of_a_run(engine: Engine) -> Counter[tuple[str, int]]:
    """How often each line runs."""
    counts: Counter[tuple[str, int]] = Counter()
    run(engine, lambda name, line: counts.update([(name, line)]))
    return counts


def check_interrupted_at(engine: Engine, lines: Iterable[Line]) -> None:
    num_free = engine.num_free_blocks
    expected = run(engine)
    for name, line, turn in lines:
        left = turn

        def strike(at: str, number: int, name: str = name, line: int = line) -> None:
            nonlocal left
            if (at, number) == (name, line):
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt(f"planted at {name}:{line}")

        try:
            assert_told_the_same(run(engine, strike), expected)
            assert_idle(engine, num_free)
        except Exception as error:
            raise AssertionError(f"interrupted at {name}:{line}, the {turn}. time: {error}") from error


def some_turns(counts: Counter[tuple[str, int]], seed: int) -> list[Line]:
    """Each line, at its first time and at a random one, shuffled."""
    chance = random.Random(seed)
    lines = [(*at, turn) for at, num in sorted(counts.items()) for turn in {1, chance.randint(1, num)}]
    chance.shuffle(lines)
    return lines


@pytest.fixture
def engine(checkpoint: CheckpointFactory, build_engine: EngineFactory) -> Engine:
    """With a draft model; prompts come in chunks."""
    models = [checkpoint("gpt2", seed=9, with_tokenizer=True, noise=noise) for noise in (0.0, 0.3)]
    return build_engine(models[0], models[1], prefill_chunk_size=7)


def test_an_interruption_at_sampled_lines_of_a_step_changes_nothing(engine: Engine, tally: Tally) -> None:
    lines = some_turns(lines_of_a_run(engine), seed=1)
    check_interrupted_at(engine, lines[:: len(lines) // 50])
    tally.check()


def check_interrupted_in(engine: Engine, module: str) -> None:
    """At lines of the drafter's own, and at those that ask it."""
    files = {inspect.getsourcefile(importlib.import_module(module)), host.__file__}
    lines = [line for line in some_turns(lines_of_a_run(engine), seed=4) if line[0] in files]
    check_interrupted_at(engine, lines[:16])


@pytest.mark.parametrize("name", [*NAMED_DRAFTERS, LISTS_OF_DRAFTERS[-1]])
def test_an_interruption_at_sampled_lines_of_a_named_drafter_changes_nothing(
    name: str, checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    """Of a list, at the lines that ask them all."""
    like: dict[str, Any] = {"seed": 9, "with_tokenizer": True}
    engine = build_engine(checkpoint(**like), drafters_of(name, checkpoint, **like), prefill_chunk_size=7)
    is_named = name in NAMED_DRAFTERS
    check_interrupted_in(engine, registry.DRAFTERS[registry.split(name)[0]] if is_named else several.__name__)
    tally.check(rejected=False)


@pytest.fixture
def retokenizing(
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Engine:
    """With a draft that reads text."""
    monkeypatch.setattr(translation, "MIN_SHARED", 2.0)
    noisy = tiny_models.perturbed(tiny_models.build_model(vocab_size=320, seed=9), noise=0.3)
    draft, tokenizer = tiny_models.renumbered(noisy, tiny_models.build_tokenizer(320))
    models = (
        checkpoint("gpt2", seed=9, with_tokenizer=True),
        tiny_models.save_checkpoint(tmp_path, draft, tokenizer=tokenizer),
    )
    return build_engine(*models, prefill_chunk_size=7)


def test_an_interruption_at_sampled_lines_of_a_draft_that_reads_text_changes_nothing(
    retokenizing: Engine, tally: Tally
) -> None:
    check_interrupted_in(retokenizing, retokenized.__name__)
    tally.check()


@pytest.mark.slow
def test_an_interruption_at_any_line_of_a_step_changes_nothing(engine: Engine) -> None:
    check_interrupted_at(engine, some_turns(lines_of_a_run(engine), seed=2))


# -- planted faults -----------------------------------------------------------------------------------------------


def keep_what_was_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sequence, "forget_unsettled", lambda self: None)


def forget_what_is_under_way_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stepper, "_recover", lambda self: self._rounds.clear())


@pytest.mark.parametrize("plant", [keep_what_was_being_written, forget_what_is_under_way_only])
def test_the_law_notices_a_recovery_that_is_not_whole(
    plant: Callable[[pytest.MonkeyPatch], None], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = lines_of_a_run(engine)
    plant(monkeypatch)
    source = inspect.getsourcefile(record)
    lines = [line for line in some_turns(counts, seed=3) if line[0] == source]
    with pytest.raises(AssertionError):
        check_interrupted_at(engine, lines[:40])
