"""The contiguous cache: every row has room for max_seqlen tokens.

cache = KVCache(num_layers, batch_size, max_seqlen, num_heads_kv, head_dim)
for layer, block in enumerate(blocks):
    ...
    out = cache.attention(layer, q, k, v, causal=True)   # every layer writes behind the same
cache.advance(k.shape[1])                                # lengths; now the new tokens count
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.nn.arguments import check_positive
from fastattn.nn.base_cache import BaseKVCache
from fastattn.nn.storage import RowsView


class KVCache(BaseKVCache):
    """A contiguous cache: every row has room for max_seqlen tokens from the start.

    Args:
        num_layers: layers of the model that have keys and values of their own.
        batch_size: rows.
        max_seqlen: tokens a row can hold.
        num_heads_kv, head_dim: of the keys.
        head_dim_v: of the values; default head_dim.
        dtype: of q and, unless quantized, of what is stored.
        device: default is torch's.
        quantization: None, "int8" or "fp8" (e4m3).
        scale: where quantized, "token" (one scale a token and head, found when it is written), or
            fixed scales of keys and values: two float32 tensors (num_heads_kv,) or (num_layers,
            num_heads_kv).

    Keys are (num_layers, batch_size, max_seqlen, num_heads_kv, head_dim) in memory. What can be
    called on it: see `BaseKVCache`.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        max_seqlen: int,
        num_heads_kv: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        quantization: str | None = None,
        scale: str | tuple[Tensor, Tensor] = "token",
    ) -> None:
        check_positive("batch_size", batch_size)
        super().__init__(
            num_layers, batch_size, max_seqlen, (batch_size, max_seqlen), num_heads_kv, head_dim,
            head_dim_v, dtype, device, quantization, scale,
        )  # fmt: skip

    @property
    def capacity(self) -> int:
        return self.max_seqlen

    def _grant(self, rows: Sequence[int], ends: Sequence[int]) -> bool:
        return False

    def _keep(self, row: int, length: int) -> None:
        pass

    def _share(self, source: int, target: int, length: int) -> None:
        self._copy([source], [target], length)

    def _reorder(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        moves = [
            (source, target)
            for source, target in zip(sources, targets, strict=True)
            if source != target and self._lengths[source]
        ]
        if moves:
            longest = max(self._lengths[source] for source, _ in moves)
            self._copy([source for source, _ in moves], [target for _, target in moves], longest)

    def _copy(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        index = self._to_device([*sources, *targets]).split(len(sources))
        for store in (self.keys, self.values):
            store.copy_slots(index[0], index[1], length)

    def _view(self, rows: tuple[int, ...], window: slice | None) -> RowsView:
        if window is not None:
            return RowsView(rows, window, window, self.seqlens[window], None)
        # Rows in any order are blocks of max_seqlen tokens: a table selects them without a copy.
        index = self._to_device(rows)
        table = index[:, None].to(torch.int32)
        host = torch.tensor(rows, device="cpu")
        return RowsView(rows, host, slice(None), self.seqlens[index], table)

    def _slots(self, row: int) -> slice | Tensor:
        return slice(row, row + 1)

    def _send_table(self) -> None:
        pass
