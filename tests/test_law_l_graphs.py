"""Law L: a round that was recorded once and is replayed gives what the same round gives when Python runs it.

On a GPU the recordings are CUDA graphs. Elsewhere `EagerRecorder` stands in: it runs the same code again on the batch
that was recorded, padded to its size, with everything the host knew then frozen.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from law_helpers import (
    BuildTwins,
    CheckpointFactory,
    EagerRecorder,
    EngineFactory,
    Tally,
    assert_idle,
    assert_same,
    make_prompt,
)
from scripted_drafters import ScriptedDrafter

from specengine.config import SamplingParams
from specengine.engine import Engine, assembly
from specengine.errors import GraphCaptureError
from specengine.runtime import graphs
from specengine.runtime.kv_cache import KVCache, _DeviceTable
from specengine.runtime.state import BatchState

pytestmark = pytest.mark.filterwarnings("ignore:acceptance=")

VOCAB = 64
MODES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 3, "acceptance": "coupled"},
    {"temperature": 0.8, "seed": 4, "acceptance": "rejection"},
    {"temperature": 1.1, "seed": 5, "acceptance": "coupled", "top_k": 12, "top_p": 0.9},
    {"temperature": 0.7, "seed": 6, "acceptance": "block", "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.9, "seed": 7, "acceptance": "typical", "acceptance_threshold": 0.05},
]
Pair = tuple[Path, Path]


@pytest.fixture
def pair(checkpoint: CheckpointFactory) -> Pair:
    return checkpoint(seed=1), checkpoint(seed=1, noise=0.1)


def make_params(count: int, seed: int = 0, **common: Any) -> list[SamplingParams]:
    """Modes, k and lengths mixed, so that batches shrink and k changes while they run."""
    rng = random.Random(seed)
    return [
        SamplingParams(
            **MODES[(row + seed) % len(MODES)],
            num_speculative_tokens=rng.choice((0, 1, 3, 4, 5)),
            max_new_tokens=rng.randint(3, 26),
            ignore_eos=True,
            **common,
        )
        for row in range(count)
    ]


def compare(direct: Engine, replayed: Engine, prompts: list[Any], params: list[SamplingParams]) -> int:
    """Equal results from both; returns the number of tokens."""
    expected, results = direct.generate(prompts, params), replayed.generate(prompts, params)
    for result, truth in zip(results, expected, strict=True):
        assert_same(result, truth)
        ours, theirs = (each.metrics.speculative_decoding for each in (result, truth))
        assert ours == theirs
        assert [each.rounds for each in result.outputs] == [each.rounds for each in truth.outputs]
    return sum(len(result.token_ids) for result in results)


def check_every_size(direct: Engine, replayed: Engine, order: list[int], **common: Any) -> None:
    """Batches of the given sizes one after another, on recordings for 1, 2, 4, 8 and the most."""
    num_free = replayed.num_free_blocks
    for count in order:
        prompts = [make_prompt(2 + 3 * row, row + count, VOCAB) for row in range(count)]
        compare(direct, replayed, prompts, make_params(count, count, **common))
    assert_idle(replayed, num_free)


def test_batches_of_one_to_nine_growing_and_shrinking(
    pair: Pair, build_twins: BuildTwins, tally: Tally
) -> None:
    direct, replayed = build_twins(*pair, max_batch_size=9)
    check_every_size(direct, replayed, [*range(1, 10), *range(9, 0, -1), 1, 9, 3, 8, 2])
    report = replayed.graph_report
    assert report is not None
    assert report.num_graphs > 5
    tally.check()


def test_logprobs_biases_and_minimum_lengths(pair: Pair, build_twins: BuildTwins, tally: Tally) -> None:
    """Log-probabilities are read before the next round overwrites them; transforms end while others go on."""
    direct, replayed = build_twins(*pair)
    check_every_size(direct, replayed, [1, 4, 3], logprobs=2)
    check_every_size(direct, replayed, [2, 3], logit_bias={5: 3.0}, min_new_tokens=2, stop_token_ids=[9, 11])
    tally.check()


def test_drafts_are_read_before_the_next_round(pair: Pair, build_twins: BuildTwins, tally: Tally) -> None:
    direct, replayed = build_twins(*pair, rounds_ahead=2)
    check_every_size(direct, replayed, [1, 4, 3], return_rounds=True)
    tally.check()


@pytest.mark.parametrize("rounds_ahead", [0, 1, 2, 4])
def test_the_host_may_lag_behind(
    pair: Pair, build_twins: BuildTwins, rounds_ahead: int, tally: Tally
) -> None:
    """Sequences that ended, by an id or by their budget, run on for a while: nobody hears of it."""
    direct, replayed = build_twins(*pair, rounds_ahead=rounds_ahead)
    check_every_size(direct, replayed, [1, 5, 8], stop_token_ids=list(range(0, VOCAB, 7)))
    tally.check()


@pytest.mark.parametrize("rounds_ahead", [1, 3])
def test_joining_leaving_and_aborting_at_any_step(
    pair: Pair, build_twins: BuildTwins, rounds_ahead: int, tally: Tally
) -> None:
    """Slots and blocks go from sequence to sequence while their last rounds are under way."""
    direct, replayed = build_twins(*pair, rounds_ahead=rounds_ahead, max_batch_size=4)
    prompts = [make_prompt(3 + 2 * row, row, VOCAB) for row in range(10)]
    params = make_params(10, 2)
    expected = direct.generate(prompts, params)
    num_free, rng = replayed.num_free_blocks, random.Random(7)
    waiting, owners, leaving = list(range(10)) * 3, dict[int, int](), dict[int, int]()
    rng.shuffle(waiting)
    finished = 0
    while waiting or replayed.has_work:
        for _ in range(min(len(waiting), rng.randint(0, 2))):
            row = waiting.pop()
            request = replayed.add_request(prompts[row], params[row])
            owners[request] = row
            if rng.random() < 0.3:
                leaving[request] = rng.randint(0, 5)
        for event in replayed.step():
            if event.result is not None and event.finish_reason != "abort":
                assert_same(event.result, expected[owners[event.index]])
                finished += 1
        for request in [request for request, steps in leaving.items() if steps == 0]:
            replayed.abort(request)
            del leaving[request]
        leaving = {request: steps - 1 for request, steps in leaving.items()}
        replayed._kv_cache.manager.check_invariants()
    assert finished > 15
    assert_idle(replayed, num_free)
    tally.check()


@pytest.mark.parametrize("num_blocks", [13, 20])
def test_preemption_waits_for_what_is_under_way(
    pair: Pair, build_twins: BuildTwins, num_blocks: int, tally: Tally
) -> None:
    _, replayed = build_twins(*pair, num_blocks=num_blocks, rounds_ahead=2)
    roomy, _ = build_twins(*pair)
    prompts = [make_prompt(length, length, VOCAB) for length in (10, 9, 10, 8)]
    params = [
        SamplingParams(max_new_tokens=22, num_speculative_tokens=3, ignore_eos=True, **mode)
        for mode in MODES[:4]
    ]
    expected, results = roomy.generate(prompts, params), replayed.generate(prompts, params)
    for result, truth in zip(results, expected, strict=True):
        assert_same(result, truth)
    assert sum(result.metrics.num_preemptions for result in results) > 0
    tally.check()


def test_samples_of_one_prompt_and_shared_prefixes(pair: Pair, build_twins: BuildTwins, tally: Tally) -> None:
    direct, replayed = build_twins(*pair, rounds_ahead=2)
    shared = make_prompt(13, 1, VOCAB)
    params = [
        SamplingParams(max_new_tokens=14, n=3, ignore_eos=True, num_speculative_tokens=3, **MODES[1])
    ] * 3
    for _ in range(2):
        compare(direct, replayed, [shared, [*shared, 7, 8], shared[:9]], params)
    tally.check()


def test_scripted_drafters_enter_by_an_upload(
    checkpoint: CheckpointFactory, build_twins: BuildTwins, tally: Tally
) -> None:
    """A longer prompt after a shorter one; every count of accepted tokens; block edges inside a replay."""
    drafter = ScriptedDrafter(vocab_size=VOCAB, counts=(1, 0, 4, 2))
    direct, replayed = build_twins(checkpoint("gpt2", seed=1), drafter)
    for length in (2, 14, 5, 31, 3):
        prompt = make_prompt(length, 3, VOCAB)
        drafter.learn(direct.generate(prompt, max_new_tokens=24, ignore_eos=True, num_speculative_tokens=0))
        for k in (1, 4, 3, 0, 8):
            params = SamplingParams(max_new_tokens=21, ignore_eos=True, num_speculative_tokens=k)
            compare(direct, replayed, [prompt], [params])
    tally.check()


def test_two_engines_that_take_turns(pair: Pair, build_twins: BuildTwins, tally: Tally) -> None:
    direct, replayed = build_twins(*pair)
    other_direct, other = build_twins(*reversed(pair))
    prompts = [make_prompt(4 + row, row, VOCAB) for row in range(3)]
    params = make_params(3, 1)
    expected = [direct.generate(prompts, params), other_direct.generate(prompts, params)]
    engines = (replayed, other)
    owners = [
        {
            engine.add_request(prompt, given): row
            for row, (prompt, given) in enumerate(zip(prompts, params, strict=True))
        }
        for engine in engines
    ]
    while any(engine.has_work for engine in engines):
        for engine, truths, rows in zip(engines, expected, owners, strict=True):
            for event in engine.step():
                if event.result is not None:
                    assert event.result.token_ids == truths[rows[event.index]].token_ids
    tally.check()


def test_padding_writes_nothing(
    pair: Pair, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recording runs rounds of padding only: no state, no block and no sequence is touched."""
    monkeypatch.setattr(assembly, "build_recorder", lambda *_: EagerRecorder())
    engine = build_engine(*pair)
    before = [tensor.clone() for tensor in engine._kv_cache.tensors]
    state = engine._state
    engine._record_rounds()
    report = engine.graph_report
    assert report is not None
    assert report.num_graphs == 2 * len(graphs.sizes(8))
    for tensor, old in zip(engine._kv_cache.tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(), old.nan_to_num())
    assert not state.tokens.any()
    assert not state.seq_len.any()


