"""Memory of a cache: keys or values of all layers, quantised or not."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastattn.decoding import CheckedCalls
from fastattn.quantized import Quantized
from fastattn.validation import check_tensor, describe

QUANTIZED_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_COPY_BYTES = 64 * 2**20  # tokens are moved through a temporary of about this size at most


@dataclass(frozen=True, eq=False)
class Storage:
    """Keys or values of all layers, in slots: the rows of a contiguous cache, or blocks.

    values: (num_layers, num_slots, slot_length, num_heads_kv, dim).
    scale: float32 values.shape[:-1] per token, (num_layers, num_heads_kv) per head, None unscaled.
    """

    values: Tensor
    scale: Tensor | None

    def layer(self, layer: int, slots: slice | Tensor = slice(None)) -> Tensor | Quantized:
        """Some slots of one layer, as `attention_with_kv_cache` takes them; a slice is no copy."""
        values = self._layers[layer]
        if isinstance(slots, Tensor):
            values = _select(values, 0, slots)
        else:
            values = values[slots]
        if self.scale is None:
            return values
        scale = self.scale[layer]
        return Quantized(values, scale if scale.dim() == 1 else scale[slots])

    def copy_slots(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """The first `length` tokens of slots `sources` also to `targets`, in every layer."""
        for tensor in self._per_token():
            step = max(1, _COPY_BYTES // max(1, sources.numel() * tensor[0, 0, :length].nbytes))
            for part in tensor[:, :, :length].split(step):
                part.index_copy_(1, targets, _select(part, 1, sources))

    @functools.cached_property
    def _layers(self) -> tuple[Tensor, ...]:
        # Each layer of each step asks for its own.
        with torch.inference_mode(False):
            return self.values.unbind(0)

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def _per_token(self) -> Iterator[Tensor]:
        yield _as_movable(self.values)
        if self.scale is not None and self.scale.dim() > 2:
            yield self.scale


def _as_movable(tensor: Tensor) -> Tensor:
    """The same memory in a dtype that indexing knows: torch cannot index float8 everywhere."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _select(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    return _as_movable(tensor).index_select(dim, index).view(tensor.dtype)


@dataclass(eq=False)
class RowsView:
    """What a call on some rows hands to the attention function; kept while nothing changes."""

    rows: tuple[int, ...]
    index: slice | Tensor  # the rows, for indexing on the host
    slots: slice  # of the storage
    seqlens: Tensor
    block_table: Tensor | None
    room: int = 0  # tokens a row that have room already
    attend: CheckedCalls = field(default_factory=CheckedCalls)


def check_scale(
    quantization: str | None, scale: Any, num_layers: int, num_heads_kv: int
) -> tuple[Tensor | None, Tensor | None]:
    """The fixed scales of keys and values, or None twice."""
    if quantization is not None and quantization not in QUANTIZED_DTYPES:
        raise ValueError(f'quantization must be None, "int8" or "fp8", got {quantization!r}')
    if isinstance(scale, str) and scale == "token":
        return None, None
    if quantization is None:
        raise ValueError("scale is for a quantized cache, and quantization is None")
    if not isinstance(scale, (tuple, list)) or len(scale) != 2:
        raise TypeError(f'scale must be "token" or two tensors, of keys and values, got {scale!r}')
    for part in scale:
        check_tensor("scale", part)
        shapes = ((num_heads_kv,), (num_layers, num_heads_kv))
        if part.dtype != torch.float32 or tuple(part.shape) not in shapes:
            raise ValueError(
                f"scale must be float32 of shape {shapes[0]} or {shapes[1]}, got {describe(part)}"
            )
    return scale[0].detach(), scale[1].detach()
