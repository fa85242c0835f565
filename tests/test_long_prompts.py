"""Prompts as people give them: of many chunks, as long as the context, and said again with a little more.

What may cost as much as the context is long is counted, not timed.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from law_helpers import CheckpointFactory, EngineFactory, make_prompt

from specengine.runtime import kv_cache

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
