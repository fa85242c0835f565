"""Law E: sampling with speculation has exactly the target's distribution, whatever drafts.

The law is enumerated in float64 with filters of its own; the samples come from the engine, or, faster and
without its queues, from `run_round` on a full batch.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import tokenizers
import torch
from law_helpers import name_weights, run_part_by_part
from scipy.stats import chi2
from torch import Tensor
from torch.nn.functional import one_hot
from vocabulary_pairs import bare_words, byte_level_words

from specengine import DraftProposal, Engine, SamplingParams, rng, speculative
from specengine.adaptive import Chooser
from specengine.drafters.base import RowResult
from specengine.drafters.draft_model import DraftModelDrafter
from specengine.drafters.no_draft import NoDrafter
from specengine.kernels.reference.filter_rows import filtered_log_probs
from specengine.kernels.reference.sample_rows import race
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.rules import Rule
from specengine.ops.backend import Backend
from specengine.runtime import model_runner
from specengine.runtime.batch import Feed
from specengine.runtime.kv_cache import TARGET
from specengine.runtime.state import RoundMode, RunningBatch

VOCAB = 8
PROMPT = (3, 1)
NUM_TOKENS = 4  # the prompt's forward decides the first; one fully accepted round the other three
K = 3
ALPHA = 1e-9
NUM_SAMPLES = 200_000
BATCH = 4096


@dataclass(frozen=True)
class Filters:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    acceptance_threshold: float = 0.1
    acceptance_delta: float = 0.3

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def __str__(self) -> str:
        penalties = "-penalties" if self.has_penalties else ""
        return f"T{self.temperature:g}-k{self.top_k}-p{self.top_p:g}-m{self.min_p:g}{penalties}"


# -- the law -----------------------------------------------------------------------------------------------------


def filtered_probs(logits: Tensor, filters: Filters) -> Tensor:
    """Rows of float64 logits as distributions: temperature, top-k, top-p on the kept mass, min-p."""
    rows = (logits.double() / filters.temperature).softmax(dim=-1)
    for row in rows:
        order = row.argsort(descending=True)
        if filters.top_k:
            row[order[filters.top_k :]] = 0.0
        row /= row.sum()
        before = row[order].cumsum(0) - row[order]
        row[order[before >= filters.top_p]] = 0.0
        row[row < filters.min_p * row.max()] = 0.0
        row /= row.sum()
    return rows


def exact_law(model: torch.nn.Module, filters: Filters) -> np.ndarray:
    """P(t_0, …, t_3) after the prompt, `[8, 8, 8, 8]`."""
    model = copy.deepcopy(model).double()
    tokens, law = torch.tensor([PROMPT]), torch.ones(1, dtype=torch.float64)
    for _ in range(NUM_TOKENS):
        with torch.no_grad():
            logits = model(tokens).logits[:, -1]
            seen = logits.gather(1, tokens)
            seen = torch.where(seen < 0, seen * filters.repetition_penalty, seen / filters.repetition_penalty)
            logits = logits.scatter(1, tokens, seen)
            count = one_hot(tokens[:, len(PROMPT) :], VOCAB).sum(dim=1)
            logits = logits - count * filters.frequency_penalty - (count > 0) * filters.presence_penalty
            probs = filtered_probs(logits, filters)
        law = (law[:, None] * probs).flatten()
        following = torch.arange(VOCAB).repeat(len(tokens))[:, None]
        tokens = torch.cat((tokens.repeat_interleave(VOCAB, dim=0), following), dim=1)
    return law.reshape((VOCAB,) * NUM_TOKENS).numpy()


def p_value(counts: np.ndarray, probs: np.ndarray) -> float:
    """Chi-square goodness of fit; cells that expect fewer than 5 are pooled."""
    expected = probs.flatten() * counts.sum()
    observed = counts.flatten().astype(float)
    is_small = expected < 5
    expected = np.append(expected[~is_small], expected[is_small].sum())
    observed = np.append(observed[~is_small], observed[is_small].sum())
    if expected[-1] < 5 and len(expected) > 1:  # the pool itself is too small: join it to the smallest cell
        smallest = expected[:-1].argmin()
        for cells in (expected, observed):
            cells[smallest] += cells[-1]
        expected, observed = expected[:-1], observed[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(chi2.sf(statistic, max(1, len(expected) - 1)))


@dataclass
class Samples:
    """Counts of (t_0, …, t_3) `[8, 8, 8, 8]`, and what speculation did to get them."""

    counts: np.ndarray
    num_accepted: int
    num_rejected: int


def check_tally(*samples: Samples) -> None:
    assert sum(each.num_accepted for each in samples) > 0, "nothing was accepted"
    assert sum(each.num_rejected for each in samples) > 0, "nothing was rejected"


def check_distribution(samples: Samples, law: np.ndarray) -> None:
    """The law itself: support, and all 512 three-token sequences, the first three and the last three."""
    assert samples.counts.sum() > 0
    outside = int(samples.counts[law == 0].sum())
    assert outside == 0, f"{outside} samples outside the target's support"
    for name, axis in (("first", 3), ("last", 0)):
        value = p_value(samples.counts.sum(axis), law.sum(axis))
        assert value > ALPHA, f"the {name} three tokens: chi-square p = {value:.3g}"


# -- drafters with a law of their own ----------------------------------------------------------------------------


class MarkovDrafter:
    """Draws from its own table: filtered otherwise than the target, with tokens that it never proposes."""

    name = "markov"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        table = torch.rand(VOCAB, VOCAB, generator=generator) ** 2
        table[torch.rand(VOCAB, VOCAB, generator=generator) < 0.3] = 0.0
        self._table = table / table.sum(dim=1, keepdim=True)
        self._generator = generator

    def propose(self, batch: RunningBatch) -> DraftProposal:
        last = batch.tokens[batch.slots.long(), batch.seq_len.long() - 1].long()
        tokens, probs = [], []
        for _ in range(max(batch.draft_limits)):
            probs.append(self._table[last])
            last = torch.multinomial(probs[-1], 1, generator=self._generator)[:, 0]
            tokens.append(last)
        drawn = torch.stack(tokens, dim=1).int()
        return DraftProposal.from_probs(
            drawn, batch.max_draft, torch.stack(probs, dim=1), batch.rows.temperature
        )

    def observe(self, batch: RunningBatch, num_accepted: Tensor) -> None:
        pass

    def release(self, sequence_id: int) -> None:
        pass


class PointMassDrafter(MarkovDrafter):
    """Always proposes the same successors of a token: a likely one, then whichever."""

    name = "point mass"

    def __init__(self, target: torch.nn.Module) -> None:
        super().__init__()
        with torch.no_grad():
            self._likely = target(torch.arange(VOCAB)[:, None]).logits[:, 0].argmax(dim=1).int()

    def propose(self, batch: RunningBatch) -> DraftProposal:
        last = batch.tokens[batch.slots.long(), batch.seq_len.long() - 1]
        steps = torch.arange(max(batch.draft_limits), dtype=torch.int32)
        return DraftProposal((self._likely[last.long()][:, None] + steps) % VOCAB, batch.max_draft)


# -- sampling ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The target, and a draft of whose eight tokens six are the target's, under other ids."""
    directory = tmp_path_factory.mktemp("foreign")
    words = [
        tokenizers.Tokenizer(tokenizers.models.WordLevel({word: index for index, word in enumerate(spelled)}))
        for spelled in ("abcdefgh", "fxbdyaec")
    ]
    target, draft = (
        tiny_models.save_checkpoint(directory / name, build_tiny(seed), tokenizer=tokenizer)
        for name, seed, tokenizer in zip(("target", "draft"), (1, 2), words, strict=True)
    )
    return target, draft


