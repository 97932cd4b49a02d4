"""The launcher's side of a key/value cache: its tensors, and how kernels take them."""

from dataclasses import dataclass

import torch

from fastattn.kernels.attention.cache import Paging, Rotary, Scale
from fastattn.kernels.attention.config import chip_of
from fastattn.kernels.attention.operands import rows
from fastattn.kernels.attention.tile import Rows


@dataclass(frozen=True)
class CachedKeys:
    """A cache, how full it is, and what is to be appended, already validated.

    k and v are (batch, max_seqlen, num_heads_kv, dim), or with a `block_table` (batch, max_blocks)
    (num_blocks, block_size, num_heads_kv, dim): of q's dtype, or int8, float8_e4m3fn or uint8 (the
    bits of e4m3) with float32 scales (num_heads_kv,), or one for each row and head (the cache's
    shape without dim). `seqlens` (batch,) counts tokens before the new ones; None is full.
    `k_new`, `v_new` are (batch, seqlen_new, num_heads_kv, dim). `cos` and `sin` are (position,
    rotary_dim // 2), `positions` (batch, seqlen_new).
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    k_new: torch.Tensor | None = None
    v_new: torch.Tensor | None = None
    seqlens: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    interleaved: bool = False

    @property
    def block_size(self) -> int | None:
        """Rows of a block; None for a contiguous cache."""
        return None if self.block_table is None else self.k.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that a sequence has room for."""
        if self.block_table is None:
            return self.k.shape[1]
        return self.block_table.shape[1] * self.k.shape[1]

    @property
    def seqlen_new(self) -> int:
        """Rows to append to each sequence."""
        return 0 if self.k_new is None else self.k_new.shape[1]

    @property
    def rotary_dim(self) -> int:
        """Dimensions that are rotated."""
        return 0 if self.cos is None else 2 * self.cos.shape[1]


def storage(cached: CachedKeys) -> tuple[Rows, Rows, Scale, Scale]:
    """Both caches and their scales as a kernel takes them."""
    return rows(cached.k), rows(cached.v), scale(cached.k_scale), scale(cached.v_scale)


def scale(tensor: torch.Tensor | None) -> Scale:
    """(num_heads_kv,), or (batch or block, row, head)."""
    if tensor is None:
        return Scale(None, None, None, None)
    if tensor.dim() == 1:
        return Scale(tensor, None, None, tensor.stride(0))
    return Scale(tensor, *tensor.stride())


def paging(cached: CachedKeys) -> Paging:
    """The block table as a kernel takes it."""
    if (table := cached.block_table) is None:
        return Paging(None, None)
    if table.stride(1) != 1:
        table = table.contiguous()
    return Paging(table, table.stride(0))


def rotary(cached: CachedKeys) -> Rotary:
    """Tables of angles as a kernel takes them."""
    if cached.cos is None or cached.sin is None:
        return Rotary(*[None] * 10)
    positions = cached.positions
    strides = (None, None) if positions is None else positions.stride()
    tables = (cached.cos, cached.sin, *cached.cos.stride(), *cached.sin.stride())
    return Rotary(*tables, cached.cos.shape[0], positions, *strides)


def readable(values: torch.Tensor) -> torch.Tensor:
    """A cache as its chip can read it: e4m3 as bytes where no instruction converts it."""
    if values.dtype == torch.float8_e4m3fn and chip_of(values.device) in ("sm_80", "gfx942"):
        return values.view(torch.uint8)
    return values
