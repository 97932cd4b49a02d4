"""Caches on the torch implementations, against a definition that shares no code with them.

All that a cache holds beyond a row's tokens is NaN in these tests, and table entries beyond a row's
blocks are no blocks at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastattn
from fastattn import ALiBi, Lengths, Prefix, Rotary, T5Bias, Window, reference
from fastattn.testing import assert_parity
from tests.cache_definition import (
    CAPACITY,
    DIM,
    DIM_V,
    HEADS,
    HEADS_KV,
    SCALE,
    Score,
    Store,
    assert_same,
    by_definition,
    draw,
    generator,
    turned,
)

LAYOUTS = ["contiguous", "strided", "blocks of 1", "blocks of 3", "blocks of 8"]
IMPLS = ["reference", "sdpa"]


# Every mask and bias.

BEFORE = [0, 9, 9, 17]


def t5_bucket(distance: int, buckets: int, max_distance: int) -> int:
    """Of T5's decoder: exact below half of the buckets, then logarithmic; later keys in 0."""
    back = max(-distance, 0)
    exact = buckets // 2
    if back < exact:
        return back
    far = exact + int(math.log(back / exact) / math.log(max_distance / exact) * (buckets - exact))
    return min(far, buckets - 1)


def features(seqlen_q: int) -> dict[str, tuple[dict[str, Any], Score, bool]]:
    """Arguments, what they mean, and whether torch's SDPA can do it."""
    batch = len(BEFORE)
    dense = torch.rand(batch, HEADS, seqlen_q, CAPACITY, generator=generator(1)) < 0.6
    one_row = torch.rand(seqlen_q, CAPACITY, generator=generator(2)) < 0.5
    bias = draw(batch, 1, seqlen_q, CAPACITY, seed=3)
    head_bias = draw(HEADS, 1, CAPACITY, seed=4)
    slopes = torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=torch.float64)
    row_slopes = draw(batch, HEADS, seed=5).abs()
    table = draw(8, HEADS, seed=6)
    starts, ends = [0, 2, 9, 18], [1, 11, 24, 20]
    prefix = [2, 5, 24, 0]
    lengths = Lengths(torch.tensor(ends), starts_k=torch.tensor(starts))
    rows = [seqlen_q, 1, 0, max(seqlen_q - 1, 0)]

    def plain(b: int, h: int, i: int, p: int, j: int, x: float) -> float:
        return x * SCALE

    def where(seen: Callable[[int, int, int, int, int], bool], score: Score = plain) -> Score:
        return lambda b, h, i, p, j, x: score(b, h, i, p, j, x) if seen(b, h, i, p, j) else None

    return {
        "bidirectional": ({}, plain, True),
        "causal": ({"causal": True}, where(lambda b, h, i, p, j: j <= p), True),
        "window": (
            {"mask": Window(4, 1)},
            where(lambda b, h, i, p, j: p - 4 <= j <= p + 1),
            True,
        ),
        "causal window": (
            {"mask": Window(3, 0), "causal": True},
            where(lambda b, h, i, p, j: p - 3 <= j <= p),
            True,
        ),
        "prefix": (
            {"mask": Prefix(torch.tensor(prefix))},
            where(lambda b, h, i, p, j: j <= p or j < prefix[b]),
            True,
        ),
        "causal lengths": (
            {"mask": lengths, "causal": True},
            where(lambda b, h, i, p, j: j <= p and starts[b] <= j < ends[b]),
            True,
        ),
        "rows of queries": (
            {"mask": Lengths(torch.tensor([24] * 4), seqlens_q=torch.tensor(rows)), "causal": True},
            where(lambda b, h, i, p, j: j <= p and i < rows[b]),
            True,
        ),
        "dense": ({"mask": dense}, where(lambda b, h, i, p, j: bool(dense[b, h, i, j])), True),
        "dense causal": (
            {"mask": one_row, "causal": True},
            where(lambda b, h, i, p, j: j <= p and bool(one_row[i, j])),
            True,
        ),
        "bias": (
            {"bias": bias, "causal": True},
            where(
                lambda b, h, i, p, j: j <= p,
                lambda b, h, i, p, j, x: x * SCALE + float(bias[b, 0, i, j]),
            ),
            True,
        ),
        "bias by head": (
            {"bias": head_bias, "mask": lengths},
            where(
                lambda b, h, i, p, j: starts[b] <= j < ends[b],
                lambda b, h, i, p, j, x: x * SCALE + float(head_bias[h, 0, j]),
            ),
            True,
        ),
        "ALiBi": (
            {"bias": ALiBi(slopes), "causal": True},
            where(
                lambda b, h, i, p, j: j <= p,
                lambda b, h, i, p, j, x: x * SCALE - float(slopes[h]) * abs(j - p),
            ),
            True,
        ),
        "ALiBi by row": (
            {"bias": ALiBi(row_slopes), "mask": Window(6, 0)},
            where(
                lambda b, h, i, p, j: p - 6 <= j <= p,
                lambda b, h, i, p, j, x: x * SCALE - float(row_slopes[b, h]) * abs(j - p),
            ),
            True,
        ),
        "T5": (
            {
                "bias": T5Bias(table, bidirectional=False, max_distance=12),
                "causal": True,
                "softmax_scale": 1.0,
            },
            where(
                lambda b, h, i, p, j: j <= p,
                lambda b, h, i, p, j, x: x + float(table[t5_bucket(j - p, 8, 12), h]),
            ),
            True,
        ),
        "softcap": (
            {"softcap": 0.7, "causal": True},
            where(
                lambda b, h, i, p, j: j <= p,
                lambda b, h, i, p, j, x: 0.7 * math.tanh(x * SCALE / 0.7),
            ),
            False,
        ),
        "negative scale": (
            {"softmax_scale": -0.3},
            lambda b, h, i, p, j, x: x * -0.3,
            False,
        ),
    }


