"""Inputs for tests and for ``fastattn verify``: the same numbers on every device.

All values are drawn on the CPU, from a generator of their own, in float32, and then cast and moved.
So a seed gives the same inputs on CPU and CUDA, and dtypes differ only in rounding. torch's global
random state is neither read nor changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

__all__ = ["Layout", "make_cu_seqlens", "make_lengths", "make_packed_qkv", "make_qkv", "poison"]

Layout = Literal["bshd", "bhsd_view"]


def make_qkv(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    num_heads: int,
    num_heads_kv: int | None = None,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: Layout = "bshd",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Standard normal q, k and v.

    Args:
        batch, seqlen_q, seqlen_k, num_heads: sizes, at least 1.
        num_heads_kv: heads of k and v, a divisor of ``num_heads``; default ``num_heads``.
        head_dim: size of a query and of a key.
        head_dim_v: size of a value; default ``head_dim``.
        dtype, device: of the result.
        layout: "bshd" gives contiguous tensors. "bhsd_view" gives the same values and shapes as
            views of contiguous (batch, num_heads, seqlen, head_dim) tensors, the strides that
            SDPA and transformers hand over.
        seed: of the generator.

    Returns:
        q (batch, seqlen_q, num_heads, head_dim), k (batch, seqlen_k, num_heads_kv, head_dim) and
        v (batch, seqlen_k, num_heads_kv, head_dim_v).

    Raises:
        ValueError: a size is below 1, the heads do not divide, or the layout is not known.
    """
    num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    _check_sizes(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        num_heads=num_heads,
        num_heads_kv=num_heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
    )
    if num_heads % num_heads_kv:
        raise ValueError(f"num_heads_kv must divide num_heads={num_heads}, got {num_heads_kv}")
    if layout not in ("bshd", "bhsd_view"):
        raise ValueError(f"layout must be 'bshd' or 'bhsd_view', got {layout!r}")
    generator = torch.Generator().manual_seed(seed)

    def draw(seqlen: int, heads: int, dim: int) -> torch.Tensor:
        values = torch.randn(batch, seqlen, heads, dim, generator=generator)
        values = values.to(device=device, dtype=dtype)
        if layout == "bhsd_view":
            values = values.transpose(1, 2).contiguous().transpose(1, 2)
        return values

    q = draw(seqlen_q, num_heads, head_dim)
    k = draw(seqlen_k, num_heads_kv, head_dim)
    v = draw(seqlen_k, num_heads_kv, head_dim_v)
    return q, k, v


def make_packed_qkv(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    num_heads: int,
    num_heads_kv: int | None = None,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Standard normal q, k and v of sequences laid end to end.

    Args:
        lengths_q, lengths_k: tokens of each sequence, at least 1 in total.
        The rest is as for :func:`make_qkv`, and so are the errors.

    Returns:
        q (sum(lengths_q), num_heads, head_dim), k (sum(lengths_k), num_heads_kv, head_dim) and
        v (sum(lengths_k), num_heads_kv, head_dim_v).
    """
    if len(lengths_q) != len(lengths_k):
        raise ValueError(
            f"lengths_k must have as many sequences as lengths_q, got {len(lengths_k)} "
            f"and {len(lengths_q)}"
        )
    q, k, v = make_qkv(
        1,
        sum(lengths_q),
        sum(lengths_k),
        num_heads,
        num_heads_kv,
        head_dim,
        head_dim_v,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    return q[0], k[0], v[0]


def make_lengths(
    batch: int,
    max_length: int,
    *,
    min_length: int = 1,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> torch.Tensor:
    """Sequence lengths, (batch,) int32, uniform over [min_length, max_length].

    One of them, at a random place, is ``max_length``, and with a batch of two or more another one
    is ``min_length``: the ends are where masks go wrong.

    Raises:
        ValueError: ``batch`` is below 1, or not 0 <= min_length <= max_length.
    """
    _check_sizes(batch=batch)
    if not 0 <= min_length <= max_length:
        raise ValueError(
            f"min_length must be between 0 and max_length={max_length}, got {min_length}"
        )
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(
        min_length, max_length + 1, (batch,), generator=generator, dtype=torch.int32
    )
    places = torch.randperm(batch, generator=generator)
    lengths[places[1:2]] = min_length
    lengths[places[:1]] = max_length
    return lengths.to(device)


def make_cu_seqlens(lengths: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """Where each sequence starts when they are laid end to end: (len(lengths) + 1,) int32.

    Args:
        lengths: tokens of each sequence, one dimension; the result is on its device.

    Raises:
        ValueError: ``lengths`` does not have one dimension, or is negative somewhere.
    """
    lengths = torch.as_tensor(lengths, dtype=torch.int32)
    if lengths.dim() != 1:
        raise ValueError(f"lengths must have one dimension, got shape {tuple(lengths.shape)}")
    if bool((lengths < 0).any()):
        raise ValueError(f"lengths must not be negative, got {lengths.tolist()}")
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a tensor with NaN in place and return it, so that what a kernel forgets shows.

    Raises:
        TypeError: the dtype has no NaN.
    """
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"tensor has dtype {tensor.dtype}, which has no NaN")
    with torch.no_grad():
        return tensor.fill_(float("nan"))


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
