"""Correctly rounded conversions between the float formats of Triton, in NumPy.

The interpreter keeps a tensor as a NumPy array. NumPy has no bfloat16 and no float8, so those are
kept as raw bits (``uint16``, ``uint8``), and arithmetic on them has to go through a wider format:

    widen(stored, "bf16")     raw bits -> float32, exact
    narrow(values, "bf16")    any number -> raw bits, rounded once, to nearest even

Formats go by Triton's names: fp16, bf16, fp32, fp64, fp8e4nv (torch's float8_e4m3fn), fp8e5
(float8_e5m2), fp8e4b8 (float8_e4m3fnuz), fp8e5b16 (float8_e5m2fnuz).

Rounding twice (float64 to float32 to bfloat16) can differ from rounding once. Where a value takes
two steps, the first one therefore rounds *to odd*: an inexact result gets its last bit set, which
keeps it off the midpoints of every format at least two bits narrower (Boldo and Melquiond,
"Emulation of a FMA and correctly rounded sums", 2008).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

_NATIVE: dict[str, np.dtype[Any]] = {
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
    "fp64": np.dtype(np.float64),
}
_FLOAT8 = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "fp8e5b16": torch.float8_e5m2fnuz,
}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def is_float8(name: str) -> bool:
    """Whether the Triton scalar type called ``name`` is one of the float8 formats."""
    return name.startswith("fp8")


def is_raw(name: str) -> bool:
    """Whether the interpreter keeps this format as raw bits, on which NumPy cannot compute."""
    return name == "bf16" or is_float8(name)


def widen(stored: Array, name: str) -> Array:
    """Numbers that the array of a tensor stands for.

    Args:
        stored: the array as the interpreter keeps it (raw bits for bf16 and float8).
        name: Triton's name of the scalar type.

    Returns:
        float32 values for the formats kept as raw bits; ``stored`` itself for all other types.

    Raises:
        NotImplementedError: for fp8e4b15, which torch does not have.
    """
    if name == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if is_float8(name):
        return _float8_values(name)[stored]
    return stored


def narrow(values: Array, name: str, toward_zero: bool = False) -> Array:
    """Round numbers once to a float format, to nearest even unless ``toward_zero``.

    Args:
        values: floats or integers of any width.
        name: Triton's name of the format to round to.
        toward_zero: drop what does not fit, and never round away from zero.

    Returns:
        The array as the interpreter keeps it: raw bits for bf16 and float8.

    Raises:
        NotImplementedError: for fp8e4b15, which torch does not have, and for a value past the
            largest float8: some chips saturate there and others give NaN or infinity.
    """
    values = _exact_or_odd_float(values, name)
    if name in _NATIVE:
        nearest = values.astype(_NATIVE[name])
    elif name == "bf16":
        nearest = _float32_to_bfloat16(_float32_to_odd(values))
    else:
        nearest = _float32_to_float8(_float32_to_odd(values), name)
    return _step_back(values, nearest, name) if toward_zero else nearest


def fused_multiply_add(x: Array, y: Array, z: Array) -> Array:
    """``x * y + z`` as float64 rounded to odd, so that :func:`narrow` then rounds only once.

    Args:
        x, y, z: fp16, fp32, or bf16 widened to float32. Their products are exact in float64.
    """
    product = x.astype(np.float64) * y.astype(np.float64)
    addend = z.astype(np.float64)
    total = product + addend
    # What the addition lost, exactly (Knuth's two-sum).
    shadow = total - product
    lost = (product - (total - shadow)) + (addend - shadow)
    odd = (total.view(np.uint64) & 1).astype(bool)
    fix = np.isfinite(lost) & (lost != 0) & ~odd
    return np.where(fix, np.nextafter(total, np.copysign(np.inf, lost)), total)


def round_to_tf32(values: Array) -> Array:
    """float32 with the 10 mantissa bits that a tensor core keeps, rounded to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded, bits).view(np.float32)


def _exact_or_odd_float(values: Array, name: str) -> Array:
    """Integers as floats that still round to the right ``name``; floats as they are."""
    if values.dtype.kind == "f":
        return values
    if name in ("fp32", "fp64"):
        return values  # astype converts an integer of any width with one rounding
    if values.dtype.itemsize == 8:
        # 64 bits do not fit float64's 53: fold the last 11 into one bit that only says "inexact".
        tail = values & values.dtype.type(0x7FF)
        folded = (values - tail) | np.where(tail != 0, 0x400, 0).astype(values.dtype)
        values = np.where(np.abs(values.astype(np.float64)) >= 2.0**53, folded, values)
    return values.astype(np.float64)


def _float32_to_odd(values: Array) -> Array:
    """float32, rounding to odd what does not fit (only float64 can fail to)."""
    nearest = values.astype(np.float32)
    if values.dtype != np.float64:
        return nearest
    back = nearest.astype(np.float64)
    inexact = (back != values) & ~np.isnan(values)
    bits = nearest.view(np.uint32) - (inexact & (np.abs(back) > np.abs(values)))
    return (bits | inexact).view(np.float32)


def _float32_to_bfloat16(values: Array) -> Array:
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def _float32_to_float8(values: Array, name: str) -> Array:
    dtype = _float8_type(name)
    largest = torch.finfo(dtype).max
    overflow = np.abs(values) > largest
    if overflow.any():
        raise NotImplementedError(
            f"{values[overflow][0]} is past the largest {name}, {largest:g}: chips (and releases "
            "of torch) differ there; clamp before the cast"
        )
    flat = torch.from_numpy(np.ascontiguousarray(values).reshape(-1))
    stored: Array = flat.to(dtype).view(torch.uint8).numpy()
    return stored.reshape(values.shape)


def _step_back(values: Array, nearest: Array, name: str) -> Array:
    """One step toward zero wherever rounding to nearest went away from it."""
    away = np.abs(widen(nearest, name).astype(np.float64)) > np.abs(values.astype(np.float64))
    bits = nearest.view(_UNSIGNED[nearest.dtype.itemsize])
    return (bits - away).astype(bits.dtype).view(nearest.dtype)


def _float8_type(name: str) -> torch.dtype:
    if name not in _FLOAT8:
        raise NotImplementedError(f"the interpreter cannot convert {name}: torch has no such type")
    return _FLOAT8[name]


@cache
def _float8_values(name: str) -> Array:
    """The numbers that the 256 bytes stand for."""
    every_byte = torch.arange(256, dtype=torch.uint8)
    values: Array = every_byte.view(_float8_type(name)).to(torch.float32).numpy()
    return values
