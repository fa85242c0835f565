"""Law I: each log-probability is the target's own, as teacher forcing the returned sequence gives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import vocabulary_pairs
from law_helpers import TOLERANCE, Tally, assert_same, make_prompt, name_weights, plain
from torch import Tensor

from conftest import CheckpointFactory, DraftedFactory, EngineFactory
from specengine import CompletionOutput, Engine, GenerationResult, SamplingParams, TokenLogprob

VOCAB = 64
K = 3
NUM_TOKENS = 24
NUM_TOP = 5
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "coupled": {"temperature": 1.3, "seed": 6, "acceptance": "coupled"},
    "rejection": {"temperature": 1.3, "seed": 6, "acceptance": "rejection", "top_k": 20, "min_p": 0.01},
}
each_mode = pytest.mark.parametrize("mode", MODES)
COMMON: dict[str, Any] = {
    "ignore_eos": True,
    "logprobs": NUM_TOP,
    "max_new_tokens": NUM_TOKENS,
    "num_speculative_tokens": K,
}
WITHOUT_DRAFTS = {key: value for key, value in COMMON.items() if key != "num_speculative_tokens"}
PROMPTS = [make_prompt(length, seed=60) for length in (1, 6, 11)]


class TeacherForcing:
    """`transformers` on the whole returned sequence: row i is the distribution of token i, given all before it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    @torch.no_grad()
    def rows(self, tokens: list[int]) -> Tensor:
        logits = self._model(torch.tensor([tokens])).logits[0].double()
        return logits.log_softmax(dim=-1).roll(1, 0)  # row 0 predicts nothing


def check_entries(
    entries: list[TokenLogprob], token_ids: list[int], rows: Tensor, num_top: int, what: str
) -> None:
    """Ids, log-probabilities and the most likely tokens of consecutive tokens."""
    assert len(entries) == len(token_ids), (
        f"{what}: {len(entries)} log-probabilities, {len(token_ids)} tokens"
    )
    for index, (entry, token, row) in enumerate(zip(entries, token_ids, rows, strict=True)):
        where = f"{what} token {index}"
        assert entry.token_id == token, where
        assert entry.logprob == pytest.approx(float(row[token]), abs=TOLERANCE), where
        assert len(entry.top) == num_top, where
        values = list(entry.top.values())
        assert values == sorted(values, reverse=True), where
        best = row.topk(num_top).values.tolist()
        assert values == pytest.approx(best, abs=TOLERANCE), where
        for top_id, value in entry.top.items():
            assert value == pytest.approx(float(row[top_id]), abs=TOLERANCE), where


def check_output(
    prompt_ids: list[int], output: CompletionOutput, teacher: TeacherForcing, num_top: int = NUM_TOP
) -> None:
    tokens = [*prompt_ids, *output.token_ids]
    rows = teacher.rows(tokens)[len(prompt_ids) :]
    assert output.logprobs is not None
    check_entries(output.logprobs, output.token_ids, rows, num_top, "output")
    assert output.cumulative_logprob == sum(entry.logprob for entry in output.logprobs)


def check_prompt(result: GenerationResult, teacher: TeacherForcing, num_top: int) -> None:
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    tokens, entries = result.prompt_token_ids[1:], result.prompt_logprobs[1:]
    check_entries(entries, tokens, teacher.rows(result.prompt_token_ids)[1:], num_top, "prompt")


def check_kinds(engine: Engine, teacher: TeacherForcing, sampling: dict[str, Any]) -> dict[str, int]:
    """Streams, so that each token is known as first, accepted, recovered or bonus; returns how many were checked.

    A round's event ends with the target's own token: a bonus if all of its k drafts were accepted.
    """
    kinds: dict[str, int] = {}
    for prompt in PROMPTS:
        for event in engine.stream([prompt], SamplingParams(**COMMON, **sampling)):
            if event.result is not None:
                result = event.result
            done = kinds.pop("done", 0)
            drafted = min(K, NUM_TOKENS - done - 1) if done else 0
            accepted = event.token_source.count("draft")
            own = "first" if not done else "bonus" if accepted == drafted else "recovered"
            kinds[own] = kinds.get(own, 0) + 1
            kinds["accepted"] = kinds.get("accepted", 0) + accepted
            kinds["done"] = done + len(event.token_ids)
        kinds.pop("done")
        check_output(prompt, result.outputs[0], teacher)
    return kinds


