"""Accuracy of every feature, by the table and rule of `fastattn verify`; and of the reference."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

import fastattn
from fastattn import ALiBi, Causal, Lengths, Packed, T5Bias, Window, reference
from fastattn.testing import assert_parity, bounds_checked, is_interpreting, make_qkv
from fastattn.testing.features import FEATURES, Case, Feature
from fastattn.testing.gradients import run
from fastattn.testing.verify import check_feature, find_features

# Half of the rows exercise masks, which do not depend on the dtype: these are the ones that do.
FP16_ROWS = [
    row
    for row in FEATURES
    if row.name
    in {
        "bidirectional", "causal", "head_dim 40", "head_dim 256", "Lengths, left padded, causal",
        "Packed, window, T5Bias", "fully masked rows", "bias of -inf and lowest values", "ALiBi",
        "softcap", "sinks", "large scores", "everything", "grouped-query, groups of 4",
        "bias, broadcast over heads", "T5Bias, float32 whatever q is, grouped-query", "dropout",
        "gradient of out.sum()",
    }
]  # fmt: skip


def name_of(feature: Feature) -> str:
    return feature.name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("feature", FEATURES, ids=name_of)
def test_kernels(feature: Feature, dtype: str, device: str) -> None:
    """Output, log-sum-exp and weights, and every gradient."""
    result = check_feature(feature, dtype, device, grad=True)
    assert result.passed, str(result)


@pytest.mark.parametrize("feature", FP16_ROWS, ids=name_of)
def test_kernels_in_fp16(feature: Feature, device: str) -> None:
    result = check_feature(feature, "fp16", device, grad=True)
    assert result.passed, str(result)


def test_every_row_has_its_own_name_and_the_same_numbers_each_time() -> None:
    assert len({row.name for row in FEATURES}) == len(FEATURES)
    row = next(row for row in FEATURES if row.name == "everything")
    first, second = row.case(torch.bfloat16), row.case(torch.bfloat16)
    assert torch.equal(first.q, second.q)
    assert torch.equal(first.kwargs["sinks"], second.kwargs["sinks"])


def test_rows_are_found_by_a_part_of_their_name() -> None:
    with_gradient = {"Prefix", "Prefix & Lengths"}
    assert {row.name for row in find_features("PREFIX", grad=True)} == with_gradient
    assert {row.name for row in find_features("PREFIX")} == {*with_gradient, "cache: Prefix"}
    with pytest.raises(ValueError, match=r"'no such row'.*\n  bidirectional"):
        find_features("no such row")


# Tiles.


@pytest.mark.parametrize("tile", [(64, 128), (128, 32), (32, 64)], ids=str)
@pytest.mark.parametrize("name", ["everything", "Window(left, right)", "Packed, window, T5Bias"])
def test_tiles_of_any_shape(
    name: str, tile: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastattn.kernels.attention import forward
    from fastattn.kernels.attention.config import TileConfig

    config = TileConfig(*tile, 4, 1)
    monkeypatch.setattr(forward, "select_forward_config", lambda *args, **kwargs: config)
    (feature,) = [row for row in FEATURES if row.name == name]
    result = check_feature(feature, "fp32", device)
    assert result.passed, str(result)


def test_same_inputs_give_the_same_bits(device: str) -> None:
    q, k, v = make_qkv(2, 100, 130, 4, 2, 32, dtype=torch.bfloat16, device=device)
    runs = [
        fastattn.attention(q, k, v, causal=True, return_lse=True, impl="triton") for _ in range(2)
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_what_lies_in_the_padding_is_never_seen(device: str) -> None:
    q, k, v = make_qkv(2, 100, 100, 2, head_dim=32, device=device)
    mask = Lengths(
        torch.tensor([37, 90], device=device), seqlens_q=torch.tensor([80, 0]).to(device)
    )
    clean = fastattn.attention(q, k, v, mask=mask, impl="triton")
    for index, length in enumerate((37, 90)):
        k[index, length:], v[index, length:] = math.nan, math.nan
    q[0, 80:], q[1] = math.nan, math.nan
    assert torch.equal(fastattn.attention(q, k, v, mask=mask, impl="triton"), clean)


# Attention weights on demand.


@pytest.mark.parametrize("average", [False, True], ids=["per head", "averaged"])
@pytest.mark.parametrize("given_lse", [False, True], ids=["no lse", "lse"])
@pytest.mark.parametrize(
    ("heads", "rows"),
    [([3, 0], None), (None, [99, 0, 0, 64]), (torch.tensor([1]), torch.tensor([70, 5]))],
    ids=["heads", "rows", "heads and rows"],
)
def test_weights_of_chosen_heads_and_rows(
    heads: Any, rows: Any, given_lse: bool, average: bool, device: str
) -> None:
    q, k, v = make_qkv(2, 100, 90, 4, 2, 32, device=device)
    heads, rows = (x.to(device) if isinstance(x, Tensor) else x for x in (heads, rows))
    table = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).to(device)
    kwargs: dict[str, Any] = {"causal": True, "bias": T5Bias(table, max_distance=20)}
    options = {"heads": heads, "rows": rows, "average_heads": average}
    lse, baseline_lse = None, None
    if given_lse:
        _, lse = fastattn.attention(q, k, v, return_lse=True, impl="triton", **kwargs)
        _, baseline_lse = reference.attention(q, k, v, return_lse=True, **kwargs)
    weights = fastattn.attention_weights(q, k, lse, impl="triton", **options, **kwargs)

    every = fastattn.attention_weights(q.double(), k.double(), impl="reference", **kwargs)
    exact = every[:, slice(None) if heads is None else heads]
    exact = exact[:, :, slice(None) if rows is None else rows]
    exact = exact.mean(1) if average else exact
    # Without an lse the kernel computes one first; plain torch is given the same way to go.
    if baseline_lse is None:
        _, baseline_lse = reference.attention(q, k, v, return_lse=True, **kwargs)
    baseline = fastattn.attention_weights(q, k, baseline_lse, impl="reference", **options, **kwargs)
    assert_parity(weights, baseline, exact, name="weights")


def test_weights_of_a_packed_batch_are_zero_past_each_sequence(device: str) -> None:
    q, k, _ = make_qkv(1, 100, 100, 2, head_dim=32, device=device)
    mask = Packed(torch.tensor([0, 70, 70, 100], device=device))
    weights = fastattn.attention_weights(q, k, mask=mask, rows=[0, 40], impl="triton")
    assert weights.shape == (3, 2, 2, 70)
    sums = weights.double().sum(-1)
    # Row 40 is past the end of the third sequence, and the second has no rows at all.
    present = torch.tensor([[1, 1], [0, 0], [1, 0]], device=device)[:, None].expand(3, 2, 2)
    assert ((sums > 0.99) == present.bool()).all()
    assert weights[1].count_nonzero() == 0
    assert weights[2, :, :, 30:].count_nonzero() == 0


# Tensors whose offsets exceed int32. The memory between the rows is reserved and never touched.


def _spread(
    shape: tuple[int, int, int, int], strides: tuple[int, int, int, int], device: str
) -> Tensor:
    """Normal float16 values at strides that pass 2**31 elements."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    assert extent > 2**31
    view = torch.empty(extent, dtype=torch.float16, device=device).as_strided(shape, strides)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(extent % 1000))
    return view.copy_(values)


