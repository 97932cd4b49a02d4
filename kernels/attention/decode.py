"""Attention over a key/value cache: one kernel for a new token, a few, or a chunk of a prompt.

One program serves one key/value head of one sequence: the rows of all its query heads lie packed in
one tile, so that keys and values are read once whatever the size of the group. Where that would
leave the chip idle, the keys are split over programs (flash-decoding), each of which writes a
partial result with its log-sum-exp; `combine.py` joins them in a fixed order.

New keys and values are attended straight from where the caller has them, rotated in registers,
while one of the programs also writes them to the cache: no program waits for another. More than
NEW_ROWS of them are appended by a launch of their own (`append.py`).
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels.attention.append import launch_append
from fastattn.kernels.attention.cache import (
    encoded,
    find_rows,
    load_cached,
    load_rotated,
    load_scale,
    store_cached,
    widened,
)
from fastattn.kernels.attention.cached_keys import CachedKeys, paging, rotary, storage
from fastattn.kernels.attention.combine import combine_row, launch_combine_splits
from fastattn.kernels.attention.config import padded_dim
from fastattn.kernels.attention.decode_config import NEW_ROWS, DecodeConfig
from fastattn.kernels.attention.operands import (
    Modifiers,
    masks,
    row_scalars,
    rows,
    scores,
    terms,
    vector,
)
from fastattn.kernels.attention.tile import (
    LN2,
    LOG2E,
    Shape,
    Terms,
    add_terms,
    cut_scores,
    head_base,
    key_ranges_between,
    limit_sequence,
    load_int,
    scale_scores,
    softmax_step,
    visible_keys,
)


@triton.jit
def _attend(
    q_tile,
    k_tile,
    v_tile,
    k_scale,
    v_scale,
    k_scales,
    v_scales,
    maximum,
    total,
    acc,
    scores,
    terms,
    seq,
    head,
    first_m,
    start_n,
    row,
    col,
    first,
    end,
    exponent_scale,
    CUT: tl.constexpr,
    LAZY_SCALE: tl.constexpr,
    SUBTRACT_FIRST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One tile of keys more: the new maxima, sums and weighted values of the rows."""
    BLOCK_M: tl.constexpr = q_tile.shape[0]
    BLOCK_N: tl.constexpr = k_tile.shape[0]
    PRECISE: tl.constexpr = q_tile.dtype == tl.float32
    MAY_BE_EMPTY: tl.constexpr = (
        terms.mask.ptr is not None or terms.bias.ptr is not None or terms.relative.ptr is not None
    )
    products = tl.dot(q_tile, k_tile.T, input_precision=INPUT_PRECISION)
    if k_scale.ptr is not None:
        products *= k_scales[None, :]
    s = scale_scores(products, scores, LAZY_SCALE, PRECISE)
    row, head, col = row[:, None], head[:, None], col[None, :]
    s = add_terms(s, terms, seq, head, first_m, start_n, row, col, BLOCK_M, BLOCK_N)
    if CUT:
        s = cut_scores(s, col, first[:, None], end[:, None])
    p, new_maximum, decay = softmax_step(
        s, maximum, exponent_scale, SUBTRACT_FIRST, CUT or MAY_BE_EMPTY
    )
    total = total * decay + tl.sum(p, 1)
    if v_scale.ptr is not None:
        p *= v_scales[None, :]
    acc = acc * decay[:, None]
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=INPUT_PRECISION)
    return new_maximum, total, acc


