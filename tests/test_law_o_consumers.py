"""Law O: a consumer may leave, or be interrupted, at any moment: blocks come back and the next request is right."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import pytest
from law_helpers import CheckpointFactory, EngineFactory, Tally, assert_idle, assert_same, make_prompt
from scripted_drafters import Known, ScriptedDrafter

from specengine import speculative
from specengine.config import SamplingParams
from specengine.engine import Engine
from specengine.engine.record import Records
from specengine.engine.record import finish as finish_sequence
from specengine.engine.stepper import Stepper
from specengine.models.decoder import Decoder
from specengine.outputs import GenerationResult

HOLDS_FOR_REPLAYED_ROUNDS = True
VOCAB = 64
PROMPTS = [make_prompt(length, vocab_size=VOCAB) for length in (3, 9, 5)]
PARAMS = [
    SamplingParams(num_speculative_tokens=3, max_new_tokens=9, ignore_eos=True, logprobs=1),
    SamplingParams(
        num_speculative_tokens=2,
        max_new_tokens=7,
        ignore_eos=True,
        logprobs=0,
        n=2,
        temperature=1.0,
        seed=5,
        acceptance="coupled",
    ),
    SamplingParams(
        num_speculative_tokens=4,
        max_new_tokens=8,
        ignore_eos=True,
        logprobs=2,
        temperature=0.8,
        seed=6,
        acceptance="rejection",
    ),
]


class BrokenDrafter(ScriptedDrafter):
    """A scripted drafter one of whose methods raises, once, at its n-th call from `break_at` on."""

    def __init__(self) -> None:
        super().__init__(vocab_size=VOCAB, counts=(2, 0, 4, 1))
        self.method, self.calls_left, self.error = "", 0, BaseException

    def break_at(self, method: str, call: int, error: type[BaseException]) -> None:
        self.method, self.calls_left, self.error = method, call, error

    def propose(self, batch: Any) -> Any:
        self._maybe_raise("propose")
        return super().propose(batch)

    def observe(self, batch: Any, num_accepted: Any) -> None:
        super().observe(batch, num_accepted)
        self._maybe_raise("observe")

    def release(self, sequence_id: int) -> None:
        super().release(sequence_id)
        self._maybe_raise("release")

    def draft(
        self, truth: list[int], committed: list[int], limit: int, known: Known, round_index: int
    ) -> list[int]:
        """By length, not by round: a round that was interrupted is drafted again as it was."""
        return super().draft(truth, committed, limit, known, len(committed))

    def _maybe_raise(self, method: str) -> None:
        if method == self.method:
            self.calls_left -= 1
            if self.calls_left == 0:
                self.method = ""
                raise self.error(f"planted in {method}")


class Lab:
    """An engine, what each prompt must give, and how many blocks are free when nothing runs."""

    def __init__(self, engine: Engine, drafter: ScriptedDrafter | None) -> None:
        self.engine = engine
        if drafter is not None:
            for prompt, params in zip(PROMPTS, PARAMS, strict=True):
                plain = SamplingParams(**{**vars(params), "num_speculative_tokens": 0})
                drafter.learn(engine.generate(prompt, plain))
        self.num_free = engine.num_free_blocks
        self.expected: list[GenerationResult] = engine.generate(PROMPTS, PARAMS)  # type: ignore[assignment]
        self.num_events = len(list(engine.stream(PROMPTS, PARAMS)))

    def check(self, index: int = 0) -> None:
        """Nothing is left of whoever went away, and the next request is right."""
        assert_idle(self.engine, self.num_free)
        at = index % len(PROMPTS)
        assert_same(self.engine.generate(PROMPTS[at], PARAMS[at]), self.expected[at])
        assert_idle(self.engine, self.num_free)


def check_closed_after_any_event(lab: Lab) -> None:
    for num_events in range(lab.num_events + 2):
        stream = lab.engine.stream(PROMPTS, PARAMS)
        events = list(itertools.islice(stream, num_events))
        assert len(events) == min(num_events, lab.num_events)
        stream.close()
        lab.check(num_events)


def check_others_go_on(lab: Lab) -> None:
    """One consumer leaves after any event; the requests beside it end as if it had never been."""
    for num_events in range(1, lab.num_events, 3):
        ids = [lab.engine.add_request(p, q) for p, q in zip(PROMPTS, PARAMS, strict=True)]
        stream = lab.engine.stream(PROMPTS[::-1], PARAMS[::-1])
        list(itertools.islice(stream, num_events))
        stream.close()
        results = finish(lab.engine)
        for request_id, truth in zip(ids, lab.expected, strict=True):
            assert_same(results[request_id], truth)
        assert_idle(lab.engine, lab.num_free)


def finish(engine: Engine) -> dict[int, GenerationResult]:
    """Steps until nothing is left to do, whatever the steps raise; results by request id."""
    results = {}
    for _ in range(1000):
        try:
            events = engine.step()
        except (KeyboardInterrupt, RuntimeError):
            continue
        results |= {event.index: event.result for event in events if event.result is not None}
        if not engine.has_work and not events:
            return results
    raise AssertionError("the engine never comes to an end")


def check_interrupted(lab: Lab, plant: Callable[[int, type[BaseException]], None], num_calls: int) -> None:
    """Raises at each of the first calls: in a call of `generate`, and under requests that are stepped on."""
    errors: list[type[BaseException]] = [KeyboardInterrupt, RuntimeError]
    for call, error in itertools.product(range(1, num_calls + 1), errors):
        plant(call, error)
        with pytest.raises(error, match="planted"):
            lab.engine.generate(PROMPTS, PARAMS)
        lab.check(call)
        ids = [lab.engine.add_request(p, q) for p, q in zip(PROMPTS, PARAMS, strict=True)]
        plant(call, error)
        results = finish(lab.engine)
        for request_id, truth in zip(ids, lab.expected, strict=True):
            assert_same(results[request_id], truth)
        assert_idle(lab.engine, lab.num_free)


@pytest.fixture
def broken() -> BrokenDrafter:
    return BrokenDrafter()


@pytest.fixture
def lab(checkpoint: CheckpointFactory, build_engine: EngineFactory, broken: BrokenDrafter) -> Lab:
    return Lab(build_engine(checkpoint("gpt2", seed=9), broken), broken)


def test_a_stream_may_be_closed_after_any_event(lab: Lab, tally: Tally) -> None:
    check_closed_after_any_event(lab)
    tally.check()


@pytest.mark.parametrize("config", [{"num_blocks": 12}, {"prefill_chunk_size": 3}, {"max_batch_size": 2}])
def test_a_stream_may_be_closed_while_others_wait_or_are_preempted(
    config: dict[str, Any], checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    """Coupled and greedy rows only: in rejection mode a preemption may change k, and with it the draws."""
    engine = build_engine(checkpoint("gpt2", seed=9), checkpoint("gpt2", seed=9, noise=0.4), **config)
    check_closed_after_any_event(Lab(engine, None))
    tally.check()


def test_whoever_stays_is_not_disturbed_by_who_leaves(lab: Lab, tally: Tally) -> None:
    check_others_go_on(lab)
    tally.check()


def test_a_stream_that_is_never_read_or_dropped_holds_nothing(lab: Lab) -> None:
    lab.engine.stream(PROMPTS, PARAMS)
    lab.check()
    stream = lab.engine.stream(PROMPTS, PARAMS)
    next(stream)
    del stream
    lab.check(1)


def test_a_streamer_that_raises_ends_its_own_call_only(lab: Lab) -> None:
    for last in range(1, lab.num_events + 1, 2):
        seen = itertools.count(1)

        def streamer(event: object, last: int = last, seen: Iterator[int] = seen) -> None:
            if next(seen) == last:
                raise RuntimeError("planted in the streamer")

        with pytest.raises(RuntimeError, match="planted"):
            lab.engine.generate(PROMPTS, PARAMS, streamer=streamer)
        lab.check(last)


def test_aborting_at_any_step_gives_what_was_final_and_the_reason(lab: Lab) -> None:
    for num_steps in range(8):
        request_id = lab.engine.add_request(PROMPTS[0], PARAMS[0])
        for _ in range(num_steps):
            lab.engine.step()
        is_over = not lab.engine.has_work
        lab.engine.abort(request_id)
        lab.engine.abort(request_id)
        events = lab.engine.step()
        if not is_over:
            output = events[-1].result.outputs[0]  # type: ignore[union-attr]
            assert output.finish_reason == "abort"
            truth = lab.expected[0].outputs[0]
            assert output.token_ids == truth.token_ids[: len(output.token_ids)]
            assert output.logprobs == truth.logprobs[: len(output.token_ids)]  # type: ignore[index]
        lab.check(num_steps)


@pytest.mark.parametrize("method", ["propose", "observe", "release"])
def test_an_interruption_inside_a_drafter_loses_nothing(
    method: str, lab: Lab, broken: BrokenDrafter, tally: Tally
) -> None:
    check_interrupted(lab, lambda call, error: broken.break_at(method, call, error), num_calls=4)
    tally.check()


class Trap:
    """Makes a function raise at a chosen call; harmless until it is set."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls_left = 0
        self.error: type[BaseException] = BaseException

    def set(self, call: int, error: type[BaseException]) -> None:
        self.calls_left, self.error = call, error

    def wrap(self) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = self.function(*args, **kwargs)
            self.calls_left -= 1
            if self.calls_left == 0:
                raise self.error("planted")
            return result

        return wrapped


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Decoder, "forward_stats"), (speculative, "verify"), (Records, "_gather_logprobs")],
    ids=["forward", "verify", "logprobs"],
)
def test_an_interruption_inside_a_step_loses_nothing(
    owner: Any,
    name: str,
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
) -> None:
    """With a draft model, so that its forwards are interrupted too."""
    engine = build_engine(checkpoint("gpt2", seed=9), checkpoint("gpt2", seed=9, noise=0.4))
    lab = Lab(engine, None)
    trap = Trap(getattr(owner, name))
    monkeypatch.setattr(owner, name, trap.wrap())
    check_interrupted(lab, trap.set, num_calls=4)
    tally.check()


