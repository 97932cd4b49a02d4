"""What the contiguous and the paged cache share: all that a decoder calls."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastattn.decoding import append_to_kv_cache
from fastattn.nn.arguments import as_integers, per_row
from fastattn.nn.cache_state import CacheState, Stored
from fastattn.nn.storage import RowsView
from fastattn.quantized import Quantized
from fastattn.rotary import Rotary
from fastattn.validation import check_tensor, describe


class BaseKVCache(CacheState):
    """What the contiguous and the paged cache share: all that a decoder calls.

    One object holds all layers. A step is: every layer calls `attention` (or `append`), which
    writes its new tokens behind the row's length, then one `advance` makes them count. Rows may
    advance by fewer tokens than were written: right-padded prompts, rejected speculation. What is
    written and not counted is dropped by `rollback`, `crop`, `free`, `reset` and `reorder`.

    The host keeps the lengths as ints, so every bound is checked before anything is launched, and
    no method waits for the device: it is only sent copies. A call that raises has changed nothing
    that can be read back, and holds no block that it did not before (but for copies of shared
    blocks, which a row keeps if the attention function itself refuses its arguments).

    `rows=` names the rows of the batch that a call is about, in the order of its tensors: a
    sequence of ints without repetition; None is all rows. (Any integer argument may be a tensor
    too. Reading one that is on a GPU waits for the device; every other call here does not.)

    torch.compile. The lengths on the host would be guarded, and each step compiled anew: compile a
    function that calls `attention_with_kv_cache` on `layer(i)`, `seqlens` and `block_table`, with
    `reserve` before it and `advance(..., replayed=True)` after it.

    CUDA graphs. `seqlens` and `block_table` never move, so a graph that was captured over the
    layers' calls reads the lengths of the moment it is replayed. The host does not see a replay:

        cache.reserve(1)                          # room; also once before the capture
        graph.replay()                            # the layers' attention of one step
        cache.advance(1, replayed=True)           # checked against the reserved room

    `advance` sends the lengths to the device. To replay several steps without the host in between,
    let the graph count by itself, with `cache.seqlens.add_(1)` after its last layer: reserve(n),
    n replays, advance(n, replayed=True), which then sends what the device has already. A graph
    writes to every row it was captured over, idle ones too: reserve room in those as well, and
    advance them by 0. Capture over all rows or over consecutive ones; others need an index copy,
    which is refused. Captured calls run nothing, and so they do not count as written; a warm-up
    that ran `seqlens.add_` is undone by `rollback(0)`, after which room is to be reserved anew.

    Attributes:
        seqlens: int32 (max_batch,) on the device, tokens in each row. Updated in place.
        block_table: int32 (max_batch, max_blocks) of a paged cache, else None. Updated in place.
        num_layers, max_batch, max_seqlen, num_heads_kv, head_dim, head_dim_v, dtype, device,
        quantization: as built.
        keys, values: `Storage` of all layers.
    """

    # ---- reading

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Columns of a dense mask or bias that is given to `attention`."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in each row, as the host knows them."""
        return tuple(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory: keys, values, scales, lengths and table, used or not."""
        table = 0 if self.block_table is None else self.block_table.nbytes
        return self.keys.nbytes + self.values.nbytes + self.seqlens.nbytes + table

    def layer(self, layer: int) -> tuple[Tensor | Quantized, Tensor | Quantized]:
        """k_cache and v_cache of one layer, as `attention_with_kv_cache` takes them. No copy."""
        self._check_layer(layer)
        return self.keys.layer(layer), self.values.layer(layer)

    def read(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Keys (length, num_heads_kv, head_dim) and values of one row, dequantized. A copy."""
        self._check_layer(layer)
        length, result = self._lengths[self._check_row("row", row)], []
        for store in (self.keys, self.values):
            part = store.layer(layer, self._slots(row))
            part = part.dequantize(self.dtype) if isinstance(part, Quantized) else part
            result.append(part.flatten(0, 1)[:length].clone())
        return result[0], result[1]

    def __repr__(self) -> str:
        used = sum(length > 0 for length in self._lengths)
        stored = self.quantization or str(self.dtype).removeprefix("torch.")
        return (
            f"{type(self).__name__}({used} of {self.max_batch} rows hold {sum(self._lengths)} "
            f"tokens, max_seqlen {self.max_seqlen}, {self._occupancy()}, {self.num_layers} layers, "
            f"{self.num_heads_kv} heads, head_dim {self.head_dim}, {stored}, "
            f"{self.nbytes / 2**20:.1f} MiB on {self.device})"
        )

    def _occupancy(self) -> str:
        return f"{sum(self._lengths) / (self.max_batch * self.max_seqlen):.0%} full"

    # ---- writing

    def attention(
        self,
        layer: int,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        rows: Sequence[int] | Tensor | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`attention_with_kv_cache` on one layer: writes k and v behind the lengths, then attends.

        Args:
            layer: 0 to num_layers - 1.
            q: (batch, seqlen_q, num_heads, head_dim), batch = max_batch or len(rows).
            k, v: new tokens (batch, seqlen_new, num_heads_kv, head_dim or head_dim_v), which q
                attends to. Without them q attends to what counts already (cross-attention).
            rows: which rows the batch stands for.
            options: causal, rotary, mask, bias, softmax_scale, ..., impl of that function.

        Returns:
            As `attention_with_kv_cache`.

        Raises:
            ValueError: a row would grow beyond max_seqlen, or what that function raises.
            CacheFullError: a paged cache has too few free blocks for k and v.
        """
        for name in ("cache_seqlens", "block_table"):
            if name in options:
                raise TypeError(f"{name} is the cache's own, got {options[name]!r}")
        check_tensor("q", q)
        batch = len(self._select_rows(rows).rows)
        if q.dim() != 4 or q.shape[0] != batch:
            raise ValueError(
                f"q must be (batch, seqlen_q, num_heads, head_dim) with batch {batch}, the number "
                f"of rows, got {describe(q)}"
            )

        def attend(
            view: RowsView, k_cache: Stored, v_cache: Stored
        ) -> Tensor | tuple[Tensor, Tensor]:
            return view.attend(
                q, k_cache, v_cache, k, v, cache_seqlens=view.seqlens,
                block_table=view.block_table, **options,
            )  # fmt: skip

        return self._write(layer, rows, k, attend)

    def append(
        self,
        layer: int,
        k: Tensor,
        v: Tensor,
        *,
        rotary: Rotary | None = None,
        rows: Sequence[int] | Tensor | None = None,
        impl: str = "auto",
    ) -> None:
        """Writes k and v behind the lengths, as `attention` does, without attending."""

        def append(view: RowsView, k_cache: Stored, v_cache: Stored) -> None:
            append_to_kv_cache(
                k_cache, v_cache, k, v, cache_seqlens=view.seqlens,
                block_table=view.block_table, rotary=rotary, impl=impl,
            )  # fmt: skip

        self._write(layer, rows, k, append)

    def advance(
        self,
        n: int | Sequence[int] | Tensor,
        *,
        rows: Sequence[int] | Tensor | None = None,
        replayed: bool = False,
    ) -> None:
        """Makes the first `n` of the tokens that the layers wrote in this step count.

        Args:
            n: for all rows, or one count a row. What was written beyond it is dropped.
            replayed: the layers ran in a replayed CUDA graph, which the host did not see: `n` may
                go up to what `reserve` made room for. (See the class.)

        Raises:
            ValueError: a layer has not written that many tokens to a row, or they were not
                reserved; names the row.
        """
        self._refuse_capture("advance")
        chosen = self._check_rows(rows)
        counts = per_row("n", n, chosen)
        if replayed:
            limits = [max(0, self._reserved[row] - self._lengths[row]) for row in chosen]
        else:
            limits = self._written[:, list(chosen)].amin(0).tolist()
        for row, count, limit in zip(chosen, counts, limits, strict=True):
            if not 0 <= count <= limit:
                what = "room is reserved for" if replayed else "every layer has written"
                raise ValueError(
                    f"n must lie in 0..{limit} for row {row}: {what} {limit} tokens behind its "
                    f"length {self._lengths[row]}, got {count}"
                )
        for row, count in zip(chosen, counts, strict=True):
            self._lengths[row] += count
        self._written[:, list(chosen)] = 0
        self._release_unused(chosen)
        self._changed()

    def reserve(
        self, n: int | Sequence[int] | Tensor, *, rows: Sequence[int] | Tensor | None = None
    ) -> None:
        """Makes room for `n` more tokens: for all rows or none of them.

        `attention` and `append` do so by themselves for what they write. The room stays reserved
        until the row has grown into it, or is rolled back, cropped, reordered or freed.

        Raises:
            ValueError: a row would grow beyond max_seqlen.
            CacheFullError: too few free blocks (paged).
        """
        chosen, ends = self._check_room(n, rows)
        if self._grant(chosen, ends):
            self._views.clear()
            self._send_table()
        for row, end in zip(chosen, ends, strict=True):
            self._reserved[row] = max(self._reserved[row], end)

    # ---- rows

    def rollback(
        self, n: int | Sequence[int] | Tensor, *, rows: Sequence[int] | Tensor | None = None
    ) -> None:
        """Takes back the last `n` tokens, of each row or one count a row."""
        chosen = self._check_rows(rows)
        counts = per_row("n", n, chosen)
        for row, count in zip(chosen, counts, strict=True):
            if not 0 <= count <= self._lengths[row]:
                raise ValueError(
                    f"n must lie in 0..{self._lengths[row]} for row {row}, its length, got {count}"
                )
        kept = [self._lengths[row] - count for row, count in zip(chosen, counts, strict=True)]
        self._shorten("rollback", chosen, kept)

    def crop(
        self,
        max_length: int | Sequence[int] | Tensor,
        *,
        rows: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Rows longer than `max_length` (one number, or one a row) keep their first tokens."""
        chosen = self._check_rows(rows)
        limits = per_row("max_length", max_length, chosen)
        if min(limits) < 0:
            raise ValueError(f"max_length must be >= 0, got {min(limits)}")
        kept = [min(self._lengths[row], limit) for row, limit in zip(chosen, limits, strict=True)]
        self._shorten("crop", chosen, kept)

    def free(self, rows: int | Sequence[int] | Tensor) -> None:
        """Empties one row, or several."""
        if rows is None:
            raise TypeError("rows must name the rows to free, got None: reset() empties all")
        chosen = self._check_rows(rows)
        self._shorten("free", chosen, [0] * len(chosen))

    def reset(self) -> None:
        """Empties all rows."""
        self._shorten("reset", range(self.max_batch), [0] * self.max_batch)

    def reorder(
        self,
        beam_index: Sequence[int] | Tensor,
        *,
        rows: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Row i becomes what row beam_index[i] was; indices may repeat (beam search).

        Args:
            beam_index: one index a row, into `rows` where that is given.

        A paged cache only moves table entries: no key is copied until a shared last block is
        written to. A contiguous one copies the live tokens of the rows that change, in place. A
        list costs nothing more; a tensor on a GPU is read, which waits for the device.
        """
        self._refuse_capture("reorder")
        chosen = self._check_rows(rows)
        index = as_integers("beam_index", beam_index)
        if len(index) != len(chosen):
            raise ValueError(
                f"beam_index must have one entry a row, {len(chosen)}, got {len(index)}: "
                f"{list(index)}"
            )
        for entry in index:
            if not 0 <= entry < len(chosen):
                raise ValueError(f"beam_index must lie in 0..{len(chosen) - 1}, got {entry}")
        sources = [chosen[entry] for entry in index]
        self._reorder(chosen, sources)
        lengths = [self._lengths[row] for row in sources]
        self._shorten("reorder", chosen, lengths)

    def share_prefix(self, source: int, target: int, length: int) -> None:
        """Gives the empty row `target` the first `length` tokens of row `source`.

        A paged cache shares the blocks, the last one too if it is partly filled: whoever writes to
        a shared block first gets a copy of its own. A contiguous cache copies.
        """
        self._refuse_capture("share_prefix")
        self._check_row("source", source)
        self._check_row("target", target)
        (length,) = as_integers("length", (length,))
        if source == target:
            raise ValueError(f"target must be another row than source, got {target} for both")
        if self._lengths[target] or self._written[:, target].any():
            raise ValueError(
                f"target must be an empty row, row {target} has {self._lengths[target]} tokens "
                "or some that were written and not counted: free it first"
            )
        if not 0 <= length <= self._lengths[source]:
            raise ValueError(
                f"length must lie in 0..{self._lengths[source]}, the length of source row "
                f"{source}, got {length}"
            )
        self._shorten("share_prefix", (target,), (0,), send=False)  # also what it has reserved
        self._share(source, target, length)
        self._lengths[target] = length
        self._changed()

    def fork(self, source: int, target: int) -> None:
        """`share_prefix` of the whole row."""
        self.share_prefix(source, target, self._lengths[self._check_row("source", source)])
