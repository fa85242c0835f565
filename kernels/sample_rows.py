"""One draw a row from a filtered distribution, by Gumbel race, in one launch.

Each program scores one tile of a row; an integer maximum finds the row's winner, and the last program of a row writes
it. Reads the logits once, writes a token and a log-probability; see `specengine.kernels.reference.sample_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.launch import ceil_div, launch
from specengine.kernels.device.linear import count_rows
from specengine.kernels.device.noise import key_token, scale_logits
from specengine.kernels.device.race import (
    LOG_NORMALISER,
    NUM_STATS,
    RACE_WARPS,
    TILE,
    check_columns,
    check_logits,
    check_small,
    draw_key,
    is_last_of,
    take_keys,
)
from specengine.kernels.device.workspace import zeroed
from specengine.kernels.types.rows import SamplingRows


@triton.jit
def spec_sample_rows(
    logits_ptr,
    logits_stride,
    stats_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    base_ptr,
    token_ptr,
    log_prob_ptr,
    key_ptr,
    counter_ptr,
    num_rows_ptr,
    STREAM: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    row, split = tl.program_id(0), tl.program_id(1)
    if row >= count_rows(tl.num_programs(0), num_rows_ptr):
        return
    row_ptr = logits_ptr + row.to(tl.int64) * logits_stride
    stats_ptr += row * NUM_STATS
    temperature = tl.load(temperature_ptr + row)
    seed, position, base = tl.load(seed_ptr + row), tl.load(position_ptr + row), tl.load(base_ptr + row)
    key = draw_key(row_ptr, stats_ptr, split * TILE, temperature, seed, position, STREAM, base, VOCAB, TILE)
    tl.atomic_max(key_ptr + row, key, sem="relaxed")
    if is_last_of(tl.num_programs(1), counter_ptr + row):
        token = key_token(take_keys(key_ptr + row, True))
        scaled = scale_logits(tl.load(row_ptr + token), temperature)
        log_prob = scaled - tl.load(stats_ptr + LOG_NORMALISER)
        tl.store(token_ptr + row, token)
        tl.store(log_prob_ptr + row, tl.where(temperature > 0.0, log_prob, 0.0))


def sample_rows(
    logits: Tensor,
    stats: Tensor,
    rows: SamplingRows,
    positions: Tensor,
    stream: int,
    round_base: Tensor,
    *,
    num_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `specengine.kernels.reference.sample_rows`.

    num_rows: `[1]` int32 on the device: rows from there on are padding, and nothing is drawn for them
    """
    check_logits("logits", logits)
    count, vocab_size = logits.shape
    tokens = torch.empty(count, dtype=torch.int32, device=logits.device)
    log_probs = torch.empty(count, device=logits.device)
    launch(
        spec_sample_rows,
        (count, ceil_div(vocab_size, TILE)),
        logits,
        logits.stride(0),
        check_small("stats", stats, (count, NUM_STATS.value), torch.float32),
        *check_columns(rows, count, "temperature", "seeds"),
        check_small("positions", positions, (count,), torch.int32),
        check_small("round_base", round_base, (count,), torch.int32),
        tokens,
        log_probs,
        zeroed(count, torch.int64, logits.device),
        zeroed(count, torch.int32, logits.device),
        num_rows,
        STREAM=stream,
        VOCAB=vocab_size,
        TILE=TILE,
        num_warps=RACE_WARPS,
    )
    return tokens, log_probs
