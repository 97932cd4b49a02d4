"""Attention backward, by keys: dK and dV, and the gradient of a bias that is one for all rows.

One program owns BLOCK_N keys of one key head and walks over the tiles of query rows that see them,
head by head of its group. Scores are computed transposed, keys x rows, so that both products of the
walk take them as they are. Nothing is added up outside of a program: two runs give the same bits.
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels.attention.config import TileConfig, padded_dim
from fastattn.kernels.attention.operands import (
    Modifiers,
    dropout,
    masks,
    needs_wide_offsets,
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
    kept_weights,
    load_rows,
    load_sequence,
    load_tile,
    rebuilt_weights,
    row_offsets,
    row_ranges,
    scale_scores,
    sees_one_key,
    visible_rows,
)


@triton.jit
def store_gradient(
    operand, index, head, begin_row, local_row, num_rows, acc, HEAD_DIM: tl.constexpr, WIDE
):
    """Writes the accumulator of a tile of rows in the operand's dtype."""
    dim = tl.arange(0, acc.shape[1])
    pointers = head_base(operand, index, head, begin_row)
    pointers += row_offsets(local_row, operand.stride_row, WIDE)[:, None]
    pointers += row_offsets(dim, operand.stride_dim, WIDE)[None, :]
    keep = (local_row < num_rows)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(pointers, acc.to(operand.ptr.dtype.element_ty), mask=keep)


