"""What is measured: shapes, with the FLOPs and bytes that each must cost, and their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastattn import Lengths, T5Bias
from fastattn.biases import key_minus_query, t5_bucket

# Most telling first: a run that is cut short has what matters.
SEQLENS = (4096, 16384, 1024, 8192, 2048, 512)
SWEEP_SEQLENS = (4096, 16384, 1024)
TOKENS = 16384
NUM_HEADS = {64: 32, 128: 16}  # by head_dim: a model width of 2048
DROPOUT = 0.1
_NUM_BUCKETS = 32


@dataclass(frozen=True)
class Part:
    """What a part of attention must compute and move.

    Attributes:
        products: of rows x keys x head_dim.
        per_row: tensors of q's shape that are read or written.
        per_key: those of k's shape.
        bias: how often a dense bias, or its gradient, is.
    """

    products: int
    per_row: int
    per_key: int
    bias: int


# Backward is counted as the field does, five products to forward's two: S, dP, dV, dQ, dK. (Kernels
# without atomics compute S and dP twice, and are not credited for it.) Single launches, which the
# sweep times, are given what they compute.
PARTS = {
    "forward": Part(2, 2, 2, 1),  # q, out; k, v
    "training": Part(7, 6, 6, 3),  # forward, and q, out, dout, dq; k, v, dk, dv
    "rows": Part(3, 3, 2, 1),  # S, dP, dQ: q, dout, dq; k, v
    "keys": Part(4, 2, 4, 1),  # S, dP, dV, dK: q, dout; k, v, dk, dv
}


@dataclass(frozen=True)
class Case:
    """One self-attention problem.

    Attributes:
        batch, seqlen, num_heads, num_heads_kv, head_dim: sizes of q, k and v.
        causal: whether a query sees only the keys up to its own position.
        feature: what else there is, a key of FEATURES.
        dtype: of q, k, v and of biases, a name in torch.
        part: what is timed, a key of PARTS; "training" is forward and backward.
    """

    batch: int
    seqlen: int
    num_heads: int
    num_heads_kv: int
    head_dim: int
    causal: bool = False
    feature: str = "plain"
    dtype: str = "bfloat16"
    part: str = "forward"

    @property
    def dropout_p(self) -> float:
        """Probability that a weight is dropped."""
        return DROPOUT if self.feature == "dropout" else 0.0

    @property
    def lengths(self) -> list[int]:
        """Keys that exist in each sequence; padded batches spread evenly up to `seqlen`."""
        if self.feature not in ("padded keys", "padded"):
            return [self.seqlen] * self.batch
        return [self.seqlen * (index + 1) // self.batch for index in range(self.batch)]

    @property
    def rows(self) -> list[int]:
        """Query rows of each sequence whose output anyone reads."""
        return self.lengths if self.feature == "padded" else [self.seqlen] * self.batch

    @property
    def flops(self) -> float:
        """The part's products of rows x keys x head_dim a head, halved for a causal mask."""
        pairs = sum(rows * keys for rows, keys in zip(self.rows, self.lengths, strict=True))
        pairs *= 2 * PARTS[self.part].products
        return self.num_heads * self.head_dim * pairs * (0.5 if self.causal else 1.0)

    @property
    def bytes(self) -> float:
        """The fewest bytes: each tensor of the part once a query row, once a key, or once."""
        part = PARTS[self.part]
        elements = part.per_row * self.num_heads * self.head_dim * sum(self.rows)
        elements += part.per_key * self.num_heads_kv * self.head_dim * sum(self.lengths)
        if self.feature == "dense bias":
            elements += part.bias * self.num_heads * self.seqlen**2
        return float(elements * getattr(torch, self.dtype).itemsize)

    def __str__(self) -> str:
        heads = f"{self.num_heads}"
        if self.num_heads_kv != self.num_heads:
            heads += f"/{self.num_heads_kv}"
        text = f"{self.batch} x {self.seqlen}, {heads} x {self.head_dim}"
        text += ", causal" if self.causal else ""
        return text if self.feature == "plain" else f"{text}, {self.feature}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "label": str(self), "flops": self.flops, "bytes": self.bytes}