OFFSETS = {
    # between the batch's sequences, heads, or tiles of rows
    "batch": ((3, 70, 1, 16), (2**30 + 8, 16, 16, 1)),
    "head": ((1, 70, 3, 16), (0, 16, 2**30 + 8, 1)),
    "rows": ((1, 150, 1, 16), (0, 2**24, 16, 1)),
    # within one tile: the wide path
    "rows of a tile": ((1, 70, 1, 16), (0, 2**25 + 8, 16, 1)),
    "dim": ((1, 70, 1, 16), (0, 1, 70, 2**31 // 15 + 8)),
}


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("where", OFFSETS)
def test_offsets_beyond_int32(where: str, which: str, device: str) -> None:
    shape, strides = OFFSETS[where]
    batch, seqlen, heads, dim = shape
    q, k, v = make_qkv(
        batch, seqlen, seqlen, heads, head_dim=dim, dtype=torch.float16, device=device
    )
    operands = {"q": q, "k": k, "v": v}
    operands[which] = _spread(shape, strides, device)
    out, lse = fastattn.attention(**operands, causal=True, return_lse=True, impl="triton")
    packed = {name: tensor.contiguous() for name, tensor in operands.items()}
    near, near_lse = fastattn.attention(**packed, causal=True, return_lse=True, impl="triton")
    assert torch.equal(out, near)
    assert torch.equal(lse, near_lse)
    if which != "v":
        pair = operands["q"], operands["k"]
        near_pair = packed["q"], packed["k"]
        weights = fastattn.attention_weights(*pair, lse, causal=True, impl="triton")
        near_weights = fastattn.attention_weights(*near_pair, lse, causal=True, impl="triton")
        assert torch.equal(weights, near_weights)


@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("where", OFFSETS)
def test_backward_offsets_beyond_int32(where: str, which: str, device: str) -> None:
    shape, strides = OFFSETS[where]
    batch, seqlen, heads, dim = shape
    q, k, v = make_qkv(
        batch, seqlen, seqlen, heads, head_dim=dim, dtype=torch.float16, device=device
    )
    operands = {"q": q, "k": k, "v": v, "dout": torch.flip(q, (1,))}
    operands[which] = _spread(shape, strides, device)
    attention = partial(fastattn.attention, impl="triton")

    def backward(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> dict[str, Tensor]:
        return run(attention, Case(q, k, v, {"causal": True}), (dout, None))

    far = backward(**operands)
    near = backward(**{name: tensor.contiguous() for name, tensor in operands.items()})
    for part, tensor in far.items():
        assert torch.equal(tensor, near[part]), part


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3, 1, 70, 40), (2**30 + 8, 0, 40, 1)), ((1, 1, 70, 40), (0, 0, 2**25 + 8, 1))],
    ids=["batch", "rows of a tile"],
)
def test_bias_offsets_beyond_int32(shape: Any, strides: Any, device: str) -> None:
    q, k, v = make_qkv(3, 70, 40, 1, head_dim=16, dtype=torch.float16, device=device)
    bias = _spread(shape, strides, device)
    out = fastattn.attention(q, k, v, bias=bias, impl="triton")
    near = fastattn.attention(q, k, v, bias=bias.contiguous(), impl="triton")
    assert torch.equal(out, near)


