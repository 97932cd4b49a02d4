"""Bad input: each error has the right type, names the argument, its value and what was expected."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import ALiBi, Causal, Lengths, Packed, Prefix, T5Bias, Window, alibi_slopes, torch_ops
from fastattn.testing import WorkMeter
from fastattn.validation import device_checks
from tests.bad_arguments import Case, check, made, ones

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, HEADS_KV, DIM = 2, 5, 7, 4, 2, 8


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever gets as far as a kernel fails the test."""

    def launched() -> NoReturn:
        raise AssertionError("a kernel was about to be launched")

    monkeypatch.setattr(torch_ops, "kernels", launched)


def operands(device: str, **changes: Any) -> dict[str, Any]:
    shapes = {
        "q": (BATCH, SEQLEN_Q, HEADS, DIM),
        "k": (BATCH, SEQLEN_K, HEADS_KV, DIM),
        "v": (BATCH, SEQLEN_K, HEADS_KV, DIM),
    }
    given: dict[str, Any] = {name: torch.ones(shape) for name, shape in shapes.items()}
    given.update(changes)
    return {
        name: value.to(device) if isinstance(value, Tensor) and not value.is_meta else value
        for name, value in given.items()
    }


def packed_operands(device: str, total: int = 9) -> dict[str, Tensor]:
    return {name: torch.ones(total, HEADS, DIM, device=device) for name in "qkv"}


