"""The torch path on packed sequences: neighbors of one length are attended in one call."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import ALiBi, Causal, Packed, T5Bias, Window, attention, sdpa
from fastattn.testing import assert_parity

LENGTHS = (4, 4, 4, 7, 0, 0, 7, 1, 1, 4)
RUNS = 6
LENGTHS_K = (5, 5, 3, 7, 2, 2, 7, 1, 0, 4)
RUNS_QK = 8


def packed(lengths_k: tuple[int, ...] = LENGTHS) -> Packed:
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor([0, *itertools.accumulate(one)], dtype=torch.int32)
        for one in (LENGTHS, lengths_k)
    )
    return Packed(cu_seqlens_q, cu_seqlens_k)


def operands(total_k: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(total, 4, 8, generator=generator, requires_grad=True)
        for total in (sum(LENGTHS), total_k, total_k)
    ]


def one_for_each() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(len(LENGTHS), 1, 7, 7, generator=generator) < 0.7


CASES: dict[str, tuple[Callable[[], dict[str, Any]], int]] = {
    "plain": (lambda: {"mask": packed()}, RUNS),
    "other keys": (lambda: {"mask": packed(LENGTHS_K)}, RUNS_QK),
    "causal": (lambda: {"mask": packed() & Causal()}, RUNS),
    "causal, other keys": (lambda: {"mask": packed(LENGTHS_K) & Causal()}, RUNS_QK),
    "window": (lambda: {"mask": packed() & Window(1, 1)}, RUNS),
    "window and causal": (lambda: {"mask": packed() & Window(2, None) & Causal()}, RUNS),
    "alibi": (lambda: {"mask": packed(), "bias": ALiBi(torch.rand(4))}, RUNS),
    "alibi of each": (lambda: {"mask": packed(), "bias": ALiBi(torch.rand(10, 4))}, len(LENGTHS)),
    "t5": (
        lambda: {"mask": packed(), "bias": T5Bias(torch.randn(32, 4), bidirectional=True)}, RUNS
    ),
    "mask of each": (lambda: {"mask": packed() & one_for_each()}, len(LENGTHS)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_neighbors_of_one_length_are_one_call(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, expected_calls = CASES[case]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = make()
    total_k = sum(LENGTHS_K if "other keys" in case else LENGTHS)
    calls = []

    def counted(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(q.shape[0])
        return torch.nn.functional.scaled_dot_product_attention(q, *args, **kwargs)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", counted)
    results = []
    for impl, dtype in (
        ("sdpa", torch.float32), ("reference", torch.float32), ("reference", torch.float64)
    ):  # fmt: skip
        q, k, v = (tensor.detach().to(dtype).requires_grad_() for tensor in operands(total_k))
        out = attention(q, k, v, impl=impl, **options)
        assert isinstance(out, Tensor)
        start = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        out.backward(start.to(dtype))
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for name, three in zip(("out", "dq", "dk", "dv"), zip(*results, strict=True), strict=True):
        assert_parity(*three, name=name)
    assert len(calls) == expected_calls
    assert sum(calls) == len(LENGTHS)
