"""flash_attn's attention functions. See the package for what differs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import decoding, functional
from fastattn.biases import Bias
from fastattn.dropout import Dropout
from fastattn.integrations.flash_attn.arguments import (
    alibi,
    check_dims,
    longest,
    softcap_of,
    window_mask,
    window_sides,
)
from fastattn.integrations.flash_attn.kvcache import flash_attn_with_kvcache
from fastattn.integrations.impl_choice import chosen_impl
from fastattn.masks import Mask, Packed
from fastattn.validation import check_tensor, describe, values_readable

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention with grouped heads, causal masks and windows aligned at the bottom right.

    Query i stands at key position i + seqlen_k - seqlen_q.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), any strides.
        k: (batch, seqlen_k, num_heads_kv, head_dim); num_heads_kv divides num_heads.
        v: (batch, seqlen_k, num_heads_kv, head_dim_v).
        dropout_p: probability with which weights are dropped.
        softmax_scale: factor on q @ k.T; default head_dim ** -0.5.
        causal: a query sees keys up to its own position.
        window_size: (left, right), how many keys before and after its position a query sees as
            well; -1 is no limit. With `causal`, right is 0.
        softcap: above 0, scores become softcap * tanh(scores / softcap).
        alibi_slopes: (num_heads,) or (batch, num_heads): -slope * distance is added to the scores.
        deterministic: changes nothing, the gradients are the same in each run.
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim_v). With `return_attn_probs`, also softmax_lse,
        float32 (batch, num_heads, seqlen_q), and S_dmask (see the package).

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        NotImplementedError: `use_impl` names an implementation that cannot serve the call.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_dims(name, tensor, "batch", "seqlen", "num_heads", "head_dim")
    mask = window_mask(*window_sides(causal, window_size))
    bias = alibi(alibi_slopes, q.shape[0], q.shape[2])
    return _attend(q, k, v, mask, bias, dropout_p, softmax_scale, softcap, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of qkv (batch, seqlen, 3, num_heads, head_dim)."""
    check_dims("qkv", qkv, "batch", "seqlen", "3", "num_heads", "head_dim")
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of q and of kv (batch, seqlen_k, 2, num_heads_kv, head_dim)."""
    check_dims("kv", kv, "batch", "seqlen", "2", "num_heads", "head_dim")
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention within each of several sequences laid end to end.

    Args:
        q: (total_q, num_heads, head_dim).
        k: (total_k, num_heads_kv, head_dim); with `block_table` (num_blocks, block_size,
            num_heads_kv, head_dim).
        v: likewise, with head_dim_v.
        cu_seqlens_q: int32 (batch + 1,): 0, then where each sequence of queries ends.
        cu_seqlens_k: the same for keys.
        max_seqlen_q, max_seqlen_k: the longest sequences.
        block_table: int32 (batch, max_blocks): token j of sequence b lies in block
            `block_table[b, j // block_size]`. With one query a sequence and no gradient, keys are
            read where they lie; otherwise they are gathered first, which waits for the device and
            takes the memory of the keys in use.
        The rest is as for `flash_attn_func`; `alibi_slopes` may be (batch, num_heads).

    Returns:
        out (total_q, num_heads, head_dim_v). With `return_attn_probs`, also softmax_lse, float32
        (num_heads, total_q), and S_dmask (batch, num_heads, max_seqlen_q, max_seqlen_k).

    Raises:
        TypeError, ValueError, NotImplementedError: as `flash_attn_func`.
    """
    check_dims("q", q, "total_q", "num_heads", "head_dim")
    longest_q = longest("max_seqlen_q", max_seqlen_q)
    longest_k = longest("max_seqlen_k", max_seqlen_k)
    check_tensor("cu_seqlens_q", cu_seqlens_q)
    check_tensor("cu_seqlens_k", cu_seqlens_k)
    window = window_mask(*window_sides(causal, window_size))
    bias = alibi(alibi_slopes, max(cu_seqlens_q.numel() - 1, 0), q.shape[1])
    if block_table is not None:
        _check_pages(k, v, cu_seqlens_k, block_table)
        tensors = (q, k, v)
        differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        one_each = longest_q == 1 and q.shape[0] == cu_seqlens_q.numel() - 1
        if one_each and not differentiated and dropout_p == 0.0:
            return _decode(
                q, k, v, cu_seqlens_k, block_table, window, bias, softmax_scale, softcap,
                return_attn_probs,
            )  # fmt: skip
        k, v = _gather_pages(k, v, cu_seqlens_k, block_table)
    for name, tensor in (("k", k), ("v", v)):
        check_dims(name, tensor, "total_k", "num_heads", "head_dim")
    mask: Mask = Packed(cu_seqlens_q, cu_seqlens_k, longest_q, longest_k)  # type: ignore[arg-type]
    mask = mask if window is None else mask & window
    return _attend(q, k, v, mask, bias, dropout_p, softmax_scale, softcap, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of qkv (total, 3, num_heads, head_dim)."""
    check_dims("qkv", qkv, "total", "3", "num_heads", "head_dim")
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of q and of kv (total_k, 2, num_heads_kv, head_dim)."""
    check_dims("kv", kv, "total_k", "2", "num_heads", "head_dim")
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    bias: Bias | None,
    dropout_p: float,
    softmax_scale: float | None,
    softcap: float,
    return_attn_probs: bool,
) -> Result:
    options: dict[str, Any] = {
        "mask": mask,
        "bias": bias,
        "softmax_scale": softmax_scale,
        "softcap": softcap_of(softcap),
    }
    impl = chosen_impl()
    if not return_attn_probs:
        out = functional.attention(q, k, v, dropout_p=dropout_p, impl=impl, **options)
        assert isinstance(out, Tensor)
        return out
    seed = Dropout(dropout_p).drawn(q.device).seed if dropout_p else None
    out, lse = functional.attention(
        q, k, v, dropout_p=dropout_p, dropout_seed=seed, return_lse=True, impl=impl, **options
    )
    if not dropout_p:
        return out, lse, q.new_empty(0)
    with torch.no_grad():
        weights = functional.attention_weights(q, k, lse.detach(), impl=impl, **options)
        keep = Dropout(dropout_p, seed).keep(*weights.shape)
    return out, lse, torch.where(keep, weights, -weights)


