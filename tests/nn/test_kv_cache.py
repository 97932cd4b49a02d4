"""What the contiguous and the paged cache do alike, each test on both; and KVCache's own."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastattn import attention, reference
from fastattn.decoding import attention_with_kv_cache
from fastattn.nn import BaseKVCache, KVCache, PagedKVCache
from fastattn.problem import make_problem
from fastattn.rotary import Rotary
from fastattn.testing import assert_parity, make_qkv

LAYERS, ROWS, LONGEST = 2, 4, 20
Make = Callable[..., BaseKVCache]


@pytest.fixture(params=["contiguous", "paged"])
def make(request: pytest.FixtureRequest, device: str) -> Make:
    """Builds a cache whose memory is full of NaN where it can be."""

    def build(heads: int = 2, head_dim: int = 8, rows: int = ROWS, **options: Any) -> BaseKVCache:
        options = {"dtype": torch.float32, "device": device, **options}
        longest = options.pop("max_seqlen", LONGEST)
        if request.param == "contiguous":
            cache: BaseKVCache = KVCache(LAYERS, rows, longest, heads, head_dim, **options)
        else:
            blocks = -(-longest // 4) * rows + 2
            cache = PagedKVCache(
                LAYERS, blocks, 4, heads, head_dim, max_batch=rows, max_seqlen=longest, **options
            )
        poison(cache)
        return cache

    return build


def poison(cache: BaseKVCache) -> None:
    for store in (cache.keys, cache.values):
        for tensor in (store.values, store.scale):
            if tensor is not None and tensor.is_floating_point() and tensor.dim() > 2:
                byte = torch.tensor(127, dtype=torch.uint8)  # NaN of e4m3
                if tensor.dtype == torch.float8_e4m3fn:
                    tensor.view(torch.uint8).fill_(byte)
                else:
                    tensor.fill_(float("nan"))


def tokens(cache: BaseKVCache, rows: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(rows, count, cache.num_heads_kv, cache.head_dim, generator=generator)
    v = torch.randn(rows, count, cache.num_heads_kv, cache.head_dim_v, generator=generator)
    return k.to(cache.device, cache.dtype), v.to(cache.device, cache.dtype)


def fill(cache: BaseKVCache, lengths: list[int], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Writes rows of these lengths, the keys of layer l times l + 1; returns those of layer 0."""
    k, v = tokens(cache, len(lengths), max(lengths), seed)
    for layer in range(LAYERS):
        cache.append(layer, k * (layer + 1), v * (layer + 1))
    cache.advance(lengths)
    return [(k[row, :length], v[row, :length]) for row, length in enumerate(lengths)]


def assert_rows(cache: BaseKVCache, expected: list[tuple[Tensor, Tensor]]) -> None:
    assert cache.lengths == tuple(len(k) for k, _ in expected)
    assert cache.seqlens.tolist() == list(cache.lengths)
    for row, (k, v) in enumerate(expected):
        for layer in range(LAYERS):
            for part, whole in zip(cache.read(layer, row), (k, v), strict=True):
                assert torch.equal(part, whole * (layer + 1)), (row, layer)


def state(cache: BaseKVCache) -> tuple:
    raw = [store.values.view(torch.uint8).tolist() for store in (cache.keys, cache.values)]
    table = None if cache.block_table is None else cache.block_table.tolist()
    return (cache.lengths, cache.seqlens.tolist(), table, repr(cache), raw)


# ---- a decoder's steps


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_chunks_through_the_cache_equal_one_causal_forward(
    make: Make, dtype: torch.dtype, chunk: int
) -> None:
    longest = 65
    cache = make(max_seqlen=longest, dtype=dtype, rows=3, head_dim_v=16)
    q, k, v = make_qkv(
        3, longest, longest, num_heads=4, num_heads_kv=2, head_dim=8, head_dim_v=16,
        dtype=dtype, device=cache.device,
    )  # fmt: skip
    outputs: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    for start in range(0, longest, chunk):
        now = slice(start, min(start + chunk, longest))
        for layer in range(LAYERS):
            out = cache.attention(layer, q[:, now], k[:, now], v[:, now], causal=True)
            outputs[layer].append(out)
        cache.advance(now.stop - now.start)
    exact, _ = reference.run(make_problem(*(x.double() for x in (q, k, v)), causal=True))
    plain, _ = reference.run(make_problem(q, k, v, causal=True))
    for layer in range(LAYERS):
        assert_parity(torch.cat(outputs[layer], 1), plain, exact)


