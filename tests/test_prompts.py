"""What a prompt may be, the same at every door, and what is refused there before anybody else notices."""

from __future__ import annotations

import array
import threading
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from law_helpers import CheckpointFactory, EngineFactory, assert_idle, assert_same

from specengine import SamplingParams
from specengine.call import prepare_call
from specengine.config import EngineConfig
from specengine.engine import Engine
from specengine.prompt import check_prompts
from specengine.tokenizer import Tokenizer

IDS = [3, 4, 5]
ONE = {
    "list": IDS,
    "tuple": (3, 4, 5),
    "range": range(3, 6),
    "tensor": torch.tensor(IDS),
    "array": np.array(IDS),
    "an array of Python's": array.array("i", IDS),
    "tensors without dimensions": [torch.tensor(3), torch.tensor(4), torch.tensor(5)],
    "NumPy's integers": [np.int64(3), np.int32(4), 5],
    "arrays without dimensions": (np.array(3), np.array(4), np.array(5)),
}
SEVERAL: dict[str, Any] = {
    "lists": [IDS, IDS],
    "text and ids": ["ab", (3, 4, 5)],
    "a matrix": torch.tensor([IDS, IDS]),
    "tensors": [torch.tensor(IDS), np.array(IDS)],
    "a tuple of ranges": (range(3, 6), range(3, 6)),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "bytes": (b"abc", "prompt must be a string"),
    "a set": ({3, 4}, "prompt must be a string"),
    "None": (None, "prompt must be a string"),
    "a generator": ((token for token in IDS), "prompt must be a string"),
    "booleans": ([3, True], r"prompt\[1\] must be an integer"),
    "numbers": ([3, 4.0], r"prompt\[1\] must be an integer"),
    "a tensor of numbers": (torch.tensor([3.0]), r"prompt\[0\] must be a string"),
    "text among ids": ([3, "ab"], r"prompt\[1\] must be an integer"),
    "empty among others": (["ab", []], r"prompt\[1\] must not be empty"),
    "half a character": ("ab\ud800", "position 2"),
}


@pytest.fixture
def engine(checkpoint: CheckpointFactory, build_engine: EngineFactory) -> Engine:
    return build_engine(checkpoint("gpt2", with_tokenizer=True))


@pytest.mark.parametrize("name", ONE)
def test_one_prompt_is_the_same_at_every_door(engine: Engine, name: str) -> None:
    given: Any = ONE[name]
    assert check_prompts(given) == ([IDS], True)
    assert prepare_call(given, {}).prompt == IDS
    truth = engine.generate(IDS, max_new_tokens=3)
    assert_same(engine.generate(given, max_new_tokens=3), truth)
    assert [event.result for event in engine.stream(given, max_new_tokens=3)][-1].token_ids == truth.token_ids
    engine.add_request(given, SamplingParams(max_new_tokens=1))
    assert engine.step()[-1].result.prompt_token_ids == IDS


@pytest.mark.parametrize("name", SEVERAL)
def test_several_prompts_are_the_same_at_every_door(engine: Engine, name: str) -> None:
    prompts, is_single = check_prompts(SEVERAL[name])
    assert not is_single
    assert prompts[1] == IDS
    assert prepare_call(SEVERAL[name], {}).prompts == prompts
    results = engine.generate(SEVERAL[name], max_new_tokens=1)
    assert [result.prompt_token_ids for result in results][1] == IDS


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_prompt_is_named_at_every_door(engine: Engine, name: str) -> None:
    given, message = REFUSED[name]
    for call in (check_prompts, lambda prompt: prepare_call(prompt, {}), engine.generate, engine.stream):
        with pytest.raises((TypeError, ValueError), match=message):
            call(given)


