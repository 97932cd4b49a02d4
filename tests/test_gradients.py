"""Gradients besides their parity, which is in `test_parity.py`; and parity of what torch runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fastattn
from fastattn import Lengths, Packed, T5Bias, Window, reference
from fastattn.kernels.attention.backward_rows import sum_diagonals
from fastattn.masks import Mask
from fastattn.problem import AttentionProblem, make_problem
from fastattn.testing import compare, make_qkv
from fastattn.testing.features import FEATURES, Case, Feature
from fastattn.testing.gradients import run
from fastattn.testing.verify import DTYPES, check_feature

triton_attention = partial(fastattn.attention, impl="triton")


def name_of(feature: Feature) -> str:
    return feature.name


def row_named(name: str) -> Feature:
    (feature,) = [row for row in FEATURES if row.name == name]
    return feature


def run_backward(feature: Feature, case: Case) -> dict[str, Tensor]:
    """Results and gradients of the kernels."""
    return run(triton_attention, case, feature.output_gradients(case))


# The kernels.


@pytest.mark.parametrize("name", ["everything", "Packed, causal", "dropout", "no keys"])
def test_kernels_give_the_same_with_and_without_gradients(name: str, device: str) -> None:
    case = row_named(name).case(torch.bfloat16, device)
    without = run(triton_attention, case)
    training = run_backward(row_named(name), case)
    assert torch.equal(training["out"], without["out"])
    assert torch.equal(training["lse"], without["lse"])


@pytest.mark.parametrize("wide", [False, True], ids=["high tiles", "wide tiles"])
@pytest.mark.parametrize(
    "name",
    [
        "everything", "Window(left, right)", "Packed, window, T5Bias", "T5Bias, far tiles",
        "bias, broadcast over batch", "dropout, causal, grouped-query",
    ],
)  # fmt: skip
def test_backward_tiles_of_any_shape(
    name: str, wide: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastattn.kernels.attention import backward
    from fastattn.kernels.attention.config import BackwardConfig, TileConfig

    high_tile, wide_tile = TileConfig(128, 32, 4, 1), TileConfig(32, 64, 4, 1)
    tile = wide_tile if wide else high_tile
    # By rows, a bias by distance needs tiles that are not higher than wide.
    by_rows = wide_tile if "T5Bias" in name or name == "everything" else tile
    config = BackwardConfig(by_rows, tile, tile)
    monkeypatch.setattr(backward, "select_backward_config", lambda *args, **kwargs: config)
    result = check_feature(row_named(name), "fp32", device, grad=True)
    assert result.passed, str(result)


@pytest.mark.parametrize("name", ["everything", "everything, packed", "dropout"])
def test_same_inputs_give_the_same_gradients_bit_by_bit(name: str, device: str) -> None:
    feature = row_named(name)
    first, second = (run_backward(feature, feature.case(torch.float32, device)) for _ in range(2))
    assert first.keys() == second.keys()
    for part, tensor in first.items():
        assert torch.equal(tensor, second[part]), part


def test_what_lies_in_the_padding_never_reaches_a_gradient(device: str) -> None:
    q, k, v = make_qkv(2, 100, 100, 4, 2, 32, device=device)
    mask = Lengths(
        torch.tensor([37, 90], device=device), seqlens_q=torch.tensor([80, 0]).to(device)
    )
    bias = torch.randn(2, 4, 100, 100, generator=torch.Generator().manual_seed(0)).to(device)
    starts = torch.ones_like(q), None
    case = Case(q, k, v, {"mask": mask, "bias": bias})
    clean = run(triton_attention, case, starts)
    for index, length in enumerate((37, 90)):
        k[index, length:], v[index, length:] = math.nan, math.nan
        bias[index, :, :, length:] = math.nan
    q[0, 80:], q[1], bias[0, :, 80:], bias[1] = math.nan, math.nan, math.nan, math.nan
    for part, tensor in run(triton_attention, case, starts).items():
        assert torch.equal(tensor, clean[part]), part
    assert clean["dq"][0, :80].count_nonzero() and clean["dq"][1].count_nonzero() == 0
    assert clean["dk"][0, :37].count_nonzero() and clean["dk"][0, 37:].count_nonzero() == 0


@pytest.mark.parametrize("impl", ["triton", "reference", "auto"])
@pytest.mark.parametrize(
    ("sizes", "mask", "integers"),
    [
        ((0, 5, 5), Lengths, []),
        ((2, 0, 5), None, []),
        ((2, 5, 0), None, []),
        ((2, 5, 5), Lengths, [0, 0]),
        ((1, 0, 0), Packed, [0]),
        ((1, 0, 0), Packed, [0, 0]),
    ],
    ids=["no batch", "no queries", "no keys", "no lengths", "no sequences", "empty sequence"],
)
def test_a_call_with_nothing_to_attend_to_can_be_part_of_a_loss(
    sizes: tuple[int, int, int],
    mask: Callable[[Tensor], Mask] | None,
    integers: list[int],
    impl: str,
    device: str,
) -> None:
    batch, seqlen_q, seqlen_k = sizes
    shapes = ((batch, seqlen, 2, 8) for seqlen in (seqlen_q, seqlen_k, seqlen_k))
    q, k, v = (torch.ones(shape, device=device, requires_grad=True) for shape in shapes)
    lengths = torch.tensor(integers, dtype=torch.int32, device=device)
    chosen = None if mask is None else mask(lengths)
    out = fastattn.attention(q, k, v, causal=True, mask=chosen, impl=impl)
    out.sum().backward()
    assert q.grad is not None
    assert all(x.grad is None or x.grad.count_nonzero() == 0 for x in (q, k, v))


def test_room_for_longer_sequences_than_there_are(device: str) -> None:
    """`max_seqlen_q` and `max_seqlen_k` are bounds: what lies past each sequence is not its own."""
    feature = row_named("everything, packed")
    case = feature.case(torch.float32, device)
    mask = case.kwargs["mask"]
    (packed,) = (part for part in mask.parts if isinstance(part, Packed))
    roomy = Packed(packed.cu_seqlens_q, packed.cu_seqlens_k, 150, 200)
    table = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)).to(device)
    kwargs = {"bias": T5Bias(table, max_distance=50), "sinks": case.kwargs["sinks"]}
    tight, loose = (
        run_backward(feature, replace(case, kwargs={**kwargs, "mask": one & Window(60, 20)}))
        for one in (packed, roomy)
    )
    for part, tensor in tight.items():
        assert torch.equal(tensor, loose[part]), part


@triton.jit
def diagonals(
    tile, upper, lower, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GATHER: tl.constexpr
):
    row, col = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    values = tl.load(tile + row[:, None] * BLOCK_N + col[None, :])
    above, below = sum_diagonals(values, BLOCK_M, BLOCK_N, GATHER)
    tl.store(upper + col, above)
    tl.store(lower + col, below)


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("shape", [(32, 32), (16, 64)], ids=str)
def test_sums_over_diagonals(shape: tuple[int, int], gather: bool, device: str) -> None:
    """The two ways to take them; AMD's backend compiles but the second."""
    # Whole numbers, whose sums are exact in any order.
    tile = torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(0)).float()
    tile = tile.to(device)
    upper, lower = (torch.full((shape[1],), math.nan, device=device) for _ in range(2))
    diagonals[(1,)](tile, upper, lower, *shape, gather)
    wanted = [
        tile.diagonal(c).sum() if c > -shape[0] else tile.new_zeros(())
        for c in range(-shape[1], shape[1])
    ]
    assert torch.equal(torch.cat([lower, upper]), torch.stack(wanted))