@dataclass(frozen=True, eq=False)
class Inputs:
    """A case's tensors, as fastattn takes them and as a dense mask and bias for everyone else.

    Attributes:
        q, k, v: (batch, seqlen, heads, head_dim), contiguous, standard normal.
        kwargs: of `fastattn.attention`, besides q, k and v.
        dense_mask: bool (batch, 1, 1, seqlen), True = attend, or None.
        dense_bias: (1, num_heads, seqlen, seqlen), or None.
        buckets: int64 (seqlen, seqlen), the row of T5's table that each score gets, or None.
        leaves: what is differentiated, by name: "q", "k", "v" and "bias" or "table"; {} forward.
        dout: gradient of the output, 0 in its padding; None forward.
    """

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    kwargs: dict[str, Any] = field(default_factory=dict)
    dense_mask: Tensor | None = None
    dense_bias: Tensor | None = None
    buckets: Tensor | None = None
    leaves: dict[str, Tensor] = field(default_factory=dict)
    dout: Tensor | None = None

    def attn_mask(self) -> Tensor | None:
        """What SDPA takes for masks and biases: one that is trained by its table is made from it.

        As models do: an embedding of the buckets, whose gradient torch adds up.
        """
        if "table" in self.leaves and self.buckets is not None:
            bias = torch.nn.functional.embedding(self.buckets, self.leaves["table"])
            return bias.permute(2, 0, 1)[None].contiguous()
        return self.dense_mask if self.dense_bias is None else self.dense_bias


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Draws a case's tensors on the device: normal values, never zeros, which run too fast."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    shape = (case.batch, case.seqlen)
    q = draw(*shape, case.num_heads, case.head_dim)
    k = draw(*shape, case.num_heads_kv, case.head_dim)
    v = draw(*shape, case.num_heads_kv, case.head_dim)
    inputs = FEATURES[case.feature](Inputs(case, q, k, v, {"causal": case.causal}), draw)
    return inputs if case.part == "forward" else _differentiated(inputs, draw)


def _differentiated(inputs: Inputs, draw: Callable[..., Tensor]) -> Inputs:
    """With a gradient to start from, and leaves for autograd where it is what is timed."""
    case = inputs.case
    leaves = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    bias = inputs.kwargs.get("bias")
    if bias is not None:
        leaves |= {"table": bias.table} if isinstance(bias, T5Bias) else {"bias": bias}
    if case.part == "training":
        for leaf in leaves.values():
            leaf.requires_grad_()
    dout = draw(*inputs.q.shape)
    for index, rows in enumerate(case.rows):
        dout[index, rows:] = 0
    return replace(inputs, leaves=leaves, dout=dout)


def _plain(inputs: Inputs, draw: Callable[..., Tensor]) -> Inputs:
    return inputs


def _t5_bias(inputs: Inputs, draw: Callable[..., Tensor]) -> Inputs:
    case = inputs.case
    bias = T5Bias(draw(_NUM_BUCKETS, case.num_heads))
    # From buckets of the CPU, like the kernel's: a logarithm may round otherwise on a GPU.
    most = bias.max_distance
    by_distance = t5_bucket(torch.arange(-most, most + 1), True, _NUM_BUCKETS, most)
    distance = key_minus_query(case.seqlen, case.seqlen, inputs.q.device).clamp(-most, most)
    return replace(
        inputs,
        kwargs={**inputs.kwargs, "bias": bias},
        dense_bias=bias.dense(case.seqlen, case.seqlen),
        buckets=by_distance.to(distance.device)[distance + most],
    )


