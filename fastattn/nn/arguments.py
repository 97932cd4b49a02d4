"""Checks of integers that callers of the caches hand over."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def check_positive(name: str, value: Any) -> None:
    """Raises unless `value` is an int >= 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")


def as_integers(name: str, value: Any) -> tuple[int, ...]:
    """The ints of a sequence or of a one-dimensional integer tensor (which waits for a GPU)."""
    if isinstance(value, Tensor):
        if value.dim() != 1 or value.is_floating_point() or value.is_complex():
            raise TypeError(
                f"{name} must be integers in one dimension, got {tuple(value.shape)} {value.dtype}"
            )
        value = value.tolist()
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        raise TypeError(f"{name} must be a sequence of ints or an integer tensor, got {value!r}")
    value = tuple(value)
    if set(map(type, value)) <= {int}:  # the usual case, once a layer
        return value
    if any(isinstance(entry, bool) or not hasattr(entry, "__index__") for entry in value):
        raise TypeError(f"{name} must be ints, got {list(value)}")
    return tuple(map(operator.index, value))


def per_row(name: str, value: int | Sequence[int] | Tensor, rows: Sequence[int]) -> list[int]:
    """One int a row, from one for all or a sequence."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value] * len(rows)
    counts = as_integers(name, value)
    if len(counts) != len(rows):
        raise ValueError(
            f"{name} must be one int or one a row, {len(rows)}, got {len(counts)}: {list(counts)}"
        )
    return list(counts)
