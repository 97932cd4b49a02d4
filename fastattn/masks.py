"""Who may attend to whom, as values: small frozen objects joined with `&`.

    Causal() & Lengths(seqlens_k)          a padded batch of a decoder
    Window(128, 0) & Packed(cu_seqlens)    sliding window over packed sequences
    Prefix(lengths)                        bidirectional prefix, causal rest

A joined mask lets a query attend to a key only if every part does. All positional masks share one
idea: each query row sees an interval of keys, `visible_keys`. Query row i stands at key position
`i + seqlen_k - seqlen_q`, so the last query is aligned with the last key ("bottom-right"), as in a
key/value cache. `print(mask.show(6, 6))` draws a mask.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastattn.validation import (
    check_broadcast,
    check_cu_seqlens,
    check_lengths,
    check_tensor,
    describe,
)


@dataclass(frozen=True, eq=False)
class MaskParts:
    """A mask taken apart into the flat arguments of the torch operator; None or -1 where absent."""

    window_left: int = -1
    window_right: int = -1
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    seqlens_q: Tensor | None = None
    seqlens_k: Tensor | None = None
    starts_k: Tensor | None = None
    prefix: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Frame:
    """The problem a mask is put on, for its checks: sizes of one (padded) sequence."""

    num_sequences: int
    num_heads: int
    seqlen_q: int
    seqlen_k: int
    device: torch.device


class Mask:
    """Base of all masks. A new positional mask defines `visible_keys`, `check` and `add_to`."""

    def __and__(self, other: Mask | Tensor) -> Mask:
        return join(self, as_mask(other))

    __rand__ = __and__

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """`mask & tensor` under torch.compile, which takes it for an operation on tensors."""
        if func in (Tensor.__and__, Tensor.__rand__, Tensor.bitwise_and):
            return join(*(as_mask(arg) for arg in args))
        return NotImplemented

    def visible_keys(self, row: Tensor, seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor]:
        """Interval [first, end) of each row's visible keys: two tensors (num_sequences or 1, M)."""
        raise NotImplementedError(f"{type(self).__name__} is not a positional mask")

    def check(self, frame: Frame) -> None:
        """Raises ValueError or TypeError where the mask does not fit the problem."""

    def add_to(self, parts: MaskParts) -> MaskParts:
        """`parts` with this mask joined to it."""
        raise NotImplementedError

    def at(self, index: int, seqlen_q: int, seqlen_k: int) -> Mask:
        """This mask for sequence `index` alone, which has these lengths."""
        return self

    def dense(
        self, seqlen_q: int, seqlen_k: int, device: torch.device | str | None = None
    ) -> Tensor:
        """The mask as a bool tensor (num_sequences or 1, 1, seqlen_q, seqlen_k), True = attend.

        For a packed mask, seqlen_q and seqlen_k are the total numbers of rows.
        """
        row = torch.arange(seqlen_q, device=device)
        col = torch.arange(seqlen_k, device=device)
        first, end = self.visible_keys(row, seqlen_q, seqlen_k)
        visible = (col >= first[..., None]) & (col < end[..., None])
        return visible[:, None]

    def tiles(self, seqlen_q: int, seqlen_k: int, block_m: int, block_n: int) -> Tensor:
        """Tiles of block_m x block_n: 0 not visited, 1 cut by the mask, 2 visible as a whole.

        Returns an int8 tensor (num_sequences or 1, tiles of rows, tiles of keys).
        """
        dense = self.dense(seqlen_q, seqlen_k)[:, 0]
        tiles_q, tiles_k = -(-seqlen_q // block_m), -(-seqlen_k // block_n)
        padding = (0, tiles_k * block_n - seqlen_k, 0, tiles_q * block_m - seqlen_q)
        shape = (-1, tiles_q, block_m, tiles_k, block_n)
        some = torch.nn.functional.pad(dense, padding, value=False).reshape(shape)
        whole = torch.nn.functional.pad(dense, padding, value=True).reshape(shape)
        some, whole = some.any(4).any(2), whole.all(4).all(2)
        return some.to(torch.int8) + (some & whole).to(torch.int8)

    def show(self, seqlen_q: int, seqlen_k: int, index: int = 0) -> str:
        """An ASCII picture of the mask of one sequence: rows are queries, `#` may be attended."""
        dense = self.dense(seqlen_q, seqlen_k)
        rows = dense[min(index, dense.shape[0] - 1), 0].tolist()
        return "\n".join(" ".join("#" if seen else "." for seen in row) for row in rows)


def _full_interval(row: Tensor, seqlen_k: int) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(row)[None], torch.full_like(row, seqlen_k)[None]


@dataclass(frozen=True, eq=False)
class Window(Mask):
    """Keys at most `left` before and `right` after the query's own position; None is unlimited.

    Window(2, 1) on 5 x 5:    # # . . .
                              # # # . .
                              # # # # .
                              . # # # #
                              . . # # #
    """

    left: int | None = None
    right: int | None = None

    def __post_init__(self) -> None:
        for name, size in (("left", self.left), ("right", self.right)):
            if size is None:
                continue
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"Window {name} must be an int or None, got {size!r}")
            if size < 0:
                raise ValueError(f"Window {name} must be >= 0, or None for no limit, got {size}")

    def visible_keys(self, row: Tensor, seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor]:
        first, end = _full_interval(row, seqlen_k)
        position = row + (seqlen_k - seqlen_q)
        if self.left is not None:
            first = torch.maximum(first, position - self.left)
        if self.right is not None:
            end = torch.minimum(end, position + self.right + 1)
        return first, end

    def add_to(self, parts: MaskParts) -> MaskParts:
        def tighter(old: int, new: int | None) -> int:
            if new is None:
                return old
            return new if old < 0 else min(old, new)

        if parts.prefix is not None and self.right == 0:
            raise ValueError(_PREFIX_IS_CAUSAL)
        return replace(
            parts,
            window_left=tighter(parts.window_left, self.left),
            window_right=tighter(parts.window_right, self.right),
        )


