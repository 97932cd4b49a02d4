"""Random combinations of shapes, strides, masks, biases and dropout, forward and backward.

Each element is held to plain torch's largest error and to the rounding of its own sum: a few units
in the last place of the magnitudes that it is added up from. Tiny problems need the latter, since
torch's error on a handful of numbers can be 0 by chance. What hypothesis shrinks a failure to
becomes a row of `fastattn.testing.features`.
"""

from __future__ import annotations

import functools
import operator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from fastattn import ALiBi, Causal, Lengths, Packed, Prefix, T5Bias, Window, reference
from fastattn.biases import as_bias
from fastattn.dropout import Dropout
from fastattn.masks import as_mask
from fastattn.testing import make_qkv
from fastattn.testing.features import LAYOUTS, Case, Draw
from fastattn.testing.gradients import run

pytestmark = pytest.mark.interpreter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNITS = 8  # a sum, a product, two exponentials and three casts, half a unit each, twice over


@st.composite
def cases(draw: Any) -> Case:
    """A call of `attention` with any features that go together."""
    dtype = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    batch, heads_kv, group = (draw(st.integers(1, 2)) for _ in range(3))
    heads = heads_kv * group
    seqlen_q, seqlen_k = draw(st.integers(1, 140)), draw(st.integers(1, 140))
    dims = st.sampled_from([1, 8, 16, 20, 40])
    head_dim, head_dim_v = draw(dims), draw(dims)
    numbers = Draw(dtype, "cpu")
    q, k, v = make_qkv(
        batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v,
        dtype=dtype, seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    layouts = st.sampled_from(sorted(LAYOUTS))
    q, k, v = (LAYOUTS[draw(layouts)](tensor) for tensor in (q, k, v))

    def lengths(highest: int) -> Tensor:
        return numbers.ints(*(draw(st.integers(0, highest)) for _ in range(batch)))

    def shape() -> tuple[int, ...]:
        full = (batch, heads, seqlen_q, seqlen_k)
        return tuple(draw(st.sampled_from([1, size])) for size in full)

    parts: list[Any] = []
    order = draw(st.sampled_from(["any", "causal", "prefix"]))
    if order != "any":
        parts.append(Causal() if order == "causal" else Prefix(lengths(seqlen_k)))
    if draw(st.booleans()):
        sides = st.one_of(st.none(), st.integers(0, 90))
        # A right side of 0 is causal, which a prefix refuses to be joined with.
        right = sides.filter(lambda side: side != 0) if order == "prefix" else sides
        parts.append(Window(draw(sides), draw(right)))
    if draw(st.booleans()):
        starts = lengths(seqlen_k) if draw(st.booleans()) else None
        rows = lengths(seqlen_q) if draw(st.booleans()) else None
        parts.append(Lengths(lengths(seqlen_k), starts_k=starts, seqlens_q=rows))
    if draw(st.booleans()):
        parts.append(as_mask(numbers.bools(*shape())))
    kwargs: dict[str, Any] = {"mask": functools.reduce(operator.and_, parts)} if parts else {}
    biases: list[Any] = []
    if draw(st.booleans()):
        biases.append(as_bias(numbers.normal(*shape())))
    if draw(st.booleans()):
        biases.append(ALiBi(numbers.slopes(heads)))
    if draw(st.booleans()):
        table = numbers.normal(8, heads)
        biases.append(T5Bias(table, draw(st.booleans()), draw(st.integers(5, 150))))
    if biases:
        kwargs["bias"] = functools.reduce(operator.add, biases)
    if draw(st.booleans()):
        kwargs["sinks"] = numbers.normal(heads)
    if draw(st.booleans()):
        kwargs["softcap"] = draw(st.sampled_from([1.0, 20.0]))
    if draw(st.booleans()):
        kwargs["softmax_scale"] = draw(st.sampled_from([-0.1, 0.0, 0.3, 1.0]))
    if draw(st.booleans()):
        kwargs["dropout_p"] = draw(st.sampled_from([0.1, 0.5]))
        kwargs["dropout_seed"] = torch.tensor([draw(st.integers(-(2**63), 2**63 - 1))])
    return Case(q, k, v, kwargs)


def magnitudes(case: Case, dout: Tensor, dlse: Tensor) -> dict[str, Tensor]:
    """What each result is the sum of, by absolute value: float64, the shapes of the results."""
    q, k, v = (x.abs().double() for x in (case.q, case.k, case.v))
    kwargs = {name: x for name, x in case.double().kwargs.items() if "dropout" not in name}
    group = q.shape[2] // k.shape[2]
    k_heads, v_heads = (x.repeat_interleave(group, 2) for x in (k, v))
    scale = abs(kwargs.get("softmax_scale", q.shape[-1] ** -0.5))
    p = fastattn.attention_weights(case.q.double(), case.k.double(), impl="reference", **kwargs)
    growth = torch.ones_like(p)
    if "dropout_p" in case.kwargs:
        rate = case.kwargs["dropout_p"]
        growth = Dropout(rate, case.kwargs["dropout_seed"]).keep(*p.shape) / (1 - rate)
    dout, dlse = dout.abs().double(), dlse.abs().double()
    dp = torch.einsum("bmhd,bnhd->bhmn", dout, v_heads) * growth
    delta = (p * dp).sum(-1) + dlse
    # The score itself is rounded too, and its weight with it.
    scores = 1 + scale * torch.einsum("bmhd,bnhd->bhmn", q, k_heads)
    bias = kwargs.get("bias")
    if bias is not None:
        scores = scores + as_bias(bias).dense(q.shape[1], k.shape[1], torch.float64).abs()
    ds = p * (dp + delta[..., None]) * scores

    def over_group(x: Tensor) -> Tensor:
        return x.unflatten(2, (k.shape[2], group)).sum(3)

    found = {
        "out": torch.einsum("bhmn,bnhd->bmhd", p * growth * scores, v_heads),
        "dq": torch.einsum("bhmn,bnhd->bmhd", ds, k_heads) * scale,
        "dk": over_group(torch.einsum("bhmn,bmhd->bnhd", ds, q)) * scale,
        "dv": over_group(torch.einsum("bhmn,bmhd->bnhd", p * growth * scores, dout)),
        "dsinks": ((1 - p.sum(-1)) * delta * (p * scores).sum(-1).clamp(min=1)).sum((0, 2)),
    }
    if bias is not None:
        names = [name for name in ("bias", "table") if name in case.tensors()]
        leaves = {name: case.double().tensors()[name].requires_grad_() for name in names}
        made = case.double().with_tensors(lambda name, tensor: leaves.get(name, tensor))
        total = made.kwargs["bias"].dense(q.shape[1], k.shape[1], torch.float64).expand_as(ds)
        if leaves:
            sums = torch.autograd.grad(total, list(leaves.values()), ds)
            found |= {f"d{name}": each for name, each in zip(leaves, sums, strict=True)}
    return found


def check(case: Case) -> None:
    generator = torch.Generator().manual_seed(7)
    shape = (*case.q.shape[:-1], case.v.shape[-1])
    starts = (
        torch.randn(shape, generator=generator),
        torch.randn(case.lse_shape, generator=generator),
    )
    starts = starts[0].to(case.q.dtype), starts[1]
    actual = run(partial(fastattn.attention, impl="triton"), case, starts)
    baseline = run(reference.attention, case, starts)
    exact = run(reference.attention, case.double(), starts)
    bounds = magnitudes(case, *starts)
    assert actual.keys() == exact.keys()
    for name in bounds.keys() & exact.keys():
        plain = (baseline[name].double() - exact[name]).abs().max() if exact[name].numel() else 0
        # What is summed is in the dtype of q; sums and statistics are in float32 at best.
        eps = max(torch.finfo(case.q.dtype).eps, torch.finfo(actual[name].dtype).eps)
        allowed = 2 * plain + UNITS * eps * (bounds[name] + exact[name].abs())
        error = (actual[name].double() - exact[name]).abs()
        assert bool((error <= allowed).all()), (
            f"{name}: error {error.max():.3g}, {(error / allowed).max():.3g} of what is allowed"
        )
    finite = torch.isfinite(exact["lse"])
    assert torch.equal(torch.isfinite(actual["lse"]), finite)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_any_combination(case: Case) -> None:
    note(f"q {tuple(case.q.shape)} k {tuple(case.k.shape)} {case.q.dtype} {case.kwargs}")
    check(case)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=4),
    st.sampled_from(list(DTYPES)),
    st.booleans(),
)
def test_packed_sequences_are_alone(
    lengths: list[tuple[int, int]], dtype: str, causal: bool
) -> None:
    """Each sequence gets the bits that it gets by itself, forward and backward."""
    ends = [torch.tensor([0, *(pair[side] for pair in lengths)]).cumsum(0) for side in (0, 1)]
    totals = [max(int(end[-1]), 1) for end in ends]
    q, k, v = make_qkv(1, *totals, 2, 1, 16, dtype=DTYPES[dtype])
    q, k, v = q[0, : ends[0][-1]], k[0, : ends[1][-1]], v[0, : ends[1][-1]]
    bias = T5Bias(torch.linspace(-1, 1, 16).reshape(8, 2), max_distance=20)
    mask = Packed(ends[0], ends[1])
    attend = partial(fastattn.attention, impl="triton")
    starts = torch.ones(*q.shape[:-1], 16), None
    together = run(attend, Case(q, k, v, {"mask": mask, "causal": causal, "bias": bias}), starts)
    for index in range(len(lengths)):
        rows, keys = (slice(*end[index : index + 2].tolist()) for end in ends)
        alone = run(
            attend,
            Case(q[None, rows], k[None, keys], v[None, keys], {"causal": causal, "bias": bias}),
            (starts[0][None, rows], None),
        )
        assert torch.equal(together["out"][rows], alone["out"][0])
        assert torch.equal(together["dq"][rows], alone["dq"][0])
        for name in ("dk", "dv"):
            assert torch.equal(together[name][keys], alone[name][0]), name