@triton.jit
def _attention_backward_keys_kernel(
    q,
    k,
    v,
    dout,
    shift,
    log_total,
    delta,
    dk,
    dv,
    col_sums,
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
    num_blocks_n = tl.cdiv(shape.seqlen_k, BLOCK_N)
    num_key_heads = shape.num_heads // shape.group_size
    program = tl.program_id(0)
    # Under a causal mask the first keys are seen by most rows: they start first.
    start_n = program % num_blocks_n * BLOCK_N
    key_head = (program // num_blocks_n) % num_key_heads
    index = program // num_blocks_n // num_key_heads
    seq = load_sequence(shape, masks, index)
    num_keys = seq.rows + seq.offset
    if start_n >= num_keys:
        return

    local_col = tl.arange(0, BLOCK_N)
    local_row = tl.arange(0, BLOCK_M)
    col = start_n + local_col
    begin_n = seq.begin_k + start_n
    present = seq.end_key - start_n
    k_base = head_base(k, index, key_head, begin_n)
    k_tile = load_tile(k, k_base, local_col, present, HEAD_DIM, BLOCK_D, CHECK_ROWS=True, WIDE=WIDE)
    v_base = head_base(v, index, key_head, begin_n)
    v_tile = load_tile(
        v, v_base, local_col, present, HEAD_DIM_V, BLOCK_DV, CHECK_ROWS=True, WIDE=WIDE
    )
    terms = Terms(mask, bias, alibi, relative)
    PRECISE: tl.constexpr = q.ptr.dtype.element_ty == tl.float32
    SUBTRACT_FIRST: tl.constexpr = PRECISE or (bias.ptr is not None)
    NEEDS_DS: tl.constexpr = (dk.ptr is not None) or (col_sums.ptr is not None)
    exponent_scale = scores.scale * LOG2E if LAZY_SCALE else LOG2E
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    first, end = visible_rows(col, seq, masks)
    begin, full_begin, full_end, last = row_ranges(start_n, seq, masks, BLOCK_M, BLOCK_N)
    CUT_ABOVE: tl.constexpr = (masks.window_right is not None) or (masks.prefix is not None)
    CUT_BELOW: tl.constexpr = (masks.window_left is not None) or (masks.starts_k is not None)
    only_key = seq.end_key - seq.first_key == 1
    for head in range(key_head * shape.group_size, (key_head + 1) * shape.group_size):
        q_base = head_base(q, index, head, seq.begin_q)
        dout_base = head_base(dout, index, head, seq.begin_q)
        col_sum = tl.zeros([BLOCK_N], tl.float32)
        for stretch in tl.static_range(0 if CUT_ABOVE else 1, 3 if CUT_BELOW else 2):
            # The middle stretch needs no positional mask. Where no mask cuts below, it goes on to
            # the last row, with bounds to check, which saves the registers of a third loop.
            if stretch == 0:
                low, high = begin, tl.minimum(full_begin, last)
            elif stretch == 1:
                low, high = full_begin, full_end if CUT_BELOW else last
            else:
                low, high = full_end, last
            for start_m in tl.range(low, high, BLOCK_M):
                row = start_m + local_row
                live = seq.live_rows - start_m
                begin_m = seq.begin_q + start_m
                CUT: tl.constexpr = stretch != 1
                CHECK: tl.constexpr = CUT or not CUT_BELOW
                q_tile = load_tile(
                    q,
                    q_base + tl.cast(start_m, tl.int64) * q.stride_row,
                    local_row,
                    live,
                    HEAD_DIM,
                    BLOCK_D,
                    CHECK_ROWS=CHECK,
                    WIDE=WIDE,
                )
                row_shift = load_rows(
                    shift, index, head, begin_m, local_row, live, float("inf"), CHECK
                )
                row_log_total = load_rows(
                    log_total, index, head, begin_m, local_row, live, 0.0, CHECK
                )
                products = tl.dot(k_tile, q_tile.T, input_precision=INPUT_PRECISION)
                scaled = scale_scores(products, scores, LAZY_SCALE, PRECISE)
                s = add_terms(
                    scaled,
                    terms,
                    seq,
                    head,
                    start_m,
                    start_n,
                    row[None, :],
                    col[:, None],
                    BLOCK_M,
                    BLOCK_N,
                )
                if CUT:
                    s = cut_scores(s, row[None, :], first[:, None], end[:, None])
                p = rebuilt_weights(
                    s, row_shift[None, :], row_log_total[None, :], exponent_scale, SUBTRACT_FIRST
                )
                dout_tile = load_tile(
                    dout,
                    dout_base + tl.cast(start_m, tl.int64) * dout.stride_row,
                    local_row,
                    live,
                    HEAD_DIM_V,
                    BLOCK_DV,
                    CHECK_ROWS=CHECK,
                    WIDE=WIDE,
                )
                kept = p
                if dropout.seed is not None:
                    keep = kept_weights(dropout, index, head, row, start_n, BLOCK_M, BLOCK_N)
                    keep = tl.trans(keep.to(tl.int8)) != 0
                    kept = tl.where(keep, p, 0.0)
                if dv.ptr is not None:
                    dv_acc = tl.dot(
                        kept.to(dout_tile.dtype),
                        dout_tile,
                        dv_acc,
                        input_precision=INPUT_PRECISION,
                    )
                if NEEDS_DS:
                    row_delta = load_rows(delta, index, head, begin_m, local_row, live, 0.0, CHECK)
                    dp = tl.dot(v_tile, dout_tile.T, input_precision=INPUT_PRECISION)
                    if dropout.seed is not None:
                        dp = tl.where(keep, dp * dropout.growth, 0.0)
                    if scores.sinks is None:
                        if CUT:
                            dp = tl.where(sees_one_key(row, seq, masks)[None, :], 0.0, dp)
                        else:
                            dp = tl.where(only_key, 0.0, dp)
                    ds = p * (dp - row_delta[None, :])
                    if col_sums.ptr is not None:
                        col_sum += tl.sum(ds, 1)
                    if dk.ptr is not None:
                        if scores.softcap is not None:
                            capped = scaled / scores.softcap
                            ds *= 1.0 - capped * capped
                        dk_acc = tl.dot(
                            ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=INPUT_PRECISION
                        )
        if col_sums.ptr is not None:
            visible = (col >= seq.first_key) & (col < seq.end_key)
            pointers = head_base(col_sums, index, head, start_n) + local_col * col_sums.stride_row
            tl.store(pointers, tl.where(visible, col_sum, 0.0), mask=local_col < num_keys - start_n)

    # Full tiles are not masked, and keys that nobody sees get no gradient.
    seen = ((col >= seq.first_key) & (col < seq.end_key))[:, None]
    inside = num_keys - start_n
    if dk.ptr is not None:
        dk_acc = tl.where(seen, dk_acc * scores.scale, 0.0)
        store_gradient(dk, index, key_head, begin_n, local_col, inside, dk_acc, HEAD_DIM, WIDE)
    if dv.ptr is not None:
        if dropout.seed is not None:
            dv_acc *= dropout.growth
        dv_acc = tl.where(seen, dv_acc, 0.0)
        store_gradient(dv, index, key_head, begin_n, local_col, inside, dv_acc, HEAD_DIM_V, WIDE)


def launch_backward_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    softmax_stats: torch.Tensor,
    delta: torch.Tensor | None,
    modifiers: Modifiers,
    *,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    col_sums: torch.Tensor | None = None,
    input_precision: str,
    config: TileConfig,
) -> None:
    """Writes dK, dV, and `col_sums` (batch, head, key) of the scores' gradient, where given.

    `delta` may be missing if dV is all that is asked for.
    """
    packed = modifiers.cu_seqlens_q is not None
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    shape = problem_shape(q, k, modifiers)
    num_sequences = modifiers.cu_seqlens_q.numel() - 1 if packed else q.shape[0]
    num_programs = triton.cdiv(shape.seqlen_k, config.block_n) * k.shape[-2] * num_sequences
    if num_programs == 0:
        return
    rows_per_tile = max(config.block_m, config.block_n)
    _attention_backward_keys_kernel[(num_programs,)](
        rows(q),
        rows(k),
        rows(v),
        rows(dout),
        *softmax_rows(softmax_stats),
        row_scalars(delta),
        rows(dk),
        rows(dv),
        row_scalars(col_sums),
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
        WIDE=needs_wide_offsets(q, k, v, dout, dk, dv, rows_per_tile=rows_per_tile),
        INPUT_PRECISION=input_precision,
        **config.launch_options,
    )
