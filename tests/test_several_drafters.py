"""Lists of drafters: who drafts for which row, what each of them is told, and what the caches of their models hold."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from law_helpers import (
    HAS_BITS,
    BuildTwins,
    CheckpointFactory,
    EngineFactory,
    Tally,
    assert_idle,
    assert_same,
    choose_ways,
    make_prompt,
    plain,
    spec,
)
from scripted_drafters import RandomDrafter
from torch import Tensor

import specengine
from specengine import DraftProposal, SamplingParams, VocabularyMismatchError, bundled
from specengine.drafters import draft_model
from specengine.drafters.base import LookupDrafter, Way
from specengine.drafters.draft_model import DraftModelDrafter
from specengine.drafters.ngram import NgramDrafter
from specengine.drafters.several import SeveralDrafters
from specengine.engine import Engine
from specengine.runtime.kv_cache import TARGET
from specengine.runtime.state import RunningBatch

HOLDS_FOR_REPLAYED_ROUNDS = True
VOCAB, BLOCK, K = 12, 4, 6
TINY: dict[str, Any] = {"seed": 1, "vocab_size": VOCAB}
GREEDY: dict[str, Any] = {"ignore_eos": True, "logprobs": 1, "max_new_tokens": 30}
COUPLED: dict[str, Any] = {**GREEDY, "temperature": 0.8, "seed": 3}
REJECTION: dict[str, Any] = {**COUPLED, "acceptance": "rejection"}
BLOCKWISE: dict[str, Any] = {**COUPLED, "acceptance": "block"}
PROMPTS = [make_prompt(size, size, VOCAB) for size in (17, 3, 9, 30)]


class WatchedLookup(NgramDrafter):
    """Notes what it is asked and told."""

    def __init__(self, name: str = "watched") -> None:
        super().__init__(1, 3)
        self.name = name
        self.observed: list[list[int]] = []
        self.followed: list[tuple[int, list[int], int]] = []
        self.released: list[int] = []

    def follow(self, sequence_id: int, drafted: Sequence[int], limit: int) -> list[int]:
        self.followed.append((sequence_id, list(drafted), limit))
        return super().follow(sequence_id, drafted, limit)

    def observe(self, batch: RunningBatch, num_accepted: Tensor) -> None:
        assert num_accepted.numel() == batch.size
        assert list(batch.lengths) == batch.seq_len.tolist()
        self.observed.append(list(batch.sequence_ids))

    def release(self, sequence_id: int) -> None:
        super().release(sequence_id)
        self.released.append(sequence_id)


def drafter_of(engine: Engine) -> SeveralDrafters:
    assert isinstance(engine._drafter, SeveralDrafters)
    return engine._drafter


def always(way: Way, engine: Engine, num_own: int = 2) -> None:
    """From here on every row drafts this way."""
    number = drafter_of(engine).ways.index(way)
    choose_ways(engine, lambda *_: (number, num_own))


# -- a list is what its parts are ---------------------------------------------------------------------------------


def test_a_list_has_its_parts_alone_then_its_models_with_lookups_behind(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    parts = [
        RandomDrafter(vocab_size=VOCAB),
        "self:1",
        "suffix",
        checkpoint(**TINY, noise=0.1),
        WatchedLookup(),
    ]
    engine = build_engine(checkpoint(**TINY), parts)
    alone = [Way(place) for place in range(5)]
    assert drafter_of(engine).ways == (*alone, Way(1, 2), Way(1, 4), Way(3, 2), Way(3, 4))
    assert engine.draft_name == f"random+self:1+suffix+{parts[3]}+watched"
    assert engine.has_drafter
    assert set(engine.weights) == {"target", "draft"}
    assert len(engine._kv_cache.tensors) == 2
    assert not drafter_of(engine).may_run_ahead
    assert isinstance(parts[4], LookupDrafter)


def test_a_list_of_one_is_that_one(checkpoint: CheckpointFactory, build_engine: EngineFactory) -> None:
    engines = [build_engine(checkpoint(**TINY), given) for given in ("self:1", ("self:1",))]
    assert type(engines[0]._drafter) is type(engines[1]._drafter)
    first, second = (spec(engine, PROMPTS[0], K, **REJECTION) for engine in engines)
    assert_same(second, first)
    assert second.metrics.speculative_decoding == first.metrics.speculative_decoding


def test_every_model_has_a_cache_of_its_own_in_any_format(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    """Law M for a list: the target's first layers in int8 are a model of their own, too."""
    drafts = ["self:1", checkpoint(**TINY, noise=0.1), "suffix", checkpoint(**TINY, noise=0.3)]
    engine = build_engine(checkpoint(**TINY), drafts, draft_weight_dtype="int8")
    assert list(engine.weights) == ["target", "draft", "draft 2", "draft 3"]
    assert [tensor.shape[0] for tensor in engine._kv_cache.tensors][:2] == [2, 1]
    models: list[Any] = [
        part for part in drafter_of(engine).parts if getattr(part, "runner", None) is not None
    ]
    assert [part.runner.model_index for part in models] == [1, 2, 3]
    for sampling in (GREEDY, COUPLED):
        for prompt in PROMPTS:
            assert_same(spec(engine, prompt, K, **sampling), plain(engine, prompt, **sampling))
    tally.check()


