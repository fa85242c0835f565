"""What a round launches on meta tensors: the engine's own code, on models that have shapes and no values."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from aot_suite import TRITON, Size, Storage, build_decoder, integers, meta

from specengine.drafters.draft_model import DraftModelDrafter
from specengine.drafters.host import HostDrafter
from specengine.drafters.no_draft import NoDrafter
from specengine.drafters.self_layers import SelfDrafter
from specengine.kernels.device.launch import Launch, record
from specengine.runtime.model_runner import ModelRunner
from specengine.runtime.state import BatchState, RoundMode
from specengine.speculative import run_round


def build_runner(size: Size, num_layers: int, index: int, dtype: Storage = torch.float16) -> ModelRunner:
    """A model with weights in `dtype` and its float16 cache, the `index`-th of a round's."""
    cache = meta(num_layers, 2, 640, size.num_kv_heads, 16, size.head_dim, dtype=torch.float16)
    kv_cache: Any = SimpleNamespace(block_size=16, tensors=[cache] * (index + 1))
    decoder = build_decoder(size, dtype, num_layers)
    return ModelRunner(decoder, kv_cache, model_index=index, vocab_size=size.vocab_size)


def build_drafter(kind: str, target: ModelRunner, draft: ModelRunner) -> Any:
    """kind: "none", "model", "layers" of the target's own, or "upload" of what the host drafts"""
    if kind == "model":
        return DraftModelDrafter(draft, name="draft", chunk_size=512)
    if kind == "layers":
        decoder = target.decoder.first_layers(target.decoder.spec.num_layers)
        own = ModelRunner(decoder, target.kv_cache, model_index=0, vocab_size=target.vocab_size)
        return SelfDrafter(own, name="layers", chunk_size=512)
    if kind == "upload":
        return HostDrafter(SimpleNamespace(name="scripted"), vocab_size=target.vocab_size)
    return NoDrafter()


def round_launches(
    target: ModelRunner,
    drafter: Any,
    mode: RoundMode,
    k: int,
    *,
    batch_size: int,
    watched: AbstractContextManager[Any] | None = None,
) -> list[Launch]:
    """The launches of a round in order. watched: entered while it runs."""
    state = BatchState(num_slots=8, max_seq_len=1024, device=torch.device("meta"), backend=TRITON)
    batch = state.select([], integers(9, 64), mode, k=k, size=batch_size)
    with record() as launches, watched or nullcontext(), torch.inference_mode():
        run_round(batch, state, target, drafter)
    return launches
