"""Rows of a key/value cache: where they lie, and how they are rotated, quantised, written and read.

A contiguous cache is (batch, max_seqlen, num_heads_kv, head_dim); a paged one is (num_blocks,
block_size, num_heads_kv, head_dim), and a table says which blocks a sequence owns. Both are `Rows`,
whose first axis is then the sequence or the block: `find_rows` tells which, and the rest is shared.

A quantised cache holds int8 or e4m3 numbers, and a float32 scale for each head, or for each token
and head. Where a chip cannot convert e4m3 (compute capability 8.0), its numbers come as bytes.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

INT8_LARGEST = tl.constexpr(127.0)
E4M3_LARGEST = tl.constexpr(448.0)
# Added and taken away again, it rounds a float32 to the nearest integer, halves to even.
ROUNDING = tl.constexpr(12582912.0)


class Paging(NamedTuple):
    """Which blocks each sequence owns, in order; None where the cache is contiguous."""

    block_table: Any
    stride_batch: Any


class Scale(NamedTuple):
    """Scales of a quantised cache. stride_block and stride_row are None where one serves a head."""

    ptr: Any
    stride_block: Any
    stride_row: Any
    stride_head: Any


class Rotary(NamedTuple):
    """Tables (position, pair of dims); positions (batch, row) where they are not consecutive."""

    cos: Any
    sin: Any
    cos_stride_row: Any
    cos_stride_pair: Any
    sin_stride_row: Any
    sin_stride_pair: Any
    num_positions: Any  # rows of the tables
    positions: Any
    positions_stride_batch: Any
    positions_stride_row: Any


@triton.jit
def find_rows(
    paging,
    index,
    start,
    local,
    inside,
    BLOCK_SIZE: tl.constexpr,
    SAME_BLOCK: tl.constexpr,
):
    """Block and row within it of the positions `start + local` of a sequence that are `inside`.

    BLOCK_SIZE is None for a contiguous cache. With SAME_BLOCK all positions lie in one block, and
    its number is one load. The block of a position that is not inside is -1.
    """
    if BLOCK_SIZE is None:
        block = tl.cast(index, tl.int64)
        row = start + local
    else:
        table = paging.block_table + tl.cast(index, tl.int64) * paging.stride_batch
        if SAME_BLOCK:
            block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
            row = start % BLOCK_SIZE + local
        else:
            position = start + local
            block = tl.load(table + position // BLOCK_SIZE, mask=inside, other=-1)
            block = block.to(tl.int64)
            row = position % BLOCK_SIZE
    return block, row


@triton.jit
def cache_pointers(operand, head, block, row):
    """Pointers to the first element of each row of a head."""
    pointers = operand.ptr + tl.cast(head, tl.int64) * operand.stride_head
    return pointers + block * operand.stride_batch + row.to(tl.int64) * operand.stride_row


@triton.jit
def scale_pointers(scale, head, block, row):
    """Pointers to the scale of each row of a head, or to the one scale of the head."""
    pointers = scale.ptr + tl.cast(head, tl.int64) * scale.stride_head
    if scale.stride_row is not None:
        pointers += block * scale.stride_block + row.to(tl.int64) * scale.stride_row
    return pointers


@triton.jit
def load_cached(
    operand,
    head,
    block,
    row,
    inside,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    dtype: tl.constexpr,
):
    """A tile of cached rows (len(row), BLOCK_D) in `dtype`, not yet scaled; 0 outside."""
    dim = tl.arange(0, BLOCK_D)
    pointers = (
        cache_pointers(operand, head, block, row)[:, None] + dim[None, :] * operand.stride_dim
    )
    if CHECK_ROWS:
        tile = tl.load(pointers, mask=inside[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    elif BLOCK_D != HEAD_DIM:
        tile = tl.load(pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return widened(tile, dtype)


@triton.jit
def load_scale(scale, head, block, row, inside, SIZE: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """The scale of each of SIZE rows; ones, for nobody to use, where the cache is not quantised."""
    if scale.ptr is None:
        values = tl.full([SIZE], 1.0, tl.float32)
    elif scale.stride_row is None:
        values = tl.zeros([SIZE], tl.float32) + tl.load(scale_pointers(scale, head, block, row))
    elif CHECK_ROWS:
        values = tl.load(scale_pointers(scale, head, block, row), mask=inside, other=0.0)
    else:
        values = tl.load(scale_pointers(scale, head, block, row))
    return values


@triton.jit
def store_cached(
    operand, scale, head, block, row, inside, values, row_scales, HEAD_DIM: tl.constexpr
):
    """Writes rows that `encoded` made, and their scales where each row has one."""
    dim = tl.arange(0, values.shape[1])
    pointers = (
        cache_pointers(operand, head, block, row)[:, None] + dim[None, :] * operand.stride_dim
    )
    tl.store(pointers, values, mask=inside[:, None] & (dim < HEAD_DIM)[None, :])
    if scale.stride_row is not None:
        tl.store(scale_pointers(scale, head, block, row), row_scales, mask=inside)


@triton.jit
def encoded(tile, operand, scale, head):
    """Rows as their cache holds them, and the scale of each (ones where it is not quantised)."""
    dtype: tl.constexpr = operand.ptr.dtype.element_ty
    row_scales = tl.full([tile.shape[0]], 1.0, tl.float32)
    if scale.ptr is None:
        values = tile.to(dtype)
    else:
        LARGEST: tl.constexpr = INT8_LARGEST if dtype == tl.int8 else E4M3_LARGEST
        x = tile.to(tl.float32)
        if scale.stride_row is None:
            row_scales *= tl.load(scale.ptr + head * scale.stride_head)
        else:
            row_scales = tl.div_rn(tl.max(tl.abs(x), 1), row_scales * LARGEST)
            row_scales = tl.where(row_scales == 0.0, 1.0, row_scales)
        x = tl.div_rn(x, tl.broadcast_to(row_scales[:, None], x.shape))
        values = narrowed(tl.minimum(tl.maximum(x, -LARGEST), LARGEST), dtype)
    return values, row_scales


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """float32 numbers in range as int8, e4m3, or e4m3 in bytes: to the nearest, halves to even."""
    if dtype == tl.int8:
        values = ((x + ROUNDING) - ROUNDING).to(tl.int8)
    elif dtype == tl.uint8:
        values = e4m3_bytes(x)
    else:
        values = x.to(dtype)
    return values


@triton.jit
def e4m3_bytes(x):
    """float32 numbers of at most 448 as e4m3: sign, 4 bits of exponent (bias 7), 3 of fraction."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Below 2**-6 there is a number every 2**-9; above, the fraction is cut to 3 bits.
    small = ((tl.abs(x) * 512.0 + ROUNDING) - ROUNDING).to(tl.int32)
    rounded = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    large = rounded - ((127 - 7) << 3)
    value = tl.where(tl.abs(x) < 0.015625, small, large)
    return (value | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def widened(values, dtype: tl.constexpr):
    """Elements of a cache in `dtype`, which holds all int8 and e4m3 numbers exactly."""
    if values.dtype == tl.uint8:
        # The bits of an e4m3 number are those of a float16 2**8 times smaller.
        bits = values.to(tl.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        half = bits.to(tl.float16, bitcast=True)
        values = (half * 256.0).to(dtype)
    elif values.dtype != dtype:
        values = values.to(dtype)
    return values


@triton.jit
def load_rotated(
    pointers,
    stride_dim,
    inside,
    rotary,
    index,
    row,
    position,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rows at `pointers`, turned by the angles of their positions (arXiv:2104.09864).

    `position` is where each row stands unless `rotary.positions` says so for `row`. The partner of
    each element is loaded beside it: a dimension further on in its pair, or half of ROTARY_DIM.
    """
    dim = tl.arange(0, BLOCK_D)
    keep = inside[:, None] & (dim < HEAD_DIM)[None, :]
    tile = tl.load(pointers[:, None] + dim[None, :] * stride_dim, mask=keep, other=0.0)
    if rotary.cos is not None:
        HALF: tl.constexpr = ROTARY_DIM // 2
        if INTERLEAVED:
            partner = dim ^ 1
            pair = dim // 2
            first = dim % 2 == 0
        else:
            first = dim < HALF
            partner = tl.where(first, dim + HALF, dim - HALF)
            pair = tl.where(first, dim, partner)
        if rotary.positions is not None:
            places = rotary.positions + tl.cast(index, tl.int64) * rotary.positions_stride_batch
            places += row * rotary.positions_stride_row
            position = tl.load(places, mask=inside, other=0)
        position = position.to(tl.int64)[:, None]
        # A query before position 0 sees nothing, and has no angle.
        turned = inside[:, None] & (position >= 0) & (position < rotary.num_positions)
        turned = turned & (dim < ROTARY_DIM)[None, :]
        other = tl.load(pointers[:, None] + partner[None, :] * stride_dim, mask=turned, other=0.0)
        cos = rotary.cos + position * rotary.cos_stride_row + pair[None, :] * rotary.cos_stride_pair
        sin = rotary.sin + position * rotary.sin_stride_row + pair[None, :] * rotary.sin_stride_pair
        cos = tl.load(cos, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(sin, mask=turned, other=0.0).to(tl.float32)
        sin = tl.where(first[None, :], -sin, sin)
        tile = (tile.to(tl.float32) * cos + other.to(tl.float32) * sin).to(tile.dtype)
    return tile
