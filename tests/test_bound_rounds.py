"""Rounds that run in one call: what they do is what the same rounds do part by part, and several may run in a row."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from law_helpers import BACKEND, DraftedFactory, make_prompt
from tiny_models import build_model

from specengine.engine import Engine, rounds, stepper
from specengine.engine.rounds import Rounds
from specengine.outputs import GenerationResult
from specengine.runtime.sequence import MAX_ROUNDS_UNREAD

pytestmark = pytest.mark.skipif(BACKEND != "native", reason="the native backend runs rounds in one call")

VOCAB = 61
PROMPTS = [make_prompt(5, 1, VOCAB), make_prompt(11, 2, VOCAB), make_prompt(2, 3, VOCAB)]
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "coupled": {"temperature": 0.9, "seed": 5, "acceptance": "coupled"},
    "filters": {"temperature": 1.1, "seed": 5, "top_k": 9, "top_p": 0.9, "acceptance": "coupled"},
    "transforms": {
        "temperature": 0.0,
        "repetition_penalty": 1.4,
        "min_new_tokens": 9,
        "logit_bias": {3: 2.0},
    },
    "rounds": {"temperature": 0.0, "return_rounds": True},
}


@pytest.fixture
def part_by_part(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "bind_round", lambda *_: None)
        yield patch


def found(results: list[GenerationResult]) -> list[Any]:
    """All of it that time is not in."""
    return [
        (
            result.token_ids,
            result.finish_reason,
            result.outputs[0].token_source,
            result.outputs[0].rounds,
            result.metrics.num_target_forwards,
            result.metrics.speculative_decoding.num_rounds,
            result.metrics.speculative_decoding.num_accepted_draft_tokens,
        )
        for result in results
    ]


def engine_of(drafted: DraftedFactory, name: str, max_positions: int = 96, **options: Any) -> Engine:
    target, drafter = drafted(name, seed=4, vocab_size=VOCAB, max_positions=max_positions)
    return Engine(target, drafter, backend=BACKEND, block_size=4, **options)


def run_all(engine: Engine, sampling: dict[str, Any], k: int, **more: Any) -> list[Any]:
    given = {"max_new_tokens": 23, "num_speculative_tokens": k, **sampling, **more}
    together = engine.generate(PROMPTS, **given)
    alone = [engine.generate(prompt, **given) for prompt in PROMPTS]
    assert isinstance(together, list)
    return found([*together, *alone])  # type: ignore[list-item]


@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("name", ["draft", "self:1", "ngram", "suffix"])
def test_one_call_does_what_the_parts_do(
    name: str, sampling: str, k: int, drafted: DraftedFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of(drafted, name) as engine:
        whole = run_all(engine, SAMPLING[sampling], k)
        assert any(bound is not None for bound in engine._rounds._bound.values())
    monkeypatch.setattr(rounds, "bind_round", lambda *_: None)
    with engine_of(drafted, name) as engine:
        assert run_all(engine, SAMPLING[sampling], k) == whole


def test_forced_acceptance_is_the_parts(drafted: DraftedFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_of(drafted, "draft", forced_acceptance=0.6) as engine:
        whole = run_all(engine, {"seed": 3}, 3)
    monkeypatch.setattr(rounds, "bind_round", lambda *_: None)
    with engine_of(drafted, "draft", forced_acceptance=0.6) as engine:
        assert run_all(engine, {"seed": 3}, 3) == whole


@pytest.mark.parametrize("broken", ["target", "draft"])
def test_what_is_no_distribution_ends_drafts_or_the_sequence(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token whose embedding is NaN: behind it there is no distribution."""

    given: dict[str, Any] = {"max_new_tokens": 20, "num_speculative_tokens": 3, "ignore_eos": True}

    def outcome() -> list[Any]:
        target, draft = build_model("gpt2", vocab_size=VOCAB), build_model("gpt2", seed=1, vocab_size=VOCAB)
        model = target if broken == "target" else draft
        with Engine(target, draft, backend=BACKEND) as engine:
            text = engine.generate(PROMPTS[0], **given)
            assert isinstance(text, GenerationResult)
        with torch.no_grad():
            model.get_input_embeddings().weight[text.token_ids[6]] = float("nan")
        with Engine(target, draft, backend=BACKEND) as engine:
            return found([engine.generate(PROMPTS[0], **given)])  # type: ignore[list-item]

    whole = outcome()
    monkeypatch.setattr(rounds, "bind_round", lambda *_: None)
    assert outcome() == whole


# Several in a row


