"""The decoding kernels: parity by row, splits, bits, chunks of a sequence, merging, compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fastattn
from fastattn import Quantized, Rotary, T5Bias, Window, reference, torch_ops
from fastattn import torch_decode_ops as torch_ops_decode
from fastattn.cache_problem import make_cache_problem
from fastattn.testing import assert_parity, debug, is_interpreting
from fastattn.testing.cache_features import CACHE_FEATURES, CacheFeature
from fastattn.testing.verify import DTYPES, check_feature

FP16_ROWS = [
    row
    for row in CACHE_FEATURES
    if row.name.removeprefix("cache: ")
    in {
        "one token, splits", "a chunk of a prompt, causal", "head_dim 40", "blocks of 16", "rotary",
        "rotary, interleaved, part of head_dim", "T5Bias", "large scores, splits",
        "int8, a scale a token", "fp8, a scale a head", "everything", "everything, splits",
    }
]  # fmt: skip


def name_of(feature: CacheFeature) -> str:
    return feature.name


def row_of(name: str) -> CacheFeature:
    return next(row for row in CACHE_FEATURES if row.name == f"cache: {name}")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("feature", CACHE_FEATURES, ids=name_of)
def test_kernels(feature: CacheFeature, dtype: str, device: str) -> None:
    """Output, log-sum-exp, what the cache holds afterwards, and that nothing else changed."""
    result = check_feature(feature, dtype, device)
    assert result.passed, str(result)


@pytest.mark.parametrize("feature", FP16_ROWS, ids=name_of)
def test_kernels_in_fp16(feature: CacheFeature, device: str) -> None:
    result = check_feature(feature, "fp16", device)
    assert result.passed, str(result)


def test_rows_have_names_and_numbers_of_their_own() -> None:
    assert len({row.name for row in CACHE_FEATURES}) == len(CACHE_FEATURES)
    first, second = (row_of("everything").case(torch.bfloat16) for _ in range(2))
    assert torch.equal(first.q, second.q)
    assert first.k_cache is not second.k_cache


def test_a_row_notices_a_byte_that_changed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = torch_ops.kernels()
    launch = kernels.launch_attention_decode

    def one_more(q: Tensor, cached: Any, *others: Any, **named: Any) -> None:
        launch(q, cached, *others, **named)
        cached.v[0, -1, 0, 0] = 1.0  # behind the row's tokens

    monkeypatch.setattr(kernels, "launch_attention_decode", one_more)
    with pytest.raises(AssertionError, match="outside the places of the new tokens"):
        check_feature(row_of("one token"), "fp32", device)


# Splits.


def with_config(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    kernels = torch_ops.kernels()
    select = kernels.select_decode_config

    def changed(*arguments: Any) -> Any:
        return replace(select(*arguments), **changes)

    monkeypatch.setattr(kernels, "select_decode_config", changed)


@pytest.mark.parametrize("last_combines", [False, True])
@pytest.mark.parametrize("splits", [2, 5, 40])
@pytest.mark.parametrize(
    "name", ["one token, splits", "everything, splits", "sinks, splits, an empty row"]
)
def test_any_number_of_splits(
    name: str, splits: int, last_combines: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_config(monkeypatch, num_splits=splits, last_combines=last_combines)
    result = check_feature(row_of(name), "fp32", device)
    assert result.passed, str(result)


@pytest.mark.parametrize("tile", [(16, 32), (32, 128), (64, 64), (128, 64)], ids=str)
@pytest.mark.parametrize("name", ["everything", "a chunk of a prompt, causal", "blocks of 64"])
def test_tiles_of_any_shape(
    name: str, tile: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_config(monkeypatch, block_m=tile[0], block_n=tile[1])
    result = check_feature(row_of(name), "fp32", device)
    assert result.passed, str(result)


@pytest.mark.parametrize("name", ["one token", "rotary", "everything", "fp8, a scale a token"])
def test_appending_by_a_launch_gives_the_same_caches(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = row_of(name).case(torch.float32, device)
    case.call(fastattn.attention_with_kv_cache, impl="triton")
    with_config(monkeypatch, appends=False)
    result = check_feature(row_of(name), "fp32", device)
    assert result.passed, str(result)
    other = row_of(name).case(torch.float32, device)
    other.call(fastattn.attention_with_kv_cache, impl="triton")
    for one, two in zip(case.tokens(), other.tokens(), strict=True):
        assert torch.equal(one, two)


def call(name: str, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    case = row_of(name).case(DTYPES[dtype], device)
    return case.call(fastattn.attention_with_kv_cache, return_lse=True, impl="triton")


@pytest.mark.parametrize("name", ["everything, splits", "int8, splits, rotary, blocks"])
def test_who_joins_the_splits_changes_no_bit(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = (call(name, "fp16", device) for _ in range(2))
    with_config(monkeypatch, last_combines=True)
    last = call(name, "fp16", device)
    for one, two, three in zip(first, again, last, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_a_row_has_the_same_bits_in_a_batch_of_any_size(device: str) -> None:
    row = row_of("one token, splits")  # batch_invariant=True
    out, lse = call(row.name.removeprefix("cache: "), "bf16", device)
    for index in range(len(row.lengths)):
        case = row.case(torch.bfloat16, device)
        alone = slice(index, index + 1)
        caches = (case.k_cache, case.v_cache)
        assert case.k is not None and case.v is not None
        own, own_lse = fastattn.attention_with_kv_cache(
            case.q[alone], *(cache[alone] for cache in caches if isinstance(cache, Tensor)),
            case.k[alone], case.v[alone], cache_seqlens=case.kwargs["cache_seqlens"][alone],
            causal=True, batch_invariant=True, return_lse=True, impl="triton",
        )  # fmt: skip
        assert torch.equal(own, out[alone])
        assert torch.equal(own_lse, lse[alone])


def test_splits_are_chosen_to_fill_the_chip_and_no_more() -> None:
    from fastattn.kernels.attention.decode_config import MAX_SPLITS, select_num_splits

    slots = 264  # an H100
    assert select_num_splits(8, 2048, slots) == 29  # one sequence of 8 heads: 88% of one wave
    assert select_num_splits(264, 2048, slots) == 1
    assert select_num_splits(220, 2048, slots) == 1  # nearly full is full
    assert select_num_splits(8, 3, slots) == 3  # no more splits than tiles
    assert select_num_splits(1, 100_000, slots) <= MAX_SPLITS
    assert select_num_splits(0, 10, slots) == select_num_splits(8, 0, slots) == 1
    for programs in range(1, 300):
        splits = select_num_splits(programs, 64, slots)
        waves = programs * splits / slots
        best = max(programs * n / slots / -(-programs * n // slots) for n in range(1, 65))
        assert programs >= 0.8 * slots or waves / -(-programs * splits // slots) >= 0.85 * best


def test_a_window_is_split_by_its_own_length() -> None:
    kernels = torch_ops.kernels()
    q = torch.empty(1, 1, 2, 16)
    cached = kernels.CachedKeys(*(torch.empty(1, 4096, 2, 16) for _ in "kv"))
    wide = kernels.Modifiers(softmax_scale=1.0)
    narrow = kernels.Modifiers(softmax_scale=1.0, window_left=64, window_right=0)
    assert kernels.select_decode_config(q, cached, wide).num_splits == 4
    assert kernels.select_decode_config(q, cached, narrow).num_splits <= 3
    # What is fixed for all batches does not follow the width of a table either.
    fixed = {
        kernels.select_decode_config(q, kernels.CachedKeys(x, x), wide, True).num_splits
        for x in (torch.empty(1, 64, 2, 16), torch.empty(1, 4096, 2, 16))
    }
    assert fixed == {8}


@pytest.mark.parametrize("seqlen_q", [1, 10])
def test_what_no_query_sees_is_not_read(seqlen_q: int, device: str) -> None:
    """A block that was freed because the window has left it behind: its number and its keys."""
    row = replace(
        row_of("Window, splits, blocks"), lengths=(200, 130), seqlen_q=seqlen_q, num_heads=8,
        modifiers=lambda draw: {"mask": Window(40, 0)},
    )  # fmt: skip
    expected = row.case(torch.float32, device)
    case = row.case(torch.float32, device)
    table = case.kwargs["block_table"]
    for index, length in enumerate(row.lengths):
        gone = length - 40  # the first query sees its own key and 40 before it
        blocks = table[index, : gone // 16].long()
        for cache in (case.k_cache, case.v_cache):
            assert isinstance(cache, Tensor)
            cache[blocks] = float("nan")
            cache[table[index, gone // 16], : gone % 16] = float("nan")
        table[index, : gone // 16] = -1
    # A number that is negative is refused where it can be seen: the operator is called as on a GPU.
    problem = make_cache_problem(
        case.q, case.k_cache, case.v_cache, case.k, case.v,
        **{**case.kwargs, "block_table": expected.kwargs["block_table"]},
    )  # fmt: skip
    problem = replace(problem, cache=replace(problem.cache, block_table=table))
    out, _ = torch_ops_decode.attention_with_kv_cache(problem)
    wanted = expected.call(fastattn.attention_with_kv_cache, impl="triton")
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("appends", [True, False])
def test_rows_without_a_place_write_nothing(
    appends: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle rows of a graph: a length below 0, or block numbers below 0. And lengths too large."""
    with_config(monkeypatch, appends=appends)
    row = replace(row_of("blocks of 16"), lengths=(40, 40, 40), seqlen_q=2)
    case, fresh = (row.case(torch.float32, device) for _ in range(2))
    problem = make_cache_problem(
        case.q, case.k_cache, case.v_cache, case.k, case.v, **case.kwargs, return_lse=True
    )
    seqlens = torch.tensor([-1, 40, 5000], dtype=torch.int32, device=device)
    table = case.kwargs["block_table"].clone()
    table[1] = -1
    cache = replace(problem.cache, seqlens=seqlens, block_table=table)
    torch_ops_decode.append_to_kv_cache(replace(problem, cache=cache, q=None))
    for one, two in zip((case.k_cache, case.v_cache), (fresh.k_cache, fresh.v_cache), strict=True):
        assert isinstance(one, Tensor) and isinstance(two, Tensor)
        assert torch.equal(one.nan_to_num(), two.nan_to_num())
    table[2] = fresh.kwargs["block_table"][0, :1]  # somewhere to read from
    seqlens[1] = -7
    out, lse = torch_ops_decode.attention_with_kv_cache(replace(problem, cache=cache))
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))
    assert bool((lse[:2] == float("-inf")).all())


