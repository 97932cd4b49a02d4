"""Attention forward: one kernel for every mask, bias and layout.

One program computes BLOCK_M query rows of one head, walking over the tiles of keys those rows may
see with an online softmax (Milakov and Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691). The
walk has three stretches, cut tiles, full tiles, cut tiles, and one body: only the cut ones pay for
a positional mask and for bounds checks.
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels.attention.config import (
    TileConfig,
    chip_of,
    padded_dim,
    select_forward_config,
)
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
    LN2,
    LOG2E,
    Terms,
    add_terms,
    cut_scores,
    head_base,
    kept_weights,
    key_ranges,
    load_sequence,
    load_tile,
    row_offsets,
    scale_scores,
    softmax_step,
    visible_keys,
)


@triton.jit
def _attention_forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    saved_shift,
    saved_log_total,
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

    row = start_m + tl.arange(0, BLOCK_M)
    key_head = head // shape.group_size
    q_base = head_base(q, index, head, seq.begin_q + start_m)
    k_base = head_base(k, index, key_head, seq.begin_k)
    v_base = head_base(v, index, key_head, seq.begin_k)
    local_row = tl.arange(0, BLOCK_M)
    live = seq.live_rows - start_m
    q_tile = load_tile(q, q_base, local_row, live, HEAD_DIM, BLOCK_D, CHECK_ROWS=True, WIDE=WIDE)
    terms = Terms(mask, bias, alibi, relative)
    PRECISE: tl.constexpr = q.ptr.dtype.element_ty == tl.float32
    # A bias may be the lowest float of its dtype, which the scale would turn into -inf.
    SUBTRACT_FIRST: tl.constexpr = PRECISE or (bias.ptr is not None)
    MAY_BE_EMPTY: tl.constexpr = (
        mask.ptr is not None or bias.ptr is not None or relative.ptr is not None
    )

    if scores.sinks is None:
        initial_maximum = float("-inf")
        initial_total = 0.0
    else:
        # A sink is a key without a value: it takes part in the sum from the start.
        initial_maximum = tl.load(scores.sinks + head).to(tl.float32)
        initial_total = 1.0
    maximum = tl.zeros([BLOCK_M], tl.float32) + initial_maximum
    total = tl.zeros([BLOCK_M], tl.float32) + initial_total
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    exponent_scale = scores.scale * LOG2E if LAZY_SCALE else LOG2E

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
            col = start_n + tl.arange(0, BLOCK_N)
            local_col = tl.arange(0, BLOCK_N)
            k_tile = load_tile(
                k,
                k_base + tl.cast(start_n, tl.int64) * k.stride_row,
                local_col,
                seq.end_key - start_n,
                HEAD_DIM,
                BLOCK_D,
                CHECK_ROWS=stretch != 1,
                WIDE=WIDE,
            )
            products = tl.dot(q_tile, k_tile.T, input_precision=INPUT_PRECISION)
            s = scale_scores(products, scores, LAZY_SCALE, PRECISE)
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
            if stretch != 1:
                s = cut_scores(s, col[None, :], first[:, None], end[:, None])
            p, new_maximum, decay = softmax_step(
                s, maximum, exponent_scale, SUBTRACT_FIRST, stretch != 1 or MAY_BE_EMPTY
            )
            total = total * decay + tl.sum(p, 1)
            if dropout.seed is not None:
                keep = kept_weights(dropout, index, head, row, start_n, BLOCK_M, BLOCK_N)
                p = tl.where(keep, p, 0.0)
            acc = acc * decay[:, None]
            v_tile = load_tile(
                v,
                v_base + tl.cast(start_n, tl.int64) * v.stride_row,
                local_col,
                seq.end_key - start_n,
                HEAD_DIM_V,
                BLOCK_DV,
                CHECK_ROWS=stretch != 1,
                WIDE=WIDE,
            )
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=INPUT_PRECISION)
            maximum = new_maximum

    # Full tiles are not masked, so dead rows hold garbage until here.
    dead = row >= seq.live_rows
    maximum = tl.where(dead, initial_maximum, maximum)
    total = tl.where(dead, initial_total, total)
    # A row without any key gives 0 and -inf, not NaN.
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = tl.where((dead | empty)[:, None], 0.0, acc / total[:, None])
    if dropout.seed is not None:
        acc *= dropout.growth
    inside = local_row < seq.rows - start_m
    dim = tl.arange(0, BLOCK_DV)
    pointers = head_base(out, index, head, seq.begin_q + start_m)
    pointers += row_offsets(local_row, out.stride_row, WIDE)[:, None]
    pointers += row_offsets(dim, out.stride_dim, WIDE)[None, :]
    keep = inside[:, None] & (dim < HEAD_DIM_V)[None, :]
    tl.store(pointers, acc.to(out.ptr.dtype.element_ty), mask=keep)
    if lse.ptr is not None:
        natural = maximum * scores.scale if LAZY_SCALE else maximum
        value = tl.where(empty, float("-inf"), natural + tl.log2(total) * LN2)
        pointers = head_base(lse, index, head, seq.begin_q + start_m) + local_row * lse.stride_row
        tl.store(pointers, value, mask=inside)
    if saved_shift.ptr is not None:
        # For the backward pass, where an infinite shift makes the weights of these rows 0.
        value = tl.where(dead | empty, float("inf"), maximum)
        pointers = head_base(saved_shift, index, head, seq.begin_q + start_m)
        tl.store(pointers + local_row * saved_shift.stride_row, value, mask=inside)
        pointers = head_base(saved_log_total, index, head, seq.begin_q + start_m)
        tl.store(pointers + local_row * saved_log_total.stride_row, tl.log2(total), mask=inside)


def launch_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    modifiers: Modifiers,
    *,
    softmax_stats: torch.Tensor | None = None,
    input_precision: str = "ieee",
    config: TileConfig | None = None,
) -> None:
    """Writes attention of q over k and v into `out`, the log-sum-exp into `lse` if given.

    q is (batch, seqlen_q, num_heads, head_dim), k and v are (batch, seqlen_k, num_heads_kv, ...),
    any strides; packed operands have no batch axis. `lse` is float32 (batch, num_heads, seqlen_q),
    packed (num_heads, total_q). `softmax_stats`, float32 (2, *shape of lse), gets what the backward
    pass rebuilds the weights from: the largest score, in the kernel's own units, and log2 of the
    sum. (Where all scores of a row are huge, their log-sum-exp alone would lose that sum.)
    Arguments are taken as valid: the callers check them.
    """
    packed = modifiers.cu_seqlens_q is not None
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    shape = problem_shape(q, k, modifiers)
    num_sequences = modifiers.cu_seqlens_q.numel() - 1 if packed else q.shape[0]
    if config is None:
        config = select_forward_config(
            chip_of(q.device),
            max(head_dim, head_dim_v),
            q.dtype,
            shape.seqlen_q,
            modifiers.num_modifiers,
            modifiers.window_right >= 0,
        )
    num_programs = triton.cdiv(shape.seqlen_q, config.block_m) * shape.num_heads * num_sequences
    if num_programs == 0:
        return
    _attention_forward_kernel[(num_programs,)](
        rows(q),
        rows(k),
        rows(v),
        rows(out),
        row_scalars(lse),
        *softmax_rows(softmax_stats),
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
        WIDE=needs_wide_offsets(q, k, v, out, rows_per_tile=max(config.block_m, config.block_n)),
        INPUT_PRECISION=input_precision,
        **config.launch_options,
    )
