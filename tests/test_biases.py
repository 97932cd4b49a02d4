"""Biases as values: against their definitions, and against the T5 implementation people have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

from fastattn import ALiBi, T5Bias, alibi_slopes
from fastattn.biases import (
    Bias,
    BiasParts,
    JoinedBias,
    as_bias,
    join,
    key_minus_query,
    t5_bucket,
    take_apart,
)

SHAPES = [(6, 6), (4, 9), (9, 4), (1, 7)]


# T5.


@pytest.mark.parametrize("bidirectional", [True, False], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (32, 64), (8, 20), (16, 1000), (64, 128), (6, 5)]
)
def test_buckets_are_those_of_transformers(
    num_buckets: int, max_distance: int, bidirectional: bool
) -> None:
    distance = torch.arange(-2 * max_distance - 500, 2 * max_distance + 501)
    wanted = T5Attention._relative_position_bucket(
        distance, bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    assert torch.equal(t5_bucket(distance, bidirectional, num_buckets, max_distance), wanted)


@pytest.mark.parametrize("bidirectional", [True, False], ids=["bidirectional", "causal"])
def test_buckets_are_those_of_the_paper(bidirectional: bool) -> None:
    """From the description: exact up to half of the buckets, then logarithmic, then the last."""
    total, longest = 32, 128
    buckets = total // 2 if bidirectional else total
    exact = buckets // 2
    for relative in range(-200, 201):
        after = bidirectional and relative > 0
        distance = abs(relative) if bidirectional else max(-relative, 0)
        if distance < exact:
            wanted = distance
        else:
            share = math.log(distance / exact) / math.log(longest / exact)
            wanted = min(exact + int(share * (buckets - exact) + 1e-6), buckets - 1)
        bucket = int(t5_bucket(torch.tensor(relative), bidirectional, total, longest))
        assert bucket == wanted + (buckets if after else 0), relative


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bidirectional", [True, False], ids=["bidirectional", "causal"])
def test_dense_t5_bias_looks_up_the_bucket_of_each_pair(
    bidirectional: bool, shape: tuple[int, int]
) -> None:
    seqlen_q, seqlen_k = shape
    table = torch.randn(8, 3)
    dense = T5Bias(table, bidirectional, max_distance=5).dense(*shape)
    assert dense.shape == (1, 3, *shape)
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            relative = torch.tensor(j - (i + seqlen_k - seqlen_q))
            bucket = t5_bucket(relative, bidirectional, 8, 5)
            assert torch.equal(dense[0, :, i, j], table[bucket])


def test_t5_bias_by_distance_ends_in_the_last_buckets() -> None:
    table = torch.arange(32.0)[:, None].expand(32, 2) + torch.tensor([0.0, 100.0])
    by_distance = T5Bias(table).by_distance()
    assert by_distance.shape == (2, 257)
    assert by_distance.is_contiguous()
    assert by_distance[0, 0] == 15  # keys long before the query
    assert by_distance[0, 128] == 0  # the query itself
    assert by_distance[0, -1] == 31  # keys long after
    assert torch.equal(by_distance[1], by_distance[0] + 100)
    # From max_distance on nothing changes, which is why the vector may end there.
    assert len({int(t5_bucket(torch.tensor(-d), True, 32, 128)) for d in range(128, 400)}) == 1


@pytest.mark.parametrize("bidirectional", [True, False], ids=["bidirectional", "causal"])
def test_gradient_of_the_t5_table_counts_the_pairs_of_each_bucket(bidirectional: bool) -> None:
    table = torch.zeros(8, 2, requires_grad=True)
    T5Bias(table, bidirectional, max_distance=6).dense(9, 12).sum().backward()
    buckets = t5_bucket(key_minus_query(9, 12, torch.device("cpu")), bidirectional, 8, 6)
    wanted = torch.bincount(buckets.flatten(), minlength=8).float()
    assert table.grad is not None
    assert torch.equal(table.grad, wanted[:, None].expand(8, 2))


# ALiBi.


def test_slopes_of_the_paper() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    assert alibi_slopes(16).tolist() == pytest.approx([2 ** (-i / 2) for i in range(1, 17)])
    # Not a power of two: those of 8 heads, then every other one of 16 (BLOOM, MPT).
    assert alibi_slopes(12).tolist() == pytest.approx(
        [2.0**-i for i in range(1, 9)] + [2 ** -(i + 0.5) for i in range(4)]
    )
    assert alibi_slopes(12).dtype == torch.float32
    with pytest.raises(ValueError, match="num_heads must be >= 1, got 0"):
        alibi_slopes(0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batched", [False, True], ids=["per head", "per sequence and head"])
def test_dense_alibi_is_minus_slope_times_distance(batched: bool, shape: tuple[int, int]) -> None:
    slopes = torch.rand(2, 3) if batched else torch.rand(3)
    dense = ALiBi(slopes).dense(*shape)
    assert dense.shape == (2 if batched else 1, 3, *shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            distance = abs(j - (i + shape[1] - shape[0]))
            assert torch.equal(dense[..., i, j], (-slopes * distance).reshape(-1, 3))


def test_alibi_distances_are_exact_where_bfloat16_is_not() -> None:
    """bfloat16 has 8 bits: a distance of 1001 would become 1000."""
    dense = ALiBi(torch.tensor([1 / 1024])).dense(1, 1002, torch.bfloat16)
    assert dense[0, 0, 0, 0] == torch.tensor(-1001 / 1024).bfloat16()
    assert dense.dtype == torch.bfloat16


# Tensors and sums.


def test_dense_of_a_tensor_is_the_tensor_broadcast() -> None:
    tensor = torch.randn(3, 1, 5)
    dense = as_bias(tensor).dense(4, 5)
    assert torch.equal(dense, tensor[None].expand(1, 3, 4, 5))
    assert as_bias(tensor).dense(4, 5, torch.float64).dtype == torch.float64


def test_a_sum_is_the_sum_of_its_parts() -> None:
    tensor, slopes, table = torch.randn(2, 1, 4, 6), torch.rand(3), torch.randn(8, 3)
    alibi, t5 = ALiBi(slopes), T5Bias(table, max_distance=5)
    wanted = alibi.dense(4, 6) + t5.dense(4, 6) + tensor
    for bias in (alibi + t5 + tensor, tensor + alibi + t5, join(alibi, as_bias(tensor), t5)):
        assert isinstance(bias, JoinedBias)
        assert len(bias.parts) == 3
        torch.testing.assert_close(bias.dense(4, 6), wanted)
        # One sequence of the batch, with lengths of its own.
        own = alibi.dense(3, 5) + t5.dense(3, 5) + tensor[1:, :, :3, :5]
        torch.testing.assert_close(bias.at(1, 3, 5).dense(3, 5), own)


def dense_of(parts: BiasParts, seqlen_q: int, seqlen_k: int) -> Tensor:
    """What a kernel makes of the flat arguments, written down again."""
    distance = key_minus_query(seqlen_q, seqlen_k, torch.device("cpu"))
    total = torch.zeros(1, 1, seqlen_q, seqlen_k)
    if parts.bias is not None:
        total = total + parts.bias
    if parts.alibi_slopes is not None:
        total = total - parts.alibi_slopes[:, :, None, None] * distance.abs()
    if parts.relative_bias is not None:
        radius = parts.relative_bias.shape[1] // 2
        total = total + parts.relative_bias[:, distance.clamp(-radius, radius) + radius][None]
    return total


@pytest.mark.parametrize(
    "bias",
    [
        ALiBi(torch.rand(3)),
        ALiBi(torch.rand(2, 3)) + ALiBi(torch.rand(3)),
        T5Bias(torch.randn(8, 3), max_distance=5),
        T5Bias(torch.randn(8, 3), max_distance=5) + T5Bias(torch.randn(6, 3), False, 9),
        as_bias(torch.randn(3, 4, 20)) + torch.randn(2, 1, 1, 20),
        ALiBi(torch.rand(3)) + T5Bias(torch.randn(8, 3), max_distance=5) + torch.randn(4, 1),
    ],
    ids=["ALiBi", "two ALiBi", "T5", "two T5", "two tensors", "all"],
)
def test_the_flat_arguments_say_the_same(bias: Bias) -> None:
    flat, dense = torch.broadcast_tensors(dense_of(take_apart(bias), 4, 20), bias.dense(4, 20))
    torch.testing.assert_close(flat, dense)


def test_nothing_is_added_where_there_is_no_bias() -> None:
    assert vars(take_apart(None)) == vars(BiasParts())


def test_what_cannot_be_added() -> None:
    with pytest.raises(TypeError, match="bias must be a floating tensor, ALiBi"):
        ALiBi(torch.ones(2)) + 1  # type: ignore[operator]
    with pytest.raises(TypeError, match="bias must be floating point"):
        ALiBi(torch.ones(2)) + torch.ones(2, 2, dtype=torch.bool)


def test_tensors_of_a_bias_are_those_that_a_gradient_flows_to() -> None:
    slopes, table, tensor = torch.ones(2), torch.ones(8, 2), torch.ones(3, 3)
    bias = ALiBi(slopes) + T5Bias(table) + tensor
    assert [id(x) for x in bias.tensors()] == [id(slopes), id(table), id(tensor)]