@dataclass(frozen=True, eq=False)
class Causal(Window):
    """Keys up to the query's own position, the last query aligned with the last key.

    seqlen_q = 2, seqlen_k = 4:    # # # .
                                   # # # #
    """

    left: None = field(default=None, init=False)
    right: int = field(default=0, init=False)


_PREFIX_IS_CAUSAL = (
    "mask: Prefix joined with a causal mask would hide the prefix again, since joining means both; "
    "Prefix(lengths) is causal outside its prefix already: leave out causal=True or Causal()"
)


@dataclass(frozen=True, eq=False)
class Prefix(Mask):
    """Causal, but the first `lengths[b]` keys are visible to every query (UniLM, prefix LM).

    Prefix([2]) on 4 x 4:    # # . .
                             # # . .
                             # # # .
                             # # # #

    Args:
        lengths: integer tensor (num_sequences,), number of prefix keys of each sequence.
    """

    lengths: Tensor

    def __post_init__(self) -> None:
        check_tensor("Prefix lengths", self.lengths)

    def visible_keys(self, row: Tensor, seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor]:
        first, _ = _full_interval(row, seqlen_k)
        position = row + (seqlen_k - seqlen_q)
        prefix = self.lengths.to(row.device)[:, None]
        return first, torch.maximum(position + 1, prefix).clamp(max=seqlen_k)

    def check(self, frame: Frame) -> None:
        check_lengths(
            "Prefix lengths", self.lengths, frame.num_sequences, frame.seqlen_k, frame.device
        )

    def add_to(self, parts: MaskParts) -> MaskParts:
        if parts.window_right == 0:
            raise ValueError(_PREFIX_IS_CAUSAL)
        lengths = self.lengths
        if parts.prefix is not None:
            lengths = torch.minimum(lengths, parts.prefix)
        return replace(parts, prefix=lengths)

    def at(self, index: int, seqlen_q: int, seqlen_k: int) -> Mask:
        return Prefix(self.lengths[index : index + 1].clamp(max=seqlen_k))