def test_rows_of_unequal_length_join_and_leave_the_batch(make: Make) -> None:
    """Continuous batching: every call on other rows, in any order, each row at its own length."""
    cache = make()
    _, k, v = make_qkv(ROWS, LONGEST, LONGEST, num_heads=2, head_dim=8, device=cache.device)
    q = torch.cat((k, -k), dim=2)
    done = [0] * ROWS
    schedule = [([2], 5), ([3, 0], 3), ([0, 2, 3], 1), ([1, 2], 4), ([3, 2, 1, 0], 2), ([1, 3], 1)]
    for rows, count in schedule:
        at = [slice(done[row], done[row] + count) for row in rows]
        new = [torch.stack([x[row, w] for row, w in zip(rows, at, strict=True)]) for x in (q, k, v)]
        for layer in range(LAYERS):
            out = cache.attention(layer, *new, causal=True, rows=rows)
            assert isinstance(out, Tensor)
            for index, (row, window) in enumerate(zip(rows, at, strict=True)):
                past = slice(0, window.stop)
                full = (q[row : row + 1, window], k[row : row + 1, past], v[row : row + 1, past])
                exact = attention(*(x.double() for x in full), causal=True)
                assert_parity(out[index : index + 1], attention(*full, causal=True), exact)
        cache.advance(count, rows=torch.tensor(rows))
        for row in rows:
            done[row] += count
    assert cache.lengths == tuple(done)


def test_a_row_counts_only_what_it_advanced_by(make: Make) -> None:
    cache = make()
    rows = fill(cache, [3, 1, 4, 0])
    k, v = tokens(cache, ROWS, 3, seed=1)
    for layer in range(LAYERS):
        cache.append(layer, k * (layer + 1), v * (layer + 1))
    assert cache.lengths == (3, 1, 4, 0), "nothing counts before advance"
    cache.advance([0, 3, 1, 2])
    for row, count in enumerate([0, 3, 1, 2]):
        old_k, old_v = rows[row]
        rows[row] = torch.cat((old_k, k[row, :count])), torch.cat((old_v, v[row, :count]))
    assert_rows(cache, rows)
    with pytest.raises(ValueError, match=r"n must lie in 0\.\.0 for row 0: every layer has"):
        cache.advance(1)


def test_rotary_and_other_options_are_passed_on(make: Make) -> None:
    cache, q = make(), torch.randn(ROWS, 3, 4, 8)
    rotary = Rotary.make(8, LONGEST, device=cache.device)
    fill(cache, [2, 5, 0, 1])
    k, v = tokens(cache, ROWS, 3, seed=1)
    q = q.to(cache.device)
    positions = torch.tensor([[length + i for i in range(3)] for length in (2, 5, 0, 1)])
    turned = rotary.apply(k, positions.to(cache.device))
    out, lse = cache.attention(0, q, k, v, rotary=rotary, causal=True, return_lse=True)
    cache.append(1, k, v, rotary=rotary)
    cache.advance(3)
    for layer in range(LAYERS):
        for row in range(ROWS):
            eps = torch.finfo(torch.float32).eps
            error = (cache.read(layer, row)[0][-3:] - turned[row]).abs().max()
            assert error <= eps * turned.abs().max()
    assert out.shape == (ROWS, 3, 4, 8) and lse.shape == (ROWS, 4, 3)