# Chunks of a sequence.


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("block_size", [None, 16])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_chunks_are_one_causal_forward(
    dtype: str, block_size: int | None, chunk: int, device: str
) -> None:
    """Token by token, or some at a time: what a whole causal forward gives, by the 2x rule."""
    seqlen = 100 if chunk == 1 else 130
    generator = torch.Generator().manual_seed(5)
    q, k, v = (
        torch.randn(2, seqlen, heads, 32, generator=generator).to(device, DTYPES[dtype])
        for heads in (4, 2, 2)
    )
    rotary = Rotary.make(32, seqlen, device=device)
    shape, table = (2, seqlen), None
    if block_size is not None:
        columns = -(-seqlen // block_size)
        table = torch.randperm(2 * columns, generator=generator).reshape(2, columns).to(device)
        shape = (2 * columns, block_size)
    caches = [torch.full((*shape, 2, 32), float("nan"), dtype=q.dtype, device=device) for _ in "kv"]
    outs = []
    for start in range(0, seqlen, chunk):
        part = slice(start, min(start + chunk, seqlen))
        outs.append(
            fastattn.attention_with_kv_cache(
                q[:, part],
                *caches,
                k[:, part],
                v[:, part],
                cache_seqlens=start,
                block_table=table,
                rotary=rotary,
                causal=True,
                impl="triton",
            )
        )
    places = torch.arange(seqlen, device=device).expand(2, -1)

    def whole(dtype: torch.dtype) -> Tensor:
        turned = (rotary.apply(x.to(dtype), places) for x in (q, k))
        result = reference.attention(*turned, v.to(dtype), causal=True)
        assert isinstance(result, Tensor)
        return result

    assert_parity(torch.cat(outs, 1), whole(q.dtype), whole(torch.float64))


# Quantised caches.


def test_bytes_are_e4m3_numbers_where_the_chip_cannot_convert_them(device: str) -> None:
    """All 256 bytes are read as torch reads them, and floats are written as torch writes them."""
    kernels = torch_ops.kernels()
    every = torch.arange(256, dtype=torch.uint8)
    every[[0x7F, 0xFF]] = 0  # not a number
    numbers = every.view(torch.float8_e4m3fn).float()
    generator = torch.Generator().manual_seed(9)
    others = torch.randn(513, generator=generator)
    halfway = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, others])
    x = torch.cat([halfway, halfway * 0.999, halfway * 1.001]).clamp(-448, 448)
    x = torch.nn.functional.pad(x, (0, -x.numel() % 64)).reshape(1, -1, 1, 64).to(device)
    cache = torch.zeros(x.shape, dtype=torch.uint8, device=device)
    ones = torch.ones(1, device=device)
    start = torch.zeros(1, dtype=torch.int32, device=device)
    cached = kernels.CachedKeys(cache, cache.clone(), ones, ones, x, x, start)
    kernels.launch_append(cached)
    assert torch.equal(cache.view(torch.float8_e4m3fn).float(), x.to(torch.float8_e4m3fn).float())

    values = every.reshape(1, 4, 1, 64).to(device)
    q = torch.randn(1, 1, 1, 64, generator=generator).to(device)
    config = kernels.select_decode_config(
        q, kernels.CachedKeys(values, values, ones, ones), kernels.Modifiers(softmax_scale=0.01)
    )
    outs = []
    for stored in (values, values.view(torch.float8_e4m3fn)):
        outs.append(torch.empty_like(q))
        cached = kernels.CachedKeys(stored, stored, ones, ones)
        modifiers = kernels.Modifiers(softmax_scale=0.01)
        config = replace(config, num_splits=1)
        kernels.launch_attention_decode(q, cached, outs[-1], None, modifiers, config)
    if is_interpreting():  # a GPU of compute capability 8.0 cannot run the second
        assert torch.equal(*outs)

    def by_torch(dtype: torch.dtype) -> Tensor:
        wide = numbers.reshape(4, 64).to(device, dtype)
        return torch.softmax(wide @ q[0, 0, 0].to(dtype) * 0.01, 0) @ wide

    assert_parity(outs[0][0, 0, 0], by_torch(torch.float32), by_torch(torch.float64))