@contextmanager
def interrupted_at_line(count: int) -> Iterator[list[str]]:
    """KeyboardInterrupt at the count-th line that runs inside the package; yields where that was."""
    left = itertools.count(count, -1)
    where: list[str] = []

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if "/specengine/" not in frame.f_code.co_filename:
            return None
        if event == "line" and not where and next(left) <= 0:
            where.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}")
            raise KeyboardInterrupt("planted")
        return trace

    sys.settrace(trace)
    try:
        yield where
    finally:
        sys.settrace(None)


def check_interrupted_at_any_line(lab: Lab, lines: Iterator[int]) -> None:
    """Ctrl-C wherever it strikes inside a call: its requests are gone, the next one is right."""
    for line in lines:
        with interrupted_at_line(line) as where, suppress(KeyboardInterrupt):
            lab.engine.generate(PROMPTS, PARAMS)
        if not where:
            return
        try:
            lab.check(line)
        except AssertionError as error:
            raise AssertionError(f"interrupted at {where[0]}") from error


def test_an_interruption_at_sampled_lines_of_the_package_loses_nothing(lab: Lab, tally: Tally) -> None:
    check_interrupted_at_any_line(lab, iter(range(7, 1_000_000, 431)))
    tally.check()


@pytest.mark.slow
def test_an_interruption_at_any_line_of_the_package_loses_nothing(lab: Lab) -> None:
    check_interrupted_at_any_line(lab, itertools.count(0, 5))