def test_cross_attention_reads_what_was_written_once(make: Make) -> None:
    cache = make()
    rows = fill(cache, [6, 2, 9, 1])
    q = torch.randn(2, 5, 4, 8, device=cache.device)
    before = state(cache)
    out = cache.attention(1, q, rows=[2, 0])
    assert isinstance(out, Tensor)
    for index, row in enumerate([2, 0]):
        k, v = (2 * part[None] for part in rows[row])
        full = q[index : index + 1], k, v
        exact = attention(*(x.double() for x in full))
        assert_parity(out[index : index + 1], attention(*full), exact)
    assert state(cache) == before


# ---- rows


def test_rows_are_cut_freed_and_emptied(make: Make) -> None:
    cache = make()
    rows = fill(cache, [9, 5, 7, 2])
    cache.rollback([1, 5], rows=[2, 1])
    rows[2], rows[1] = cut(rows[2], 6), cut(rows[1], 0)
    assert_rows(cache, rows)
    cache.rollback(np.array([2, 0, 0, 1]))
    rows[0], rows[3] = cut(rows[0], 7), cut(rows[3], 1)
    assert_rows(cache, rows)
    cache.crop(6)
    rows[0] = cut(rows[0], 6)
    assert_rows(cache, rows)
    cache.crop([5, 9], rows=[2, 0])
    rows[2] = cut(rows[2], 5)
    assert_rows(cache, rows)
    cache.free([0, 1])
    cache.free(3)
    assert_rows(cache, [cut(rows[0], 0), rows[1], rows[2], cut(rows[3], 0)])
    cache.reset()
    assert cache.lengths == (0,) * ROWS
    again = fill(cache, [3, 0, 1, 8], seed=2)
    assert_rows(cache, again)


def cut(row: tuple[Tensor, Tensor], length: int) -> tuple[Tensor, Tensor]:
    return row[0][:length], row[1][:length]


@pytest.mark.parametrize(
    "beam_index", [[1, 1, 3, 0], [3, 2, 1, 0], [0, 1, 2, 3], [2, 2, 2, 2]], ids=str
)
def test_reorder_gathers_rows_in_place(make: Make, beam_index: list[int]) -> None:
    cache = make()
    rows = fill(cache, [6, 3, 0, 9])
    places = cache.keys.values.data_ptr(), cache.seqlens.data_ptr()
    cache.reorder(torch.tensor(beam_index))
    assert places == (cache.keys.values.data_ptr(), cache.seqlens.data_ptr())
    rows = [rows[index] for index in beam_index]
    assert_rows(cache, rows)
    # Each beam goes its own way from there.
    k, v = tokens(cache, ROWS, 2, seed=3)
    for layer in range(LAYERS):
        cache.append(layer, k * (layer + 1), v * (layer + 1))
    cache.advance(2)
    added = zip(rows, k, v, strict=True)
    assert_rows(cache, [(torch.cat((a, c)), torch.cat((b, d))) for (a, b), c, d in added])


def test_an_empty_prefix_is_shared_with_an_empty_row(make: Make) -> None:
    cache = make()
    rows = fill(cache, [3, 0, 0, 1])
    cache.share_prefix(0, 1, 0)
    cache.fork(2, 1)
    assert_rows(cache, rows)


def test_reorder_of_some_rows_leaves_the_others(make: Make) -> None:
    cache = make()
    rows = fill(cache, [6, 3, 1, 9])
    cache.reorder([1, 1], rows=[3, 0])
    assert_rows(cache, [rows[0], rows[1], rows[2], rows[0]])


def test_a_shared_prefix_is_nobody_elses_to_write(make: Make) -> None:
    cache = make()
    rows = fill(cache, [7, 0, 0, 3])
    cache.share_prefix(0, 1, 5)
    cache.fork(0, 2)
    expected = [rows[0], cut(rows[0], 5), rows[0], rows[3]]
    assert_rows(cache, expected)
    k, v = tokens(cache, ROWS, 2, seed=4)
    for layer in range(LAYERS):
        cache.append(layer, k * (layer + 1), v * (layer + 1))
    cache.advance(2)
    added = zip(expected, k, v, strict=True)
    expected = [(torch.cat((a, c)), torch.cat((b, d))) for (a, b), c, d in added]
    assert_rows(cache, expected)
    cache.free(0)
    assert_rows(cache, [cut(rows[0], 0), *expected[1:]])