# Sizes that change from call to call, and for which another compilation would gain nothing.
@triton.jit(do_not_specialize=["num_sequences", "num_splits"])
def _attention_decode_kernel(
    q,
    k,
    v,
    k_scale,
    v_scale,
    k_new,
    v_new,
    out,
    lse,
    final_out,
    final_lse,
    counters,
    shape,
    masks,
    cache_seqlens,
    seqlen_new,
    paging,
    rotary,
    scores,
    mask,
    bias,
    alibi,
    relative,
    num_sequences,
    num_splits,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_NEW: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE_WALK: tl.constexpr,
    LAZY_SCALE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    group = shape.group_size
    num_key_heads = shape.num_heads // group
    num_rows = shape.seqlen_q * group
    num_blocks_m = tl.cdiv(num_rows, BLOCK_M)
    program = tl.program_id(0)
    # Heads next to each other, since their rows are in memory; last rows first, they see most.
    block_m = num_blocks_m - 1 - program % num_blocks_m
    key_head = (program // num_blocks_m) % num_key_heads
    if SPLIT:
        split = (program // num_blocks_m // num_key_heads) % num_splits
        index = program // num_blocks_m // num_key_heads // num_splits
        is_last = split == num_splits - 1
    else:
        split = 0
        index = program // num_blocks_m // num_key_heads
        is_last = index >= 0
    cached = shape.seqlen_k
    if cache_seqlens is not None:
        cached = load_int(cache_seqlens, index)
    # Lengths out of range read and write nothing that is not there.
    keys = tl.minimum(cached + seqlen_new, shape.seqlen_k)
    keys = tl.where(cached < 0, 0, keys)
    seq = limit_sequence(masks, index, 0, 0, shape.seqlen_q, keys)

    packed = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = packed // group
    head = key_head * group + packed % group
    first_m = block_m * BLOCK_M // group
    last_m = tl.minimum((block_m * BLOCK_M + BLOCK_M - 1) // group, seq.live_rows - 1)
    live = row < seq.live_rows
    q_tile = load_rotated(
        head_base(q, index, head, row),
        q.stride_dim,
        live,
        rotary,
        index,
        row,
        seq.offset + row,
        HEAD_DIM,
        BLOCK_D,
        ROTARY_DIM,
        INTERLEAVED,
    )
    terms = Terms(mask, bias, alibi, relative)
    dtype: tl.constexpr = q.ptr.dtype.element_ty
    SUBTRACT_FIRST: tl.constexpr = dtype == tl.float32 or (bias.ptr is not None)
    exponent_scale = scores.scale * LOG2E if LAZY_SCALE else LOG2E

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if scores.sinks is not None:
        # A sink is a key without a value. It counts once, in the first split.
        sink = tl.load(scores.sinks + head).to(tl.float32)
        maximum = tl.where(split == 0, sink, maximum)
        total += tl.where(split == 0, 1.0, 0.0)
    initial_maximum, initial_total = maximum, total
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    first, end = visible_keys(row, seq, masks)
    end = tl.where(live, end, 0)
    begin, full_begin, full_end, last = key_ranges_between(first_m, last_m, seq, masks, BLOCK_N)
    # What no row sees may be anything: a block that was freed, or NaN.
    first_seen, _ = visible_keys(first_m, seq, masks)
    # The walk is over the cache; new keys that it does not hold yet come after it.
    in_cache = last
    if k_new.ptr is not None:
        in_cache = tl.minimum(last, cached)
        full_end = tl.minimum(full_end, tl.maximum(cached, 0) // BLOCK_N * BLOCK_N)
        full_end = tl.maximum(full_end, full_begin)
    if SPLIT:
        per_split = tl.cdiv(tl.cdiv(in_cache - begin, BLOCK_N), num_splits) * BLOCK_N
        begin += tl.maximum(per_split, 0) * split
        in_cache = tl.minimum(in_cache, begin + per_split)

    if k_new.ptr is not None:
        # Loaded before the walk and used after it, so that nothing waits for them.
        local_new = tl.arange(0, BLOCK_NEW)
        arrives = (local_new < seqlen_new) & (cached >= 0) & is_last
        arrives = arrives & (cached + local_new < shape.seqlen_k)
        k_fresh = load_rotated(
            head_base(k_new, index, key_head, local_new),
            k_new.stride_dim,
            arrives,
            rotary,
            index,
            local_new,
            cached + local_new,
            HEAD_DIM,
            BLOCK_D,
            ROTARY_DIM,
            INTERLEAVED,
        )
        dim_v = tl.arange(0, BLOCK_DV)
        v_rows = head_base(v_new, index, key_head, local_new)
        v_fresh = tl.load(
            v_rows[:, None] + dim_v[None, :] * v_new.stride_dim,
            mask=arrives[:, None] & (dim_v < HEAD_DIM_V)[None, :],
            other=0.0,
        )

    CUT_LEFT: tl.constexpr = (masks.window_left is not None) or (masks.starts_k is not None)
    SAME_BLOCK: tl.constexpr = BLOCK_SIZE is not None and BLOCK_SIZE % BLOCK_N == 0
    # Few rows wait for memory alone: their tiles are masked one and all, in a single stretch.
    for stretch in tl.static_range(2 if ONE_WALK else (0 if CUT_LEFT else 1), 3):
        if ONE_WALK:
            low, high = begin, in_cache
        elif stretch == 0:
            low, high = begin, tl.minimum(full_begin, in_cache)
        elif stretch == 1:
            low, high = tl.maximum(begin, full_begin), tl.minimum(full_end, in_cache)
        else:
            low, high = tl.maximum(begin, full_end), in_cache
        for start_n in tl.range(low, high, BLOCK_N):
            CHECK: tl.constexpr = stretch != 1
            local = tl.arange(0, BLOCK_N)
            col = start_n + local
            inside = col < in_cache
            if CUT_LEFT:
                inside = inside & (col >= first_seen)
            block, cache_row = find_rows(
                paging, index, start_n, local, inside, BLOCK_SIZE, SAME_BLOCK
            )
            k_tile = load_cached(
                k, key_head, block, cache_row, inside, HEAD_DIM, BLOCK_D, CHECK, dtype
            )
            v_tile = load_cached(
                v, key_head, block, cache_row, inside, HEAD_DIM_V, BLOCK_DV, CHECK, dtype
            )
            maximum, total, acc = _attend(
                q_tile,
                k_tile,
                v_tile,
                k_scale,
                v_scale,
                load_scale(k_scale, key_head, block, cache_row, inside, BLOCK_N, CHECK),
                load_scale(v_scale, key_head, block, cache_row, inside, BLOCK_N, CHECK),
                maximum,
                total,
                acc,
                scores,
                terms,
                seq,
                head,
                first_m,
                start_n,
                row,
                col,
                first,
                tl.minimum(end, in_cache),
                exponent_scale,
                CHECK,
                LAZY_SCALE,
                SUBTRACT_FIRST,
                INPUT_PRECISION,
            )

    if k_new.ptr is not None:
        if is_last:
            block, cache_row = find_rows(
                paging, index, cached, local_new, arrives, BLOCK_SIZE, False
            )
            written = arrives & (block >= 0)
            k_values, k_row_scales = encoded(k_fresh, k, k_scale, key_head)
            v_values, v_row_scales = encoded(v_fresh, v, v_scale, key_head)
            # What is attended is what the cache will give back, so that chunks of a sequence agree.
            maximum, total, acc = _attend(
                q_tile,
                widened(k_values, dtype),
                widened(v_values, dtype),
                k_scale,
                v_scale,
                k_row_scales,
                v_row_scales,
                maximum,
                total,
                acc,
                scores,
                terms,
                seq,
                head,
                first_m,
                cached,
                row,
                cached + local_new,
                first,
                tl.minimum(end, cached + seqlen_new),
                exponent_scale,
                True,
                LAZY_SCALE,
                SUBTRACT_FIRST,
                INPUT_PRECISION,
            )
            if block_m == 0:
                store_cached(
                    k,
                    k_scale,
                    key_head,
                    block,
                    cache_row,
                    written,
                    k_values,
                    k_row_scales,
                    HEAD_DIM,
                )
                store_cached(
                    v,
                    v_scale,
                    key_head,
                    block,
                    cache_row,
                    written,
                    v_values,
                    v_row_scales,
                    HEAD_DIM_V,
                )

    # Full tiles are not masked, so dead rows hold garbage until here.
    maximum = tl.where(live, maximum, initial_maximum)
    total = tl.where(live, total, initial_total)
    empty = total == 0.0
    acc = tl.where((live & ~empty)[:, None], acc / tl.where(empty, 1.0, total)[:, None], 0.0)
    natural = maximum * scores.scale if LAZY_SCALE else maximum
    value = tl.where(empty, float("-inf"), natural + tl.log2(total) * LN2)
    inside = row < seq.rows
    result = split * num_sequences + index
    if lse.ptr is not None:
        tl.store(head_base(lse, result, head, row), value, mask=inside)
    if SPLIT:
        # A part without keys is not read again.
        inside = inside & ~empty
    dim = tl.arange(0, BLOCK_DV)
    pointers = head_base(out, result, head, row)[:, None] + dim[None, :] * out.stride_dim
    keep = inside[:, None] & (dim < HEAD_DIM_V)[None, :]
    tl.store(pointers, acc.to(out.ptr.dtype.element_ty), mask=keep)

    if counters is not None:
        # The program that finishes a tile last joins its parts: which one that is changes nothing.
        tl.debug_barrier()
        slot = (index * num_key_heads + key_head) * num_blocks_m + block_m
        finished = tl.atomic_add(counters + slot, 1, sem="acq_rel")
        if finished == num_splits - 1:
            tl.store(counters + slot, 0)
            begin_row = block_m * BLOCK_M
            for number in range(begin_row, tl.minimum(begin_row + BLOCK_M, num_rows)):
                combine_row(
                    out,
                    lse,
                    final_out,
                    final_lse,
                    index,
                    number // group,
                    key_head * group + number % group,
                    num_sequences,
                    num_splits,
                    HEAD_DIM_V,
                    BLOCK_DV,
                    BLOCK_SPLITS,
                )


def launch_attention_decode(
    q: torch.Tensor,
    cached: CachedKeys,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    modifiers: Modifiers,
    config: DecodeConfig,
    *,
    partial_out: torch.Tensor | None = None,
    partial_lse: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    input_precision: str = "ieee",
) -> None:
    """Appends what is new to the cache and writes attention of q over all of it into `out`.

    q is (batch, seqlen_q, num_heads, head_dim), `out` (batch, seqlen_q, num_heads, head_dim_v),
    `lse` float32 (batch, num_heads, seqlen_q). Where `config.num_splits` > 1 the caller hands over
    float32 `partial_out` (num_splits * batch, seqlen_q, num_heads, head_dim_v) and `partial_lse`
    (num_splits * batch, num_heads, seqlen_q), and with `config.last_combines` int32 `counters` of
    `config.num_counters(...)` zeros, which are zeros again afterwards. Lengths and tables are read
    on the device. Arguments are taken as valid: the callers check them.

    A step loads, once for each key/value head: its live keys and values (of a window, its tiles);
    q once for each split (twice with rotary, whose partner elements are loaded too); each block
    number once a row of a tile, or once a tile where a block holds whole tiles; and it stores and
    loads `head_dim_v + 1` floats a query row for each split but the empty ones. Nothing is in
    proportion to the capacity of the cache.
    """
    batch, seqlen_q, num_heads, head_dim = q.shape
    head_dim_v = cached.v.shape[-1]
    num_key_heads = cached.k.shape[-2]
    fused = cached.k_new is not None and config.appends and cached.seqlen_new <= NEW_ROWS
    fused = fused and q.numel() > 0
    if cached.k_new is not None and not fused:
        launch_append(cached)
    split = config.num_splits > 1
    num_programs = batch * num_key_heads * config.blocks_m(q, cached) * config.num_splits
    if num_programs == 0:
        return
    k, v, k_scale, v_scale = storage(cached)
    _attention_decode_kernel[(num_programs,)](
        rows(q),
        k,
        v,
        k_scale,
        v_scale,
        rows(cached.k_new if fused else None),
        rows(cached.v_new if fused else None),
        rows(partial_out if split else out),
        row_scalars(partial_lse if split else lse),
        rows(out if config.last_combines and split else None),
        row_scalars(lse if config.last_combines and split else None),
        counters if config.last_combines and split else None,
        Shape(seqlen_q, cached.capacity, num_heads, num_heads // num_key_heads),
        masks(modifiers),
        vector(cached.seqlens),
        cached.seqlen_new,
        paging(cached),
        rotary(cached),
        scores(modifiers),
        *terms(modifiers),
        batch,
        config.num_splits,
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=padded_dim(head_dim),
        BLOCK_DV=padded_dim(head_dim_v),
        BLOCK_NEW=NEW_ROWS,
        BLOCK_SPLITS=config.block_splits if config.last_combines else 1,
        BLOCK_SIZE=cached.block_size,
        ROTARY_DIM=cached.rotary_dim,
        INTERLEAVED=cached.interleaved,
        SPLIT=split,
        ONE_WALK=config.one_walk,
        LAZY_SCALE=modifiers.lazy_scale,
        INPUT_PRECISION=input_precision,
        **config.launch_options,
    )
    if split and not config.last_combines:
        assert partial_out is not None and partial_lse is not None
        launch_combine_splits(partial_out, partial_lse, out, lse, config)