@pytest.fixture(scope="module")
def target() -> torch.nn.Module:
    return build_tiny(seed=1)


def build_tiny(seed: int, model_type: str = "gpt2", **sizes: int) -> torch.nn.Module:
    same = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_positions": 16}
    return tiny_models.build_model(model_type, vocab_size=VOCAB, seed=seed, **{**same, **sizes})


def build_engine(target: torch.nn.Module, draft: str) -> Engine:
    drafters: dict[str, Any] = {
        "model": build_tiny(2),
        "markov": MarkovDrafter(),
        "point": PointMassDrafter(target),
    }
    return build_pair(target, drafters[draft])


def build_pair(target: torch.nn.Module | Path, drafter: Any, **weights: str) -> Engine:
    return Engine(
        target,
        drafter,
        backend="native",
        max_batch_size=BATCH,
        block_size=8,
        prefill_chunk_size=BATCH * len(PROMPT),
        **weights,
    )


def sample_params(filters: Filters, acceptance: str, *, seed: int, n: int, **asked: Any) -> SamplingParams:
    return SamplingParams(
        **vars(filters),
        **asked,
        acceptance=acceptance,
        seed=seed,
        n=n,
        max_new_tokens=NUM_TOKENS,
        num_speculative_tokens=K,
        ignore_eos=True,
    )


def sample_engine(
    engine: Engine,
    filters: Filters,
    acceptance: str,
    num_samples: int,
    *,
    k: int | str = K,
    **asked: Any,
) -> Samples:
    """Through `Engine.generate`, every queue included; one request in 16 asks for two samples."""
    samples = Samples(np.zeros((VOCAB,) * NUM_TOKENS, dtype=np.int64), 0, 0)
    for first in range(0, num_samples, 272):
        params = [
            replace(
                sample_params(filters, acceptance, seed=first + index, n=2 if index < 16 else 1, **asked),
                num_speculative_tokens=k,
            )
            for index in range(256)
        ]
        for result in engine.generate([PROMPT] * len(params), params):
            for output in result.outputs:
                samples.counts[tuple(output.token_ids)] += 1
            statistics = result.metrics.speculative_decoding
            samples.num_accepted += statistics.num_accepted_draft_tokens
            samples.num_rejected += sum(statistics.rejection_positions)
    return samples