def test_each_draft_of_a_list_may_have_a_vocabulary_of_its_own(
    tmp_path: Path, build_engine: EngineFactory, tally: Tally
) -> None:
    tokenizer = tiny_models.build_tokenizer(300)
    model = tiny_models.build_model(vocab_size=300, seed=1)
    other, renumbered = tiny_models.renumbered(model, tokenizer, seed=3)
    target, same, permuted = (
        tiny_models.save_checkpoint(tmp_path / name, each, tokenizer=spelled)
        for name, each, spelled in (
            ("target", model, tokenizer),
            ("same", tiny_models.perturbed(model, noise=0.5), tokenizer),
            ("permuted", other, renumbered),
        )
    )
    engine = build_engine(target, [same, permuted, "ngram"])
    for sampling in (GREEDY, COUPLED):
        choose_ways(engine)
        expected = plain(engine, "a = [1, 2, 3]", **sampling)
        assert_same(spec(engine, "a = [1, 2, 3]", K, **sampling), expected)
        always(Way(1), engine)
        twin = spec(engine, "a = [1, 2, 3]", K, **sampling)
        assert_same(twin, expected)
        assert twin.metrics.speculative_decoding.draft_acceptance_rate == 1.0
    tally.check()
    foreign = tiny_models.save_checkpoint(tmp_path / "foreign", "gpt2", vocab_size=299)
    with pytest.raises(VocabularyMismatchError, match="foreign"):
        build_engine(target, ["ngram", same, foreign])


def test_a_list_works_in_a_call_and_its_engine_is_found_again() -> None:
    call = {"max_new_tokens": 20, "model": str(bundled.target_path())}
    expected = specengine.generate("import os\n" * 3, num_speculative_tokens=0, **call)
    parts = [str(bundled.draft_path()), "suffix"]
    for given in (parts, tuple(parts), ["ngram", "suffix"]):
        result = specengine.generate("import os\n" * 3, draft_model=given, num_speculative_tokens=4, **call)
        assert_same(result, expected)
        assert result.metrics.speculative_decoding.num_accepted_draft_tokens > 0
    specengine.clear_cache()


# -- who is asked, and what they are told -------------------------------------------------------------------------


