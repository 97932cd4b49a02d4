"""Joining attention over parts of the keys: splits of one decoding step, or any two results.

With lse_i the log-sum-exp of part i, out = sum_i exp(lse_i - lse) out_i and lse = log sum_i
exp(lse_i): the online softmax over parts instead of tiles (Dao et al., "Flash-Decoding for
long-context inference", 2023). Parts are added in their own order, always the same.
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels.attention.config import padded_dim
from fastattn.kernels.attention.decode_config import DecodeConfig
from fastattn.kernels.attention.operands import row_scalars, rows
from fastattn.kernels.attention.tile import LN2, LOG2E, head_base


@triton.jit
def combine_row(
    parts,
    lse_parts,
    out,
    lse,
    index,
    row,
    head,
    num_sequences,
    num_splits,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One query row of one head from its splits. A part with lse -inf holds nothing, and is not
    read."""
    dim = tl.arange(0, BLOCK_DV)
    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for start in range(0, num_splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        part = (split * num_sequences + index).to(tl.int64)
        pointers = head_base(lse_parts, 0, head, row) + part * lse_parts.stride_batch
        # Another program may just have written them: not from this multiprocessor's own cache.
        part_lse = tl.load(
            pointers, mask=split < num_splits, other=float("-inf"), cache_modifier=".cg"
        )
        new_maximum = tl.maximum(maximum, tl.max(part_lse, 0))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2((part_lse - shift) * LOG2E)
        decay = tl.exp2((maximum - shift) * LOG2E)
        live = part_lse > float("-inf")
        pointers = head_base(parts, 0, head, row) + part * parts.stride_batch
        tile = tl.load(
            pointers[:, None] + dim[None, :] * parts.stride_dim,
            mask=live[:, None] & (dim < HEAD_DIM_V)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        acc = acc * decay + tl.sum(tile * weights[:, None], 0)
        total = total * decay + tl.sum(weights, 0)
        maximum = new_maximum
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)
    pointers = head_base(out, index, head, row) + dim * out.stride_dim
    tl.store(pointers, acc.to(out.ptr.dtype.element_ty), mask=dim < HEAD_DIM_V)
    if lse.ptr is not None:
        value = tl.where(empty, float("-inf"), maximum + tl.log2(total) * LN2)
        tl.store(head_base(lse, index, head, row) + tl.arange(0, 1), value)


@triton.jit(do_not_specialize=["seqlen_q", "num_sequences", "num_splits"])
def _combine_splits_kernel(
    parts,
    lse_parts,
    out,
    lse,
    num_heads,
    seqlen_q,
    num_sequences,
    num_splits,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    program = tl.program_id(0)
    combine_row(
        parts,
        lse_parts,
        out,
        lse,
        program // num_heads // seqlen_q,
        program // num_heads % seqlen_q,
        program % num_heads,
        num_sequences,
        num_splits,
        HEAD_DIM_V,
        BLOCK_DV,
        BLOCK_SPLITS,
    )


def launch_combine_splits(
    parts: torch.Tensor,
    lse_parts: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    config: DecodeConfig,
) -> None:
    """Joins the splits of a decoding step: one program a query row and head."""
    batch, seqlen_q, num_heads, head_dim_v = out.shape
    _combine_splits_kernel[(batch * seqlen_q * num_heads,)](
        rows(parts),
        row_scalars(lse_parts),
        rows(out),
        row_scalars(lse),
        num_heads,
        seqlen_q,
        batch,
        config.num_splits,
        HEAD_DIM_V=head_dim_v,
        BLOCK_DV=padded_dim(head_dim_v),
        BLOCK_SPLITS=config.block_splits,
        num_warps=4,
    )


@triton.jit
def _merge_states_kernel(
    out_a,
    lse_a,
    out_b,
    lse_b,
    out,
    lse,
    num_heads,
    seqlen,
    num_rows,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    number = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = number < num_rows
    head = number % num_heads
    row = number // num_heads % seqlen
    index = number // num_heads // seqlen
    first = tl.load(head_base(lse_a, index, head, row), mask=inside, other=float("-inf"))
    second = tl.load(head_base(lse_b, index, head, row), mask=inside, other=float("-inf"))
    maximum = tl.maximum(first, second)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    weight_a = tl.exp2((first - shift) * LOG2E)
    weight_b = tl.exp2((second - shift) * LOG2E)
    total = weight_a + weight_b
    empty = total == 0.0
    safe_total = tl.where(empty, 1.0, total)
    acc = _weighted(out_a, index, head, row, weight_a / safe_total, HEAD_DIM_V, BLOCK_DV)
    acc += _weighted(out_b, index, head, row, weight_b / safe_total, HEAD_DIM_V, BLOCK_DV)
    dim = tl.arange(0, BLOCK_DV)
    pointers = head_base(out, index, head, row)[:, None] + dim[None, :] * out.stride_dim
    keep = inside[:, None] & (dim < HEAD_DIM_V)[None, :]
    tl.store(pointers, acc.to(out.ptr.dtype.element_ty), mask=keep)
    value = tl.where(empty, float("-inf"), shift + tl.log2(safe_total) * LN2)
    tl.store(head_base(lse, index, head, row), value, mask=inside)


@triton.jit
def _weighted(part, index, head, row, weight, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr):
    """A part's rows times their weights. What has no weight is not read: it may be anything."""
    dim = tl.arange(0, BLOCK_DV)
    pointers = head_base(part, index, head, row)[:, None] + dim[None, :] * part.stride_dim
    keep = (weight > 0.0)[:, None] & (dim < HEAD_DIM_V)[None, :]
    return tl.load(pointers, mask=keep, other=0.0).to(tl.float32) * weight[:, None]


def launch_merge_states(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Joins attention over two sets of keys. out* are (batch, seqlen, num_heads, head_dim_v), lse*
    float32 (batch, num_heads, seqlen); packed ones have no batch axis."""
    seqlen, num_heads, head_dim_v = out.shape[-3:]
    num_rows = out.numel() // max(head_dim_v, 1)
    if num_rows == 0:
        return
    block_dv = padded_dim(head_dim_v)
    block_m = max(1, 2048 // block_dv)
    _merge_states_kernel[(triton.cdiv(num_rows, block_m),)](
        rows(out_a),
        row_scalars(lse_a),
        rows(out_b),
        row_scalars(lse_b),
        rows(out),
        row_scalars(lse),
        num_heads,
        seqlen,
        num_rows,
        HEAD_DIM_V=head_dim_v,
        BLOCK_M=block_m,
        BLOCK_DV=block_dv,
        num_warps=4,
    )
