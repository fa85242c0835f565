"""Attention over the paged cache, gpt2-medium's 16 heads of 64: decode, verification, prefill chunks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import NATIVE, assert_earned
from measure import ROTATED_BYTES, Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from specengine.kernels import reference

NUM_HEADS, HEAD_DIM, BLOCK_SIZE = 16, 64, 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# (sequences, queries of each, context)
DECODE = [(1, q_len, context) for context in (128, 512, 1024) for q_len in (1, 2, 4, 6, 9, 17)]
BATCHES = [(8, q_len, context) for context in (512, 1024) for q_len in (1, 6)]
PREFILL = [(1, 512, 512), (1, 256, 1024)]


@dataclass(frozen=True)
class Pool:
    """ROTATED_BYTES of keys and values in blocks."""

    name: str
    kv_cache: Tensor
    order: Tensor  # a shuffled list of the blocks

    def block_table(self, context: int) -> Tensor:
        """As many sequences of `context` tokens as fit, `[S, blocks]`."""
        blocks = context // BLOCK_SIZE
        return self.order[: len(self.order) // blocks * blocks].view(-1, blocks)

    def gather(self, table: Tensor) -> Tensor:
        """`[2, S, H, context, head_dim]`, what PyTorch needs."""
        gathered = self.kv_cache[:, table.flatten().long()]
        gathered = gathered.view(2, *table.shape, NUM_HEADS, BLOCK_SIZE, HEAD_DIM)
        return gathered.transpose(2, 3).flatten(3, 4)


@pytest.fixture(scope="module", params=DTYPES)
def pool(request: pytest.FixtureRequest) -> Pool:
    dtype = DTYPES[request.param]
    num_blocks = ROTATED_BYTES // (2 * NUM_HEADS * BLOCK_SIZE * HEAD_DIM * dtype.itemsize)
    generator = torch.Generator().manual_seed(0)
    cache = torch.empty(2, num_blocks, NUM_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=dtype)
    # Random within 64 blocks, then the same again: filling everything would take longer than measuring.
    some = torch.randn(2, 64, NUM_HEADS, BLOCK_SIZE, HEAD_DIM, generator=generator)
    cache.view(2, -1, *some.shape[1:]).copy_(some[:, None])
    return Pool(request.param, cache, torch.randperm(num_blocks, generator=generator).int())


@dataclass(frozen=True)
class Case:
    pool: Pool
    block_table: Tensor
    query: Tensor
    batch: int
    q_len: int
    context: int

    def run(self, op, query: Tensor, turn: int) -> Tensor:
        first = turn % (self.block_table.shape[0] // self.batch) * self.batch
        return op(
            query,
            self.pool.kv_cache,
            self.block_table,
            torch.arange(first, first + self.batch, dtype=torch.int32),
            torch.arange(self.batch + 1, dtype=torch.int32) * self.q_len,
            torch.full((self.batch,), self.context, dtype=torch.int32),
        )


def build_case(pool: Pool, batch: int, q_len: int, context: int) -> Case:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(batch * q_len, NUM_HEADS, HEAD_DIM, generator=generator)
    return Case(pool, pool.block_table(context), query, batch, q_len, context)


@pytest.mark.parametrize(("batch", "q_len", "context"), [*DECODE, *BATCHES, *PREFILL])
def test_attention(
    benchmark: BenchmarkFixture, report: Report, pool: Pool, batch: int, q_len: int, context: int
) -> None:
    case = build_case(pool, batch, q_len, context)
    query = case.query
    honest = case.run(reference.paged_attention, query, 0)
    exact = case.run(reference.paged_attention, query.double(), 0)
    assert_earned(case.run(NATIVE.paged_attention, query, 0), honest, exact)

    gathered = pool.gather(case.block_table)
    num_turns = gathered.shape[1] // batch
    torch_query = query.view(batch, q_len, NUM_HEADS, HEAD_DIM).transpose(1, 2).to(gathered.dtype)
    mask = torch.ones(q_len, context, dtype=torch.bool).tril(context - q_len)
    causal = {"is_causal": True} if q_len == context else {"attn_mask": mask if q_len > 1 else None}

    def pytorch(turn: int) -> Tensor:
        first = turn % num_turns * batch
        key, value = gathered[:, first : first + batch]
        return F.scaled_dot_product_attention(torch_query, key, value, **causal)

    torch.testing.assert_close(
        pytorch(0).transpose(1, 2).reshape(batch * q_len, -1).double(), exact, rtol=0.03, atol=0.03
    )
    num_bytes = 2 * batch * NUM_HEADS * HEAD_DIM * context * gathered.element_size()
    shape = f"{NUM_HEADS}x{HEAD_DIM} context {context}" + (f" batch {batch}" if batch > 1 else "")
    subject = Subject(
        "paged_attention",
        shape,
        pool.name,
        q_len,
        num_bytes,
        "F.scaled_dot_product_attention, gathered beforehand",
    )
    report.compare(benchmark, subject, lambda turn: case.run(NATIVE.paged_attention, query, turn), pytorch)