CASES = [
    (name, impl)
    for name, (_, _, in_sdpa) in features(1).items()
    for impl in IMPLS
    if impl == "reference" or in_sdpa
]


@pytest.mark.parametrize(("name", "impl"), CASES)
@pytest.mark.parametrize(("seqlen_q", "new"), [(1, 1), (3, 3), (4, 2), (1, None), (5, None)])
def test_features_are_their_definition(
    name: str, seqlen_q: int, new: int | None, impl: str
) -> None:
    options, score, _ = features(seqlen_q)[name]
    q = draw(4, seqlen_q, HEADS, DIM, seed=10)
    k = v = None
    if new is not None:
        k, v = draw(4, new, HEADS_KV, DIM, seed=11), draw(4, new, HEADS_KV, DIM_V, seed=12)
    for layout in LAYOUTS:
        store = Store(layout, 4)
        rows = []
        for row, length in enumerate(BEFORE):
            keys, values = draw(length, HEADS_KV, DIM, seed=row), draw(length, HEADS_KV, DIM_V)
            store.fill(row, keys, values)
            if k is not None and v is not None:
                keys, values = torch.cat((keys, k[row])), torch.cat((values, v[row]))
            rows.append((keys, values))
        given = {
            "cache_seqlens": torch.tensor(BEFORE, dtype=torch.int32),
            "block_table": store.without_unused_blocks([len(keys) for keys, _ in rows]),
        }
        wanted, wanted_lse = by_definition(q, rows, score)
        with_lse = impl == "reference"
        got = fastattn.attention_with_kv_cache(
            q, store.k, store.v, k, v, impl=impl, return_lse=with_lse, **given, **options
        )
        out = got[0] if with_lse else got
        assert_same(out, wanted)
        assert out.is_contiguous()
        if with_lse:
            assert_same(got[1], wanted_lse)
        for row, (keys, values) in enumerate(rows):
            stored = store.tokens(row, len(keys))
            assert torch.equal(stored[0], keys)
            assert torch.equal(stored[1], values)
        used = sum(len(keys) for keys, _ in rows) * HEADS_KV
        assert int(store.k.isfinite().sum()) == used * DIM
        assert int(store.v.isfinite().sum()) == used * DIM_V


@pytest.mark.parametrize("layout", ["contiguous", "blocks of 3"])
def test_sinks_join_the_sum_of_rows_with_and_without_keys(layout: str) -> None:
    store, sinks = Store(layout, 3), draw(HEADS, seed=2)
    rows = []
    for row, length in enumerate([0, 4, 11]):
        rows.append((draw(length, HEADS_KV, DIM, seed=row), draw(length, HEADS_KV, DIM_V)))
        store.fill(row, *rows[-1])
    q = draw(3, 2, HEADS, DIM, seed=5)
    wanted = by_definition(
        q, rows, lambda b, h, i, p, j, x: x * SCALE if j <= p else None, sinks
    )  # fmt: skip
    out, lse = fastattn.attention_with_kv_cache(
        q, store.k, store.v, cache_seqlens=torch.tensor([0, 4, 11]), block_table=store.table,
        causal=True, sinks=sinks, return_lse=True,
    )  # fmt: skip
    assert_same(out, wanted[0])
    assert_same(lse, wanted[1])
    assert out[0].count_nonzero() == 0
    assert torch.equal(lse[0], sinks[:, None].expand(-1, 2))