@pytest.fixture
def teacher() -> TeacherForcing:
    return TeacherForcing(tiny_models.build_model(seed=1))


@pytest.fixture
def engine(checkpoint: CheckpointFactory, build_engine: EngineFactory) -> Engine:
    return build_engine(checkpoint(seed=1), checkpoint(seed=1, noise=0.3))


@pytest.mark.parametrize("pair", vocabulary_pairs.PAIRS)
def test_logprobs_of_every_pair_of_vocabularies(
    pair: str, drafted: DraftedFactory, build_engine: EngineFactory, teacher: TeacherForcing, tally: Tally
) -> None:
    engine = build_engine(*drafted(pair, seed=1, noise=0.2))
    for mode in MODES.values():
        check_kinds(engine, teacher, mode)
    tally.check()


@each_mode
def test_accepted_recovered_and_bonus_tokens_carry_the_targets_logprobs(
    engine: Engine, teacher: TeacherForcing, tally: Tally, mode: str
) -> None:
    kinds = check_kinds(engine, teacher, MODES[mode])
    assert min(kinds[kind] for kind in ("first", "accepted", "recovered", "bonus")) > 0, kinds
    tally.check()


@pytest.mark.parametrize(
    ("model_type", "weights"),
    [
        ("llama", {"weight_dtype": "int4"}),
        ("qwen3", {"weight_dtype": "int4_min"}),
        ("gpt2", {"weight_dtype": "int8_group", "draft_weight_dtype": "int4"}),
    ],
    ids=name_weights,
)
def test_logprobs_are_those_of_the_numbers_that_groups_mean(
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    tally: Tally,
    model_type: str,
    weights: dict[str, str],
) -> None:
    build = {"seed": 3, **tiny_models.IN_GROUPS.get(model_type, {})}
    engine = build_engine(
        checkpoint(model_type, **build), checkpoint(model_type, **build, noise=0.3), **weights
    )
    model = tiny_models.build_model(model_type, **build)
    teacher = TeacherForcing(tiny_models.rounded(model, weights["weight_dtype"]))
    for mode in MODES.values():
        kinds = check_kinds(engine, teacher, mode)
        assert min(kinds[kind] for kind in ("first", "accepted", "recovered", "bonus")) > 0, kinds
        expected = plain(engine, PROMPTS[1], **{**WITHOUT_DRAFTS, **mode}, prompt_logprobs=NUM_TOP)
        check_prompt(expected, teacher, NUM_TOP)
        if mode.get("acceptance") != "rejection":
            result = engine.generate(PROMPTS[1], **COMMON, **mode, prompt_logprobs=NUM_TOP)
            assert_same(result, expected)
    tally.check()
    with pytest.raises(AssertionError):
        check_kinds(engine, TeacherForcing(model), MODES["greedy"])


@pytest.mark.parametrize("model_type", ["opt", "gpt_neox", "qwen2"])
def test_logprobs_of_every_architecture(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally, model_type: str
) -> None:
    engine = build_engine(checkpoint(model_type, seed=3), checkpoint(model_type, seed=3, noise=0.3))
    teacher = TeacherForcing(tiny_models.build_model(model_type, seed=3))
    for result in engine.generate(PROMPTS, **COMMON, **MODES["rejection"], prompt_logprobs=NUM_TOP):
        check_output(result.prompt_token_ids, result.outputs[0], teacher)
        check_prompt(result, teacher, NUM_TOP)
    tally.check()


@each_mode
def test_logprobs_of_a_batch_with_several_samples(
    engine: Engine, teacher: TeacherForcing, tally: Tally, mode: str
) -> None:
    """Each request with its own number of top tokens, none or zero included."""
    wanted = (None, 0, 1, 20)
    params = [SamplingParams(**{**COMMON, "logprobs": top}, **MODES[mode], n=2) for top in wanted]
    prompts = [make_prompt(4 + length, seed=61) for length in range(len(wanted))]
    for result, top in zip(engine.generate(prompts, params), wanted, strict=True):
        for output in result.outputs:
            if top is None:
                assert output.logprobs is None
                assert output.cumulative_logprob is None
            else:
                check_output(result.prompt_token_ids, output, teacher, top)
    tally.check()


