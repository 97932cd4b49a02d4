"""What every attention kernel shares: operands, who may attend to whom, the scores of one tile.

Positional masks (causal, window, prefix, lengths) all come down to one idea: each query row sees an
*interval* of keys, and each key is seen by an interval of rows. `visible_keys` and `visible_rows`
compute them, `key_ranges` and `row_ranges` turn them into the tiles to visit. A tile inside every
interval needs no mask; one outside all of them is never loaded.

A tile may be (rows, columns) or transposed: helpers take `row` and `col` as they broadcast in it,
(BLOCK_M, 1) and (1, BLOCK_N), or the other way round.

Operands travel as named tuples of pointers and strides. A member, or an operand's `ptr`, that is
None means that the feature is absent, which is known when the kernel is compiled: it costs nothing.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Rows(NamedTuple):
    """A (batch, row, head, dim) operand: q, k, v or out. Packed operands have stride_batch 0."""

    ptr: Any
    stride_batch: Any
    stride_row: Any
    stride_head: Any
    stride_dim: Any


class Plane(NamedTuple):
    """A (batch, head, row, column) operand broadcast by strides: a dense mask or bias, or weights.

    stride_row or stride_col is None where that axis is broadcast, so that only a vector is loaded.
    """

    ptr: Any
    stride_batch: Any
    stride_head: Any
    stride_row: Any
    stride_col: Any


class RowScalars(NamedTuple):
    """A (batch, head, row) operand: the log-sum-exp of the scores."""

    ptr: Any
    stride_batch: Any
    stride_head: Any
    stride_row: Any


class HeadScalars(NamedTuple):
    """A (batch, head) operand: ALiBi slopes (sinks have stride_batch 0)."""

    ptr: Any
    stride_batch: Any
    stride_head: Any


class Distances(NamedTuple):
    """A bias by clamped distance: (head, 2 * radius + 1), entry `radius + clamp(key - query)`."""

    ptr: Any
    stride_head: Any
    radius: Any


class Shape(NamedTuple):
    """Sizes of the padded frame; of a packed batch, those of its longest sequence."""

    seqlen_q: Any
    seqlen_k: Any
    num_heads: Any
    group_size: Any


class Masks(NamedTuple):
    """Who may attend to whom. Pointers are to integers, one entry a sequence."""

    cu_seqlens_q: Any
    cu_seqlens_k: Any
    seqlens_q: Any
    seqlens_k: Any
    starts_k: Any
    prefix: Any
    window_left: Any
    window_right: Any


class Scores(NamedTuple):
    """How a score is made of a product, before any term is added."""

    scale: Any
    softcap: Any
    sinks: Any


class Dropout(NamedTuple):
    """Which weights are dropped: `seed` is a pointer to one int64 (None: no dropout)."""

    seed: Any
    threshold: Any  # a weight is kept if its 32 random bits are at least this
    growth: Any  # what the others grow by: 1 / (1 - p)


class Terms(NamedTuple):
    """What is added to, or masked from, the scores of a tile.

    Kernels take the members one by one and assemble them: Triton 3.6 loses a nested member that is
    specialised to 1 when a loop carries the tuple.
    """

    mask: Any  # Plane
    bias: Any  # Plane
    alibi: Any  # HeadScalars
    relative: Any  # Distances


class Sequence(NamedTuple):
    """One sequence of the batch, in its own coordinates (row 0 is its first row)."""

    index: Any  # which sequence
    begin_q: Any  # first row in a packed q, else 0
    begin_k: Any
    rows: Any  # query rows it has
    live_rows: Any  # query rows that may attend to anything
    first_key: Any
    end_key: Any
    offset: Any  # key position of query row 0: bottom-right alignment
    prefix: Any


@triton.jit
def load_int(pointer, index):
    """An entry of a tensor of lengths, whatever its integer type."""
    return tl.load(pointer + index).to(tl.int32)


@triton.jit
def load_sequence(shape, masks, index):
    """Reads where sequence `index` lies and which of its rows and keys exist."""
    rows = shape.seqlen_q
    keys = shape.seqlen_k
    begin_q = 0
    begin_k = 0
    if masks.cu_seqlens_q is not None:
        begin_q = load_int(masks.cu_seqlens_q, index)
        rows = load_int(masks.cu_seqlens_q, index + 1) - begin_q
        begin_k = load_int(masks.cu_seqlens_k, index)
        keys = load_int(masks.cu_seqlens_k, index + 1) - begin_k
    return limit_sequence(masks, index, begin_q, begin_k, rows, keys)


@triton.jit
def limit_sequence(masks, index, begin_q, begin_k, rows, keys):
    """A sequence of `rows` and `keys`, and which of them exist by the masks of lengths."""
    live_rows = rows
    first_key = 0
    end_key = keys
    if masks.seqlens_q is not None:
        live_rows = tl.minimum(rows, load_int(masks.seqlens_q, index))
    if masks.seqlens_k is not None:
        end_key = tl.minimum(keys, load_int(masks.seqlens_k, index))
    if masks.starts_k is not None:
        first_key = tl.maximum(0, load_int(masks.starts_k, index))
    prefix = 0
    if masks.prefix is not None:
        prefix = load_int(masks.prefix, index)
    return Sequence(
        index, begin_q, begin_k, rows, live_rows, first_key, end_key, keys - rows, prefix
    )


@triton.jit
def visible_keys(row, seq, masks):
    """The interval [first, end) of keys that a query row, or a vector of rows, may attend to.

    Both ends grow with the row, so the first and the last row of a block bound the whole block.
    """
    first = row * 0 + seq.first_key
    end = row * 0 + seq.end_key
    position = row + seq.offset
    if masks.window_left is not None:
        first = tl.maximum(first, position - masks.window_left)
    if masks.window_right is not None:
        end = tl.minimum(end, position + masks.window_right + 1)
    if masks.prefix is not None:
        end = tl.minimum(end, tl.maximum(position + 1, seq.prefix))
    return first, end


@triton.jit
def sees_one_key(row, seq, masks):
    """Whether a row's interval holds a single key, whose weight is then 1 whatever its score.

    The backward pass asks, since dO V.T and delta are equal there but for their rounding.
    """
    first, end = visible_keys(row, seq, masks)
    return end - first == 1


@triton.jit
def visible_rows(col, seq, masks):
    """The interval [first, end) of query rows that may attend to a key, or to each of several.

    `visible_keys` the other way round. Both ends grow with the key; keys at or past `seq.end_key`
    are the caller's to leave out.
    """
    first = col * 0
    end = col * 0 + seq.live_rows
    row = col - seq.offset
    if masks.window_left is not None:
        end = tl.minimum(end, row + masks.window_left + 1)
    if masks.window_right is not None:
        first = tl.maximum(first, row - masks.window_right)
    if masks.prefix is not None:
        first = tl.maximum(first, tl.where(col < seq.prefix, 0, row))
    if masks.starts_k is not None:
        end = tl.where(col < seq.first_key, 0, end)
    return first, end


@triton.jit
def tile_ranges(first_of_first, end_of_first, first_of_last, end_of_last, BLOCK: tl.constexpr):
    """Tile-aligned (begin, full_begin, full_end, end) from the intervals that the first and the
    last of a block see: what lies in between sees what both see, since intervals only move on.

    Tiles in [full_begin, full_end) are visible as a whole. Those of [begin, full_begin) and
    [full_end, end) are cut by a mask. All others are not visited.
    """
    # Negative bounds are clamped first: integer division rounds them differently across backends.
    begin = tl.maximum(first_of_first, 0) // BLOCK * BLOCK
    full_begin = tl.cdiv(tl.maximum(first_of_last, 0), BLOCK) * BLOCK
    full_end = tl.maximum(end_of_first, 0) // BLOCK * BLOCK
    return begin, full_begin, tl.maximum(full_end, full_begin), end_of_last


@triton.jit
def key_ranges(start_m, seq, masks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """`tile_ranges` of the keys that one block of rows sees."""
    last_m = tl.minimum(start_m + BLOCK_M, seq.live_rows) - 1
    return key_ranges_between(start_m, last_m, seq, masks, BLOCK_N)


@triton.jit
def key_ranges_between(first_m, last_m, seq, masks, BLOCK_N: tl.constexpr):
    """The same for the rows from `first_m` to `last_m`, both included."""
    first, full_end = visible_keys(first_m, seq, masks)
    full_first, end = visible_keys(last_m, seq, masks)
    begin, full_begin, full_end, end = tile_ranges(first, full_end, full_first, end, BLOCK_N)
    # A block of rows that are all padding visits nothing.
    alive = last_m >= first_m
    return begin, full_begin, tl.where(alive, full_end, full_begin), tl.where(alive, end, 0)


@triton.jit
def row_ranges(start_n, seq, masks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """`tile_ranges` of the query rows that see one block of keys."""
    last_n = tl.minimum(start_n + BLOCK_N, seq.end_key) - 1
    first, full_end = visible_rows(start_n, seq, masks)
    full_first, end = visible_rows(last_n, seq, masks)
    begin, full_begin, full_end, end = tile_ranges(first, full_end, full_first, end, BLOCK_M)
    # A lone key is never taken for a full tile, since its rows may see that key only.
    full_end = tl.where(last_n > start_n, full_end, full_begin)
    return begin, full_begin, full_end, tl.where(last_n >= start_n, end, 0)


@triton.jit
def load_tile(
    operand,
    base,
    row,
    end_row,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Loads rows `row` of one head, as (len(row), BLOCK_D); what lies outside is 0."""
    dim = tl.arange(0, BLOCK_D)
    pointers = base + row_offsets(row, operand.stride_row, WIDE)[:, None]
    pointers += row_offsets(dim, operand.stride_dim, WIDE)[None, :]
    if CHECK_ROWS:
        inside = (row < end_row)[:, None] & (dim < HEAD_DIM)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif BLOCK_D != HEAD_DIM:
        tile = tl.load(pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def row_offsets(row, stride, WIDE: tl.constexpr):
    """`row * stride` in 64 bits where the launcher found that 32 could overflow."""
    if WIDE:
        row = row.to(tl.int64)
    return row * stride


@triton.jit
def head_base(operand, batch, head, begin_row):
    """Pointer to row `begin_row` of a head; 64 bits, since whole tensors exceed 2**31 elements."""
    offset = tl.cast(batch, tl.int64) * operand.stride_batch
    offset += tl.cast(head, tl.int64) * operand.stride_head
    return operand.ptr + offset + tl.cast(begin_row, tl.int64) * operand.stride_row


@triton.jit
def load_rows(scalars, batch, head, begin_row, local_row, end_row, other, CHECK_ROWS: tl.constexpr):
    """Loads a scalar for each of `local_row`, counted from `begin_row`."""
    pointers = head_base(scalars, batch, head, begin_row) + local_row * scalars.stride_row
    if CHECK_ROWS:
        values = tl.load(pointers, mask=local_row < end_row, other=other)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def plane_pointers(plane, batch, head, row, col):
    """Pointers to a plane's rows x columns; just a vector of them where an axis is broadcast."""
    pointers = plane.ptr + tl.cast(batch, tl.int64) * plane.stride_batch
    pointers += tl.cast(head, tl.int64) * plane.stride_head
    if plane.stride_row is not None:
        pointers += row.to(tl.int64) * plane.stride_row
    if plane.stride_col is not None:
        pointers += col.to(tl.int64) * plane.stride_col
    return pointers


@triton.jit
def load_plane(plane, batch, head, row, col, end_row, end_col, other):
    """Loads a dense mask or bias for rows x columns; only a vector where an axis is broadcast."""
    pointers = plane_pointers(plane, batch, head, row, col)
    if plane.stride_row is None and plane.stride_col is None:
        tile = tl.load(pointers)
    elif plane.stride_row is None:
        tile = tl.load(pointers, mask=col < end_col, other=other)
    elif plane.stride_col is None:
        tile = tl.load(pointers, mask=row < end_row, other=other)
    else:
        tile = tl.load(pointers, mask=(row < end_row) & (col < end_col), other=other)
    return tile


@triton.jit
def is_near(start_m, start_n, seq, radius, BLOCK_M, BLOCK_N):
    """Whether a tile holds a distance key - query within the radius of a bias by distance."""
    largest = start_n + BLOCK_N - 1 - (start_m + seq.offset)
    smallest = start_n - (start_m + BLOCK_M - 1 + seq.offset)
    return (smallest < radius) & (largest > -radius)


@triton.jit
def load_by_distance(distances, head, start_m, start_n, row, col, seq, BLOCK_M, BLOCK_N):
    """Bias by key - query distance. A tile past the radius needs one entry, the others a gather.

    `start_m` is None where the rows are not consecutive: then every tile gathers.
    """
    base = distances.ptr + tl.cast(head, tl.int64) * distances.stride_head
    radius = distances.radius
    distance = col - row - seq.offset
    index = tl.minimum(tl.maximum(distance, -radius), radius) + radius
    if start_m is None:
        bias = tl.load(base + index).to(tl.float32)
    else:
        if is_near(start_m, start_n, seq, radius, BLOCK_M, BLOCK_N):
            bias = tl.load(base + index).to(tl.float32)
        else:
            after = start_n > start_m + seq.offset
            far = tl.load(base + tl.where(after, 2 * radius, 0)).to(tl.float32)
            bias = tl.zeros(index.shape, tl.float32) + far
    return bias


@triton.jit
def kept_weights(dropout, index, head, row, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights of rows `row` (BLOCK_M,) dropout keeps, as (BLOCK_M, BLOCK_N) booleans.

    Philox gives four words: those of four columns. See `fastattn.dropout`, which draws the same.
    """
    quad = start_n // 4 + tl.arange(0, BLOCK_N // 4)
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    a, b, c, d = tl.philox(
        tl.load(dropout.seed), zero + quad[None, :], zero + row[:, None], zero + head, zero + index
    )
    threshold = tl.cast(dropout.threshold, tl.uint32)
    # Compared before they are interleaved, so that bytes move and not words.
    even = tl.join((a >= threshold).to(tl.int8), (c >= threshold).to(tl.int8))
    odd = tl.join((b >= threshold).to(tl.int8), (d >= threshold).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (BLOCK_M, BLOCK_N)) != 0


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """Hyperbolic tangent from exp2. PRECISE avoids the cancellation near 0 that float32 shows."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    magnitude = (1.0 - decay) / (1.0 + decay)
    result = tl.where(x < 0, -magnitude, magnitude)
    if PRECISE:
        # Taylor series; at 1/2 its first dropped term is near one float32 rounding unit.
        z = x * x
        series = -1382.0 / 155925.0 + z * (21844.0 / 6081075.0)
        series = 2.0 / 15.0 + z * (-17.0 / 315.0 + z * (62.0 / 2835.0 + z * series))
        series = x + x * z * (-1.0 / 3.0 + z * series)
        result = tl.where(tl.abs(x) < 0.5, series, result)
    return result


@triton.jit
def scale_scores(products, scores, LAZY_SCALE, PRECISE):
    """Scaled and capped scores of a tile of products q @ k.T.

    With LAZY_SCALE (nothing is added to the scores) the products stay as they are: the scale then
    rides in the exponential's multiply-add.
    """
    if scores.softcap is not None:
        products = tanh(products * (scores.scale / scores.softcap), PRECISE) * scores.softcap
    elif not LAZY_SCALE:
        products = products * scores.scale
    return products


@triton.jit
def add_terms(s, terms, seq, head, start_m, start_n, row, col, BLOCK_M, BLOCK_N):
    """Adds the biases to scaled scores and applies the dense mask: -inf where nothing attends."""
    if terms.bias.ptr is not None:
        # Not of dead rows: what is not finite there would reach the weights of live keys.
        bias = load_plane(terms.bias, seq.index, head, row, col, seq.live_rows, seq.end_key, 0.0)
        s += bias.to(tl.float32)
    if terms.alibi.ptr is not None:
        slope = tl.load(
            terms.alibi.ptr + seq.index * terms.alibi.stride_batch + head * terms.alibi.stride_head
        )
        s -= tl.abs(col - row - seq.offset).to(tl.float32) * slope.to(tl.float32)
    if terms.relative.ptr is not None:
        s += load_by_distance(
            terms.relative, head, start_m, start_n, row, col, seq, BLOCK_M, BLOCK_N
        )
    if terms.mask.ptr is not None:
        keep = load_plane(terms.mask, seq.index, head, row, col, seq.rows, seq.end_key, 0)
        s = tl.where(keep != 0, s, float("-inf"))
    return s


@triton.jit
def cut_scores(s, position, first, end):
    """-inf wherever `position` lies outside the interval [first, end)."""
    return tl.where((position >= first) & (position < end), s, float("-inf"))


@triton.jit
def exponential(scores, shift, scale, SUBTRACT_FIRST: tl.constexpr):
    """exp2((scores - shift) * scale) for rows of scores, or for one score a row.

    As one multiply-add, except with SUBTRACT_FIRST, for float32 results, which show the rounding of
    large scores, and for scores that the scale could turn into infinities.
    """
    if SUBTRACT_FIRST:
        return tl.exp2((scores - shift) * scale)
    else:
        return tl.exp2(scores * scale - shift * scale)


@triton.jit
def softmax_step(s, maximum, scale, SUBTRACT_FIRST: tl.constexpr, MAY_BE_EMPTY: tl.constexpr):
    """One tile of the online softmax: weights, the new maxima, and what older sums shrink by.

    MAY_BE_EMPTY: a row may have seen no key yet, so that its maximum is -inf.
    """
    new_maximum = tl.maximum(maximum, tl.max(s, 1))
    shift = new_maximum
    if MAY_BE_EMPTY:
        # Infinity minus infinity must not reach exp2.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    p = exponential(s, shift[:, None], scale, SUBTRACT_FIRST)
    decay = exponential(maximum, shift, scale, SUBTRACT_FIRST)
    return p, new_maximum, decay


@triton.jit
def rebuilt_weights(scores, shift, log_total, scale, SUBTRACT_FIRST: tl.constexpr):
    """Softmax weights from the statistics that the forward pass saved; 0 where shift is inf."""
    if SUBTRACT_FIRST:
        return tl.exp2((scores - shift) * scale - log_total)
    else:
        return tl.exp2(scores * scale - (shift * scale + log_total))