@pytest.mark.parametrize("scale", ["token", "head"])
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_quantized_rows_keep_their_scales(make: Make, quantization: str, scale: str) -> None:
    fixed = (torch.tensor([0.09, 0.1]), torch.tensor([[0.1, 0.09]] * LAYERS))
    cache = make(quantization=quantization, scale="token" if scale == "token" else fixed)
    k, v = tokens(cache, ROWS, 7)
    k[3] *= 0.01  # so that its scales differ from the other rows'
    for layer in range(LAYERS):
        cache.append(layer, k * (layer + 1), v * (layer + 1))
    cache.advance([7, 6, 0, 5])
    for row in (0, 1, 3):
        for x, part in zip((k, v), cache.read(1, row), strict=True):
            whole = 2 * x[row, : len(part)]
            # Half a step of int8, a sixteenth of e4m3; a scale of 0.1 holds up to 12.7.
            largest = whole.abs().amax(-1, keepdim=True) if scale == "token" else 12.7
            step = largest / 254 if quantization == "int8" else (whole.abs() + largest / 448) / 16
            assert ((part - whole).abs() <= step * 1.001).all()
    before = [[cache.read(layer, row) for layer in range(LAYERS)] for row in range(ROWS)]
    cache.share_prefix(3, 2, 4)
    cache.reorder([3, 3, 2, 1])
    sources = [(3, 5), (3, 5), (3, 4), (1, 6)]
    new_k, new_v = tokens(cache, ROWS, 1, seed=5)
    out = cache.attention(0, torch.cat((new_k, new_k), 2), new_k, new_v, causal=True)
    assert torch.isfinite(out).all()
    cache.append(1, new_k, new_v)
    cache.advance(1)
    for row, (source, length) in enumerate(sources):
        for layer in range(LAYERS):
            for part, old in zip(cache.read(layer, row), before[source][layer], strict=True):
                assert len(part) == length + 1
                assert torch.equal(part[:length], old[:length])


# ---- misuse: a clear error, and nothing has changed