def test_a_text_with_a_token_that_the_model_lacks_is_refused_at_the_door(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    directory = checkpoint("gpt2", seed=5, with_tokenizer=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(["[PAD]"])
    engine = build_engine(directory, tokenizer=tokenizer)
    num_free, params = engine.num_free_blocks, SamplingParams(max_new_tokens=4)
    truth = engine.generate("abc", params)
    request_id = engine.add_request("abc", params)
    with pytest.raises(ValueError, match=r"prompt\[1\] holds the token '\[PAD\]', whose id 320"):
        engine.generate(["abc", "ab[PAD]c"], params)
    with pytest.raises(ValueError, match=r"prompt holds the token '\[PAD\]'"):
        engine.add_request("ab[PAD]c", params)
    events = []
    while engine.has_work:
        events += engine.step()
    assert_same(events[-1].result, truth)
    assert events[-1].index == request_id
    assert_idle(engine, num_free)


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: pytest.fail("it was tokenised"))
    with pytest.raises(ValueError, match=r"prompt has at least .* tokens, which leaves no room"):
        engine.generate("a" * 1_000_000)


def test_no_text_has_fewer_tokens_than_is_said(engine: Engine) -> None:
    assert engine.tokenizer is not None
    for text in ("the " * 3000, "é" * 5000, "x" * 9000):
        assert 0 < engine.tokenizer.fewest_tokens(text) <= len(engine.tokenizer.encode(text))


def test_others_go_on_while_a_long_text_is_tokenised(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    is_inside, may_end = threading.Event(), threading.Event()
    encode = Tokenizer.encode

    def slow(self: Tokenizer, text: str) -> list[int]:
        if len(text) > 10:
            is_inside.set()
            assert may_end.wait(60)
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    results: list[Any] = []
    other = threading.Thread(target=lambda: results.append(engine.generate("x" * 20, max_new_tokens=1)))
    other.start()
    assert is_inside.wait(60)
    assert engine.generate("abc", max_new_tokens=3).finish_reason == "length"
    may_end.set()
    other.join(60)
    assert len(results) == 1


def test_a_prompt_that_fills_the_context_can_be_scored(engine: Engine) -> None:
    num_free = engine.num_free_blocks
    longest = [1 + place % 60 for place in range(engine.max_seq_len)]
    scored = engine.generate(longest, max_new_tokens=0, prompt_logprobs=1, n=2)
    shorter = engine.generate(longest[:-1], max_new_tokens=1, prompt_logprobs=1)
    assert scored.prompt_logprobs[:-1] == shorter.prompt_logprobs
    assert len(scored.prompt_logprobs) == len(longest)
    assert scored.prompt_logprobs[-1].token_id == longest[-1]
    assert [(output.token_ids, output.finish_reason) for output in scored.outputs] == [([], "length")] * 2
    for refused in ({"max_new_tokens": 0}, {"max_new_tokens": 1, "prompt_logprobs": 1}):
        with pytest.raises(ValueError, match=r"max_new_tokens|room"):
            engine.generate(longest, **refused)
    assert_idle(engine, num_free)


def test_what_is_cached_is_counted_once_although_a_prompt_is_preempted_in_its_middle(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    engine = build_engine(checkpoint("gpt2"), prefill_chunk_size=8)
    prompt = [1 + place % 60 for place in range(32)]
    engine.add_request(prompt, SamplingParams(max_new_tokens=2))
    engine.step()
    (sequence,) = engine._scheduler.running
    assert engine._scheduler.num_computed(sequence) == 8
    engine._scheduler._preempt(sequence)
    while engine.has_work:
        events = engine.step()
    metrics = events[-1].result.metrics
    assert (metrics.num_cached_tokens, metrics.num_preemptions) == (0, 1)


@pytest.mark.parametrize("value", [0, 1, 1.0, "True", None, np.True_])
@pytest.mark.parametrize(
    ("cls", "name"),
    [(EngineConfig, name) for name in ("cuda_graphs", "enable_prefix_cache", "deterministic", "allow_pickle")]
    + [(SamplingParams, name) for name in ("include_stop_str_in_output", "ignore_eos")],
)
def test_a_flag_is_true_or_false(cls: Any, name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name} must be .*True or False"):
        cls(**{name: value})
