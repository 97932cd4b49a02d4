"""Every feature of attention over a key/value cache as one row, like `fastattn.testing.features`.

Memory that no row of the batch owns, and what lies behind a row's tokens, is NaN: a kernel that
reads it shows. Blocks lie in scrambled order, and entries of the block table that no token needs
point nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn import cache_storage
from fastattn.biases import ALiBi, T5Bias
from fastattn.cache_problem import Cache
from fastattn.masks import Causal, Lengths, Prefix, Window
from fastattn.quantized import Quantized, quantize
from fastattn.rotary import Rotary
from fastattn.testing.features import LAYOUTS, Case, Draw, Kwargs, no_modifiers

__all__ = ["CACHE_FEATURES", "CacheCase", "CacheFeature"]

_NOWHERE = 2**30


@dataclass(frozen=True, eq=False)
class CacheCase:
    """Arguments of one call: `fastattn.attention_with_kv_cache`, which writes into the caches."""

    q: Tensor
    k_cache: Tensor | Quantized
    v_cache: Tensor | Quantized
    k: Tensor | None
    v: Tensor | None
    kwargs: Kwargs

    def call(self, attention: Callable[..., Any], **options: Any) -> Any:
        """What `attention` returns for these arguments, and options beside them."""
        operands = (self.q, self.k_cache, self.v_cache, self.k, self.v)
        return attention(*operands, **self.kwargs, **options)

    def double(self) -> CacheCase:
        """The same numbers in float64, the cache dequantised: for the exact result."""

        def wide(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.double()

        scores = Case(self.q, self.q, self.q, self.kwargs).double()
        rotary = self.kwargs.get("rotary")
        if rotary is not None:
            scores.kwargs["rotary"] = replace(
                rotary, cos=rotary.cos.double(), sin=rotary.sin.double()
            )
        caches = [
            cache.dequantize(torch.float64) if isinstance(cache, Quantized) else cache.double()
            for cache in (self.k_cache, self.v_cache)
        ]
        k_cache, v_cache = caches
        return CacheCase(scores.q, k_cache, v_cache, wide(self.k), wide(self.v), scores.kwargs)

    def settled(self) -> CacheCase:
        """The same queries once the new tokens are in the cache, where they may be attended."""
        if self.k is None:
            return self
        kwargs = {**self.kwargs, "cache_seqlens": self.kwargs["cache_seqlens"] + self.k.shape[1]}
        return replace(self, k=None, v=None, kwargs=kwargs)

    @property
    def cache(self) -> Cache:
        """The cache as the library's own plain torch sees it."""
        k, k_scale = _parts(self.k_cache)
        v, v_scale = _parts(self.v_cache)
        seqlens, table = self.kwargs["cache_seqlens"], self.kwargs.get("block_table")
        return Cache(k, v, k_scale, v_scale, seqlens, table, seqlens.tolist())

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows, the new ones included, one after the other."""
        new = 0 if self.k is None else self.k.shape[1]
        rows = [
            cache_storage.gather(self.cache, index, length + new, self.q.dtype)
            for index, length in enumerate(self.cache.lengths())
        ]
        k, v = (torch.cat(part) for part in zip(*rows, strict=True))
        return k, v

    def memory(self) -> list[Tensor]:
        """All bytes of the caches, those of the new tokens left out."""
        cache, new = self.cache, 0 if self.k is None else self.k.shape[1]
        stored = [cache.k, cache.v, *(s for s in (cache.k_scale, cache.v_scale) if s is not None)]
        kept = torch.ones(cache.k.shape[:2], dtype=torch.bool, device=cache.k.device)
        for index, length in enumerate(cache.lengths()):
            for position in range(length, length + new):
                kept[_place(cache, index, position)] = False
        return [
            (tensor[kept] if tensor.dim() > 1 else tensor).contiguous().view(torch.uint8)
            for tensor in stored
        ]

    def named_tensors(self) -> dict[str, Tensor | None]:
        """The operands by name, whose elements alone may be touched."""
        cache = self.cache
        return {
            "q": self.q, "k": self.k, "v": self.v, "k_cache": cache.k, "v_cache": cache.v,
            "k_scale": cache.k_scale, "v_scale": cache.v_scale,
            "block_table": cache.block_table, "seqlens": cache.seqlens,
        }  # fmt: skip


def _parts(cache: Tensor | Quantized) -> tuple[Tensor, Tensor | None]:
    return (cache.values, cache.scale) if isinstance(cache, Quantized) else (cache, None)


def _place(cache: Cache, index: int, position: int) -> tuple[int, int]:
    if cache.block_table is None:
        return index, position
    size = cache.k.shape[1]
    return int(cache.block_table[index, position // size]), position % size


@dataclass(frozen=True)
class CacheFeature:
    """One row.

    Attributes:
        name: what it is called, unique.
        modifiers: draws further keyword arguments: masks, biases, ...
        lengths: tokens of each row of the batch before the call.
        seqlen_q, seqlen_new: query rows, and tokens to append (None: as many).
        capacity: of a contiguous cache, and what a block table has room for, rounded up.
        num_heads, num_heads_kv, head_dim, head_dim_v: sizes; head_dim_v defaults to head_dim.
        layout: of q and of the new tokens, and of a contiguous cache.
        block_size: tokens of a block; None is contiguous.
        shared: tokens at the start, whole blocks, that all rows have in common.
        stored: "int8" or "fp8" for a quantised cache.
        per_token: whether each token and head has its own scale, or each head.
        rotary: rotated dims, and whether pairs are interleaved.
        positions: whether the rotation is by positions of the caller's own.
    """

    name: str
    modifiers: Callable[[Draw], Kwargs] = no_modifiers
    lengths: tuple[int, ...] = (75, 130)
    seqlen_q: int = 1
    seqlen_new: int | None = None
    capacity: int = 150
    num_heads: int = 4
    num_heads_kv: int = 2
    head_dim: int = 32
    head_dim_v: int | None = None
    layout: str = "bshd"
    block_size: int | None = None
    shared: int = 0
    stored: str | None = None
    per_token: bool = True
    rotary: tuple[int, bool] | None = None
    positions: bool = False

    def case(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> CacheCase:
        """The row's arguments in a dtype on a device; the same numbers each time, new memory."""
        draw = Draw(dtype, device)
        batch, heads = len(self.lengths), self.num_heads_kv
        new = self.seqlen_q if self.seqlen_new is None else self.seqlen_new
        head_dim_v = self.head_dim_v or self.head_dim
        lay = LAYOUTS[self.layout]
        q = lay(draw.normal(batch, self.seqlen_q, self.num_heads, self.head_dim))
        k, v = (
            lay(draw.normal(batch, new, heads, dim)) if new else None
            for dim in (self.head_dim, head_dim_v)
        )
        lengths = torch.tensor(self.lengths)
        kwargs: Kwargs = {"cache_seqlens": draw.ints(*self.lengths)}
        table = None
        if self.block_size is not None:
            table = self._block_table(new)
            # The cast to int32 is what most have; the entries that no token needs point nowhere.
            kwargs["block_table"] = table.to(device, torch.int32)
        caches = [
            self._cache(draw, dim, lengths, table).to(device) for dim in (self.head_dim, head_dim_v)
        ]
        if self.rotary is not None:
            kwargs["rotary"] = self._rotary(draw, new)
        kwargs |= self.modifiers(draw)
        k_cache, v_cache = (self._stored(cache, lay) for cache in caches)
        return CacheCase(q, k_cache, v_cache, k, v, kwargs)

    def _block_table(self, new: int) -> Tensor:
        """Blocks in scrambled order, those of the shared tokens in every row."""
        size = self.block_size or 1
        columns, common = -(-self.capacity // size), self.shared // size
        needed = [-(-(length + new) // size) for length in self.lengths]
        generator = torch.Generator().manual_seed(3)
        numbers = torch.randperm(sum(needed) + 3, generator=generator).tolist()
        first = [numbers.pop() for _ in range(common)]
        table = torch.full((len(needed), columns), _NOWHERE)
        for index, count in enumerate(needed):
            row = first[:count] + [numbers.pop() for _ in range(count - common)]
            table[index, : len(row)] = torch.tensor(row)
        return table

    def _cache(self, draw: Draw, dim: int, lengths: Tensor, table: Tensor | None) -> Tensor:
        """Normal values where rows have tokens, NaN elsewhere."""
        if table is None:
            shape = (len(self.lengths), self.capacity)
        else:
            shape = (int(table[table != _NOWHERE].max()) + 3, self.block_size or 1)
        values = draw.normal(*shape, self.num_heads_kv, dim).cpu()
        live = torch.zeros(shape, dtype=torch.bool)
        for index, length in enumerate(lengths.tolist()):
            position = torch.arange(length)
            if table is None:
                live[index, position] = True
            else:
                live[table[index, position // shape[1]], position % shape[1]] = True
        return values.masked_fill(~live[..., None, None], float("nan"))

    def _stored(self, cache: Tensor, lay: Callable[[Tensor], Tensor]) -> Tensor | Quantized:
        if self.stored is None:
            return lay(cache)
        kind = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[self.stored]
        live = cache.nan_to_num()
        scale = None
        if not self.per_token:
            # A little small, so that some values are cut off.
            largest = 127.0 if kind == torch.int8 else 448.0
            scale = live.abs().amax((0, 1, 3)).float() * 0.9 / largest
        values, scales = quantize(live, kind, scale)
        if self.per_token:
            # What nobody owns has a scale of NaN.
            scales = scales.masked_fill(cache[..., 0].isnan(), float("nan"))
        return Quantized(values, scales)

    def _rotary(self, draw: Draw, new: int) -> Rotary:
        assert self.rotary is not None
        rotary_dim, interleaved = self.rotary
        batch = len(self.lengths)
        # Queries that are no new tokens may stand anywhere up to the capacity.
        rotary = Rotary.make(
            rotary_dim,
            self.capacity + self.seqlen_q,
            interleaved=interleaved,
            device=draw.ints(0).device,
        )
        if self.positions:
            places = draw.ints(*((7 * i) % self.capacity for i in range(batch * new)))
            rotary = replace(rotary, positions=places.reshape(batch, new))
        return rotary


def _causal(draw: Draw) -> Kwargs:
    return {"causal": True}


def _invariant(draw: Draw) -> Kwargs:
    return {"causal": True, "batch_invariant": True}


def _cut_by_bias(draw: Draw) -> Kwargs:
    table = draw.normal(8, 4)
    table[3:] = float("-inf")
    return {"bias": T5Bias(table, bidirectional=False, max_distance=20), "causal": True}


def _everything(draw: Draw) -> Kwargs:
    mask = Window(60, 0) & Lengths(draw.ints(150, 131), starts_k=draw.ints(2, 70))
    bias = ALiBi(draw.slopes(4)) + T5Bias(draw.normal(16, 4), max_distance=50)
    return {
        "mask": mask & draw.bools(2, 1, 3, 160, true=0.9),
        "bias": bias + draw.normal(1, 4, 3, 160),
        "sinks": draw.normal(4),
        "softcap": 4.0,
        "softmax_scale": 0.3,
    }


# fmt: off
CACHE_FEATURES: tuple[CacheFeature, ...] = (
    # how many queries, how long the rows
    CacheFeature("cache: one token"),
    CacheFeature("cache: one token, splits", _invariant, lengths=(300, 0, 63, 64), capacity=400),
    CacheFeature("cache: a few tokens, causal", _causal, seqlen_q=5),
    CacheFeature("cache: a few tokens, causal, splits", _invariant, seqlen_q=5,
                 lengths=(300, 1, 200), capacity=400),
    CacheFeature("cache: a chunk of a prompt, causal", _causal, seqlen_q=70, capacity=200),
    CacheFeature("cache: empty rows", _causal, lengths=(0, 0), seqlen_q=3, capacity=64),
    CacheFeature("cache: full rows", lengths=(149, 149)),
    CacheFeature("cache: more queries than new tokens", _causal, seqlen_q=4, seqlen_new=1),
    CacheFeature("cache: fewer queries than new tokens", _causal, seqlen_q=2, seqlen_new=20),
    CacheFeature("cache: more queries than tokens", _causal, seqlen_q=9, seqlen_new=2,
                 lengths=(0, 3), capacity=64),
    CacheFeature("cache: nothing new", _causal, seqlen_q=3, seqlen_new=0, lengths=(0, 100)),
    CacheFeature("cache: cross-attention, written once", seqlen_q=7, seqlen_new=0),
    CacheFeature("cache: queries without rows", seqlen_q=0, seqlen_new=3),
    # heads and layouts
    CacheFeature("cache: multi-query, groups of 20", _causal, num_heads=20, num_heads_kv=1,
                 seqlen_q=2),
    CacheFeature("cache: one query head a key head", num_heads=3, num_heads_kv=3),
    *(CacheFeature(f"cache: head_dim {dim}", _causal, head_dim=dim, lengths=(70, 3), seqlen_q=8)
      for dim in (1, 40, 64, 80, 128, 256)),
    CacheFeature("cache: head_dim_v < head_dim", head_dim=64, head_dim_v=24),
    CacheFeature("cache: strides of (batch, head, seqlen, dim)", _causal, layout="bhsd",
                 seqlen_q=3),
    CacheFeature("cache: strides with gaps everywhere", _causal, layout="gaps", seqlen_q=3),
    # blocks
    *(CacheFeature(f"cache: blocks of {size}", _causal, block_size=size, seqlen_q=3,
                   lengths=(75, 0, 127))
      for size in (1, 7, 16, 32, 64, 128)),
    CacheFeature("cache: blocks of 16, splits", _invariant, block_size=16, lengths=(300, 5),
                 capacity=400),
    CacheFeature("cache: blocks shared by rows", _causal, block_size=16, shared=64, seqlen_q=2,
                 lengths=(70, 100, 64)),
    CacheFeature("cache: blocks, a chunk of a prompt", _causal, block_size=16, seqlen_q=70,
                 lengths=(60, 9)),
    CacheFeature("cache: blocks, nothing new", block_size=32, seqlen_new=0, seqlen_q=2),
    # rotation
    CacheFeature("cache: rotary", _causal, rotary=(32, False), seqlen_q=3),
    CacheFeature("cache: rotary, interleaved", _causal, rotary=(32, True), seqlen_q=3),
    CacheFeature("cache: rotary, part of head_dim", _causal, rotary=(20, False), head_dim=40,
                 block_size=16),
    CacheFeature("cache: rotary, interleaved, part of head_dim", _causal, rotary=(6, True),
                 head_dim=40, seqlen_q=20),
    CacheFeature("cache: rotary, own positions", _causal, rotary=(32, False), positions=True,
                 seqlen_q=3),
    CacheFeature("cache: rotary, a chunk of a prompt", _causal, rotary=(32, False), seqlen_q=40,
                 capacity=200, block_size=16),
    CacheFeature("cache: rotary, more queries than tokens", _causal, rotary=(32, False), seqlen_q=9,
                 seqlen_new=2, lengths=(0, 3), capacity=64),
    # masks and scores
    CacheFeature("cache: Window", lambda draw: {"mask": Window(40, 0)}, seqlen_q=3,
                 lengths=(75, 200), capacity=250),
    CacheFeature("cache: Window, splits, blocks",
                 lambda draw: {"mask": Window(150, 0), "batch_invariant": True},
                 lengths=(75, 300), capacity=400, block_size=16),
    CacheFeature("cache: Window, a chunk of a prompt", lambda draw: {"mask": Window(30, 0)},
                 seqlen_q=100, lengths=(75, 0), capacity=250),
    CacheFeature("cache: Window within new tokens, many rows", lambda draw: {"mask": Window(3, 0)},
                 seqlen_q=10, num_heads=8, lengths=(62, 126), capacity=160),
    CacheFeature("cache: Window, many rows, blocks", lambda draw: {"mask": Window(66, 0)},
                 seqlen_q=12, num_heads=8, lengths=(130, 63), block_size=16, rotary=(32, False)),
    CacheFeature("cache: Lengths, left padded, many rows",
                 lambda draw: {"mask": Lengths(draw.ints(150, 150), starts_k=draw.ints(60, 130)),
                               "causal": True},
                 seqlen_q=10, num_heads=8, lengths=(62, 126)),
    CacheFeature("cache: Lengths, left padded",
                 lambda draw: {"mask": Lengths(draw.ints(150, 150), starts_k=draw.ints(66, 3))
                               & Causal()}, seqlen_q=3),
    CacheFeature("cache: Lengths with seqlens_q",
                 lambda draw: {"mask": Lengths(draw.ints(150, 150), seqlens_q=draw.ints(2, 0)),
                               "causal": True}, seqlen_q=3),
    CacheFeature("cache: Prefix", lambda draw: {"mask": Prefix(draw.ints(78, 5))}, seqlen_q=8),
    CacheFeature("cache: mask (a tree of tokens)",
                 lambda draw: {"mask": draw.bools(2, 1, 6, 150)}, seqlen_q=6),
    CacheFeature("cache: bias", lambda draw: {"bias": draw.normal(1, 4, 2, 150)}, seqlen_q=2),
    CacheFeature("cache: ALiBi", lambda draw: {"bias": ALiBi(draw.slopes(4)), "causal": True},
                 seqlen_q=2),
    CacheFeature("cache: T5Bias",
                 lambda draw: {"bias": T5Bias(draw.normal(32, 4), bidirectional=False),
                               "causal": True, "softmax_scale": 1.0}, seqlen_q=2),
    CacheFeature("cache: T5Bias, far tiles, splits",
                 lambda draw: {"bias": T5Bias(draw.normal(8, 4), max_distance=20),
                               "batch_invariant": True}, lengths=(300, 7), capacity=400),
    CacheFeature("cache: T5Bias of -inf for far keys", _cut_by_bias, seqlen_q=16, lengths=(140, 70),
                 capacity=200),
    CacheFeature("cache: softcap", lambda draw: {"softcap": 2.0, "softmax_scale": 1.0}),
    CacheFeature("cache: sinks", lambda draw: {"sinks": draw.normal(4, std=2.0)}),
    CacheFeature("cache: sinks, splits, an empty row",
                 lambda draw: {"sinks": draw.normal(4), "batch_invariant": True}, seqlen_new=0,
                 lengths=(300, 0), capacity=400),
    CacheFeature("cache: large scores, splits",
                 lambda draw: {"softmax_scale": 8.0, "batch_invariant": True}, lengths=(300, 7),
                 capacity=400),
    # quantised
    *(CacheFeature(f"cache: {kind}, a scale a {'token' if per_token else 'head'}", _causal,
                   stored=kind, per_token=per_token, seqlen_q=2, block_size=block_size)
      for kind, per_token, block_size in (
          ("int8", True, None), ("int8", False, 16), ("fp8", True, 64), ("fp8", False, None),
      )),
    CacheFeature("cache: int8, splits, rotary, blocks", _invariant, stored="int8",
                 rotary=(32, False), block_size=16, lengths=(300, 0), capacity=400),
    CacheFeature("cache: fp8, a chunk of a prompt", _causal, stored="fp8", seqlen_q=40,
                 rotary=(32, True), capacity=200),
    # all at once
    CacheFeature("cache: everything", _everything, seqlen_q=3, rotary=(20, False), block_size=16,
                 capacity=160, stored="int8"),
    CacheFeature("cache: everything, splits",
                 lambda draw: {**_everything(draw), "batch_invariant": True}, seqlen_q=3,
                 rotary=(20, True), capacity=160),
)
# fmt: on
