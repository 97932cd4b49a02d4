"""Every feature of attention as one row: read by `fastattn verify` and by the parity tests.

A row is a name, the shapes of q, k and v, and a function that draws the other arguments. A new
mask or bias is one more row here, and that row is its test. Shapes are small, so that Triton's
interpreter gets through them, but never a multiple of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastattn.biases import ALiBi, Bias, DenseBias, JoinedBias, T5Bias, alibi_slopes, as_bias, join
from fastattn.masks import Causal, Lengths, Mask, Packed, Prefix, Window, as_mask, find_packed
from fastattn.testing.inputs import make_cu_seqlens, make_qkv

__all__ = ["FEATURES", "Case", "Draw", "Feature", "Kwargs", "no_modifiers"]

Kwargs = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Case:
    """Arguments of one call: `fastattn.attention(q, k, v, **kwargs)`."""

    q: Tensor
    k: Tensor
    v: Tensor
    kwargs: Kwargs = field(default_factory=dict)

    def call(self, attention: Callable[..., Any], **options: Any) -> Any:
        """What `attention` returns for these arguments, and options beside them."""
        return attention(self.q, self.k, self.v, **self.kwargs, **options)

    def with_tensors(self, change: Callable[[str, Tensor], Tensor]) -> Case:
        """The same call with `change(name, tensor)` in the place of each floating tensor.

        Names are "q", "k", "v", "bias" (a dense one), "table" (T5), "slopes" (ALiBi), "sinks".
        """
        kwargs = dict(self.kwargs)
        if "bias" in kwargs:
            kwargs["bias"] = _change_bias(kwargs["bias"], change)
        if kwargs.get("sinks") is not None:
            kwargs["sinks"] = change("sinks", kwargs["sinks"])
        return Case(change("q", self.q), change("k", self.k), change("v", self.v), kwargs)

    def tensors(self) -> dict[str, Tensor]:
        """The floating tensors by the names of `with_tensors`."""
        found: dict[str, Tensor] = {}

        def note(name: str, tensor: Tensor) -> Tensor:
            if name in found:
                raise ValueError(f"a call may have one {name} here, got two")
            return found.setdefault(name, tensor)

        self.with_tensors(note)
        return found

    def double(self) -> Case:
        """The same numbers in float64, for the exact result."""
        return self.with_tensors(lambda name, tensor: tensor.double())

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """Shape of the log-sum-exp of this call."""
        rows, heads = self.q.shape[-3:-1]
        mask: Mask | Tensor | None = self.kwargs.get("mask")
        packed = mask is not None and find_packed(as_mask(mask)) is not None
        return (heads, rows) if packed else (self.q.shape[0], heads, rows)


def _change_bias(bias: Bias | Tensor, change: Callable[[str, Tensor], Tensor]) -> Bias | Tensor:
    if isinstance(bias, JoinedBias):
        return join(*(as_bias(_change_bias(part, change)) for part in bias.parts))
    if isinstance(bias, Tensor):
        return change("bias", bias)
    if isinstance(bias, DenseBias):
        return DenseBias(change("bias", bias.tensor))
    if isinstance(bias, T5Bias):
        return replace(bias, table=change("table", bias.table))
    if isinstance(bias, ALiBi):
        return replace(bias, slopes=change("slopes", bias.slopes))
    raise TypeError(f"bias must be a tensor, ALiBi or T5Bias, or a sum of them, got {bias!r}")


class Draw:
    """Draws a row's masks and biases: on the CPU, from its own seed, then cast and moved."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str) -> None:
        self._generator = torch.Generator().manual_seed(1)
        self._dtype = dtype
        self._device = device

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """Normal values in the dtype of q."""
        values = torch.randn(shape, generator=self._generator) * std
        return values.to(self._device, self._dtype)

    def bools(self, *shape: int, true: float = 0.7) -> Tensor:
        """Booleans, of which the fraction `true` is True."""
        return (torch.rand(shape, generator=self._generator) < true).to(self._device)

    def ints(self, *values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """The integers given, one dimension."""
        return torch.tensor(values, dtype=dtype, device=self._device)

    def slopes(self, *shape: int) -> Tensor:
        """ALiBi slopes of the paper, float32; with a batch axis, another size for each sequence."""
        slopes = alibi_slopes(shape[-1], self._device)
        if len(shape) == 1:
            return slopes
        return slopes * torch.arange(1, shape[0] + 1, device=self._device)[:, None]

    def packed(self, lengths_q: list[int], lengths_k: list[int] | None = None) -> Packed:
        """Sequences of these lengths, laid end to end."""
        ends_q = make_cu_seqlens(lengths_q).to(self._device)
        if lengths_k is None:
            return Packed(ends_q)
        return Packed(ends_q, make_cu_seqlens(lengths_k).to(self._device))


def no_modifiers(draw: Draw) -> Kwargs:
    """No keyword arguments at all."""
    return {}


@dataclass(frozen=True)
class Feature:
    """One row.

    Attributes:
        name: what it is called, unique.
        modifiers: draws the keyword arguments of `attention` besides q, k and v.
        batch, seqlen_q, ..., head_dim_v: sizes; head_dim_v defaults to head_dim.
        layout: of q, k, v in memory: "bshd", "bhsd" (views of it), "gaps" (strided in every
            dimension, with NaN between the elements), "expanded" (stride 0 over the batch).
        packed: without the batch axis; batch must be 1.
        weights: whether `attention_weights` is verified too.
        gradient: what is differentiated where gradients are verified: "both" out and lse, "out",
            "lse", or "sum": `out.sum()` of a call that returns no lse, whose gradient is one number
            with stride 0 in every dimension.
    """

    name: str
    modifiers: Callable[[Draw], Kwargs] = no_modifiers
    batch: int = 2
    seqlen_q: int = 100
    seqlen_k: int = 100
    num_heads: int = 2
    num_heads_kv: int = 2
    head_dim: int = 32
    head_dim_v: int | None = None
    layout: str = "bshd"
    packed: bool = False
    weights: bool = False
    gradient: str = "both"

    def case(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Case:
        """The row's arguments in a dtype on a device; the same numbers each time."""
        q, k, v = make_qkv(
            self.batch,
            max(self.seqlen_q, 1),
            max(self.seqlen_k, 1),
            self.num_heads,
            self.num_heads_kv,
            self.head_dim,
            self.head_dim_v,
            dtype=dtype,
            device=device,
        )
        q, k, v = q[:, : self.seqlen_q], k[:, : self.seqlen_k], v[:, : self.seqlen_k]
        q, k, v = (LAYOUTS[self.layout](tensor) for tensor in (q, k, v))
        if self.packed:
            q, k, v = q[0], k[0], v[0]
        return Case(q, k, v, self.modifiers(Draw(dtype, device)))

    def output_gradients(self, case: Case) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of out and of lse, to start the row's backward pass from; None is no part.

        Normal values of a seed of their own, out's in its dtype, lse's in float32 or better and
        around 2: sums over all rows, such as a sink's gradient, would cancel otherwise, and a few
        numbers that are mostly rounding error say nothing. Both are strided as the row's layout
        says. lse's is not 0 where lse is -inf: the gradient must stop there by itself.

        Raises:
            ValueError: the row's `gradient` is not known.
        """
        if self.gradient not in _GRADIENTS:
            raise ValueError(f"gradient must be one of {list(_GRADIENTS)}, got {self.gradient!r}")
        generator = torch.Generator().manual_seed(2)
        out_shape = (self.batch, *case.q.shape[-3:-1], case.v.shape[-1])
        out, lse = (
            torch.randn(shape, generator=generator).to(case.q.device)
            for shape in (out_shape, case.lse_shape)
        )
        out = LAYOUTS[self.layout](out.to(case.q.dtype))
        if self.packed:
            out = out[0]
        if self.gradient == "sum":
            return out.new_ones(()).expand(out.shape), None
        lse = (lse + 2).to(torch.promote_types(case.q.dtype, torch.float32))
        if self.layout == "gaps":
            lse = torch.stack([lse, torch.full_like(lse, float("nan"))], -1)[..., 0]
        wanted = _GRADIENTS[self.gradient]
        return out if "out" in wanted else None, lse if "lse" in wanted else None


def _with_gaps(tensor: Tensor) -> Tensor:
    """The same values with a stride of more than one element in every dimension, in a new order."""
    batch, seqlen, heads, dim = tensor.shape
    storage = tensor.new_full((heads + 1, seqlen + 2, batch, 2 * dim + 3), float("nan"))
    view = storage[1:, 1:-1, :, 1:-2:2].permute(2, 1, 0, 3)
    return view.copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bshd": lambda tensor: tensor,
    "bhsd": lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
    "gaps": _with_gaps,
    "expanded": lambda tensor: tensor[:1].expand_as(tensor),
}


_GRADIENTS = {"both": ("out", "lse"), "out": ("out",), "lse": ("lse",), "sum": ("out",)}


def _causal(draw: Draw) -> Kwargs:
    return {"causal": True}


def _fully_masked_rows(draw: Draw) -> Kwargs:
    mask = draw.bools(2, 1, 100, 100)
    mask[:, :, 10:20] = False
    mask[1, :, 64:] = False  # a whole tile of rows
    return {"mask": mask}


def _bias_with_infinities(draw: Draw) -> Kwargs:
    """What models make of a padding mask: the lowest value or -inf, added to the scores."""
    bias = draw.normal(2, 1, 100, 100)
    bias[0, :, :, 70:] = torch.finfo(bias.dtype).min
    bias[1, :, :, 50:] = float("-inf")
    bias[1, :, 5:9] = float("-inf")
    return {"bias": bias}


def _bias_lowest_in_whole_rows(draw: Draw) -> Kwargs:
    """The same for a row that sees nothing: all of its keys are equal again, and none is NaN."""
    bias = draw.normal(2, 1, 100, 100)
    bias[:, :, 5:9] = torch.finfo(bias.dtype).min
    return {"bias": bias}


def _everything(draw: Draw) -> Kwargs:
    mask = Window(90, 70) & Lengths(draw.ints(150, 97), starts_k=draw.ints(0, 9))
    bias = ALiBi(draw.slopes(2)) + T5Bias(draw.normal(16, 2), max_distance=50)
    return {
        "mask": mask & Prefix(draw.ints(80, 3)) & draw.bools(2, 2, 130, 150, true=0.9),
        "bias": bias + draw.normal(2, 130, 150),
        "sinks": draw.normal(2),
        "softcap": 4.0,
        "softmax_scale": 0.3,
    }


def _everything_packed(draw: Draw) -> Kwargs:
    mask = draw.packed([70, 0, 45, 1], [80, 5, 0, 66]) & Window(60, 20)
    bias = T5Bias(draw.normal(16, 2), max_distance=50) + ALiBi(draw.slopes(4, 2))
    return {
        "mask": mask & draw.bools(4, 1, 70, 80, true=0.9),
        "bias": bias + draw.normal(1, 2, 70, 80),
        "sinks": draw.normal(2),
        "softcap": 4.0,
    }


def _dropout(draw: Draw, p: float = 0.1) -> Kwargs:
    # More than 32 bits, since the seed's two halves are used apart.
    return {"dropout_p": p, "dropout_seed": draw.ints(2**40 + 7, dtype=torch.int64)}


_HEAD_DIMS = (1, 16, 40, 64, 72, 80, 96, 128, 160, 256)

# fmt: off
FEATURES: tuple[Feature, ...] = (
    # who attends to whom, by shape
    Feature("bidirectional", weights=True),
    Feature("causal", _causal, weights=True, seqlen_q=150, seqlen_k=150),
    Feature("causal, seqlen_q < seqlen_k", _causal, seqlen_q=70, seqlen_k=150),
    Feature("causal, seqlen_q > seqlen_k", _causal, seqlen_q=150, seqlen_k=70, weights=True),
    Feature("cross", seqlen_q=70, seqlen_k=150),
    Feature("one query", _causal, seqlen_q=1, seqlen_k=150),
    Feature("one query, one key", seqlen_q=1, seqlen_k=1),
    Feature("one past a tile", seqlen_q=129, seqlen_k=65),
    Feature("one short of a tile", _causal, seqlen_q=63, seqlen_k=127),
    Feature("one key", seqlen_k=1),
    Feature("no keys", seqlen_k=0, weights=True),
    Feature("no queries", seqlen_q=0),
    # heads and layouts
    Feature("grouped-query", num_heads=4, weights=True),
    Feature("grouped-query, groups of 4", _causal, batch=1, num_heads=8, seqlen_q=60,
            seqlen_k=100),
    Feature("multi-query", _causal, num_heads=3, num_heads_kv=1),
    *(
        Feature(f"head_dim {dim}", _causal, head_dim=dim, batch=1, num_heads=1, num_heads_kv=1,
                seqlen_k=110)
        for dim in _HEAD_DIMS
    ),
    Feature("head_dim_v < head_dim", head_dim=64, head_dim_v=24),
    Feature("head_dim_v > head_dim", head_dim=24, head_dim_v=80),
    Feature("strides of (batch, head, seqlen, dim)", layout="bhsd"),
    Feature("strides with gaps everywhere", layout="gaps", num_heads=4, weights=True),
    Feature("strides of 0", layout="expanded"),
    # lengths
    Feature("Lengths", lambda draw: {"mask": Lengths(draw.ints(100, 37))}, weights=True),
    Feature("Lengths, a length of 0",
            lambda draw: {"mask": Lengths(draw.ints(64, 0, dtype=torch.int64))}),
    Feature("Lengths, causal", lambda draw: {"mask": Lengths(draw.ints(100, 70)), "causal": True}),
    Feature("Lengths, left padded",
            lambda draw: {"mask": Lengths(draw.ints(150, 130), starts_k=draw.ints(3, 90))},
            seqlen_k=150),
    Feature("Lengths, left padded, causal",
            lambda draw: {"mask": Lengths(draw.ints(100, 100), starts_k=draw.ints(70, 0)),
                          "causal": True}, weights=True),
    Feature("Lengths with seqlens_q",
            lambda draw: {"mask": Lengths(draw.ints(100, 40), seqlens_q=draw.ints(70, 0))},
            weights=True),
    Feature("Packed", lambda draw: {"mask": draw.packed([70, 0, 33, 1], [40, 12, 0, 66])},
            batch=1, seqlen_q=104, seqlen_k=118, packed=True, weights=True),
    Feature("Packed, causal", lambda draw: {"mask": draw.packed([70, 0, 33, 1]), "causal": True},
            batch=1, seqlen_q=104, seqlen_k=104, packed=True),
    Feature("Packed, causal, seqlen_q != seqlen_k",
            lambda draw: {"mask": draw.packed([33, 70], [70, 33]), "causal": True},
            batch=1, seqlen_q=103, seqlen_k=103, packed=True),
    Feature("Packed, window, T5Bias",
            lambda draw: {"mask": draw.packed([80, 20, 15]) & Window(30, 10),
                          "bias": T5Bias(draw.normal(32, 2))},
            batch=1, seqlen_q=115, seqlen_k=115, packed=True, weights=True),
    Feature("Packed with a batch axis", lambda draw: {"mask": draw.packed([70, 34])},
            batch=1, seqlen_q=104, seqlen_k=104),
    # other masks
    Feature("Window(left, right)", lambda draw: {"mask": Window(70, 66)}, batch=1,
            seqlen_q=200, seqlen_k=200, weights=True),
    Feature("Window(left, right), wide", lambda draw: {"mask": Window(150, 140)}, batch=1,
            seqlen_q=400, seqlen_k=400, num_heads=1, num_heads_kv=1),
    Feature("Window(left, right), narrow", lambda draw: {"mask": Window(3, 0)}, batch=1,
            seqlen_q=150, seqlen_k=150),
    Feature("Window(left, None)", lambda draw: {"mask": Window(20, None)}, seqlen_k=150),
    Feature("Window(None, right)", lambda draw: {"mask": Window(None, 10)}, seqlen_q=150),
    Feature("Window(left, 0), causal", lambda draw: {"mask": Window(80, None), "causal": True},
            batch=1, seqlen_q=200, seqlen_k=200),
    Feature("Prefix", lambda draw: {"mask": Prefix(draw.ints(80, 0))}, seqlen_k=110, weights=True),
    Feature("Prefix & Lengths",
            lambda draw: {"mask": Prefix(draw.ints(80, 5)) & Lengths(draw.ints(60, 100))}),
    Feature("mask", lambda draw: {"mask": draw.bools(2, 2, 100, 90)}, seqlen_k=90, weights=True),
    Feature("mask, broadcast over heads", lambda draw: {"mask": draw.bools(2, 1, 100, 100)}),
    Feature("mask, broadcast over batch and heads", lambda draw: {"mask": draw.bools(100, 100)}),
    Feature("mask, broadcast over rows (key padding)",
            lambda draw: {"mask": draw.bools(2, 1, 1, 100)}),
    Feature("mask, broadcast over keys", lambda draw: {"mask": draw.bools(2, 2, 100, 1)}),
    Feature("mask, one value a head", lambda draw: {"mask": draw.bools(2, 1, 1, true=0.5)}),
    Feature("mask & Causal", lambda draw: {"mask": draw.bools(100, 100) & Causal()}),
    Feature("fully masked rows", _fully_masked_rows, weights=True),
    # scores
    Feature("bias", lambda draw: {"bias": draw.normal(2, 2, 100, 90)}, seqlen_k=90, weights=True),
    Feature("bias, broadcast over batch", lambda draw: {"bias": draw.normal(2, 100, 100)}),
    Feature("bias, broadcast over heads", lambda draw: {"bias": draw.normal(2, 1, 100, 100)}),
    Feature("bias, broadcast over rows", lambda draw: {"bias": draw.normal(2, 2, 1, 100)}),
    Feature("bias, broadcast over keys", lambda draw: {"bias": draw.normal(2, 1, 100, 1)}),
    Feature("bias, broadcast over all but heads", lambda draw: {"bias": draw.normal(1, 2, 1, 1)}),
    Feature("bias, broadcast over all but keys", lambda draw: {"bias": draw.normal(100)}),
    Feature("bias, grouped-query", lambda draw: {"bias": draw.normal(1, 4, 70, 60)}, num_heads=4,
            seqlen_q=70, seqlen_k=60),
    Feature("bias, float32 whatever q is",
            lambda draw: {"bias": draw.normal(2, 2, 100, 100).float(), "causal": True}),
    Feature("bias of -inf and lowest values", _bias_with_infinities, weights=True),
    Feature("bias of lowest values in whole rows", _bias_lowest_in_whole_rows),
    Feature("ALiBi", lambda draw: {"bias": ALiBi(draw.slopes(3)), "causal": True}, num_heads=3,
            num_heads_kv=3, weights=True),
    Feature("ALiBi, bidirectional, a slope a sequence",
            lambda draw: {"bias": ALiBi(draw.slopes(2, 2))}, seqlen_k=70),
    Feature("T5Bias, bidirectional", lambda draw: {"bias": T5Bias(draw.normal(32, 2))},
            seqlen_q=150, seqlen_k=150, weights=True),
    Feature("T5Bias, causal",
            lambda draw: {"bias": T5Bias(draw.normal(32, 2), bidirectional=False), "causal": True},
            seqlen_q=70, seqlen_k=150),
    Feature("T5Bias, far tiles",
            lambda draw: {"bias": T5Bias(draw.normal(8, 2), max_distance=20), "softmax_scale": 1.0},
            batch=1, seqlen_q=200, seqlen_k=200),
    Feature("T5Bias, float32 whatever q is, grouped-query",
            lambda draw: {"bias": T5Bias(draw.normal(32, 4).float()), "causal": True},
            num_heads=4, seqlen_q=129, seqlen_k=65),
    Feature("softcap", lambda draw: {"softcap": 2.0, "softmax_scale": 1.0}, weights=True),
    Feature("softcap, far from saturation", lambda draw: {"softcap": 1e3, "causal": True}),
    Feature("sinks", lambda draw: {"sinks": draw.normal(2, std=2.0), "causal": True}, weights=True),
    Feature("sinks, rows without keys",
            lambda draw: {"sinks": draw.normal(2), "causal": True}, seqlen_q=150, seqlen_k=70),
    Feature("sinks, Lengths with seqlens_q",
            lambda draw: {"mask": Lengths(draw.ints(100, 40), seqlens_q=draw.ints(70, 0)),
                          "sinks": draw.normal(2)}),
    Feature("sinks, float32 whatever q is, grouped-query",
            lambda draw: {"sinks": draw.normal(4).float()}, num_heads=4),
    Feature("softmax_scale", lambda draw: {"softmax_scale": 0.05}),
    Feature("softmax_scale 0", lambda draw: {"softmax_scale": 0.0, "causal": True}),
    Feature("softmax_scale < 0", lambda draw: {"softmax_scale": -0.2, "causal": True},
            weights=True),
    Feature("large scores", lambda draw: {"softmax_scale": 8.0}),
    # what training adds
    Feature("dropout", _dropout),
    Feature("dropout, causal, grouped-query", lambda draw: {**_dropout(draw), "causal": True},
            num_heads=4, seqlen_q=70, seqlen_k=100),
    Feature("dropout 0.9, everything, packed",
            lambda draw: {**_everything_packed(draw), **_dropout(draw, 0.9)},
            batch=1, seqlen_q=116, seqlen_k=151, num_heads_kv=1, packed=True),
    Feature("gradient of out.sum()", _causal, gradient="sum"),
    Feature("gradient of out.sum(), everything, packed",
            lambda draw: {**_everything_packed(draw), "sinks": None}, batch=1, seqlen_q=116,
            seqlen_k=151, num_heads_kv=1, packed=True, gradient="sum"),
    Feature("gradient of out alone", _causal, num_heads=4, gradient="out"),
    Feature("gradient of lse alone",
            lambda draw: {"bias": draw.normal(8, 60, 60), "sinks": draw.normal(8)},
            batch=1, seqlen_q=60, seqlen_k=60, num_heads=8, gradient="lse"),
    # all at once
    Feature("everything", _everything, seqlen_q=130, seqlen_k=150, num_heads_kv=1, layout="gaps",
            weights=True),
    Feature("everything, packed", _everything_packed, batch=1, seqlen_q=116, seqlen_k=151,
            num_heads_kv=1, packed=True, weights=True),
)
# fmt: on
