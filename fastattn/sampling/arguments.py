"""Checks that the functions around the sampler share: errors name the argument and its value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.validation import check_tensor, describe, values_readable


def check_scores(name: str, value: Any, dims: Sequence[str] | None = None) -> None:
    """Raises unless `value` is a floating tensor with a vocabulary as its last dimension.

    Args:
        dims: what its dimensions are, where their number is fixed: ("batch", "vocab_size").
    """
    check_tensor(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating dtype, got {describe(value)}")
    if value.dim() < 1 or (dims is not None and value.dim() != len(dims)):
        expected = "..., vocab_size" if dims is None else ", ".join(dims)
        raise ValueError(f"{name} must have shape ({expected}), got {describe(value)}")
    if value.shape[-1] < 1:
        raise ValueError(f"{name} must have at least one token, got {describe(value)}")


def check_tokens(name: str, value: Any, shape: Sequence[int], device: torch.device) -> None:
    """Raises unless `value` is an int32 or int64 tensor of this shape on `device`."""
    check_tensor(name, value)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {describe(value)}")
    _check_place(name, value, shape, device)


def check_flags(name: str, value: Any, shape: Sequence[int], device: torch.device) -> None:
    """Raises unless `value` is a bool tensor of this shape on `device`."""
    check_tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {describe(value)}")
    _check_place(name, value, shape, device)


def check_token_range(name: str, value: Tensor, used: Tensor | None, vocab_size: int) -> None:
    """Raises where a token that is used (None: all are) is outside of 0..vocab_size - 1.

    Looks only where that does not make the host wait for a device.
    """
    if not values_readable(value) or (used is not None and not values_readable(used)):
        return
    tokens = value if used is None else value.masked_fill(~used, 0)
    if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size):
        raise ValueError(
            f"{name} must lie in 0..{vocab_size - 1}, got {int(tokens.min())}..{int(tokens.max())}"
        )


def check_count(name: str, value: Any, lowest: int = 1) -> None:
    """Raises unless `value` is a Python integer of at least `lowest`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < lowest:
        raise ValueError(f"{name} must be at least {lowest}, got {value}")


def per_row(
    name: str,
    value: float | Tensor,
    shape: Sequence[int],
    device: torch.device,
    *,
    lowest: float = -math.inf,
    highest: float = math.inf,
    open_ends: bool = False,
) -> float | Tensor:
    """A setting that is one number, or a tensor of one number a row: as (*shape, 1).

    Raises unless it is a finite number in lowest..highest (between them with `open_ends`), or a
    floating tensor of this shape on `device` with such values. Values on a GPU are not looked at.
    """
    if isinstance(value, Tensor):
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name} must have a floating dtype, got {describe(value)}")
        _check_place(name, value, shape, device)
        if values_readable(value):
            for number in value.flatten().tolist():
                _check_number(name, number, lowest, highest, open_ends)
        return value[..., None]
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(
            f"{name} must be a number or a tensor of one a row, "
            f"got {value!r} ({type(value).__name__})"
        )
    _check_number(name, value, lowest, highest, open_ends)
    return float(value)


def _check_number(name: str, value: float, lowest: float, highest: float, open_ends: bool) -> None:
    inside = lowest < value < highest if open_ends else lowest <= value <= highest
    if inside and math.isfinite(value):
        return
    if open_ends:
        expected = f"greater than {lowest:g} and less than {highest:g}"
    elif highest == math.inf:
        expected = "finite" if lowest == -math.inf else f"finite and at least {lowest:g}"
    else:
        expected = f"in {lowest:g}..{highest:g}"
    raise ValueError(f"{name} must be {expected}, got {value}")


def _check_place(name: str, value: Tensor, shape: Sequence[int], device: torch.device) -> None:
    if value.shape != torch.Size(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {describe(value)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {describe(value)}")
