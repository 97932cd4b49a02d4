"""flash_attn_with_kvcache against a plain statement of what it computes."""

from collections.abc import Iterator

import pytest
import torch

import fastattn.integrations.flash_attn as shim
from fastattn.testing import assert_parity
from tests.integrations.devices import to
from tests.integrations.flash_attn_statement import plain, plain_batch


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def randn(*shape):
    return torch.randn(shape)


def rotated(x, cos, sin, positions, interleaved):
    """x (rows, heads, dim) turned by the angles of its positions."""
    cos, sin = (table[positions][:, None].to(x.dtype) for table in (cos, sin))
    half = cos.shape[-1]
    x = x.clone()
    a, b = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if interleaved
        else (slice(0, half), slice(half, 2 * half))
    )
    first, second = x[..., a].clone(), x[..., b].clone()
    x[..., a], x[..., b] = first * cos - second * sin, second * cos + first * sin
    return x


LENGTHS = torch.tensor([0, 17, 40], dtype=torch.int32)


def with_cache(
    q, k_cache, v_cache, k, v, cos=None, sin=None, lengths=LENGTHS, rows=None, leftpad=None,
    rotary_interleaved=True, **options,
):  # fmt: skip
    """A plain statement of flash_attn_with_kvcache: output, log-sum-exp and the caches after it."""
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    local = options.get("causal", False) or options.get("window_size", (-1, -1)) != (-1, -1)
    outs, lses = [], []
    for b in range(q.shape[0]):
        row = b if rows is None else int(rows[b])
        start = 0 if leftpad is None else int(leftpad[b])
        total = int(lengths[b])
        own_q = q[b]
        if cos is not None:
            of_q = total + torch.arange(q.shape[1]) * int(local)
            own_q = rotated(own_q, cos, sin, of_q, rotary_interleaved)
        if k is not None:
            own_k = k[b]
            if cos is not None:
                of_k = total + torch.arange(k.shape[1])
                own_k = rotated(own_k, cos, sin, of_k, rotary_interleaved)
            k_cache[row, total : total + k.shape[1]] = own_k
            v_cache[row, total : total + k.shape[1]] = v[b]
            total += k.shape[1]
        out, lse = plain(own_q, k_cache[row, start:total], v_cache[row, start:total], **options)
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses), k_cache, v_cache


def check_cache(arguments, rotary=(None, None), impl="auto", call=None, device="cpu", **options):
    """A call on a cache against the statement, in output, log-sum-exp and the caches' contents."""
    arguments = [None if t is None else t for t in arguments]
    wide = [None if t is None else t.double() for t in arguments]
    tables = [None if t is None else t.double() for t in rotary]
    baseline = with_cache(*arguments, *rotary, **options)
    exact = with_cache(*wide, *tables, **options)
    q, k_cache, v_cache, k, v = arguments
    caches = k_cache.clone(), v_cache.clone()
    named = {"lengths": "cache_seqlens", "rows": "cache_batch_idx", "leftpad": "cache_leftpad"}
    given = {named.get(name, name): value for name, value in options.items()}
    given = {"cache_seqlens": LENGTHS, **given, **(call or {})}
    moved = to(device, caches)
    with shim.use_impl(impl):
        out, lse = shim.flash_attn_with_kvcache(
            to(device, q), *moved, *to(device, (k, v, *rotary)), return_softmax_lse=True,
            **to(device, given),
        )  # fmt: skip
    out, lse, *caches = to("cpu", (out, lse, *moved))
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    results = (out, lse, *caches)
    names = ("out", "lse", "k_cache", "v_cache")
    for name, a, b, e in zip(names, results, baseline, exact, strict=True):
        assert_parity(a, b, e, name=name)
    return caches


def cache_arguments(seqlen_q=1, seqlen_new=1, batch=3, cached=3):
    q = randn(batch, seqlen_q, 4, 32)
    caches = [randn(cached, 64, 2, 32) for _ in range(2)]
    new = [randn(batch, seqlen_new, 2, 32) if seqlen_new else None for _ in range(2)]
    return [q, *caches, *new]


