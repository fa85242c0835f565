"""Law D: exactly min(max_new_tokens, context - prompt) tokens, whatever is drafted; nothing past the context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import vocabulary_pairs
from law_helpers import (
    CheckpointFactory,
    DraftedFactory,
    EngineFactory,
    Tally,
    assert_idle,
    assert_same,
    make_prompt,
    plain,
    run_part_by_part,
)
from scripted_drafters import KnowingDrafter, PerfectDrafter, ScriptedDrafter

from specengine.config import SamplingParams
from specengine.engine import Engine
from specengine.models.decoder import Decoder
from specengine.runtime.sequence import Sequence

HOLDS_FOR_REPLAYED_ROUNDS = True
CONTEXT = 24
KS = (1, 2, 4, 7)
VOCAB = 64


@pytest.fixture
def highest_position(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], int]:
    """The highest position that a decoder with a context of that many tokens was fed."""
    seen: dict[int, int] = {}

    def spy_on(name: str) -> None:
        original = getattr(Decoder, name)

        def spy(self: Decoder, batch: Any, *args: Any) -> Any:
            limit = self.spec.max_positions
            seen[limit] = max(seen.get(limit, 0), int(batch.positions.max()))
            assert seen[limit] < limit, f"position {seen[limit]} of a context of {limit}"
            return original(self, batch, *args)

        monkeypatch.setattr(Decoder, name, spy)

    run_part_by_part(monkeypatch)
    spy_on("forward")
    spy_on("forward_stats")
    spy_on("draw")
    monkeypatch.setattr(Decoder, "draft", lambda *_: None)  # one by one, so that every position is seen
    return lambda context: seen[context]


def check_budget(engine: Engine, drafter: KnowingDrafter | None, ks: tuple[int, ...] = KS) -> None:
    """max_new_tokens in 1 … k + 2 for prompts that leave 1, 2, k, k + 1 (and 2k + 3) tokens of context."""
    num_free = engine.num_free_blocks
    for k in ks:
        room = sorted({1, 2, k, k + 1, 2 * k + 3})
        prompts = [make_prompt(CONTEXT - left, vocab_size=VOCAB) for left in room]
        expected = plain(engine, prompts, max_new_tokens=10 * CONTEXT, ignore_eos=True, logprobs=0)
        assert [len(result.token_ids) for result in expected] == room
        if drafter is not None:
            drafter.forget()
            drafter.learn(expected)
        for budget in range(1, k + 3):
            check_one_budget(engine, prompts, room, k, budget)
        results = engine.generate(prompts, budget_params(k, 10 * CONTEXT))
        for result, whole in zip(results, expected, strict=True):
            assert_same(result, whole)
    assert_idle(engine, num_free)


def budget_params(k: int, budget: int) -> SamplingParams:
    return SamplingParams(num_speculative_tokens=k, max_new_tokens=budget, ignore_eos=True, logprobs=0)


def check_one_budget(engine: Engine, prompts: list[list[int]], room: list[int], k: int, budget: int) -> None:
    expected = plain(engine, prompts, max_new_tokens=budget, ignore_eos=True, logprobs=0)
    results = engine.generate(prompts, budget_params(k, budget))
    for left, result, truth in zip(room, results, expected, strict=True):
        assert len(result.token_ids) == min(budget, left)
        assert result.finish_reason == "length"
        assert_same(result, truth)
        counts = result.metrics.speculative_decoding
        assert counts.num_trimmed_tokens == 0, "a round was given more than the budget"
        assert len(result.token_ids) == 1 + counts.num_accepted_draft_tokens + counts.num_rounds


@pytest.mark.parametrize(
    ("model_type", "weight_dtype"),
    [
        *[(name, "auto") for name in ("gpt2", "opt", "gpt_neox", "llama", "qwen3")],
        ("llama", "int4"),
        ("qwen3", "int4_min"),
    ],
)
@pytest.mark.parametrize("make_drafter", [PerfectDrafter, ScriptedDrafter])
def test_the_budget_is_exact_up_to_the_last_position(
    make_drafter: type[KnowingDrafter],
    model_type: str,
    weight_dtype: str,
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    highest_position: Callable[[int], int],
    tally: Tally,
) -> None:
    drafter = make_drafter(vocab_size=VOCAB)
    if isinstance(drafter, ScriptedDrafter):
        drafter.counts = (1, 0, 2, 7)
    sizes = {} if weight_dtype == "auto" else tiny_models.IN_GROUPS[model_type]
    path = checkpoint(model_type, seed=1, max_positions=CONTEXT, **sizes)
    engine = build_engine(path, drafter, weight_dtype=weight_dtype)
    check_budget(engine, drafter)
    assert highest_position(CONTEXT) == CONTEXT - 2, "the last token is never fed"
    tally.check(rejected=isinstance(drafter, ScriptedDrafter))


@pytest.mark.parametrize(
    ("model_type", "draft_context", "weights"),
    [
        *[("gpt2", context, {}) for context in (CONTEXT, CONTEXT - 1, CONTEXT - 4, CONTEXT // 2, 2)],
        ("opt", CONTEXT - 4, {}),
        ("gpt_neox", CONTEXT - 4, {}),
        ("llama", CONTEXT - 4, {"draft_weight_dtype": "int4"}),
        ("gpt2", CONTEXT // 2, {"weight_dtype": "int4_min", "draft_weight_dtype": "int8_group"}),
    ],
    ids=lambda value: "-".join(value.values()) or "auto" if isinstance(value, dict) else str(value),
)
def test_a_draft_with_a_smaller_context_degrades_to_plain_decoding(
    draft_context: int,
    model_type: str,
    weights: dict[str, str],
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    highest_position: Callable[[int], int],
    tally: Tally,
) -> None:
    sizes = tiny_models.IN_GROUPS.get(model_type, {})
    target = checkpoint(model_type, seed=1, max_positions=CONTEXT, **sizes)
    draft = checkpoint(model_type, seed=1, max_positions=CONTEXT, noise=0.1, **sizes)
    if draft_context < CONTEXT:
        draft = checkpoint(model_type, seed=1, max_positions=draft_context, **sizes)
    engine = build_engine(target, draft, **weights)
    check_budget(engine, None, ks=(1, 4))
    check_growing_past_the_draft(engine, draft_context)
    if draft_context > 2:
        assert tally.num_accepted + tally.num_rejected > 0
        assert highest_position(draft_context) <= draft_context - 1


@pytest.mark.parametrize("draft_context", [CONTEXT, 7, 2, 1])
@pytest.mark.parametrize("pair", vocabulary_pairs.PAIRS)
def test_a_draft_of_another_vocabulary_keeps_both_contexts(
    pair: str,
    draft_context: int,
    drafted: DraftedFactory,
    build_engine: EngineFactory,
    highest_position: Callable[[int], int],
    tally: Tally,
) -> None:
    """Of a text that is too long, one that reads text reads the end; the other drafts nothing."""
    target, _ = drafted(pair, seed=1, max_positions=CONTEXT, noise=0.3)
    _, draft = drafted(pair, seed=1, max_positions=draft_context, noise=0.3)
    check_budget(build_engine(target, draft), None, ks=(1, 4))
    if draft_context == CONTEXT or (pair == "retokenized" and draft_context > 1):
        assert highest_position(draft_context) <= draft_context - 1
        tally.check(accepted=draft_context > 2)


def check_growing_past_the_draft(engine: Engine, draft_context: int) -> None:
    """A short prompt that grows past the draft's context: drafted at first, then plain; also in one batch."""
    prompts = [make_prompt(length, vocab_size=VOCAB) for length in (1, 5, 11, 22)]
    sampling: dict[str, Any] = {"max_new_tokens": 10 * CONTEXT, "ignore_eos": True, "logprobs": 0}
    expected = plain(engine, prompts, **sampling)
    for k in (1, 3, 9):
        for result, truth in zip(
            engine.generate(prompts, num_speculative_tokens=k, **sampling), expected, strict=True
        ):
            assert_same(result, truth)
            counts = result.metrics.speculative_decoding
            assert counts.num_spec_steps <= max(0, draft_context - len(truth.prompt_token_ids)) + 1


