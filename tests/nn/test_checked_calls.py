"""A cache checks the call of a step once for all layers, and again whatever differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import Window, decoding
from fastattn.cache_problem import make_cache_problem
from fastattn.nn import BaseKVCache, KVCache, PagedKVCache

LAYERS, BATCH, HEADS, HEADS_KV, DIM = 3, 2, 4, 2, 8


@pytest.fixture(params=["contiguous", "paged"])
def cache(request: pytest.FixtureRequest) -> BaseKVCache:
    if request.param == "contiguous":
        return KVCache(LAYERS, BATCH, 32, HEADS_KV, DIM, dtype=torch.float32)
    return PagedKVCache(
        LAYERS, 16, 4, HEADS_KV, DIM, max_batch=BATCH, max_seqlen=32, dtype=torch.float32
    )


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each call that was checked."""
    seen: list[Any] = []

    def check(*args: Any, **options: Any) -> Any:
        seen.append(options)
        return make_cache_problem(*args, **options)

    monkeypatch.setattr(decoding, "make_cache_problem", check)
    return seen


def operands(seqlen: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(BATCH, seqlen, HEADS, DIM, dtype=dtype),
        torch.randn(BATCH, seqlen, HEADS_KV, DIM, dtype=dtype),
        torch.randn(BATCH, seqlen, HEADS_KV, DIM, dtype=dtype),
    )


def test_a_step_is_checked_once_and_every_layer_gets_its_own_result(
    cache: BaseKVCache, checks: list[Any]
) -> None:
    held: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in range(LAYERS)]
    for step, seqlen in enumerate((5, 1, 1)):
        for layer, (keys, values) in enumerate(held):
            q, k, v = operands(seqlen)
            out = cache.attention(layer, q, k, v, causal=True)
            keys.append(k)
            values.append(v)
            k_all, v_all = torch.cat(keys, 1), torch.cat(values, 1)
            want = decoding.attention_with_kv_cache(q, k_all, v_all, causal=True, impl="reference")
            torch.testing.assert_close(out, want)
            checks.pop()  # the last line's own
        cache.advance(seqlen)
        assert len(checks) == step + 1


def test_what_differs_is_checked_again(cache: BaseKVCache, checks: list[Any]) -> None:
    q, k, v = operands()
    cache.attention(0, q, k, v)
    cache.attention(1, q, k, v, mask=Window(3, 0))
    cache.attention(2, q, k, v, softmax_scale=0.5)
    cache.attention(0, q)  # reads alone
    cache.attention(0, *operands(2))
    with torch.no_grad():
        cache.attention(1, q, k, v)
    assert len(checks) == 6
    # The same numbers in another object, and a mask that is kept, are the same call.
    cache.attention(1, q, k, v, softmax_scale=1 / 2)
    cache.attention(2, q, k, v)
    assert len(checks) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.double(), k.double(), v.double()), "k_cache must have the dtype"),
        (lambda q, k, v: (q, k.half(), v), "k must have the dtype and device of q"),
        (lambda q, k, v: (q[..., :4], k, v), "must have the head_dim"),
        (lambda q, k, v: (q[:, :, :3], k, v), "must be a multiple of num_heads_kv"),
        (lambda q, k, v: (q, k[:, :, :1], v[:, :, :1]), "k must have the heads"),
        (lambda q, k, v: (q, k, None), "k and v must be given both or neither"),
    ],
)
def test_a_later_layers_mistake_is_told(cache: BaseKVCache, change: Any, message: str) -> None:
    q, k, v = operands()
    cache.attention(0, q, k, v)
    with pytest.raises((TypeError, ValueError), match=message):
        cache.attention(1, *change(q, k, v))


def test_a_later_layer_that_requires_grad_is_refused(cache: BaseKVCache) -> None:
    q, k, v = operands()
    cache.attention(0, q, k, v)
    with pytest.raises(RuntimeError, match="q requires grad"):
        cache.attention(1, q.requires_grad_(), k, v)


def test_lengths_written_by_somebody_else_are_seen() -> None:
    cache = KVCache(1, BATCH, 32, HEADS_KV, DIM, dtype=torch.float32)
    q, k, v = operands(4)
    cache.attention(0, q, k, v, causal=True)
    cache.advance(4)
    q = operands()[0]
    whole = cache.attention(0, q)
    cache.seqlens.sub_(2)
    torch.testing.assert_close(
        cache.attention(0, q), decoding.attention_with_kv_cache(q, k[:, :2], v[:, :2])
    )
    cache.seqlens.add_(2)
    torch.testing.assert_close(cache.attention(0, q), whole)


def test_autocast_casts_every_layers_operands(checks: list[Any]) -> None:
    cache = KVCache(2, BATCH, 32, HEADS_KV, DIM, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        outs = [cache.attention(layer, *operands()) for layer in range(2)]
    assert [out.dtype for out in outs] == [torch.bfloat16] * 2
