"""Writing to and reading from a key/value cache, in plain torch on any device.

What lies in a cache past a row's tokens is never read into a result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastattn.cache_problem import Cache, CacheProblem
from fastattn.quantized import dequantize, quantize


def append(problem: CacheProblem) -> None:
    """Writes the problem's new tokens behind those of each row, the keys rotated. In place."""
    if problem.rotary is not None:
        problem = rotate(replace(problem, q=None))
    k, v, cache = problem.k, problem.v, problem.cache
    if k is None or v is None or k.numel() + v.numel() == 0:
        return
    places = _places(problem)
    _write(k, cache.k, cache.k_scale, places)
    _write(v, cache.v, cache.v_scale, places)


def rotate(problem: CacheProblem) -> CacheProblem:
    """The problem with its queries and new keys rotated already, and no rotation left to do."""
    rotary, q, k = problem.rotary, problem.q, problem.k
    if rotary is None:
        return problem

    def turn(x: Tensor) -> Tensor:
        positions = problem.rotary_positions(x.shape[1])
        return rotary.rotate(x, *rotary.turns(positions, x.dtype))

    if q is not None and k is not None and q.shape[1] == k.shape[1]:
        # The same positions: half of the calls, which is what a step of decoding costs on a CPU.
        q, k = turn(torch.cat((q, k), 2)).split((q.shape[2], k.shape[2]), 2)
    else:
        q = None if q is None else turn(q)
        k = None if k is None else turn(k)
    return replace(problem, q=q, k=k, rotary=None)


def _write(x: Tensor, stored: Tensor, scale: Tensor | None, places: tuple[Any, Any]) -> None:
    """Tokens `x` (batch, new, heads, dim) into `stored`, quantized where there is a scale."""
    if scale is not None:
        x, own = quantize(x, stored.dtype, scale if scale.dim() == 1 else None)
        if scale.dim() != 1:
            scale[places] = own
        # torch cannot index float8 everywhere: bytes are bytes.
        x, stored = x.view(torch.int8), stored.view(torch.int8)
    stored[places] = x


def _places(problem: CacheProblem) -> tuple[Any, Any]:
    """The first two indices into the cache for the new tokens (batch, new)."""
    cache, new = problem.cache, problem.seqlen_new
    on_host = cache.host_seqlens
    if cache.block_table is None and on_host is not None and len(set(on_host)) == 1:
        return slice(None), slice(on_host[0], on_host[0] + new)
    position = problem.positions(new).to(torch.int64)
    if cache.block_table is None:
        return torch.arange(cache.batch, device=problem.device)[:, None], position
    size = cache.k.shape[1]
    return cache.block_table.gather(1, position // size).to(torch.int64), position % size


def gather(cache: Cache, index: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The first `length` keys and values of one row, (length, num_heads_kv, dim) in `dtype`."""
    k, v = gather_rows(cache, slice(index, index + 1), slice(0, length), dtype)
    return k[0], v[0]


def gather_rows(
    cache: Cache, rows: slice, keys: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values `keys` of some rows, (rows, keys, num_heads_kv, dim) in `dtype`.

    Views where the cache is contiguous and not quantized; otherwise only what is asked for is
    copied, to the block.
    """
    blocks, skip = _blocks(cache, rows, keys)

    def find(stored: Tensor) -> Tensor:
        if blocks is None:
            return stored[rows, keys]
        # torch cannot index float8 everywhere: bytes are bytes.
        kind = stored.dtype
        stored = stored.view(torch.int8) if kind.itemsize == 1 else stored
        found = stored.index_select(0, blocks).view(kind)
        found = found.reshape(rows.stop - rows.start, -1, *stored.shape[2:])
        return found[:, skip : skip + keys.stop - keys.start]

    def read(values: Tensor, scale: Tensor | None) -> Tensor:
        if scale is None:
            return find(values)
        return dequantize(find(values), scale if scale.dim() == 1 else find(scale), dtype)

    return read(cache.k, cache.k_scale), read(cache.v, cache.v_scale)


def _blocks(cache: Cache, rows: slice, keys: slice) -> tuple[Tensor | None, int]:
    """Blocks that hold `keys` of `rows`, row by row; how many tokens the first has before them."""
    if cache.block_table is None:
        return None, 0
    size = cache.k.shape[1]
    first = keys.start // size
    blocks = cache.block_table[rows, first : max(first, -(-keys.stop // size))]
    return blocks.reshape(-1), keys.start - first * size
