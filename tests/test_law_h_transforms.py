"""Law H: what is done to the logits holds at each token's own position, whatever was drafted and rejected there.

The oracle is `transformers`, token by token in float64, with the processors that the field means by these names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from law_helpers import (
    HAS_BITS,
    BuildTwins,
    CheckpointFactory,
    EngineFactory,
    GreedyOracle,
    Tally,
    assert_idle,
    assert_same,
    make_prompt,
    plain,
    spec,
)
from scripted_drafters import AdversarialDrafter, KnowingDrafter, PerfectDrafter, RandomDrafter
from transformers.generation.logits_process import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from specengine.config import SamplingParams
from specengine.drafters import draft_model
from specengine.engine import Engine
from specengine.kernels.types.transforms import Transforms
from specengine.logits.entries import LogitEntry, build_entries
from specengine.logits.tables import MIN_CAPACITY, TransformTables
from specengine.runtime import sequence as sequence_module
from specengine.runtime.state import BatchState

HOLDS_FOR_REPLAYED_ROUNDS = True
VOCAB = 64
K = 4
NUM_TOKENS = 28
PROMPTS = [make_prompt(length, length, VOCAB) for length in (5, 12, 3, 9)]
# Of what the model writes, unasked, to PROMPTS; one begins in a prompt.
BAD_WORDS = [[17, 17, 17], [43], [27, 27, 27, 27], [60, 60], [11, 61, 61], [63, 42]]
# Biases that the model would not have chosen itself, and endings that it would soon have chosen.
TRANSFORMS: dict[str, dict[str, Any]] = {
    "biases": {"logit_bias": {9: 2.5, 14: 4.0, 30: -10_000.0}, "ignore_eos": True},
    "minimum": {"min_new_tokens": 11, "stop_token_ids": list(range(0, VOCAB, 5))},
    "penalty": {"repetition_penalty": 1.4, "ignore_eos": True},
    "counted": {"presence_penalty": 0.6, "frequency_penalty": 0.8, "ignore_eos": True},
    "words": {"bad_words": BAD_WORDS, "ignore_eos": True},
    "all": {
        "bad_words": BAD_WORDS[::2],
        "repetition_penalty": 1.2,
        "frequency_penalty": -0.2,
        "logit_bias": {0: 3.0, 10: 2.0, 41: 4.0},
        "min_new_tokens": 9,
        "stop_token_ids": list(range(0, VOCAB, 4)),
    },
}
DRAFTERS: dict[str, Callable[[], KnowingDrafter]] = {
    "perfect": lambda: PerfectDrafter(vocab_size=VOCAB),
    "adversarial": lambda: AdversarialDrafter(vocab_size=VOCAB, wrong_at=2),
    "random": lambda: RandomDrafter(vocab_size=VOCAB),
}
Oracles = Callable[..., GreedyOracle]


@torch.no_grad()
def judge_by_hand(oracle: GreedyOracle, prompt: list[int], asked: dict[str, Any]) -> list[int]:
    """Greedy decoding, one token a forward."""
    ids = list(prompt)
    endings = [*asked.get("stop_token_ids", []), *([] if asked.get("ignore_eos") else [0])]
    while len(ids) - len(prompt) < NUM_TOKENS:
        logits = oracle.model(torch.tensor([ids])).logits[:, -1].double()
        if (penalty := asked.get("repetition_penalty", 1.0)) != 1.0:
            logits = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits)
        if words := asked.get("bad_words"):
            logits = NoBadWordsLogitsProcessor(words)(torch.tensor([ids]), logits)
        logits = logits[0]
        count = torch.bincount(torch.tensor(ids[len(prompt) :], dtype=torch.int64), minlength=VOCAB)
        logits -= count * asked.get("frequency_penalty", 0.0) + (count > 0) * asked.get(
            "presence_penalty", 0.0
        )
        for token, bias in asked.get("logit_bias", {}).items():
            logits[token] += bias
        if len(ids) - len(prompt) < asked.get("min_new_tokens", 0):
            logits[endings] = float("-inf")
        ids.append(int(logits.argmax()))
        if ids[-1] in endings:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_plain_decoding_is_the_oracles(
    name: str, checkpoint: CheckpointFactory, build_engine: EngineFactory, oracle: Oracles
) -> None:
    engine = build_engine(checkpoint(seed=3))
    asked = TRANSFORMS[name]
    results = plain(engine, PROMPTS, max_new_tokens=NUM_TOKENS, **asked)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.token_ids == judge_by_hand(oracle(seed=3), prompt, asked)
    unasked = plain(engine, PROMPTS, max_new_tokens=NUM_TOKENS)
    assert [result.token_ids for result in unasked] != [result.token_ids for result in results]


@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_drafting_changes_nothing(
    name: str,
    drafter: str,
    logprobs: int | None,
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    tally: Tally,
) -> None:
    """By draws without logits, and by logits that are kept."""
    drafts = DRAFTERS[drafter]()
    engine = build_engine(checkpoint(seed=3), drafts)
    num_free = engine.num_free_blocks
    asked = {**TRANSFORMS[name], "max_new_tokens": NUM_TOKENS, "logprobs": logprobs}
    expected = plain(engine, PROMPTS, **asked)
    drafts.learn(expected)
    for result, truth in zip(spec(engine, PROMPTS, K, **asked), expected, strict=True):
        assert_same(result, truth)
    assert_idle(engine, num_free)
    tally.check(accepted=drafter != "random", rejected=drafter != "perfect")


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.9, "seed": 5, "acceptance": "coupled"},
        {"temperature": 0.9, "seed": 5, "acceptance": "coupled", "top_k": 9, "top_p": 0.9, "min_p": 0.01},
    ],
)
def test_a_draft_model_changes_nothing(
    sampling: dict[str, Any], checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    """Beside neighbours that ask for nothing, and that nothing is done to."""
    engine = build_engine(checkpoint(seed=3), checkpoint(seed=3, noise=0.2))
    num_free = engine.num_free_blocks
    asked = [*TRANSFORMS.values(), {"ignore_eos": True}]
    params = [SamplingParams(**{**each, **sampling}, max_new_tokens=NUM_TOKENS) for each in asked]
    prompts = [*PROMPTS, *PROMPTS][: len(asked)]
    alone = [
        plain(engine, prompt, max_new_tokens=NUM_TOKENS, **each, **sampling)
        for prompt, each in zip(prompts, asked, strict=True)
    ]
    for result, truth in zip(engine.generate(prompts, params), alone, strict=True):
        assert_same(result, truth)
    assert_idle(engine, num_free)
    tally.check()


@pytest.mark.parametrize("acceptance", ["greedy", "coupled", "rejection"])
@pytest.mark.parametrize("name", ["biases", "penalty", "counted", "words"])
def test_a_draft_that_is_the_target_is_always_accepted(
    name: str, acceptance: str, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    """The draft's law has the same things done to it."""
    engine = build_engine(checkpoint(seed=3), checkpoint(seed=3))
    sampling = {} if acceptance == "greedy" else {"temperature": 1.0, "seed": 2, "acceptance": acceptance}
    for result in spec(
        engine, PROMPTS, K, max_new_tokens=60, min_new_tokens=50, **TRANSFORMS[name], **sampling
    ):
        counts = result.metrics.speculative_decoding
        assert counts.num_draft_tokens > 30
        assert counts.num_accepted_draft_tokens == counts.num_draft_tokens