@pytest.fixture
def num_in_a_row(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rounds each launch ran."""
    counts: list[int] = []
    launch = Rounds.launch

    def counting(self: Rounds, *given: Any, **named: Any) -> int:
        counts.append(launch(self, *given, **named))
        return counts[-1]

    monkeypatch.setattr(Rounds, "launch", counting)
    monkeypatch.setattr(stepper, "UNREAD_SECONDS_A_ROUND", 60.0)
    return counts


def test_rounds_run_in_a_row_where_nobody_listens(drafted: DraftedFactory, num_in_a_row: list[int]) -> None:
    with engine_of(drafted, "draft") as engine:
        result = engine.generate(PROMPTS[0], max_new_tokens=40, num_speculative_tokens=0, ignore_eos=True)
        assert max(num_in_a_row) == MAX_ROUNDS_UNREAD
        assert sum(num_in_a_row) == 39  # none for nothing
        num_in_a_row.clear()
        events: list[Any] = []
        again = engine.generate(
            PROMPTS[0], max_new_tokens=40, num_speculative_tokens=0, ignore_eos=True, streamer=events.append
        )
        assert set(num_in_a_row) == {1}
    assert isinstance(result, GenerationResult)
    assert isinstance(again, GenerationResult)
    assert again.token_ids == result.token_ids


def test_an_interval_bounds_them(drafted: DraftedFactory, num_in_a_row: list[int]) -> None:
    with engine_of(drafted, "draft") as engine:
        options: dict[str, Any] = {"max_new_tokens": 30, "num_speculative_tokens": 0, "ignore_eos": True}
        events = list(engine.stream(PROMPTS[0], stream_interval=3, **options))
        assert max(num_in_a_row) == 3
        each = list(engine.stream(PROMPTS[0], **options))
    told, told_each = ([token for event in heard for token in event.token_ids] for heard in (events, each))
    assert told == told_each
    assert len(events) < len(each) == 30


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2"])
def test_a_wrong_interval_is_refused(wrong: Any, drafted: DraftedFactory) -> None:
    with engine_of(drafted, "draft") as engine:
        for stream in (engine.stream, engine.stream_chat, engine.build_requests):
            with pytest.raises(ValueError, match="stream_interval"):
                stream(PROMPTS[0], stream_interval=wrong)


@pytest.mark.parametrize("ending", ["stop token", "length"])
def test_no_round_runs_behind_an_end(ending: str, drafted: DraftedFactory, num_in_a_row: list[int]) -> None:
    with engine_of(drafted, "draft") as engine:
        given: dict[str, Any] = {
            "num_speculative_tokens": 0,
            "ignore_eos": True,
            "temperature": 1.5,
            "seed": 3,
        }
        text = engine.generate(PROMPTS[0], max_new_tokens=30, **given)
        assert isinstance(text, GenerationResult)
        place = next(at for at in range(11, 30) if text.token_ids.index(text.token_ids[at]) == at)
        stop: dict[str, Any] = {"stop_token_ids": [text.token_ids[place]]} if ending != "length" else {}
        num_in_a_row.clear()
        shorter = engine.generate(
            PROMPTS[0],
            max_new_tokens=place + 1 if ending == "length" else 30,
            **given,
            **stop,
        )
        assert isinstance(shorter, GenerationResult)
        assert len(shorter.token_ids) == place + 1
        assert sum(num_in_a_row) == place


def test_one_round_at_a_time_where_text_may_end_it(drafted: DraftedFactory, num_in_a_row: list[int]) -> None:
    with engine_of(drafted, "draft") as engine:
        engine.generate(PROMPTS[0], max_new_tokens=12, return_rounds=True)
        engine.generate(PROMPTS[0], max_new_tokens=12, logprobs=1)
    assert set(num_in_a_row) == {1}


def test_lookups_draft_with_what_was_written_last(drafted: DraftedFactory, num_in_a_row: list[int]) -> None:
    with engine_of(drafted, "ngram") as engine:
        engine.generate(PROMPTS[0] * 4, max_new_tokens=20, num_speculative_tokens=3)
        assert set(num_in_a_row) == {1}
        num_in_a_row.clear()
        engine.generate(PROMPTS[0] * 4, max_new_tokens=20, num_speculative_tokens=0, ignore_eos=True)
        assert num_in_a_row == [19]


def test_little_memory_is_not_reserved_ahead(drafted: DraftedFactory, num_in_a_row: list[int]) -> None:
    """Nobody loses blocks to rounds that were to run in a row: as many are preempted as would be without."""
    with engine_of(drafted, "draft", max_seq_len=48, num_blocks=19, max_batch_size=4) as engine:
        given: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True, "num_speculative_tokens": 2}
        unheard = engine.generate(PROMPTS, **given)
        heard = engine.generate(PROMPTS, streamer=lambda _: None, **given)
    assert [result.token_ids for result in unheard] == [result.token_ids for result in heard]
    for one, other in zip(unheard, heard, strict=True):
        assert one.metrics.num_preemptions <= other.metrics.num_preemptions


def test_whoever_comes_meanwhile_waits_for_a_few_rounds(drafted: DraftedFactory) -> None:
    """A second caller's request is taken up while the first one's, unheard, goes on."""
    with engine_of(drafted, "draft", max_positions=4096) as engine:
        first: list[Any] = []
        thread = threading.Thread(
            target=lambda: first.append(
                engine.generate(PROMPTS[0], max_new_tokens=1500, ignore_eos=True, num_speculative_tokens=0)
            )
        )
        thread.start()
        second = engine.generate(PROMPTS[1], max_new_tokens=4, ignore_eos=True, num_speculative_tokens=0)
        was_running = not first
        thread.join()
    assert was_running
    assert isinstance(second, GenerationResult)
    assert len(second.token_ids) == 4
    assert len(first[0].token_ids) == 1500
