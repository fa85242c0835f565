"""Law H, a request's own code: a logits processor is called as plain decoding calls it, once for each token, whatever
was drafted and rejected; and its logits count wherever the model's would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from law_helpers import (
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
from torch import Tensor
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor, TopKLogitsWarper

from specengine import speculative
from specengine.config import SamplingParams

HOLDS_FOR_REPLAYED_ROUNDS = True
VOCAB = 64
K = 4
NUM_TOKENS = 24
PROMPTS = [make_prompt(length, length, VOCAB) for length in (5, 12, 3, 9)]
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"ignore_eos": True},
    "coupled": {"temperature": 0.8, "seed": 5, "acceptance": "coupled", "top_p": 0.95, "ignore_eos": True},
    "penalised": {"repetition_penalty": 1.2, "logit_bias": {7: 3.0}, "logprobs": 1, "ignore_eos": True},
    "rejection": {"temperature": 0.8, "seed": 5, "acceptance": "rejection", "top_k": 20, "ignore_eos": True},
    "ending": {"stop_token_ids": list(range(0, VOCAB, 5)), "min_new_tokens": 5},
}
DRAFTERS: dict[str, Callable[[], KnowingDrafter]] = {
    "perfect": lambda: PerfectDrafter(vocab_size=VOCAB),
    "adversarial": lambda: AdversarialDrafter(vocab_size=VOCAB, wrong_at=2),
    "random": lambda: RandomDrafter(vocab_size=VOCAB),
}


class Recorder:
    """Shifts logits by what the last tokens are, in place, and keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        self.calls.append(list(token_ids))
        logits[(3 * token_ids[-1] + token_ids[-2]) % VOCAB] += 2.0
        logits[token_ids[-1]] -= 1.5
        token_ids.clear()
        return logits


def check_calls(recorder: Recorder, prompt: list[int], output: list[int]) -> None:
    """One for each token of the output, with all that stands before it."""
    assert recorder.calls == [[*prompt, *output[:count]] for count in range(len(output))]