# -- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neox", "llama", "qwen3"])
def test_cuda_graphs_give_what_python_gives(
    model_type: str, dtype: str, checkpoint: CheckpointFactory, build_twins: BuildTwins, tally: Tally
) -> None:
    """Every mode, batches that grow and shrink, sequences that stop, log-probabilities, one round ahead."""
    models = checkpoint(model_type, seed=1), checkpoint(model_type, seed=1, noise=0.1)
    on_gpu = {"backend": "triton", "device": "cuda", "dtype": dtype, "max_batch_size": 9, "block_size": 16}
    direct, replayed = build_twins(*models, **on_gpu)
    check_every_size(direct, replayed, [*range(1, 10), *range(9, 0, -1), 1, 9, 3, 8, 2])
    check_every_size(direct, replayed, [1, 4, 3, 9], logprobs=2)
    check_every_size(direct, replayed, [1, 5, 8], stop_token_ids=list(range(0, VOCAB, 7)))
    report = replayed.graph_report
    assert report is not None
    assert report.num_graphs > 5
    tally.check()


@pytest.mark.gpu
def test_graphs_recorded_at_the_start(checkpoint: CheckpointFactory, build_twins: BuildTwins) -> None:
    models = checkpoint("gpt2", seed=1), checkpoint("gpt2", seed=1, noise=0.1)
    on_gpu = {"backend": "triton", "device": "cuda", "dtype": "float16", "block_size": 16}
    _, replayed = build_twins(*models, cuda_graphs=True, **on_gpu)
    report = replayed.graph_report
    assert report is not None
    assert report.num_graphs == 2 * len(graphs.sizes(8))
    assert report.seconds > 0