def test_max_seq_len_below_the_models_context_is_the_context(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    drafter = ScriptedDrafter(vocab_size=VOCAB, counts=(1, 0, 7))
    engine = build_engine(checkpoint("gpt2", seed=1), drafter, max_seq_len=CONTEXT)
    check_budget(engine, drafter)
    tally.check()


# -- planted faults -----------------------------------------------------------------------------------------------


def draft_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Sequence, "max_draft_tokens", property(lambda self: min(self.num_speculative_tokens, self.remaining))
    )
    limit = Sequence.length_limit.fget
    monkeypatch.setattr(Sequence, "length_limit", property(lambda self: limit(self) + 1))


def count_one_token_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    left = property(lambda self: self.max_new_tokens - len(self.output_ids) + 1)
    monkeypatch.setattr(Sequence, "remaining", left)
    limit = Sequence.length_limit.fget
    monkeypatch.setattr(Sequence, "length_limit", property(lambda self: limit(self) + 1))


@pytest.mark.parametrize("plant", [draft_one_too_many, count_one_token_too_few])
def test_the_law_notices(
    plant: Callable[[pytest.MonkeyPatch], None],
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drafter = PerfectDrafter(vocab_size=VOCAB)
    engine = build_engine(checkpoint("gpt2", seed=1), drafter, max_seq_len=CONTEXT)
    run_part_by_part(monkeypatch)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check_budget(engine, drafter)


def test_the_law_notices_a_draft_that_ignores_its_own_context(
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    highest_position: Callable[[int], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = build_engine(
        checkpoint("gpt2", seed=1, max_positions=CONTEXT), checkpoint("gpt2", seed=1, max_positions=12)
    )
    monkeypatch.setattr(engine._rounds.drafter, "draft_positions", 13)
    with pytest.raises(AssertionError, match="position 12 of a context of 12"):
        check_growing_past_the_draft(engine, 12)