def _check_pages(k: Tensor, v: Tensor, cu_seqlens_k: Tensor, block_table: Tensor) -> None:
    for name, tensor in (("k", k), ("v", v)):
        check_dims(name, tensor, "num_blocks", "block_size", "num_heads", "head_dim")
    check_dims("block_table", block_table, "batch", "max_blocks")
    if block_table.shape[0] != cu_seqlens_k.numel() - 1:
        raise ValueError(
            f"block_table must have a row for each of the {cu_seqlens_k.numel() - 1} sequences of "
            f"cu_seqlens_k, got {describe(block_table)}"
        )
    if block_table.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"block_table must be int32 or int64, got {describe(block_table)}")


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor,
    block_table: Tensor,
    mask: Mask | None,
    bias: Bias | None,
    softmax_scale: float | None,
    softcap: float,
    return_attn_probs: bool,
) -> Result:
    """One query a sequence, with its keys in pages: read where they lie."""
    with torch.no_grad():
        result = decoding.attention_with_kv_cache(
            q[:, None], k, v, cache_seqlens=cu_seqlens_k.diff(), block_table=block_table,
            mask=mask, bias=bias, softmax_scale=softmax_scale, softcap=softcap_of(softcap),
            return_lse=return_attn_probs, impl=chosen_impl(),
        )  # fmt: skip
    if isinstance(result, Tensor):
        return result[:, 0]
    out, lse = result
    return out[:, 0], lse[..., 0].t(), q.new_empty(0)


def _gather_pages(
    k: Tensor, v: Tensor, cu_seqlens_k: Tensor, block_table: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values in pages, laid end to end."""
    block_size = k.shape[1]
    lengths = cu_seqlens_k.diff().to(torch.int64)
    total = int(cu_seqlens_k[-1])
    capacity = block_table.shape[1] * block_size
    if values_readable(lengths) and lengths.numel() and int(lengths.max()) > capacity:
        raise ValueError(
            f"block_table must have blocks for the longest sequence, {int(lengths.max())} tokens, "
            f"got {describe(block_table)} with blocks of {block_size}"
        )
    sequence = torch.repeat_interleave(lengths, output_size=total)
    position = torch.arange(total, device=k.device) - cu_seqlens_k[sequence]
    block = block_table[sequence, position // block_size].to(torch.int64)
    row = block * block_size + position % block_size
    return k.flatten(0, 1).index_select(0, row), v.flatten(0, 1).index_select(0, row)
