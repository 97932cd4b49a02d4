"""Key/value caches in 8 bits, as a value: the numbers and what one unit of them stands for.

    Quantized.zeros(shape, "int8")                        a scale for each token and head
    Quantized.zeros(shape, "fp8", scale=k_scale)          a fixed scale for each head

An element is `values * scale`. Half of the memory and of the traffic of a 16-bit cache; with a
scale for each token, float32, a head of 64 pays 4 bytes on top of 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastattn.validation import check_tensor, describe, values_readable

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The dtypes that a cache may be quantized to, and the largest magnitude of each that is used."""

_DTYPES = {
    "int8": torch.int8, "fp8": torch.float8_e4m3fn,
    torch.int8: torch.int8, torch.float8_e4m3fn: torch.float8_e4m3fn,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Quantized:
    """A cache of keys or of values in 8 bits: an element is `values * scale`.

    int8 has 255 equal steps, so it errs by at most half a step, scale / 2. fp8 (e4m3: 4 bits of
    exponent, 3 of mantissa) errs by at most 1/16 of each element, or 2**-10 scale near 0.

    Args:
        values: int8 or float8_e4m3fn, in the shape of the cache: (batch, max_seqlen, num_heads_kv,
            head_dim), paged (num_blocks, block_size, num_heads_kv, head_dim).
        scale: float32. (num_heads_kv,): one a head, positive, and never changed. values.shape[:-1]:
            one for each token and head, written with the token.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    values: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        values, scale = self.values, self.scale
        check_tensor("Quantized values", values)
        check_tensor("Quantized scale", scale)
        if values.dtype not in LARGEST:
            raise TypeError(
                f"Quantized values must be int8 or float8_e4m3fn, got {describe(values)}"
            )
        if values.dim() != 4:
            raise ValueError(
                "Quantized values must have the shape of a cache, (batch, max_seqlen, "
                "num_heads_kv, head_dim) or (num_blocks, block_size, num_heads_kv, head_dim), got "
                f"{describe(values)}"
            )
        _check_scale(scale, values.shape, values.device)

    @classmethod
    def zeros(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype | Literal["int8", "fp8"],
        per: Literal["token", "head"] | None = None,
        device: torch.device | str | None = None,
        scale: Tensor | None = None,
    ) -> Quantized:
        """An empty cache.

        Args:
            shape: of the cache; four sizes.
            dtype: torch.int8 or "int8", torch.float8_e4m3fn or "fp8".
            per: "token" or "head"; default "head" if a scale is given, else "token".
            device: default torch's.
            scale: float32 (num_heads_kv,); needed for "head", and only there.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        chosen = _check_dtype(dtype)
        per = per or ("token" if scale is None else "head")
        if per not in ("token", "head"):
            raise ValueError(f'per must be "token" or "head", got {per!r}')
        if (scale is None) != (per == "token"):
            raise ValueError(
                'scale must be given for per="head", a float32 tensor (num_heads_kv,), and only '
                f"there; got per={per!r} and scale {scale!r}"
            )
        values = torch.zeros(tuple(shape), dtype=chosen, device=device)
        if scale is None:
            scale = torch.ones(values.shape[:-1], dtype=torch.float32, device=device)
        return cls(values, scale)

    @classmethod
    def make(
        cls,
        x: Tensor,
        dtype: torch.dtype | Literal["int8", "fp8"],
        scale: Tensor | None = None,
    ) -> Quantized:
        """A cache that is full already, quantized.

        Args:
            x: floating point, in the shape of a cache.
            dtype: torch.int8 or "int8", torch.float8_e4m3fn or "fp8".
            scale: float32 (num_heads_kv,), one a head; None computes one for each token and head.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        check_tensor("x", x)
        if not x.is_floating_point() or x.dim() != 4:
            raise ValueError(
                "x must be floating point in the shape of a cache, four dimensions, got "
                f"{describe(x)}"
            )
        if scale is not None:
            check_tensor("scale", scale)
            _check_scale(scale, x.shape, x.device)
        return cls(*quantize(x, _check_dtype(dtype), scale))

    @property
    def per_token(self) -> bool:
        """Whether each token and head has a scale of its own."""
        return self.scale.dim() != 1

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole cache as a tensor: `values * scale` in float32 or better, then in `dtype`."""
        return dequantize(self.values, self.scale, dtype)


def quantize(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values and scales of tokens `x` (..., num_heads_kv, head_dim).

    int8 is x / scale rounded half to even; fp8 is x / scale in torch's cast. Both are clamped to
    the largest number first, in float32. A token's own scale brings its largest magnitude to that
    number, and is 1 for a token of zeros.

    Args:
        x: floating point.
        dtype: torch.int8 or torch.float8_e4m3fn.
        scale: float32 (num_heads_kv,), or None: one for each token and head, (..., num_heads_kv).
    """
    largest = LARGEST[dtype]
    wide = x.to(torch.float32)
    if scale is None:
        scale = wide.abs().amax(-1) / largest
        scale = scale.masked_fill(scale == 0, 1.0)
    wide = (wide / scale[..., None]).clamp(-largest, largest)
    return (wide.round() if dtype == torch.int8 else wide).to(dtype), scale


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`values * scale` for values (..., num_heads_kv, head_dim), in float32 or better."""
    wide = torch.promote_types(dtype, torch.float32)
    return (values.to(wide) * scale.to(wide)[..., None]).to(dtype)


def _check_dtype(dtype: object) -> torch.dtype:
    if isinstance(dtype, (str, torch.dtype)) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise ValueError(
        f'dtype must be torch.int8 or "int8", torch.float8_e4m3fn or "fp8", got {dtype!r}'
    )


def _check_scale(scale: Tensor, shape: torch.Size, device: torch.device) -> None:
    if scale.dtype != torch.float32 or scale.shape not in (shape[-2:-1], shape[:-1]):
        raise ValueError(
            f"Quantized scale must be float32 of shape {tuple(shape[-2:-1])}, one a head, or "
            f"{tuple(shape[:-1])}, one a token and head, got {describe(scale)}"
        )
    if scale.device != device:
        raise ValueError(f"Quantized scale must be on {device} like values, got {describe(scale)}")
    if scale.dim() == 1 and values_readable(scale) and not bool((scale > 0).all()):
        raise ValueError(f"Quantized scale must be positive for each head, got {scale.tolist()}")