CACHE_OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (9, 2)},
    "everything": {
        "causal": True, "window_size": (11, 0), "softcap": 2.0, "softmax_scale": 0.3,
        "alibi_slopes": torch.rand(4),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CACHE_OPTIONS)
@pytest.mark.parametrize("seqlens", [(1, 1), (5, 5), (3, 6), (6, 3), (4, 0)])
def test_with_kvcache(seqlens, name):
    check_cache(cache_arguments(*seqlens), **CACHE_OPTIONS[name])


def test_with_kvcache_in_the_kernel(device):
    angle = torch.rand(64, 8) * 6
    check_cache(
        cache_arguments(2, 2, cached=5), (angle.cos(), angle.sin()), impl="triton", causal=True,
        device=device, rows=torch.tensor([2, 0, 4]), leftpad=torch.tensor([0, 3, 10]),
        rotary_interleaved=False,
    )  # fmt: skip


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seqlens", [(1, 1), (4, 4), (2, 5), (5, 2)])
def test_with_kvcache_rotary(seqlens, causal, interleaved):
    angle = torch.rand(64, 8) * 6
    check_cache(
        cache_arguments(*seqlens), (angle.cos(), angle.sin()), causal=causal,
        rotary_interleaved=interleaved,
    )  # fmt: skip
    if not causal:
        check_cache(cache_arguments(*seqlens), (angle.cos(), angle.sin()), window_size=(8, -1))


def test_with_kvcache_int_lengths_and_none():
    arguments = cache_arguments(2, 2)
    check_cache(arguments, causal=True, lengths=torch.full((3,), 20), call={"cache_seqlens": 20})
    q, *caches = arguments[:3]
    out = shim.flash_attn_with_kvcache(q, *caches)
    torch.testing.assert_close(out, plain_batch(q, *caches)[0])
    assert out.shape == q.shape
    angle = torch.rand(64, 8)
    check_cache(
        arguments, (angle.cos(), angle.sin()), lengths=torch.full((3,), 20),
        call={"cache_seqlens": 20},
    )  # fmt: skip


def test_with_kvcache_rows_in_another_order():
    arguments = cache_arguments(2, 2, cached=5)
    before = arguments[1].clone()
    rows = torch.tensor([3, 0, 2], dtype=torch.int32)
    k_cache, _ = check_cache(arguments, causal=True, rows=rows)
    assert torch.equal(k_cache[[1, 4]], before[[1, 4]])
    check_cache(cache_arguments(2, 0, cached=5), lengths=LENGTHS + 1, rows=rows)


def test_with_kvcache_left_padding():
    leftpad = torch.tensor([0, 4, 17], dtype=torch.int32)
    angle = torch.rand(64, 16)
    rotary = (angle.cos(), angle.sin())
    for name in ("causal", "window", "everything"):
        check_cache(cache_arguments(3, 3), rotary, leftpad=leftpad, **CACHE_OPTIONS[name])


def test_with_kvcache_block_table():
    q, k_cache, v_cache, k, v = cache_arguments(3, 3)
    table = torch.randperm(12).reshape(3, 4).to(torch.int32)
    pages = [torch.empty(12, 16, 2, 32) for _ in range(2)]
    for page, cache in zip(pages, (k_cache, v_cache), strict=True):
        page[table.flatten().long()] = cache.reshape(12, 16, 2, 32)
    leftpad = torch.tensor([0, 4, 17])
    out = shim.flash_attn_with_kvcache(
        q, *pages, k, v, cache_seqlens=LENGTHS, block_table=table, cache_leftpad=leftpad,
        causal=True,
    )  # fmt: skip
    want = with_cache(q, k_cache, v_cache, k, v, leftpad=leftpad, causal=True)
    torch.testing.assert_close(out, want[0])
    for page, cache in zip(pages, want[2:], strict=True):
        torch.testing.assert_close(page[table.flatten().long()].reshape(cache.shape), cache)


def test_with_kvcache_has_no_gradient():
    q, *rest = cache_arguments(2, 2)
    out = shim.flash_attn_with_kvcache(q.requires_grad_(), *rest, cache_seqlens=3)
    assert not out.requires_grad
