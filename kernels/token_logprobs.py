"""Raw log-probabilities of given tokens and of the most likely ones, in one launch of one program a row.

One pass over the row leaves, for each of LANES interleaved parts of it, the maximum, the token that has it first and
the sum of exp(z - maximum). The `num_top` largest logits lie in as many lanes, those with the best (maximum, lowest
id): only these are read again. See `specengine.kernels.reference.token_logprobs`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.launch import ceil_div, launch
from specengine.kernels.device.linear import count_rows
from specengine.kernels.device.noise import NEGATIVE_INFINITY, key_score, key_token, race_key, sanitise
from specengine.kernels.device.race import check_logits, check_small

MAX_TOP = 32
NUM_WARPS = 16
# A step over the row takes DEPTH tokens of every lane: four vectors of 16 bytes a thread.
DEPTH = 4
MAX_LANES = 128 * NUM_WARPS

_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def take_best(keys):
    """The largest key, and the keys without it."""
    best = tl.max(keys)
    return best, tl.where(keys == best, 0, keys)


@triton.jit(do_not_specialize=["num_top"])
def spec_token_logprobs(
    logits_ptr,
    logits_stride,
    token_ptr,
    log_prob_ptr,
    top_id_ptr,
    top_log_prob_ptr,
    num_top,
    num_rows_ptr,
    VOCAB: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    LENGTH: tl.constexpr,
    MAX_TOP: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    row = tl.program_id(0)
    if row >= count_rows(tl.num_programs(0), num_rows_ptr):
        return
    row_ptr = logits_ptr + row.to(tl.int64) * logits_stride
    lanes = tl.arange(0, LANES)
    maxima = tl.full((LANES,), NEGATIVE_INFINITY, tl.float32)
    owners = lanes
    sums = tl.zeros((LANES,), tl.float32)
    for first in tl.range(0, VOCAB, DEPTH * LANES):
        tokens = first + tl.arange(0, DEPTH)[:, None] * LANES + lanes[None, :]
        logits = sanitise(tl.load(row_ptr + tokens, tokens < VOCAB, NEGATIVE_INFINITY))
        largest, depth = tl.max(logits, axis=0, return_indices=True)
        owners = tl.where(largest > maxima, first + depth * LANES + lanes, owners)
        largest = tl.maximum(largest, maxima)
        base = tl.maximum(largest, _LOWEST)  # -inf - -inf would be NaN
        sums = sums * tl.exp(maxima - base) + tl.sum(tl.exp(logits - base[None, :]), axis=0)
        maxima = largest
    maximum = tl.max(maxima)
    log_normaliser = maximum + tl.log(tl.sum(sums * tl.exp(maxima - tl.maximum(maximum, _LOWEST))))
    token = tl.load(token_ptr + row)
    is_token = (token >= 0) & (token < VOCAB)
    log_prob = sanitise(tl.load(row_ptr + token, is_token, 0.0)) - log_normaliser
    tl.store(log_prob_ptr + row, tl.where(is_token, log_prob, float("nan")))
    if num_top > 0:
        keys = tl.where(lanes < VOCAB, race_key(maxima, owners), 0)
        slots = tl.arange(0, MAX_TOP)
        best_lanes = tl.zeros((MAX_TOP,), tl.int32)
        for i in tl.range(0, num_top):
            best, keys = take_best(keys)
            best_lanes = tl.where(slots == i, key_token(best) % LANES, best_lanes)
        tokens = best_lanes[:, None] + tl.arange(0, LENGTH)[None, :] * LANES
        is_read = (slots < num_top)[:, None] & (tokens < VOCAB)
        logits = sanitise(tl.load(row_ptr + tokens, is_read, 0.0))
        keys = tl.where(is_read, race_key(logits, tokens), 0)
        for i in tl.range(0, num_top):
            best, keys = take_best(keys)
            tl.store(top_id_ptr + row * num_top + i, key_token(best))
            tl.store(top_log_prob_ptr + row * num_top + i, key_score(best) - log_normaliser)


def token_logprobs(
    logits: Tensor, token_ids: Tensor, num_top: int, *, num_rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `specengine.kernels.reference.token_logprobs`; a token id outside the row has log-probability NaN.

    num_top:  up to 32
    num_rows: `[1]` int32 on the device: rows from there on are padding, and their results are left alone
    """
    check_logits("logits", logits)
    if not 0 <= num_top <= MAX_TOP:
        raise ValueError(f"num_top: {num_top} is not in 0 ... {MAX_TOP}")
    count, vocab_size = logits.shape
    num_top = min(num_top, vocab_size)
    lanes = min(MAX_LANES, triton.next_power_of_2(max(vocab_size, MAX_TOP)))
    log_probs = torch.empty(count, device=logits.device)
    top_ids = torch.empty(count, num_top, dtype=torch.int32, device=logits.device)
    top_log_probs = torch.empty(count, num_top, device=logits.device)
    launch(
        spec_token_logprobs,
        (count,),
        logits,
        logits.stride(0),
        check_small("token_ids", token_ids, (count,), torch.int32),
        log_probs,
        top_ids,
        top_log_probs,
        num_top,
        num_rows,
        VOCAB=vocab_size,
        DEPTH=DEPTH,
        LANES=lanes,
        LENGTH=triton.next_power_of_2(ceil_div(vocab_size, lanes)),
        MAX_TOP=MAX_TOP,
        num_warps=NUM_WARPS,
    )
    return log_probs, top_ids, top_log_probs