@pytest.mark.skipif(not HAS_BITS, reason="the reference promises no bits")
def test_logprobs_are_those_of_the_raw_logits(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, oracle: Oracles
) -> None:
    engine = build_engine(checkpoint(seed=3))
    for result in plain(engine, PROMPTS, max_new_tokens=NUM_TOKENS, logprobs=0, **TRANSFORMS["biases"]):
        truth = oracle(seed=3).logprobs(result.prompt_token_ids, result.token_ids)
        ours = [entry.logprob for entry in result.outputs[0].logprobs or []]
        assert torch.allclose(torch.tensor(ours), torch.tensor(truth), atol=1e-4)


def test_rounds_are_recorded_and_run_ahead(
    checkpoint: CheckpointFactory, build_twins: BuildTwins, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host launches a round before it has read the last, and nothing runs from Python."""
    _, engine = build_twins(checkpoint(seed=3), checkpoint(seed=3, noise=0.2))
    most, pop_due = [0], engine._rounds.pop_due

    def watch(*, has_launched: bool) -> Any:
        most[0] = max(most[0], len(engine._rounds._flights))
        return pop_due(has_launched=has_launched)

    monkeypatch.setattr(engine._rounds, "pop_due", watch)
    asked = {**TRANSFORMS["biases"], "max_new_tokens": NUM_TOKENS}
    expected = plain(engine, PROMPTS[0], **asked)
    recorded = engine.graph_report
    assert recorded is not None
    assert recorded.num_graphs > 0
    assert most[0] == 2
    assert_same(spec(engine, PROMPTS[0], K, **asked), expected)
    assert all(mode.has_transforms for _, _, mode, *_ in engine._rounds._recordings)


def test_tables_that_grow_take_their_recordings_along(
    checkpoint: CheckpointFactory, build_twins: BuildTwins
) -> None:
    """Requests with more entries than there was room for, while others run."""
    direct, replayed = build_twins(checkpoint(seed=3), checkpoint(seed=3, noise=0.2))
    few = SamplingParams(logit_bias={7: 3.0}, max_new_tokens=20, ignore_eos=True)
    many = SamplingParams(
        logit_bias={token: 8.0 - token / 9 for token in range(40)}, max_new_tokens=20, ignore_eos=True
    )
    for params in ([few, few], [few, many], [many, few], [few, few]):
        for result, truth in zip(
            replayed.generate(PROMPTS[:2], params), direct.generate(PROMPTS[:2], params), strict=True
        ):
            assert_same(result, truth)
    assert replayed._state.transforms.token.shape[1] == 64


# -- tables -------------------------------------------------------------------------------------------------------


def listed(tables: Transforms, slot: int) -> list[tuple[float, ...]]:
    """A slot's entries as the device has them."""
    count = int(tables.num_entries[slot])
    return list(zip(*(table[slot, :count].tolist() for table in tables[2:6]), strict=True))


def test_entries_are_in_order_of_their_tokens_and_as_given() -> None:
    tables = TransformTables(torch.zeros(3, 8, dtype=torch.int32))
    entries = build_entries([(9, 1.5), (2, -1.0)], banned=(9, 2), banned_until=12)
    tables.admit(1, entries)
    forever, never = 2**31 - 1, float("-inf")
    expected = [(2, -1.0, 0, forever), (2, never, 0, 12), (9, 1.5, 0, forever), (9, never, 0, 12)]
    assert listed(tables.tables, 1) == expected
    before = tables.tables
    tables.admit(1, [])
    assert tables.tables is before
    assert tables.tables.num_entries.tolist() == [0, 0, 0]


def test_prefixes_lie_one_behind_the_other() -> None:
    tables = TransformTables(torch.zeros(3, 8, dtype=torch.int32))
    assert tables.tables.prefix.shape[1] == 0
    tables.admit(0, build_entries([], (), 0, [(4, 5, 2)]))
    tables.admit(1, build_entries([(1, 0.5)], (), 0, [(7, 8, 9), (3,), (5, 6, 7, 2)]))
    table = tables.tables
    assert table.token[1, :4].tolist() == [1, 2, 3, 9]
    assert table.prefix_length[1, :4].tolist() == [0, 3, 0, 2]
    assert table.prefix_start[1, :4].tolist() == [0, 0, 3, 3]
    assert table.prefix[1, :5].tolist() == [5, 6, 7, 7, 8]
    assert table.prefix[0, :2].tolist() == [4, 5]
    assert table.prefix.shape[1] == 8
    tables.admit(1, build_entries([(1, 0.5)], (), 0))
    assert tables.tables.prefix_length[1, 0] == 0


def test_tables_grow_by_powers_of_two_and_forget_nothing() -> None:
    tables = TransformTables(torch.zeros(3, 8, dtype=torch.int32))
    tables.admit(0, [LogitEntry(5, 1.0)])
    first = tables.tables
    tables.admit(2, [LogitEntry(token, 0.5) for token in range(MIN_CAPACITY)])
    assert tables.tables is first
    tables.admit(1, [LogitEntry(token, 0.25) for token in range(2 * MIN_CAPACITY + 1)])
    assert tables.tables.token.shape[1] == 4 * MIN_CAPACITY
    assert tables.tables.history is first.history
    assert [len(listed(tables.tables, slot)) for slot in range(3)] == [1, 2 * MIN_CAPACITY + 1, MIN_CAPACITY]
    assert listed(tables.tables, 0) == [(5, 1.0, 0, 2**31 - 1)]


# -- planted faults -----------------------------------------------------------------------------------------------


def bans_end_early(patch: pytest.MonkeyPatch) -> None:
    def mutant(bias: Any, banned: Any, until: int, words: Any) -> list[LogitEntry]:
        return build_entries(bias, banned, until - 1, words)

    patch.setattr(sequence_module, "build_entries", mutant)


def prefixes_are_ignored(patch: pytest.MonkeyPatch) -> None:
    def mutant(bias: Any, banned: Any, until: int, words: Any) -> list[LogitEntry]:
        return build_entries(bias, banned, until, [word[-1:] for word in words])

    patch.setattr(sequence_module, "build_entries", mutant)


def slots_keep_their_entries(patch: pytest.MonkeyPatch) -> None:
    admit = TransformTables.admit

    def mutant(self: TransformTables, slot: int, entries: Any) -> None:
        if entries:
            admit(self, slot, entries)

    patch.setattr(TransformTables, "admit", mutant)


def prompts_are_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sequence_module.Sequence, "prompt_length", 0)