@dataclass(frozen=True, eq=False)
class Lengths(Mask):
    """Padded batches: keys `starts_k[b]` to `seqlens_k[b] - 1` exist, the rest is padding.

    Positions stay those of the padded tensor. Work is in proportion to the keys that exist. With
    `seqlens_q`, query rows past it are padding too and give 0 instead of costing anything.

    Args:
        seqlens_k: integer tensor (batch,), end of the keys of each sequence.
        starts_k: integer tensor (batch,), first key of each sequence (left padding); default 0.
        seqlens_q: integer tensor (batch,), number of query rows; default all.
    """

    seqlens_k: Tensor
    starts_k: Tensor | None = field(default=None, kw_only=True)
    seqlens_q: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("seqlens_k", "starts_k", "seqlens_q"):
            value = getattr(self, name)
            if value is not None or name == "seqlens_k":
                check_tensor(f"Lengths {name}", value)

    def visible_keys(self, row: Tensor, seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor]:
        first, end = _full_interval(row, seqlen_k)
        end = torch.minimum(end, self.seqlens_k.to(row.device)[:, None])
        if self.starts_k is not None:
            first = torch.maximum(first, self.starts_k.to(row.device)[:, None])
        if self.seqlens_q is not None:
            end = torch.where(row < self.seqlens_q.to(row.device)[:, None], end, 0)
        return first, end

    def check(self, frame: Frame) -> None:
        size, keys, device = frame.num_sequences, frame.seqlen_k, frame.device
        check_lengths("Lengths seqlens_k", self.seqlens_k, size, keys, device)
        if self.starts_k is not None:
            check_lengths("Lengths starts_k", self.starts_k, size, keys, device)
        if self.seqlens_q is not None:
            check_lengths("Lengths seqlens_q", self.seqlens_q, size, frame.seqlen_q, device)

    def add_to(self, parts: MaskParts) -> MaskParts:
        def join_by(combine: Any, old: Tensor | None, new: Tensor | None) -> Tensor | None:
            return combine(old, new) if old is not None and new is not None else _either(old, new)

        return replace(
            parts,
            seqlens_k=join_by(torch.minimum, parts.seqlens_k, self.seqlens_k),
            seqlens_q=join_by(torch.minimum, parts.seqlens_q, self.seqlens_q),
            starts_k=join_by(torch.maximum, parts.starts_k, self.starts_k),
        )

    def at(self, index: int, seqlen_q: int, seqlen_k: int) -> Mask:
        one = slice(index, index + 1)
        starts, ends = self.starts_k, self.seqlens_q
        return Lengths(
            self.seqlens_k[one].clamp(max=seqlen_k),
            starts_k=None if starts is None else starts[one],
            seqlens_q=None if ends is None else ends[one].clamp(max=seqlen_q),
        )


def _either(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    return new if old is None else old


def _longest(name: str, longest: int | None, cu_seqlens: Tensor) -> int:
    if longest is None:
        return max(int(cu_seqlens.diff().max()), 0) if cu_seqlens.numel() > 1 else 0
    if isinstance(longest, bool) or not isinstance(longest, (int, torch.SymInt)) or longest < 0:
        raise ValueError(f"{name} must be an int >= 0, got {longest!r}")
    return longest


@dataclass(frozen=True, eq=False, init=False)
class Packed(Mask):
    """Sequences laid end to end without padding: each attends only to itself.

    q is (total_q, num_heads, head_dim), k and v likewise (or with a leading batch axis of 1), and
    every other mask or bias counts positions within its own sequence.

    Args:
        cu_seqlens_q: integer tensor (num_sequences + 1,): 0, then where each sequence ends.
        cu_seqlens_k: the same for keys; default cu_seqlens_q (self-attention).
        max_seqlen_q: longest query sequence; default reads it from cu_seqlens_q, which on a GPU
            waits for the device.
        max_seqlen_k: the same for keys.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    def __init__(
        self,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> None:
        if cu_seqlens_k is None:
            cu_seqlens_k = cu_seqlens_q
            max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
        for name, value in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            check_tensor(name, value)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                "cu_seqlens_q and cu_seqlens_k must have the same number of entries, got "
                f"{describe(cu_seqlens_q)} and {describe(cu_seqlens_k)}"
            )
        set_field = functools.partial(object.__setattr__, self)  # the class is frozen
        set_field("cu_seqlens_q", cu_seqlens_q)
        set_field("cu_seqlens_k", cu_seqlens_k)
        set_field("max_seqlen_q", _longest("max_seqlen_q", max_seqlen_q, cu_seqlens_q))
        set_field("max_seqlen_k", _longest("max_seqlen_k", max_seqlen_k, cu_seqlens_k))

    @property
    def num_sequences(self) -> int:
        """How many sequences are packed."""
        return self.cu_seqlens_q.numel() - 1

    def check_totals(self, total_q: int, total_k: int, device: torch.device) -> None:
        """Raises unless the cumulative lengths cover exactly the packed rows."""
        check_cu_seqlens("cu_seqlens_q", self.cu_seqlens_q, total_q, self.max_seqlen_q, device)
        check_cu_seqlens("cu_seqlens_k", self.cu_seqlens_k, total_k, self.max_seqlen_k, device)

    def add_to(self, parts: MaskParts) -> MaskParts:
        if parts.cu_seqlens_q is not None:
            raise ValueError("mask: two Packed masks cannot be joined")
        return replace(
            parts,
            cu_seqlens_q=self.cu_seqlens_q,
            cu_seqlens_k=self.cu_seqlens_k,
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_k=self.max_seqlen_k,
        )

    def slices(self) -> list[tuple[slice, slice]]:
        """Where each sequence's query rows and keys lie. Reads the lengths on the host."""
        ends_q, ends_k = self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()
        return [
            (slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2]))
            for i in range(self.num_sequences)
        ]

    def dense(
        self, seqlen_q: int, seqlen_k: int, device: torch.device | str | None = None
    ) -> Tensor:
        return Joined((self,)).dense(seqlen_q, seqlen_k, device)


