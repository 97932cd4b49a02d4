"""Losses over the places that have a label."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastattn.objectives.arguments import IGNORE
from fastattn.validation import check_tensor, describe, values_readable

REDUCTIONS = ("mean", "sum", "none")


def token_loss(
    logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of tokens or classes, in float32.

    Logits without a label are neither read nor converted.

    Args:
        logits: (..., num_classes), floating.
        labels: int64 (...), `ignore_index` where nothing is to be predicted.
        ignore_index: the label that is left out.
        reduction: "mean" over the labels, "sum", or "none": (num_labels,), in their order.

    Returns:
        float32 (float64 for float64 logits); 0 without labels, with a gradient of 0.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    _check(logits, labels, reduction, logits.shape[:-1], "(..., num_classes)")
    chosen = labels != ignore_index
    picked, wanted = logits[chosen], labels[chosen]
    if wanted.numel() and values_readable(wanted):
        low, high = (int(end) for end in wanted.aminmax())
        if low < 0 or high >= logits.shape[-1]:
            raise ValueError(
                f"labels must be {ignore_index} or in 0..{logits.shape[-1] - 1}, got {low}..{high}"
            )
    each = functional.cross_entropy(_wide(picked), wanted, reduction="none")
    return _reduce(each, reduction)


def replaced_token_loss(
    logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE, reduction: str = "mean"
) -> Tensor:
    """Binary cross-entropy of ELECTRA's discriminator, in float32.

    Args:
        logits: (...), floating: positive where the model takes a token for replaced.
        labels: int64 (...), 1 replaced, 0 original, `ignore_index` elsewhere.
        ignore_index, reduction: as of `token_loss`.

    Returns:
        float32 (float64 for float64 logits); 0 without labels, with a gradient of 0.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    _check(logits, labels, reduction, logits.shape, "of the shape of labels")
    chosen = labels != ignore_index
    picked = _wide(logits[chosen])
    each = functional.binary_cross_entropy_with_logits(
        picked, labels[chosen].to(picked.dtype), reduction="none"
    )
    return _reduce(each, reduction)


def _check(
    logits: Tensor, labels: Tensor, reduction: str, shape: tuple[int, ...], expected: str
) -> None:
    check_tensor("logits", logits)
    check_tensor("labels", labels)
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating, {expected}, got {describe(logits)}")
    if labels.dtype != torch.int64 or labels.shape != shape:
        raise ValueError(
            f"labels must be int64 {tuple(shape)} for logits {tuple(logits.shape)}, got "
            f"{describe(labels)}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {list(REDUCTIONS)}, got {reduction!r}")


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _reduce(each: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return each
    total = each.sum()
    return total if reduction == "sum" else total / max(each.numel(), 1)
