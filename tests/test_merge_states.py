"""Attention states over two sets of keys, merged into one over their union."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.testing import assert_parity
from tests.cache_definition import DIM, DIM_V, HEADS, HEADS_KV, Store, assert_same, draw


def states(packed: bool, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Attention over keys 0..4, over 5..11, and over all of them."""
    q = draw(2, 3, HEADS, DIM, seed=1, dtype=dtype)
    k, v = (draw(2, 12, HEADS_KV, d, seed=d, dtype=dtype) for d in (DIM, DIM_V))
    parts: list[Tensor] = []
    for keys in (slice(0, 5), slice(5, 12), slice(0, 12)):
        parts.extend(reference.attention(q, k[:, keys], v[:, keys], return_lse=True))
    if packed:
        parts = [x.flatten(0, 1) if x.dim() == 4 else x.transpose(0, 1).flatten(1) for x in parts]
    return parts[:4], parts[4:]


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_merged_states_are_attention_over_the_union(packed: bool) -> None:
    given, wanted = states(packed)
    out, lse = fastattn.merge_attention_states(*given)
    assert_same(out, wanted[0])
    assert_same(lse, wanted[1])
    swapped = fastattn.merge_attention_states(*given[2:], *given[:2])
    assert torch.equal(swapped[1], lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_has_the_dtype_of_its_operands(dtype: torch.dtype) -> None:
    given, _ = states(False, dtype)
    out, lse = fastattn.merge_attention_states(*given)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    exact = fastattn.merge_attention_states(*(x.double() for x in given))
    halves = [x.float() for x in given]
    total = torch.logaddexp(halves[1], halves[3])
    plain_out = sum(
        (halves[i + 1] - total).exp().transpose(1, 2)[..., None] * halves[i] for i in (0, 2)
    )
    assert_parity(out, plain_out.to(dtype), exact[0])
    assert_parity(lse, total, exact[1])


def test_a_state_without_keys_is_ignored_whatever_it_holds() -> None:
    (out_a, lse_a, out_b, lse_b), _ = states(False)
    lse_a, lse_b = lse_a.clone(), lse_b.clone()
    out_a, out_b = out_a.clone(), out_b.clone()
    lse_a[0, 1], lse_b[1, 2], lse_a[1, 2, 0] = -math.inf, -math.inf, -math.inf
    out_a[0, :, 1], out_b[1, :, 2], out_a[1, 0, 2] = math.nan, math.inf, math.nan
    out, lse = fastattn.merge_attention_states(out_a, lse_a, out_b, lse_b)
    assert torch.equal(out[0, :, 1], out_b[0, :, 1])
    assert torch.equal(lse[0, 1], lse_b[0, 1])
    assert torch.equal(out[1, 1:, 2], out_a[1, 1:, 2])
    assert out[1, 0, 2].count_nonzero() == 0
    assert lse[1, 2, 0] == -math.inf
    assert out.isfinite().all()


def test_merging_is_differentiable_and_has_no_nan_in_its_gradients() -> None:
    given, _ = states(False)
    given = [x.clone().requires_grad_() for x in given]
    assert torch.autograd.gradcheck(fastattn.merge_attention_states, tuple(given))
    with torch.no_grad():
        given[1][0, 1], given[3][0, 1, 0] = -math.inf, -math.inf
        given[0][0, :, 1] = math.nan
    out, lse = fastattn.merge_attention_states(*given)
    (out.sum() + lse.masked_fill(torch.isneginf(lse), 0.0).sum()).backward()
    for tensor in given:
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert given[0].grad[0, :, 1].count_nonzero() == 0  # type: ignore[index]
    assert (given[2].grad[0, 1:, 1] == 1).all()  # type: ignore[index]


def test_a_shared_prefix_is_merged_with_each_rows_own_keys() -> None:
    """The use that the docstring shows."""
    batch, prefix = 3, 6
    prefix_k, prefix_v = draw(1, prefix, HEADS_KV, DIM), draw(1, prefix, HEADS_KV, DIM)
    q, k, v = (draw(batch, 2, h, DIM, seed=h) for h in (HEADS, HEADS_KV, HEADS_KV + 1))
    v = v[:, :, :HEADS_KV]
    store = Store("contiguous", batch, dims=(DIM, DIM))
    rows = q.flatten(0, 1)[None]
    shared_out, shared_lse = fastattn.attention(rows, prefix_k, prefix_v, return_lse=True)
    own = fastattn.attention_with_kv_cache(
        q, store.k, store.v, k, v, cache_seqlens=0, causal=True, return_lse=True
    )
    lse = shared_lse[0].unflatten(1, (batch, 2)).transpose(0, 1)
    out, _ = fastattn.merge_attention_states(shared_out.view_as(q), lse, *own)
    whole_k, whole_v = (
        torch.cat((first.expand(batch, -1, -1, -1), own), 1)
        for first, own in ((prefix_k, k), (prefix_v, v))
    )
    assert_same(out, reference.attention(q, whole_k, whole_v, causal=True))
