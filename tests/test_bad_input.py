"""Bad input is a clear error that names parameter and value, before anything is queued or allocated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from law_helpers import assert_idle, assert_same, make_prompt, spec
from scripted_drafters import RandomDrafter

import specengine
from conftest import CheckpointFactory, EngineFactory
from specengine import DraftProposal, Engine, EngineConfig, SamplingParams, SpecEngineError
from specengine.engine import assembly
from specengine.errors import InsufficientMemoryError, ModelLoadError, VocabularyMismatchError
from specengine.runtime import kv_cache

VOCAB = 64
CONTEXT = 96
INFINITY = 1e400
PROMPT = make_prompt(6, seed=70)


def check_refused(
    call: Callable[[], object], *named: str, error: type[Exception] | tuple[type[Exception], ...] = ValueError
) -> None:
    """The call raises `error`, and its message contains each of `named`: parameter, value, what is possible."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for part in named:
        assert part in message, f"{message!r} does not mention {part!r}"
    assert len(message) < 600, f"{len(message)} characters are no message"


# -- sampling parameters -----------------------------------------------------------------------------------------

BAD_VALUES: list[tuple[str, Any, str]] = [
    *[("max_new_tokens", value, str(value)) for value in (0, -1, 10**12, 2**31)],
    *[("min_new_tokens", value, str(value)) for value in (-1, 10**12, 129)],
    *[
        (name, value, str(value))
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        for value in (math.nan, INFINITY, -INFINITY)
    ],
    ("temperature", -1, "-1"),
    ("temperature", 1e-5, "1e-05"),
    ("temperature", 10**400, "1000"),
    ("temperature", 1e9, "1e+09"),
    ("top_p", 0.0, "0"),
    ("top_p", -0.1, "-0.1"),
    ("top_p", 1.1, "1.1"),
    ("min_p", 1.1, "1.1"),
    ("min_p", -0.1, "-0.1"),
    ("top_k", -1, "-1"),
    ("top_k", 2**31, str(2**31)),
    ("seed", -1, "-1"),
    ("seed", 2**64, str(2**64)),
    *[("n", value, str(value)) for value in (0, -1, 65, 10**6)],
    *[("num_speculative_tokens", value, str(value)) for value in (-1, 65, 10**6, "fast")],
    *[("logprobs", value, str(value)) for value in (-1, 21)],
    *[("prompt_logprobs", value, str(value)) for value in (-1, 21)],
    ("stop", ["a"] * 10_000, "10000"),
    ("stop", ["a"] * 17, "17"),
    ("stop", "", "0"),
    ("stop", "a" * 257, "257"),
    ("stop_token_ids", [-1], "-1"),
    ("stop_token_ids", [2**31], str(2**31)),
    ("logit_bias", {-1: 1.0}, "-1"),
    ("logit_bias", {2**31: 1.0}, str(2**31)),
    ("logit_bias", {3: math.nan}, "nan"),
    ("logit_bias", {3: INFINITY}, "inf"),
    ("logit_bias", {3: 1e5}, "100000"),
    ("acceptance", "always", "always"),
    ("bad_words", [""], "[0]"),
    ("bad_words", ["a", []], "[1]"),
    ("bad_words", [[1] * 257], "257"),
    ("bad_words", ["a"] * 1025, "1025"),
    ("bad_words", [[3, -1]], "-1"),
    ("bad_words", [[2**31]], str(2**31)),
    ("acceptance", "thresholds", "thresholds"),
    ("acceptance_threshold", 1.5, "1.5"),
    ("acceptance_delta", -0.1, "-0.1"),
    *[("repetition_penalty", value, f"{value:g}") for value in (0, -1.2, 0.009, 101)],
    ("presence_penalty", -100.5, "-100.5"),
    ("frequency_penalty", 101, "101"),
]
BAD_TYPES: list[tuple[str, Any, str]] = [
    *[("max_new_tokens", value, repr(value)) for value in (2.5, "8", None, True)],
    ("temperature", "hot", "hot"),
    ("temperature", None, "None"),
    ("temperature", 1j, "1j"),
    ("temperature", True, "True"),
    ("top_k", math.nan, "nan"),
    ("top_p", "0.9", "0.9"),
    ("seed", 1.5, "1.5"),
    ("seed", math.nan, "nan"),
    ("n", INFINITY, "inf"),
    ("num_speculative_tokens", 2.0, "2.0"),
    ("num_speculative_tokens", None, "None"),
    ("stop", 5, "5"),
    ("stop", [5], "5"),
    ("stop", ["a", None], "None"),
    ("stop_token_ids", [1.5], "1.5"),
    ("stop_token_ids", "ab", "a"),
    ("logit_bias", {"a": 1.0}, "a"),
    ("logit_bias", {3: "b"}, "b"),
    ("logit_bias", [3], "3"),
    ("logits_processor", 5, "5"),
    ("logits_processor", [print, "f"], "f"),
    ("bad_words", 5, "5"),
    ("bad_words", [3, 4], "3"),
    ("bad_words", [["a"]], "a"),
    ("bad_words", {"a": 1}, "a"),
    ("ignore_eos", 1, "1"),
    ("include_stop_str_in_output", "no", "no"),
    ("logprobs", True, "True"),
    ("repetition_penalty", "high", "high"),
]


