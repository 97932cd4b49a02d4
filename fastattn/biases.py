"""What is added to the attention scores, as values: small frozen objects joined with `+`.

    ALiBi(slopes)                          linear in the distance, one slope a head
    T5Bias(table, bidirectional=True)      learned, by bucket of the distance
    ALiBi(slopes) + bias_tensor            their sum

Biases that depend on the distance alone are computed inside the kernels: no (heads, N, N) tensor
ever exists. Query row i stands at key position `i + seqlen_k - seqlen_q`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn.masks import Frame, select_sequence
from fastattn.validation import check_broadcast, check_tensor, describe


@dataclass(frozen=True, eq=False)
class BiasParts:
    """A bias taken apart into the flat arguments of the torch operator; None where absent."""

    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    relative_bias: Tensor | None = None


class Bias:
    """Base of all biases. A new bias defines `dense`, `check` and `add_to`."""

    def __add__(self, other: Bias | Tensor) -> Bias:
        return join(self, as_bias(other))

    __radd__ = __add__

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """`bias + tensor` under torch.compile, which takes it for an operation on tensors."""
        if func in (Tensor.__add__, Tensor.__radd__, Tensor.add):
            return join(*(as_bias(arg) for arg in args))
        return NotImplemented

    def dense(self, seqlen_q: int, seqlen_k: int, dtype: torch.dtype | None = None) -> Tensor:
        """The bias as a tensor (batch or 1, num_heads or 1, seqlen_q, seqlen_k)."""
        raise NotImplementedError

    def check(self, frame: Frame) -> None:
        """Raises ValueError or TypeError where the bias does not fit the problem."""

    def add_to(self, parts: BiasParts) -> BiasParts:
        """`parts` with this bias added to it."""
        raise NotImplementedError

    def at(self, index: int, seqlen_q: int, seqlen_k: int) -> Bias:
        """This bias for sequence `index` alone, which has these lengths."""
        return self

    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of: the tensors that a gradient could flow to."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class DenseBias(Bias):
    """Any bias, as a floating tensor that broadcasts to (batch, num_heads, seqlen_q, seqlen_k)."""

    tensor: Tensor

    def __post_init__(self) -> None:
        check_tensor("bias", self.tensor)
        if not self.tensor.is_floating_point():
            raise TypeError(
                f"bias must be floating point, got {describe(self.tensor)}; "
                "pass a bool tensor as mask=..."
            )

    def dense(self, seqlen_q: int, seqlen_k: int, dtype: torch.dtype | None = None) -> Tensor:
        tensor = self.tensor.to(dtype or self.tensor.dtype)
        return tensor[(None,) * (4 - tensor.dim())].expand(-1, -1, seqlen_q, seqlen_k)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.tensor,)

    def check(self, frame: Frame) -> None:
        shape = (frame.num_sequences, frame.num_heads, frame.seqlen_q, frame.seqlen_k)
        check_broadcast("bias", self.tensor, shape)
        _check_device("bias", self.tensor, frame)

    def add_to(self, parts: BiasParts) -> BiasParts:
        tensor = self.tensor[(None,) * (4 - self.tensor.dim())]
        return replace(parts, bias=tensor if parts.bias is None else parts.bias + tensor)

    def at(self, index: int, seqlen_q: int, seqlen_k: int) -> Bias:
        return DenseBias(select_sequence(self.tensor, index, seqlen_q, seqlen_k))


@dataclass(frozen=True, eq=False)
class ALiBi(Bias):
    """Attention with linear biases: `-slope * |query position - key position|`.

    Press et al., arXiv:2108.12409. `alibi_slopes(num_heads)` gives the paper's slopes.

    Args:
        slopes: (num_heads,) or (batch, num_heads), floating point.
    """

    slopes: Tensor

    def __post_init__(self) -> None:
        check_tensor("ALiBi slopes", self.slopes)
        if not self.slopes.is_floating_point() or self.slopes.dim() not in (1, 2):
            raise ValueError(
                "ALiBi slopes must be floating point of shape (num_heads,) or (batch, num_heads), "
                f"got {describe(self.slopes)}"
            )

    def dense(self, seqlen_q: int, seqlen_k: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.slopes.dtype
        # Distances above 256 are not exact in bfloat16: multiply in float32 or better.
        slopes = self.slopes.to(torch.promote_types(dtype, torch.float32))
        distance = key_minus_query(seqlen_q, seqlen_k, slopes.device).abs().to(slopes.dtype)
        return (-slopes.reshape(-1, slopes.shape[-1], 1, 1) * distance).to(dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.slopes,)

    def check(self, frame: Frame) -> None:
        heads, batch = self.slopes.shape[-1], self.slopes.shape[:-1]
        if heads != frame.num_heads or batch not in ((), (1,), (frame.num_sequences,)):
            raise ValueError(
                f"ALiBi slopes must have shape ({frame.num_heads},) or ({frame.num_sequences}, "
                f"{frame.num_heads}), got {tuple(self.slopes.shape)}"
            )
        _check_device("ALiBi slopes", self.slopes, frame)

    def add_to(self, parts: BiasParts) -> BiasParts:
        slopes = self.slopes.reshape(-1, self.slopes.shape[-1])
        if parts.alibi_slopes is not None:
            slopes = parts.alibi_slopes + slopes
        return replace(parts, alibi_slopes=slopes)

    def at(self, index: int, seqlen_q: int, seqlen_k: int) -> Bias:
        one_for_all = self.slopes.dim() == 1 or self.slopes.shape[0] == 1
        return self if one_for_all else ALiBi(self.slopes[index : index + 1])


@dataclass(frozen=True, eq=False)
class T5Bias(Bias):
    """T5's relative position bias: `table[bucket(key position - query position), head]`.

    Raffel et al., arXiv:1910.10683, section 2.1. Near distances have a bucket each, far ones share
    logarithmically wider buckets, and from `max_distance` on there is one for each direction.

    Args:
        table: (num_buckets, num_heads), floating point.
        bidirectional: encoder style, half of the buckets for keys after the query; otherwise
            decoder style, later keys share bucket 0.
        max_distance: distance from which on the last bucket is used.
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128

    def __post_init__(self) -> None:
        check_tensor("T5Bias table", self.table)
        if not self.table.is_floating_point() or self.table.dim() != 2:
            raise ValueError(
                "T5Bias table must be floating point of shape (num_buckets, num_heads), got "
                f"{describe(self.table)}"
            )
        buckets = self.table.shape[0] // 2 if self.bidirectional else self.table.shape[0]
        if buckets < 2:
            raise ValueError(
                f"T5Bias table must have at least {4 if self.bidirectional else 2} buckets, got "
                f"{self.table.shape[0]}"
            )
        if self.max_distance <= buckets // 2:
            raise ValueError(
                f"T5Bias max_distance must exceed the {buckets // 2} distances that have a bucket "
                f"each, got {self.max_distance}"
            )

    def by_distance(self) -> Tensor:
        """The table by distance: (num_heads, 2 * max_distance + 1), distance -max_distance first.

        Gathered by torch, so that its gradient flows back into the table; in float32 or better, so
        that a bucket's gradient is summed in it.
        """
        buckets = _buckets_by_distance(
            self.bidirectional, self.table.shape[0], self.max_distance, self.table.device
        )
        table = self.table.to(torch.promote_types(self.table.dtype, torch.float32))
        # Not an index: the gradient of an embedding is summed in a fixed order on a GPU too.
        return torch.nn.functional.embedding(buckets, table).t().contiguous()

    def dense(self, seqlen_q: int, seqlen_k: int, dtype: torch.dtype | None = None) -> Tensor:
        distance = key_minus_query(seqlen_q, seqlen_k, self.table.device)
        index = distance.clamp(-self.max_distance, self.max_distance) + self.max_distance
        by_distance = self.by_distance().to(dtype or self.table.dtype)
        return by_distance[:, index][None]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.table,)

    def check(self, frame: Frame) -> None:
        if self.table.shape[1] != frame.num_heads:
            raise ValueError(
                f"T5Bias table must have shape (num_buckets, {frame.num_heads}), got "
                f"{tuple(self.table.shape)}"
            )
        _check_device("T5Bias table", self.table, frame)

    def add_to(self, parts: BiasParts) -> BiasParts:
        mine = self.by_distance()
        if (other := parts.relative_bias) is not None:
            radius = max(mine.shape[1], other.shape[1]) // 2
            mine = _widen(mine, radius) + _widen(other, radius)
        return replace(parts, relative_bias=mine)


