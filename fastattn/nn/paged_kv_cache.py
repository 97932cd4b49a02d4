"""The paged cache: rows take fixed-size blocks from a common pool as they grow, and may share them.

cache = PagedKVCache(num_layers, num_blocks, block_size, num_heads_kv, head_dim,
                     max_batch=64, max_seqlen=8192)
cache.attention(layer, q, k, v, causal=True, rows=[3])    # continuous batching: one prompt in
cache.advance(k.shape[1], rows=[3])
cache.fork(3, 4)                                          # no key is copied
cache.free(3)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from fastattn.nn.arguments import check_positive
from fastattn.nn.base_cache import BaseKVCache
from fastattn.nn.block_allocator import BlockAllocator
from fastattn.nn.storage import RowsView


class PagedKVCache(BaseKVCache):
    """A pool of blocks, of which each row holds as many as its tokens need.

    Memory is what the pool has, whatever max_batch * max_seqlen would be. Rows that share a prefix
    share its blocks, which count their owners; a shared block is copied when a row is about to
    write to it, in all layers, and the room that takes is part of what `reserve` asks for.

    Args:
        num_layers: layers of the model that have keys and values of their own.
        num_blocks: blocks in the pool.
        block_size: tokens in a block.
        num_heads_kv, head_dim: of the keys.
        max_batch: rows.
        max_seqlen: tokens a row can hold.
        head_dim_v: of the values; default head_dim.
        dtype: of q and, unless quantized, of what is stored.
        device: default is torch's.
        quantization: None, "int8" or "fp8" (e4m3).
        scale: where quantized, "token" (one scale a token and head, found when it is written), or
            fixed scales of keys and values: two float32 tensors (num_heads_kv,) or (num_layers,
            num_heads_kv).

    Keys are (num_layers, num_blocks, block_size, num_heads_kv, head_dim) in memory. Entries of
    `block_table` beyond a row's blocks are 0 and never read. What can be called on it: see
    `BaseKVCache`. Whatever takes blocks raises CacheFullError where too few are free, and changes
    nothing.
    """

    block_table: Tensor

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_heads_kv: int,
        head_dim: int,
        *,
        max_batch: int,
        max_seqlen: int,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        quantization: str | None = None,
        scale: str | tuple[Tensor, Tensor] = "token",
    ) -> None:
        for name, size in (("block_size", block_size), ("max_batch", max_batch)):
            check_positive(name, size)
        self.allocator = BlockAllocator(num_blocks)
        self.block_size = block_size
        super().__init__(
            num_layers, max_batch, max_seqlen, (num_blocks, block_size), num_heads_kv, head_dim,
            head_dim_v, dtype, device, quantization, scale,
        )  # fmt: skip
        self._max_blocks = self._blocks_for(max_seqlen)
        with torch.inference_mode(False):
            self.block_table = torch.zeros(
                max_batch, self._max_blocks, dtype=torch.int32, device=self.device
            )
        self._tables: list[list[int]] = [[] for _ in range(max_batch)]
        self._unsent: dict[int, int] = {}  # entries of the flattened table, not yet on the device

    @property
    def capacity(self) -> int:
        return self._max_blocks * self.block_size

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self.allocator.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no row holds."""
        return self.allocator.num_free

    def blocks(self, row: int) -> tuple[int, ...]:
        """The blocks a row holds, in order, as the host knows them."""
        return tuple(self._tables[self._check_row("row", row)])

    def blocks_needed(
        self, n: int | Sequence[int] | Tensor, *, rows: Sequence[int] | Tensor | None = None
    ) -> int:
        """Free blocks that `reserve` would take with the same arguments: for a scheduler."""
        chosen, ends = self._check_room(n, rows)
        return sum(map(len, self._plan(chosen, ends)))

    def _occupancy(self) -> str:
        allocator = self.allocator
        return (
            f"{allocator.num_used} of {allocator.num_blocks} blocks of {self.block_size} used, "
            f"{allocator.num_shared} shared"
        )

    def _blocks_for(self, length: int) -> int:
        return -(-length // self.block_size)

    def _plan(
        self, rows: Sequence[int], ends: Sequence[int]
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Entries (row, column) to copy because the block is shared, and entries to add."""
        copies: list[tuple[int, int]] = []
        added: list[tuple[int, int]] = []
        owners: dict[int, int] = {}  # left, once the copies planned so far are made
        for row, end in zip(rows, ends, strict=True):
            table, length = self._tables[row], self._lengths[row]
            if end == length:
                continue
            wanted = self._blocks_for(end)
            for column in range(length // self.block_size, min(len(table), wanted)):
                block = table[column]
                left = owners.setdefault(block, self.allocator.owners(block))
                if left > 1:
                    owners[block] = left - 1
                    copies.append((row, column))
            added.extend((row, column) for column in range(len(table), wanted))
        return copies, added

    def _grant(self, rows: Sequence[int], ends: Sequence[int]) -> bool:
        copies, added = self._plan(rows, ends)
        if not copies and not added:
            return False
        self._refuse_capture("taking blocks")
        fresh = self.allocator.allocate(len(copies) + len(added))
        shared = [self._tables[row][column] for row, column in copies]
        try:
            self._copy_blocks(shared, fresh[: len(copies)])
        except BaseException:
            self.allocator.release(fresh)
            raise
        for (row, column), block in zip(copies + added, fresh, strict=True):
            self._tables[row][column:] = [block, *self._tables[row][column + 1 :]]
            self._unsent[row * self._max_blocks + column] = block
        self.allocator.release(shared)
        return True

    def _copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        if sources:
            index = self._to_device([*sources, *targets]).split(len(sources))
            for store in (self.keys, self.values):
                # Whole blocks: a step that has begun may have written behind the row's length.
                store.copy_slots(index[0], index[1], self.block_size)

    def _keep(self, row: int, length: int) -> None:
        kept = self._blocks_for(length)
        if kept < len(self._tables[row]):
            self._replace([row], [self._tables[row][:kept]])

    def _share(self, source: int, target: int, length: int) -> None:
        self._replace([target], [self._tables[source][: self._blocks_for(length)]])

    def _reorder(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        tables = [
            self._tables[source][: self._blocks_for(self._lengths[source])] for source in sources
        ]
        self._replace(targets, tables)

    def _replace(self, rows: Sequence[int], tables: Sequence[list[int]]) -> None:
        """Gives rows other tables: first all gain their owners, then the old ones lose theirs."""
        for table in tables:
            self.allocator.retain(table)
        for row, table in zip(rows, tables, strict=True):
            old, self._tables[row] = self._tables[row], list(table)
            self.allocator.release(old[::-1])
            pairs = zip_longest(old, table, fillvalue=0)
            for column, (before, after) in enumerate(pairs):
                if before != after:
                    self._unsent[row * self._max_blocks + column] = after

    def _send_table(self) -> None:
        if self._unsent:
            entries = self._to_device([*self._unsent, *self._unsent.values()])
            where, blocks = entries.split(len(self._unsent))
            self.block_table.view(-1).index_copy_(0, where, blocks.to(torch.int32))
            self._unsent.clear()

    def _view(self, rows: tuple[int, ...], window: slice | None) -> RowsView:
        everything = slice(None)
        if window is not None:
            return RowsView(
                rows, window, everything, self.seqlens[window], self.block_table[window]
            )
        index, host = self._to_device(rows), torch.tensor(rows, device="cpu")
        return RowsView(rows, host, everything, self.seqlens[index], self.block_table[index])

    def _slots(self, row: int) -> slice | Tensor:
        return self._to_device(self._tables[row][: self._blocks_for(self._lengths[row])])