@torch.inference_mode()
def sample_rounds(engine: Engine, filters: Filters, acceptance: str, num_samples: int) -> Samples:
    """The engine's own runners, cache and drafter, without its queues: the prompt, then `run_round`."""
    manager, length = engine._kv_cache.manager, len(PROMPT)
    prompt = np.asarray(PROMPT, dtype=np.int32)
    slots = [manager.allocate(prompt, 0) for _ in range(BATCH)]
    for slot in slots:
        engine._kv_cache.reserve(slot, 0, length + NUM_TOKENS)
    samples = Samples(np.zeros((VOCAB,) * NUM_TOKENS, dtype=np.int64), 0, 0)
    try:
        for first in range(0, num_samples, BATCH):
            tokens = _sample_batch(engine, slots, filters, acceptance, first, samples)
            np.add.at(samples.counts, tuple(tokens[: num_samples - first].T.numpy()), 1)
    finally:
        for slot in slots:
            manager.free(slot)
    return samples


def _sample_batch(
    engine: Engine, slots: list[int], filters: Filters, acceptance: str, first: int, samples: Samples
) -> Tensor:
    state, manager, start = engine._state, engine._kv_cache.manager, len(PROMPT)
    for slot in slots:
        manager.rollback(slot, 0)
    seeds = torch.arange(first, first + len(slots)) * 7919 + 1
    state.tokens[slots, :start] = torch.tensor(PROMPT, dtype=torch.int32)
    state.seq_len[slots] = start
    state.length_limit[slots] = end = start + NUM_TOKENS
    state.num_speculative[slots] = K
    batch = state.plan(_build_batch(engine, slots, seeds, filters, acceptance, k=0))
    count, none = len(slots), NoDrafter()
    q_len, one = torch.full_like(batch.seq_len, start), torch.ones_like(batch.seq_len)
    feed = Feed(torch.zeros_like(q_len), q_len, one, count * start, count)
    judged = engine._target.judge(engine._target.build(batch, feed), batch)
    proposal = none.propose(batch, state)
    row_start = one.cumsum(0).int() - 1
    outcome = speculative.verify(
        engine._target.backend, judged.logits, judged.stats, row_start, proposal, batch
    )
    speculative.commit(outcome, batch, state)
    for slot in slots:
        manager.set_computed(slot, TARGET, start)
    rows = torch.arange(len(slots))
    while rows.numel():
        running = [slots[row] for row in rows.tolist()]
        lengths = state.seq_len[running]
        k = int((end - 1 - lengths).clamp(max=K).max())
        batch = _build_batch(engine, running, seeds[rows], filters, acceptance, k=k)
        drafter = engine._drafter if k else none
        drafter.prepare(batch, state)
        outcome, _ = speculative.run_round(batch, state, engine._target, drafter)
        results = zip(running, lengths.tolist(), outcome.num_draft.tolist(), strict=True)
        drafter.observe(batch, [RowResult(*result, 0) for result in results])
        drafted, accepted = outcome.num_draft, outcome.num_accepted
        computed, kept = (lengths + drafted).tolist(), (lengths + accepted).tolist()
        for slot, reached, committed in zip(running, computed, kept, strict=True):
            manager.set_computed(slot, TARGET, reached)
            manager.rollback(slot, committed)
        samples.num_accepted += int(accepted.sum())
        samples.num_rejected += int((accepted < drafted).sum())
        rows = rows[state.seq_len[running] < end]
    return state.tokens[slots, start:end].long()


