"""The linear layers' inner loop: sixteen rows, normed and rounded as the weights want them, times a tile of weights.

An output element is a sum along K in an order that only the layer's tile fixes: it depends neither on the rows
computed with it nor on their number. Rows enter the product in the weights' type (int8: rounded to 127ths of the
largest of each 128, with an exact integer sum), and the sum is fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.launch import INTERPRETED
from specengine.kernels.device.rounding import as_operand, round_to
from specengine.kernels.device.tiles import HELD_COLUMNS, HELD_DTYPES, HELD_WIDTH
from specengine.kernels.types.grouped import GROUP_SIZE, GroupedWeight
from specengine.kernels.types.packed import PackedLinear

# Columns, and rows, at a time in which a norm's mean and variance are found: 32 of a thread's registers. One row to
# four are what a token, a draft or a short verification has; each group more costs a program about a microsecond.
STATISTICS_CHUNK = 1024
ROWS_AT_ONCE = tl.constexpr(4)
# In memory a weight row takes a multiple of this many elements, so that vectors of 16 bytes never straddle rows.
ROW_MULTIPLE = 16

# Products with held weights go over parts of this depth, which a program's warps share; rows that meet int8 weights are
# rounded part by part. At least a tensor core's.
PART_DEPTH, _MIN_DEPTH = tl.constexpr(128), 32

GROUP_K = tl.constexpr(GROUP_SIZE)
# What is taken from codes of 4 bits, and as many scales added to their minimum: less cancels in the sums.
_CENTRE = tl.constexpr(8)

# Of 16-bit weights a tile of so few columns is multiplied by warps that share out K; as many as its warps.
FEW_COLUMNS = tl.constexpr(32)
PARTS = tl.constexpr(4)

_ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh")
GATED = "swiglu"

_SMALLEST_SIZE = tl.constexpr(1e-36)  # 127 over it is finite
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and taking it away rounds to the nearest integer


def chunk_of(width: int) -> int:
    """Columns that `row_moments` takes at a time."""
    return min(STATISTICS_CHUNK, int(triton.next_power_of_2(width)))


def held_depth(weight: PackedLinear, block_n: int) -> int:
    """As deep as the tile is whose weights a program holds (`hold_weights`); 0 where it cannot."""
    is_held = (
        weight.weight.dtype in HELD_DTYPES and block_n == HELD_COLUMNS and weight.in_features <= HELD_WIDTH
    )
    return max(_MIN_DEPTH, int(triton.next_power_of_2(weight.in_features))) if is_held else 0


def pack_rows(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    """`[N, K]` weights as the kernels read them: contiguous, K padded by zeros to a multiple of ROW_MULTIPLE.

    A weight that is like that already is not copied.
    """
    out_features, in_features = weight.shape
    missing = -in_features % ROW_MULTIPLE
    rows = (torch.nn.functional.pad(weight, (0, missing)) if missing else weight).contiguous()
    packed_bias = None if bias is None else bias.float().contiguous()
    return PackedLinear(rows, packed_bias, in_features, out_features)


def pack_groups(weight: GroupedWeight, bias: Tensor | None) -> PackedLinear:
    """Weights by group as `load_groups` reads them: rows of bytes, padded to a multiple of ROW_MULTIPLE.

    A row is its codes, its scales in fp16 and, of 4 bits, its minima in fp16. 4 bits without a minimum get one, -8
    scales, or where that is beyond fp16 8 bits: the same numbers. 4 bits are 16 bytes a group, k and k + 16 in each.
    """
    above = weight.above_minimum() if weight.bits == 4 else None
    codes, parts = weight.codes, [weight.scale]
    if above is not None and above.minimum is not None:
        low, high = above.codes.unflatten(1, (-1, 2, GROUP_SIZE // 2)).unbind(2)
        codes = (low | high << 4).flatten(1)
        parts.append(above.minimum)
    rows = torch.cat([part.contiguous().view(torch.uint8) for part in (codes, *parts)], dim=1)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % ROW_MULTIPLE)).contiguous()
    packed_bias = None if bias is None else bias.float().contiguous()
    out_features, in_features = weight.shape
    return PackedLinear(rows, packed_bias, in_features, out_features)


def row_widths(in_features: int, dtype: torch.dtype) -> tuple[int, ...]:
    """What a packed row may have: elements, of weights by group bytes."""
    if dtype != torch.uint8:
        return (-(-in_features // ROW_MULTIPLE) * ROW_MULTIPLE,)
    sizes = (in_features * 5 // 8, in_features * 17 // 16)  # of 4 and of 8 bits
    return tuple(-(-size // ROW_MULTIPLE) * ROW_MULTIPLE for size in sizes)


def check_linear(name: str, x: Tensor, weight: PackedLinear) -> None:
    """Raises `ValueError` naming `name` unless x is `[T, in_features]` fp32 with contiguous rows for this weight."""
    if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != weight.in_features or x.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected [T, {weight.in_features}] torch.float32 with contiguous rows, got "
            f"{list(x.shape)} {x.dtype}"
        )
    if x.stride(0) < x.shape[1]:
        raise ValueError(f"{name}: rows overlap")
    rows = weight.weight
    shapes = [(weight.out_features, width) for width in row_widths(weight.in_features, rows.dtype)]
    if rows.shape not in shapes or not rows.is_contiguous():
        raise ValueError(
            f"weight: {list(rows.shape)} is not a packed {weight.out_features} x {weight.in_features}"
        )
    if (rows.dtype == torch.int8) != (weight.scale is not None):
        raise ValueError(f"scale: int8 weights have one, others none; weight is {rows.dtype}")
    for label, vector in (("scale", weight.scale), ("bias", weight.bias)):
        if vector is not None and (vector.shape != (weight.out_features,) or vector.dtype != torch.float32):
            raise ValueError(
                f"{label}: expected [{weight.out_features}] torch.float32, got {list(vector.shape)}"
            )


def check_residual(x: Tensor, weight: PackedLinear, residual: Tensor) -> tuple[int, int]:
    """Raises `ValueError` unless residual can be added to x W^T; returns the shape of both."""
    shape = [x.shape[0], weight.out_features]
    if list(residual.shape) != shape or residual.dtype != torch.float32 or residual.stride(-1) != 1:
        raise ValueError(
            f"residual: expected {shape} torch.float32 with contiguous rows, got "
            f"{list(residual.shape)} {residual.dtype}"
        )
    return shape[0], shape[1]


def check_activation(activation: str, *, may_gate: bool = False) -> None:
    """Raises `ValueError` for an activation that `activate`, and `gate` where that is possible, does not know."""
    known = (*_ACTIVATIONS, GATED) if may_gate else _ACTIVATIONS
    if activation not in known:
        raise ValueError(f"activation: {activation!r} is unknown; expected {', '.join(known)}")


@triton.jit
def count_rows(num_rows, num_rows_ptr):
    """Rows to compute: all, or as many as the device says (rows from there on are padding)."""
    if num_rows_ptr is None:
        return num_rows
    else:
        return tl.minimum(num_rows, tl.load(num_rows_ptr))


@triton.jit
def chunk_moments(
    x_ptr, x_stride, rows, is_row, WIDTH: tl.constexpr, CHUNK: tl.constexpr, HAS_MEAN: tl.constexpr
):
    """Mean and mean square about it of rows, `[M]` each, chunk by chunk (Chan et al., 1983): one pass, and no
    cancellation however far the mean is from zero. Without HAS_MEAN zero, and the mean square about zero."""
    mean = tl.zeros((rows.shape[0],), tl.float32)
    squares = tl.zeros((rows.shape[0],), tl.float32)
    columns = tl.arange(0, CHUNK)
    for first in tl.static_range(0, WIDTH, CHUNK):
        count = tl.minimum(WIDTH - first, CHUNK)
        is_inside = columns < count
        at = rows[:, None].to(tl.int64) * x_stride + (first + columns)[None, :]
        x = tl.load(x_ptr + at, is_row[:, None] & is_inside[None, :], other=0.0)
        if HAS_MEAN:
            weight = count.to(tl.float32)
            share = weight / (first + weight)
            chunk_mean = tl.sum(x, axis=1) / weight
            centred = tl.where(is_inside[None, :], x - chunk_mean[:, None], 0.0)
            delta = chunk_mean - mean
            mean += delta * share
            squares += tl.sum(centred * centred, axis=1) + delta * delta * (first * share)
        else:
            squares += tl.sum(x * x, axis=1)
    return mean, squares / WIDTH


@triton.jit
def row_moments(
    x_ptr,
    x_stride,
    first_row,
    num_rows,
    eps,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Mean and 1 / sqrt(var + eps) of the rows from first_row on, `[BLOCK_M]` each; without HAS_MEAN zero and
    1 / sqrt(mean x^2 + eps). Only as many groups of rows are read as there are rows; of the others both are zero."""
    ROWS: tl.constexpr = ROWS_AT_ONCE
    mean = tl.zeros((BLOCK_M,), tl.float32)
    inverse = tl.zeros((BLOCK_M,), tl.float32)
    group = tl.arange(0, BLOCK_M) // ROWS
    for first in tl.range(0, tl.minimum(num_rows - first_row, BLOCK_M), ROWS):
        rows = first_row + first + tl.arange(0, ROWS)
        own_mean, variance = chunk_moments(x_ptr, x_stride, rows, rows < num_rows, WIDTH, CHUNK, HAS_MEAN)
        is_own = group == first // ROWS
        inverse = tl.where(is_own, repeat(1.0 / tl.sqrt_rn(variance + eps), BLOCK_M), inverse)
        if HAS_MEAN:
            mean = tl.where(is_own, repeat(own_mean, BLOCK_M), mean)
    return mean, inverse


