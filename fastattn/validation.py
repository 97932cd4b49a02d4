"""Checks on arguments: each error names the argument, its value and what was expected.

Checks of *values* on a GPU would make every call wait for the device, so they run only inside
`fastattn.testing.debug()`. On CPU tensors they always run.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_device_checks = False


@contextlib.contextmanager
def device_checks() -> Iterator[None]:
    """Within it, values on a GPU are checked too, and kernels write into NaN-poisoned outputs."""
    global _device_checks
    before, _device_checks = _device_checks, True
    try:
        yield
    finally:
        _device_checks = before


def device_checks_enabled() -> bool:
    """Whether `device_checks()` is active."""
    return _device_checks


def values_readable(tensor: Tensor) -> bool:
    """Whether a tensor's values may be looked at here: for free, or because the user asked."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    if type(tensor) is not Tensor and not isinstance(tensor, torch.nn.Parameter):
        return False  # fake, functional or subclassed tensors: no values, or not ours to read
    return tensor.device.type == "cpu" or _device_checks


def describe(tensor: Tensor) -> str:
    """Shape, dtype and device of a tensor, for an error message."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def check_tensor(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {value!r} ({type(value).__name__})")


def check_flag(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_number(
    name: str,
    value: float,
    expected: str,
    low: float = -math.inf,
    high: float = math.inf,
) -> float:
    """`value` as a float; raises unless it is a finite number, low <= value < high.

    Args:
        expected: what the message says that it must be.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    # Comparisons that a NaN fails too: torch.compile knows no isfinite of a symbolic number.
    if not (-math.inf < value < math.inf and low <= value < high):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return float(value)


def check_lengths(name: str, value: Any, size: int, highest: int, device: torch.device) -> None:
    """Raises unless `value` is an integer tensor (size,) on `device` with entries in 0..highest."""
    check_integers(name, value, device)
    if value.shape != (size,):
        raise ValueError(
            f"{name} must have one entry a sequence, shape ({size},), got {tuple(value.shape)}"
        )
    if value.numel() and values_readable(value):
        low, high = int(value.min()), int(value.max())
        if low < 0 or high > highest:
            raise ValueError(f"{name} must lie in 0..{highest}, got {low}..{high}")


def check_integers(name: str, value: Any, device: torch.device) -> None:
    """Raises unless `value` is a one-dimensional int32 or int64 tensor on `device`."""
    check_tensor(name, value)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {describe(value)}")
    if value.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got {describe(value)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like q, got {describe(value)}")


def check_cu_seqlens(name: str, value: Any, total: int, longest: int, device: torch.device) -> None:
    """Raises unless `value` holds the cumulative lengths 0, ..., total of sequences <= longest."""
    check_integers(name, value, device)
    if value.numel() < 1:
        raise ValueError(f"{name} must hold at least the leading 0, got shape {tuple(value.shape)}")
    if not values_readable(value):
        return
    entries = value.tolist()
    if entries[0] != 0:
        raise ValueError(f"{name} must start at 0, got {entries[0]}")
    lengths = [after - before for before, after in itertools.pairwise(entries)]
    if any(length < 0 for length in lengths):
        at = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(
            f"{name} must not decrease, got {entries[at]} then {entries[at + 1]} at index {at + 1}"
        )
    if entries[-1] != total:
        raise ValueError(
            f"{name} must end at the number of packed rows, {total}, got {entries[-1]}"
        )
    if max(lengths, default=0) > longest:
        raise ValueError(
            f"max_seqlen of {name} must be at least its longest sequence, {max(lengths)}, "
            f"got {longest}"
        )


def check_broadcast(name: str, value: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """`value` as a four-dimensional view (batch, head, row, column), sizes 1 where broadcast."""
    if value.dim() > 4 or any(
        size not in (1, full)
        for size, full in zip(reversed(value.shape), reversed(shape), strict=False)
    ):
        raise ValueError(
            f"{name} must broadcast to (batch, num_heads, seqlen_q, seqlen_k) = {shape}, "
            f"got shape {tuple(value.shape)}"
        )
    return value[(None,) * (4 - value.dim())]