def _build_batch(
    engine: Engine, slots: list[int], seeds: Tensor, filters: Filters, acceptance: str, *, k: int
) -> RunningBatch:
    lengths = engine._state.seq_len[slots].tolist()
    rule = Rule.MATCH if acceptance == "coupled" else Rule[acceptance.upper()]
    nothing_ahead = {"num_rounds_ahead": 0, "num_tokens_ahead": 0, "ways_ahead": []}
    limit = len(PROMPT) + NUM_TOKENS
    records: Any = tuple(
        SimpleNamespace(slot=slot, sequence_id=slot, num_tokens=length, length_limit=limit, **nothing_ahead)
        for slot, length in zip(slots, lengths, strict=True)
    )
    return RunningBatch(
        sequence_ids=tuple(slots),
        slots=torch.tensor(slots, dtype=torch.int32),
        k=k,
        rows=SamplingRows.empty(len(slots))._replace(
            temperature=torch.full((len(slots),), filters.temperature),
            top_k=torch.full((len(slots),), filters.top_k, dtype=torch.int32),
            top_p=torch.full((len(slots),), filters.top_p),
            min_p=torch.full((len(slots),), filters.min_p),
            seeds=seeds,
            rule=torch.full((len(slots),), rule, dtype=torch.int32),
            repetition_penalty=torch.full((len(slots),), filters.repetition_penalty),
            presence_penalty=torch.full((len(slots),), filters.presence_penalty),
            frequency_penalty=torch.full((len(slots),), filters.frequency_penalty),
            prompt_length=torch.full((len(slots),), len(PROMPT), dtype=torch.int32),
            acceptance_threshold=torch.full((len(slots),), filters.acceptance_threshold),
            acceptance_delta=torch.full((len(slots),), filters.acceptance_delta),
        ),
        tokens=engine._state.tokens,
        block_table=engine._kv_cache.device_block_table(),
        mode=RoundMode(rules=(rule,), has_filters=True, has_transforms=filters.has_penalties),
        transforms=engine._state.transforms if filters.has_penalties else None,
        host_slots=tuple(slots),
        lengths=tuple(lengths),
        draft_limits=tuple(min(k, len(PROMPT) + NUM_TOKENS - 1 - length) for length in lengths),
        sequences=records,
    )


# -- the law holds -----------------------------------------------------------------------------------------------

GRID = [Filters(*values) for values in itertools.product((0.7, 1.4), (0, 4), (1.0, 0.85), (0.0, 0.1))]
SOURCES = [
    ("model", "rejection"),
    ("model", "block"),
    ("model", "coupled"),
    ("markov", "rejection"),
    ("markov", "block"),
    ("markov", "coupled"),
    ("point", "rejection"),
    ("point", "block"),
    ("point", "coupled"),
]


@pytest.mark.parametrize(
    ("draft", "acceptance", "filters"),
    [
        ("model", "rejection", Filters(1.3, 6, 0.9, 0.05)),
        ("point", "coupled", Filters(0.8, 5, 0.95, 0.0)),
        ("markov", "rejection", Filters(1.0, 7, 0.97, 0.02)),
        ("model", "rejection", Filters(1.1, 0, 0.98, 0.0, 1.3, 0.8, -0.5)),
        ("model", "block", Filters(1.3, 6, 0.9, 0.05)),
        ("point", "block", Filters(0.8, 5, 0.95, 0.0)),
    ],
    ids=str,
)
def test_rounds_sample_the_targets_law(
    target: torch.nn.Module, draft: str, acceptance: str, filters: Filters
) -> None:
    with build_engine(target, draft) as engine:
        samples = sample_rounds(engine, filters, acceptance, NUM_SAMPLES)
    check_tally(samples)
    check_distribution(samples, exact_law(target, filters))


