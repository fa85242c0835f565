"""The bundled pair, as a user gets it: speculation changes no bit, and `transformers` says the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from law_helpers import BACKEND, Tally, assert_same, plain, run_op_by_op, spec

from specengine import Engine, GenerationResult, bundled
from specengine.kernels.types.packed import Norm, PackedLinear

KS = (1, 3, 4, 8)
BATCH_SIZES = (1, 7)
DTYPES = ("float32", "bfloat16")
NUM_PROMPTS = 200
MIN_EQUAL_TO_TRANSFORMERS = 195
NEAR_TIE = 1e-4
GREEDY: dict[str, Any] = {"logprobs": 1}
COUPLED: dict[str, Any] = {**GREEDY, "temperature": 0.8, "seed": 17, "acceptance": "coupled"}
each_dtype = pytest.mark.parametrize("engine", DTYPES, indirect=True)
each_sampling = pytest.mark.parametrize("sampling", [GREEDY, COUPLED], ids=["greedy", "coupled"])
each_batch_size = pytest.mark.parametrize("batch_size", BATCH_SIZES)


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(
        bundled.target_path(),
        bundled.draft_path(),
        backend=BACKEND,
        device="cpu",
        dtype=request.param,
        max_batch_size=max(BATCH_SIZES),
    ) as built:
        yield built


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [entry["prompt"] for entry in bundled.load_prompts()]


def check_pair(
    engine: Engine,
    prompts: Sequence[str],
    *,
    num_tokens: int,
    batch_size: int,
    sampling: dict[str, Any],
    ks: Sequence[int] = KS,
) -> list[GenerationResult]:
    """Every k in batches of `batch_size` gives what plain decoding gives alone: tokens, text, logprob bits."""
    limits = {**sampling, "max_new_tokens": num_tokens}
    expected = [plain(engine, prompt, **limits) for prompt in prompts]
    for k in ks:
        for first in range(0, len(prompts), batch_size):
            batch = list(prompts[first : first + batch_size])
            results = spec(engine, batch, k, **limits)
            for result, truth in zip(results, expected[first : first + batch_size], strict=True):
                assert_same(result, truth)
    return expected


def check_against_transformers(
    results: Sequence[GenerationResult], model: transformers.PreTrainedModel, num_tokens: int
) -> int:
    """How many greedy texts are those of `model.generate`; any other parts from it at a near-tie."""
    num_equal = 0
    for result in results:
        prompt, ours = result.prompt_token_ids, result.token_ids
        ids = torch.tensor([prompt])
        with torch.no_grad():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        theirs = output[0, len(prompt) :].tolist()
        if ours == theirs:
            num_equal += 1
            continue
        parted = next(
            (at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None
        )
        assert parted is not None, f"{len(ours)} tokens where transformers gives {len(theirs)}"
        with torch.no_grad():
            row = model(torch.tensor([prompt + ours[:parted]])).logits[0, -1].double()
        first, second = row.topk(2).values.tolist()
        assert first - second < NEAR_TIE, f"token {parted} differs, {first - second:.2g} from a tie"
        assert row[ours[parted]] >= second, f"token {parted} is neither of the two that tie"
    return num_equal


@pytest.fixture(scope="module")
def oracle() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        bundled.target_path(), dtype=torch.float32
    ).eval()


@each_dtype
@each_batch_size
@each_sampling
def test_a_few_prompts_give_plains_bits(
    engine: Engine, prompts: list[str], tally: Tally, batch_size: int, sampling: dict[str, Any]
) -> None:
    chosen = prompts[:7] if batch_size > 1 else prompts[7:8]
    check_pair(engine, chosen, num_tokens=32, batch_size=batch_size, sampling=sampling)
    tally.check()


@pytest.mark.parametrize("engine", ["float32"], indirect=True)
def test_a_few_greedy_texts_are_those_of_transformers(
    engine: Engine, prompts: list[str], tally: Tally, oracle: transformers.PreTrainedModel
) -> None:
    results = spec(engine, prompts[:4], 4, max_new_tokens=32)
    assert check_against_transformers(results, oracle, 32) >= 3
    tally.check()


@pytest.mark.slow
@each_dtype
@each_batch_size
@each_sampling
def test_every_prompt_gives_plains_bits(
    engine: Engine, prompts: list[str], tally: Tally, batch_size: int, sampling: dict[str, Any]
) -> None:
    assert len(prompts) == NUM_PROMPTS
    check_pair(engine, prompts, num_tokens=128, batch_size=batch_size, sampling=sampling)
    tally.check()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["float32"], indirect=True)
def test_the_greedy_texts_are_those_of_transformers(
    engine: Engine, prompts: list[str], tally: Tally, oracle: transformers.PreTrainedModel
) -> None:
    results = spec(engine, prompts, 4, max_new_tokens=128)
    assert check_against_transformers(results, oracle, 128) >= MIN_EQUAL_TO_TRANSFORMERS
    tally.check()


# -- faults ------------------------------------------------------------------------------------------------------


class RowVariantBackend:
    """A head whose rounding depends on how many rows it computes, as a library's matrix product does."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def head_stats(
        self, hidden: torch.Tensor, norm: Norm, weight: PackedLinear, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, stats = self._backend.head_stats(hidden, norm, weight, *rest)
        return logits if len(hidden) == 1 else logits * (1 + 2**-22), stats

    def __getattr__(self, op: str) -> Callable[..., Any]:
        return getattr(self._backend, op)


@pytest.mark.parametrize("engine", ["float32"], indirect=True)
def test_a_head_that_rounds_by_the_number_of_rows_is_noticed(
    engine: Engine, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = engine._target.decoder
    monkeypatch.setattr(decoder, "backend", RowVariantBackend(decoder.backend))
    run_op_by_op(engine, monkeypatch)
    with pytest.raises(AssertionError):
        check_pair(engine, prompts[:1], num_tokens=16, batch_size=1, sampling=GREEDY, ks=(3,))


@pytest.mark.parametrize("engine", ["float32"], indirect=True)
def test_a_text_that_parts_from_transformers_is_noticed(
    engine: Engine, prompts: list[str], oracle: transformers.PreTrainedModel
) -> None:
    result = plain(engine, prompts[0], max_new_tokens=16)
    result.token_ids[5] = (result.token_ids[5] + 1) % engine.vocab_size
    with pytest.raises(AssertionError, match="token 5"):
        check_against_transformers([result], oracle, 16)


def test_a_bad_word_is_banned_alone_and_after_a_space() -> None:
    prompt = "class Stack:\n    def push(self, item):\n"
    with Engine(bundled.target_path(), bundled.draft_path()) as engine:
        asked = {"max_new_tokens": 40, "num_speculative_tokens": 3}
        assert "self" in engine.generate(prompt, **asked).text
        result = engine.generate(prompt, bad_words=["self"], **asked)
        plain = engine.generate(prompt, bad_words=["self"], **{**asked, "num_speculative_tokens": 0})
    assert result.token_ids == plain.token_ids
    assert "self" not in result.text