@pytest.mark.interpreter
def test_no_access_outside_the_elements_of_strided_operands() -> None:
    """The check that `check_feature` relies on does see a kernel that reads a gap."""
    q, k, v = make_qkv(1, 70, 70, 1, head_dim=16)
    narrow = k[..., :8]
    with bounds_checked(k=narrow), pytest.raises(IndexError, match="k"):
        fastattn.attention(q, k, v, impl="triton")
    assert is_interpreting()


# The specification itself, against definitions that share no code with it.


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, score: Any, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention a row at a time; `score(b, h, i, j, product)` is None where i may not see j."""
    batch, seqlen_q, heads, _ = q.shape
    group = heads // k.shape[2]
    out = torch.zeros(batch, seqlen_q, heads, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, seqlen_q), -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(seqlen_q):
                seen = {}
                for j in range(k.shape[1]):
                    product = float(q[b, i, h] @ k[b, j, h // group])
                    value = score(b, h, i, j, product)
                    if value is not None:
                        seen[j] = value
                terms = list(seen.values()) + ([float(sinks[h])] if sinks is not None else [])
                if not terms:
                    continue
                total = math.fsum(math.exp(term) for term in terms)
                lse[b, h, i] = math.log(total)
                for j, value in seen.items():
                    out[b, i, h] += math.exp(value) / total * v[b, j, h // group]
    return out, lse


def assert_same(actual: Tensor, wanted: Tensor) -> None:
    """Equal up to the rounding of a few dozen float64 operations."""
    assert torch.equal(torch.isneginf(actual), torch.isneginf(wanted))
    finite = torch.isfinite(wanted)
    error = (actual - wanted)[finite].abs().max()
    assert error <= 100 * torch.finfo(torch.float64).eps * wanted[finite].abs().max()


def test_reference_is_the_definition() -> None:
    q, k, v = make_qkv(2, 7, 9, 4, 2, 8, 5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(4, 7, 9, generator=generator, dtype=torch.float64)
    dense = torch.rand(2, 1, 7, 9, generator=generator) < 0.8
    slopes = torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=torch.float64)
    sinks = torch.randn(4, generator=generator, dtype=torch.float64)
    lengths, starts, live = [9, 6], [0, 2], [7, 5]

    def score(b: int, h: int, i: int, j: int, product: float) -> float | None:
        distance = j - (i + 9 - 7)
        if not (-3 <= distance <= 1 and starts[b] <= j < lengths[b] and i < live[b]):
            return None
        if not dense[b, 0, i, j]:
            return None
        capped = 2.0 * math.tanh(product * 0.3 / 2.0)
        return capped + float(bias[h, i, j]) - float(slopes[h]) * abs(distance)

    mask = Window(3, 1) & Lengths(
        torch.tensor(lengths), starts_k=torch.tensor(starts), seqlens_q=torch.tensor(live)
    )
    wanted = by_definition(q, k, v, score, sinks)
    actual = reference.attention(
        q, k, v, mask=mask & dense, bias=ALiBi(slopes) + bias, softmax_scale=0.3, softcap=2.0,
        sinks=sinks, return_lse=True,
    )  # fmt: skip
    assert_same(actual[0], wanted[0])
    assert_same(actual[1], wanted[1])


def test_reference_gives_nothing_to_rows_without_keys() -> None:
    q, k, v = make_qkv(1, 4, 2, 1, head_dim=8, dtype=torch.float64)
    wanted = by_definition(
        q, k, v, lambda b, h, i, j, product: product / 8**0.5 if j <= i - 2 else None
    )
    out, lse = reference.attention(q, k, v, causal=True, return_lse=True)
    assert_same(out, wanted[0])
    assert_same(lse, wanted[1])
    assert out[:, :2].count_nonzero() == 0
    assert torch.isneginf(lse[..., :2]).all()


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 9), (9, 9)])
def test_causal_is_aligned_as_in_torch_lower_right(seqlen_q: int, seqlen_k: int) -> None:
    q, k, v = make_qkv(2, seqlen_q, seqlen_k, 2, head_dim=16, dtype=torch.float64)
    wanted = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=causal_lower_right(seqlen_q, seqlen_k)
    ).transpose(1, 2)
    assert_same(reference.attention(q, k, v, causal=True), wanted)
    assert_same(reference.attention(q, k, v, mask=Causal()), wanted)


def test_packed_is_each_sequence_by_itself() -> None:
    lengths_q, lengths_k = [5, 0, 3], [2, 4, 6]
    q, k, v = make_qkv(1, 8, 12, 2, head_dim=8, dtype=torch.float64)
    ends_q, ends_k = torch.tensor([0, 5, 5, 8]), torch.tensor([0, 2, 6, 12])
    out, lse = reference.attention(
        q[0], k[0], v[0], mask=Packed(ends_q, ends_k), causal=True, return_lse=True
    )
    for i in range(len(lengths_q)):
        rows, keys = slice(*ends_q[i : i + 2].tolist()), slice(*ends_k[i : i + 2].tolist())
        own, own_lse = reference.attention(
            q[:, rows], k[:, keys], v[:, keys], causal=True, return_lse=True
        )
        assert rows.stop - rows.start == lengths_q[i]
        assert keys.stop - keys.start == lengths_k[i]
        assert torch.equal(out[rows], own[0])
        assert torch.equal(lse[:, rows], own_lse[0])


def test_vectors_of_any_stride(device: str) -> None:
    """Lengths, sinks and indices cut out of larger tensors, whose neighbours must not be read."""
    q, k, v = make_qkv(2, 70, 90, 4, head_dim=32, device=device)
    table = torch.tensor([[50, 7, 0], [90, 3, 1]], device=device)
    sinks = torch.randn(4, 3, device=device)[:, 1]
    strided = {
        "mask": Lengths(table[:, 0], starts_k=table[:, 1]) & fastattn.Prefix(table[:, 2]),
        "sinks": sinks,
    }
    whole = {
        "mask": Lengths(table[:, 0].clone(), starts_k=table[:, 1].clone())
        & fastattn.Prefix(table[:, 2].clone()),
        "sinks": sinks.clone(),
    }
    out, lse = fastattn.attention(q, k, v, return_lse=True, impl="triton", **strided)
    expected, expected_lse = fastattn.attention(q, k, v, return_lse=True, impl="triton", **whole)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)

    chosen = torch.tensor([[3, 60], [0, 5]], device=device)
    weights = fastattn.attention_weights(
        q, k, lse, heads=chosen[:, 0], rows=chosen[:, 1], impl="triton", **strided
    )
    expected = fastattn.attention_weights(
        q, k, lse, heads=[3, 0], rows=[60, 5], impl="triton", **whole
    )
    assert torch.equal(weights, expected)

    cu_seqlens = torch.tensor([[0, 9], [30, 9], [70, 9]], device=device)[:, 0]
    packed = [t[0, :70] for t in (q, k, v)]
    out = fastattn.attention(*packed, mask=Packed(cu_seqlens), impl="triton")
    assert torch.equal(
        out, fastattn.attention(*packed, mask=Packed(cu_seqlens.clone()), impl="triton")
    )
