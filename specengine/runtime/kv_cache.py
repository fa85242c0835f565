"""The KV cache of an engine: one block table for target and draft, one tensor a model."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specengine import _C
from specengine.config import EngineConfig
from specengine.errors import InsufficientMemoryError, OutOfBlocksError
from specengine.models.decoder import DecoderSpec
from specengine.runtime.graphs import wait_for

TARGET, DRAFT = 0, 1
_DEFAULT_CPU_BYTES = 4 << 30
_DEFAULT_GPU_SHARE = 0.5
_NUM_SNAPSHOTS = 4


def bytes_per_token(spec: DecoderSpec, dtype: torch.dtype) -> int:
    """KV bytes that one token takes in one model."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * dtype.itemsize


class KVCache:
    """Preallocated keys and values of every model, and the C++ manager that hands out their blocks.

    manager:     who owns which block; watermarks, reference counts, prefix index
    tensors:     per model `[layers, 2, num_blocks, kv_heads, block_size, head_dim]`
    block_table: `[max_batch_size + 1, max_blocks]` int32 in host memory, written by the manager; the last row is
                 padding's, and always the scratch block
    interrupted_slot: the slot whose `reserve` has begun and not ended, if any
    """

    def __init__(
        self,
        specs: Sequence[DecoderSpec],
        dtypes: Sequence[torch.dtype],
        config: EngineConfig,
        *,
        max_seq_len: int,
        device: torch.device,
    ) -> None:
        self.block_size = config.block_size
        self.max_seq_len = max_seq_len
        self.device = device
        block_bytes = self.block_size * sum(map(bytes_per_token, specs, dtypes))
        self.num_blocks = plan_num_blocks(config, block_bytes, max_seq_len, device)
        max_blocks = math.ceil(max_seq_len / self.block_size)
        self.block_table = torch.zeros(config.max_batch_size + 1, max_blocks, dtype=torch.int32)
        self.interrupted_slot: int | None = None
        self._device_table = _DeviceTable(self.block_table, device)
        self.manager = _C.PagedKVCache(
            self.num_blocks,
            self.block_size,
            config.max_batch_size,
            max_blocks,
            len(specs),
            self.block_table.data_ptr(),
            config.enable_prefix_cache,
        )
        self.tensors = [
            self._allocate(spec, dtype, block_bytes) for spec, dtype in zip(specs, dtypes, strict=True)
        ]

    def _allocate(self, spec: DecoderSpec, dtype: torch.dtype, block_bytes: int) -> Tensor:
        shape = (spec.num_layers, 2, self.num_blocks, spec.num_kv_heads, self.block_size, spec.head_dim)
        try:
            # Pages that no sequence ever reaches are never touched, so they cost nothing.
            return torch.empty(shape, dtype=dtype, device=self.device)
        except (RuntimeError, MemoryError) as error:
            raise InsufficientMemoryError(
                f"the KV cache of {self.num_blocks} blocks needs {self.num_blocks * block_bytes:,} bytes, which "
                f"device {self.device} refused; lower max_batch_size, max_seq_len, num_blocks or kv_cache_bytes"
            ) from error

    def device_block_table(self) -> Tensor:
        """The block table as kernels on `device` read it from here on; always the same memory."""
        return self._device_table.current()

    def num_computed(self, slot: int, model: int) -> int:
        """The watermark: leading tokens of `slot` whose KV `model` holds."""
        return int(self.manager.num_computed_tokens(slot, model))

    def reserve(self, slot: int, first_position: int, num_tokens: int) -> None:
        """Makes positions [first_position, num_tokens) writable, copying shared blocks first.

        Raises `OutOfBlocksError`, nothing changed, if there are too few free blocks.
        """
        self.interrupted_slot = slot
        try:
            copies = self.manager.extend(slot, first_position, num_tokens)
        except OutOfBlocksError:
            self.interrupted_slot = None
            raise
        if copies:
            source, destination = (torch.tensor(ids, device=self.device) for ids in zip(*copies, strict=True))
            for tensor in self.tensors:
                tensor[:, :, destination] = tensor[:, :, source]
        self.interrupted_slot = None

    def reserve_all(self) -> None:
        """Gives every slot blocks for `max_seq_len` tokens, for ever: a cache whose user manages its own rows."""
        for _ in range(self.block_table.shape[0] - 1):
            slot = self.manager.allocate(np.empty(0, dtype=np.int32), 0)
            self.manager.extend(slot, 0, self.max_seq_len)

    def blocks_for(self, num_tokens: int) -> int:
        return math.ceil(num_tokens / self.block_size)

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that sequences can own: all but the scratch block."""
        return self.num_blocks - 1


class _DeviceTable:
    """The host's block table on the device. What is under way there reads the table as it was when it was queued.

    Changes travel through pinned copies in turn, so that the manager may write on at once and nobody waits.
    """

    def __init__(self, table: Tensor, device: torch.device) -> None:
        self._table = table
        self._on_device = table if device.type == "cpu" else table.to(device)
        self._snapshots: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        if device.type == "cuda":
            pinned = (table.clone().pin_memory() for _ in range(_NUM_SNAPSHOTS))
            self._snapshots.extend((snapshot, torch.cuda.Event()) for snapshot in pinned)

    def current(self) -> Tensor:
        if self._snapshots and not torch.equal(self._snapshots[-1][0], self._table):
            snapshot, is_sent = self._snapshots[0]
            wait_for(is_sent)  # queued some changes ago: done, as a rule
            snapshot.copy_(self._table)
            self._on_device.copy_(snapshot, non_blocking=True)
            is_sent.record()
            self._snapshots.rotate(-1)  # last: an interruption leaves all of them here
        return self._on_device


def plan_num_blocks(config: EngineConfig, block_bytes: int, max_seq_len: int, device: torch.device) -> int:
    """Blocks to allocate, the scratch block included; refuses a budget in which no sequence could ever finish."""
    blocks_a_sequence = math.ceil(max_seq_len / config.block_size)
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
        asked = f"num_blocks={num_blocks}"
    else:
        budget, asked = _budget(config, device)
        wanted = config.max_batch_size * blocks_a_sequence + 1
        num_blocks = budget // block_bytes if config.kv_cache_bytes else min(wanted, budget // block_bytes)
    if num_blocks < 2:
        raise InsufficientMemoryError(
            f"{asked} holds {num_blocks} KV blocks of {block_bytes:,} bytes each, but at least 2 are needed "
            f"(one is scratch): {2 * block_bytes:,} bytes"
        )
    if num_blocks - 1 < blocks_a_sequence and config.num_blocks is None:
        fits = (num_blocks - 1) * config.block_size
        raise InsufficientMemoryError(
            f"max_seq_len={max_seq_len} needs {blocks_a_sequence} KV blocks of {block_bytes:,} bytes each "
            f"({(blocks_a_sequence + 1) * block_bytes:,} bytes with the scratch block), but {asked} holds "
            f"{num_blocks - 1}; max_seq_len={fits} would fit"
        )
    if config.num_blocks is not None or config.kv_cache_bytes is not None:
        memory = _device_memory(device)
        if num_blocks * block_bytes > memory:
            raise InsufficientMemoryError(
                f"{asked} means {num_blocks * block_bytes:,} bytes of KV cache, but device {device} has {memory:,} "
                f"in all; num_blocks={memory // block_bytes} would fit"
            )
    return int(num_blocks)


def limit_to_budget(
    max_seq_len: int, config: EngineConfig, block_bytes: int, device: torch.device
) -> tuple[int, str]:
    """The longest sequence, up to max_seq_len tokens, that can finish within the budget; and where that is shorter, the
    budget in words, else "". One for which there is not even a block is not shortened: it will be refused."""
    budget, asked = _budget(config, device)
    fits = (budget // block_bytes - 1) * config.block_size
    return (fits, asked) if config.num_blocks is None and 0 < fits < max_seq_len else (max_seq_len, "")


def _budget(config: EngineConfig, device: torch.device) -> tuple[int, str]:
    """Bytes of KV cache where no number of blocks was given, and what they are called."""
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes, f"kv_cache_bytes={config.kv_cache_bytes:,}"
    budget = _default_budget(device)
    return budget, f"the default KV cache budget of {budget:,} bytes"


def _device_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _default_budget(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _DEFAULT_GPU_SHARE)
    return _DEFAULT_CPU_BYTES
