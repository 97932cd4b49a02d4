import pytest
import torch
import triton
import triton.language as tl

from fastattn.testing import WorkMeter, roofline_seconds

pytestmark = pytest.mark.interpreter


@triton.jit
def _scale(x, out, n, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + at, mask=at < n, other=0.0)
    tl.store(out + at, a * factor, mask=at < n)


@triton.jit
def _causal_products(q, k, out, n, DIM: tl.constexpr, TILE: tl.constexpr):
    """Row sums of exp(q k^T), with the keys up to the diagonal's tile only."""
    first = tl.program_id(0) * TILE
    row, column, d = first + tl.arange(0, TILE), tl.arange(0, TILE), tl.arange(0, DIM)
    q_tile = tl.load(q + row[:, None] * DIM + d[None, :])
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, first + TILE, TILE):
        k_tile = tl.load(k + (start + column)[None, :] * DIM + d[:, None])
        total += tl.sum(tl.exp(tl.dot(q_tile, k_tile)), 1)
    tl.store(out + row, total)


@triton.jit
def _count(x, counter, ticket, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_add(counter + at % 2, tl.load(x + at, mask=at < n), mask=at < n)
    tl.atomic_cas(ticket, 0, 1)


@triton.jit
def _strided_sum(x, y, out, stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at * stride) + tl.load(y + at * stride))


@triton.jit
def _copy_by_descriptor(x, out, n, DIM: tl.constexpr, TILE: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [n, DIM], [DIM, 1], [TILE, DIM])
    target = tl.make_tensor_descriptor(out, [n, DIM], [DIM, 1], [TILE, DIM])
    for start in range(0, n, TILE):
        target.store([start, 0], source.load([start, 0]))


@triton.jit
def _helper(x):
    return tl.exp2(x) + tl.log(x) + tl.rsqrt(x) + tl.erf(x)


