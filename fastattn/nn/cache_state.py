"""What a cache holds: its tensors, and the lengths of its rows on the host and the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fastattn.nn.arguments import as_integers, check_positive, per_row
from fastattn.nn.storage import QUANTIZED_DTYPES, RowsView, Storage, check_scale
from fastattn.quantized import Quantized
from fastattn.validation import check_tensor, describe

Stored = Tensor | Quantized
Result = TypeVar("Result")


class CacheState(ABC):
    """What a cache holds, and what must stay true of it whoever changes it.

    Lengths are ints on the host and int32 on the device, and only `_changed` sends one to the
    other. Of each row it knows how much every layer has written behind that length, and how much
    room was promised. `BaseKVCache` adds what a decoder calls; the abstract methods are where the
    contiguous and the paged cache differ.
    """

    block_table: Tensor | None = None

    def __init__(
        self,
        num_layers: int,
        max_batch: int,
        max_seqlen: int,
        slots: tuple[int, int],
        num_heads_kv: int,
        head_dim: int,
        head_dim_v: int | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
        quantization: str | None,
        scale: str | tuple[Tensor, Tensor],
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        sizes = {
            "num_layers": num_layers, "max_seqlen": max_seqlen, "num_heads_kv": num_heads_kv,
            "head_dim": head_dim, "head_dim_v": head_dim_v,
        }  # fmt: skip
        for name, size in sizes.items():
            check_positive(name, size)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating torch.dtype, got {dtype!r}")
        self.num_layers, self.max_batch, self.max_seqlen = num_layers, max_batch, max_seqlen
        self.num_heads_kv, self.head_dim, self.head_dim_v = num_heads_kv, head_dim, head_dim_v
        self.dtype, self.quantization = dtype, quantization
        scales = check_scale(quantization, scale, num_layers, num_heads_kv)
        stored = dtype if quantization is None else QUANTIZED_DTYPES[quantization]
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.seqlens = torch.zeros(max_batch, dtype=torch.int32, device=device)
            self.device = self.seqlens.device
            shape = (num_layers, *slots, num_heads_kv)
            stores = []
            for dim, fixed in zip((head_dim, head_dim_v), scales, strict=True):
                # Not zeroed: nothing past a row's length is ever read.
                values = torch.empty(*shape, dim, dtype=stored, device=self.device)
                tokens = None
                if fixed is not None:
                    tokens = fixed.to(self.device).expand(num_layers, -1).contiguous()
                elif quantization is not None:
                    tokens = torch.empty(shape, dtype=torch.float32, device=self.device)
                stores.append(Storage(values, tokens))
            # Tokens that each layer wrote behind each row's length in this step.
            self._written = torch.zeros(num_layers, max_batch, dtype=torch.int64, device="cpu")
        self.keys, self.values = stores
        self._lengths = [0] * max_batch
        self._reserved = [0] * max_batch  # up to which length each row was promised room
        self._views: dict[tuple[int, ...] | None, RowsView] = {}

    # ---- what the two caches do differently

    @abstractmethod
    def _grant(self, rows: Sequence[int], ends: Sequence[int]) -> bool:
        """Makes positions length..end - 1 of each row writable, or raises; True on any change."""

    @abstractmethod
    def _keep(self, row: int, length: int) -> None:
        """Lets go of what the row has beyond `length` tokens."""

    @abstractmethod
    def _share(self, source: int, target: int, length: int) -> None:
        """Gives the empty row `target` the first `length` tokens of `source`."""

    @abstractmethod
    def _reorder(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        """Row targets[i] becomes what sources[i] was, all at once."""

    @abstractmethod
    def _view(self, rows: tuple[int, ...], window: slice | None) -> RowsView:
        """The view of these rows; `window` is the same as a slice, if they are consecutive."""

    @abstractmethod
    def _slots(self, row: int) -> slice | Tensor:
        """The slots that hold the row's live tokens, in order."""

    @abstractmethod
    def _send_table(self) -> None:
        """Sends what changed in the block table to the device."""

    # ---- checks on layers, rows and room

    def _check_layer(self, layer: int) -> None:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layer must be an int, got {layer!r}")
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must lie in 0..{self.num_layers - 1}, got {layer}")

    def _check_rows(self, rows: int | Sequence[int] | Tensor | None) -> Sequence[int]:
        if rows is None:
            return range(self.max_batch)
        chosen = (rows,) if isinstance(rows, int) else as_integers("rows", rows)
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"rows must name one row or more, each once, got {list(chosen)}")
        for row in chosen:
            self._check_row("rows", row)
        return chosen

    def _check_row(self, name: str, row: int) -> int:
        if isinstance(row, bool) or not isinstance(row, int):
            raise TypeError(f"{name} must be an int, got {row!r}")
        if not 0 <= row < self.max_batch:
            raise ValueError(f"{name} must lie in 0..{self.max_batch - 1}, got {row}")
        return row

    def _check_room(
        self, n: int | Sequence[int] | Tensor, rows: Sequence[int] | Tensor | None
    ) -> tuple[Sequence[int], list[int]]:
        chosen = self._check_rows(rows)
        return chosen, self._check_ends("n", chosen, per_row("n", n, chosen))

    def _check_ends(self, name: str, rows: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Lengths of the rows with so many tokens more."""
        for row, count in zip(rows, counts, strict=True):
            room = self.max_seqlen - self._lengths[row]
            if not 0 <= count <= room:
                raise ValueError(
                    f"{name} must lie in 0..{room} tokens for row {row}, which holds "
                    f"{self._lengths[row]} of max_seqlen {self.max_seqlen}, got {count}"
                )
        return [self._lengths[row] + count for row, count in zip(rows, counts, strict=True)]

    # ---- reading and changing

    def _select_rows(self, rows: Sequence[int] | Tensor | None) -> RowsView:
        key = None if rows is None else as_integers("rows", rows)
        view = self._views.get(key)
        if view is None:
            chosen = tuple(self._check_rows(key))
            window = slice(chosen[0], chosen[0] + len(chosen))
            consecutive = chosen == tuple(range(window.start, window.stop))
            view = self._views[key] = self._view(chosen, window if consecutive else None)
        return view

    def _write(
        self,
        layer: int,
        rows: Sequence[int] | Tensor | None,
        k: Tensor | None,
        call: Callable[[RowsView, Stored, Stored], Result],
    ) -> Result:
        """Runs `call` on the layer's tensors, with room for k; notes that k was written.

        Unless `call` raised: then what the rows were given for it is taken back.
        """
        self._check_layer(layer)
        view, count = self._select_rows(rows), 0
        if k is not None:
            check_tensor("k", k)
            if k.dim() != 4 or k.shape[0] != len(view.rows):
                raise ValueError(
                    f"k must be (batch, seqlen_new, num_heads_kv, head_dim) with batch "
                    f"{len(view.rows)}, the number of rows, got {describe(k)}"
                )
            count = k.shape[1]
        if count > view.room:
            ends = self._check_ends("k: seqlen_new", view.rows, [count] * len(view.rows))
            if self._grant(view.rows, ends):
                self._views.clear()
                self._send_table()
                view = self._select_rows(rows)
            view.room = count
        try:
            stored = self.keys.layer(layer, view.slots), self.values.layer(layer, view.slots)
            result = call(view, *stored)
        except BaseException:
            if not self._capturing():  # where nothing can have been taken
                self._release_unused(view.rows)
                self._changed()
            raise
        if count and not self._capturing():
            self._written[layer, view.index] = count
        return result

    def _shorten(
        self, what: str, rows: Sequence[int], lengths: Sequence[int], send: bool = True
    ) -> None:
        """Sets lengths, and ends what the rows have written in this step and reserved."""
        self._refuse_capture(what)
        for row, length in zip(rows, lengths, strict=True):
            self._lengths[row] = length
            self._reserved[row] = 0
        self._written[:, list(rows)] = 0
        self._release_unused(rows)
        if send:
            self._changed()

    def _release_unused(self, rows: Sequence[int]) -> None:
        written = self._written[:, list(rows)].amax(0).tolist()
        for row, count in zip(rows, written, strict=True):
            self._keep(row, max(self._lengths[row] + count, self._reserved[row]))

    def _changed(self) -> None:
        """Tells the device, and forgets the views made of what was."""
        self._views.clear()
        self.seqlens.copy_(self._host_tensor(self._lengths, torch.int32), non_blocking=True)
        self._send_table()

    # ---- the device

    def _host_tensor(self, values: Sequence[int], dtype: torch.dtype) -> Tensor:
        # From pinned memory the copy to the device is asynchronous; torch keeps it until then.
        pinned = self.device.type == "cuda"
        return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=pinned)

    def _to_device(self, values: Sequence[int]) -> Tensor:
        """Indices as an int64 tensor on the device."""
        self._refuse_capture("sending indices (rows that are not consecutive, new blocks)")
        return self._host_tensor(values, torch.int64).to(self.device, non_blocking=True)

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _refuse_capture(self, what: str) -> None:
        if self._capturing():
            raise RuntimeError(
                f"{what} is not possible while a CUDA graph is captured: a replay would repeat the "
                "copy from the host; reserve room before, advance after the replay"
            )