@pytest.mark.parametrize(
    "filters", [Filters(), pytest.param(Filters(1.3, 6, 0.9, 0.05), marks=pytest.mark.slow)], ids=str
)
def test_a_draft_of_another_vocabulary_samples_the_targets_law(
    target: torch.nn.Module, foreign: tuple[Path, Path], filters: Filters
) -> None:
    with build_pair(*foreign) as engine:
        samples = sample_rounds(engine, filters, "rejection", NUM_SAMPLES // 2)
    check_tally(samples)
    check_distribution(samples, exact_law(target, filters))


@pytest.mark.parametrize("acceptance", ["rejection", "coupled", "block"])
def test_a_draft_that_reads_text_samples_the_targets_law(
    target: torch.nn.Module, acceptance: str, tmp_path: Path
) -> None:
    models = [
        tiny_models.save_checkpoint(tmp_path / str(seed), build_tiny(seed), tokenizer=build_words(VOCAB))
        for seed, build_words in enumerate((byte_level_words, bare_words), start=1)
    ]
    filters = Filters(1.0, 7, 0.97, 0.02)
    with build_pair(*models) as engine:
        samples = sample_engine(engine, filters, acceptance, NUM_SAMPLES // 20)
    check_tally(samples)
    check_distribution(samples, exact_law(target, filters))


@pytest.mark.parametrize("acceptance", ["rejection", "coupled"])
def test_the_engine_samples_the_targets_law(target: torch.nn.Module, acceptance: str) -> None:
    filters = Filters(0.9, 6, 0.95, 0.03, repetition_penalty=1.5, frequency_penalty=0.9)
    with build_engine(target, "model") as engine:
        samples = sample_engine(engine, filters, acceptance, NUM_SAMPLES // 10)
    check_tally(samples)
    check_distribution(samples, exact_law(target, filters))


@pytest.mark.parametrize(
    ("model_type", "heads"),
    [("llama", {"num_key_value_heads": 1}), ("qwen3", {"num_key_value_heads": 2, "head_dim": 16})],
)
def test_gated_architectures_sample_the_targets_law(model_type: str, heads: dict[str, int]) -> None:
    target, draft = (build_tiny(seed, model_type, **heads) for seed in (1, 2))
    filters = Filters(1.3, 6, 0.9, 0.05)
    with build_pair(target, draft) as engine:
        samples = sample_rounds(engine, filters, "rejection", NUM_SAMPLES // 4)
    check_tally(samples)
    check_distribution(samples, exact_law(target, filters))


@pytest.mark.parametrize(
    ("model_type", "acceptance", "weights"),
    [
        ("llama", "rejection", {"weight_dtype": "int4"}),
        ("qwen3", "block", {"weight_dtype": "int4_min", "draft_weight_dtype": "int8_group"}),
        ("gpt2", "coupled", {"weight_dtype": "int8_group", "draft_weight_dtype": "int4"}),
    ],
    ids=name_weights,
)
def test_weights_by_group_sample_the_law_of_the_numbers_that_they_mean(
    model_type: str, acceptance: str, weights: dict[str, str]
) -> None:
    sizes = {"hidden_size": 32, **tiny_models.IN_GROUPS.get(model_type, {})}
    if model_type != "gpt2":
        sizes["num_key_value_heads"] = 1
    target, draft = (build_tiny(seed, model_type, **sizes) for seed in (1, 2))
    filters = Filters(1.3, 6, 0.9, 0.05)
    with build_pair(target, draft, **weights) as engine:
        samples = sample_rounds(engine, filters, acceptance, NUM_SAMPLES // 10)
    check_tally(samples)
    check_distribution(samples, exact_law(tiny_models.rounded(target, weights["weight_dtype"]), filters))


@pytest.mark.parametrize("weight_dtype", ["int4"])
def test_the_law_of_unrounded_weights_is_noticed(weight_dtype: str) -> None:
    target, draft = (build_tiny(seed, "llama", hidden_size=32, intermediate_size=64) for seed in (1, 2))
    with build_pair(target, draft, weight_dtype=weight_dtype) as engine:
        samples = sample_rounds(engine, Filters(), "rejection", NUM_SAMPLES // 10)
    with pytest.raises(AssertionError, match="chi-square"):
        check_distribution(samples, exact_law(target, Filters()))


@pytest.mark.parametrize("acceptance", ["rejection", "coupled"])
def test_a_processors_logits_are_the_law(target: torch.nn.Module, acceptance: str) -> None:
    """A frequency penalty by hand, which the draft knows nothing of."""

    def penalise(token_ids: list[int], logits: Tensor) -> Tensor:
        for token in token_ids[len(PROMPT) :]:
            logits[token] -= 0.9
        return logits

    with build_engine(target, "model") as engine:
        given = Filters(0.9, 6, 0.95, 0.03)
        samples = sample_engine(engine, given, acceptance, NUM_SAMPLES // 50, logits_processor=penalise)
    check_tally(samples)
    check_distribution(samples, exact_law(target, replace(given, frequency_penalty=0.9)))


@pytest.mark.slow
@pytest.mark.parametrize(("draft", "acceptance"), SOURCES)
def test_the_whole_grid_samples_the_targets_law(target: torch.nn.Module, draft: str, acceptance: str) -> None:
    with build_engine(target, draft) as engine:
        every = []
        for filters in GRID:
            every.append(sample_rounds(engine, filters, acceptance, NUM_SAMPLES))
            check_distribution(every[-1], exact_law(target, filters))
    check_tally(*every)


def drive_k(engine: Engine, patch: pytest.MonkeyPatch) -> list[int]:
    """Of rounds with "auto": costs change at random, and with them k. Returns the k of every round."""
    cost, ks, observe = random.Random(3), list[int](), Chooser.observe

    def observe_any(chooser: Chooser, sequences: Any, limits: Any, *what: Any, **times: Any) -> None:
        ks.append(max(limits))
        device = cost.choice((0.5, 1.0, 2.0)) * (1.0 + 0.2 * ks[-1] * cost.random())
        times |= {"device": device, "draft": None, "verify": None, "host": 0.0}
        observe(chooser, sequences, limits, *what, **times)

    patch.setattr(Chooser, "observe", observe_any)
    return ks


def test_a_k_that_follows_what_was_accepted_leaves_the_law_alone(
    target: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build_engine(target, "model") as engine:
        ks = drive_k(engine, monkeypatch)
        samples = sample_engine(engine, Filters(), "rejection", NUM_SAMPLES // 20, k="auto")
    assert {0, 1, 2} <= set(ks)
    check_tally(samples)
    check_distribution(samples, exact_law(target, Filters()))


def test_a_k_that_looks_at_the_token_it_drops_is_noticed(
    target: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    propose = DraftModelDrafter.propose

    def propose_odd_tokens(drafter: DraftModelDrafter, *given: Any) -> DraftProposal:
        proposal = propose(drafter, *given)
        is_kept = (proposal.tokens % 2 == 1).cumprod(dim=1).sum(dim=1, dtype=torch.int32)
        return replace(proposal, num_tokens=torch.minimum(proposal.num_tokens, is_kept))

    monkeypatch.setattr(DraftModelDrafter, "propose", propose_odd_tokens)
    with build_engine(target, "model") as engine:
        samples = sample_engine(engine, Filters(), "rejection", NUM_SAMPLES // 20)
    with pytest.raises(AssertionError, match="chi-square"):
        check_distribution(samples, exact_law(target, Filters()))


@pytest.mark.slow
@pytest.mark.parametrize(("draft", "acceptance"), SOURCES)
def test_the_engine_samples_the_targets_law_at_full_length(
    target: torch.nn.Module, draft: str, acceptance: str
) -> None:
    filters = Filters(0.9, 6, 0.95, 0.03)
    with build_engine(target, draft) as engine:
        samples = sample_engine(engine, filters, acceptance, NUM_SAMPLES)
    check_tally(samples)
    check_distribution(samples, exact_law(target, filters))


def test_the_law_is_the_one_of_transformers_sampling(target: torch.nn.Module) -> None:
    """The enumeration's own filters, against those that `transformers` generates with."""
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(0)).double() * 2
    for filters in GRID:
        warped = TemperatureLogitsWarper(filters.temperature)(None, logits)
        if filters.top_k:
            warped = TopKLogitsWarper(filters.top_k)(None, warped)
        if filters.top_p < 1:
            warped = TopPLogitsWarper(filters.top_p)(None, warped)
        if filters.min_p:
            warped = MinPLogitsWarper(filters.min_p)(None, warped)
        assert torch.allclose(filtered_probs(logits, filters), warped.softmax(dim=-1), atol=1e-12)


# -- and is noticed when it does not -----------------------------------------------------------------------------

Mutation = Callable[[Engine, pytest.MonkeyPatch], None]


class MutantBackend:
    """The real backend with one op replaced."""

    def __init__(self, backend: Any, **ops: Callable[..., Any]) -> None:
        self._backend = backend
        self.__dict__.update(ops)

    def __getattr__(self, op: str) -> Any:
        return getattr(self._backend, op)


def mutate_verification(
    engine: Engine, patch: pytest.MonkeyPatch, op: Callable[..., None], name: str = "rejection_verify"
) -> None:
    """Replaces the op that judges; `op(backend, *arguments)` may call the real one."""
    verify, backend = speculative.verify, engine._target.backend
    mutant = MutantBackend(backend, **{name: lambda *given: op(backend, *given)})
    patch.setattr(speculative, "verify", lambda _, *rest: verify(mutant, *rest))


def raw_draft_law(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """q as it was before the filters."""
    verify, backend = speculative.verify, engine._target.backend

    def mutant(
        ops: Any, logits: Tensor, stats_: Tensor, starts: Tensor, proposal: DraftProposal, *rest: Any
    ) -> Any:
        if proposal.logits is not None:
            rows = proposal.logits.flatten(0, 1)
            temperature = rest[0].rows.temperature.repeat_interleave(proposal.tokens.shape[1])
            unfiltered = SamplingRows.empty(len(rows))._replace(temperature=temperature)
            stats = backend.filter_rows(rows, unfiltered)
            tokens = proposal.tokens.flatten().long().clamp(0, rows.shape[1] - 1)[:, None]
            log_probs = rows.gather(1, tokens)[:, 0] / temperature - stats[:, 2]
            proposal = replace(
                proposal, log_probs=log_probs.view_as(proposal.tokens), stats=stats.view_as(proposal.stats)
            )
        return verify(ops, logits, stats_, starts, proposal, *rest)

    patch.setattr(speculative, "verify", mutant)


def _redraw_rejected(
    engine: Engine, patch: pytest.MonkeyPatch, scores: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Draws the recovered token from softmax(scores(log p, log q)) instead of the residual."""

    def mutant(
        backend: Any,
        logits: Tensor,
        stats: Tensor,
        drafts: Drafts,
        rows: SamplingRows,
        is_running: Tensor,
        verdict: Verdict,
    ) -> None:
        backend.rejection_verify(logits, stats, drafts, rows, is_running, verdict)
        assert drafts.law is not None
        chosen = (verdict.num_accepted < drafts.num_draft).nonzero()[:, 0]
        if not len(chosen):
            return
        at = verdict.num_accepted[chosen].long()
        target_row = drafts.row_start[chosen].long() + at
        temperature = rows.temperature[chosen]
        log_p = filtered_log_probs(logits[target_row], temperature, stats[target_row])
        log_q = filtered_log_probs(drafts.law.logits[chosen, at], temperature, drafts.law.stats[chosen, at])
        weights = scores(log_p, log_q)
        weights[:, VOCAB:] = float("-inf")
        positions, zero = drafts.seq_len[chosen] + at, torch.zeros_like(at)
        verdict.tokens[chosen, at] = race(weights, rows.seeds[chosen], positions, rng.STREAM_TARGET, zero)

    mutate_verification(engine, patch, mutant)


def residual_drawn_from_target(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    _redraw_rejected(engine, patch, lambda log_p, log_q: log_p.clone())


def softmaxed_residual(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    _redraw_rejected(
        engine, patch, lambda log_p, log_q: (log_p.exp() - log_q.exp()).clamp_min(0) + 0 * log_p.clamp_min(-1)
    )


def softmaxed_residual_in_support(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """As above, but nothing outside the target's support: only the weights are wrong."""

    def scores(log_p: Tensor, log_q: Tensor) -> Tensor:
        residual = (log_p.exp() - log_q.exp()).clamp_min(0)
        return residual.masked_fill(residual == 0, float("-inf"))

    _redraw_rejected(engine, patch, scores)


def judged_by_the_next_row(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    def mutant(backend: Any, logits: Tensor, stats: Tensor, *rest: Any) -> None:
        backend.rejection_verify(logits.roll(-1, 0), stats.roll(-1, 0), *rest)

    mutate_verification(engine, patch, mutant)


def draft_law_of_the_row_before(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    verify = speculative.verify

    def mutant(
        ops: Any, logits: Tensor, stats: Tensor, starts: Tensor, proposal: DraftProposal, *rest: Any
    ) -> Any:
        if proposal.logits is not None:
            # Among the drafts that a row has: behind them stands what nobody wrote.
            places = torch.arange(proposal.tokens.shape[1])
            before = (places - 1) % proposal.num_tokens.clamp(min=1)[:, None]
            rows = torch.arange(len(before))[:, None]
            moved = (
                proposal.log_probs[rows, before],
                proposal.logits[rows, before],
                proposal.stats[rows, before],
            )
            proposal = DraftProposal(proposal.tokens, proposal.num_tokens, *moved)
        return verify(ops, logits, stats, starts, proposal, *rest)

    patch.setattr(speculative, "verify", mutant)


def one_stream_for_draft_and_acceptance(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rule.REJECTION, "draft_stream", rng.STREAM_ACCEPT)


def one_stream_for_draft_and_residual(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    decoder = engine._drafter.runner.decoder
    backend = decoder.backend

    def mutant(logits: Tensor, stats: Tensor, rows: SamplingRows, position: Tensor, *_: Any) -> Any:
        base = torch.zeros_like(position)
        return backend.sample_rows(logits, stats, rows, position, rng.STREAM_TARGET, base)

    patch.setattr(decoder, "backend", MutantBackend(backend, sample_rows=mutant))


def kv_not_rolled_back(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """Positions that a forward has computed once are not written again: rejected drafts stay in the target's KV."""
    build, reached = model_runner.build_forward_batch, {}

    def stale(
        backend: Backend, tokens: Tensor, table: Tensor, slots: Tensor, feed: Feed, *entry: Any, **sizes: int
    ) -> Any:
        batch = build(backend, tokens, table, slots, feed, *entry, **sizes)
        start, q_len = feed.start, batch.q_start.diff()
        known = torch.tensor([reached.get(slot, 0) for slot in slots.tolist()]).masked_fill(start == 0, 0)
        reached.update(zip(slots.tolist(), (start + q_len).tolist(), strict=True))
        is_known = batch.positions < known.repeat_interleave(q_len)
        return batch._replace(kv_slots=batch.kv_slots.masked_fill(is_known, -1))

    make = engine._target.build

    def mutant(*given: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(model_runner, "build_forward_batch", stale)
            return make(*given)

    patch.setattr(engine._target, "build", mutant)
    run_part_by_part(patch)


def no_mutation(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """The control."""


MUTATIONS: list[Mutation] = [
    raw_draft_law,
    residual_drawn_from_target,
    softmaxed_residual,
    softmaxed_residual_in_support,
    judged_by_the_next_row,
    draft_law_of_the_row_before,
    one_stream_for_draft_and_acceptance,
    one_stream_for_draft_and_residual,
    kv_not_rolled_back,
]


def check_mutation(target: torch.nn.Module, mutation: Mutation, patch: pytest.MonkeyPatch) -> None:
    filters = Filters(1.0, 4, 0.9, 0.02)
    with build_engine(target, "model") as engine:
        mutation(engine, patch)
        samples = sample_rounds(engine, filters, "rejection", 6 * BATCH)
    check_tally(samples)
    check_distribution(samples, exact_law(target, filters))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_biased_sampler_is_noticed(
    target: torch.nn.Module, mutation: Mutation, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match=r"chi-square|outside"):
        check_mutation(target, mutation, monkeypatch)


def test_an_unbiased_sampler_is_not(target: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    check_mutation(target, no_mutation, monkeypatch)


def block_with_a_fault(fault: str) -> Callable[..., None]:
    """Block verification of a full batch with a law, in float64, and one thing about it wrong."""

    def op(
        backend: Any,
        logits: Tensor,
        stats: Tensor,
        drafts: Drafts,
        rows: SamplingRows,
        is_running: Tensor,
        verdict: Verdict,
    ) -> None:
        chosen = ((drafts.num_draft > 0) & (is_running != 0)).nonzero()[:, 0]
        assert drafts.law is not None
        count, k = len(chosen), drafts.tokens.shape[1]
        num_draft, seeds = drafts.num_draft[chosen, None].long(), rows.seeds[chosen]
        step, each = torch.arange(k + 1)[None], torch.arange(count)
        row = (drafts.row_start[chosen, None] + step.minimum(num_draft)).flatten().long()
        temperature = rows.temperature[chosen].repeat_interleave(k + 1)
        log_p = filtered_log_probs(logits[row], temperature, stats[row]).view(count, k + 1, -1)
        law, temperature = drafts.law, rows.temperature[chosen].repeat_interleave(k)
        log_q = filtered_log_probs(
            law.logits[chosen].flatten(0, 1), temperature, law.stats[chosen].flatten(0, 1)
        )
        p, q = (each.double().exp()[..., :VOCAB] for each in (log_p, log_q.view(count, k, -1)))
        tokens = drafts.tokens[chosen].long().clamp(0, VOCAB - 1)[..., None]
        ratio = (p[:, :k].gather(2, tokens) / q.gather(2, tokens))[..., 0]
        share = torch.ones(count, k + 1, dtype=torch.float64)
        for i in range(k):
            share[:, i + 1] = (share[:, i] * ratio[:, i]).clamp_max(1.0)
        excess = (share[:, :k, None] * p[:, :k] - q).clamp_min(0.0).sum(dim=2)
        height = (excess / (excess + 1 - share[:, :k])).nan_to_num(nan=1.0)
        height = torch.where(step[:, 1:] == num_draft, share[:, 1:], height.roll(-1, 1))
        if fault == "a share in place of the height":
            height = share[:, 1:]
        positions = drafts.seq_len[chosen, None] + step
        base = drafts.seq_len[chosen, None].expand(-1, k)
        if fault == "uniforms looked at twice":
            base = torch.zeros_like(base)
        u = rng.uniform(rng.accept_bits(seeds[:, None].expand(-1, k), positions[:, :k], base), torch.float64)
        passes = (u <= height) & (step[:, :k] < num_draft)
        n = (passes * step[:, 1:]).max(dim=1).values
        if fault == "the first failure":
            n = passes.int().cumprod(dim=1).sum(dim=1)
        scale = torch.ones(count) if fault == "a residual without its share" else share[each, n]
        residual = (scale[:, None] * p[each, n] - q[each, n.clamp_max(k - 1)]).clamp_min(0.0)
        is_residual = (n < num_draft[:, 0]) & (residual.sum(dim=1) > 0)
        weight = torch.where(is_residual[:, None], residual, p[each, n])
        verdict.tokens[chosen, :k] = drafts.tokens[chosen]
        position, zero = positions[each, n], torch.zeros_like(n)
        verdict.tokens[chosen, n] = race(weight.log(), seeds, position, rng.STREAM_TARGET, zero).int()
        verdict.num_accepted[chosen] = n.int()
        verdict.error[chosen] = 0

    return op


def check_block(target: torch.nn.Module, fault: str, patch: pytest.MonkeyPatch) -> None:
    filters = Filters(1.4)
    with build_engine(target, "markov") as engine:
        mutate_verification(engine, patch, block_with_a_fault(fault), "block_verify")
        samples = sample_rounds(engine, filters, "block", 12 * BATCH)
    check_tally(samples)
    check_distribution(samples, exact_law(target, filters))


@pytest.mark.parametrize(
    "fault",
    [
        "the first failure",
        "a share in place of the height",
        "a residual without its share",
        "uniforms looked at twice",
    ],
)
def test_a_biased_block_is_noticed(
    target: torch.nn.Module, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match="chi-square"):
        check_block(target, fault, monkeypatch)


def test_an_unbiased_block_is_not(target: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    check_block(target, "none", monkeypatch)


def test_a_token_outside_the_support_is_noticed(target: torch.nn.Module) -> None:
    law = exact_law(target, Filters(top_k=2))
    counts = np.round(law * 100_000).astype(np.int64)
    check_distribution(Samples(counts, 1, 1), law)
    counts[tuple(np.argwhere(law == 0)[0])] += 1
    with pytest.raises(AssertionError, match="outside"):
        check_distribution(Samples(counts, 1, 1), law)
