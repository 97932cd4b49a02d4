"""flash_attn's arguments, checked and said in fastattn's words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.biases import ALiBi
from fastattn.masks import Causal, Mask, Window
from fastattn.validation import check_tensor, describe


def check_dims(name: str, tensor: Any, *dims: str) -> None:
    """Raises unless `tensor` has these dimensions; those that are numbers must have that size."""
    check_tensor(name, tensor)
    fits = tensor.dim() == len(dims) and all(
        not dim.isdigit() or size == int(dim) for dim, size in zip(dims, tensor.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must be ({', '.join(dims)}), got {describe(tensor)}")


def window_sides(causal: bool, window_size: Any) -> tuple[int | None, int | None]:
    """How far a query sees to the left and to the right; None is without limit."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    if (
        not isinstance(window_size, (tuple, list))
        or len(window_size) != 2
        or any(isinstance(n, bool) or not isinstance(n, int) for n in window_size)
    ):
        raise ValueError(
            f"window_size must be two ints (left, right), -1 for no limit, got {window_size!r}"
        )
    left, right = (None if size < 0 else int(size) for size in window_size)
    return left, 0 if causal else right


def window_mask(left: int | None, right: int | None) -> Mask | None:
    """The mask of a window, None if it hides nothing."""
    if left is None and right is None:
        return None
    return Causal() if left is None and right == 0 else Window(left, right)


def alibi(alibi_slopes: Tensor | None, num_sequences: int, num_heads: int) -> ALiBi | None:
    """Slopes as a bias, without a gradient, as in flash_attn."""
    if alibi_slopes is None:
        return None
    check_tensor("alibi_slopes", alibi_slopes)
    shapes = ((num_heads,), (num_sequences, num_heads))
    if tuple(alibi_slopes.shape) not in shapes or not alibi_slopes.is_floating_point():
        raise ValueError(
            f"alibi_slopes must be floating point of shape (num_heads,) or (batch, num_heads), "
            f"{shapes[0]} or {shapes[1]}, got {describe(alibi_slopes)}"
        )
    return ALiBi(alibi_slopes.detach())


def softcap_of(softcap: Any) -> float:
    """flash_attn's softcap, where 0 and below is off."""
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap must be a number, 0 or below for none, got {softcap!r}")
    return max(float(softcap), 0.0)


def longest(name: str, value: Any) -> int | torch.SymInt:
    """A maximum length: an int, or a tensor of one element, which is read."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < 0:
        raise ValueError(f"{name} must be an int >= 0, got {value!r}")
    return value
