"""The masks of `torch.nn.MultiheadAttention`, as the values that `fastattn.attention` takes.

There True hides a key and floating masks are added; here True shows one, and what is added is a
bias. Neither is ever expanded over heads or batch.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fastattn.biases import Bias, DenseBias
from fastattn.masks import Causal, DenseMask, Mask, Window
from fastattn.validation import check_tensor, describe


def check_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    batch: int,
    num_heads: int,
    seqlens: tuple[int, int],
    batched: bool,
) -> None:
    """Raises unless the masks have the dtypes and shapes that torch takes."""
    seqlen_q, seqlen_k = seqlens
    expected: dict[str, list[tuple[int, ...]]] = {
        "attn_mask": [(seqlen_q, seqlen_k), (batch * num_heads, seqlen_q, seqlen_k)],
        "key_padding_mask": [(batch, seqlen_k) if batched else (seqlen_k,)],
    }
    for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
        if mask is None:
            continue
        check_tensor(name, mask)
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(
                f"{name} must be bool (True = hidden) or floating point (added to the scores), got "
                f"{describe(mask)}"
            )
        if tuple(mask.shape) not in expected[name]:
            shapes = " or ".join(str(shape) for shape in expected[name])
            raise ValueError(f"{name} must have shape {shapes}, got {describe(mask)}")
    dtypes = {mask.dtype for mask in (attn_mask, key_padding_mask) if mask is not None}
    if len(dtypes) == 2 and not torch.compiler.is_compiling():  # which cannot look into warnings
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. "
            "Use same type for both instead.",
            stacklevel=3,
        )


def four_dimensional(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, num_heads: int
) -> list[Tensor]:
    """The masks that are given, in torch's polarity, broadcastable over (batch, head, row, key)."""
    masks = []
    if attn_mask is not None:
        per_head = attn_mask.dim() == 3
        masks.append(
            attn_mask.unflatten(0, (batch, num_heads)) if per_head else attn_mask[None, None]
        )
    if key_padding_mask is not None:
        keys = key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask[None]
        masks.append(keys[:, None, None])
    return masks


def as_mask_and_bias(masks: list[Tensor]) -> tuple[Mask | None, Bias | None]:
    """Bool masks, turned round and joined, and floating ones, added."""
    mask: Mask | None = None
    bias: Bias | None = None
    for tensor in masks:
        if tensor.dtype == torch.bool:
            shown = DenseMask(~tensor)
            mask = shown if mask is None else mask & shown
        else:
            added = DenseBias(tensor)
            bias = added if bias is None else bias + added
    return mask, bias


def causal_top_left(seqlen_q: int, seqlen_k: int) -> Mask:
    """Row i sees keys 0 to i, as torch has it; for at most as many keys as rows.

    Ours is aligned with the last key. Keys past the last row, which no row sees, are to be cut off
    first.
    """
    return Causal() if seqlen_q == seqlen_k else Window(None, seqlen_q - seqlen_k)