def _dense_bias(inputs: Inputs, draw: Callable[..., Tensor]) -> Inputs:
    case = inputs.case
    bias = draw(1, case.num_heads, case.seqlen, case.seqlen)
    return replace(inputs, kwargs={**inputs.kwargs, "bias": bias}, dense_bias=bias)


def _padded(inputs: Inputs, draw: Callable[..., Tensor]) -> Inputs:
    case, device = inputs.case, inputs.q.device
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    rows = lengths if case.feature == "padded" else None
    visible = torch.arange(case.seqlen, device=device) < lengths[:, None]
    return replace(
        inputs,
        kwargs={**inputs.kwargs, "mask": Lengths(lengths, seqlens_q=rows)},
        dense_mask=visible[:, None, None, :],
    )


def _dropout(inputs: Inputs, draw: Callable[..., Tensor]) -> Inputs:
    if inputs.case.part == "forward":
        raise ValueError('feature "dropout" belongs to training, got part "forward"')
    seed = torch.tensor([2**40 + 7], dtype=torch.int64, device=inputs.q.device)
    kwargs = {**inputs.kwargs, "dropout_p": inputs.case.dropout_p, "dropout_seed": seed}
    return replace(inputs, kwargs=kwargs)


FEATURES: dict[str, Callable[[Inputs, Callable[..., Tensor]], Inputs]] = {
    "plain": _plain,
    "T5 bias": _t5_bias,
    "dense bias": _dense_bias,
    "padded keys": _padded,
    "padded": _padded,
    "dropout": _dropout,
}


def matrix(seqlens: tuple[int, ...], part: str = "forward", tokens: int = TOKENS) -> Iterator[Case]:
    """Each seqlen x head_dim x causal or not, with `tokens` in all and a width of 2048."""
    for seqlen in seqlens:
        for head_dim in (128, 64):
            heads = NUM_HEADS[head_dim]
            for causal in (False, True):
                batch = max(1, tokens // seqlen)
                yield Case(batch, seqlen, heads, heads, head_dim, causal, part=part)


def forward_cases(quick: bool = False) -> list[Case]:
    """The forward matrix."""
    return list(matrix(SEQLENS[:3] if quick else SEQLENS))


def sweep_cases(quick: bool = False) -> list[Case]:
    """The shapes on which tile configs are compared: a length's launches, then the next length."""
    seqlens = SWEEP_SEQLENS[:1] if quick else SWEEP_SEQLENS
    return [
        case
        for seqlen in seqlens
        for part in ("forward", "rows", "keys")
        for case in matrix((seqlen,), part)
    ]


def feature_cases(quick: bool = False) -> list[Case]:
    """Biases, padding, grouped heads, and one call too small to fill a GPU."""
    cases = [
        Case(8, 2048, 16, 16, 64, feature="T5 bias"),
        Case(8, 2048, 16, 16, 64, feature="padded"),
        Case(4, 4096, 32, 8, 128, causal=True),
        Case(8, 2048, 16, 16, 64, feature="dense bias"),
        Case(8, 2048, 16, 16, 64, feature="padded keys"),
        Case(1, 512, 16, 16, 64, causal=True),
    ]
    return cases[:3] if quick else cases


def backward_cases(quick: bool = False) -> list[Case]:
    """Forward and backward: what the targets are about first, then the rest of the matrix."""
    shapes = list(matrix(SEQLENS[:3] if quick else SEQLENS, "training"))
    features = [
        Case(8, 2048, 16, 16, 64, feature="T5 bias", part="training"),
        Case(8, 2048, 16, 16, 64, feature="dense bias", part="training"),
        Case(8, 2048, 16, 16, 64, feature="padded", part="training"),
        Case(8, 2048, 16, 16, 64, feature="dropout", part="training"),
        Case(4, 4096, 32, 8, 128, causal=True, part="training"),
    ]
    # The first four shapes are those of 4096: head_dim 128, causal and not, then head_dim 64.
    return [*shapes[:2], *features[:2], *shapes[2:4], *features[2:], *shapes[4:]]