def _widen(by_distance: Tensor, radius: int) -> Tensor:
    """A bias by distance, continued to a larger radius by its outermost entries."""
    width = by_distance.shape[1] // 2
    index = torch.arange(-radius, radius + 1, device=by_distance.device).clamp(-width, width)
    return torch.nn.functional.embedding(index + width, by_distance.t()).t()


@dataclass(frozen=True, eq=False)
class JoinedBias(Bias):
    """A sum of biases. Made by `+`."""

    parts: tuple[Bias, ...]

    def dense(self, seqlen_q: int, seqlen_k: int, dtype: torch.dtype | None = None) -> Tensor:
        first, *others = (part.dense(seqlen_q, seqlen_k, dtype) for part in self.parts)
        return functools.reduce(torch.add, others, first)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self.parts for tensor in part.tensors())

    def check(self, frame: Frame) -> None:
        for part in self.parts:
            part.check(frame)

    def add_to(self, parts: BiasParts) -> BiasParts:
        for part in self.parts:
            parts = part.add_to(parts)
        return parts

    def at(self, index: int, seqlen_q: int, seqlen_k: int) -> Bias:
        return JoinedBias(tuple(part.at(index, seqlen_q, seqlen_k) for part in self.parts))


def key_minus_query(seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
    """Key position minus query position, (seqlen_q, seqlen_k) int64, aligned bottom-right."""
    query = torch.arange(seqlen_q, device=device) + (seqlen_k - seqlen_q)
    return torch.arange(seqlen_k, device=device)[None] - query[:, None]


def t5_bucket(
    relative_position: Tensor, bidirectional: bool, num_buckets: int, max_distance: int
) -> Tensor:
    """Bucket of each `key position - query position`; int64, the shape of the input.

    Half of the buckets of a direction hold one distance each; the other half grows logarithmically
    up to `max_distance` (Raffel et al., arXiv:1910.10683). Computed in float32 as the T5
    implementations do, so that the edges of the buckets are theirs to the last distance.
    """
    offset = torch.zeros_like(relative_position)
    if bidirectional:
        num_buckets //= 2
        offset = (relative_position > 0).to(torch.int64) * num_buckets
        distance = relative_position.abs()
    else:
        distance = (-relative_position).clamp(min=0)
    exact = num_buckets // 2
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = exact + (growth * (num_buckets - exact)).to(torch.int64)
    return offset + torch.where(distance < exact, distance, far.clamp(max=num_buckets - 1))


@functools.lru_cache(maxsize=64)
def _cpu_buckets(bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    distance = torch.arange(-max_distance, max_distance + 1)
    return t5_bucket(distance, bidirectional, num_buckets, max_distance)


def _buckets_by_distance(
    bidirectional: bool, num_buckets: int, max_distance: int, device: torch.device
) -> Tensor:
    if torch.compiler.is_compiling():
        distance = torch.arange(-max_distance, max_distance + 1, device=device)
        return t5_bucket(distance, bidirectional, num_buckets, max_distance)
    return _device_buckets(bidirectional, num_buckets, max_distance, device)


@functools.lru_cache(maxsize=64)
def _device_buckets(
    bidirectional: bool, num_buckets: int, max_distance: int, device: torch.device
) -> Tensor:
    return _cpu_buckets(bidirectional, num_buckets, max_distance).to(device)


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """The slopes of the ALiBi paper (arXiv:2108.12409): float32 (num_heads,).

    For a power of two they are 2**(-8/n), 2**(-16/n), ...; otherwise those of the next lower power
    of two, then every other one of the next higher.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be >= 1, got {num_heads}")

    def powers(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    lower = 1 << (num_heads.bit_length() - 1)
    slopes = powers(lower) + powers(2 * lower)[::2][: num_heads - lower]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def _check_device(name: str, tensor: Tensor, frame: Frame) -> None:
    if tensor.device != frame.device:
        raise ValueError(f"{name} must be on {frame.device} like q, got {describe(tensor)}")


def as_bias(bias: Bias | Tensor) -> Bias:
    """A bias value from what users pass: a bias, or a floating tensor."""
    if isinstance(bias, Bias):
        return bias
    if isinstance(bias, Tensor):
        return DenseBias(bias)
    raise TypeError(f"bias must be a floating tensor, ALiBi(slopes) or T5Bias(table), got {bias!r}")


def join(*biases: Bias) -> Bias:
    """The sum of all biases."""
    parts: list[Bias] = []
    for bias in biases:
        parts.extend(bias.parts if isinstance(bias, JoinedBias) else (bias,))
    return parts[0] if len(parts) == 1 else JoinedBias(tuple(parts))


def take_apart(bias: Bias | None) -> BiasParts:
    """The flat arguments of the torch operator that say the same as `bias`."""
    return BiasParts() if bias is None else bias.add_to(BiasParts())