@each_mode
@pytest.mark.parametrize("k", [1, 4, 8])
def test_counts_match_after_a_stop_at_every_index(
    engine: Engine, teacher: TeacherForcing, tally: Tally, mode: str, k: int
) -> None:
    sampling = {**COMMON, **MODES[mode], "num_speculative_tokens": k}
    prompt = PROMPTS[1]
    whole = engine.generate(prompt, **sampling).token_ids
    for index in [index for index, token in enumerate(whole) if token not in whole[:index]]:
        result = engine.generate(prompt, **sampling, stop_token_ids=[whole[index]])
        output = result.outputs[0]
        assert output.token_ids == whole[: index + 1]
        assert len(output.logprobs) == len(output.token_source) == index + 1
        check_output(prompt, output, teacher)
    tally.check()


# -- the prompt's ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [512, 3])
@pytest.mark.parametrize("num_blocks", [None, 14])
@pytest.mark.parametrize("n", [1, 2])
def test_prompt_logprobs_are_teacher_forcings_however_the_prompt_is_cut(
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    teacher: TeacherForcing,
    tally: Tally,
    chunk: int,
    num_blocks: int | None,
    n: int,
) -> None:
    """In chunks, preempted, again with a full prefix cache, for several samples."""
    draft = checkpoint(seed=1, noise=0.3)
    engine = build_engine(checkpoint(seed=1), draft, prefill_chunk_size=chunk, num_blocks=num_blocks)
    prompts = [*PROMPTS, make_prompt(19, seed=62), make_prompt(19, seed=62)]
    sampling = {**COMMON, "max_new_tokens": 9, "prompt_logprobs": 3, "n": n}
    first = engine.generate(prompts, **sampling)
    for results in (first, engine.generate(prompts, **sampling)):
        for result, expected in zip(results, first, strict=True):
            check_prompt(result, teacher, 3)
            assert_same(result, expected)
            for output in result.outputs:
                check_output(result.prompt_token_ids, output, teacher)
    tally.check()


def test_logprobs_are_plains_bits(engine: Engine, tally: Tally) -> None:
    for prompt in PROMPTS:
        expected = plain(engine, prompt, **WITHOUT_DRAFTS, prompt_logprobs=2)
        assert_same(engine.generate(prompt, **COMMON, prompt_logprobs=2), expected)
    tally.check()


# -- faults ------------------------------------------------------------------------------------------------------


def shifted_by_a_row(chosen: Callable[..., Any]) -> Callable[..., Any]:
    """Every token judged by the row after its own."""
    return lambda logits, *rest: chosen(logits.roll(-1, 0), *rest)


def own_token_by_the_row_before(chosen: Callable[..., Any]) -> Callable[..., Any]:
    """Only a round's last token (recovered or bonus) gets the row of the one before it."""

    def mutant(logits: Tensor, *rest: Any) -> Any:
        rows = list(range(logits.shape[0]))
        if len(rows) > 1:
            rows[-1] -= 1
        return chosen(logits[rows], *rest)

    return mutant


def tempered(chosen: Callable[..., Any]) -> Callable[..., Any]:
    """After the temperature."""
    return lambda logits, *rest: chosen(logits / 1.01, *rest)


def one_token_fewer_on_top(chosen: Callable[..., Any]) -> Callable[..., Any]:
    """The chosen token's id in place of the most likely one's."""

    def mutant(logits: Tensor, tokens: Tensor, num_top: int) -> Any:
        values, ids, top = chosen(logits, tokens, num_top)
        return values, ids.roll(1, 1), top

    return mutant


@pytest.mark.parametrize(
    "fault", [shifted_by_a_row, own_token_by_the_row_before, tempered, one_token_fewer_on_top]
)
def test_wrong_logprobs_are_noticed(
    engine: Engine, teacher: TeacherForcing, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any]
) -> None:
    backend = engine._target.backend

    class Mutant:
        token_logprobs = staticmethod(fault(backend.token_logprobs))

        def __getattr__(self, op: str) -> Any:
            return getattr(backend, op)

    monkeypatch.setattr(engine._target.decoder, "backend", Mutant())
    with pytest.raises(AssertionError):
        check_kinds(engine, teacher, MODES["rejection"])


def test_a_logprob_too_many_after_a_stop_is_noticed(
    engine: Engine, teacher: TeacherForcing, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = engine.generate(PROMPTS[1], **COMMON)
    output = result.outputs[0]
    output.logprobs.append(output.logprobs[-1])
    with pytest.raises(AssertionError, match="log-probabilities"):
        check_output(PROMPTS[1], output, teacher)
