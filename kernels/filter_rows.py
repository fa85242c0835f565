"""Temperature, top-k, top-p and min-p as one threshold a row, in one launch of one program a row.

A threshold is the smallest value above which the row weighs less than some amount: k where each token weighs one,
top_p of the kept mass where token v weighs exp(z_v / T - max), in fixed point, so that sums are exact. It is found by
sampling, after Floyd and Rivest (1975): a sample proposes a bracket; a pass over the row weighs what lies above and
inside the bracket, which proves or refutes it, and lists the values inside. A list that holds all of them is searched
in registers, a longer one is the next sample.

Reads the logits once where nothing is filtered. GPT-2's vocabulary takes two passes over the row and two over the list
with top-k 50 and top-p 0.95; top-p alone takes two and one, and two or three more over the row where it keeps
thousands of tokens. See `specengine.kernels.reference.filter_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.launch import ceil_div, launch
from specengine.kernels.device.linear import count_rows
from specengine.kernels.device.noise import NEGATIVE_INFINITY
from specengine.kernels.device.race import NUM_STATS, check_columns, check_logits, keep, scale_row
from specengine.kernels.device.statistics import GROUP, group_share, group_sum, log_normaliser
from specengine.kernels.device.workspace import scratch
from specengine.kernels.types.rows import SamplingRows

NUM_WARPS = 16
# Tokens of a step over the row: four vectors of 16 bytes a thread. A list has half as many places.
MAX_TILE = 8192
MIN_TILE = 512

_VECTOR = tl.constexpr(4)
# One part in so many of a list's weight may be a wrong sample of the row's; top-p first looks at as many of its tokens.
_MARGIN = tl.constexpr(40)
# Standard deviations that a sample of the row may be off; its tokens come in runs of one 32-byte sector of memory.
_DEVIATIONS = tl.constexpr(4)
_RUN = tl.constexpr(8)
# exp(-42) of the heaviest token weighs nothing.
_WEIGHTLESS = tl.constexpr(42.0)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2_SIXTEENTH = tl.constexpr(0.6931471805599453 / 16)
_SERIES = tl.constexpr((1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0))
_ROUNDER = tl.constexpr(1.5 * 2.0**52)  # adding it rounds to an integer, which the low bits then hold
_ROUNDER_BITS = tl.constexpr(0x4338000000000000)


@triton.jit
def order_of(value):
    """int32 whose order is that of fp32 values; +0 and -0 tie."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value_at(order):
    """The fp32 value of an `order_of`."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def halfway(low, high):
    """The fp32 value in the middle of all from low to high, low < high."""
    return value_at((order_of(low) >> 1) + (order_of(high) >> 1))


@triton.jit
def weigh(values, maximum, BY_MASS: tl.constexpr, UNITS: tl.constexpr):
    """Integer weights: one each, or exp(value - maximum) in UNITS of one, a power of two up to 2**50."""
    if BY_MASS:
        # 2**n exp(x)**16 with an integer n and |x| < 0.022: no branches.
        powers = tl.maximum(values.to(tl.float64) - maximum, -_WEIGHTLESS) * _LOG2_E
        whole = powers + _ROUNDER
        x = (powers - (whole - _ROUNDER)) * _LN_2_SIXTEENTH
        exponential = tl.fma(x, 1 / 5040, 1 / 720)
        for i in tl.static_range(6):
            exponential = tl.fma(exponential, x, _SERIES[i])
        for _ in tl.static_range(4):
            exponential *= exponential
        exponent = whole.to(tl.int64, bitcast=True) << 52
        weight = (exponential.to(tl.int64, bitcast=True) + exponent).to(tl.float64, bitcast=True)
        return (weight * UNITS + _ROUNDER).to(tl.int64, bitcast=True) - _ROUNDER_BITS
    else:
        return tl.full(values.shape, 1, tl.int32)


@triton.jit
def select(values, weights, wanted, high):
    """The smallest of the values above which they weigh less than `wanted`; high if that is zero.

    wanted: at most what all values weigh
    high:   not below the result
    """
    orders, last = order_of(values), order_of(high)
    first = tl.where(wanted > 0, tl.min(tl.where(weights > 0, orders, last)), last)
    while first < last:
        middle = (first & last) + ((first ^ last) >> 1)  # their mean: a sum may overflow
        is_enough = tl.sum(tl.where(orders > middle, weights, 0)) >= wanted
        first = tl.where(is_enough, middle + 1, first)
        last = tl.where(is_enough, last, middle)
    return value_at(first)


@triton.jit
def narrow(values, weights, total, wanted, slack, high):
    """The bracket above which the values, `total` heavy, weigh `wanted`, give or take `slack`."""
    new_high = select(values, weights, wanted - slack, high)
    return select(values, weights, tl.minimum(wanted + slack + 1, total), new_high), new_high


@triton.jit
def row_statistics(source_ptr, length, temperature, threshold, NUM_TILES: tl.constexpr, TILE: tl.constexpr):
    """Maximum and sum (see `log_normaliser`) of the values from `threshold` on, and whether any value is NaN."""
    GROUPS: tl.constexpr = TILE // GROUP
    tokens = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    maxima = tl.full((NUM_TILES, GROUPS), NEGATIVE_INFINITY, tl.float32)
    sums = tl.zeros((NUM_TILES, GROUPS), tl.float32)
    has_nan = tl.zeros((GROUPS,), tl.int32)
    for tile in tl.range(0, tl.cdiv(length, TILE)):
        at = tile * TILE + tokens
        logits = tl.load(source_ptr + at, at < length, NEGATIVE_INFINITY)
        has_nan = tl.maximum(has_nan, tl.max((logits != logits).to(tl.int32), axis=1))
        kept = keep(scale_row(logits, temperature), threshold)
        largest = tl.max(kept, axis=1)
        is_tile = (tl.arange(0, NUM_TILES) == tile)[:, None]
        maxima = tl.where(is_tile, largest[None, :], maxima)
        sums = tl.where(is_tile, group_sum(kept, largest)[None, :], sums)
    maximum = tl.max(maxima)
    return maximum, tl.sum(group_share(sums, maxima, maximum)), tl.max(has_nan) > 0


@triton.jit
def sum_thread(tile, THREADS: tl.constexpr):
    """What each thread's values add up to, `[THREADS]`, of `[DEPTH, THREADS * VECTOR]`."""
    return tl.sum(tl.reshape(tl.sum(tile, axis=0), (THREADS, _VECTOR)), axis=1)


