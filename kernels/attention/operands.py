"""From torch tensors to the named tuples that kernels take.

No operand is copied or expanded. Only vectors of lengths, indices and sinks, which kernels read
with a stride of 1, are made contiguous where they are not.
"""

from typing import NamedTuple

import torch

from fastattn.kernels.attention.tile import (
    Distances,
    Dropout,
    HeadScalars,
    Masks,
    Plane,
    Rows,
    RowScalars,
    Scores,
    Shape,
    Terms,
)


class Modifiers(NamedTuple):  # made for every call: cheaper than a frozen dataclass
    """All that stands between `q @ k.T` and the softmax, already validated.

    Windows are -1 where unlimited. Lengths are integer tensors with an entry a sequence. `mask`
    (bool) and `bias` are (batch, head, row, column) with broadcast axes of size 1 or stride 0.
    `alibi_slopes` is (batch or 1, num_heads), `relative_bias` (num_heads, 2 * radius + 1),
    `sinks` (num_heads,), `dropout_seed` int64 (1,), used where dropout_p > 0. max_seqlen_* count
    only with cu_seqlens_*.
    """

    softmax_scale: float
    softcap: float = 0.0
    dropout_p: float = 0.0
    window_left: int = -1
    window_right: int = -1
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    seqlens_q: torch.Tensor | None = None
    seqlens_k: torch.Tensor | None = None
    starts_k: torch.Tensor | None = None
    prefix: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    relative_bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    dropout_seed: torch.Tensor | None = None

    @property
    def has_bias(self) -> bool:
        """Whether anything is added to the scaled products."""
        biases = (self.bias, self.alibi_slopes, self.relative_bias)
        return any(bias is not None for bias in biases)

    @property
    def num_modifiers(self) -> int:
        """How many modifiers need registers of their own.

        Softcap, biases, dense mask, dropout, a cut on the left.
        """
        tensors = (self.bias, self.alibi_slopes, self.relative_bias, self.mask)
        cut_left = self.window_left >= 0 or self.starts_k is not None
        flags = (self.softcap > 0, self.dropout_p > 0, cut_left)
        return sum(tensor is not None for tensor in tensors) + sum(flags)

    @property
    def backward_count(self) -> int:
        """The same for the backward pass, where the bounds of packed sequences count as one too."""
        return max(self.num_modifiers, self.cu_seqlens_q is not None)

    @property
    def lazy_scale(self) -> bool:
        """Whether the scale may wait for the exponential: nothing is added to the scores before.

        Only a positive scale commutes with the maximum.
        """
        added = self.has_bias or self.sinks is not None
        return self.softmax_scale > 0 and self.softcap == 0 and not added


def vector(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A one-dimensional operand with a stride of 1."""
    return None if tensor is None else tensor.contiguous()


def rows(tensor: torch.Tensor | None) -> Rows:
    """(batch, row, head, dim), or packed (row, head, dim)."""
    if tensor is None:
        return Rows(None, None, None, None, None)
    stride_batch = tensor.stride(0) if tensor.dim() == 4 else 0
    return Rows(tensor, stride_batch, tensor.stride(-3), tensor.stride(-2), tensor.stride(-1))


def row_scalars(tensor: torch.Tensor | None) -> RowScalars:
    """(batch, head, row), or packed (head, row)."""
    if tensor is None:
        return RowScalars(None, None, None, None)
    stride_batch = tensor.stride(0) if tensor.dim() == 3 else 0
    return RowScalars(tensor, stride_batch, tensor.stride(-2), tensor.stride(-1))


def softmax_rows(stats: torch.Tensor | None) -> tuple[RowScalars, RowScalars]:
    """Both parts of the saved softmax, (2, batch, head, row): largest score, log2 of the sum."""
    if stats is None:
        return row_scalars(None), row_scalars(None)
    return row_scalars(stats[0]), row_scalars(stats[1])


def plane(tensor: torch.Tensor | None) -> Plane:
    """(batch, head, row, column); axes of size 1 are broadcast."""
    if tensor is None:
        return Plane(None, None, None, None, None)
    if tensor.dtype == torch.bool:
        tensor = tensor.view(torch.uint8)
    batch, head, row, col = (
        0 if size == 1 else tensor.stride(axis) for axis, size in enumerate(tensor.shape)
    )
    return Plane(tensor, batch, head, row or None, col or None)


def problem_shape(q: torch.Tensor, k: torch.Tensor, modifiers: Modifiers) -> Shape:
    """Sizes of the frame: the longest sequences of a packed batch, else the tensors' own."""
    packed = modifiers.cu_seqlens_q is not None
    seqlen_q = modifiers.max_seqlen_q if packed else q.shape[1]
    seqlen_k = modifiers.max_seqlen_k if packed else k.shape[1]
    return Shape(seqlen_q, seqlen_k, q.shape[-2], q.shape[-2] // k.shape[-2])


def masks(modifiers: Modifiers) -> Masks:
    """The masks as a kernel takes them."""
    return Masks(
        cu_seqlens_q=vector(modifiers.cu_seqlens_q),
        cu_seqlens_k=vector(modifiers.cu_seqlens_k),
        seqlens_q=vector(modifiers.seqlens_q),
        seqlens_k=vector(modifiers.seqlens_k),
        starts_k=vector(modifiers.starts_k),
        prefix=vector(modifiers.prefix),
        window_left=None if modifiers.window_left < 0 else modifiers.window_left,
        window_right=None if modifiers.window_right < 0 else modifiers.window_right,
    )


def scores(modifiers: Modifiers) -> Scores:
    """Scale, softcap and sinks as a kernel takes them."""
    softcap = float(modifiers.softcap) or None
    return Scores(float(modifiers.softmax_scale), softcap, vector(modifiers.sinks))


def dropout(modifiers: Modifiers) -> Dropout:
    """Dropout as a kernel takes it."""
    p = modifiers.dropout_p
    if p == 0:
        return Dropout(None, None, None)
    # The threshold is that of `fastattn.dropout`.
    threshold = min(round(p * 2**32), 2**32 - 1)
    return Dropout(modifiers.dropout_seed, threshold, 1.0 / (1.0 - p))


def terms(modifiers: Modifiers) -> Terms:
    """Dense mask and biases as a kernel takes them, one by one."""
    alibi = HeadScalars(None, None, None)
    if (slopes := modifiers.alibi_slopes) is not None:
        stride_batch = 0 if slopes.shape[0] == 1 else slopes.stride(0)
        alibi = HeadScalars(slopes, stride_batch, slopes.stride(1))
    relative = Distances(None, None, None)
    if (table := modifiers.relative_bias) is not None:
        relative = Distances(table, table.stride(0), table.shape[1] // 2)
    return Terms(plane(modifiers.mask), plane(modifiers.bias), alibi, relative)


def needs_wide_offsets(*tensors: torch.Tensor | None, rows_per_tile: int) -> bool:
    """Whether offsets within one tile can pass 2**31 elements (between tiles they are 64 bit)."""
    return any(
        rows_per_tile * abs(t.stride(-3)) + t.shape[-1] * abs(t.stride(-1)) >= 2**31
        for t in tensors
        if t is not None
    )
