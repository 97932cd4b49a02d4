"""Bad calls on a cache: the error names the argument, its value and what was expected.

And the cache is as it was.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import (
    ALiBi,
    Lengths,
    Packed,
    Prefix,
    Quantized,
    Rotary,
    T5Bias,
    dispatch,
)
from fastattn.validation import device_checks
from tests.bad_arguments import Case, check, made, ones

BATCH, SEQLEN, CAPACITY, HEADS, HEADS_KV, DIM, DIM_V = 2, 3, 12, 4, 2, 8, 6
BLOCKS, BLOCK_SIZE = 7, 4


def operands(paged: bool = False, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "q": ones(BATCH, SEQLEN, HEADS, DIM),
        "k_cache": ones(BATCH, CAPACITY, HEADS_KV, DIM),
        "v_cache": ones(BATCH, CAPACITY, HEADS_KV, DIM_V),
        "k": 2 * ones(BATCH, SEQLEN, HEADS_KV, DIM),
        "v": 2 * ones(BATCH, SEQLEN, HEADS_KV, DIM_V),
        "cache_seqlens": torch.tensor([0, 9], dtype=torch.int32),
    }
    if paged:
        given["k_cache"] = ones(BLOCKS, BLOCK_SIZE, HEADS_KV, DIM)
        given["v_cache"] = ones(BLOCKS, BLOCK_SIZE, HEADS_KV, DIM_V)
        given["block_table"] = torch.tensor([[3, -1, 99], [0, 6, 2]], dtype=torch.int32)
    return {**given, **changes}


# Of what both functions take.
SHARED: dict[str, Case] = {
    "k without v": ({"v": None}, ValueError, ("k and v must be given both", "k without v")),
    "k of rank 3": (
        {"k": ones(3, 2, 8)},
        ValueError,
        ("k must be (batch, seqlen, num_heads, head_dim)", "(3, 2, 8)"),
    ),
    "k of integers": (
        {"k": ones(2, 3, 2, 8, dtype=torch.int32)},
        TypeError,
        ("k must be float16, bfloat16, float32 or float64", "int32"),
    ),
    "v of another dtype": (
        {"v": ones(2, 3, 2, 6).half()},
        TypeError,
        ("v must have the dtype and device of", "float32", "float16"),
    ),
    "v of another length": (
        {"v": ones(2, 4, 2, 6)},
        ValueError,
        ("v must agree with k ((2, 3, 2, 8)", "(2, 4, 2, 6)"),
    ),
    "k of other heads": (
        {"k": ones(2, 3, 4, 8), "v": ones(2, 3, 4, 6)},
        ValueError,
        ("k must have the heads and head_dim of k_cache, (2, 8)", "(2, 3, 4, 8)"),
    ),
    "v of another head_dim": (
        {"v": ones(2, 3, 2, 8)},
        ValueError,
        ("v must have the heads and head_dim of v_cache, (2, 6)", "(2, 3, 2, 8)"),
    ),
    "k_cache is a list": (
        {"k_cache": [1.0]},
        TypeError,
        ("k_cache must be a torch.Tensor or a Quantized", "[1.0]"),
    ),
    "v_cache of rank 3": (
        {"v_cache": ones(12, 2, 6)},
        ValueError,
        ("v_cache must be (batch, max_seqlen, num_heads_kv, head_dim)", "(12, 2, 6)"),
    ),
    "k_cache of another dtype": (
        {"k_cache": ones(2, 12, 2, 8).half()},
        TypeError,
        ("k_cache must have the dtype and device of", "float32", "Quantized", "float16"),
    ),
    "k_cache elsewhere": (
        {"k_cache": torch.ones(2, 12, 2, 8, device="meta")},
        TypeError,
        ("k_cache must have the dtype and device", "meta"),
    ),
    "v_cache of another length": (
        {"v_cache": ones(2, 13, 2, 6)},
        ValueError,
        ("v_cache must agree with k_cache ((2, 12, 2, 8)", "(2, 13, 2, 6)"),
    ),
    "cache of another batch": (
        {"k_cache": ones(3, 12, 2, 8), "v_cache": ones(3, 12, 2, 6)},
        ValueError,
        ("k_cache must have the batch size of", "2, or come with a block_table", "(3, 12, 2, 8)"),
    ),
    "cache without heads": (
        {
            "k_cache": ones(2, 12, 0, 8),
            "v_cache": ones(2, 12, 0, 6),
            "k": ones(2, 3, 0, 8),
            "v": ones(2, 3, 0, 6),
        },
        ValueError,
        ("num_heads_kv of k_cache must be at least 1", "(2, 12, 0, 8)"),
    ),
    "values too wide": (
        {"v_cache": ones(2, 12, 2, 300), "v": ones(2, 3, 2, 300)},
        ValueError,
        ("head_dim of v must be 1 to 256", "300"),
    ),
    "append to a full cache": (
        {"cache_seqlens": None},
        ValueError,
        ("cache_seqlens must be given where k and v are appended", "None", "12 tokens"),
    ),
    "no room": (
        {"cache_seqlens": torch.tensor([0, 10])},
        ValueError,
        ("cache_seqlens must lie in 0..9 (3 new tokens into room for 12)", "0..10"),
    ),
    "no room for an int": ({"cache_seqlens": 10}, ValueError, ("must lie in 0..9", "10..10")),
    "more new tokens than room": (
        {"k": ones(2, 13, 2, 8), "v": ones(2, 13, 2, 6), "cache_seqlens": 0},
        ValueError,
        ("cache_seqlens must lie in 0..0 (13 new tokens into room for 12)",),
    ),
    "negative length": (
        {"cache_seqlens": torch.tensor([-1, 0])},
        ValueError,
        ("cache_seqlens must lie in 0..9", "-1..0"),
    ),
    "lengths of another batch": (
        {"cache_seqlens": torch.tensor([0, 0, 0])},
        ValueError,
        ("cache_seqlens must have one entry a row, shape (2,)", "(3,)"),
    ),
    "lengths of floats": (
        {"cache_seqlens": torch.tensor([0.0, 1.0])},
        TypeError,
        ("cache_seqlens must be int32 or int64", "float32"),
    ),
    "lengths in two dimensions": (
        {"cache_seqlens": torch.tensor([[0, 1]])},
        ValueError,
        ("cache_seqlens must have one dimension", "(1, 2)"),
    ),
    "lengths as a list": (
        {"cache_seqlens": [0, 1]},
        TypeError,
        ("cache_seqlens must be an int32 or int64 tensor (batch,), an int or None", "[0, 1]"),
    ),
    "lengths are a bool": ({"cache_seqlens": True}, TypeError, ("cache_seqlens", "True")),
    "lengths elsewhere": (
        {"cache_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")},
        ValueError,
        ("cache_seqlens must be on cpu", "meta"),
    ),
    # paged
    "table is a list": (
        {"paged": True, "block_table": [[0]]},
        TypeError,
        ("block_table must be a torch.Tensor", "[[0]]"),
    ),
    "table of floats": (
        {"paged": True, "block_table": ones(2, 3)},
        TypeError,
        ("block_table must be int32 or int64", "float32"),
    ),
    "table of one row": (
        {"paged": True, "block_table": torch.tensor([[0, 1, 2]])},
        ValueError,
        ("block_table must have shape (batch, max_blocks) with batch 2", "(1, 3)"),
    ),
    "table elsewhere": (
        {"paged": True, "block_table": torch.zeros(2, 3, dtype=torch.int32, device="meta")},
        ValueError,
        ("block_table must be on cpu", "meta"),
    ),
    "no such block": (
        {"paged": True, "block_table": torch.tensor([[3, -1, 99], [0, 7, 2]])},
        ValueError,
        ("block_table must hold blocks 0..6 of k_cache", "0..7 in row 1 of 12 tokens"),
    ),
    "negative block": (
        {"paged": True, "block_table": torch.tensor([[-1, 0, 0], [0, 6, 2]])},
        ValueError,
        ("block_table must hold blocks 0..6", "-1..-1 in row 0 of 3 tokens"),
    ),
    "blocks of no tokens": (
        {"paged": True, "k_cache": ones(7, 0, 2, 8), "v_cache": ones(7, 0, 2, 6)},
        ValueError,
        ("block_size of k_cache must be at least 1", "(7, 0, 2, 8)"),
    ),
    "no room in the table": (
        {"paged": True, "cache_seqlens": torch.tensor([0, 10])},
        ValueError,
        ("cache_seqlens must lie in 0..9 (3 new tokens into room for 12)", "0..10"),
    ),
    # rotary
    "rotary is a tuple": (
        {"rotary": (1, 2)},
        TypeError,
        ("rotary must be a fastattn.Rotary or None", "(1, 2)"),
    ),
    "rotary too wide": (
        {"rotary": Rotary.make(10, 12)},
        ValueError,
        ("rotary must turn at most head_dim = 8 dimensions", "5 angles for 10"),
    ),
    "rotary elsewhere": (
        {"rotary": lambda: Rotary.make(8, 12, device="meta")},
        ValueError,
        ("rotary must be on cpu", "meta"),
    ),
    "rotary too short": (
        {"rotary": Rotary.make(8, 11)},
        ValueError,
        ("rotary must have tables for positions 0..11", "got 11 positions"),
    ),
    "rotary positions of another shape": (
        {"rotary": Rotary(ones(20, 4), ones(20, 4), positions=torch.zeros(2, 1).long())},
        ValueError,
        ("rotary positions must have shape (batch, seqlen) = (2, 3)", "(2, 1)"),
    ),
    "rotary position past the tables": (
        {"rotary": Rotary(ones(20, 4), ones(20, 4), positions=torch.full((2, 3), 20))},
        ValueError,
        ("rotary positions must lie in 0..19", "20..20"),
    ),
    "keys that require grad": (
        {"k": ones(2, 3, 2, 8).requires_grad_()},
        RuntimeError,
        ("k requires grad", "torch.no_grad()"),
    ),
    "a cache that requires grad": (
        {"v_cache": ones(2, 12, 2, 6).requires_grad_()},
        RuntimeError,
        ("v_cache requires grad", "(2, 12, 2, 6)"),
    ),
    "tables that require grad": (
        {"rotary": lambda: Rotary(ones(20, 4).requires_grad_(), ones(20, 4))},
        RuntimeError,
        ("rotary cos requires grad",),
    ),
    "impl unknown": ({"impl": "flash"}, ValueError, ("impl must be one of", "'flash'")),
}

# Of attention alone.
ATTENTION: dict[str, Case] = {
    "q is None": ({"q": None}, TypeError, ("q must be a torch.Tensor", "None")),
    "q of rank 3": (
        {"q": ones(3, 4, 8)},
        ValueError,
        ("q must be (batch, seqlen, num_heads, head_dim)", "(3, 4, 8)"),
    ),
    "v without k": ({"k": None}, ValueError, ("k and v must be given both", "v without k")),
    "q of another batch": (
        {"q": ones(3, 3, 4, 8)},
        ValueError,
        ("k_cache must have the batch size of q, 3", "(2, 12, 2, 8)"),
    ),
    "k of another batch": (
        {"k": ones(1, 3, 2, 8), "v": ones(1, 3, 2, 6)},
        ValueError,
        ("k must have the batch size of q, 2", "(1, 3, 2, 8)"),
    ),
    "q of another head_dim": (
        {"q": ones(2, 3, 4, 16)},
        ValueError,
        ("k_cache must have the head_dim of q, 16", "(2, 12, 2, 8)"),
    ),
    "heads that do not divide": (
        {"q": ones(2, 3, 5, 8)},
        ValueError,
        ("num_heads of q must be a multiple of num_heads_kv of k_cache", "5 and 2"),
    ),
    "length past the cache": (
        {"k": None, "v": None, "cache_seqlens": torch.tensor([0, 13])},
        ValueError,
        ("cache_seqlens must lie in 0..12,", "0..13"),
    ),
    "positions for other queries": (
        {
            "q": ones(2, 1, 4, 8),
            "rotary": Rotary(ones(20, 4), ones(20, 4), positions=torch.zeros(2, 3).long()),
        },
        ValueError,
        ("rotary with positions must have as many new keys as queries", "seqlen_q 1", "3"),
    ),
    "packed": (
        {"mask": lambda: Packed(torch.tensor([0, 3, 6]))},
        ValueError,
        ("mask must not be or contain Packed", "cache_seqlens"),
    ),
    "packed and lengths": (
        {"mask": lambda: Packed(torch.tensor([0, 6])) & Lengths(torch.tensor([3]))},
        ValueError,
        ("mask must not be or contain Packed",),
    ),
    "prefix and causal": (
        {"mask": lambda: Prefix(torch.tensor([1, 2])), "causal": True},
        ValueError,
        ("mask: Prefix joined with a causal mask",),
    ),
    "mask is a list": ({"mask": [True]}, TypeError, ("mask must be a bool tensor or", "[True]")),
    "mask of the live length": (
        {"mask": ones(3, 11, dtype=torch.bool)},
        ValueError,
        ("mask must broadcast to", "(2, 4, 3, 12)", "(3, 11)"),
    ),
    "lengths past the cache": (
        {"mask": lambda: Lengths(torch.tensor([12, 13]))},
        ValueError,
        ("Lengths seqlens_k must lie in 0..12", "12..13"),
    ),
    "bias of bools": (
        {"bias": ones(3, 12, dtype=torch.bool)},
        TypeError,
        ("bias must be floating point", "bool"),
    ),
    "bias too large": (
        {"bias": ones(4, 3, 13)},
        ValueError,
        ("bias must broadcast to", "(2, 4, 3, 12)", "(4, 3, 13)"),
    ),
    "slopes of other heads": (
        {"bias": lambda: ALiBi(ones(2))},
        ValueError,
        ("ALiBi slopes must have shape (4,)", "(2,)"),
    ),
    "sinks of another size": (
        {"sinks": ones(2)},
        ValueError,
        ("sinks must be one logit a head", "(4,)", "(2,)"),
    ),
    "sinks elsewhere": (
        {"sinks": torch.ones(4, device="meta")},
        ValueError,
        ("sinks must be on cpu", "meta"),
    ),
    "caches that repeat memory": (
        {"k_cache": torch.zeros(1, 12, 2, 8).expand(2, -1, -1, -1)},
        ValueError,
        ("k_cache must have memory of its own", "(0, 16, 8, 1)", "expanded"),
    ),
    "NaN scale": ({"softmax_scale": math.nan}, ValueError, ("softmax_scale must be", "nan")),
    "negative softcap": ({"softcap": -1.0}, ValueError, ("softcap must be 0 (off) or", "-1.0")),
    "causal is a number": ({"causal": 1}, TypeError, ("causal must be True or False", "1")),
    "return_lse is a number": ({"return_lse": 0}, TypeError, ("return_lse must be", "0")),
    "batch_invariant is None": (
        {"batch_invariant": None},
        TypeError,
        ("batch_invariant must be True or False", "None"),
    ),
    "q that requires grad": (
        {"q": ones(2, 3, 4, 8).requires_grad_()},
        RuntimeError,
        ("q requires grad", "run within torch.no_grad()"),
    ),
    "a bias that requires grad": (
        {"bias": lambda: T5Bias(ones(32, 4).requires_grad_())},
        RuntimeError,
        ("bias requires grad",),
    ),
    "sinks that require grad": (
        {"sinks": ones(4).requires_grad_()},
        RuntimeError,
        ("sinks requires grad",),
    ),
    "sdpa asked for what it has not": (
        {"impl": "sdpa", "softcap": 1.0, "return_lse": True},
        NotImplementedError,
        ("impl='sdpa' cannot serve this call", "softcap", "log-sum-exp"),
    ),
}


def call_badly(function: Callable[..., Any], case: Case) -> None:
    changes, error, words = case
    given = operands(**changes)
    caches = [given[name] for name in ("k_cache", "v_cache") if isinstance(given[name], Tensor)]
    before = [cache if cache.is_meta else cache.detach().clone() for cache in caches]

    # Masks, biases and tables check some of it when they are made.
    check(lambda: function(**made(given)), error, words)
    for cache, old in zip(caches, before, strict=True):
        assert cache.is_meta or torch.equal(cache, old)


@pytest.mark.parametrize("name", [*SHARED, *ATTENTION])
def test_bad_argument_of_attention(name: str) -> None:
    call_badly(fastattn.attention_with_kv_cache, {**SHARED, **ATTENTION}[name])


@pytest.mark.parametrize("name", [*SHARED, *ATTENTION])
def test_bad_argument_of_explain(name: str) -> None:
    case = {**SHARED, **ATTENTION}[name]
    if case[1] is NotImplementedError:
        explained = fastattn.explain_with_kv_cache(**operands(**case[0]))
        assert explained.chosen == "nothing: raises NotImplementedError"
    else:
        call_badly(fastattn.explain_with_kv_cache, case)


def test_explain_takes_the_arguments_of_attention() -> None:
    attention, explain = fastattn.attention_with_kv_cache, fastattn.explain_with_kv_cache
    parameters = inspect.signature(attention).parameters
    assert inspect.signature(explain).parameters == parameters
    given = operands()
    seqlens = given.pop("cache_seqlens")
    explained = explain(*given.values(), cache_seqlens=seqlens, causal=True, impl="sdpa")
    assert explained.chosen == "sdpa"
    call = "explain_with_kv_cache() "
    for args, options, words in (
        (given.values(), {"casual": True}, ("unexpected keyword argument 'casual'",)),
        (list(given.values())[:2], {}, ("missing a required argument: 'v_cache'",)),
        ((*given.values(), seqlens), {}, ("too many positional arguments",)),
        (given.values(), {"k": None}, ("multiple values for argument 'k'",)),
    ):
        check(partial(explain, *args, **options), TypeError, (call, *words))


@pytest.mark.parametrize("name", SHARED)
def test_bad_argument_of_append(name: str) -> None:
    def append(q: Tensor, **given: Any) -> None:
        fastattn.append_to_kv_cache(**given)

    # There is no q whose tensor would be at fault first.
    changes, error, words = SHARED[name]
    if name == "k without v":
        words = ("v must be a torch.Tensor",)
        error = TypeError
    call_badly(append, (changes, error, words))


def test_good_arguments_are_good() -> None:
    """What the cases above change is otherwise without fault."""
    for is_paged in (False, True):
        for impl in ("reference", "sdpa"):
            given = operands(paged=is_paged)
            out = fastattn.attention_with_kv_cache(**given, causal=True, impl=impl)
            assert out.shape == (BATCH, SEQLEN, HEADS, DIM_V)  # type: ignore[union-attr]
            assert int((given["k_cache"] == 2).sum()) == given["k"].numel()


def test_nothing_requires_grad_where_grad_mode_is_off() -> None:
    given = operands(q=ones(BATCH, SEQLEN, HEADS, DIM).requires_grad_())
    with torch.no_grad():
        out = fastattn.attention_with_kv_cache(**given, causal=True)
    assert not out.requires_grad  # type: ignore[union-attr]


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_an_implementation_that_fails_to_be_chosen_writes_nothing(impl: str) -> None:
    given = operands(k_cache=Quantized.zeros((2, 12, 2, 8), "int8"))
    before = given["v_cache"].clone()
    with pytest.raises(NotImplementedError, match="does not return the log-sum-exp"):
        fastattn.attention_with_kv_cache(**given, return_lse=True, impl="sdpa")
    assert given["k_cache"].values.count_nonzero() == 0
    assert torch.equal(given["v_cache"], before)
    fastattn.attention_with_kv_cache(**given, return_lse=True, impl=impl)
    assert given["k_cache"].values.count_nonzero() == given["k"].numel()


def test_triton_on_a_cpu_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    double = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in operands().items()
    }
    monkeypatch.setattr(dispatch, "_environment_reasons", lambda *device: ("no such machine",))
    with pytest.raises(NotImplementedError) as raised:
        fastattn.attention_with_kv_cache(**double, impl="triton")
    assert "no such machine" in str(raised.value)
    assert "float64 is not in the kernel" in str(raised.value)
    del double["q"]
    with pytest.raises(NotImplementedError, match="float64 is not in the kernel"):
        fastattn.append_to_kv_cache(**double, impl="triton")
    out, lse = ones(1, 2, 3, 4).double(), ones(1, 3, 2).double()
    with pytest.raises(NotImplementedError, match="float64 is not in the kernel"):
        fastattn.merge_attention_states(out, lse, out, lse, impl="triton")


@pytest.mark.cuda
def test_values_on_a_gpu_are_checked_in_debug_mode_only() -> None:
    given = {
        name: value.cuda() if isinstance(value, Tensor) else value
        for name, value in operands(cache_seqlens=torch.tensor([0, 10])).items()
    }
    with device_checks(), pytest.raises(ValueError, match=r"must lie in 0\.\.9 .*got 0\.\.10"):
        fastattn.explain_with_kv_cache(**given)
    fastattn.explain_with_kv_cache(**given)


# Merging.

MERGE: dict[str, Case] = {
    "out_a is a list": ({"out_a": [1.0]}, TypeError, ("out_a must be a torch.Tensor", "[1.0]")),
    "out_a of rank 2": (
        {"out_a": ones(4, 6)},
        ValueError,
        ("out_a must be (batch, seqlen, num_heads, head_dim), packed", "(4, 6)"),
    ),
    "out_a of integers": (
        {"out_a": ones(2, 3, 4, 6).long()},
        TypeError,
        ("out_a must be float16, bfloat16, float32 or float64", "int64"),
    ),
    "out_b of another shape": (
        {"out_b": ones(2, 3, 4, 8)},
        ValueError,
        ("out_b must have the shape, dtype and device of out_a", "(2, 3, 4, 6)", "(2, 3, 4, 8)"),
    ),
    "out_b of another dtype": ({"out_b": ones(2, 3, 4, 6).half()}, ValueError, ("float16",)),
    "lse_a in the layout of out": (
        {"lse_a": ones(2, 3, 4)},
        ValueError,
        ("lse_a must be float32 of shape (2, 4, 3)", "(2, 3, 4)"),
    ),
    "lse_b of another dtype": (
        {"lse_b": ones(2, 4, 3).half()},
        ValueError,
        ("lse_b must be float32 of shape (2, 4, 3)", "float16"),
    ),
    "lse_b is None": ({"lse_b": None}, TypeError, ("lse_b must be a torch.Tensor", "None")),
    "impl without it": (
        {"impl": "sdpa"},
        ValueError,
        ("impl must be one of ['auto', 'triton', 'reference']", "'sdpa'"),
    ),
}


@pytest.mark.parametrize("name", MERGE)
def test_bad_argument_of_merging(name: str) -> None:
    changes, error, words = MERGE[name]
    out, lse = ones(2, 3, 4, 6), ones(2, 4, 3)
    given = {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse, **changes}
    check(lambda: fastattn.merge_attention_states(**given), error, words)