@dataclass(frozen=True, eq=False)
class DenseMask(Mask):
    """Any mask, as a bool tensor that broadcasts to (batch, num_heads, seqlen_q, seqlen_k)."""

    tensor: Tensor

    def __post_init__(self) -> None:
        check_tensor("mask", self.tensor)
        if self.tensor.dtype != torch.bool:
            raise TypeError(
                f"mask must be bool (True = attend), got {describe(self.tensor)}; "
                "pass a floating mask as bias=..."
            )

    def check(self, frame: Frame) -> None:
        shape = (frame.num_sequences, frame.num_heads, frame.seqlen_q, frame.seqlen_k)
        check_broadcast("mask", self.tensor, shape)
        if self.tensor.device != frame.device:
            raise ValueError(f"mask must be on {frame.device} like q, got {describe(self.tensor)}")

    def add_to(self, parts: MaskParts) -> MaskParts:
        tensor = self.tensor[(None,) * (4 - self.tensor.dim())]
        return replace(parts, mask=tensor if parts.mask is None else parts.mask & tensor)

    def at(self, index: int, seqlen_q: int, seqlen_k: int) -> Mask:
        return DenseMask(select_sequence(self.tensor, index, seqlen_q, seqlen_k))

    def dense(
        self, seqlen_q: int, seqlen_k: int, device: torch.device | str | None = None
    ) -> Tensor:
        tensor = self.tensor.to(device or self.tensor.device)
        return tensor[(None,) * (4 - tensor.dim())].expand(-1, -1, seqlen_q, seqlen_k)


def select_sequence(tensor: Tensor, index: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    """A broadcastable (batch, head, row, column) tensor for one sequence and its lengths."""
    tensor = tensor[(None,) * (4 - tensor.dim())]
    if tensor.shape[0] > 1:
        tensor = tensor[index : index + 1]
    if tensor.shape[2] > 1:
        tensor = tensor[:, :, :seqlen_q]
    return tensor[..., :seqlen_k] if tensor.shape[3] > 1 else tensor


@dataclass(frozen=True, eq=False)
class Joined(Mask):
    """Several masks at once: a key is visible if every part shows it. Made by `&`."""

    parts: tuple[Mask, ...]

    def check(self, frame: Frame) -> None:
        for part in self.parts:
            part.check(frame)

    def add_to(self, parts: MaskParts) -> MaskParts:
        for part in self.parts:
            parts = part.add_to(parts)
        return parts

    def at(self, index: int, seqlen_q: int, seqlen_k: int) -> Mask:
        others = (part for part in self.parts if not isinstance(part, Packed))
        return Joined(tuple(part.at(index, seqlen_q, seqlen_k) for part in others))

    def dense(
        self, seqlen_q: int, seqlen_k: int, device: torch.device | str | None = None
    ) -> Tensor:
        packed = find_packed(self)
        if packed is None:
            result = torch.ones(1, 1, seqlen_q, seqlen_k, dtype=torch.bool, device=device)
            for part in self.parts:
                result = result & part.dense(seqlen_q, seqlen_k, device)
            return result
        result = torch.zeros(1, 1, seqlen_q, seqlen_k, dtype=torch.bool, device=device)
        for index, (rows, keys) in enumerate(packed.slices()):
            lengths = (rows.stop - rows.start, keys.stop - keys.start)
            visible = self.at(index, *lengths).dense(*lengths, device)
            if visible.shape[1] > result.shape[1]:
                result = result.repeat(1, visible.shape[1], 1, 1)
            result[:, :, rows, keys] = visible
        return result


def as_mask(mask: Mask | Tensor) -> Mask:
    """A mask value from what users pass: a mask, or a bool tensor."""
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, Tensor):
        return DenseMask(mask)
    raise TypeError(
        "mask must be a bool tensor or a mask such as Causal(), Window(left, right), "
        f"Prefix(lengths), Lengths(seqlens_k), Packed(cu_seqlens_q), got {mask!r}"
    )


def join(*masks: Mask) -> Mask:
    """All masks at once; impossible combinations raise ValueError."""
    parts: list[Mask] = []
    for mask in masks:
        parts.extend(mask.parts if isinstance(mask, Joined) else (mask,))
    joined = parts[0] if len(parts) == 1 else Joined(tuple(parts))
    take_apart(joined)
    return joined


def find_packed(mask: Mask | None) -> Packed | None:
    """The Packed part of a mask, if it has one."""
    parts = mask.parts if isinstance(mask, Joined) else (mask,)
    return next((part for part in parts if isinstance(part, Packed)), None)


def take_apart(mask: Mask | None) -> MaskParts:
    """The flat arguments of the torch operator that say the same as `mask`."""
    return MaskParts() if mask is None else mask.add_to(MaskParts())
