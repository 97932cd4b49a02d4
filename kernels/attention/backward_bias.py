"""Attention backward, by tiles of a dense bias that several sequences or heads share.

One program owns one tile of the bias and adds up, in registers and in a fixed order, what all the
sequences and heads that share it contribute. It rebuilds the scores' gradient for that (two more
products a tile), which takes less traffic than sending partial sums through memory, and never holds
a (batch, head, row, column) tensor. A bias of each sequence's and head's own costs nothing extra:
`backward_rows` stores it.
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
    kept_weights,
    key_ranges,
    load_rows,
    load_sequence,
    load_tile,
    plane_pointers,
    rebuilt_weights,
    scale_scores,
    visible_keys,
)


@triton.jit
def _attention_backward_bias_kernel(
    q,
    k,
    v,
    dout,
    shift,
    log_total,
    delta,
    dbias,
    num_planes,
    num_plane_heads,
    num_sequences,
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
    INPUT_PRECISION: tl.constexpr,
):
    num_blocks_n = tl.cdiv(shape.seqlen_k, BLOCK_N)
    num_blocks_m = tl.cdiv(shape.seqlen_q, BLOCK_M)
    program = tl.program_id(0)
    start_n = program % num_blocks_n * BLOCK_N
    program = program // num_blocks_n
    start_m = program % num_blocks_m * BLOCK_M
    program = program // num_blocks_m
    plane_head = program % num_plane_heads
    plane_index = program // num_plane_heads
    terms = Terms(mask, bias, alibi, relative)
    PRECISE: tl.constexpr = q.ptr.dtype.element_ty == tl.float32

    local_row = tl.arange(0, BLOCK_M)
    local_col = tl.arange(0, BLOCK_N)
    row = start_m + local_row
    col = start_n + local_col
    heads = shape.num_heads // num_plane_heads
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for number in range(heads * (num_sequences // num_planes)):
        index = plane_index + number // heads
        head = plane_head + number % heads
        seq = load_sequence(shape, masks, index)
        begin, _, _, last = key_ranges(start_m, seq, masks, BLOCK_M, BLOCK_N)
        if (start_n >= begin) & (start_n < last):
            live = seq.live_rows - start_m
            present = seq.end_key - start_n
            begin_m = seq.begin_q + start_m
            begin_n = seq.begin_k + start_n
            key_head = head // shape.group_size
            q_base = head_base(q, index, head, begin_m)
            q_tile = load_tile(q, q_base, local_row, live, HEAD_DIM, BLOCK_D, True, WIDE)
            k_base = head_base(k, index, key_head, begin_n)
            k_tile = load_tile(k, k_base, local_col, present, HEAD_DIM, BLOCK_D, True, WIDE)
            products = tl.dot(q_tile, k_tile.T, input_precision=INPUT_PRECISION)
            s = scale_scores(products, scores, False, PRECISE)
            s = add_terms(
                s,
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
            first, end = visible_keys(row, seq, masks)
            end = tl.where(row < seq.live_rows, end, 0)
            s = cut_scores(s, col[None, :], first[:, None], end[:, None])
            row_shift = load_rows(shift, index, head, begin_m, local_row, live, float("inf"), True)
            row_log_total = load_rows(log_total, index, head, begin_m, local_row, live, 0.0, True)
            p = rebuilt_weights(s, row_shift[:, None], row_log_total[:, None], LOG2E, True)
            dout_base = head_base(dout, index, head, begin_m)
            dout_tile = load_tile(
                dout, dout_base, local_row, live, HEAD_DIM_V, BLOCK_DV, True, WIDE
            )
            v_base = head_base(v, index, key_head, begin_n)
            v_tile = load_tile(v, v_base, local_col, present, HEAD_DIM_V, BLOCK_DV, True, WIDE)
            dp = tl.dot(dout_tile, v_tile.T, input_precision=INPUT_PRECISION)
            if dropout.seed is not None:
                keep = kept_weights(dropout, index, head, row, start_n, BLOCK_M, BLOCK_N)
                dp = tl.where(keep, dp * dropout.growth, 0.0)
            row_delta = load_rows(delta, index, head, begin_m, local_row, live, 0.0, True)
            if scores.sinks is None:
                dp = tl.where((end - first == 1)[:, None], 0.0, dp)
            total += p * (dp - row_delta[:, None])

    pointers = plane_pointers(dbias, plane_index, plane_head, row[:, None], col[None, :])
    inside = (row < shape.seqlen_q)[:, None] & (col < shape.seqlen_k)[None, :]
    tl.store(pointers, total.to(dbias.ptr.dtype.element_ty), mask=inside)


def launch_backward_bias(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    softmax_stats: torch.Tensor,
    delta: torch.Tensor,
    modifiers: Modifiers,
    *,
    dbias: torch.Tensor,
    input_precision: str,
    config: TileConfig,
) -> None:
    """Writes `dbias`, (batch or 1, head or 1, row, column): every element of it."""
    packed = modifiers.cu_seqlens_q is not None
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    shape = problem_shape(q, k, modifiers)
    num_sequences = modifiers.cu_seqlens_q.numel() - 1 if packed else q.shape[0]
    num_blocks = triton.cdiv(shape.seqlen_q, config.block_m)
    num_blocks *= triton.cdiv(shape.seqlen_k, config.block_n)
    num_programs = num_blocks * dbias.shape[0] * dbias.shape[1]
    if num_programs == 0:
        return
    rows_per_tile = max(config.block_m, config.block_n)
    _attention_backward_bias_kernel[(num_programs,)](
        rows(q),
        rows(k),
        rows(v),
        rows(dout),
        *softmax_rows(softmax_stats),
        row_scalars(delta),
        plane(dbias),
        dbias.shape[0],
        dbias.shape[1],
        num_sequences,
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
        WIDE=needs_wide_offsets(q, k, v, dout, rows_per_tile=rows_per_tile),
        INPUT_PRECISION=input_precision,
        **config.launch_options,
    )
