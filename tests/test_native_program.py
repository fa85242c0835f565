"""A forward in one C++ call gives the bits of the same program run op by op, and draws without logits give the
tokens of draws from logits."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import NATIVE
from law_helpers import (
    CheckpointFactory,
    EngineFactory,
    assert_idle,
    assert_same,
    make_prompt,
    plain,
    run_op_by_op,
    run_part_by_part,
    spec,
)
from scripted_drafters import ScriptedDrafter

from specengine import Engine, SamplingParams
from specengine.kernels.types.program import DraftRows, DrawKeys, ForwardBatch
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.transforms import Transforms
from specengine.logits.entries import build_entries
from specengine.logits.tables import TransformTables
from specengine.models.decoder import Decoder, build_program
from specengine.ops.interpreter import Interpreter
from specengine.runtime.batch import Feed, build_forward_batch

ARCHITECTURES = ("gpt2", "opt", "gpt_neox")
VOCAB = 64
BLOCK_SIZE = 16
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "coupled": {"temperature": 0.9, "seed": 11},
    "filtered": {"temperature": 0.9, "seed": 11, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "biased": {"temperature": 0.9, "seed": 11, "logit_bias": {3: 2.0, 30: -5.0}},
    "penalised": {"temperature": 0.9, "seed": 11, "repetition_penalty": 1.4, "frequency_penalty": 0.6},
    "minimum": {"min_new_tokens": 7, "stop_token_ids": list(range(1, VOCAB, 9))},
}


def ragged_batch(q_lens: list[int], starts: list[int], num_logits: list[int]) -> ForwardBatch:
    """Sequences at scattered slots, their blocks handed out in a random order."""
    num_slots, max_blocks = len(q_lens) + 2, 6
    generator = torch.Generator().manual_seed(sum(q_lens))
    blocks = torch.randperm(num_slots * max_blocks, generator=generator)
    tokens = torch.randint(0, VOCAB, (num_slots, max_blocks * BLOCK_SIZE), generator=generator)
    slots = torch.randperm(num_slots, generator=generator)[: len(q_lens)]
    lengths = (torch.tensor(values, dtype=torch.int32) for values in (starts, q_lens, num_logits))
    return build_forward_batch(
        NATIVE,
        tokens.int(),
        blocks.view(num_slots, max_blocks).int(),
        slots.int(),
        Feed(*lengths, sum(q_lens), sum(num_logits)),
        block_size=BLOCK_SIZE,
    )


def random_transforms(num_slots: int) -> Transforms:
    """Every slot but one has its entries, large enough to decide some draws."""
    rng = random.Random(num_slots)
    history = [rng.choices(range(VOCAB), k=6 * BLOCK_SIZE) for _ in range(num_slots)]
    tables = TransformTables(torch.tensor(history, dtype=torch.int32))
    for slot in range(1, num_slots):
        biases = [(token, rng.uniform(-9, 9)) for token in rng.sample(range(VOCAB - 3), 12)]
        banned = rng.sample(range(VOCAB - 3), 5)
        tables.admit(slot, build_entries(biases, banned, banned_until=20))
    return tables.tables


def new_kv_cache(decoder: Decoder, dtype: torch.dtype) -> torch.Tensor:
    spec = decoder.spec
    shape = (spec.num_layers, 2, 64, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_call_gives_the_bits_of_single_ops(
    model_type: str, dtype: str, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    decoder = build_engine(checkpoint(model_type, seed=2), dtype=dtype)._target.decoder
    single = Interpreter(decoder.backend, build_program(decoder.spec, decoder.weights))
    batches = [
        ragged_batch([1], [0], [1]),
        ragged_batch([5, 1, 20], [3, 0, 17], [5, 1, 0]),
        ragged_batch([33, 2], [0, 40], [1, 2]),
        ragged_batch([4], [9], [0]),
    ]
    for batch in batches:
        ours, theirs = (new_kv_cache(decoder, getattr(torch, dtype)) for _ in range(2))
        logits = decoder.forward(batch, ours, VOCAB - 3)
        assert torch.equal(logits, single.forward(batch, theirs, VOCAB - 3))
        assert torch.equal(ours, theirs), "keys and values"
        count = batch.slots.numel()
        by_sequence = SamplingRows.empty(3)._replace(
            temperature=torch.tensor([0.0, 0.8, 1.3]),
            top_k=torch.tensor([5, 0, 9], dtype=torch.int32),
            top_p=torch.tensor([0.5, 1.0, 0.9]),
            min_p=torch.tensor([0.1, 0.0, 0.02]),
            seeds=torch.tensor([-5, 2**62, 7]),
            repetition_penalty=torch.tensor([1.2, 1.0, 0.8]),
            presence_penalty=torch.tensor([0.0, 1.5, -0.5]),
            frequency_penalty=torch.tensor([0.0, 0.0, 0.7]),
            prompt_length=torch.tensor([1, 2, 0], dtype=torch.int32),
        )
        for transforms in (None, random_transforms(batch.block_table.shape[0])):
            keys = DrawKeys(by_sequence.take(slice(count)), True, transforms)
            drawn = decoder.draw(batch, ours, VOCAB - 3, keys)
            for mine, other in zip(drawn, single.draw(batch, theirs, VOCAB - 3, keys), strict=True):
                assert torch.equal(mine, other)
            judged = decoder.forward_stats(batch, ours, VOCAB - 3, keys)
            for mine, other in zip(judged, single.forward_stats(batch, theirs, VOCAB - 3, keys), strict=True):
                assert torch.equal(mine, other)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_wanting_logprobs_changes_no_token(
    sampling: str, model_type: str, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    drafter = ScriptedDrafter(vocab_size=VOCAB)
    engine = build_engine(checkpoint(model_type, seed=5), drafter)
    num_free = engine.num_free_blocks
    prompts = [make_prompt(length, length, VOCAB) for length in (3, 15, 17)]
    given = {**SAMPLINGS[sampling], "max_new_tokens": 40, "ignore_eos": True}
    expected = plain(engine, prompts, logprobs=1, **given)
    for result in expected:
        drafter.learn(result, counts=(0, 1, 3, 2, 4))
    for with_drafts in (plain(engine, prompts, **given), spec(engine, prompts, 4, **given)):
        assert [result.token_ids for result in with_drafts] == [result.token_ids for result in expected]
    counts = with_drafts[0].metrics.speculative_decoding
    assert 0 < counts.num_accepted_draft_tokens < counts.num_draft_tokens
    assert_idle(engine, num_free)


def test_neighbours_that_need_logits_change_nothing(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    engine = build_engine(checkpoint("gpt2", seed=5), checkpoint("gpt2", seed=6))
    prompt = make_prompt(9, 1, VOCAB)
    alone = [
        SamplingParams(max_new_tokens=30, **each, num_speculative_tokens=3) for each in SAMPLINGS.values()
    ]
    needy = SamplingParams(max_new_tokens=30, logprobs=2, temperature=0.7, top_p=0.9)
    expected = [engine.generate(prompt, params).token_ids for params in alone]
    together = engine.generate([prompt] * 7, [*alone, needy])
    assert [result.token_ids for result in together[:-1]] == expected


def test_greedy_and_coupled_rounds_store_no_logits(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(checkpoint("gpt2", seed=5), checkpoint("gpt2", seed=6))

    forward = Decoder.forward

    def refuse(self: Decoder, rows: ForwardBatch, *rest: Any) -> Any:
        assert not rows.logit_rows.numel(), "logits were stored"
        return forward(self, rows, *rest)

    monkeypatch.setattr(Decoder, "forward", refuse)
    monkeypatch.setattr(Decoder, "forward_stats", refuse)
    for sampling in SAMPLINGS.values():
        engine.generate(make_prompt(5, 0, VOCAB), num_speculative_tokens=3, max_new_tokens=20, **sampling)
    with pytest.raises(AssertionError, match="logits were stored"):
        engine.generate(make_prompt(5, 0, VOCAB), logprobs=0, max_new_tokens=2)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_draft_in_one_call_is_the_draft_of_single_draws(
    sampling: str, checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate() -> list[Any]:
        engine = build_engine(checkpoint("gpt2", seed=5), checkpoint("gpt2", seed=5, noise=0.1))
        prompts = [make_prompt(length, length, VOCAB) for length in (3, 15, 17)]
        params = [
            SamplingParams(
                max_new_tokens=30, ignore_eos=True, num_speculative_tokens=k, **SAMPLINGS[sampling]
            )
            for k in (5, 0, 2)
        ]
        return engine.generate(prompts, params)

    run_part_by_part(monkeypatch)
    one_call = generate()
    monkeypatch.setattr(Decoder, "draft", lambda *_: None)
    for ours, theirs in zip(one_call, generate(), strict=True):
        assert_same(ours, theirs)
        assert ours.metrics.speculative_decoding == theirs.metrics.speculative_decoding
    assert 0 < one_call[0].metrics.speculative_decoding.draft_acceptance_rate < 1


def test_a_draft_that_does_not_fit_is_refused(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    decoder = build_engine(checkpoint("gpt2", seed=2))._target.decoder
    ones = torch.ones(1, dtype=torch.int32)
    rows = DraftRows(
        tokens=torch.ones(1, 6, dtype=torch.int32),
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        slots=0 * ones,
        start=0 * ones,
        seq_len=4 * ones,
        limits=3 * ones,
    )
    keys = DrawKeys(SamplingRows.empty(1), False)
    kv_cache = new_kv_cache(decoder, torch.float32)
    with pytest.raises(ValueError, match="limits: token 6 does not fit 6"):
        decoder.draft(rows, kv_cache, VOCAB, keys)
    for name, value in (("slots", 1), ("start", 5), ("seq_len", 40)):
        with pytest.raises(ValueError):
            decoder.draft(replace(rows, **{name: value * ones}), kv_cache, VOCAB, keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": [VOCAB]}, "token_ids: 64"),
        ({"token_ids": [-1]}, "token_ids: -1"),
        ({"positions": [96]}, "positions: 96"),
        ({"kv_slots": [64 * BLOCK_SIZE]}, "kv_slots: 1024"),
        ({"logit_rows": [1]}, "logit_rows: 1"),
        ({"context_len": [0]}, "context_len: 0"),
        ({"q_start": [0, 2]}, "q_start"),
        ({"slots": [3]}, "slots: 3"),
    ],
)
def test_a_batch_that_points_outside_is_refused(
    change: dict[str, list[int]], message: str, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    decoder = build_engine(checkpoint("gpt2", seed=2))._target.decoder
    batch = ragged_batch([1], [4], [1])
    (name, values), *_ = change.items()
    broken = torch.tensor(values, dtype=getattr(batch, name).dtype)
    with pytest.raises(ValueError, match=message):
        decoder.forward(batch._replace(**{name: broken}), new_kv_cache(decoder, torch.float32), VOCAB)


def test_a_step_that_reads_the_wrong_register_is_noticed(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Engine = build_engine(checkpoint("gpt2", seed=2))
    prompt, sampling = make_prompt(5, 0, VOCAB), {"max_new_tokens": 10, "logprobs": 0}
    before = plain(engine, prompt, **sampling)
    run_op_by_op(engine, monkeypatch)
    assert_same(plain(engine, prompt, **sampling), before)
    decoder = engine._target.decoder
    program = build_program(decoder.spec, decoder.weights)
    ops = list(program.ops)
    ops[3] = replace(ops[3], source="hidden")
    monkeypatch.setattr(decoder, "_executor", decoder.backend.compile(replace(program, ops=tuple(ops))))
    with pytest.raises(AssertionError):
        assert_same(plain(engine, prompt, **sampling), before)