def test_threads_that_share_an_engine_each_get_their_own(lab: Lab, tally: Tally) -> None:
    """Some read to the end, some leave early; everybody's result is what it is alone."""
    failures: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for turn in range(3):
                at = (worker + turn) % len(PROMPTS)
                if worker % 3 == 2:
                    stream = lab.engine.stream(PROMPTS, PARAMS)
                    list(itertools.islice(stream, worker + turn))
                    stream.close()
                assert_same(lab.engine.generate(PROMPTS[at], PARAMS[at]), lab.expected[at])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    lab.check()
    tally.check()


def test_closing_an_engine_ends_the_streams_that_are_open(lab: Lab) -> None:
    stream = lab.engine.stream(PROMPTS, PARAMS)
    next(stream)
    lab.engine.close()
    results = [event.result for event in stream if event.result is not None]
    assert len(results) == len(PROMPTS)
    assert {output.finish_reason for result in results for output in result.outputs} == {"abort"}
    assert_idle(lab.engine, lab.num_free)


# -- planted faults -----------------------------------------------------------------------------------------------


def close_without_aborting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "_give_up", lambda self, requests: None)


def abort_without_freeing(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(self: Stepper, *requests: Any) -> None:
        for sequence in (sequence for request in requests for sequence in request.sequences):
            if not sequence.is_finished:
                finish_sequence(sequence, "abort")
                if sequence in self.scheduler.running:
                    self.scheduler.running.remove(sequence)

    monkeypatch.setattr(Stepper, "end", faulty)


@pytest.mark.parametrize("plant", [close_without_aborting, abort_without_freeing])
def test_the_law_notices_a_close_that_leaves_something_behind(
    plant: Callable[[pytest.MonkeyPatch], None], lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check_closed_after_any_event(lab)


def test_the_law_notices_an_engine_that_does_not_recover(
    lab: Lab, broken: BrokenDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stepper, "_recover", lambda self: None)
    with pytest.raises((AssertionError, ValueError)):
        check_interrupted(lab, lambda call, error: broken.break_at("observe", call, error), num_calls=2)
