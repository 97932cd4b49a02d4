"""Rotary position embedding, as a value: which tables, which layout, which positions.

    Rotary(cos, sin)                           a model's own tables
    Rotary.make(head_dim, max_position)        those of the paper

Su et al., arXiv:2104.09864. Each pair of dimensions (a, b) is turned by the angle of its position:

    a' = a cos - b sin        b' = b cos + a sin
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.validation import check_tensor, describe, values_readable


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotation of queries and keys by their positions.

    Args:
        cos: (max_position, rotary_dim // 2), floating point: cosine of each position's angles.
            rotary_dim may be smaller than head_dim; the other dimensions pass through.
        sin: their sines, of the same shape, dtype and device.
        interleaved: which dimensions are a pair. False: (d, d + rotary_dim // 2), as in LLaMA and
            GPT-NeoX. True: (2 d, 2 d + 1), as in GPT-J.
        positions: int32 or int64 (batch, seqlen), where the new tokens stand; None: where the cache
            puts them, row b's new token j at `cache_seqlens[b] + j`. A row that is padded on its
            left has other positions than places in the cache.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False
    positions: Tensor | None = None

    def __post_init__(self) -> None:
        check_tensor("Rotary cos", self.cos)
        check_tensor("Rotary sin", self.sin)
        if self.cos.dim() != 2 or not self.cos.is_floating_point():
            raise ValueError(
                "Rotary cos must be floating point of shape (max_position, rotary_dim // 2), got "
                f"{describe(self.cos)}"
            )
        same = self.sin.shape == self.cos.shape and self.sin.dtype == self.cos.dtype
        if not same or self.sin.device != self.cos.device:
            raise ValueError(
                f"Rotary sin must have the shape, dtype and device of cos ({describe(self.cos)}), "
                f"got {describe(self.sin)}"
            )
        if self.cos.shape[1] == 0:
            raise ValueError(f"Rotary cos must have at least one angle, got {describe(self.cos)}")
        if not isinstance(self.interleaved, bool):
            raise TypeError(f"Rotary interleaved must be True or False, got {self.interleaved!r}")
        if self.positions is not None:
            check_positions("Rotary positions", self.positions)

    @classmethod
    def make(
        cls,
        rotary_dim: int,
        max_position: int,
        *,
        base: float = 10000.0,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> Rotary:
        """The paper's tables: pair d of position p is turned by p * base ** (-2 d / rotary_dim).

        Args:
            rotary_dim: how many dimensions of a head are rotated; even, at least 2.
            max_position: number of positions, at least 1.
            base: the longest wavelength is nearly 2 pi base positions; positive.
            interleaved: as for the class.
            device: of the tables; default torch's.

        Returns:
            A Rotary with float32 tables, rounded from float64.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        for name, size, least in (("rotary_dim", rotary_dim, 2), ("max_position", max_position, 1)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name} must be an int, got {size!r}")
            if size < least:
                raise ValueError(f"{name} must be at least {least}, got {size}")
        if rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even, got {rotary_dim}")
        if isinstance(base, bool) or not isinstance(base, (int, float)):
            raise TypeError(f"base must be a positive number, got {base!r}")
        if not 0 < base < float("inf"):
            raise ValueError(f"base must be a positive number, got {base!r}")
        # In float64 on the CPU: in float32 a far position's angle is off by some 1e-3, and the
        # tables would differ between devices.
        exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim
        position = torch.arange(max_position, dtype=torch.float64, device="cpu")
        angle = position[:, None] * float(base) ** -exponent
        device = torch.get_default_device() if device is None else device
        cos, sin = (t.to(device=device, dtype=torch.float32) for t in (angle.cos(), angle.sin()))
        return cls(cos, sin, interleaved)

    @property
    def max_position(self) -> int:
        """How many positions the tables have."""
        return self.cos.shape[0]

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return 2 * self.cos.shape[1]

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` rotated: computed in float32 or better, then rounded to the dtype of `x`.

        Args:
            x: (batch, seqlen, num_heads, head_dim), floating point; head_dim >= rotary_dim.
            positions: int32 or int64 (batch, seqlen), each in 0..max_position - 1. The field
                `positions` is not looked at.

        Returns:
            A new tensor of the shape and dtype of `x`.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        check_tensor("x", x)
        if x.dim() != 4 or not x.is_floating_point() or x.shape[-1] < self.rotary_dim:
            raise ValueError(
                "x must be floating point of shape (batch, seqlen, num_heads, head_dim) with "
                f"head_dim >= rotary_dim = {self.rotary_dim}, got {describe(x)}"
            )
        check_positions("positions", positions)
        if positions.shape != x.shape[:2]:
            raise ValueError(
                f"positions must have shape (batch, seqlen) = {tuple(x.shape[:2])}, got "
                f"{tuple(positions.shape)}"
            )
        check_position_values("positions", positions, self.max_position)
        return self.rotate(x, *self.turns(positions, x.dtype))

    def turns(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine (batch, seqlen, 1, rotary_dim // 2) for operands of `dtype`.

        A position below 0, of a query that stands before the first key, counts as 0.
        """
        wide = torch.promote_types(dtype, torch.float32)
        index = positions.clamp(min=0)
        return self.cos[index].to(wide)[:, :, None], self.sin[index].to(wide)[:, :, None]

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` (batch, seqlen, num_heads, head_dim) turned by what `turns` gave."""
        half = cos.shape[-1]
        wide = x[..., : 2 * half].to(cos.dtype)
        if self.interleaved:
            a, b = wide[..., 0::2], wide[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = wide[..., :half], wide[..., half:]
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        turned = turned.to(x.dtype)
        return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), -1)


def check_positions(name: str, positions: Tensor) -> None:
    """Raises unless `positions` is an int32 or int64 tensor (batch, seqlen)."""
    check_tensor(name, positions)
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {describe(positions)}")
    if positions.dim() != 2:
        raise ValueError(f"{name} must have shape (batch, seqlen), got {describe(positions)}")


def check_position_values(name: str, positions: Tensor, max_position: int) -> None:
    """Raises unless all positions lie in the tables; looks only where that is free."""
    if positions.numel() and values_readable(positions):
        low, high = (int(x) for x in positions.aminmax())
        if low < 0 or high >= max_position:
            raise ValueError(
                f"{name} must lie in 0..{max_position - 1}, the positions of the tables, got "
                f"{low}..{high}"
            )
