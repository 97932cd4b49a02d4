"""Attention weights on demand: exact weights of chosen heads and rows, from the saved log-sum-exp.

The forward pass never holds the weights. This kernel writes just those that are asked for, or their
mean over heads without the per-head ones, at the cost of one product per tile and head.
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels.attention.config import (
    INTERPRETER_WEIGHTS_CONFIG,
    WeightsConfig,
    chip_of,
    padded_dim,
    select_weights_config,
)
from fastattn.kernels.attention.operands import (
    Modifiers,
    masks,
    needs_wide_offsets,
    problem_shape,
    row_scalars,
    rows,
    scores,
    terms,
    vector,
)
from fastattn.kernels.attention.tile import (
    LOG2E,
    Plane,
    Terms,
    add_terms,
    cut_scores,
    exponential,
    head_base,
    load_int,
    load_sequence,
    load_tile,
    scale_scores,
    visible_keys,
)


@triton.jit
def _attention_weights_kernel(
    q,
    k,
    lse,
    weights,
    chosen_heads,
    chosen_rows,
    num_chosen_heads,
    num_chosen_rows,
    shape,
    masks,
    scores,
    mask,
    bias,
    alibi,
    relative,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AVERAGE: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    num_blocks_n = tl.cdiv(shape.seqlen_k, BLOCK_N)
    num_blocks_m = tl.cdiv(num_chosen_rows, BLOCK_M)
    program = tl.program_id(0)
    start_n = program % num_blocks_n * BLOCK_N
    program = program // num_blocks_n
    start_m = program % num_blocks_m * BLOCK_M
    program = program // num_blocks_m
    # One program sums over all chosen heads for their mean, or else serves one of them.
    if AVERAGE:
        index = program
        first_head = 0
        num_heads = num_chosen_heads
    else:
        index = program // num_chosen_heads
        first_head = program % num_chosen_heads
        num_heads = 1
    seq = load_sequence(shape, masks, index)
    terms = Terms(mask, bias, alibi, relative)
    PRECISE: tl.constexpr = q.ptr.dtype.element_ty == tl.float32

    slot = start_m + tl.arange(0, BLOCK_M)
    if chosen_rows is None:
        row = slot
    else:
        row = tl.load(chosen_rows + slot, mask=slot < num_chosen_rows, other=0).to(tl.int32)
    col = start_n + tl.arange(0, BLOCK_N)
    local_col = tl.arange(0, BLOCK_N)
    live = (slot < num_chosen_rows) & (row < seq.live_rows)
    safe_row = tl.where(live, row, 0)
    first, end = visible_keys(row, seq, masks)
    end = tl.where(live, end, 0)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for number in range(first_head, first_head + num_heads):
        head = number
        if chosen_heads is not None:
            head = load_int(chosen_heads, number)
        key_head = head // shape.group_size
        # Chosen rows may be far apart: their offsets are 64 bit whatever the strides.
        q_tile = load_tile(
            q,
            head_base(q, index, head, seq.begin_q),
            tl.where(live, row, seq.rows),
            seq.rows,
            HEAD_DIM,
            BLOCK_D,
            CHECK_ROWS=True,
            WIDE=True,
        )
        k_tile = load_tile(
            k,
            head_base(k, index, key_head, seq.begin_k + start_n),
            local_col,
            seq.end_key - start_n,
            HEAD_DIM,
            BLOCK_D,
            CHECK_ROWS=True,
            WIDE=WIDE,
        )
        products = tl.dot(q_tile, k_tile.T, input_precision=INPUT_PRECISION)
        # Rows are in no order here, so that no tile counts as far away: start_m is not known.
        s = scale_scores(products, scores, False, PRECISE)
        s = add_terms(
            s,
            terms,
            seq,
            head,
            None,
            start_n,
            safe_row[:, None],
            col[None, :],
            BLOCK_M,
            BLOCK_N,
        )
        s = cut_scores(s, col[None, :], first[:, None], end[:, None])
        lse_base = head_base(lse, index, head, seq.begin_q)
        row_lse = tl.load(lse_base + safe_row.to(tl.int64) * lse.stride_row, mask=live, other=0.0)
        # A row without keys has lse -inf; its scores are all -inf and give 0.
        row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)
        total += exponential(s, row_lse[:, None], LOG2E, PRECISE or (bias.ptr is not None))

    pointers = weights.ptr + tl.cast(index, tl.int64) * weights.stride_batch
    if AVERAGE:
        total = total / num_chosen_heads
    else:
        pointers += tl.cast(first_head, tl.int64) * weights.stride_head
    pointers += slot.to(tl.int64)[:, None] * weights.stride_row
    pointers += col.to(tl.int64)[None, :] * weights.stride_col
    keep = (slot < num_chosen_rows)[:, None] & (col < shape.seqlen_k)[None, :]
    tl.store(pointers, total.to(weights.ptr.dtype.element_ty), mask=keep)


def launch_attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    weights: torch.Tensor,
    modifiers: Modifiers,
    *,
    heads: torch.Tensor | None = None,
    chosen_rows: torch.Tensor | None = None,
    average: bool = False,
    input_precision: str = "ieee",
    config: WeightsConfig | None = None,
) -> None:
    """Writes weights of the chosen heads and rows (all where None) into `weights`.

    `weights` is (batch, heads, rows, keys), with one head where they are averaged. `lse` is what
    the forward kernel saved. Arguments are taken as valid: the callers check them.
    """
    shape = problem_shape(q, k, modifiers)
    num_heads = shape.num_heads if heads is None else heads.numel()
    num_rows = weights.shape[2]
    if config is None:
        config = select_weights_config(q.shape[-1], q.dtype)
        if chip_of(q.device) == "interpreter":
            config = INTERPRETER_WEIGHTS_CONFIG
    num_blocks = triton.cdiv(num_rows, config.block_m) * triton.cdiv(
        weights.shape[3], config.block_n
    )
    num_programs = num_blocks * weights.shape[0] * weights.shape[1]
    if num_programs == 0:
        return
    _attention_weights_kernel[(num_programs,)](
        rows(q),
        rows(k),
        row_scalars(lse),
        Plane(weights, *weights.stride()),
        vector(heads),
        vector(chosen_rows),
        num_heads,
        num_rows,
        shape,
        masks(modifiers),
        scores(modifiers),
        *terms(modifiers),
        HEAD_DIM=q.shape[-1],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=padded_dim(q.shape[-1]),
        AVERAGE=average,
        WIDE=needs_wide_offsets(k, rows_per_tile=config.block_n),
        INPUT_PRECISION=input_precision,
        num_warps=config.num_warps,
        num_stages=1,
    )
