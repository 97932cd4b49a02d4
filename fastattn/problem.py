"""One attention problem, checked: what every implementation is given."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import biases, masks
from fastattn.biases import Bias
from fastattn.dropout import Dropout
from fastattn.masks import Causal, Frame, Mask, Packed
from fastattn.validation import check_tensor, describe

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class AttentionProblem:
    """Arguments of one call of `fastattn.attention`, validated and with defaults filled in.

    Packed tensors have three dimensions here, whether or not they came with a batch axis of 1.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask | None
    bias: Bias | None
    packed: Packed | None
    softmax_scale: float
    softcap: float
    sinks: Tensor | None
    dropout: Dropout | None
    return_lse: bool

    @property
    def device(self) -> torch.device:
        """Where it all lies."""
        return self.q.device

    @property
    def num_sequences(self) -> int:
        """Batch size, or the number of packed sequences."""
        return self.q.shape[0] if self.packed is None else self.packed.num_sequences

    @property
    def frame_seqlens(self) -> tuple[int, int]:
        """Query and key lengths of the frame; for packed sequences, of the longest."""
        if self.packed is None:
            return self.q.shape[1], self.k.shape[1]
        return self.packed.max_seqlen_q, self.packed.max_seqlen_k

    @property
    def is_empty(self) -> bool:
        """Whether the output has no elements or no rows to compute."""
        return self.q.numel() == 0 or self.v.shape[-1] == 0

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors a gradient could flow to."""
        tensors = [self.q, self.k, self.v]
        if self.sinks is not None:
            tensors.append(self.sinks)
        if self.bias is not None:
            tensors.extend(self.bias.tensors())
        return tensors

    @property
    def requires_grad(self) -> bool:
        """Whether autograd will ask for gradients of this call."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.tensors)

    @property
    def has_tangents(self) -> bool:
        """Whether forward-mode differentiation is asked of this call."""
        if torch.compiler.is_compiling() or forward_ad._current_level < 0:
            return False
        return any(forward_ad.unpack_dual(t).tangent is not None for t in self.tensors)

    def sequence(self, index: int, rows: slice, keys: slice) -> AttentionProblem:
        """One packed sequence as a problem of its own, with a batch axis of 1."""
        seqlen_q, seqlen_k = rows.stop - rows.start, keys.stop - keys.start
        mask, bias = self.mask, self.bias
        if mask is not None:
            mask = mask.at(index, seqlen_q, seqlen_k) if mask is not self.packed else None
        return AttentionProblem(
            q=self.q[None, rows],
            k=self.k[None, keys],
            v=self.v[None, keys],
            mask=mask,
            bias=None if bias is None else bias.at(index, seqlen_q, seqlen_k),
            packed=None,
            softmax_scale=self.softmax_scale,
            softcap=self.softcap,
            sinks=self.sinks,
            dropout=None if self.dropout is None else self.dropout.at(index),
            return_lse=self.return_lse,
        )


def make_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
) -> AttentionProblem:
    """Checks the arguments of `fastattn.attention` and fills in defaults.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
    """
    _check_flag("causal", causal)
    joined = None if mask is None else masks.as_mask(mask)
    if causal:
        joined = Causal() if joined is None else joined & Causal()
    packed = masks.find_packed(joined)
    q, k, v = (_autocast(tensor) for tensor in (q, k, v))
    q, k, v = _check_operands(q, k, v, packed)
    problem = AttentionProblem(
        q=q,
        k=k,
        v=v,
        mask=joined,
        bias=None if bias is None else biases.as_bias(bias),
        packed=packed,
        softmax_scale=_check_scale(softmax_scale, q.shape[-1]),
        softcap=_check_number("softcap", softcap, "0 (off) or a positive number", low=0.0),
        sinks=sinks,
        dropout=_check_dropout(dropout_p, dropout_seed, q.device),
        return_lse=return_lse,
    )
    _check_flag("return_lse", return_lse)
    seqlen_q, seqlen_k = problem.frame_seqlens
    frame = Frame(problem.num_sequences, q.shape[-2], seqlen_q, seqlen_k, q.device)
    if packed is not None:
        packed.check_totals(q.shape[0], k.shape[0], q.device)
    if joined is not None:
        joined.check(frame)
    if problem.bias is not None:
        problem.bias.check(frame)
    if sinks is not None:
        check_tensor("sinks", sinks)
        if sinks.shape != (q.shape[-2],) or not sinks.is_floating_point():
            raise ValueError(
                f"sinks must be one logit a head, floating point of shape ({q.shape[-2]},), "
                f"got {describe(sinks)}"
            )
        if sinks.device != q.device:
            raise ValueError(f"sinks must be on {q.device} like q, got {describe(sinks)}")
    return problem


def _autocast(tensor: Tensor) -> Tensor:
    """Within torch.autocast, the cast that torch's scaled_dot_product_attention makes."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return tensor
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return tensor
    if not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _check_operands(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed | None
) -> tuple[Tensor, Tensor, Tensor]:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
        if packed is not None and tensor.dim() == 4 and tensor.shape[0] != 1:
            raise ValueError(
                f"{name} of packed sequences must be (total, num_heads, head_dim), or have a batch "
                f"axis of 1 before it, got {describe(tensor)}"
            )
        if tensor.dim() != 4 and not (packed is not None and tensor.dim() == 3):
            raise ValueError(
                f"{name} must be (batch, seqlen, num_heads, head_dim), or with a Packed mask "
                f"(total, num_heads, head_dim), got {describe(tensor)}"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {describe(tensor)}"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise TypeError(
                f"{name} must have the dtype and device of q ({describe(q)}), got "
                f"{describe(tensor)}"
            )
        if packed is not None and tensor.dim() != q.dim():
            raise ValueError(
                f"{name} must have as many dimensions as q ({describe(q)}), got {describe(tensor)}"
            )
    if packed is not None and q.dim() == 4:
        q, k, v = q[0], k[0], v[0]
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"v must agree with k ({describe(k)}) in all but its last dimension, got {describe(v)}"
        )
    if packed is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have the batch size of q, {q.shape[0]}, got {describe(k)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have the head_dim of q, {q.shape[-1]}, got {describe(k)}")
    for name, tensor in (("q", q), ("v", v)):
        if not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"head_dim of {name} must be 1 to {MAX_HEAD_DIM}, got {describe(tensor)}"
            )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"num_heads of q must be a multiple of num_heads of k, got {q.shape[-2]} and "
            f"{k.shape[-2]}"
        )
    return q, k, v


def _check_dropout(p: float, seed: Tensor | None, device: torch.device) -> Dropout | None:
    p = _check_number("dropout_p", p, "a probability in [0, 1)", 0.0, 1.0)
    if seed is not None:
        check_tensor("dropout_seed", seed)
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"dropout_seed must be an int64 tensor of one element on {device} like q, got "
                f"{describe(seed)}"
            )
        seed = seed.reshape(1)
    return Dropout(p, seed) if p > 0 else None


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _check_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    return _check_number("softmax_scale", scale, "a finite number, or None for head_dim ** -0.5")


def _check_number(
    name: str,
    value: float,
    expected: str,
    low: float = -math.inf,
    high: float = math.inf,
) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    # Comparisons that a NaN fails too: torch.compile knows no isfinite of a symbolic number.
    if not (-math.inf < value < math.inf and low <= value < high):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return float(value)