def only_committed_tokens_are_penalised(patch: pytest.MonkeyPatch) -> None:
    """This round's drafts are overlooked."""
    tables = BatchState.transforms

    def mutant(self: BatchState) -> Transforms:
        found: Transforms = tables.__get__(self)
        return found._replace(history=found.history.clone())

    patch.setattr(BatchState, "transforms", property(mutant))


@pytest.mark.parametrize(
    "plant", [prefixes_are_ignored, bans_end_early, slots_keep_their_entries, prompts_are_counted]
)
def test_the_law_notices(
    plant: Callable[[pytest.MonkeyPatch], None],
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    oracle: Oracles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    engine = build_engine(checkpoint(seed=3))
    half = {"stop_token_ids": list(range(0, VOCAB, 2))}
    biased, counted, words = (TRANSFORMS[name] for name in ("biases", "counted", "words"))
    minima = [[{**half, "min_new_tokens": count}] for count in range(1, 5)]

    def check() -> None:
        for batch in ([biased, biased], [counted, words], [{"ignore_eos": True}, biased], *minima):
            params = [SamplingParams(max_new_tokens=NUM_TOKENS, **asked) for asked in batch]
            for result, asked in zip(engine.generate(PROMPTS[: len(batch)], params), batch, strict=True):
                assert result.token_ids == judge_by_hand(oracle(seed=3), result.prompt_token_ids, asked)

    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.4}, {"frequency_penalty": 0.8}, {"bad_words": BAD_WORDS}]
)
def test_the_law_notices_drafts_that_are_overlooked(
    penalty: dict[str, Any],
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = build_engine(checkpoint(seed=3), checkpoint(seed=3), rounds_ahead=0, cuda_graphs=False)
    asked = {**penalty, "ignore_eos": True, "max_new_tokens": 60}
    expected = plain(engine, PROMPTS, **asked)
    only_committed_tokens_are_penalised(monkeypatch)
    results = spec(engine, PROMPTS, K, **asked)
    assert [result.token_ids for result in results] != [result.token_ids for result in expected]


def test_a_draft_without_transforms_is_noticed(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Engine = build_engine(checkpoint(seed=3), checkpoint(seed=3))
    propose = draft_model.DraftModelDrafter.propose
    monkeypatch.setattr(
        draft_model.DraftModelDrafter,
        "propose",
        lambda self, batch, state: propose(self, batch._replace(transforms=None), state),
    )
    result = spec(engine, PROMPTS[0], K, max_new_tokens=NUM_TOKENS, **TRANSFORMS["biases"])
    assert result.metrics.speculative_decoding.draft_acceptance_rate < 1
