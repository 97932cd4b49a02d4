"""Attention backward, by rows of queries: dQ, and the gradients of biases.

One program owns BLOCK_M query rows of one head and walks over the tiles of keys that they see, as
the forward pass does. Per tile: two products to rebuild the weights and their gradient, one for dQ.
What a program adds up lies in its own registers or in a row of a buffer that no other program
writes: no atomics, so two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from triton.language.target_info import is_hip

from fastattn.kernels.attention.config import TileConfig, padded_dim
from fastattn.kernels.attention.operands import (
    Modifiers,
    dropout,
    masks,
    needs_wide_offsets,
    plane,
    problem_shape,
    row_scalars,
    rows,
    scores,
    softmax_rows,
    terms,
)
from fastattn.kernels.attention.tile import (
    LOG2E,
    Terms,
    add_terms,
    cut_scores,
    head_base,
    is_near,
    kept_weights,
    key_ranges,
    load_rows,
    load_sequence,
    load_tile,
    plane_pointers,
    rebuilt_weights,
    row_offsets,
    scale_scores,
    sees_one_key,
    visible_keys,
)


@triton.jit
def sum_diagonals(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GATHER: tl.constexpr):
    """Sums of a (BLOCK_M, BLOCK_N) tile over its diagonals column - row = c.

    Returns (BLOCK_N,) sums of the diagonals c and of c - BLOCK_N, for c in 0..BLOCK_N - 1. With
    GATHER each row is rotated by its number, which lines the diagonals up in columns; without, they
    are taken one at a time. Needs BLOCK_M <= BLOCK_N.
    """
    row = tl.arange(0, BLOCK_M)[:, None]
    col = tl.arange(0, BLOCK_N)
    if GATHER:
        source = row + col[None, :]
        rotated = tl.gather(tile, source % BLOCK_N, 1)
        upper = tl.sum(tl.where(source < BLOCK_N, rotated, 0.0), 0)
        lower = tl.sum(tl.where(source < BLOCK_N, 0.0, rotated), 0)
    else:
        upper = tl.zeros([BLOCK_N], tl.float32)
        lower = tl.zeros([BLOCK_N], tl.float32)
        for c in range(BLOCK_N):
            above = tl.sum(tl.where(col[None, :] - row == c, tile, 0.0))
            below = tl.sum(tl.where(col[None, :] - row == c - BLOCK_N, tile, 0.0))
            upper = tl.where(col == c, above, upper)
            lower = tl.where(col == c, below, lower)
    return upper, lower


@triton.jit
def store_diagonals(base, radius, distance, sums):
    """Stores sums by distance where the distance has an entry of its own."""
    keep = (distance > -radius) & (distance < radius)
    tl.store(base + radius + distance, sums, mask=keep)


@triton.jit
def _attention_backward_rows_kernel(
    q,
    k,
    v,
    dout,
    shift,
    log_total,
    delta,
    dq,
    dbias,
    row_sums,
    by_distance,
    shape,
    masks,
    scores,
    dropout,
    mask,
    bias,
    alibi,
    relative,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    LAZY_SCALE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    num_blocks_m = tl.cdiv(shape.seqlen_q, BLOCK_M)
    program = tl.program_id(0)
    # Under a causal mask the last rows see most: they start first, so that none is left over late.
    block_m = num_blocks_m - 1 - program % num_blocks_m
    head = (program // num_blocks_m) % shape.num_heads
    index = program // num_blocks_m // shape.num_heads
    seq = load_sequence(shape, masks, index)
    start_m = block_m * BLOCK_M
    if start_m >= seq.rows:
        return

    local_row = tl.arange(0, BLOCK_M)
    row = start_m + local_row
    key_head = head // shape.group_size
    live = seq.live_rows - start_m
    q_base = head_base(q, index, head, seq.begin_q + start_m)
    q_tile = load_tile(q, q_base, local_row, live, HEAD_DIM, BLOCK_D, CHECK_ROWS=True, WIDE=WIDE)
    dout_base = head_base(dout, index, head, seq.begin_q + start_m)
    dout_tile = load_tile(
        dout, dout_base, local_row, live, HEAD_DIM_V, BLOCK_DV, CHECK_ROWS=True, WIDE=WIDE
    )
    begin_m = seq.begin_q + start_m
    row_shift = load_rows(shift, index, head, begin_m, local_row, live, float("inf"), True)
    row_log_total = load_rows(log_total, index, head, begin_m, local_row, live, 0.0, True)
    row_delta = load_rows(delta, index, head, begin_m, local_row, live, 0.0, True)
    k_base = head_base(k, index, key_head, seq.begin_k)
    v_base = head_base(v, index, key_head, seq.begin_k)
    terms = Terms(mask, bias, alibi, relative)
    PRECISE: tl.constexpr = q.ptr.dtype.element_ty == tl.float32
    SUBTRACT_FIRST: tl.constexpr = PRECISE or (bias.ptr is not None)
    exponent_scale = scores.scale * LOG2E if LAZY_SCALE else LOG2E

    # Triton 3.6 does not compile a gather for AMD.
    GATHER: tl.constexpr = not is_hip()
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    # Of biases by distance: sums past the radius on both sides, and of the diagonals that the next
    # tile's lower ones continue.
    before = tl.zeros([BLOCK_M], tl.float32)
    after = tl.zeros([BLOCK_M], tl.float32)
    upper = tl.zeros([BLOCK_N], tl.float32)
    distance_base = by_distance
    if by_distance is not None:
        width = 2 * relative.radius + 1
        entry = (index * shape.num_heads + head) * num_blocks_m + block_m
        distance_base += tl.cast(entry, tl.int64) * width

    first, end = visible_keys(row, seq, masks)
    end = tl.where(row < seq.live_rows, end, 0)
    begin, full_begin, full_end, last = key_ranges(start_m, seq, masks, BLOCK_M, BLOCK_N)
    CUT_LEFT: tl.constexpr = (masks.window_left is not None) or (masks.starts_k is not None)
    for stretch in tl.static_range(0 if CUT_LEFT else 1, 3):
        # The middle stretch holds the full tiles: no positional mask, no bounds to check.
        if stretch == 0:
            low, high = begin, tl.minimum(full_begin, last)
        elif stretch == 1:
            low, high = full_begin, full_end
        else:
            low, high = full_end, last
        for start_n in tl.range(low, high, BLOCK_N):
            CUT: tl.constexpr = stretch != 1
            local_col = tl.arange(0, BLOCK_N)
            col = start_n + local_col
            k_tile = load_tile(
                k,
                k_base + tl.cast(start_n, tl.int64) * k.stride_row,
                local_col,
                seq.end_key - start_n,
                HEAD_DIM,
                BLOCK_D,
                CHECK_ROWS=CUT,
                WIDE=WIDE,
            )
            v_tile = load_tile(
                v,
                v_base + tl.cast(start_n, tl.int64) * v.stride_row,
                local_col,
                seq.end_key - start_n,
                HEAD_DIM_V,
                BLOCK_DV,
                CHECK_ROWS=CUT,
                WIDE=WIDE,
            )
            products = tl.dot(q_tile, k_tile.T, input_precision=INPUT_PRECISION)
            scaled = scale_scores(products, scores, LAZY_SCALE, PRECISE)
            s = add_terms(
                scaled,
                terms,
                seq,
                head,
                start_m,
                start_n,
                row[:, None],
                col[None, :],
                BLOCK_M,
                BLOCK_N,
            )
            if CUT:
                s = cut_scores(s, col[None, :], first[:, None], end[:, None])
            p = rebuilt_weights(
                s, row_shift[:, None], row_log_total[:, None], exponent_scale, SUBTRACT_FIRST
            )
            dp = tl.dot(dout_tile, v_tile.T, input_precision=INPUT_PRECISION)
            if dropout.seed is not None:
                keep = kept_weights(dropout, index, head, row, start_n, BLOCK_M, BLOCK_N)
                dp = tl.where(keep, dp * dropout.growth, 0.0)
            if CUT and scores.sinks is None:
                dp = tl.where(sees_one_key(row, seq, masks)[:, None], 0.0, dp)
            ds = p * (dp - row_delta[:, None])
            if dbias.ptr is not None:
                pointers = plane_pointers(dbias, index, head, row[:, None], col[None, :])
                inside = (row < seq.rows)[:, None] & (col < seq.end_key)[None, :]
                tl.store(pointers, ds.to(dbias.ptr.dtype.element_ty), mask=inside)
            if row_sums.ptr is not None:
                row_sum += tl.sum(ds, 1)
            if by_distance is not None:
                radius = relative.radius
                distance = start_n - (start_m + seq.offset)
                if is_near(start_m, start_n, seq, radius, BLOCK_M, BLOCK_N):
                    away = col[None, :] - row[:, None] - seq.offset
                    before += tl.sum(tl.where(away <= -radius, ds, 0.0), 1)
                    after += tl.sum(tl.where(away >= radius, ds, 0.0), 1)
                    next_upper, lower = sum_diagonals(ds, BLOCK_M, BLOCK_N, GATHER)
                else:
                    # One bucket for the whole tile: one sum.
                    far = tl.sum(ds, 1)
                    before += tl.where(distance < 0, far, 0.0)
                    after += tl.where(distance < 0, 0.0, far)
                    next_upper = tl.zeros([BLOCK_N], tl.float32)
                    lower = tl.zeros([BLOCK_N], tl.float32)
                store_diagonals(
                    distance_base, radius, distance - BLOCK_N + local_col, upper + lower
                )
                upper = next_upper
            if dq.ptr is not None:
                if scores.softcap is not None:
                    capped = scaled / scores.softcap
                    ds *= 1.0 - capped * capped
                acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=INPUT_PRECISION)

    inside = local_row < seq.rows - start_m
    if dq.ptr is not None:
        # Full tiles are not masked, and dead rows get no gradient.
        acc = tl.where((row < seq.live_rows)[:, None], acc * scores.scale, 0.0)
        dim = tl.arange(0, BLOCK_D)
        pointers = head_base(dq, index, head, seq.begin_q + start_m)
        pointers += row_offsets(local_row, dq.stride_row, WIDE)[:, None]
        pointers += row_offsets(dim, dq.stride_dim, WIDE)[None, :]
        keep = inside[:, None] & (dim < HEAD_DIM)[None, :]
        tl.store(pointers, acc.to(dq.ptr.dtype.element_ty), mask=keep)
    if row_sums.ptr is not None:
        pointers = head_base(row_sums, index, head, start_m) + local_row * row_sums.stride_row
        tl.store(pointers, row_sum, mask=inside)
    if by_distance is not None:
        # The diagonals that no further tile continues.
        next_n = tl.cdiv(last, BLOCK_N) * BLOCK_N
        rest = next_n - BLOCK_N + tl.arange(0, BLOCK_N) - (start_m + seq.offset)
        rest = tl.where(begin < last, rest, -relative.radius)
        store_diagonals(distance_base, relative.radius, rest, upper)
        tl.store(distance_base, tl.sum(before, 0))
        tl.store(distance_base + 2 * relative.radius, tl.sum(after, 0))


def launch_backward_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    softmax_stats: torch.Tensor,
    delta: torch.Tensor,
    modifiers: Modifiers,
    *,
    dq: torch.Tensor | None = None,
    dbias: torch.Tensor | None = None,
    row_sums: torch.Tensor | None = None,
    by_distance: torch.Tensor | None = None,
    input_precision: str,
    config: TileConfig,
) -> None:
    """Writes dQ and sums of the scores' gradient, each where it is given.

    `dbias` (batch, head, row, column) gets the gradient of the scores themselves, where a tile is
    visited. `row_sums` (batch, head, row) its sums over keys, `by_distance` (batch, head, blocks of
    rows, 2 * radius + 1), zero before, its sums over equal distances.
    """
    if by_distance is not None and config.block_m > config.block_n:
        raise ValueError(f"a gradient by distance needs block_m <= block_n, got {config}")
    packed = modifiers.cu_seqlens_q is not None
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    shape = problem_shape(q, k, modifiers)
    num_sequences = modifiers.cu_seqlens_q.numel() - 1 if packed else q.shape[0]
    num_programs = triton.cdiv(shape.seqlen_q, config.block_m) * shape.num_heads * num_sequences
    if num_programs == 0:
        return
    _attention_backward_rows_kernel[(num_programs,)](
        rows(q),
        rows(k),
        rows(v),
        rows(dout),
        *softmax_rows(softmax_stats),
        row_scalars(delta),
        rows(dq),
        plane(dbias),
        row_scalars(row_sums),
        by_distance,
        shape,
        masks(modifiers),
        scores(modifiers),
        dropout(modifiers),
        *terms(modifiers),
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=padded_dim(head_dim),
        BLOCK_DV=padded_dim(head_dim_v),
        LAZY_SCALE=modifiers.lazy_scale,
        WIDE=needs_wide_offsets(
            q, k, v, dout, dq, rows_per_tile=max(config.block_m, config.block_n)
        ),
        INPUT_PRECISION=input_precision,
        **config.launch_options,
    )
