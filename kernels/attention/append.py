"""Appending to a key/value cache by a launch of its own: chunks of a prompt, or no queries at all.

One program writes BLOCK rows of one head, rotated and, where the cache is, quantised.
"""

import triton
import triton.language as tl

from fastattn.kernels.attention.cache import encoded, find_rows, load_rotated, store_cached
from fastattn.kernels.attention.cached_keys import CachedKeys, paging, rotary, storage
from fastattn.kernels.attention.config import padded_dim
from fastattn.kernels.attention.decode_config import APPEND_ROWS
from fastattn.kernels.attention.operands import rows, vector
from fastattn.kernels.attention.tile import head_base, load_int


@triton.jit
def _append_kernel(
    k,
    v,
    k_scale,
    v_scale,
    k_new,
    v_new,
    num_heads,
    capacity,
    cache_seqlens,
    seqlen_new,
    paging,
    rotary,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % num_heads
    num_blocks = tl.cdiv(seqlen_new, BLOCK)
    start = program // num_heads % num_blocks * BLOCK
    index = program // num_heads // num_blocks
    cached = capacity
    if cache_seqlens is not None:
        cached = load_int(cache_seqlens, index)
    row = start + tl.arange(0, BLOCK)
    # Lengths out of range write nothing, nor does a row whose block numbers are negative.
    inside = (row < seqlen_new) & (cached >= 0) & (cached + row < capacity)
    block, cache_row = find_rows(
        paging, index, cached + start, tl.arange(0, BLOCK), inside, BLOCK_SIZE, False
    )
    inside = inside & (block >= 0)

    k_tile = load_rotated(
        head_base(k_new, index, head, row),
        k_new.stride_dim,
        inside,
        rotary,
        index,
        row,
        cached + row,
        HEAD_DIM,
        BLOCK_D,
        ROTARY_DIM,
        INTERLEAVED,
    )
    values, scales = encoded(k_tile, k, k_scale, head)
    store_cached(k, k_scale, head, block, cache_row, inside, values, scales, HEAD_DIM)

    dim = tl.arange(0, BLOCK_DV)
    pointers = head_base(v_new, index, head, row)[:, None] + dim[None, :] * v_new.stride_dim
    keep = inside[:, None] & (dim < HEAD_DIM_V)[None, :]
    v_tile = tl.load(pointers, mask=keep, other=0.0)
    values, scales = encoded(v_tile, v, v_scale, head)
    store_cached(v, v_scale, head, block, cache_row, inside, values, scales, HEAD_DIM_V)


def launch_append(cached: CachedKeys) -> None:
    """Writes `cached.k_new` and `cached.v_new` into the cache, after what each sequence has."""
    assert cached.k_new is not None and cached.v_new is not None
    batch, seqlen_new, num_heads, head_dim = cached.k_new.shape
    num_programs = triton.cdiv(seqlen_new, APPEND_ROWS) * num_heads * batch
    if num_programs == 0:
        return
    _append_kernel[(num_programs,)](
        *storage(cached),
        rows(cached.k_new),
        rows(cached.v_new),
        num_heads,
        cached.capacity,
        vector(cached.seqlens),
        seqlen_new,
        paging(cached),
        rotary(cached),
        HEAD_DIM=head_dim,
        HEAD_DIM_V=cached.v_new.shape[-1],
        BLOCK=APPEND_ROWS,
        BLOCK_D=padded_dim(head_dim),
        BLOCK_DV=padded_dim(cached.v_new.shape[-1]),
        BLOCK_SIZE=cached.block_size,
        ROTARY_DIM=cached.rotary_dim,
        INTERLEAVED=cached.interleaved,
        num_warps=4,
    )