# Merging.


def states(dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    q, k, v = (
        torch.randn(2, rows, 3, 40, generator=generator).to(device, dtype)
        for rows in (70, 150, 150)
    )
    found: list[Tensor] = []
    for part in (slice(0, 60), slice(60, 150)):
        found += fastattn.attention(q, k[:, part], v[:, part], return_lse=True, impl="triton")
    return [*found, q, k, v]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_merged_states_are_attention_over_all_keys(dtype: str, device: str) -> None:
    *parts, q, k, v = states(DTYPES[dtype], device)
    with debug():
        out, lse = fastattn.merge_attention_states(*parts, impl="triton")
    plain = reference.attention(q, k, v, return_lse=True)
    exact = reference.attention(q.double(), k.double(), v.double(), return_lse=True)
    # Each state was rounded already: torch's own way to merge them is the measure.
    rounded, _ = fastattn.merge_attention_states(*parts, impl="reference")
    assert_parity(out, rounded, exact[0])
    assert_parity(lse, plain[1], exact[1], name="lse")


def test_a_state_without_keys_is_not_read(device: str) -> None:
    out_a, lse_a, out_b, lse_b, *_ = states(torch.float32, device)
    lse_a[:, :, 10:40] = float("-inf")
    lse_b[:, :, 30:60] = float("-inf")
    out_a[:, 10:40] = float("nan")
    out_b[:, 30:60] = float("nan")
    out, lse = fastattn.merge_attention_states(out_a, lse_a, out_b, lse_b, impl="triton")
    assert torch.equal(out[:, 10:30], out_b[:, 10:30])
    assert torch.equal(out[:, 40:60], out_a[:, 40:60])
    assert torch.equal(out[:, 30:40], torch.zeros_like(out[:, 30:40]))
    assert bool((lse[:, :, 30:40] == float("-inf")).all())


def test_merging_takes_packed_and_strided_states(device: str) -> None:
    parts = [part[0] for part in states(torch.float32, device)[:4]]
    expected = fastattn.merge_attention_states(*parts, impl="reference")
    strided = [torch.stack([part, part], -1)[..., 0] for part in parts]
    for one, two in zip(
        fastattn.merge_attention_states(*strided, impl="triton"), expected, strict=True
    ):
        torch.testing.assert_close(one, two)


def test_gradients_of_merging(device: str) -> None:
    parts = [part.requires_grad_() for part in states(torch.float32, device)[:4]]
    with torch.no_grad():
        parts[1][:, :, 5:9] = float("-inf")
        parts[3][:, :, 7:12] = float("-inf")
        parts[0][:, 5:9] = float("nan")

    def gradients(dtype: torch.dtype, impl: str) -> list[Tensor]:
        own = [part.detach().to(dtype).requires_grad_() for part in parts]
        out, lse = fastattn.merge_attention_states(*own, impl=impl)
        seed = torch.Generator().manual_seed(7)
        weights = torch.randn(out.shape, generator=seed).to(device, dtype)
        loss = (out * weights).sum() + lse.masked_fill(lse == float("-inf"), 0.0).sin().sum()
        loss.backward()
        return [part.grad for part in own if part.grad is not None]

    results = (
        gradients(torch.float32, "triton"),
        gradients(torch.float32, "reference"),
        gradients(torch.float64, "reference"),
    )
    for name, *three in zip(("out_a", "lse_a", "out_b", "lse_b"), *results, strict=True):
        assert_parity(*three, name=name)


# Operators.


def decode_arguments(name: str, device: str) -> tuple[Any, ...]:
    from fastattn.torch_decode_ops import flat_arguments

    case = row_of(name).case(torch.float32, device)
    operands = (case.q, case.k_cache, case.v_cache, case.k, case.v)
    return flat_arguments(make_cache_problem(*operands, **case.kwargs, return_lse=True))


@pytest.mark.parametrize("name", ["one token", "everything", "nothing new"])
def test_operator_is_what_its_schema_says(name: str, device: str) -> None:
    operator = torch.ops.fastattn.attention_with_kv_cache.default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = decode_arguments(name, device)
    torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_step_compiles_without_graph_breaks(backend: str, device: str) -> None:
    torch._dynamo.reset()
    rotary = Rotary.make(32, 200, device=device)

    def step(q: Tensor, k: Tensor, caches: list[Tensor], seqlens: Tensor, table: Tensor) -> Tensor:
        out = fastattn.attention_with_kv_cache(
            q * 2, *caches, k, k + 1, cache_seqlens=seqlens, rotary=rotary, causal=True,
            bias=T5Bias(table, bidirectional=False), impl="triton",
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out.sin() + caches[1][0, 0, 0, 0]

    case = row_of("rotary").case(torch.float32, device)
    table = torch.randn(8, 4, device=device)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        case = row_of("rotary").case(torch.float32, device)
        caches = [cache for cache in (case.k_cache, case.v_cache) if isinstance(cache, Tensor)]
        with torch.no_grad():
            out = function(case.q, case.k, caches, case.kwargs["cache_seqlens"], table)
        results.append((out, *case.tokens()))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.cuda
@pytest.mark.parametrize("last_combines", [False, True])
def test_a_step_replays_in_a_cuda_graph(
    last_combines: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_config(monkeypatch, last_combines=last_combines, num_splits=4)
    device = "cuda"
    steps = 6

    def start() -> tuple[list[Tensor], Tensor, Callable[[], Tensor]]:
        case = row_of("rotary").case(torch.float16, device)
        caches = [cache for cache in (case.k_cache, case.v_cache) if isinstance(cache, Tensor)]
        seqlens = case.kwargs["cache_seqlens"]

        def step() -> Tensor:
            out = fastattn.attention_with_kv_cache(
                case.q, *caches, case.k, case.v, cache_seqlens=seqlens,
                rotary=case.kwargs["rotary"], causal=True, impl="triton",
            )  # fmt: skip
            assert isinstance(out, Tensor)
            seqlens.add_(3)
            return out

        return caches, seqlens, step

    _, _, step = start()
    expected = [step().clone() for _ in range(steps)]
    _, seqlens, step = start()
    before = seqlens.clone()
    step()  # compiled before the capture
    seqlens.copy_(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    seqlens.copy_(before)
    for wanted in expected:
        graph.replay()
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("seqlen_q", [1, 4])
def test_a_cache_for_cross_attention_is_what_torch_gives(seqlen_q: int, device: str) -> None:
    """Written once, quantised or not, and only read."""
    generator = torch.Generator().manual_seed(8)
    q, k, v = (
        torch.randn(2, rows, 2, 32, generator=generator).to(device) for rows in (seqlen_q, 90, 90)
    )
    caches = [torch.empty_like(k), torch.empty_like(v)]
    with debug():
        fastattn.append_to_kv_cache(*caches, k, v, cache_seqlens=0, impl="triton")
        out = fastattn.attention_with_kv_cache(q, *caches, impl="triton")
    assert torch.equal(caches[0], k) and torch.equal(caches[1], v)
    assert isinstance(out, Tensor)

    def by_torch(dtype: torch.dtype) -> Tensor:
        heads_first = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(*heads_first).transpose(1, 2)

    assert_parity(out, by_torch(torch.float32), by_torch(torch.float64))
    stored = [Quantized.make(x, "int8") for x in (k, v)]
    written = [Quantized.zeros(x.shape, "int8", device=device) for x in (k, v)]
    fastattn.append_to_kv_cache(*written, k, v, cache_seqlens=0, impl="triton")
    for one, two in zip(stored, written, strict=True):
        assert torch.equal(one.values, two.values)
        assert torch.equal(one.scale, two.scale)