MISUSES: dict[str, tuple[Callable[[BaseKVCache], object], type[Exception], str]] = {
    "too long": (
        lambda c: c.append(0, *tokens(c, 1, 13), rows=[1]), ValueError,
        r"seqlen_new must lie in 0\.\.12 tokens for row 1, .* 8 of max_seqlen 20, got 13",
    ),
    "too long for one of them": (
        lambda c: c.attention(0, *tokens(c, 4, 13)[:1], *tokens(c, 4, 13)), ValueError, "row 1",
    ),
    "reserve too much": (
        lambda c: c.reserve([1, 13], rows=[0, 1]), ValueError, r"n must lie in 0\.\.12 .*row 1",
    ),
    "reserve less than nothing": (lambda c: c.reserve(-1), ValueError, "n must .*got -1"),
    "advance over what was written": (
        lambda c: c.advance(1), ValueError, r"n must lie in 0\.\.0 for row 0: every layer",
    ),
    "advance over what was reserved": (
        lambda c: c.advance(1, replayed=True), ValueError, "room is reserved for 0 tokens",
    ),
    "advance backwards": (lambda c: c.advance(-1), ValueError, "n must .* got -1"),
    "advance by three counts": (
        lambda c: c.advance([0, 0, 0]), ValueError, r"n must be one int or one a row, 4, got 3",
    ),
    "advance by half": (lambda c: c.advance(0.5), TypeError, "n must be .* got 0.5"),
    "roll back too far": (
        lambda c: c.rollback([1, 9, 0, 0]), ValueError, r"n must lie in 0\.\.8 for row 1.* got 9",
    ),
    "roll back forwards": (lambda c: c.rollback(-1), ValueError, "n must .* got -1"),
    "crop below 0": (lambda c: c.crop(-1), ValueError, "max_length must be >= 0, got -1"),
    "unknown row": (lambda c: c.free(4), ValueError, r"rows must lie in 0\.\.3, got 4"),
    "negative row": (lambda c: c.rollback(0, rows=[-1]), ValueError, r"rows .* got -1"),
    "row twice": (lambda c: c.crop(0, rows=[1, 1]), ValueError, r"each once, got \[1, 1\]"),
    "no row": (lambda c: c.crop(0, rows=[]), ValueError, r"one row or more.* got \[\]"),
    "row by name": (lambda c: c.crop(0, rows="01"), TypeError, "rows must be a sequence"),
    "free nothing": (lambda c: c.free(None), TypeError, "rows must name the rows to free"),
    "beam missing": (
        lambda c: c.reorder([0, 1]), ValueError, "beam_index must have one entry a row, 4, got 2",
    ),
    "beam unknown": (
        lambda c: c.reorder([0, 1, 2, 4]), ValueError, r"beam_index must lie in 0\.\.3, got 4",
    ),
    "beam not whole": (
        lambda c: c.reorder(torch.zeros(4)), TypeError, "beam_index must be integers",
    ),
    "share into a row in use": (
        lambda c: c.share_prefix(1, 0, 2), ValueError, "target must be an empty row, row 0 has 3",
    ),
    "share with itself": (lambda c: c.fork(2, 2), ValueError, "target must be another row"),
    "share more than there is": (
        lambda c: c.share_prefix(0, 2, 4), ValueError, r"length must lie in 0\.\.3, .* got 4",
    ),
    "share from nowhere": (lambda c: c.fork(7, 2), ValueError, r"source must lie in .* got 7"),
    "unknown layer": (
        lambda c: c.append(2, *tokens(c, 4, 1)), ValueError, r"layer must lie in 0\.\.1, got 2",
    ),
    "batch of another size": (
        lambda c: c.append(0, *tokens(c, 3, 1)), ValueError, "k must be .* batch 4, .*got .3, 1",
    ),
    "k is no tensor": (lambda c: c.append(0, [1], [1]), TypeError, "k must be a torch.Tensor"),
    "k without v": (
        lambda c: c.attention(0, *tokens(c, 4, 5)[:1], tokens(c, 4, 5)[0]), ValueError, "v",
    ),
    "an option that is wrong": (
        lambda c: c.attention(0, tokens(c, 4, 5)[0], *tokens(c, 4, 5), softcap=-1.0),
        ValueError, "softcap",
    ),
    "reading an unknown row": (lambda c: c.read(0, 4), ValueError, r"row must lie in .* got 4"),
}  # fmt: skip


@pytest.mark.parametrize("misuse", MISUSES)
def test_a_refused_call_changes_nothing(make: Make, misuse: str) -> None:
    call, error, message = MISUSES[misuse]
    cache = make()
    fill(cache, [3, 8, 0, 1])
    before = state(cache)
    with pytest.raises(error, match=message):
        call(cache)
    assert state(cache) == before


def test_a_step_is_refused_until_every_layer_has_written(make: Make) -> None:
    cache = make()
    rows = fill(cache, [3, 8, 0, 1])
    k, v = tokens(cache, ROWS, 2, seed=1)
    cache.append(0, k, v)
    with pytest.raises(ValueError, match=r"n must lie in 0\.\.0 for row 0"):
        cache.advance(2)
    with pytest.raises(ValueError, match="target must be an empty row, row 2 has 0"):
        cache.share_prefix(0, 2, 1)
    cache.append(1, k[:, :1] * 2, v[:, :1] * 2)
    with pytest.raises(ValueError, match=r"n must lie in 0\.\.1 for row 3"):
        cache.advance([0, 1, 1, 2])
    cache.rollback(0)  # gives the step up
    with pytest.raises(ValueError, match=r"n must lie in 0\.\.0"):
        cache.advance(1)
    assert_rows(cache, rows)