@pytest.mark.parametrize("drafter", [*DRAFTERS, "model"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_it_is_called_as_in_plain_decoding(
    sampling: str, drafter: str, checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    """Beside neighbours with one, and without."""
    drafts = DRAFTERS[drafter]() if drafter != "model" else checkpoint(seed=3, noise=0.2)
    engine = build_engine(checkpoint(seed=3), drafts)
    num_free = engine.num_free_blocks
    asked = {**SAMPLINGS[sampling], "max_new_tokens": NUM_TOKENS}
    expected = []
    for prompt in PROMPTS[:3]:
        expected.append(plain(engine, prompt, logits_processor=(recorder := Recorder()), **asked))
        check_calls(recorder, prompt, expected[-1].token_ids)
    unasked = plain(engine, PROMPTS[3], **asked)
    if isinstance(drafts, KnowingDrafter):
        drafts.learn(expected)
    recorders = [Recorder() for _ in PROMPTS[:3]]
    params = [
        SamplingParams(**asked, num_speculative_tokens=K, logits_processor=recorder) for recorder in recorders
    ]
    params.append(SamplingParams(**asked, num_speculative_tokens=K))
    *results, neighbour = engine.generate(PROMPTS, params)
    for prompt, recorder, result, truth in zip(PROMPTS, recorders, results, expected, strict=False):
        check_calls(recorder, prompt, result.token_ids)
        if sampling != "rejection":
            assert_same(result, truth)
    if sampling != "rejection":
        assert_same(neighbour, unasked)
    assert_idle(engine, num_free)
    tally.check(accepted=drafter != "random", rejected=drafter != "perfect" or sampling == "rejection")


@torch.no_grad()
def test_those_of_transformers_do_what_they_do_there(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, oracle: Callable[..., GreedyOracle]
) -> None:
    """In their order, after the bias."""
    theirs = [NoRepeatNGramLogitsProcessor(2), TopKLogitsWarper(3)]

    def adapt(processor: Any) -> Callable[[list[int], Tensor], Tensor]:
        return lambda token_ids, logits: processor(torch.tensor([token_ids]), logits[None])[0]

    engine = build_engine(checkpoint(seed=3), checkpoint(seed=3, noise=0.2))
    bias = {9: 2.5, 14: 4.0}
    asked = {"logit_bias": bias, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    results = spec(engine, PROMPTS, K, logits_processor=[adapt(each) for each in theirs], **asked)
    for prompt, result in zip(PROMPTS, results, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(NUM_TOKENS):
            logits = oracle(seed=3).model(ids).logits[:, -1]
            logits[:, list(bias)] += torch.tensor(list(bias.values()))
            for processor in theirs:
                logits = processor(ids, logits)
            ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
        assert result.token_ids == ids[0, len(prompt) :].tolist()


def test_rounds_with_one_run_from_python(checkpoint: CheckpointFactory, build_twins: BuildTwins) -> None:
    """They are not recorded, and wait for whatever was under way."""
    direct, replayed = build_twins(checkpoint(seed=3), checkpoint(seed=3, noise=0.2))
    asked = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    without = [SamplingParams(**asked)] * 2
    mixed = [SamplingParams(**asked), SamplingParams(**asked, logits_processor=Recorder())]
    for params in (without, mixed, mixed[::-1], without):
        pairs = zip(replayed.generate(PROMPTS[:2], params), direct.generate(PROMPTS[:2], params), strict=True)
        for result, truth in pairs:
            assert_same(result, truth)
    assert replayed._rounds._recordings
    assert not any(mode.has_processors for _, _, mode, *_ in replayed._rounds._recordings)


def fail_late(token_ids: list[int], logits: Tensor) -> Tensor:
    if len(token_ids) > 14:
        raise RuntimeError("enough")
    return logits


@pytest.mark.parametrize(
    ("processor", "error", "message"),
    [
        (fail_late, RuntimeError, "enough"),
        (lambda ids, logits: None, TypeError, "logits_processor .* must return a tensor, got None"),
        (lambda ids, logits: logits[1:], ValueError, r"logits_processor .* shape \[64\], got \[63\]"),
    ],
)
def test_what_it_raises_reaches_the_caller_and_hurts_nobody(
    processor: Any,
    error: type[Exception],
    message: str,
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
) -> None:
    engine = build_engine(checkpoint(seed=3), checkpoint(seed=3, noise=0.2))
    num_free, asked = engine.num_free_blocks, {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    expected = spec(engine, PROMPTS[1], K, **asked)
    with pytest.raises(error, match=message):
        spec(engine, PROMPTS[0], K, logits_processor=processor, **asked)
    assert_idle(engine, num_free)
    assert_same(spec(engine, PROMPTS[1], K, **asked), expected)


def test_logits_that_are_no_distribution_end_the_request(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    engine = build_engine(checkpoint(seed=3), checkpoint(seed=3, noise=0.2))

    def ban_all(token_ids: list[int], logits: Tensor) -> Tensor:
        return logits if len(token_ids) < 12 else torch.full_like(logits, float("-inf"))

    asked = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True, "logits_processor": ban_all}
    assert (truth := plain(engine, PROMPTS[0], **asked)).finish_reason == "error"
    assert len(truth.token_ids) == 7
    result = spec(engine, PROMPTS[0], K, **asked)
    assert result.finish_reason == "error"
    assert 0 < len(result.token_ids) <= 7
    assert result.token_ids == truth.token_ids[: len(result.token_ids)]


# -- planted faults -----------------------------------------------------------------------------------------------


def all_rows_are_processed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(speculative, "_needs_next", lambda *_: True)


def drafts_are_overlooked(patch: pytest.MonkeyPatch) -> None:
    verify_processed = speculative.verify_processed

    def mutant(target: Any, judged: Any, by_row: Any, row_start: Any, proposal: Any, batch: Any) -> Any:
        lengths = {tuple(sequence.token_ids): len(sequence.token_ids) for sequence in batch.sequences}
        process = speculative.process
        with pytest.MonkeyPatch.context() as inner:
            longest = max(lengths.values())
            inner.setattr(speculative, "process", lambda p, ids, logits: process(p, ids[:longest], logits))
            return verify_processed(target, judged, by_row, row_start, proposal, batch)

    patch.setattr(speculative, "verify_processed", mutant)


@pytest.mark.parametrize("plant", [all_rows_are_processed, drafts_are_overlooked])
def test_the_law_notices(
    plant: Callable[[pytest.MonkeyPatch], None],
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    engine = build_engine(checkpoint(seed=3), checkpoint(seed=3, noise=0.2))
    recorder = Recorder()
    result = spec(
        engine, PROMPTS[0], K, max_new_tokens=NUM_TOKENS, ignore_eos=True, logits_processor=recorder
    )
    with pytest.raises(AssertionError):
        check_calls(recorder, PROMPTS[0], result.token_ids)
