"""Prompts as people give them: of many chunks, as long as the context, and said again with a little more.

What may cost as much as the context is long is counted, not timed.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from law_helpers import (
    CheckpointFactory,
    EngineFactory,
    Tally,
    assert_idle,
    assert_same,
    drafters_of,
    make_prompt,
    plain,
    run_part_by_part,
    spec,
)

from specengine.engine.prompts import Prompts
from specengine.engine.scheduler import Chunk
from specengine.models.decoder import Decoder
from specengine.runtime import kv_cache
from specengine.runtime.sequence import Sequence

# 1 layer x keys and values x 16 features x 4 bytes
TINY: dict[str, Any] = {"num_layers": 1, "num_heads": 2, "num_key_value_heads": 1, "hidden_size": 32}
BYTES_PER_TOKEN = 128


# The context that an engine has


def test_a_context_that_nobody_asked_for_is_what_the_budget_holds(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 3.2 has 131,072 positions; whoever did not ask for all of them is told how many there are."""
    monkeypatch.setattr(kv_cache, "_DEFAULT_CPU_BYTES", 1001 * 16 * BYTES_PER_TOKEN)
    model = checkpoint("llama", **TINY, max_positions=131_072)
    with pytest.warns(UserWarning, match=r"16,000 tokens of the model's 131,072.*16,779,264 would do"):
        engine = build_engine(model, block_size=16)
    assert engine.max_seq_len == 16_000
    (result,) = engine.generate([make_prompt(20)], max_new_tokens=4, ignore_eos=True)
    assert len(result.token_ids) == 4
    with pytest.raises(
        ValueError, match="16000 tokens, which leaves no room for a new one in a context of 16000"
    ):
        engine.generate(make_prompt(16_000), max_new_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build_engine(model, block_size=16, max_seq_len=16_000).max_seq_len == 16_000
        assert build_engine(model, block_size=16, kv_cache_bytes=16_779_264).max_seq_len == 131_072
        assert build_engine(model, num_blocks=30).max_seq_len == 131_072


# Law J: chunk boundaries anywhere


def copied_prompt(length: int, *, period: int = 90) -> list[int]:
    """Random tokens that come again after `period`, so that lookups draft, with some that differ, so that they err."""
    prompt = make_prompt(period) * (length // period + 1)
    for at in range(0, length, 37):
        prompt[at] = 1 + at % 63
    return prompt[:length]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_change_no_bit(checkpoint: CheckpointFactory, build_engine: EngineFactory, dtype: str) -> None:
    """Boundaries inside a block, on its edge, inside a tile of attention, on its edge, and none at all."""
    model = checkpoint("llama", **TINY, max_positions=8192)
    prompts = [copied_prompt(1300), copied_prompt(700, period=33)]
    sampling: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 0}
    config: dict[str, Any] = {
        "block_size": 16,
        "dtype": dtype,
        "max_batch_size": 2,
        "enable_prefix_cache": False,
    }
    whole = build_engine(model, prefill_chunk_size=8192, **config)
    expected = [whole.generate(prompt, **sampling) for prompt in prompts]
    assert expected[0].metrics.num_target_forwards == 1 + 5
    for chunk in (61, 128, 513, 1024):
        engine = build_engine(model, prefill_chunk_size=chunk, **config)
        for result, alone in zip(engine.generate(prompts, **sampling), expected, strict=True):
            assert_same(result, alone)
        assert engine.generate(prompts[0], **sampling).metrics.num_target_forwards == -(-1300 // chunk) + 5


def test_a_fault_at_a_chunks_edge_is_noticed(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that sees one token less of what came before it."""
    model = checkpoint("llama", **TINY, max_positions=8192)
    sampling: dict[str, Any] = {"max_new_tokens": 2, "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 0}
    expected = build_engine(model, prefill_chunk_size=8192).generate(copied_prompt(600), **sampling)
    engine = build_engine(model, prefill_chunk_size=512)
    run = Prompts.run

    def forget_one(prompts: Prompts, chunks: list[Chunk]) -> None:
        last = chunks[0]
        if last.start:
            keys_and_values = engine._kv_cache.tensors[0]
            block = int(engine._kv_cache.block_table[0, (last.start - 1) // 4])
            keys_and_values[:, :, block, :, (last.start - 1) % 4] = 0
        run(prompts, chunks)

    monkeypatch.setattr(Prompts, "run", forget_one)
    with pytest.raises(AssertionError):
        assert_same(engine.generate(copied_prompt(600), **sampling), expected)


# Laws A and D at the end of a long context

FULL = 8192
SAMPLED = {"temperature": 1.0, "seed": 5}
HOW: dict[str, dict[str, Any]] = {
    "draft": SAMPLED,
    "self:1": SAMPLED,
    "suffix": {},
    "ngram": {"temperature": 0.4, "seed": 5},
}


@pytest.mark.parametrize("drafter", HOW)
def test_a_context_of_8192_is_filled_exactly(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally, drafter: str
) -> None:
    """Drafts accepted and rejected up to the last position, and the bits of plain decoding."""
    sizes = {**TINY, "num_layers": 2, "max_positions": FULL}
    draft = checkpoint("llama", **sizes, noise=0.3) if drafter == "draft" else drafter
    engine = build_engine(checkpoint("llama", **sizes), draft, block_size=16, max_batch_size=2)
    num_free = engine.num_free_blocks
    prompt = copied_prompt(FULL - 60)
    sampling: dict[str, Any] = {"max_new_tokens": 10**6, "ignore_eos": True, "logprobs": 0, **HOW[drafter]}
    expected = plain(engine, prompt, **sampling)
    assert (len(expected.token_ids), expected.finish_reason) == (60, "length")
    assert_same(spec(engine, prompt, 5, **sampling), expected)
    tally.check()
    (last,) = spec(engine, [copied_prompt(FULL - 1)], 5, **sampling)
    assert (len(last.token_ids), last.finish_reason) == (1, "length")
    with pytest.raises(
        ValueError, match="8192 tokens, which leaves no room for a new one in a context of 8192"
    ):
        engine.generate(copied_prompt(FULL))
    assert_idle(engine, num_free)


# What a follow-up costs


@pytest.fixture
def num_fed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Decoder], int]:
    """Tokens that were fed to a decoder so far."""
    fed: Counter[int] = Counter()

    def spy_on(name: str) -> None:
        original = getattr(Decoder, name)

        def spy(self: Decoder, batch: Any, *args: Any) -> Any:
            fed[id(self)] += batch.token_ids.numel()
            return original(self, batch, *args)

        monkeypatch.setattr(Decoder, name, spy)

    run_part_by_part(monkeypatch)
    spy_on("forward")
    spy_on("forward_stats")
    spy_on("draw")
    monkeypatch.setattr(Decoder, "draft", lambda *_: None)  # one by one, so that every token is seen
    return lambda decoder: fed[id(decoder)]


@pytest.mark.parametrize("drafter", ["draft", "self:1", "suffix"])
def test_a_follow_up_computes_what_is_new(
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    num_fed: Callable[[Decoder], int],
    drafter: str,
) -> None:
    """A conversation of 6,000 tokens costs a turn no more than one of 1,500: in tokens that target and draft compute,
    and in blocks that are hashed but for the one look-up of each."""
    sizes = {**TINY, "num_layers": 2, "max_positions": FULL}
    draft = checkpoint("llama", **sizes, noise=0.3) if drafter == "draft" else drafter
    config: dict[str, Any] = {"block_size": 16, "max_batch_size": 2, "prefill_chunk_size": 512}
    engine = build_engine(checkpoint("llama", **sizes), draft, **config, rounds_ahead=0)
    decoders = {
        id(runner.decoder): runner.decoder for runner in (engine._target, engine._drafter.runner) if runner
    }
    manager = engine._kv_cache.manager
    sampling: dict[str, Any] = {"max_new_tokens": 20, "ignore_eos": True, "temperature": 1.0, "seed": 2}

    def turn(text: list[int]) -> tuple[list[int], int, int, list[int]]:
        """What was said by then; tokens found, blocks hashed beyond a look-up of each, and tokens fed."""
        before, hashed = [num_fed(each) for each in decoders.values()], manager.num_hashed_blocks
        result = spec(engine, text, 4, **sampling)
        fed = [num_fed(each) - at for each, at in zip(decoders.values(), before, strict=True)]
        found = result.metrics.num_cached_tokens
        return text + result.token_ids, found, manager.num_hashed_blocks - hashed - found // 16, fed

    for length in (1500, 6000):
        said, found, hashed, fed = turn(make_prompt(length, seed=length))
        assert (found, length <= fed[0]) == (0, True), "nothing of it is known"
        assert length // 16 <= hashed <= 2 * (len(said) // 16) + 2, "each is looked up and published once"
        for seed in range(3):
            new = make_prompt(40, seed=seed)
            said, found, hashed, fed = turn(said + new)
            assert len(said) - 60 - found <= 17, "the block that was not full, and the last token"
            assert max(fed) <= 17 + 40 + 20 * (4 + 2), fed
            assert hashed <= 2 * (17 + 40 + 20) // 16 + 4, hashed


@pytest.mark.parametrize("drafter", [None, "draft", "self:1", "suffix", "ngram", "ngram+suffix"])
def test_a_round_reads_no_whole_text(
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
    drafter: str | None,
) -> None:
    """Once a prompt is read, whatever lists all tokens of a sequence is asked no more: a round costs the host the same
    after 10 tokens and after 8,000."""
    sizes = {**TINY, "num_layers": 2, "max_positions": FULL}
    draft: Any = drafter
    if drafter == "draft":
        draft = checkpoint("llama", **sizes, noise=0.3)
    elif drafter is not None:
        draft = drafters_of(drafter, checkpoint)
    engine = build_engine(checkpoint("llama", **sizes), draft, block_size=16)
    asked: Counter[str] = Counter()
    token_ids, token_array = Sequence.token_ids.fget, Sequence.token_array

    def count(name: str, original: Any) -> Any:
        def counted(sequence: Sequence) -> Any:
            asked[name] += 1
            return original(sequence)

        return counted

    monkeypatch.setattr(Sequence, "token_ids", property(count("token_ids", token_ids)))
    monkeypatch.setattr(Sequence, "token_array", count("token_array", token_array))
    sampling: dict[str, Any] = {"ignore_eos": True, "num_speculative_tokens": 3 if drafter else 0}
    numbers = []
    for num_new in (30, 90):
        asked.clear()
        engine.generate(copied_prompt(2000, period=num_new), max_new_tokens=num_new, **sampling)
        assert asked["token_array"] >= 2, "when it came and when it went"
        numbers.append(dict(asked))
    assert numbers[0] == numbers[1], numbers


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("drafter", ["draft", "self:1", "suffix"])
def test_long_prompts_in_a_batch_are_as_alone(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally, model_type: str, drafter: str
) -> None:
    """Of all lengths up to the whole context, in chunks of every size, with too few blocks for all of them."""
    sizes = {"num_layers": 2, "max_positions": FULL}
    draft = checkpoint(model_type, **sizes, noise=0.3) if drafter == "draft" else drafter
    model = checkpoint(model_type, **sizes)
    prompts = [copied_prompt(length, period=length // 7) for length in (8130, 5000, 2049, 1024, 513, 30)]
    sampling: dict[str, Any] = {"max_new_tokens": 62, "ignore_eos": True, "logprobs": 0, **SAMPLED}
    alone = build_engine(model, None, block_size=16, prefill_chunk_size=FULL, enable_prefix_cache=False)
    expected = [alone.generate(prompt, **sampling) for prompt in prompts]
    for chunk, num_blocks in ((97, 700), (512, 1100), (2048, 560)):
        engine = build_engine(model, draft, block_size=16, prefill_chunk_size=chunk, num_blocks=num_blocks)
        num_free = engine.num_free_blocks
        for result, one in zip(spec(engine, prompts, 4, **sampling), expected, strict=True):
            assert_same(result, one)
        assert_idle(engine, num_free)
    tally.check()
