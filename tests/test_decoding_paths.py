"""Caches in 8 bits; what runs a call on a cache, what that reads, and its bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import Quantized, Rotary, Window, dispatch, reference, sdpa
from tests.cache_definition import (
    DIM,
    DIM_V,
    HEADS,
    HEADS_KV,
    SCALE,
    Store,
    assert_same,
    by_definition,
    draw,
)

IMPLS = ["reference", "sdpa"]
BEFORE = [0, 9, 9, 17]


# 8 bits.


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["contiguous", "blocks of 3"])
@pytest.mark.parametrize("per", ["token", "head"])
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_quantized_cache_is_attended_as_it_reads_back(
    name: Any, per: str, layout: str, impl: str
) -> None:
    store = Store(layout, 2)
    shapes = store.k.shape, store.v.shape
    scales = (
        [None, None] if per == "token" else [torch.tensor([0.02, 0.03]), torch.tensor([0.04, 0.01])]
    )
    k_cache, v_cache = (
        Quantized.zeros(shape, name, scale=scale)
        for shape, scale in zip(shapes, scales, strict=True)
    )
    for cache in (k_cache, v_cache):
        if name == "fp8":
            cache.values.view(torch.int8).fill_(0x7F)  # NaN
        if per == "token":
            cache.scale.fill_(math.nan)
    before = torch.tensor([0, 7])
    k0, v0 = draw(2, 7, HEADS_KV, DIM, seed=1), draw(2, 7, HEADS_KV, DIM_V, seed=2)
    k1, v1 = draw(2, 3, HEADS_KV, DIM, seed=3), draw(2, 3, HEADS_KV, DIM_V, seed=4)
    fastattn.append_to_kv_cache(k_cache, v_cache, k0, v0, cache_seqlens=0, block_table=store.table)
    q = draw(2, 3, HEADS, DIM, seed=5)
    out = fastattn.attention_with_kv_cache(
        q, k_cache, v_cache, k1, v1, cache_seqlens=before, block_table=store.table, causal=True,
        impl=impl,
    )  # fmt: skip
    rows = []
    for row, length in enumerate(before.tolist()):
        tokens = []
        for old, new, scale in ((k0, k1, scales[0]), (v0, v1, scales[1])):
            x = torch.cat((old[row, :length], new[row])).float()
            largest = 127.0 if name == "int8" else 448.0
            unit = x.abs().amax(-1) / largest if scale is None else scale.expand(len(x), -1)
            steps = (x / unit[..., None]).clamp(-largest, largest)
            steps = steps.round() if name == "int8" else steps.to(torch.float8_e4m3fn)
            tokens.append(steps.double() * unit.double()[..., None])
        rows.append((tokens[0], tokens[1]))
    wanted, _ = by_definition(q, rows, lambda b, h, i, p, j, x: x * SCALE if j <= p else None)
    assert_same(out, wanted)


def test_the_error_of_a_quantized_cache() -> None:
    """Weights are a mean, so values err as their elements do: half a step of int8, 1/16 of fp8."""
    keys, values = draw(1, 24, HEADS_KV, DIM), draw(1, 24, HEADS_KV, DIM)
    q = draw(1, 5, HEADS, DIM, seed=1)
    exact = reference.attention(q, keys, values)
    for name, relative in (("int8", 0.5 / 127), ("fp8", 1 / 16)):
        v_cache = Quantized.make(values, name)
        out = fastattn.attention_with_kv_cache(q, keys, v_cache)
        assert (out - exact).abs().max() <= 1.001 * relative * values.abs().max()
        assert (out - exact).abs().max() > 0


# The way there: what runs, what it reads, and the bits.


def test_explain_says_what_runs_and_why_not_the_others() -> None:
    store, q = Store("blocks of 8", 2), draw(2, 1, HEADS, DIM)
    k = draw(2, 1, HEADS_KV, DIM)
    v_cache = Quantized.zeros(store.v.shape, "fp8")
    before = store.k.clone()
    explained = fastattn.explain_with_kv_cache(
        q, store.k, v_cache, k, k[..., :DIM_V], cache_seqlens=3, block_table=store.table,
        causal=True, softcap=1.0, sinks=draw(HEADS), batch_invariant=True, return_lse=True,
        rotary=Rotary.make(4, 8),
    )  # fmt: skip
    assert explained.chosen == "reference"
    assert len(explained.reasons["sdpa"]) == 4
    assert any("float64" in reason for reason in explained.reasons["triton"])
    text = str(explained)
    for part in ("blocks of 8", "float8_e4m3fn scaled per token", "rotary 4", "batch_invariant"):
        assert part in text
    assert torch.equal(store.k.nan_to_num(), before.nan_to_num())
    plain = fastattn.explain_with_kv_cache(
        q, store.k, store.v, cache_seqlens=0, block_table=store.table
    )
    assert plain.chosen == "sdpa"


def test_listeners_hear_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, Any]] = []
    monkeypatch.setattr(
        dispatch, "listeners", [lambda name, problem: heard.append((name, problem))]
    )
    store, q = Store("contiguous", 1), draw(1, 1, HEADS, DIM)
    k, v = draw(1, 1, HEADS_KV, DIM), draw(1, 1, HEADS_KV, DIM_V)
    fastattn.append_to_kv_cache(store.k, store.v, k, v, cache_seqlens=0)
    fastattn.attention_with_kv_cache(q, store.k, store.v, cache_seqlens=1, causal=True)
    ((name, problem),) = heard
    assert name == "sdpa"
    assert dispatch.explain(problem).chosen == "sdpa"


def test_sdpa_reads_the_cache_in_place_and_alike_rows_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Tensor, Tensor, Any]] = []
    original = sdpa.scaled_dot_product_attention

    def recorded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append((q, k, options.get("attn_mask")))
        return original(q, k, v, **options)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", recorded)
    store = Store("contiguous", 5, dims=(DIM, DIM))
    lengths = [4, 4, 9, 9, 9]
    for row, length in enumerate(lengths):
        store.fill(row, draw(length, HEADS_KV, DIM), draw(length, HEADS_KV, DIM))
    q = draw(5, 1, HEADS, DIM)
    fastattn.attention_with_kv_cache(
        q, store.k, store.v, cache_seqlens=torch.tensor(lengths), mask=Window(5, 0)
    )
    # No head is repeated, no mask made for one query, no key outside the window handed over.
    assert [tuple(k.shape) for _, k, _ in calls] == [(2, HEADS_KV, 4, DIM), (3, HEADS_KV, 6, DIM)]
    for _, k, mask in calls:
        assert mask is None
        assert k.untyped_storage().data_ptr() == store.k.untyped_storage().data_ptr()


def test_sdpa_gathers_only_the_blocks_that_may_be_attended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gathered: list[int] = []
    original = Tensor.index_select

    def recorded(self: Tensor, dim: int, index: Tensor) -> Tensor:
        gathered.append(index.numel())
        return original(self, dim, index)

    store = Store("blocks of 3", 2)
    lengths = [4, 20]
    for row, length in enumerate(lengths):
        store.fill(row, draw(length, HEADS_KV, DIM), draw(length, HEADS_KV, DIM_V))
    q = draw(2, 1, HEADS, DIM)
    monkeypatch.setattr(Tensor, "index_select", recorded)
    fastattn.attention_with_kv_cache(
        q, store.k, store.v, cache_seqlens=torch.tensor(lengths), mask=Window(4, 0),
        block_table=store.without_unused_blocks(lengths),
    )  # fmt: skip
    # Keys 0..3 lie in blocks 0 and 1, keys 15..19 in blocks 5 and 6; k and v each.
    assert gathered == [2, 2, 2, 2]


@pytest.mark.parametrize("layout", ["contiguous", "blocks of 3"])
def test_a_batch_invariant_row_has_the_same_bits_in_any_batch(layout: str) -> None:
    store = Store(layout, 4, dtype=torch.float32)
    for row, length in enumerate(BEFORE):
        store.fill(row, draw(length, HEADS_KV, DIM), draw(length, HEADS_KV, DIM_V))
    q = draw(4, 2, HEADS, DIM, dtype=torch.float32)

    def attend(rows: slice) -> Tensor:
        table = None if store.table is None else store.table[rows]
        own = rows if table is None else slice(None)
        return fastattn.attention_with_kv_cache(
            q[rows], store.k[own], store.v[own], cache_seqlens=torch.tensor(BEFORE)[rows],
            block_table=table, causal=True, batch_invariant=True,
        )  # fmt: skip

    whole = attend(slice(0, 4))
    for row in range(4):
        assert torch.equal(attend(slice(row, row + 1)), whole[row : row + 1])


def test_autocast_casts_the_operands_and_not_the_cache() -> None:
    store = Store("contiguous", 1, dtype=torch.bfloat16)
    q, k, v = (
        draw(1, 2, h, d).float() for h, d in ((HEADS, DIM), (HEADS_KV, DIM), (HEADS_KV, DIM_V))
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = fastattn.attention_with_kv_cache(
            q, store.k, store.v, k, v, cache_seqlens=0, causal=True, impl="reference"
        )
    assert out.dtype == torch.bfloat16
    assert torch.equal(store.k[:, :2], k.bfloat16())
    wanted = reference.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True)
    assert torch.equal(out, wanted)