# Rotary.


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize(
    ("seqlen_q", "new", "pairs", "given"),
    [
        (3, 3, 4, False), (1, 1, 2, False), (1, 3, 3, False), (2, None, 1, False),
        (3, 3, 2, True), (1, 1, 4, True), (2, None, 3, True),
    ],
)  # fmt: skip
def test_rotary_turns_queries_and_new_keys(
    seqlen_q: int, new: int | None, pairs: int, given: bool, interleaved: bool, impl: str
) -> None:
    """`given`: by positions that are no places in the cache."""
    before = [3, 9, 14]
    angles = draw(30, pairs, seed=7)
    positions = torch.randint(0, 30, (3, seqlen_q), generator=generator(8)) if given else None
    rotary = Rotary(angles.cos(), angles.sin(), interleaved, positions)
    q = draw(3, seqlen_q, HEADS, DIM, seed=1)
    k = v = None
    if new is not None:
        k, v = draw(3, new, HEADS_KV, DIM, seed=2), draw(3, new, HEADS_KV, DIM_V, seed=3)
    for layout in LAYOUTS:
        store = Store(layout, 3)
        rows, turned_q = [], q.clone()
        for row, length in enumerate(before):
            keys, values = draw(length, HEADS_KV, DIM, seed=row), draw(length, HEADS_KV, DIM_V)
            store.fill(row, keys, values)
            total = length + (new or 0)
            at_q = torch.arange(total - seqlen_q, total) if positions is None else positions[row]
            turned_q[row] = turned(q[row], angles, interleaved, at_q)
            if k is not None and v is not None:
                at_k = torch.arange(length, total) if positions is None else positions[row]
                keys = torch.cat((keys, turned(k[row], angles, interleaved, at_k)))
                values = torch.cat((values, v[row]))
            rows.append((keys, values))
        wanted, _ = by_definition(
            turned_q, rows, lambda b, h, i, p, j, x: x * SCALE if j <= p else None
        )
        out = fastattn.attention_with_kv_cache(
            q, store.k, store.v, k, v, cache_seqlens=torch.tensor(before), rotary=rotary,
            block_table=store.table, causal=True, impl=impl,
        )  # fmt: skip
        assert_same(out, wanted)
        for row, (keys, values) in enumerate(rows):
            stored = store.tokens(row, len(keys))
            assert_same(stored[0], keys)
            assert torch.equal(stored[1], values)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_before_the_first_key_is_not_turned(impl: str) -> None:
    angles = draw(30, DIM // 2, seed=7)
    rotary = Rotary(angles.cos(), angles.sin())
    keys, values = draw(2, HEADS_KV, DIM), draw(2, HEADS_KV, DIM_V)
    store = Store("contiguous", 1)
    store.fill(0, keys, values)
    q = draw(1, 4, HEADS, DIM)
    turned_q = turned(q[0], angles, False, torch.tensor([0, 0, 0, 1]))[None]
    wanted, _ = by_definition(turned_q, [(keys, values)], lambda b, h, i, p, j, x: x * SCALE)
    out = fastattn.attention_with_kv_cache(
        q, store.k, store.v, cache_seqlens=2, rotary=rotary, impl=impl
    )
    assert_same(out, wanted)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_the_queries_of_a_full_cache_stand_at_its_end(seqlen_q: int, impl: str) -> None:
    angles = draw(CAPACITY, DIM // 2, seed=7)
    keys, values = draw(1, CAPACITY, HEADS_KV, DIM), draw(1, CAPACITY, HEADS_KV, DIM_V)
    q = draw(1, seqlen_q, HEADS, DIM)
    positions = torch.arange(CAPACITY - seqlen_q, CAPACITY)
    turned_q = turned(q[0], angles, False, positions)[None]
    wanted, _ = by_definition(
        turned_q, [(keys[0], values[0])], lambda b, h, i, p, j, x: x * SCALE if j <= p else None
    )
    out = fastattn.attention_with_kv_cache(
        q, keys, values, rotary=Rotary(angles.cos(), angles.sin()), causal=True, impl=impl
    )
    assert_same(out, wanted)


# Token by token is one causal forward.


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("layout", ["contiguous", "blocks of 1", "blocks of 16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_chunks_of_tokens_are_one_causal_forward(
    dtype: torch.dtype, layout: str, chunk: int, impl: str
) -> None:
    seqlen, batch, dim = 70, 2, 16
    q = draw(batch, seqlen, HEADS, dim, seed=1, dtype=dtype)
    k, v = (draw(batch, seqlen, HEADS_KV, dim, seed=seed, dtype=dtype) for seed in (2, 3))
    rotary = Rotary.make(dim, seqlen)
    store = Store(layout, batch, 80, dims=(dim, dim), dtype=dtype)
    pieces = []
    for start in range(0, seqlen, chunk):
        own = [x[:, start : start + chunk] for x in (q, k, v)]
        pieces.append(
            fastattn.attention_with_kv_cache(
                own[0], store.k, store.v, *own[1:], cache_seqlens=start, rotary=rotary,
                block_table=store.table, causal=True, impl=impl,
            )
        )  # fmt: skip
    positions = torch.arange(seqlen).expand(batch, -1)
    wide = Rotary(rotary.cos.double(), rotary.sin.double())
    exact = reference.attention(
        *(wide.apply(x.double(), positions) for x in (q, k)), v.double(), causal=True
    )
    plain = reference.attention(*(rotary.apply(x, positions) for x in (q, k)), v, causal=True)
    assert_parity(torch.cat(pieces, 1), plain, exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_prompt_padded_on_its_left_is_the_prompt_without_padding(impl: str) -> None:
    """Positions by row, starts by row, then two more tokens each."""
    padding, seqlen, dim = [0, 4, 9], 10, 8
    batch = len(padding)
    q = draw(batch, seqlen + 2, HEADS, dim, seed=1)
    k, v = (draw(batch, seqlen + 2, HEADS_KV, dim, seed=seed) for seed in (2, 3))
    tables = Rotary.make(dim, 40)
    tables = Rotary(tables.cos.double(), tables.sin.double())
    store = Store("contiguous", batch, dims=(dim, dim))
    starts = torch.tensor(padding)
    pieces = []
    for rows in (slice(0, seqlen), slice(seqlen, seqlen + 1), slice(seqlen + 1, seqlen + 2)):
        place = torch.arange(rows.start, rows.stop)
        positions = (place[None] - starts[:, None]).clamp(min=0)
        pieces.append(
            fastattn.attention_with_kv_cache(
                q[:, rows], store.k, store.v, k[:, rows], v[:, rows], cache_seqlens=rows.start,
                rotary=Rotary(tables.cos, tables.sin, positions=positions), causal=True, impl=impl,
                mask=Lengths(torch.full((batch,), CAPACITY), starts_k=starts),
            )
        )  # fmt: skip
    out = torch.cat(pieces, 1)
    for row, start in enumerate(padding):
        positions = torch.arange(seqlen + 2 - start)[None]
        own_q, own_k = (tables.apply(x[row : row + 1, start:], positions) for x in (q, k))
        wanted = reference.attention(own_q, own_k, v[row : row + 1, start:], causal=True)
        assert_same(out[row : row + 1, start:], wanted)
        assert out[row, :start].count_nonzero() == 0


# Sharing, cross-attention, and what is empty.


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_may_share_the_blocks_of_a_prefix(impl: str) -> None:
    size, shared = 4, 2
    keys, values = draw(8, HEADS_KV, DIM), draw(8, HEADS_KV, DIM_V)
    k_cache = torch.full((7, size, HEADS_KV, DIM), math.nan, dtype=torch.float64)
    v_cache = torch.full((7, size, HEADS_KV, DIM_V), math.nan, dtype=torch.float64)
    for at, block in enumerate([5, 2]):
        k_cache[block] = keys[at * size : (at + 1) * size]
        v_cache[block] = values[at * size : (at + 1) * size]
    table = torch.tensor([[5, 2, 0], [5, 2, 6], [5, 1, 99]])
    before = torch.tensor([shared * size, shared * size, size])
    q, k, v = (
        draw(3, 2, h, d, seed=h + d) for h, d in ((HEADS, DIM), (HEADS_KV, DIM), (HEADS_KV, DIM_V))
    )
    rows = [
        (torch.cat((keys[:n], k[row])), torch.cat((values[:n], v[row])))
        for row, n in enumerate(before.tolist())
    ]
    wanted, _ = by_definition(q, rows, lambda b, h, i, p, j, x: x * SCALE if j <= p else None)
    out = fastattn.attention_with_kv_cache(
        q, k_cache, v_cache, k, v, cache_seqlens=before, block_table=table, causal=True, impl=impl
    )
    assert_same(out, wanted)
    assert torch.equal(k_cache[5], keys[:size])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["contiguous", "blocks of 8"])
def test_cross_attention_reads_a_cache_that_was_written_once(layout: str, impl: str) -> None:
    store = Store(layout, 2)
    keys, values = draw(2, CAPACITY, HEADS_KV, DIM), draw(2, CAPACITY, HEADS_KV, DIM_V)
    fastattn.append_to_kv_cache(
        store.k, store.v, keys, values, cache_seqlens=0, block_table=store.table
    )
    before = store.k.clone(), store.v.clone()
    q = draw(2, 3, HEADS, DIM, seed=4)
    for lengths, seqlens in (
        (None, [CAPACITY, CAPACITY]), (7, [7, 7]), (torch.tensor([5, 20]), [5, 20]),
    ):  # fmt: skip
        rows = [(keys[row, :n], values[row, :n]) for row, n in enumerate(seqlens)]
        wanted, _ = by_definition(q, rows, lambda b, h, i, p, j, x: x * SCALE)
        out = fastattn.attention_with_kv_cache(
            q, store.k, store.v, cache_seqlens=lengths, block_table=store.table, impl=impl
        )
        assert_same(out, wanted)
    # NaN is not equal to itself: all but the spare blocks is written.
    assert torch.equal(before[0].nan_to_num(7.0), store.k.nan_to_num(7.0))
    assert torch.equal(before[1].nan_to_num(7.0), store.v.nan_to_num(7.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_append_writes_only_the_new_tokens(layout: str) -> None:
    store = Store(layout, 3)
    before = [0, 20, 7]
    k, v = draw(3, 4, HEADS_KV, DIM), draw(3, 4, HEADS_KV, DIM_V)
    fastattn.append_to_kv_cache(
        store.k, store.v, k, v, cache_seqlens=torch.tensor(before), block_table=store.table
    )
    assert int(store.k.isfinite().sum()) == k.numel()
    assert int(store.v.isfinite().sum()) == v.numel()
    for row, length in enumerate(before):
        for j in range(4):
            place = store.place(row, length + j)
            assert torch.equal(store.k[place], k[row, j])
            assert torch.equal(store.v[place], v[row, j])


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_gives_empty(impl: str) -> None:
    def attend(batch: int, seqlen_q: int, new: int, capacity: int, **options: Any) -> Any:
        store = Store("contiguous", batch, capacity, dtype=torch.bfloat16)
        q, k, v = (
            torch.ones(batch, n, h, d, dtype=torch.bfloat16)
            for n, h, d in ((seqlen_q, HEADS, DIM), (new, HEADS_KV, DIM), (new, HEADS_KV, DIM_V))
        )
        return fastattn.attention_with_kv_cache(
            q, store.k, store.v, k, v, cache_seqlens=0, impl=impl, causal=True, **options
        )

    for batch, seqlen_q, new, capacity in ((0, 1, 1, 4), (2, 0, 1, 4), (2, 3, 0, 4), (2, 3, 0, 0)):
        out = attend(batch, seqlen_q, new, capacity)
        assert out.shape == (batch, seqlen_q, HEADS, DIM_V)
        assert out.dtype == torch.bfloat16
        assert out.count_nonzero() == 0
        if impl == "reference":
            _, lse = attend(batch, seqlen_q, new, capacity, return_lse=True)
            assert lse.shape == (batch, HEADS, seqlen_q)
            assert lse.dtype == torch.float32
            assert torch.isneginf(lse).all()
    table = torch.zeros(2, 0, dtype=torch.int32)
    q, cache = torch.ones(2, 1, HEADS, DIM), torch.ones(0, 4, HEADS_KV, DIM)
    out = fastattn.attention_with_kv_cache(q, cache, cache, block_table=table, impl=impl)
    assert torch.equal(out, torch.zeros_like(q))