# What "auto" runs on a CPU.


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("feature", FEATURES, ids=name_of)
def test_torch_implementations(feature: Feature, dtype: str) -> None:
    """What "auto" runs on a CPU: torch's own attention, or else plain torch.

    The backward pass of torch's own rounds differently from autograd of the definition: a gradient
    may be measured by that or by the gradient of one call of torch's with a dense mask.
    """
    case = feature.case(DTYPES[dtype])
    differentiate = partial(run, output_gradients=feature.output_gradients(case), return_lse=False)
    actual = differentiate(partial(fastattn.attention, impl="auto"), case)
    exact = differentiate(reference.attention, case.double())
    baseline = differentiate(reference.attention, case)
    for name in exact:
        part = compare(actual[name], baseline[name], exact[name])
        if not part.passed and name != "out" and case.call(fastattn.explain).chosen == "sdpa":
            part = compare(actual[name], differentiate(dense_sdpa, case)[name], exact[name])
        assert part.passed, f"{name} {part}"


def dense_sdpa(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **kwargs: Any) -> Tensor:
    """torch's own attention on a dense mask and bias, each packed sequence by itself."""
    problem = make_problem(q, k, v, **kwargs)
    if problem.packed is None:
        return _dense_sdpa(problem)
    slices = enumerate(problem.packed.slices())
    pieces = [_dense_sdpa(problem.sequence(i, *rows_and_keys))[0] for i, rows_and_keys in slices]
    return torch.cat(pieces).reshape(*q.shape[:-1], v.shape[-1])


def _dense_sdpa(problem: AttentionProblem) -> Tensor:
    q, k, v = problem.q, problem.k, problem.v
    group = q.shape[2] // k.shape[2]
    bias = q.new_zeros(1, 1, q.shape[1], k.shape[1])
    if problem.bias is not None:
        bias = problem.bias.dense(q.shape[1], k.shape[1], q.dtype)
    if problem.mask is not None:
        visible = problem.mask.dense(q.shape[1], k.shape[1], q.device)
        bias = bias.masked_fill(~visible, -math.inf)
    return scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2).repeat_interleave(group, 1),
        v.transpose(1, 2).repeat_interleave(group, 1),
        attn_mask=bias,
        scale=problem.softmax_scale,
    ).transpose(1, 2)
