"""An engine that one thread drives and others use: waiting for work, and ending requests from anywhere."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from law_helpers import CheckpointFactory, EngineFactory, assert_idle, assert_same, make_prompt

from specengine.config import SamplingParams
from specengine.engine import Engine
from specengine.errors import SpecEngineError

TIMEOUT = 60.0  # of what must not hang
PROMPTS = [make_prompt(length) for length in (5, 3, 8, 6)]


@pytest.fixture
def engine(checkpoint: CheckpointFactory, build_engine: EngineFactory) -> Engine:
    return build_engine(checkpoint("gpt2", seed=9))


def test_a_loop_sleeps_until_something_is_queued_and_ends_with_the_engine(engine: Engine) -> None:
    results: dict[int, Any] = {}

    def drive() -> None:
        while engine.wait_for_work():
            results.update({event.index: event.result for event in engine.step() if event.result is not None})

    assert not engine.wait_for_work(timeout=0)
    expected = engine.generate(PROMPTS, engine_params(6))
    loop = threading.Thread(target=drive)
    loop.start()
    params = engine_params(6)
    ids = [engine.add_request(prompt, params) for prompt in PROMPTS]
    # This thread's own call goes on beside the loop's.
    assert_same(engine.generate(PROMPTS[0], params), expected[0])
    while len(results) < len(ids):
        assert loop.is_alive()
        threading.Event().wait(0.001)
    engine.close()
    loop.join(TIMEOUT)
    assert not loop.is_alive()
    for request_id, truth in zip(ids, expected, strict=True):
        assert_same(results[request_id], truth)


def engine_params(max_new_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)


def test_abort_does_not_wait_for_the_step_and_is_done_when_it_ends(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_free = engine.num_free_blocks
    request_id = engine.add_request(PROMPTS[0], engine_params(40))
    engine.step()
    may_end, is_inside = threading.Event(), threading.Event()
    launch = engine._rounds.launch

    def slow(*given: Any, **named: Any) -> int:
        num_rounds = launch(*given, **named)
        is_inside.set()
        assert may_end.wait(TIMEOUT)
        return num_rounds

    monkeypatch.setattr(engine._rounds, "launch", slow)
    events: list[Any] = []
    stepping = threading.Thread(target=lambda: events.extend(engine.step()))
    stepping.start()
    assert is_inside.wait(TIMEOUT)
    engine.abort(request_id)  # comes back although the step goes on
    assert engine._scheduler.has_work
    may_end.set()
    stepping.join(TIMEOUT)
    assert not engine._scheduler.has_work
    assert engine.num_free_blocks == num_free
    assert engine.wait_for_work(0), "the end has not been told yet"
    events += engine.step()
    assert events[-1].finish_reason == "abort"
    assert events[-1].result is not None
    assert_idle(engine, num_free)


def test_many_threads_add_and_abort_while_another_steps(engine: Engine) -> None:
    num_free, ends = engine.num_free_blocks, {}
    wanted = 30

    def drive() -> None:
        while len(ends) < wanted and engine.wait_for_work(TIMEOUT):
            ends.update(
                {
                    event.index: event.result.finish_reason
                    for event in engine.step()
                    if event.result is not None
                }
            )

    loop = threading.Thread(target=drive)
    loop.start()

    def use(worker: int) -> None:
        for turn in range(wanted // 3):
            request_id = engine.add_request(PROMPTS[turn % 4], engine_params(4 + 60 * (turn % 2)))
            if turn % 2:
                engine.abort(request_id)

    users = [threading.Thread(target=use, args=(worker,)) for worker in range(3)]
    for user in users:
        user.start()
    for thread in [*users, loop]:
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert len(ends) == wanted
    assert set(ends.values()) == {"abort", "length"}
    assert_idle(engine, num_free)


def test_a_closed_engine_wakes_who_waits_and_takes_nothing(engine: Engine) -> None:
    waited: list[bool] = []
    waiting = threading.Thread(target=lambda: waited.append(engine.wait_for_work()))
    waiting.start()
    engine.close()
    waiting.join(TIMEOUT)
    assert waited == [False]
    with pytest.raises(SpecEngineError, match="closed"):
        engine.add_request(PROMPTS[0])


def test_requests_are_built_beside_a_step_and_queued_later(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building waits for nobody; queued they are what `generate` would have made of them."""
    expected = engine.generate(PROMPTS, engine_params(6))
    engine.add_request(PROMPTS[0], engine_params(1))
    may_end, is_inside = threading.Event(), threading.Event()
    run = engine._stepper._prompts.run

    def stay(chunks: Any) -> None:
        is_inside.set()
        assert may_end.wait(TIMEOUT)
        run(chunks)

    with monkeypatch.context() as patch:
        patch.setattr(engine._stepper._prompts, "run", stay)
        stepping = threading.Thread(target=engine.step)
        stepping.start()
        assert is_inside.wait(TIMEOUT)
        requests = engine.build_requests(PROMPTS, max_new_tokens=6, ignore_eos=True)
        assert stepping.is_alive()
        may_end.set()
        stepping.join(TIMEOUT)
    ids = [engine.add_request(request) for request in requests]
    results: dict[int, Any] = {}
    while engine.has_work:
        results.update({event.index: event.result for event in engine.step() if event.result is not None})
    for request_id, truth in zip(ids, expected, strict=True):
        assert_same(results[request_id], truth)
    with pytest.raises(ValueError, match="top_p must be above 0"):
        engine.build_requests(PROMPTS, top_p=0.0)


def test_events_tell_the_logprobs_rounds_and_ends_of_their_tokens(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    engine = build_engine(checkpoint("gpt2", seed=9), checkpoint("gpt2", seed=9, noise=0.02))
    prompt = make_prompt(6)
    options: dict[str, Any] = {
        "max_new_tokens": 24, "logprobs": 2, "return_rounds": True, "num_speculative_tokens": 3,
        "temperature": 1.0, "seed": 1,
    }  # fmt: skip
    stop = engine.generate(prompt, **options).token_ids[-3]
    events = list(engine.stream(prompt, stop_token_ids=[stop], **options))
    output = events[-1].result.outputs[0] if events[-1].result else None
    assert output is not None
    assert [entry for event in events for entry in event.logprobs or []] == output.logprobs
    assert [each for event in events for each in event.rounds or []] == output.rounds
    assert sum(each.num_draft_tokens for each in output.rounds or []) > 0
    assert (events[-1].stop_reason, events[-1].error) == (output.stop_reason, None) == (stop, None)
    plain = next(iter(engine.stream(prompt, max_new_tokens=2)))
    assert plain.logprobs is plain.rounds is None
