"""Operands of torch's scaled_dot_product_attention: checked, and with two leading dimensions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.validation import describe


class ArgumentError(ValueError, RuntimeError):
    """An argument is wrong. torch raises RuntimeError there, and some callers catch that."""


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    enable_gqa: bool,
) -> None:
    """Raises ArgumentError where torch's function raises, or reads a shape in its own way."""
    least = 3 if enable_gqa else 2
    autocast = torch.is_autocast_enabled(query.device.type)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < least:
            gqa = " with enable_gqa" if enable_gqa else ""
            raise ArgumentError(
                f"{name} must have at least {least} dimensions{gqa}, got {describe(tensor)}"
            )
        same_dtype = tensor.dtype == query.dtype or autocast
        if not same_dtype or tensor.device != query.device:
            raise ArgumentError(
                f"{name} must have the dtype and device of query ({describe(query)}), got "
                f"{describe(tensor)}"
            )
    if key.shape[-1] != query.shape[-1]:
        raise ArgumentError(
            f"key must have the head_dim of query, {query.shape[-1]}, got {describe(key)}"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ArgumentError(
            f"value must have the sequence length of key, {key.shape[-2]}, got {describe(value)}"
        )
    heads = query.shape[-3] if enable_gqa else 0
    for name, tensor in (("key", key), ("value", value)):
        if enable_gqa and (tensor.shape[-3] == 0 or heads % tensor.shape[-3]):
            raise ArgumentError(
                f"num_heads of {name} must divide those of query, {heads}, with enable_gqa, got "
                f"{describe(tensor)}"
            )
        skipped = 3 if enable_gqa else 2
        if not _broadcasts(tensor.shape[:-skipped], query.shape[:-skipped]):
            hint = "" if enable_gqa else " (grouped heads need enable_gqa=True)"
            raise ArgumentError(
                f"leading dimensions of {name} must broadcast with those of query "
                f"({describe(query)}){hint}, got {describe(tensor)}"
            )
    if not 0.0 <= dropout_p <= 1.0:
        raise ArgumentError(f"dropout_p must be a probability in [0, 1], got {dropout_p!r}")
    if attn_mask is not None:
        _check_mask(attn_mask, query, key, enable_gqa, autocast)


def _check_mask(mask: Tensor, query: Tensor, key: Tensor, enable_gqa: bool, autocast: bool) -> None:
    allowed = mask.dtype in (torch.bool, torch.float32, query.dtype)
    if not allowed and not (autocast and mask.is_floating_point()):
        raise ArgumentError(
            f"attn_mask must be bool, float32 or of the dtype of query ({describe(query)}), got "
            f"{describe(mask)}"
        )
    if mask.device != query.device:
        raise ArgumentError(f"attn_mask must be on {query.device} like query, got {describe(mask)}")
    if enable_gqa:
        lead = (*torch.broadcast_shapes(query.shape[:-3], key.shape[:-3]), query.shape[-3])
    else:
        lead = tuple(torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]))
    shape = (*lead, query.shape[-2], key.shape[-2])
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.dim() > len(shape) or any(size not in (1, full) for size, full in sizes):
        raise ArgumentError(
            "attn_mask must broadcast to (..., num_heads, seqlen_q, seqlen_k) = "
            f"{shape}, got {describe(mask)}"
        )


def _broadcasts(a: torch.Size, b: torch.Size) -> bool:
    return all(x == y or x == 1 or y == 1 for x, y in zip(reversed(a), reversed(b), strict=False))


def four_dimensions(
    query: Tensor, key: Tensor, value: Tensor
) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """The output's leading dimensions, and the operands as (batch, num_heads, seqlen, dim).

    Leading dimensions that are 1 or missing are expanded. Heads are not where key and value have
    fewer of them than query: grouped heads, or one that all share.
    """
    operands = (query, key, value)
    batches = torch.broadcast_shapes(*(t.shape[:-3] for t in operands))
    heads = [t.shape[-3] if t.dim() > 2 else 1 for t in operands]
    of_query, of_key, of_value = heads
    if of_key != of_value or of_key == 0 or of_query % of_key:
        heads = [next((n for n in heads if n != 1), 1)] * 3
    count = math.prod(batches)
    q, k, v = (
        _in_shape(tensor, batches, (count, size, *tensor.shape[-2:]))
        for tensor, size in zip(operands, heads, strict=True)
    )
    has_heads = any(t.dim() > 2 for t in operands)
    return (*batches, heads[0]) if has_heads else (), q, k, v


def _in_shape(tensor: Tensor, batches: torch.Size, shape: tuple[int, ...]) -> Tensor:
    """Expanded to batches, with these flattened."""
    if tensor.shape == shape:
        return tensor
    return tensor.expand(*batches, *shape[1:]).reshape(shape)


def flatten_mask(mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    """A mask that broadcasts to (*lead, seqlen_q, seqlen_k), with at most one batch dimension."""
    if mask.dim() <= 3 or len(lead) == 2:
        return mask
    if all(size == 1 for size in mask.shape[:-3]):
        return mask.reshape(1, *mask.shape[-3:])
    expanded = mask.expand(*lead[:-1], *mask.shape[-3:])
    return expanded.reshape(math.prod(lead[:-1]), *mask.shape[-3:])