@triton.jit
def repeat(x, LENGTH: tl.constexpr):
    """x again and again, up to `[LENGTH]`."""
    return tl.reshape(tl.broadcast_to(x[None, :], (LENGTH // x.shape[0], x.shape[0])), (LENGTH,))


@triton.jit
def load_codes(weight_ptr, columns, group, WIDTH: tl.constexpr, WEIGHT_STRIDE: tl.constexpr):
    """Codes `[GROUPS, N, 32]` bf16, exactly, of weights by group, see `pack_groups`, those of 4 bits less _CENTRE; any
    beyond WIDTH. A row of 8 bits is longer than WIDTH, one of 4 bits is not."""
    HAS_8_BITS: tl.constexpr = WEIGHT_STRIDE > WIDTH
    BYTES: tl.constexpr = GROUP_K if HAS_8_BITS else GROUP_K // 2
    byte = group[:, None, None] * BYTES + tl.arange(0, BYTES)[None, None, :]
    at = columns[None, :, None].to(tl.int64) * WEIGHT_STRIDE + byte
    packed = tl.load(weight_ptr + at, mask=(group < WIDTH // GROUP_K)[:, None, None], other=0)
    if HAS_8_BITS:
        return exactly(packed.to(tl.int8, bitcast=True))
    else:
        low = exactly((packed & 15).to(tl.int32) - _CENTRE)
        high = exactly((packed >> 4).to(tl.int32) - _CENTRE)
        halves = tl.permute(tl.join(low, high), (0, 1, 3, 2))
        return tl.reshape(halves, (packed.shape[0], packed.shape[1], GROUP_K))


@triton.jit
def exactly(numbers):
    """Integers of up to 8 bits in bf16."""
    return round_to(numbers.to(tl.float32), tl.bfloat16)


@triton.jit
def load_scales(
    weight_ptr, columns, group, BEHIND: tl.constexpr, WIDTH: tl.constexpr, WEIGHT_STRIDE: tl.constexpr
):
    """Of groups of columns `[GROUPS, N]` fp32, 0 beyond WIDTH: scales, or what is BEHIND them, minima and _CENTRE
    scales."""
    NUM_GROUPS: tl.constexpr = WIDTH // GROUP_K
    CODE_BYTES: tl.constexpr = WIDTH if WEIGHT_STRIDE > WIDTH else WIDTH // 2
    halves_ptr = weight_ptr.to(tl.pointer_type(tl.float16), bitcast=True)
    at = columns[None, :].to(tl.int64) * (WEIGHT_STRIDE // 2) + (CODE_BYTES // 2 + group)[:, None]
    is_inside = (group < NUM_GROUPS)[:, None]
    scales = tl.load(halves_ptr + at, mask=is_inside, other=0.0).to(tl.float32)
    if BEHIND:
        minima = tl.load(halves_ptr + at + NUM_GROUPS, mask=is_inside, other=0.0).to(tl.float32)
        return minima + _CENTRE * scales
    else:
        return scales


@triton.jit
def in_three(x):
    """fp32 x as the sum of three numbers of 8 bits each, bf16: their products with codes are exact."""
    high = round_to(x, tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = round_to(rest, tl.bfloat16)
    return high, middle, round_to(rest - middle.to(tl.float32), tl.bfloat16)


@triton.jit
def stack_rows(x, y):
    """Two of `[GROUPS, ROWS, K]` as one of `[GROUPS, 2 ROWS, K]`."""
    both = tl.permute(tl.join(x, y), (0, 3, 1, 2))
    return tl.reshape(both, (x.shape[0], 2 * x.shape[1], x.shape[2]))


@triton.jit
def keep_layout(x):
    """x, fp32, behind which no work is moved: left to itself the compiler has every warp norm all of a tile."""
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1
        )


@triton.jit
def add_parts(total):
    """`[PARTS, M, N]` to `[M, N]`, in an order that no layout decides: each with the one half of PARTS behind it, until
    one is left."""
    for _ in tl.static_range(5):
        if total.shape[0] > 1:
            halves = tl.reshape(total, (2, total.shape[0] // 2, total.shape[1], total.shape[2]))
            first, second = tl.split(tl.permute(halves, (1, 2, 3, 0)))
            total = first + second
    return tl.reshape(total, (total.shape[1], total.shape[2]))


@triton.jit
def places(HELD: tl.constexpr):
    """Where along K the elements of a held tile lie, `[PARTS, 1, DEPTH]`."""
    DEPTH: tl.constexpr = min(HELD, PART_DEPTH)
    return tl.arange(0, HELD // DEPTH)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]


@triton.jit
def hold_weights(weight_ptr, columns, WIDTH: tl.constexpr, WEIGHT_STRIDE: tl.constexpr, HELD: tl.constexpr):
    """The weights of `columns` over all of K, `[PARTS, N, DEPTH]`, to be loaded before the wait: no kernel writes
    weights, so they may come while the kernel before still runs. A tuple of them; by group codes `[GROUPS, N, 32]`
    bf16, scales `[GROUPS, N]` and, of 4 bits, minima as `load_scales` gives them."""
    if weight_ptr.dtype.element_ty == tl.uint8:
        group = tl.arange(0, HELD // GROUP_K)
        codes = load_codes(weight_ptr, columns, group, WIDTH, WEIGHT_STRIDE)
        scales = load_scales(weight_ptr, columns, group, False, WIDTH, WEIGHT_STRIDE)
        if WEIGHT_STRIDE > WIDTH:
            return (codes, scales)
        else:
            return (codes, scales, load_scales(weight_ptr, columns, group, True, WIDTH, WEIGHT_STRIDE))
    else:
        k = places(HELD)
        at = columns[None, :, None].to(tl.int64) * WEIGHT_STRIDE + k
        if WEIGHT_STRIDE == HELD:
            return (tl.load(weight_ptr + at),)
        else:
            return (tl.load(weight_ptr + at, mask=k < WEIGHT_STRIDE, other=0),)


@triton.jit
def hold_norm(vector_ptr, weight, WIDTH: tl.constexpr, HELD: tl.constexpr):
    """A norm's weight or bias, see `load_norm`, to be held like weights; beside weights by group, which leave no
    registers for it, the pointer."""
    if len(weight) > 1:
        return vector_ptr
    else:
        return load_norm(vector_ptr, WIDTH, HELD)


@triton.jit
def load_norm(vector_ptr, WIDTH: tl.constexpr, HELD: tl.constexpr):
    """A norm's weight or bias as the rows of a group have it, `[PARTS, ROWS_AT_ONCE, DEPTH]`."""
    k = tl.broadcast_to(places(HELD), (HELD // min(HELD, PART_DEPTH), ROWS_AT_ONCE, min(HELD, PART_DEPTH)))
    return tl.load(vector_ptr + k, mask=k < WIDTH, other=0.0)


@triton.jit
def sum_rows(x):
    """`[PARTS, ROWS, DEPTH]` to `[ROWS]`."""
    return tl.sum(as_matrix(x), axis=1)


@triton.jit
def as_matrix(x):
    """`[PARTS, ROWS, DEPTH]` as `[ROWS, PARTS * DEPTH]`."""
    return tl.reshape(tl.permute(x, (1, 0, 2)), (x.shape[1], x.shape[0] * x.shape[2]))


@triton.jit
def norm_rows(
    hidden_ptr,
    hidden_stride,
    rows,
    num_rows,
    norm_weight,
    norm_bias,
    eps,
    WIDTH: tl.constexpr,
    HELD: tl.constexpr,
):
    """A group of rows normed, `[PARTS, ROWS_AT_ONCE, DEPTH]` fp32; zeros beyond WIDTH.

    Each row is a warp's, where the compiler gives warps to rows: it finds its mean and variance without the others.

    rows:                   `[ROWS_AT_ONCE]`, of which those below num_rows are read
    norm_weight, norm_bias: see `hold_norm`; without a bias there is no mean, see `Norm`
    """
    k = places(HELD)
    is_inside = k < WIDTH
    at = rows[None, :, None].to(tl.int64) * hidden_stride + k
    x = tl.load(hidden_ptr + at, mask=(rows < num_rows)[None, :, None] & is_inside, other=0.0)
    if norm_weight.dtype.is_ptr():
        norm_weight = load_norm(norm_weight, WIDTH, HELD)
        if norm_bias is not None:
            norm_bias = load_norm(norm_bias, WIDTH, HELD)
    if norm_bias is not None:
        mean = sum_rows(x) / WIDTH
        centred = tl.where(is_inside, x - mean[None, :, None], 0.0)
        inverse = 1.0 / tl.sqrt_rn(sum_rows(centred * centred) / WIDTH + eps)
        x = centred * inverse[None, :, None] * norm_weight + norm_bias
    else:
        inverse = 1.0 / tl.sqrt_rn(sum_rows(x * x) / WIDTH + eps)
        x = x * inverse[None, :, None] * norm_weight
    return keep_layout(x)


@triton.jit
def norm_multiply_held(
    hidden_ptr,
    hidden_stride,
    rows,
    num_rows,
    norm_weight,
    norm_bias,
    eps,
    weight,
    scale,
    bias,
    WIDTH: tl.constexpr,
    HELD: tl.constexpr,
):
    """norm(rows) W^T + b for held weights, `[2 * ROWS_AT_ONCE, N]` fp32: the rows, and once more the rows.

    Rounded, the rows are the narrower side of the product, eight of them.

    rows … eps:  see `norm_rows`
    scale, bias: `[N]` or None
    """
    x = norm_rows(hidden_ptr, hidden_stride, rows, num_rows, norm_weight, norm_bias, eps, WIDTH, HELD)
    total = multiply_held(x, weight)
    if scale is not None:
        total *= scale[None, :]
    if bias is not None:
        total += bias[None, :]
    return total


@triton.jit
def multiply_held(x, weight):
    """x `[PARTS, ROWS, DEPTH]` fp32, rounded, times held weights: `[2 ROWS, N]` fp32, the rows and the rows again."""
    PARTS: tl.constexpr = x.shape[0]
    if len(weight) > 1:
        total = multiply_held_groups(x, weight)
    elif weight[0].dtype == tl.int8:
        rounded, unit = round_to_127ths(x)
        exact = tl.dot(weight[0], tl.permute(twice(rounded), (0, 2, 1)), out_dtype=tl.int32)
        total = exact.to(tl.float32) * tl.permute(twice(unit[:, :, None]), (0, 2, 1))
    else:
        rows = tl.permute(twice(round_to(x, weight[0].dtype)), (0, 2, 1))
        total = tl.zeros((PARTS, weight[0].shape[1], rows.shape[2]), tl.float32)
        total = tl.dot(as_operand(weight[0]), as_operand(rows), total)
    return tl.trans(add_parts(total))


@triton.jit
def multiply_held_groups(x, weight):
    """`[GROUPS, N, 2 ROWS]` of weights by group, without rounding: see `multiply_groups`. Of the three numbers that
    make one of x two are rows of one product, beside each other."""
    ROWS: tl.constexpr = x.shape[1]
    GROUPS: tl.constexpr = weight[0].shape[0]
    codes = as_operand(weight[0])
    parts = tl.reshape(x, (x.shape[0], ROWS, x.shape[2] // GROUP_K, GROUP_K))
    x = tl.reshape(tl.permute(parts, (0, 2, 1, 3)), (GROUPS, ROWS, GROUP_K))
    high, middle, low = in_three(x)
    total = tl.zeros((GROUPS, codes.shape[1], 2 * ROWS), tl.float32)
    rows = tl.permute(stack_rows(high, middle), (0, 2, 1))
    total = tl.dot(codes, as_operand(rows), total)
    rows = tl.permute(stack_rows(low, tl.zeros_like(low)), (0, 2, 1))
    total = tl.dot(codes, as_operand(rows), total)
    first, second = tl.split(tl.permute(tl.reshape(total, (GROUPS, codes.shape[1], 2, ROWS)), (0, 1, 3, 2)))
    total = (first + second) * weight[1][:, :, None]
    if len(weight) > 2:
        total += weight[2][:, :, None] * tl.sum(x, axis=2)[:, None, :]
    return tl.permute(twice(tl.permute(total, (0, 2, 1))), (0, 2, 1))


@triton.jit
def round_to_127ths(x):
    """x `[…, DEPTH]` fp32 in 127ths of the largest of each DEPTH as int8, and these units `[…]`: NaN where a number is
    infinite or none."""
    LAST: tl.constexpr = len(x.shape) - 1
    # Compared as integers those are the largest.
    size = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=LAST).to(tl.float32, bitcast=True)
    not_finite = size * 0.0
    size = tl.maximum(size, _SMALLEST_SIZE)
    steps = x * tl.expand_dims(127.0 / size, LAST)
    return ((steps + _ROUNDER) - _ROUNDER).to(tl.int8), size / 127.0 + not_finite


@triton.jit
def twice(x):
    """`[PARTS, ROWS, DEPTH]` to `[PARTS, 2 ROWS, DEPTH]`."""
    copies = tl.broadcast_to(x[:, None, :, :], (x.shape[0], 2, x.shape[1], x.shape[2]))
    return tl.reshape(copies, (x.shape[0], 2 * x.shape[1], x.shape[2]))


@triton.jit
def num_held_rows(first_row, num_rows, BLOCK_M: tl.constexpr):
    """Rows of this program that groups are made of: at least one, so that the first group can be read before it is
    known whether there are rows."""
    return tl.maximum(tl.minimum(num_rows - first_row, BLOCK_M), 1)


@triton.jit
def held_rows(first_row, num_rows):
    """A group of rows from first_row on, as `norm_multiply_held` gives them, and which of them are to be written."""
    place = tl.arange(0, 2 * ROWS_AT_ONCE)
    rows = first_row + place % ROWS_AT_ONCE
    return rows, (place < ROWS_AT_ONCE) & (rows < num_rows)


@triton.jit
def load_parts(
    x_ptr,
    x_stride,
    rows,
    row_mask,
    k,
    norm_weight_ptr,
    norm_bias_ptr,
    mean,
    inverse,
    WIDTH: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Rows at places k `[PARTS, DEPTH]` along K, `[PARTS, M, DEPTH]`, normed as in `multiply_range`; zeros beyond
    WIDTH, unless IS_WHOLE says that no place is there."""
    x_at = rows[None, :, None].to(tl.int64) * x_stride + k[:, None, :]
    if IS_WHOLE:
        x = tl.load(x_ptr + x_at, mask=row_mask[None, :, None], other=0.0)
    else:
        x = tl.load(x_ptr + x_at, mask=row_mask[None, :, None] & (k < WIDTH)[:, None, :], other=0.0)
    if norm_weight_ptr is not None:
        scale = tl.load(norm_weight_ptr + k, mask=k < WIDTH, other=0.0)[:, None, :]
        if norm_bias_ptr is not None:
            shift = tl.load(norm_bias_ptr + k, mask=k < WIDTH, other=0.0)[:, None, :]
            x = (x - mean[None, :, None]) * inverse[None, :, None] * scale + shift
        else:
            x = x * inverse[None, :, None] * scale
        x = keep_layout(x)
    return x


@triton.jit
def multiply_parts(
    x_ptr,
    x_stride,
    rows,
    row_mask,
    weight_ptr,
    columns,
    norm_weight_ptr,
    norm_bias_ptr,
    mean,
    inverse,
    first_block,
    last_block,
    WIDTH: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`multiply_range` for few columns of 16 bits, or of int8 and blocks of as many chunks as there are parts, where
    warps would all do the same. Each multiplies a part of every block of K, and the parts' sums are added up in the
    end. A sum's products follow each other, so it is also done in less time."""
    DEPTH: tl.constexpr = BLOCK_K // PARTS
    total = tl.zeros((PARTS, rows.shape[0], columns.shape[0]), tl.float32)
    for block in tl.range(first_block, last_block):
        k = block * BLOCK_K + tl.arange(0, PARTS)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
        weight_at = columns[None, None, :].to(tl.int64) * WEIGHT_STRIDE + k[:, :, None]
        if WEIGHT_STRIDE % BLOCK_K == 0:
            weight = tl.load(weight_ptr + weight_at)
        else:
            weight = tl.load(weight_ptr + weight_at, mask=k[:, :, None] < WEIGHT_STRIDE, other=0)
        norm = (norm_weight_ptr, norm_bias_ptr, mean, inverse)
        x = load_parts(x_ptr, x_stride, rows, row_mask, k, *norm, WIDTH, WIDTH % BLOCK_K == 0)
        if weight.dtype == tl.int8:
            rounded, unit = round_to_127ths(x)
            total += tl.dot(rounded, weight, out_dtype=tl.int32).to(tl.float32) * unit[:, :, None]
        else:
            total = tl.dot(as_operand(round_to(x, weight.dtype)), as_operand(weight), total)
    return add_parts(total)


@triton.jit
def multiply_groups(
    x_ptr,
    x_stride,
    rows,
    row_mask,
    weight_ptr,
    columns,
    norm_weight_ptr,
    norm_bias_ptr,
    mean,
    inverse,
    first_block,
    last_block,
    WIDTH: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`multiply_range` for weights by group: exact products of rows and codes, summed over each group, then scaled.
    A block's groups have sums of their own, which warps share out, and are added up in the end."""
    GROUPS: tl.constexpr = BLOCK_K // GROUP_K
    HAS_MINIMUM: tl.constexpr = WEIGHT_STRIDE <= WIDTH
    total = tl.zeros((GROUPS, rows.shape[0], columns.shape[0]), tl.float32)
    for block in tl.range(first_block, last_block):
        group = block * GROUPS + tl.arange(0, GROUPS)
        k = group[:, None] * GROUP_K + tl.arange(0, GROUP_K)[None, :]
        norm = (norm_weight_ptr, norm_bias_ptr, mean, inverse)
        x = load_parts(x_ptr, x_stride, rows, row_mask, k, *norm, WIDTH, False)
        codes = load_codes(weight_ptr, columns, group, WIDTH, WEIGHT_STRIDE)
        codes = as_operand(tl.permute(codes, (0, 2, 1)))
        high, middle, low = in_three(x)
        products = tl.dot(as_operand(high), codes, tl.zeros_like(total))
        products = tl.dot(as_operand(middle), codes, products)
        products = tl.dot(as_operand(low), codes, products)
        scales = load_scales(weight_ptr, columns, group, False, WIDTH, WEIGHT_STRIDE)
        total += products * scales[:, None, :]
        if HAS_MINIMUM:
            minima = load_scales(weight_ptr, columns, group, True, WIDTH, WEIGHT_STRIDE)
            total += tl.sum(x, axis=2)[:, :, None] * minima[:, None, :]
    return add_parts(total)


@triton.jit
def multiply_range(
    x_ptr,
    x_stride,
    rows,
    row_mask,
    weight_ptr,
    columns,
    norm_weight_ptr,
    norm_bias_ptr,
    mean,
    inverse,
    first_block,
    last_block,
    WIDTH: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The rows times the weights of `columns`, `[BLOCK_M, BLOCK_N]` fp32, over blocks of K in order.

    norm_weight_ptr: None for rows as they are; else they are normed first, with `mean` (read where
                     there is a bias) and `inverse`
    columns:         `[BLOCK_N]`, all within the weight
    """
    accumulator = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for block in tl.range(first_block, last_block):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        weight_at = columns[None, :].to(tl.int64) * WEIGHT_STRIDE + k[:, None]
        x_at = rows[:, None].to(tl.int64) * x_stride + k[None, :]
        if WEIGHT_STRIDE % BLOCK_K == 0:
            weight = tl.load(weight_ptr + weight_at)
        else:
            weight = tl.load(weight_ptr + weight_at, mask=k[:, None] < WEIGHT_STRIDE, other=0)
        if WIDTH % BLOCK_K == 0:
            x = tl.load(x_ptr + x_at, mask=row_mask[:, None], other=0.0)
        else:
            x = tl.load(x_ptr + x_at, mask=row_mask[:, None] & (k < WIDTH)[None, :], other=0.0)
        if norm_weight_ptr is not None:
            scale = tl.load(norm_weight_ptr + k, mask=k < WIDTH, other=0.0)
            if norm_bias_ptr is not None:
                shift = tl.load(norm_bias_ptr + k, mask=k < WIDTH, other=0.0)
                x = (x - mean[:, None]) * inverse[:, None] * scale[None, :] + shift[None, :]
            else:
                x = x * inverse[:, None] * scale[None, :]
            if weight.dtype == tl.float16 or weight.dtype == tl.bfloat16:
                x = keep_layout(x)
        if weight.dtype == tl.int8:
            rounded, unit = round_to_127ths(x)
            accumulator += tl.dot(rounded, weight, out_dtype=tl.int32).to(tl.float32) * unit[:, None]
        else:
            operand = as_operand(round_to(x, weight.dtype))
            accumulator = tl.dot(operand, as_operand(weight), accumulator, input_precision="ieee")
    return accumulator


@triton.jit
def multiply(
    x_ptr,
    x_stride,
    rows,
    row_mask,
    weight_ptr,
    columns,
    norm_weight_ptr,
    norm_bias_ptr,
    mean,
    inverse,
    first_block,
    last_block,
    WIDTH: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`multiply_groups`, `multiply_parts` or `multiply_range`, as the layer's type and tile say."""
    is_16_bits: tl.constexpr = (
        weight_ptr.dtype.element_ty == tl.float16 or weight_ptr.dtype.element_ty == tl.bfloat16
    )
    is_in_parts: tl.constexpr = weight_ptr.dtype.element_ty == tl.int8 and BLOCK_K == PARTS * PART_DEPTH
    is_shared_out: tl.constexpr = (is_16_bits or is_in_parts) and columns.shape[0] <= FEW_COLUMNS
    is_grouped: tl.constexpr = weight_ptr.dtype.element_ty == tl.uint8
    by_type: tl.constexpr = (
        multiply_groups if is_grouped else multiply_parts if is_shared_out else multiply_range
    )
    return by_type(
        x_ptr,
        x_stride,
        rows,
        row_mask,
        weight_ptr,
        columns,
        norm_weight_ptr,
        norm_bias_ptr,
        mean,
        inverse,
        first_block,
        last_block,
        WIDTH,
        WEIGHT_STRIDE,
        BLOCK_K,
    )


@triton.jit
def finish_columns(accumulator, scale_ptr, bias_ptr, columns):
    """accumulator * scale + bias, by column; either may be None."""
    if scale_ptr is not None:
        accumulator *= tl.load(scale_ptr + columns)[None, :]
    if bias_ptr is not None:
        accumulator += tl.load(bias_ptr + columns)[None, :]
    return accumulator


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """`none`, `relu`, `gelu` or `gelu_tanh`."""
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # x (1 + tanh y) / 2 = x sigmoid(2 y)
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-inner))
    else:
        return x


@triton.jit
def gate(x):
    """`swiglu`, `[M, 2 N]` to `[M, N]`: silu(x[:, 2 i]) * x[:, 2 i + 1]."""
    gates, factors = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return gates / (1.0 + tl.exp(-gates)) * factors


@triton.jit
def first_block(split, WIDTH: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The block of K that range `split` begins with."""
    return split * ((WIDTH + BLOCK_K - 1) // BLOCK_K) // SPLIT_K


@triton.jit
def multiply_split(
    x_ptr,
    x_stride,
    weight_ptr,
    scale_ptr,
    rows,
    row_mask,
    columns,
    split,
    WIDTH: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Range `split` of K of rows W^T for `columns`, `[BLOCK_M, BLOCK_N]` fp32."""
    total = multiply(
        x_ptr,
        x_stride,
        rows,
        row_mask,
        weight_ptr,
        columns,
        None,
        None,
        None,
        None,
        first_block(split, WIDTH, SPLIT_K, BLOCK_K),
        first_block(split + 1, WIDTH, SPLIT_K, BLOCK_K),
        WIDTH,
        WEIGHT_STRIDE,
        BLOCK_K,
    )
    return finish_columns(total, scale_ptr, None, columns)


@triton.jit
def norm_multiply(
    hidden_ptr,
    hidden_stride,
    norm_weight_ptr,
    norm_bias_ptr,
    eps,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    first_row,
    num_rows,
    columns,
    WIDTH: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """norm(rows from first_row on) W^T + b for `columns`, `[BLOCK_M, BLOCK_N]` fp32; see `Norm`."""
    HAS_MEAN: tl.constexpr = norm_bias_ptr is not None
    mean, inverse = row_moments(
        hidden_ptr, hidden_stride, first_row, num_rows, eps, WIDTH, CHUNK, HAS_MEAN, BLOCK_M
    )
    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    total = multiply(
        hidden_ptr,
        hidden_stride,
        rows,
        row_mask,
        weight_ptr,
        columns,
        norm_weight_ptr,
        norm_bias_ptr,
        mean,
        inverse,
        0,
        (WIDTH + BLOCK_K - 1) // BLOCK_K,
        WIDTH,
        WEIGHT_STRIDE,
        BLOCK_K,
    )
    return finish_columns(total, scale_ptr, bias_ptr, columns)


@triton.jit
def add_splits(
    total, partial_ptr, counter_ptr, tile, split, SPLIT_K: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """Leaves this program's `[M, N]` sum behind; for the last of a tile, the sum of all, and True."""
    offsets = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    first = partial_ptr + tile.to(tl.int64) * (SPLIT_K * M * N)
    tl.store(first + split * (M * N) + offsets, total)
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1
    if is_last:
        tl.store(counter_ptr + tile, 0)
        total = tl.load(first + offsets, cache_modifier=".cg")
        for other in tl.static_range(1, SPLIT_K):
            total += tl.load(first + other * (M * N) + offsets, cache_modifier=".cg")
    return total, is_last