@pytest.mark.parametrize(("name", "value", "shown"), BAD_VALUES, ids=lambda value: str(value)[:24])
def test_a_sampling_value_that_cannot_be_is_named(name: str, value: Any, shown: str) -> None:
    check_refused(lambda: SamplingParams(**{name: value}), name, shown)


@pytest.mark.parametrize(("name", "value", "shown"), BAD_TYPES, ids=lambda value: str(value)[:24])
def test_a_sampling_value_of_the_wrong_type_is_named(name: str, value: Any, shown: str) -> None:
    check_refused(lambda: SamplingParams(**{name: value}), name, shown, error=(TypeError, ValueError))


def test_max_new_tokens_up_to_the_limit_are_cut_to_the_context(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    engine = build_engine(checkpoint(seed=1), RandomDrafter(vocab_size=VOCAB))
    result = engine.generate(PROMPT, max_new_tokens=2**31 - 1, num_speculative_tokens=64, ignore_eos=True)
    assert len(result.token_ids) == CONTEXT - len(PROMPT)
    assert result.finish_reason == "length"


@pytest.mark.parametrize("build", [SamplingParams, EngineConfig])
def test_an_unknown_field_is_named(build: type) -> None:
    check_refused(lambda: build(temprature=1.0), "temprature", error=TypeError)


# -- engine configuration ----------------------------------------------------------------------------------------

BAD_CONFIGS: list[tuple[str, Any]] = [
    ("dtype", "float64"),
    ("dtype", "int8"),
    ("weight_dtype", "int2"),
    ("draft_weight_dtype", 8),
    ("kv_dtype", "fp8"),
    ("backend", "cuda"),
    ("backend", None),
    ("block_size", 0),
    ("block_size", -1),
    ("block_size", 10**6),
    ("block_size", 2.0),
    ("max_batch_size", 0),
    ("max_batch_size", 10**12),
    ("max_batch_size", math.nan),
    ("prefill_chunk_size", 0),
    ("prefill_chunk_size", 10**12),
    ("num_blocks", 0),
    ("num_blocks", 2**31),
    ("kv_cache_bytes", -1),
    ("kv_cache_bytes", 10**30),
    ("max_seq_len", 0),
    ("max_seq_len", INFINITY),
    ("max_seq_len", CONTEXT + 1),
    ("num_threads", 0),
    ("num_threads", 10**6),
    ("enable_prefix_cache", "yes"),
    ("allow_pickle", 1),
    ("deterministic", False),
    ("deterministic", None),
    ("cuda_graphs", True),
    ("cuda_graphs", "always"),
    ("rounds_ahead", -1),
    ("rounds_ahead", 5),
    ("rounds_ahead", "all"),
    ("forced_acceptance", 1.5),
    ("forced_acceptance", float("nan")),
    ("forced_acceptance", "most"),
    ("device", "tpu"),
    ("device", "cuda:x"),
    ("device", "meta"),
    ("device", ""),
]


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a model is loaded or a KV cache allocated."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("something was allocated before the error")

    monkeypatch.setattr(assembly, "load_model", fail)
    monkeypatch.setattr(assembly, "KVCache", fail)


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(("name", "value"), BAD_CONFIGS, ids=str)
def test_an_engine_option_that_cannot_be_is_named_before_a_model_is_loaded(
    checkpoint: CheckpointFactory, name: str, value: Any
) -> None:
    shown = str(int(value)) if isinstance(value, float) and value == 2.0 else str(value)
    check_refused(
        lambda: Engine(checkpoint(seed=1), **{"backend": "reference", name: value}),
        name,
        shown,
        error=(ValueError, TypeError),
    )


@pytest.mark.usefixtures("nothing_loads")
def test_engine_arguments_that_contradict_or_do_not_exist_are_named(checkpoint: CheckpointFactory) -> None:
    path = checkpoint(seed=1)
    check_refused(lambda: Engine(path, max_batch=3), "max_batch", "max_batch_size", error=TypeError)
    check_refused(
        lambda: Engine(path, config=EngineConfig(), block_size=8), "config", "block_size", error=TypeError
    )
    check_refused(lambda: Engine(path, num_blocks=9, kv_cache_bytes=99), "num_blocks=9", "kv_cache_bytes=99")
    for draft in ("ngram:0", "suffix:2", "self:x", "self:9"):
        for given in (draft, [draft], ("suffix", draft)):
            check_refused(lambda given=given: Engine(path, given), "draft_model", repr(draft))
    if not torch.cuda.is_available():
        check_refused(lambda: Engine(path, device="cuda"), "device", "cuda")


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("drafters", "what"),
    [
        ([], "got 0"),
        (["ngram"] * 17, "1 to 16 drafters"),
        (["ngram", "suffix", "ngram"], "'ngram' twice"),
        (["self:1", ["suffix"]], "['suffix']"),
        (["self:1", None], "None"),
        (["self:1", ""], "''"),
        (["self:1", 7], "7"),
        (["suffix", Path("/nowhere")], "/nowhere"),
        ({"ngram": "suffix"}, "{'ngram': 'suffix'}"),
    ],
    ids=str,
)
def test_a_list_of_drafters_that_cannot_be_is_named(
    checkpoint: CheckpointFactory, drafters: Any, what: str
) -> None:
    path = checkpoint(seed=1)
    error = (ValueError, TypeError, ModelLoadError)
    name = "" if "nowhere" in what else "draft_model"
    check_refused(lambda: Engine(path, drafters), name, what, error=error)
    check_refused(
        lambda: specengine.generate("a", model=str(path), draft_model=drafters), name, what, error=error
    )


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("model", [None, 5, b"gpt2", "", "no/such/dir/here", Path("/nowhere")], ids=repr)
def test_a_model_that_is_none_is_named(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shown = str(model) if isinstance(model, str | Path) else type(model).__name__
    check_refused(lambda: Engine(model), shown, error=(ValueError, TypeError, SpecEngineError))


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("draft", [5, 2.5, b"gpt2", object, "no/such/dir/here", ""], ids=repr)
def test_a_draft_that_is_none_is_named(checkpoint: CheckpointFactory, draft: Any) -> None:
    check_refused(
        lambda: Engine(checkpoint(seed=1), draft, backend="reference"),
        str(draft),
        error=(ValueError, TypeError, SpecEngineError),
    )


# -- memory and vocabularies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{"kv_cache_bytes": 1}, {"num_blocks": 1}], ids=str)
def test_a_cache_without_room_for_a_block_says_what_is_needed(
    checkpoint: CheckpointFactory, config: dict[str, int]
) -> None:
    (name,) = config
    check_refused(
        lambda: Engine(checkpoint(seed=1), backend="reference", **config),
        name,
        "at least 2",
        error=InsufficientMemoryError,
    )


def test_a_cache_too_small_for_the_context_says_what_would_fit(checkpoint: CheckpointFactory) -> None:
    """And it does fit."""
    # 2 layers x keys and values x 32 features x 4 bytes = 512 bytes a token
    config: dict[str, Any] = {"kv_cache_bytes": 10 * 4 * 512, "block_size": 4, "backend": "reference"}
    check_refused(
        lambda: Engine(checkpoint(seed=1), **config, max_seq_len=96),
        "max_seq_len=96",
        "kv_cache_bytes=20,480",
        "max_seq_len=36 would fit",
        error=InsufficientMemoryError,
    )
    with Engine(checkpoint(seed=1), **config, max_seq_len=36) as engine:
        result = engine.generate(PROMPT, max_new_tokens=100, ignore_eos=True)
        assert len(result.token_ids) == 36 - len(PROMPT)


@pytest.mark.parametrize("config", [{"num_blocks": 2**31 - 1}, {"kv_cache_bytes": 2**49}], ids=str)
def test_a_cache_beyond_the_machines_memory_says_what_would_fit(
    checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch, config: dict[str, int]
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("blocks were allocated before the error")

    monkeypatch.setattr(kv_cache._C, "PagedKVCache", fail)
    (name,) = config
    check_refused(
        lambda: Engine(checkpoint(seed=1), backend="reference", **config),
        name,
        f"{config[name]:,}" if name == "kv_cache_bytes" else str(config[name]),
        "would fit",
        error=InsufficientMemoryError,
    )


def test_a_refused_allocation_says_what_to_lower(
    checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullTorch:
        def empty(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(kv_cache, "torch", FullTorch())
    check_refused(
        lambda: Engine(checkpoint(seed=1), backend="reference"),
        "bytes",
        "lower max_batch_size, max_seq_len, num_blocks or kv_cache_bytes",
        error=InsufficientMemoryError,
    )


def test_a_draft_of_another_vocabulary_is_refused_with_both_names(checkpoint: CheckpointFactory) -> None:
    target = checkpoint(seed=1, with_tokenizer=True)
    draft = checkpoint(seed=2, vocab_size=300)
    check_refused(lambda: Engine(target, draft), str(target), str(draft), error=VocabularyMismatchError)


def test_speculation_without_a_draft_is_refused(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    engine = build_engine(checkpoint(seed=1))
    check_refused(
        lambda: engine.generate(PROMPT, num_speculative_tokens=3), "num_speculative_tokens=3", "draft_model"
    )
    assert len(engine.generate(PROMPT, num_speculative_tokens=0, max_new_tokens=3).token_ids) <= 3


# -- requests, while others run ----------------------------------------------------------------------------------

BAD_REQUESTS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "empty text": ("", {}, ("prompt", "''")),
    "empty list": ([], {}, ("prompt", "[]")),
    "empty ids": ([[]], {}, ("prompt", "[]")),
    "empty text in a list": ([[1], ""], {}, ("prompt", "''")),
    "empty array": (np.array([], dtype=np.int64), {}, ("prompt",)),
    "no prompt": (None, {}, ("prompt", "None")),
    "a number": (5, {}, ("prompt", "5")),
    "bytes": (b"abc", {}, ("prompt", "b'abc'")),
    "a dict": ({"a": 1}, {}, ("prompt", "'a'")),
    "id -1": ([1, -1, 2], {}, ("prompt", "-1", str(VOCAB - 1))),
    "id V": ([1, VOCAB], {}, ("prompt", str(VOCAB), str(VOCAB - 1))),
    "id 2**31": ([2**31], {}, ("prompt", str(2**31))),
    "id 2**64": ([[1], [2**64]], {}, ("prompt", str(2**64))),
    "id 1.5": ([1.5], {}, ("prompt", "1.5")),
    "id NaN": ([[1, math.nan]], {}, ("prompt", "nan")),
    "id True": ([True], {}, ("prompt", "True")),
    "id None": ([[1, None]], {}, ("prompt", "None")),
    "id in text": ([[1, "a"]], {}, ("prompt", "'a'")),
    "ids and text": ([1, "a"], {}, ("prompt", "1")),
    "floats": (torch.tensor([1.0, 2.0]), {}, ("prompt", "1.0")),
    "three dimensions": (torch.zeros(1, 1, 1, dtype=torch.int64), {}, ("prompt",)),
    "a full context": ([1] * CONTEXT, {}, ("prompt", str(CONTEXT))),
    "more than a context": ([[1], [2] * 100_000], {}, ("prompt", "100000", str(CONTEXT))),
    "an unknown name": (PROMPT, {"temprature": 1.0}, ("temprature",)),
    "params and names": (PROMPT, {"params": SamplingParams(), "top_k": 3}, ("params", "top_k")),
    "too few params": ([PROMPT, PROMPT], {"params": [SamplingParams()]}, ("params", "1", "2")),
    "params that are none": ([PROMPT], {"params": [{"top_k": 3}]}, ("params", "top_k")),
    "params of a wrong type": (PROMPT, {"params": 5}, ("params", "5")),
    "stop id V": (PROMPT, {"stop_token_ids": [VOCAB]}, ("stop_token_ids", str(VOCAB))),
    "bias of id V": (PROMPT, {"logit_bias": {VOCAB: 1.0}}, ("logit_bias", str(VOCAB))),
    "bad word of id V": (PROMPT, {"bad_words": [[1, VOCAB]]}, ("bad_words", str(VOCAB))),
    "a bad word without a tokenizer": (PROMPT, {"bad_words": "x"}, ("bad_words", "'x'", "tokenizer")),
    "a stop string without a tokenizer": (PROMPT, {"stop": "x"}, ("stop", "'x'", "tokenizer")),
    "text without a tokenizer": ("abc", {}, ("tokenizer", "'abc'")),
    "k beyond": (PROMPT, {"num_speculative_tokens": 10**6}, ("num_speculative_tokens", "1000000")),
    "n beyond": (PROMPT, {"n": 10**6}, ("n must", "1000000")),
    "too large for the pool": (PROMPT, {"max_new_tokens": 90}, ("max_new_tokens=90", "16", "num_blocks")),
}


@pytest.fixture
def engine(checkpoint: CheckpointFactory, build_engine: EngineFactory) -> Engine:
    return build_engine(checkpoint(seed=1), checkpoint(seed=1, noise=0.3), num_blocks=17)


def running(engine: Engine) -> Iterator[None]:
    """Two requests, half done at the yield, must end as if they had been alone."""
    params = SamplingParams(max_new_tokens=20, num_speculative_tokens=3, ignore_eos=True, logprobs=1)
    prompts = [PROMPT, make_prompt(4, seed=71)]
    num_free = engine.num_free_blocks
    alone = [engine.generate(prompt, params) for prompt in prompts]
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    events = engine.step() + engine.step()
    held = engine.num_free_blocks
    yield
    assert engine.num_free_blocks == held, "a refused request holds blocks"
    assert len(engine._scheduler.waiting) + len(engine._scheduler.running) == len(ids), "it was queued"
    while engine.has_work:
        events += engine.step()
    results = {event.index: event.result for event in events if event.result is not None}
    for request_id, expected in zip(ids, alone, strict=True):
        assert_same(results[request_id], expected)
    assert_idle(engine, num_free)


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_named_and_costs_the_others_nothing(engine: Engine, name: str) -> None:
    prompts, sampling, named = BAD_REQUESTS[name]
    sampling = {"max_new_tokens": 4, **sampling} if "params" not in sampling else sampling
    if name == "params of a wrong type" or name == "params and names":
        sampling.pop("max_new_tokens", None)
    others = running(engine)
    next(others)
    for call in (engine.generate, engine.stream):
        check_refused(lambda call=call: call(prompts, **sampling), *named, error=(ValueError, TypeError))
    assert next(others, None) is None


@pytest.mark.parametrize("prompt", ["", [], [-1], [VOCAB], [2**31], [1] * CONTEXT, None, [1.5]], ids=str)
def test_a_bad_added_request_is_named_and_costs_the_others_nothing(engine: Engine, prompt: Any) -> None:
    others = running(engine)
    next(others)
    check_refused(lambda: engine.add_request(prompt), "prompt", error=(ValueError, TypeError))
    check_refused(
        lambda: engine.add_request(PROMPT, {"top_k": 3}), "params", "top_k", error=(ValueError, TypeError)
    )
    assert next(others, None) is None


def test_one_bad_prompt_of_a_list_queues_none_of_it(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"prompt\[2\]\[1\] must be between 0 and 63, got 64"):
        engine.stream([PROMPT, PROMPT, [1, VOCAB]], max_new_tokens=4)
    assert not engine.has_work
    assert_idle(engine, 16)


def test_a_request_that_is_queued_although_it_is_refused_is_noticed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: a request is queued before its neighbours in the list are checked."""
    build = engine._intake._build

    def mutant(*given: Any) -> Any:
        request = build(*given)
        engine._scheduler.add(request)
        return request

    others = running(engine)
    next(others)
    monkeypatch.setattr(engine._intake, "_build", mutant)
    with pytest.raises(ValueError, match="no room"):
        engine.generate([PROMPT, [1] * CONTEXT], max_new_tokens=4)
    with pytest.raises(AssertionError, match="queued"):
        next(others)


# -- drafters ----------------------------------------------------------------------------------------------------


def proposal(tokens: Any, counts: Any) -> DraftProposal:
    return DraftProposal(torch.tensor(tokens, dtype=torch.int32), torch.tensor(counts, dtype=torch.int32))


BAD_PROPOSALS: dict[str, tuple[DraftProposal, str]] = {
    "id -1": (proposal([[-1]], [1]), "-1"),
    "id V": (proposal([[VOCAB]], [1]), str(VOCAB)),
    "fewer than counted": (proposal([[1]], [2]), "2"),
    "a negative count": (proposal([[1]], [-1]), "-1"),
    "another batch": (proposal([[1], [2]], [1, 1]), "[2, 1]"),
    "no batch": (proposal([1], [1]), "[1]"),
}


@pytest.mark.parametrize("name", BAD_PROPOSALS)
def test_a_malformed_proposal_names_its_drafter_and_loses_no_request(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, name: str
) -> None:
    bad, shown = BAD_PROPOSALS[name]

    class Broken(RandomDrafter):
        name = "broken"
        is_broken = False

        def propose(self, batch: Any) -> DraftProposal:
            return bad if self.is_broken else super().propose(batch)

    drafter = Broken(vocab_size=VOCAB)
    engine = build_engine(checkpoint(seed=1), drafter)
    sampling: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True, "logprobs": 0}
    expected = spec(engine, PROMPT, 3, **sampling)
    num_free = engine.num_free_blocks
    request_id = engine.add_request(PROMPT, SamplingParams(**sampling, num_speculative_tokens=3))
    events = engine.step() + engine.step()
    drafter.is_broken = True
    check_refused(engine.step, "'broken'", shown)
    drafter.is_broken = False
    while engine.has_work:
        events += engine.step()
    (result,) = [event.result for event in events if event.result is not None]
    assert events[-1].index == request_id
    assert_same(result, expected)
    assert_idle(engine, num_free)