def test_rows_are_asked_of_the_drafter_of_their_way_alone(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    lookups = [WatchedLookup("a"), WatchedLookup("b")]
    engine = build_engine(checkpoint(**TINY), ["self:1", *lookups])
    chosen: dict[tuple[int, int], Way] = {}

    def choose(sequence: Any, number: int, num_ways: int) -> tuple[int, int]:
        way = random.Random(f"{sequence.request.prompt_ids}, {number}").randrange(num_ways)
        chosen[sequence.sequence_id, sequence.num_tokens] = drafter_of(engine).ways[way]
        return way, 2

    choose_ways(engine, choose)
    expected = [plain(engine, prompt, **GREEDY) for prompt in PROMPTS]
    for lookup in lookups:
        lookup.released.clear()
    for result, truth in zip(spec(engine, PROMPTS, K, **GREEDY), expected, strict=True):
        assert_same(result, truth)
    for place, lookup in enumerate(lookups, 1):
        assert len(lookup.released) == len(set(lookup.released)) == len(PROMPTS)
        asked = [sequence_id for sequence_id, drafted, _ in lookup.followed if not drafted]
        assert asked == [sequence_id for ids in lookup.observed for sequence_id in ids]
        assert any(len(ids) > 1 for ids in lookup.observed)
        assert any(len(drafted) == 2 and limit == K - 2 for _, drafted, limit in lookup.followed)
        assert any(way == Way(0, place) for way in chosen.values())
    tally.check()


def offers_of(drafter: SeveralDrafters, sequence: Any, limit: int) -> tuple[int | None, ...]:
    hosts = [drafter.lookups.get(place) for place in range(len(drafter.parts))]
    return tuple(None if host is None else len(host.follow(sequence, (), limit)) for host in hosts)


def test_offers_say_how_many_drafts_a_lookup_has_and_change_nothing(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    parts = ["self:1", "ngram:2", "suffix", RandomDrafter(vocab_size=VOCAB), "suffix:history"]
    engine = build_engine(checkpoint(**TINY), parts)
    found: list[tuple[int | None, ...]] = []

    def choose(sequence: Any, number: int, num_ways: int) -> tuple[int, int]:
        if sequence.output_ids:
            drafter, rounds = drafter_of(engine), sequence.ways_ahead
            offers = offers_of(drafter, sequence, 3)
            assert offers == offers_of(drafter, sequence, 3)
            assert offers_of(drafter, sequence, 0) == (None, 0, 0, None, 0)
            found.append(offers)
            assert sequence.ways_ahead is rounds
        return 1, 0

    choose_ways(engine, choose)
    prompt = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5]
    result = spec(engine, [prompt, [9]], 3, **GREEDY)
    assert {(offer[0], offer[3]) for offer in found} == {(None, None)}
    assert {offer[1] for offer in found} == {0, 3}
    assert len({offer[2] for offer in found}) > 1
    assert_same(result[0], plain(engine, prompt, **GREEDY))


def test_a_release_reaches_all_though_one_of_them_raises(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    class Stubborn(WatchedLookup):
        def release(self, sequence_id: int) -> None:
            raise RuntimeError("I keep it")

    lookups = [WatchedLookup("a"), Stubborn("b"), WatchedLookup("c")]
    engine = build_engine(checkpoint(**TINY), lookups)
    with pytest.raises(RuntimeError, match="I keep it"):
        spec(engine, PROMPTS[0], K, **GREEDY)
    assert len(lookups[0].released) == len(lookups[2].released) == 1


@pytest.mark.parametrize(
    ("found", "error", "what"),
    [([VOCAB], ValueError, f"id {VOCAB}"), ([0, -1], ValueError, "id -1"), ("ab", TypeError, "'ab'")],
)
def test_a_tail_that_cannot_be_is_refused_by_name(
    found: Any, error: type[Exception], what: str, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    class Wrong(WatchedLookup):
        def follow(self, sequence_id: int, drafted: Sequence[int], limit: int) -> Any:
            return found

    engine = build_engine(checkpoint(**TINY), ["self:1", Wrong("wrong")])
    always(Way(0, 1), engine)
    num_free = engine.num_free_blocks
    with pytest.raises(error, match="'wrong'") as caught:
        spec(engine, PROMPTS[0], K, **GREEDY)
    assert what in str(caught.value)
    assert_idle(engine, num_free)


def test_a_parts_positions_cut_only_its_own_drafts(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    short = checkpoint(seed=3, vocab_size=VOCAB, max_positions=20)
    engine = build_engine(checkpoint(**TINY), [short, "self:2", "ngram:1"])
    prompt = [1, 2, 3, 4] * 3
    expected = plain(engine, prompt, **GREEDY)
    assert_same(spec(engine, prompt, K, **GREEDY), expected)
    drafted = {}
    for way in (Way(0), Way(1), Way(0, 2)):
        always(way, engine)
        result = spec(engine, prompt, K, **GREEDY)
        assert_same(result, expected)
        drafted[way] = result.metrics.speculative_decoding.num_draft_tokens
    assert result.metrics.speculative_decoding.num_rounds > 0
    assert drafted[Way(0)] < drafted[Way(0, 2)]
    tally.check()


def test_rounds_say_who_made_each_draft(checkpoint: CheckpointFactory, build_engine: EngineFactory) -> None:
    """A model's own come first, as many as the lookup was told of; what the lookup found comes behind them."""

    class Noting(WatchedLookup):
        def follow(self, sequence_id: int, drafted: Sequence[int], limit: int) -> list[int]:
            found = super().follow(sequence_id, drafted, limit)
            tails.append((list(drafted), found))
            return found

    tails: list[tuple[list[int], list[int]]] = []
    engine = build_engine(checkpoint(**TINY), ["self:1", Noting()])
    for place in (0, 1):
        always(Way(place), engine)
        rounds = spec(engine, PROMPTS[0], K, **GREEDY, return_rounds=True).outputs[0].rounds or []
        assert {drafter for each in rounds for drafter in each.drafters} == {place}
    always(Way(0, 1), engine, num_own=2)
    tails.clear()
    rounds = spec(engine, PROMPTS[0], K, **GREEDY, return_rounds=True).outputs[0].rounds or []
    known = [(own + found, [0] * len(own) + [1] * len(found)) for own, found in tails]
    assert any(found for _, found in tails)
    for each in rounds:
        assert len(each.drafters) == each.num_draft_tokens == len(each.draft_token_ids)
        if each.num_draft_tokens > 1:
            assert (each.draft_token_ids, each.drafters) in [
                (tokens[: each.num_draft_tokens], places[: each.num_draft_tokens]) for tokens, places in known
            ]


# -- what the models' caches hold ---------------------------------------------------------------------------------


def check_caches(engine: Engine, twins: Iterable[int]) -> int:
    """Models that are the target have its keys and values, as far as they say so. Returns how many tokens."""
    cache, num_checked = engine._kv_cache, 0
    for sequence in engine._scheduler.running:
        if sequence.slot is None:
            continue
        row = cache.block_table[sequence.slot]
        for index in twins:
            count = min(cache.num_computed(sequence.slot, model) for model in (TARGET, index))
            at = torch.arange(count)
            blocks, offsets = row[at // BLOCK].long(), at % BLOCK
            truth, held = (cache.tensors[model][:, :, blocks, :, offsets] for model in (TARGET, index))
            is_same = torch.equal if HAS_BITS else torch.allclose
            assert is_same(truth, held), f"model {index}: not what it says of {count} tokens"
            num_checked += count
    return num_checked


def check_twins(engine: Engine, twins: dict[int, int], sampling: dict[str, Any]) -> None:
    """Drafts of a model that is the target are all accepted, whatever drafted before, and its cache is right.

    twins: places in the list, and which of the cache's tensors is theirs
    """
    sequences: dict[int, Any] = {}
    chosen: dict[tuple[int, int], tuple[Way, int]] = {}
    num_checked = 0

    def choose(sequence: Any, number: int, num_ways: int) -> tuple[int, int]:
        nonlocal num_checked
        num_checked += check_caches(engine, twins.values())
        chance = random.Random(f"{sequence.request.prompt_ids}, {number}")
        way, num_own = chance.randrange(num_ways), chance.randint(0, 4)
        sequences[sequence.sequence_id] = sequence
        chosen[sequence.sequence_id, number] = drafter_of(engine).ways[way], num_own
        sequence.num_speculative_tokens = chance.choice((0, 1, K, K))
        return way, num_own

    choose_ways(engine, choose)
    # Whoever wants log-probabilities keeps rounds from running ahead.
    spec(engine, PROMPTS, K, **{**sampling, "logprobs": None})
    num_own_drafts = num_tailed = 0
    for (sequence_id, number), (way, num_own) in chosen.items():
        rounds = sequences[sequence_id].rounds
        if way.part in twins and number < len(rounds):
            counts = rounds[number]
            own = counts.num_draft if way.tail is None else min(num_own, counts.num_draft)
            assert counts.num_accepted >= own, f"{way}: {counts}, {own} of them are the target's own"
            num_own_drafts += own
            num_tailed += counts.num_accepted > own
    assert num_own_drafts > 20
    assert num_checked > 50
    assert num_tailed > 0 or not any(way.tail is not None for way in drafter_of(engine).ways)


@pytest.fixture
def twins(checkpoint: CheckpointFactory, tmp_path: Path) -> list[Any]:
    """The target, and two models that are it."""
    paths = [checkpoint(**TINY)]
    for name in ("first", "second"):
        link = tmp_path / name
        link.mkdir()
        for file in paths[0].iterdir():
            (link / file.name).symlink_to(file)
        paths.append(link)
    return paths


@pytest.mark.parametrize("sampling", [GREEDY, REJECTION, BLOCKWISE], ids=["greedy", "rejection", "block"])
def test_b_what_the_target_drafts_is_accepted_whoever_drafted_before(
    sampling: dict[str, Any], twins: list[Any], build_engine: EngineFactory
) -> None:
    engine = build_engine(twins[0], ["self:1", twins[1], "ngram:1-3", twins[2]])
    check_twins(engine, {1: 1, 3: 2}, sampling)
    only_models = build_engine(twins[0], [twins[1], "self:1", twins[2]])
    assert drafter_of(only_models).may_run_ahead
    check_twins(only_models, {0: 1, 2: 2}, sampling)


def note_what_was_never_fed(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    note = DraftModelDrafter._set_computed
    patch.setattr(DraftModelDrafter, "_set_computed", lambda part, slot, count: note(part, slot, count + 1))


def note_tails_as_computed(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    observe = DraftModelDrafter.observe

    def faulty(part: Any, batch: Any, results: Any) -> None:
        limits = [K if limit else 0 for limit in batch.draft_limits]
        observe(part, batch._replace(draft_limits=tuple(limits)), results)

    patch.setattr(DraftModelDrafter, "observe", faulty)


def note_others_drafts_as_computed(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    observe = DraftModelDrafter.observe

    def faulty(part: Any, batch: Any, results: Any) -> None:
        limits = [1 if result is None else result.num_draft for result in results]
        observe(part, batch._replace(draft_limits=tuple(limits)), results)

    patch.setattr(DraftModelDrafter, "observe", faulty)


def nothing_is_caught_up_with(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DraftModelDrafter, "_gap", lambda *_: draft_model._NO_GAP)


def forget_the_ways_of_rounds_under_way(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """Each takes every round under way for one in which it drafted."""
    gap = DraftModelDrafter._gap

    def faulty(self: Any, sequence: Any, limit: int) -> Any:
        ahead, sequence.ways_ahead = sequence.ways_ahead, [self._place for _ in sequence.ways_ahead]
        try:
            return gap(self, sequence, limit)
        finally:
            sequence.ways_ahead = ahead

    patch.setattr(DraftModelDrafter, "_gap", faulty)


@pytest.mark.parametrize(
    "plant",
    [
        note_what_was_never_fed,
        note_tails_as_computed,
        note_others_drafts_as_computed,
        nothing_is_caught_up_with,
    ],
)
def test_b_notices_a_cache_that_is_not_what_it_says(
    plant: Callable[..., None], twins: list[Any], build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(twins[0], ["self:1", twins[1], "ngram:1-3", twins[2]])
    plant(engine, monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        check_twins(engine, {1: 1, 3: 2}, GREEDY)


def test_b_notices_a_model_that_does_not_know_who_drafted_ahead(
    twins: list[Any], build_twins: BuildTwins, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ahead = build_twins(twins[0], [twins[1], twins[2]])
    forget_the_ways_of_rounds_under_way(ahead, monkeypatch)
    with pytest.raises(AssertionError):
        check_twins(ahead, {0: 1, 1: 2}, GREEDY)


# -- rounds of one drafter are its own ----------------------------------------------------------------------------


def test_rounds_of_one_part_are_recorded_as_its_own_and_mixed_ones_run_from_python(
    checkpoint: CheckpointFactory, build_twins: BuildTwins
) -> None:
    parts = ["self:1", checkpoint(**TINY, noise=0.1), "ngram"]
    _, replayed = build_twins(checkpoint(**TINY), parts)
    keys: list[Any] = []
    prepare = drafter_of(replayed).prepare

    def watched(batch: Any, state: Any) -> Any:
        keys.append(prepare(batch, state))
        return keys[-1]

    replayed._drafter.prepare = watched  # type: ignore[method-assign]
    for way in (Way(0), Way(1), Way(2), Way(1, 2)):
        always(way, replayed)
        params = SamplingParams(**GREEDY, num_speculative_tokens=K)
        keys.clear()
        replayed.generate(PROMPTS[:2], params)
        assert keys
        assert all((key is None) == (way.tail is not None) for key in keys)
        assert way.tail is not None or {key[0] for key in keys} == {way.part}
    choose_ways(replayed, lambda sequence, *_: (sequence.prompt_length % 2, 0))
    keys.clear()
    replayed.generate([*PROMPTS[:2], PROMPTS[3]], params)
    assert None in keys


def test_a_tail_ends_before_a_draft_whose_distribution_is_none(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a model drafted in vain is not followed, and not noted."""
    lookup = WatchedLookup()
    engine = build_engine(checkpoint(**TINY), [checkpoint(**TINY, noise=0.1), lookup])
    always(Way(0, 1), engine, num_own=3)
    expected = plain(engine, PROMPTS[0], **GREEDY)
    propose = DraftModelDrafter.propose

    def stopped(self: Any, batch: Any, state: Any) -> DraftProposal:
        proposal = propose(self, batch, state)
        return DraftProposal(proposal.tokens, proposal.num_tokens.clamp_max(1))

    monkeypatch.setattr(DraftModelDrafter, "propose", stopped)
    lookup.followed.clear()
    result = spec(engine, PROMPTS[0], K, **GREEDY)
    assert_same(result, expected)
    assert result.metrics.speculative_decoding.num_draft_tokens > 0
    assert all(len(drafted) < 2 for _, drafted, _ in lookup.followed)


# Requests that one of them alone drafts for


@pytest.mark.parametrize("k", [3, "auto"])
def test_a_request_is_drafted_for_by_the_one_it_names(
    checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch, k: int | str
) -> None:
    """Beside others that leave it open, and beside those that name another: and every text is what it was."""
    target, draft = checkpoint("gpt2", seed=9), str(checkpoint("gpt2", seed=9, noise=0.02))
    options: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True, "num_speculative_tokens": k}
    names, used = [draft, "suffix", None], {name: set() for name in (draft, "suffix", None)}  # type: ignore[var-annotated]
    prompts = [[*make_prompt(6), *make_prompt(6)] for _ in names]
    with Engine(target, [draft, "suffix"], dtype="float32", block_size=4, num_threads=1) as engine:
        assert engine.draft_names == [draft, "suffix"]
        plain = engine.generate(prompts, max_new_tokens=40, ignore_eos=True, num_speculative_tokens=0)
        assert isinstance(plain, list)
        launch = engine._rounds.launch

        def note(sequences: list[Any], **limits: Any) -> int:
            for sequence in sequences:
                if sequence.max_draft_tokens > 0:
                    used[sequence.params.only_drafter].add(engine._drafter.ways[sequence.way].part)  # type: ignore[union-attr]
            return launch(sequences, **limits)

        monkeypatch.setattr(engine._rounds, "launch", note)
        params = [SamplingParams(**options, only_drafter=name) for name in names]
        for given in ([0, 1, 2], [0], [1], [0, 1]):
            results = engine.generate([prompts[i] for i in given], [params[i] for i in given])
            assert isinstance(results, list)
            for i, result in zip(given, results, strict=True):
                assert result.token_ids == plain[i].token_ids
        assert used[draft] == {0}
        assert used["suffix"] == {1}
        with pytest.raises(
            ValueError, match=f"only_drafter='other' is none of this engine's: '{draft}', 'suffix'"
        ):
            engine.generate(prompts[0], only_drafter="other")


def test_where_one_drafts_its_name_may_be_given(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    engine = build_engine(checkpoint("gpt2", seed=9), "suffix")
    prompt = make_prompt(6)
    assert_same(engine.generate(prompt, only_drafter="suffix"), engine.generate(prompt))
    with pytest.raises(ValueError, match="is none of this engine's: none"):
        build_engine(checkpoint("gpt2", seed=9)).generate(prompt, only_drafter="suffix")