CASES: dict[str, Case] = {
    "q of rank 3": (
        {"q": ones(5, 4, 8)},
        ValueError,
        ("q must be (batch, seqlen, num_heads, head_dim)", "(5, 4, 8)"),
    ),
    "k of rank 5": ({"k": ones(1, 2, 7, 2, 8)}, ValueError, ("k must be", "(1, 2, 7, 2, 8)")),
    "q is a list": ({"q": [1.0]}, TypeError, ("q must be a torch.Tensor", "[1.0]")),
    "q of integers": (
        {"q": ones(2, 5, 4, 8, dtype=torch.int32)},
        TypeError,
        ("q must be float16, bfloat16, float32 or float64", "int32"),
    ),
    "k of another dtype": (
        {"k": ones(2, 7, 2, 8, dtype=torch.float16)},
        TypeError,
        ("k must have the dtype and device of q", "float32", "float16"),
    ),
    "v on another device": (
        {"v": torch.ones(2, 7, 2, 8, device="meta")},
        TypeError,
        ("v must have the dtype and device of q", "meta"),
    ),
    "another batch": (
        {"k": ones(3, 7, 2, 8), "v": ones(3, 7, 2, 8)},
        ValueError,
        ("k must have the batch size of q, 2", "(3, 7, 2, 8)"),
    ),
    "v of another length": (
        {"v": ones(2, 6, 2, 8)},
        ValueError,
        ("v must agree with k", "(2, 7, 2, 8)", "(2, 6, 2, 8)"),
    ),
    "v of other heads": (
        {"v": ones(2, 7, 4, 8)},
        ValueError,
        ("v must agree with k", "(2, 7, 4, 8)"),
    ),
    "k of another head_dim": (
        {"k": ones(2, 7, 2, 16)},
        ValueError,
        ("k must have the head_dim of q, 8", "(2, 7, 2, 16)"),
    ),
    "head_dim over 256": (
        {"q": ones(2, 5, 4, 257), "k": ones(2, 7, 2, 257)},
        ValueError,
        ("head_dim of q must be 1 to 256", "(2, 5, 4, 257)"),
    ),
    "head_dim of v over 256": (
        {"v": ones(2, 7, 2, 300)},
        ValueError,
        ("head_dim of v must be 1 to 256", "(2, 7, 2, 300)"),
    ),
    "head_dim 0": (
        {"q": ones(2, 5, 4, 0), "k": ones(2, 7, 2, 0)},
        ValueError,
        ("head_dim of q must be 1 to 256",),
    ),
    "heads that do not divide": (
        {"k": ones(2, 7, 3, 8), "v": ones(2, 7, 3, 8)},
        ValueError,
        ("num_heads of q must be a multiple of num_heads of k", "4 and 3"),
    ),
    "no heads of k": (
        {"k": ones(2, 7, 0, 8), "v": ones(2, 7, 0, 8)},
        ValueError,
        ("must be a multiple", "4 and 0"),
    ),
    # numbers and flags
    "NaN scale": (
        {"softmax_scale": math.nan},
        ValueError,
        ("softmax_scale must be a finite number", "nan"),
    ),
    "infinite scale": ({"softmax_scale": math.inf}, ValueError, ("softmax_scale", "inf")),
    "scale is text": ({"softmax_scale": "1"}, TypeError, ("softmax_scale must be", "'1'")),
    "negative softcap": ({"softcap": -1.0}, ValueError, ("softcap must be 0 (off) or", "-1.0")),
    "NaN softcap": ({"softcap": math.nan}, ValueError, ("softcap", "nan")),
    "dropout of 1": ({"dropout_p": 1.0}, ValueError, ("dropout_p must be a probability", "1.0")),
    "negative dropout": ({"dropout_p": -0.5}, ValueError, ("dropout_p", "[0, 1)", "-0.5")),
    "causal is a number": ({"causal": 1}, TypeError, ("causal must be True or False", "1")),
    "return_lse is a number": ({"return_lse": 0}, TypeError, ("return_lse must be True or False",)),
    "sinks of another size": (
        {"sinks": ones(3)},
        ValueError,
        ("sinks must be one logit a head", "(4,)", "(3,)"),
    ),
    "sinks of integers": (
        {"sinks": ones(4, dtype=torch.int64)},
        ValueError,
        ("sinks must be", "int64"),
    ),
    "sinks elsewhere": (
        {"sinks": torch.ones(4, device="meta")},
        ValueError,
        ("sinks must be on", "meta"),
    ),
    "impl unknown": ({"impl": "cudnn"}, ValueError, ("impl must be one of", "'auto'", "'cudnn'")),
    # masks
    "mask of numbers": ({"mask": ones(5, 7)}, TypeError, ("mask must be bool", "float32", "bias=")),
    "mask is a list": ({"mask": [True]}, TypeError, ("mask must be a bool tensor or", "[True]")),
    "mask too large": (
        {"mask": ones(2, 1, 5, 8, dtype=torch.bool)},
        ValueError,
        ("mask must broadcast to", "(2, 4, 5, 7)", "(2, 1, 5, 8)"),
    ),
    "mask of kv heads": (
        {"mask": ones(2, 5, 7, dtype=torch.bool)},
        ValueError,
        ("mask must broadcast", "(2, 5, 7)"),
    ),
    "mask of rank 5": (
        {"mask": ones(1, 1, 1, 5, 7, dtype=torch.bool)},
        ValueError,
        ("mask must broadcast to",),
    ),
    "mask elsewhere": (
        {"mask": torch.ones(5, 7, dtype=torch.bool, device="meta")},
        ValueError,
        ("mask must be on",),
    ),
    "prefix and causal": (
        {"mask": lambda: Prefix(torch.tensor([1, 2])), "causal": True},
        ValueError,
        ("mask: Prefix joined with a causal mask", "leave out causal=True"),
    ),
    "prefix too long": (
        {"mask": lambda: Prefix(torch.tensor([1, 8]))},
        ValueError,
        ("Prefix lengths must lie in 0..7", "1..8"),
    ),
    "negative window": (
        {"mask": lambda: Window(-1, 0)},
        ValueError,
        ("Window left must be >= 0", "-1"),
    ),
    "negative right window": (
        {"mask": lambda: Window(None, -2)},
        ValueError,
        ("Window right must be >= 0", "-2"),
    ),
    "window of a float": ({"mask": lambda: Window(1.5, 0)}, TypeError, ("Window left", "1.5")),
    "lengths too long": (
        {"mask": lambda: Lengths(torch.tensor([3, 8]))},
        ValueError,
        ("Lengths seqlens_k must lie in 0..7", "3..8"),
    ),
    "negative lengths": (
        {"mask": lambda: Lengths(torch.tensor([-1, 2]))},
        ValueError,
        ("seqlens_k must lie in", "-1..2"),
    ),
    "lengths of another batch": (
        {"mask": lambda: Lengths(torch.tensor([3, 3, 3]))},
        ValueError,
        ("Lengths seqlens_k must have one entry a sequence, shape (2,)", "(3,)"),
    ),
    "lengths of floats": (
        {"mask": lambda: Lengths(torch.tensor([3.0, 3.0]))},
        TypeError,
        ("Lengths seqlens_k must be int32 or int64", "float32"),
    ),
    "lengths as a list": (
        {"mask": lambda: Lengths([3, 3])},
        TypeError,
        ("Lengths seqlens_k must be a torch.Tensor", "[3, 3]"),
    ),
    "lengths elsewhere": (
        {"mask": lambda: Lengths(torch.tensor([3, 3]).to("meta"))},
        ValueError,
        ("seqlens_k must be on",),
    ),
    "starts too large": (
        {"mask": lambda: Lengths(torch.tensor([3, 3]), starts_k=torch.tensor([0, 9]))},
        ValueError,
        ("Lengths starts_k must lie in 0..7", "0..9"),
    ),
    "more rows than q has": (
        {"mask": lambda: Lengths(torch.tensor([3, 3]), seqlens_q=torch.tensor([6, 0]))},
        ValueError,
        ("Lengths seqlens_q must lie in 0..5", "0..6"),
    ),
    # biases
    "bias of bools": (
        {"bias": ones(5, 7, dtype=torch.bool)},
        TypeError,
        ("bias must be floating point", "bool", "mask="),
    ),
    "bias is a number": ({"bias": 1.0}, TypeError, ("bias must be a floating tensor", "1.0")),
    "bias too large": (
        {"bias": ones(3, 1, 5, 7)},
        ValueError,
        ("bias must broadcast to", "(2, 4, 5, 7)", "(3, 1, 5, 7)"),
    ),
    "bias elsewhere": (
        {"bias": torch.ones(5, 7, device="meta")},
        ValueError,
        ("bias must be on", "meta"),
    ),
    "slopes of other heads": (
        {"bias": lambda: ALiBi(alibi_slopes(3))},
        ValueError,
        ("ALiBi slopes must have shape (4,)", "(3,)"),
    ),
    "slopes of another batch": (
        {"bias": lambda: ALiBi(ones(3, 4))},
        ValueError,
        ("ALiBi slopes must have shape", "(3, 4)"),
    ),
    "slopes of integers": (
        {"bias": lambda: ALiBi(ones(4, dtype=torch.int64))},
        ValueError,
        ("ALiBi slopes must be floating point", "int64"),
    ),
    "table of other heads": (
        {"bias": lambda: T5Bias(ones(32, 3))},
        ValueError,
        ("T5Bias table must have shape", "(32, 3)"),
    ),
    "table without heads": (
        {"bias": lambda: T5Bias(ones(32))},
        ValueError,
        ("T5Bias table must be", "(32,)"),
    ),
    "table of two buckets": (
        {"bias": lambda: T5Bias(ones(2, 4))},
        ValueError,
        ("T5Bias table must have at least 4", "2"),
    ),
    "max_distance too small": (
        {"bias": lambda: T5Bias(ones(32, 4), max_distance=8)},
        ValueError,
        ("T5Bias max_distance must exceed the 8 distances", "8"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_argument(name: str, no_launch: None) -> None:
    changes, error, words = CASES[name]

    def call() -> Any:
        # Masks and biases check some of it when they are made.
        return fastattn.attention(**{"impl": "triton", **operands("cpu", **made(changes))})

    check(call, error, words)


@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
def test_arguments_are_checked_whatever_runs(impl: str) -> None:
    with pytest.raises(ValueError, match="k must have the head_dim of q, 8"):
        fastattn.attention(**operands("cpu", k=ones(2, 7, 2, 16)), impl=impl)
    with pytest.raises(ValueError, match="k must have the head_dim of q, 8"):
        fastattn.explain(**operands("cpu", k=ones(2, 7, 2, 16)), impl=impl)


# Packed sequences.

PACKED = {
    "not from 0": (lambda cu: Packed(cu([1, 4, 9])), ("cu_seqlens_q must start at 0", "got 1")),
    "decreasing": (
        lambda cu: Packed(cu([0, 5, 4, 9])),
        ("cu_seqlens_q must not decrease", "5 then 4 at index 2"),
    ),
    "past the end": (
        lambda cu: Packed(cu([0, 4, 10])),
        ("cu_seqlens_q must end at the number of packed rows, 9", "got 10"),
    ),
    "short of the end": (lambda cu: Packed(cu([0, 4, 8])), ("must end at the number", "got 8")),
    "keys past the end": (
        lambda cu: Packed(cu([0, 4, 9]), cu([0, 4, 12])),
        ("cu_seqlens_k must end at the number of packed rows, 9", "got 12"),
    ),
    "other number of sequences": (
        lambda cu: Packed(cu([0, 4, 9]), cu([0, 9])),
        ("cu_seqlens_q and cu_seqlens_k must have the same number of entries", "(3,)", "(2,)"),
    ),
    "max_seqlen too short": (
        lambda cu: Packed(cu([0, 2, 9]), max_seqlen_q=6),
        ("max_seqlen of cu_seqlens_q must be at least its longest sequence, 7", "got 6"),
    ),
    "negative max_seqlen": (
        lambda cu: Packed(cu([0, 2, 9]), max_seqlen_q=-1),
        ("max_seqlen_q must be an int >= 0", "-1"),
    ),
    "two dimensions": (
        lambda cu: Packed(cu([[0, 9]])),
        ("cu_seqlens_q must have one dimension", "(1, 2)"),
    ),
    "no entries": (
        lambda cu: Packed(cu([])),
        ("cu_seqlens_q must hold at least the leading 0", "(0,)"),
    ),
    "packed twice": (
        lambda cu: Packed(cu([0, 9])) & Packed(cu([0, 9])),
        ("mask: two Packed masks cannot be joined",),
    ),
    "mask beyond the longest": (
        lambda cu: Packed(cu([0, 2, 9])) & torch.ones(9, 9, dtype=torch.bool),
        ("mask must broadcast to", "(2, 4, 7, 7)", "(9, 9)"),
    ),
    "lengths beyond the longest": (
        lambda cu: Packed(cu([0, 2, 9])) & Lengths(cu([2, 8])),
        ("Lengths seqlens_k must lie in 0..7", "2..8"),
    ),
}


@pytest.mark.parametrize("name", PACKED)
def test_bad_packed_sequences(name: str, device: str, no_launch: None) -> None:
    make, words = PACKED[name]

    def call() -> Any:
        mask = make(lambda entries: torch.tensor(entries, dtype=torch.int32, device=device))
        with device_checks():
            return fastattn.attention(**packed_operands(device), mask=mask, impl="triton")

    check(call, ValueError, words)


def test_cu_seqlens_of_floats(device: str, no_launch: None) -> None:
    mask = Packed(torch.tensor([0.0, 9.0], device=device))
    check(
        lambda: fastattn.attention(**packed_operands(device), mask=mask, impl="triton"),
        TypeError,
        ("cu_seqlens_q must be int32 or int64", "float32"),
    )


def test_cu_seqlens_as_a_list() -> None:
    check(lambda: Packed([0, 9]), TypeError, ("cu_seqlens_q must be a torch.Tensor", "[0, 9]"))  # type: ignore[arg-type]


def test_packed_operands_of_mixed_rank(device: str, no_launch: None) -> None:
    given = packed_operands(device)
    mask = Packed(torch.tensor([0, 9], device=device))
    check(
        lambda: fastattn.attention(given["q"], given["k"][None], given["v"], mask=mask),
        ValueError,
        ("k must have as many dimensions as q", "(1, 9, 4, 8)"),
    )
    pair = torch.ones(2, 9, HEADS, DIM, device=device)
    check(
        lambda: fastattn.attention(pair, pair, pair, mask=mask),
        ValueError,
        ("q of packed sequences must be (total, num_heads, head_dim)", "(2, 9, 4, 8)"),
    )


@pytest.mark.cuda
def test_values_on_a_gpu_are_checked_in_debug_mode_only() -> None:
    mask = Lengths(torch.tensor([3, 8], device="cuda"))
    with device_checks(), pytest.raises(ValueError, match=r"must lie in 0\.\.7, got 3\.\.8"):
        fastattn.explain(**operands("cuda"), mask=mask)
    fastattn.explain(**operands("cuda"), mask=mask)


# Attention weights.

WEIGHTS: dict[str, Case] = {
    "head out of range": ({"heads": [0, 4]}, ValueError, ("heads must lie in 0..3", "0..4")),
    "negative row": ({"rows": [-1]}, ValueError, ("rows must lie in 0..4", "-1..-1")),
    "rows of floats": (
        {"rows": torch.tensor([0.5])},
        TypeError,
        ("rows must be int32 or int64", "float32"),
    ),
    "rows in two dimensions": (
        {"rows": torch.tensor([[1]])},
        ValueError,
        ("rows must have one dimension", "(1, 1)"),
    ),
    "lse of another shape": (
        {"lse": ones(2, 5, 4)},
        ValueError,
        ("lse must be", "(2, 4, 5)", "(2, 5, 4)"),
    ),
    "lse of another dtype": (
        {"lse": ones(2, 4, 5, dtype=torch.float16)},
        ValueError,
        ("lse must be torch.float32", "float16"),
    ),
    "lse is a number": ({"lse": 1.0}, TypeError, ("lse must be a torch.Tensor", "1.0")),
    "impl without weights": ({"impl": "sdpa"}, ValueError, ("impl must be", "'sdpa'")),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_bad_argument_of_weights(name: str, no_launch: None) -> None:
    changes, error, words = WEIGHTS[name]
    given = operands("cpu", **changes)
    del given["v"]
    check(lambda: fastattn.attention_weights(**{"impl": "triton", **given}), error, words)


# What is empty, but not bad.


@pytest.mark.parametrize("impl", ["triton", "sdpa", "reference"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["batch", "seqlen_q"])
def test_empty_gives_empty(shape: tuple[int, int], impl: str, device: str) -> None:
    batch, seqlen_q = shape
    q = torch.ones(batch, seqlen_q, HEADS, DIM, device=device, dtype=torch.bfloat16)
    k = torch.ones(batch, SEQLEN_K, HEADS_KV, DIM, device=device, dtype=torch.bfloat16)
    v = torch.ones(batch, SEQLEN_K, HEADS_KV, 3, device=device, dtype=torch.bfloat16)
    out = fastattn.attention(q, k, v, impl=impl, causal=True)
    assert out.shape == (batch, seqlen_q, HEADS, 3)
    assert out.dtype == torch.bfloat16
    if impl != "sdpa":
        out, lse = fastattn.attention(q, k, v, impl=impl, return_lse=True)
        assert out.shape == (batch, seqlen_q, HEADS, 3)
        assert lse.shape == (batch, HEADS, seqlen_q)
        assert lse.dtype == torch.float32


@pytest.mark.parametrize("impl", ["triton", "sdpa", "reference"])
def test_no_packed_sequences_give_empty(impl: str, device: str) -> None:
    given = packed_operands(device, total=0)
    mask = Packed(torch.tensor([0], device=device))
    assert fastattn.attention(**given, mask=mask, impl=impl).shape == (0, HEADS, DIM)
    if impl != "sdpa":
        out, lse = fastattn.attention(**given, mask=mask, impl=impl, return_lse=True)
        assert out.shape == (0, HEADS, DIM)
        assert lse.shape == (HEADS, 0)


@pytest.mark.interpreter
def test_empty_launches_nothing() -> None:
    q = torch.ones(0, SEQLEN_Q, HEADS, DIM)
    k = torch.ones(0, SEQLEN_K, HEADS_KV, DIM)
    with WorkMeter() as work:
        fastattn.attention(q, k, k, impl="triton")
        fastattn.attention(q, k, k, impl="triton", return_lse=True)
        assert fastattn.attention_weights(q, k, impl="triton").shape == (
            0,
            HEADS,
            SEQLEN_Q,
            SEQLEN_K,
        )
    assert work.launches == 0


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_no_chosen_rows_give_empty_weights(impl: str, device: str) -> None:
    given = operands(device)
    weights = fastattn.attention_weights(given["q"], given["k"], rows=[], impl=impl)
    assert weights.shape == (BATCH, HEADS, 0, SEQLEN_K)


# An implementation asked for by name runs, or raises with every reason.


def test_a_named_implementation_raises_all_of_its_reasons() -> None:
    given = operands("cpu")
    slopes = ones(4).requires_grad_()
    double = {name: tensor.double() for name, tensor in given.items()}
    with pytest.raises(NotImplementedError) as raised:
        fastattn.attention(**double, bias=ALiBi(slopes), impl="triton")
    assert "impl='triton' cannot serve this call" in str(raised.value)
    assert "require grad" in str(raised.value)
    assert "float64" in str(raised.value)
    with pytest.raises(NotImplementedError) as raised:
        fastattn.attention(**given, softcap=1.0, sinks=ones(4), return_lse=True, impl="sdpa")
    assert str(raised.value).count("\n  - ") == 3


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
def test_a_tensor_that_requires_grad_gets_one(impl: str) -> None:
    table = torch.zeros(32, HEADS, requires_grad=True)
    out = fastattn.attention(**operands("cpu"), bias=T5Bias(table), impl=impl)
    assert isinstance(out, torch.Tensor)
    out.square().sum().backward()
    assert table.grad is not None


def test_explain_says_what_runs_and_why_not_the_others() -> None:
    explained = fastattn.explain(**operands("cpu"), mask=Causal() & Window(2, None), softcap=1.0)
    assert explained.chosen == "reference"
    text = str(explained)
    assert "impl='auto' -> reference" in text
    assert "sdpa: no, softcap is not in torch's scaled_dot_product_attention" in text
    assert "q (2, 5, 4, 8)" in text
    assert "mask Causal & Window" in text
    assert "softcap 1.0" in text


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_torch_attention_is_not_asked_for_a_scale_that_it_gets_wrong(scale: float) -> None:
    given = operands("cpu")
    explained = fastattn.explain(**given, softmax_scale=scale, causal=True)
    assert any(f"softmax_scale is not positive ({scale})" in r for r in explained.reasons["sdpa"])
    assert fastattn.attention(**given, softmax_scale=scale, causal=True).isfinite().all()