# ---- CUDA graphs, and where tensors live


def test_replayed_steps_count_against_the_reserved_room(make: Make) -> None:
    """A replay as the cache sees it: the device's tensors alone, without its methods."""
    cache = make()
    rows = fill(cache, [3, 8, 0, 1])
    k, v = tokens(cache, ROWS, 3, seed=1)
    seqlens, table = cache.seqlens, cache.block_table
    cache.reserve(3)
    for step in range(3):
        for layer in range(LAYERS):
            new = k[:, step : step + 1] * (layer + 1), v[:, step : step + 1] * (layer + 1)
            attention_with_kv_cache(
                torch.cat((k, k), 2)[:, :1], *cache.layer(layer), *new,
                cache_seqlens=seqlens, block_table=table,
            )  # fmt: skip
        cache.seqlens.add_(1)
    with pytest.raises(ValueError, match=r"n must lie in 0\.\.3 for row 0: room is reserved"):
        cache.advance(4, replayed=True)
    cache.advance([3, 3, 0, 2], replayed=True)
    added = zip(rows, k, v, [3, 3, 0, 2], strict=True)
    assert_rows(
        cache, [(torch.cat((a, c[:n])), torch.cat((b, d[:n]))) for (a, b), c, d, n in added]
    )
    assert cache.seqlens is seqlens and cache.block_table is table
    cache.rollback(0)
    with pytest.raises(ValueError, match="room is reserved for 0"):
        cache.advance(1, rows=[2], replayed=True)