# -- sizes and rings ----------------------------------------------------------------------------------------------


def test_every_batch_and_every_k_has_the_smallest_bucket_that_holds_it() -> None:
    for most in (1, 2, 3, 8, 9, 32, 33, 100):
        known = graphs.sizes(most)
        assert known == sorted(set(known))
        assert known[-1] == most
        for count in range(1, most + 1):
            size = graphs.bucket(count, known)
            assert size >= count
            assert all(other < count for other in known if other < size)
    assert [graphs.draft_bucket(k) for k in (0, 3, 8, 9, 17, 64)] == [0, 3, 8, 10, 24, 64]


def test_a_ring_keeps_as_many_results_as_it_has_entries() -> None:
    ring = graphs.ResultRing(num_entries=3, num_values=8, device=torch.device("cpu"))
    record = torch.zeros(2, 4, dtype=torch.int32)
    pending = [ring.push(record.fill_(turn)) for turn in range(3)]
    assert [each.read()[1][3] for each in pending] == [0, 1, 2]


def test_what_cannot_be_recorded_is_named(
    pair: Pair, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(EagerRecorder):
        def record(self, name: str, run: Any) -> Any:
            raise GraphCaptureError(f"the round of {name} cannot be recorded as a CUDA graph: planted")

    monkeypatch.setattr(assembly, "build_recorder", lambda *_: Broken())
    engine = build_engine(*pair)
    prompt = make_prompt(5, 1, VOCAB)
    with pytest.warns(RuntimeWarning, match=r"1 sequences, k = 3, RoundMode.*planted"):
        result = engine.generate(prompt, max_new_tokens=9, num_speculative_tokens=3)
    assert result.token_ids == build_engine(pair[0]).generate(prompt, max_new_tokens=9).token_ids
    assert engine.graph_report is None
    engine = build_engine(*pair)
    engine._rounds._is_strict = True
    with pytest.raises(GraphCaptureError, match="k = 3"):
        engine.generate(prompt, max_new_tokens=9, num_speculative_tokens=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_graphs_that_are_asked_for_in_vain_are_an_error(pair: Pair, build_engine: EngineFactory) -> None:
    with pytest.raises(ValueError, match="cuda_graphs=True needs backend='triton' on a CUDA device"):
        build_engine(*pair, cuda_graphs=True)


# -- planted faults -----------------------------------------------------------------------------------------------


def freeze_the_plan(patch: pytest.MonkeyPatch) -> None:
    """Lengths as they were when the round was recorded."""
    plan, first = BatchState.plan, {}

    def mutant(self: BatchState, batch: Any, **named: Any) -> Any:
        fresh = plan(self, batch, **named)
        if batch.sequence_ids:
            return fresh
        return first.setdefault((id(self), batch.slots.numel(), batch.k), fresh)

    patch.setattr(BatchState, "plan", mutant)


def forget_new_slots(patch: pytest.MonkeyPatch) -> None:
    """Rows keep the slots, seeds and temperatures of whoever had them first."""
    select_rows = BatchState._select_rows

    def mutant(self: BatchState, slots: list[int], size: int) -> Any:
        known, *kept = self._selected.get(size, ([],))
        return kept if any(slot != self.num_slots for slot in known) else select_rows(self, slots, size)

    patch.setattr(BatchState, "_select_rows", mutant)
    patch.setattr(BatchState, "_forget_selections", lambda self: None)


def keep_the_first_block_table(patch: pytest.MonkeyPatch) -> None:
    """Blocks that a sequence got later are the scratch block's to the device."""
    tables: dict[int, torch.Tensor] = {}

    def mutant(self: _DeviceTable) -> torch.Tensor:
        return tables.setdefault(id(self), self._table.clone())

    patch.setattr(_DeviceTable, "current", mutant)


def reserve_as_if_nothing_were_under_way(patch: pytest.MonkeyPatch) -> None:
    reserve = KVCache.reserve

    def mutant(self: KVCache, slot: int, first: int, num_tokens: int) -> None:
        reserve(self, slot, first, min(num_tokens, max(first + 1, num_tokens - 5)))

    patch.setattr(KVCache, "reserve", mutant)


@pytest.mark.parametrize(
    "plant",
    [freeze_the_plan, forget_new_slots, keep_the_first_block_table, reserve_as_if_nothing_were_under_way],
)
def test_the_law_notices(
    plant: Callable[[pytest.MonkeyPatch], None],
    pair: Pair,
    build_twins: BuildTwins,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    direct, replayed = build_twins(*pair)
    prompts = [make_prompt(5 + row, row, VOCAB) for row in range(3)]
    params = [SamplingParams(max_new_tokens=20, num_speculative_tokens=4, ignore_eos=True)] * 3
    expected = direct.generate(prompts, params)

    def check() -> None:
        for rows in ([0], [1, 2], [0, 1, 2], [2]):
            results = replayed.generate([prompts[row] for row in rows], params[: len(rows)])
            for row, result in zip(rows, results, strict=True):
                assert_same(result, expected[row])

    plant(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        check()