@triton.jit
def _functions(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a = tl.load(x + at)
    tl.store(out + at, _helper(a) + tl.exp2(tl.max(a)))


def test_masked_loads_and_stores_count_active_lanes() -> None:
    x, out = torch.ones(100, dtype=torch.float16), torch.empty(100, dtype=torch.float32)
    with WorkMeter(x=x, out=out) as work:
        _scale[(2,)](x, out, 100, 2.0, 64)
    assert work.launches == 1
    assert work.loaded == {"x": 200, "out": 0, "other": 0}
    assert work.stored == {"x": 0, "out": 400, "other": 0}
    assert (work.bytes_loaded, work.bytes_stored) == (200, 400)
    assert (work.dots, work.dot_flops, work.transcendentals) == (0, 0, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_visits_the_lower_triangle_of_tiles(dtype: torch.dtype) -> None:
    n, dim, tile = 256, 32, 64
    tiles = n // tile
    visited = tiles * (tiles + 1) // 2
    q, k = torch.zeros(n, dim, dtype=dtype), torch.zeros(n, dim, dtype=dtype)
    out = torch.empty(n)
    with WorkMeter(q=q, k=k, out=out) as work:
        _causal_products[(tiles,)](q, k, out, n, dim, tile)
    assert out.tolist() == [(i // tile + 1) * tile for i in range(n)]
    assert work.dots == visited
    assert work.dot_flops == visited * 2 * tile * tile * dim
    assert work.loaded["q"] == q.numel() * q.element_size()
    assert work.loaded["k"] == visited * tile * dim * k.element_size()
    assert work.stored == {"q": 0, "k": 0, "out": n * 4, "other": 0}
    assert work.transcendentals == {"exp": visited * tile * tile}


def test_atomics_count_as_load_and_store() -> None:
    x, counter, ticket = torch.ones(64), torch.zeros(2), torch.zeros(1, dtype=torch.int64)
    with WorkMeter(x=x, counter=counter, ticket=ticket) as work:
        _count[(3,)](x, counter, ticket, 50, 64)
    assert counter.tolist() == [75, 75] and ticket.item() == 1
    assert work.loaded == {"x": 3 * 200, "counter": 3 * 200, "ticket": 3 * 8, "other": 0}
    assert work.stored == {"x": 0, "counter": 3 * 200, "ticket": 3 * 8, "other": 0}


def test_descriptors_count_what_is_inside() -> None:
    x = torch.randn(12, 16, dtype=torch.bfloat16)
    out = torch.empty_like(x)
    with WorkMeter(x=x, out=out) as work:
        _copy_by_descriptor[(1,)](x, out, 12, 16, 8)
    assert torch.equal(x, out)
    assert work.loaded == {"x": 12 * 32, "out": 0, "other": 0}
    assert work.stored == {"x": 0, "out": 12 * 32, "other": 0}


def test_views_that_interleave_are_told_apart() -> None:
    packed = torch.ones(64, 3)
    x, y, unused = packed.unbind(1)
    out = torch.empty(64)
    with WorkMeter(x=x, unused=unused) as work:
        _strided_sum[(1,)](x, y, out, 3, 64)
    assert work.loaded == {"x": 256, "unused": 0, "other": 256}
    assert work.stored == {"x": 0, "unused": 0, "other": 256}
    # The first name that fits gets the bytes.
    with WorkMeter(y=y, packed=packed, all=packed) as work:
        _strided_sum[(1,)](x, y, out, 3, 64)
    assert work.loaded == {"y": 256, "packed": 256, "all": 0, "other": 0}


def test_transcendentals_are_counted_by_function() -> None:
    x, out = torch.ones(64), torch.empty(64)
    with WorkMeter() as work:
        _functions[(2,)](x, out, 64)
    assert work.transcendentals == {"exp2": 2 * 65, "log": 128, "rsqrt": 128, "erf": 128}


def test_meters_nest() -> None:
    x, out = torch.ones(64), torch.empty(64)
    with WorkMeter(x=x) as outer:
        _scale[(1,)](x, out, 64, 2.0, 64)
        with WorkMeter(out=out) as inner:
            _scale[(1,)](x, out, 32, 2.0, 64)
        _scale[(1,)](x, out, 1, 2.0, 64)
    _scale[(1,)](x, out, 64, 2.0, 64)
    assert inner.launches == 1 and outer.launches == 3
    assert inner.loaded == {"out": 0, "other": 128} and inner.stored == {"out": 128, "other": 0}
    assert outer.loaded == {"x": 256 + 128 + 4, "other": 0}
    with outer:
        _scale[(1,)](x, out, 1, 2.0, 64)
    assert outer.launches == 4 and outer.loaded["x"] == 256 + 128 + 4 + 4


def test_counting_ends_with_an_exception() -> None:
    x, out = torch.ones(64), torch.empty(64)
    with pytest.raises(IndexError), WorkMeter(x=x, out=out) as work:
        _scale[(2,)](x, out, 65, 2.0, 64)
    _scale[(1,)](x, out, 64, 2.0, 64)
    # The second program's load was refused, and so it counts nothing.
    assert (work.launches, work.bytes_loaded, work.bytes_stored) == (1, 256, 256)


def test_entering_twice_is_refused() -> None:
    with (
        WorkMeter() as work,
        pytest.raises(RuntimeError, match="already counting"),
        work,
    ):
        pass


def test_what_cannot_be_named_is_refused() -> None:
    with pytest.raises(ValueError, match="'other' is the name"):
        WorkMeter(other=torch.zeros(1))
    with pytest.raises(TypeError, match="q must be a tensor or None, got list"):
        WorkMeter(q=[1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="q is on meta, expected cpu"):
        WorkMeter(q=torch.zeros(1, device="meta"))
    assert WorkMeter(bias=None).loaded == {"other": 0}


def test_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="WorkMeter needs Triton's interpreter"):
        WorkMeter()


def test_says_what_it_counted() -> None:
    x, out = torch.ones(64), torch.empty(64)
    with WorkMeter(x=x) as work:
        _functions[(20,)](x, out, 64)
    assert str(work) == (
        "launches 1; bytes loaded 5,120 (x 5,120); bytes stored 5,120 (other 5,120); "
        "dots 0 (0 FLOPs); elements (exp2 1,300, log 1,280, rsqrt 1,280, erf 1,280)"
    )


def test_roofline_is_the_slower_of_memory_and_arithmetic() -> None:
    work = WorkMeter()
    work.loaded["other"], work.stored["other"], work.dot_flops = 300, 100, 8000
    assert roofline_seconds(work, 100.0, 1000.0) == 8.0
    assert roofline_seconds(work, 10.0, 1000.0) == 40.0
    with pytest.raises(ValueError, match="flops_per_second must be positive, got 0"):
        roofline_seconds(work, 10.0, 0)