def test_under_capture_only_the_device_works(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make()
    fill(cache, [3, 4, 0, 1])
    k, v = tokens(cache, ROWS, 1, seed=1)
    q = torch.cat((k, k), 2)
    cache.reserve(1)
    before = cache.lengths, cache.seqlens.tolist()
    monkeypatch.setattr(cache, "_capturing", lambda: True)
    for layer in range(LAYERS):
        cache.attention(layer, q, k, v)
        cache.attention(layer, q[1:3], k[1:3], v[1:3], rows=[1, 2])
        with pytest.raises(RuntimeError, match="rows that are not consecutive"):
            cache.attention(layer, q[:2], k[:2], v[:2], rows=[2, 0])
    for refused in (
        lambda: cache.advance(1), lambda: cache.rollback(0), lambda: cache.crop(1), cache.reset,
        lambda: cache.free(0), lambda: cache.fork(0, 2), lambda: cache.reorder([0, 1, 2, 3]),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            refused()
    if isinstance(cache, PagedKVCache):
        with pytest.raises(RuntimeError, match=r"taking blocks .* reserve room before"):
            cache.reserve(8)
    monkeypatch.undo()
    assert (cache.lengths, cache.seqlens.tolist()) == before
    with pytest.raises(ValueError, match="every layer has written 0"):
        cache.advance(1)  # a capture runs nothing, so nothing was written
    cache.advance(1, replayed=True)


@pytest.mark.cuda
def test_a_captured_step_replays_at_the_lengths_of_the_moment(make: Make) -> None:
    cache, eager = make(dtype=torch.float16), make(dtype=torch.float16)
    if cache.device.type != "cuda":
        pytest.skip("kernels are interpreted")
    steps = 5
    k, v = tokens(cache, ROWS, steps, seed=1)
    q = torch.cat((k, k), 2)
    for each in (cache, eager):
        fill(each, [3, 8, 0, 1])
    at = [x[:, :1].clone() for x in (q, k, v)]

    def step(target: BaseKVCache) -> list[Any]:
        return [target.attention(layer, *at, causal=True) for layer in range(LAYERS)]

    cache.reserve(1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(cache)
    torch.cuda.current_stream().wait_stream(stream)
    cache.rollback(0)
    cache.reserve(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(cache)
    for index in range(steps):
        for target, source in zip(at, (q, k, v), strict=True):
            target.copy_(source[:, index : index + 1])
        expected = step(eager)
        eager.advance(1)
        cache.reserve(1)
        graph.replay()
        cache.advance(1, replayed=True)
        for out, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(out, wanted)
    assert cache.lengths == eager.lengths
    assert torch.equal(cache.seqlens, eager.seqlens)


def test_device_tensors_never_move(make: Make) -> None:
    cache = make()
    tensors = [cache.seqlens, cache.keys.values, cache.values.values]
    tensors += [] if cache.block_table is None else [cache.block_table]
    before = [tensor.data_ptr() for tensor in tensors]
    fill(cache, [3, 8, 0, 1])
    cache.fork(1, 2)
    cache.reorder([1, 1, 0, 2])
    cache.crop(3)
    cache.reset()
    assert before == [tensor.data_ptr() for tensor in tensors]
    assert cache.seqlens.dtype == torch.int32


def test_a_cache_made_in_inference_mode_serves_outside_of_it(make: Make) -> None:
    with torch.inference_mode():
        cache = make()
        rows = fill(cache, [3, 2, 0, 1])
        cache.attention(0, torch.randn(2, 1, 2, 8, device=cache.device), rows=[2, 0])
    cache.reorder([1, 0, 2, 3])
    assert_rows(cache, [rows[1], rows[0], rows[2], rows[3]])


# ---- building


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": 0}, ValueError, "num_heads_kv must be >= 1, got 0"),
        ({"head_dim": 2.0}, TypeError, "head_dim must be an int, got 2.0"),
        ({"head_dim_v": -1}, ValueError, "head_dim_v must be >= 1, got -1"),
        ({"dtype": torch.int32}, TypeError, "dtype must be a floating"),
        ({"quantization": "int4"}, ValueError, "quantization must be None, .* got 'int4'"),
        ({"scale": (torch.ones(2),) * 2}, ValueError, "scale is for a quantized cache"),
        ({"quantization": "int8", "scale": "head"}, TypeError, "scale must be .* got 'head'"),
        (
            {"quantization": "fp8", "scale": (torch.ones(2), torch.ones(3))},
            ValueError,
            r"scale must be float32 of shape \(2,\) or \(2, 2\), got \(3,\)",
        ),
    ],
)
def test_building_is_checked(
    make: Make, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_memory_and_occupancy_are_shown(make: Make) -> None:
    cache = make(dtype=torch.float16, head_dim_v=4)
    fill(cache, [3, 8, 0, 1])
    slots = cache.keys.values.shape[1] * cache.keys.values.shape[2]
    table = 0 if cache.block_table is None else cache.block_table.numel() * 4
    assert cache.nbytes == LAYERS * slots * 2 * (8 + 4) * 2 + ROWS * 4 + table
    assert "3 of 4 rows hold 12 tokens" in repr(cache)
    assert ("4 of 22 blocks of 4 used" if table else "15% full") in repr(cache)


def test_a_contiguous_reorder_copies_only_rows_that_change(device: str) -> None:
    """And only live tokens of them: the rest of the target keeps what it had."""
    cache = KVCache(1, 3, 8, 1, 2, dtype=torch.float32, device=device)
    cache.keys.values.fill_(7.0)
    k = torch.ones(3, 4, 1, 2, device=device)
    cache.append(0, k, k)
    cache.advance([4, 2, 1])
    cache.reorder([0, 0, 2])
    assert cache.lengths == (4, 4, 1)
    assert (cache.keys.values[0, 1, 4:] == 7).all()
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        KVCache(1, 0, 8, 1, 2)


def test_large_moves_go_through_a_small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastattn.nn.storage._COPY_BYTES", 1)
    cache = KVCache(LAYERS, ROWS, LONGEST, 2, 8, dtype=torch.float32)
    rows = fill(cache, [6, 3, 0, 9])
    cache.reorder([3, 0, 1, 1])
    assert_rows(cache, [rows[3], rows[0], rows[1], rows[1]])
