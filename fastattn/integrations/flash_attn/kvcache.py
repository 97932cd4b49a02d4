"""flash_attn_with_kvcache: attention on a cache, which new tokens are appended to."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import decoding
from fastattn.integrations.flash_attn.arguments import (
    alibi,
    check_dims,
    softcap_of,
    window_mask,
    window_sides,
)
from fastattn.integrations.impl_choice import chosen_impl
from fastattn.masks import Lengths, Mask
from fastattn.rotary import Rotary
from fastattn.validation import check_integers, check_lengths, describe


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Writes k and v behind each row's tokens in the cache, in place, then attends to all of them.

    Query i of a row stands at position `total - seqlen_q + i` of its total tokens. There is no
    gradient, whether or not a tensor requires one.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim).
        k_cache: (batch_cache, max_seqlen, num_heads_kv, head_dim), or with `block_table`
            (num_blocks, block_size, num_heads_kv, head_dim).
        v_cache: the same, with head_dim_v.
        k, v: (batch, seqlen_new, num_heads_kv, ...), what to append; both or neither.
        rotary_cos, rotary_sin: (max_position, rotary_dim // 2), tables by which q and k are rotated
            first; only together with k and v. k's token j is at position `cache_seqlens + j`, and
            so is q's with `causal` or a window. Without them all of q is at `cache_seqlens`.
        cache_seqlens: int, or int32 (batch,): tokens of each row before the call. None: a full
            cache, which nothing can be appended to.
        cache_batch_idx: int32 (batch,), which row of the cache belongs to each row of q; not
            together with `block_table`. No two the same, where something is appended.
        cache_leftpad: int32 (batch,), where a row's tokens begin in the cache; positions count
            from the start of the cache all the same.
        block_table: int32 (batch, max_blocks), where each row's blocks lie.
        rotary_interleaved: which dimensions are a pair: True is (2 d, 2 d + 1), False is
            (d, d + rotary_dim // 2).
        num_splits: changes nothing, fastattn splits as it sees fit.
        return_softmax_lse: also return the log-sum-exp.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as for `flash_attn_func`.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim_v), and with `return_softmax_lse` float32 (batch,
        num_heads, seqlen_q).

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it, and the
            caches are as they were.
        NotImplementedError: `use_impl` names an implementation that cannot serve the call.
    """
    check_dims("q", q, "batch", "seqlen_q", "num_heads", "head_dim")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_dims(name, cache, "batch", "seqlen", "num_heads", "head_dim")
    if isinstance(num_splits, bool) or not isinstance(num_splits, int) or num_splits < 0:
        raise ValueError(f"num_splits must be an int >= 0, got {num_splits!r}")
    left, right = window_sides(causal, window_size)
    if cache_batch_idx is not None:
        block_table = _rows_as_blocks(cache_batch_idx, block_table, q, k_cache)
    mask = window_mask(left, right)
    if cache_leftpad is not None:
        padding = _left_padding(cache_leftpad, q, k_cache, block_table)
        mask = padding if mask is None else mask & padding
    with torch.no_grad():
        rotary = _rotary(rotary_cos, rotary_sin, rotary_interleaved, k)
        if rotary is not None and k is not None:
            local = left is not None or right is not None
            if q.shape[1] != k.shape[1] or (q.shape[1] > 1 and not local):
                q, k = _rotate(rotary, q, k, cache_seqlens, local)
                rotary = None
        return decoding.attention_with_kv_cache(
            q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, block_table=block_table,
            rotary=rotary, mask=mask, bias=alibi(alibi_slopes, q.shape[0], q.shape[2]),
            softmax_scale=softmax_scale, softcap=softcap_of(softcap),
            return_lse=return_softmax_lse, impl=chosen_impl(),
        )  # fmt: skip


def _rows_as_blocks(
    cache_batch_idx: Tensor, block_table: Tensor | None, q: Tensor, k_cache: Tensor
) -> Tensor:
    """The table of a cache whose blocks are whole rows."""
    if block_table is not None:
        raise ValueError(
            "cache_batch_idx must be None together with block_table, which says where rows are, "
            f"got {describe(cache_batch_idx)}"
        )
    rows = k_cache.shape[0]
    check_lengths("cache_batch_idx", cache_batch_idx, q.shape[0], rows - 1, q.device)
    return cache_batch_idx[:, None]


def _left_padding(
    cache_leftpad: Tensor, q: Tensor, k_cache: Tensor, block_table: Tensor | None
) -> Mask:
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    check_lengths("cache_leftpad", cache_leftpad, q.shape[0], capacity, q.device)
    return Lengths(torch.full_like(cache_leftpad, capacity), starts_k=cache_leftpad)


def _rotary(
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, k: Tensor | None
) -> Rotary | None:
    if cos is None and sin is None:
        return None
    if cos is None or sin is None:
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise ValueError(f"{missing} must be given together with the other table, got None")
    if k is None:
        raise ValueError("k must be given where rotary_cos and rotary_sin are, got None")
    if not isinstance(interleaved, bool):
        raise TypeError(f"rotary_interleaved must be True or False, got {interleaved!r}")
    check_dims("rotary_cos", cos, "max_position", "rotary_dim // 2")
    check_dims("rotary_sin", sin, "max_position", "rotary_dim // 2")
    return Rotary(cos, sin, interleaved=interleaved)


def _rotate(
    rotary: Rotary, q: Tensor, k: Tensor, cache_seqlens: int | Tensor | None, local: bool
) -> tuple[Tensor, Tensor]:
    """q and k rotated, where the positions of q are not those of the last tokens."""
    start = _starts(cache_seqlens, q)
    counts = torch.arange(max(q.shape[1], k.shape[1]), device=q.device)
    of_q = counts[: q.shape[1]] if local else torch.zeros_like(counts[: q.shape[1]])
    return rotary.apply(q, start + of_q), rotary.apply(k, start + counts[: k.shape[1]])


def _starts(cache_seqlens: int | Tensor | None, q: Tensor) -> Tensor:
    """The tokens of each row before the call, as a column."""
    if cache_seqlens is None:
        raise ValueError("cache_seqlens must be given where k and v are appended, got None")
    if not isinstance(cache_seqlens, Tensor):
        return torch.full((q.shape[0], 1), cache_seqlens, device=q.device)
    check_integers("cache_seqlens", cache_seqlens, q.device)
    if cache_seqlens.shape[0] != q.shape[0]:
        raise ValueError(
            f"cache_seqlens must have one entry a row, shape ({q.shape[0]},), got "
            f"{tuple(cache_seqlens.shape)}"
        )
    return cache_seqlens[:, None]