@triton.jit
def weigh_bracket(
    source_ptr,
    length,
    temperature,
    list_ptr,
    floor,
    low,
    high,
    maximum,
    BY_MASS: tl.constexpr,
    UNITS: tl.constexpr,
    TILE: tl.constexpr,
    THREADS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """What the values above `high` weigh, those from `low` on and those from `floor` on; and how many values lie in
    [low, high]: the first CAPACITY of them are left in the list."""
    WEIGHT: tl.constexpr = tl.int64 if BY_MASS else tl.int32
    LANES: tl.constexpr = THREADS * _VECTOR
    depth, lane = tl.arange(0, TILE // LANES)[:, None], tl.arange(0, LANES)[None, :]
    tokens = depth * LANES + lane
    bits = 1 << (depth * _VECTOR + lane % _VECTOR)
    above = tl.zeros((THREADS,), WEIGHT)
    from_low = tl.zeros((THREADS,), WEIGHT)
    from_floor = tl.zeros((THREADS,), WEIGHT)
    count = 0
    for first in tl.range(0, length, TILE):
        is_token = first + tokens < length
        values = scale_row(tl.load(source_ptr + first + tokens, is_token, NEGATIVE_INFINITY), temperature)
        weights = tl.where(is_token, weigh(values, maximum, BY_MASS, UNITS), 0)
        above += sum_thread(tl.where(values > high, weights, 0), THREADS)
        from_low += sum_thread(tl.where(values >= low, weights, 0), THREADS)
        from_floor += sum_thread(tl.where(values >= floor, weights, 0), THREADS)
        is_inside = is_token & (values >= low) & (values <= high)
        in_thread = sum_thread(is_inside.to(tl.int32), THREADS)
        slots = count + tl.cumsum(in_thread, axis=0) - in_thread
        # Each thread lists one of its values at a time: few have several.
        unlisted = sum_thread(tl.where(is_inside, bits, 0), THREADS)
        for i in tl.range(0, tl.where(count < CAPACITY, tl.max(in_thread), 0)):
            bit = unlisted & -unlisted
            of_lane = tl.reshape(tl.broadcast_to(bit[:, None], (THREADS, _VECTOR)), (LANES,))
            value = sum_thread(tl.where(bits == of_lane[None, :], values, 0.0), THREADS)
            tl.store(list_ptr + slots + i, value, (bit != 0) & (slots + i < CAPACITY))
            unlisted -= bit
        count += tl.sum(in_thread)
    tl.debug_barrier()
    return tl.sum(above), tl.sum(from_low), tl.sum(from_floor), count


@triton.jit
def sample_bracket(row_ptr, temperature, wanted, slack, maximum, VOCAB: tl.constexpr, CAPACITY: tl.constexpr):
    """The bracket above which `wanted` of CAPACITY tokens lie, give or take `slack`, an even sample of the row."""
    slots = tl.arange(0, CAPACITY)
    tokens = slots // _RUN * (VOCAB // CAPACITY * _RUN) + slots % _RUN
    values = scale_row(tl.load(row_ptr + tokens), temperature)
    weights = tl.full((CAPACITY,), 1, tl.int32)
    return narrow(values, weights, CAPACITY, wanted.to(tl.int32), slack.to(tl.int32), maximum)


@triton.jit
def search(
    source_ptr,
    length,
    temperature,
    list_ptr,
    floor,
    maximum,
    wanted,
    BY_MASS: tl.constexpr,
    UNITS: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    THREADS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """The smallest value from `floor` on above which less than `wanted` lies; and where to read every value from it
    on (source, length and temperature): in the list as soon as it holds all of them, and -inf in its other places.

    wanted: tokens, or a share of the mass from `floor` on
    """
    low, high = floor, maximum
    if length > CAPACITY:
        sampled = wanted * (0.0 if BY_MASS else CAPACITY / VOCAB)
        slack = tl.maximum(_DEVIATIONS * tl.sqrt(sampled) + _RUN, CAPACITY / _MARGIN if BY_MASS else 0.0)
        low, high = sample_bracket(source_ptr, temperature, sampled, slack, maximum, VOCAB, CAPACITY)
        low = tl.maximum(low, floor)
    bottom, top = floor, maximum
    is_listed = bottom > top
    num_refuted = 0
    while bottom < top:
        above, from_low, from_floor, count = weigh_bracket(
            source_ptr,
            length,
            temperature,
            list_ptr,
            floor,
            low,
            high,
            maximum,
            BY_MASS,
            UNITS,
            TILE,
            THREADS,
            CAPACITY,
        )
        amount = tl.ceil(wanted.to(tl.float64) * from_floor).to(tl.int64) if BY_MASS else wanted
        is_higher = above >= amount
        if is_higher | (from_low < amount):
            bottom = tl.where(is_higher, value_at(order_of(high) + 1), bottom)
            top = tl.where(is_higher, top, value_at(order_of(low) - 1))
            # All that is left; every other time half of it, so that no row takes long.
            low, high = tl.where(num_refuted % 2 == 0, bottom, halfway(bottom, top)), top
            num_refuted += 1
        else:
            is_listed = (count <= CAPACITY) & (high == maximum)
            slots = tl.arange(0, CAPACITY)
            values = tl.where(slots < count, tl.load(list_ptr + slots), NEGATIVE_INFINITY)
            tl.store(list_ptr + slots, values)
            tl.debug_barrier()
            weights = tl.where(slots < count, weigh(values, maximum, BY_MASS, UNITS), 0)
            missing = amount - above
            bottom, top = low, high
            if count <= CAPACITY:
                low = select(values, weights, missing, high)
                bottom, top = low, low
            else:
                total = tl.sum(weights)
                share = missing.to(tl.float64) / (from_low - above).to(tl.float64)
                sampled = (share * total).to(total.dtype)
                low, high = narrow(values, weights, total, sampled, total // _MARGIN, high)
                high = tl.where((low == bottom) & (high == top), low, high)
    if is_listed:
        source_ptr, length, temperature = list_ptr, tl.full((), CAPACITY, tl.int32), temperature * 0.0
    return bottom, source_ptr, length, temperature


@triton.jit
def spec_filter_rows(
    logits_ptr,
    logits_stride,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    stats_ptr,
    list_ptr,
    num_rows_ptr,
    VOCAB: tl.constexpr,
    UNITS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILE: tl.constexpr,
    THREADS: tl.constexpr,
    CAPACITY: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    row = tl.program_id(0)
    if row >= count_rows(tl.num_programs(0), num_rows_ptr):
        return
    source_ptr, length = logits_ptr + row.to(tl.int64) * logits_stride, tl.full((), VOCAB, tl.int32)
    list_ptr += row.to(tl.int64) * CAPACITY
    temperature, top_k = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row)
    top_p, min_p = tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    threshold = tl.full((), NEGATIVE_INFINITY, tl.float32)
    maximum, total, has_nan = row_statistics(source_ptr, length, temperature, threshold, NUM_TILES, TILE)
    is_bad = has_nan | (maximum == NEGATIVE_INFINITY)
    if (temperature > 0.0) & (is_bad == 0):
        if (top_k > 0) & (top_k < VOCAB):
            threshold, source_ptr, length, temperature = search(
                source_ptr,
                length,
                temperature,
                list_ptr,
                threshold,
                maximum,
                top_k,
                False,
                UNITS,
                VOCAB,
                TILE,
                THREADS,
                CAPACITY,
            )
        if top_p < 1.0:
            threshold, source_ptr, length, temperature = search(
                source_ptr,
                length,
                temperature,
                list_ptr,
                tl.maximum(threshold, maximum - _WEIGHTLESS),
                maximum,
                top_p,
                True,
                UNITS,
                VOCAB,
                CAPACITY,
                THREADS,
                CAPACITY,
            )
        if min_p > 0.0:
            bound = maximum.to(tl.float64) + tl.log(min_p.to(tl.float64))
            threshold = tl.maximum(threshold, bound.to(tl.float32))
        if threshold > NEGATIVE_INFINITY:
            _, total, _ = row_statistics(source_ptr, length, temperature, threshold, NUM_TILES, TILE)
    stats_ptr += row * NUM_STATS
    tl.store(stats_ptr, maximum)
    tl.store(stats_ptr + 1, threshold)
    tl.store(stats_ptr + 2, log_normaliser(maximum, total))
    tl.store(stats_ptr + 3, is_bad.to(tl.float32))


def filter_rows(logits: Tensor, rows: SamplingRows, *, num_rows: Tensor | None = None) -> Tensor:
    """See `specengine.kernels.reference.filter_rows`.

    num_rows: `[1]` int32 on the device: rows from there on are padding, and their statistics are left alone
    """
    check_logits("logits", logits)
    count, vocab_size = logits.shape
    stats = torch.empty(count, NUM_STATS.value, device=logits.device)
    tile = min(MAX_TILE, max(MIN_TILE, triton.next_power_of_2(vocab_size)))
    launch(
        spec_filter_rows,
        (count,),
        logits,
        logits.stride(0),
        *check_columns(rows, count, "temperature", "top_k", "top_p", "min_p"),
        stats,
        scratch(count * tile // 2, torch.float32, logits.device),
        num_rows,
        VOCAB=vocab_size,
        UNITS=2.0 ** min(50, 62 - vocab_size.bit_length()),
        NUM_TILES=triton.next_power_of_2(ceil_div(vocab_size, tile)),
        TILE=tile,
        THREADS=min(32 * NUM_WARPS, tile // 8),
        CAPACITY=tile // 2,
        num_warps=NUM_WARPS,
    )
    return stats
