"""What is measured: shapes, with the FLOPs and bytes that each must cost, and their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastattn import Lengths, T5Bias

# Most telling first: a run that is cut short has what matters.
SEQLENS = (4096, 16384, 1024, 8192, 2048, 512)
SWEEP_SEQLENS = (4096, 16384, 1024)
TOKENS = 16384
NUM_HEADS = {64: 32, 128: 16}  # by head_dim: a model width of 2048
_NUM_BUCKETS = 32


@dataclass(frozen=True)
class Case:
    """One self-attention problem.

    Attributes:
        batch, seqlen, num_heads, num_heads_kv, head_dim: sizes of q, k and v.
        causal: whether a query sees only the keys up to its own position.
        feature: what else there is, a key of FEATURES.
        dtype: of q, k, v and of biases, a name in torch.
    """

    batch: int
    seqlen: int
    num_heads: int
    num_heads_kv: int
    head_dim: int
    causal: bool = False
    feature: str = "plain"
    dtype: str = "bfloat16"

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
        """Two products of rows x keys x head_dim a head, halved for a causal mask."""
        pairs = sum(rows * keys for rows, keys in zip(self.rows, self.lengths, strict=True))
        return 4.0 * self.num_heads * self.head_dim * pairs * (0.5 if self.causal else 1.0)

    @property
    def bytes(self) -> float:
        """The fewest bytes: q and out once a query row, k and v once a key, a dense bias once."""
        elements = 2 * self.num_heads * self.head_dim * sum(self.rows)
        elements += 2 * self.num_heads_kv * self.head_dim * sum(self.lengths)
        if self.feature == "dense bias":
            elements += self.num_heads * self.seqlen**2
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
    """

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    kwargs: dict[str, Any] = field(default_factory=dict)
    dense_mask: Tensor | None = None
    dense_bias: Tensor | None = None


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
    inputs = Inputs(case, q, k, v, {"causal": case.causal})
    return FEATURES[case.feature](inputs, draw)


def _plain(inputs: Inputs, draw: Callable[..., Tensor]) -> Inputs:
    return inputs


def _t5_bias(inputs: Inputs, draw: Callable[..., Tensor]) -> Inputs:
    case = inputs.case
    bias = T5Bias(draw(_NUM_BUCKETS, case.num_heads))
    kwargs = {**inputs.kwargs, "bias": bias}
    return replace(inputs, kwargs=kwargs, dense_bias=bias.dense(case.seqlen, case.seqlen))


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


FEATURES: dict[str, Callable[[Inputs, Callable[..., Tensor]], Inputs]] = {
    "plain": _plain,
    "T5 bias": _t5_bias,
    "dense bias": _dense_bias,
    "padded keys": _padded,
    "padded": _padded,
}


def matrix(seqlens: tuple[int, ...], tokens: int = TOKENS) -> Iterator[Case]:
    """Each seqlen x head_dim x causal or not, with `tokens` in all and a width of 2048."""
    for seqlen in seqlens:
        for head_dim in (128, 64):
            heads = NUM_HEADS[head_dim]
            for causal in (False, True):
                yield Case(max(1, tokens // seqlen), seqlen, heads, heads, head_dim, causal)


def forward_cases(quick: bool = False) -> list[Case]:
    """The forward matrix."""
    return list(matrix(SEQLENS[:3] if quick else SEQLENS))


def sweep_cases(quick: bool = False) -> list[Case]:
    """The shapes on which tile configs are compared."""
    return list(matrix(SWEEP_SEQLENS[:1] if quick else SWEEP_SEQLENS))


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
