"""One attention problem, checked: what every implementation is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import biases, masks
from fastattn.biases import Bias
from fastattn.dropout import Dropout
from fastattn.masks import Causal, Frame, Mask, Packed
from fastattn.validation import check_flag, check_number, check_tensor, describe

MAX_HEAD_DIM = 256
CAUSAL = Causal()
"""What `causal=True` alone is: one for all, which is known to fit and need not be taken apart."""

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
    check_flag("causal", causal)
    check_flag("return_lse", return_lse)
    joined = join_causal(mask, causal)
    packed = None if joined is None or joined is CAUSAL else masks.find_packed(joined)
    if not (packed is None and _are_plain(q, k, v)):
        q, k, v = (autocast(tensor) for tensor in (q, k, v))
        q, k, v = _check_operands(q, k, v, packed)
    problem = AttentionProblem(
        q=q,
        k=k,
        v=v,
        mask=joined,
        bias=None if bias is None else biases.as_bias(bias),
        packed=packed,
        softmax_scale=check_softmax_scale(softmax_scale, q.shape[-1]),
        softcap=check_softcap(softcap),
        sinks=sinks,
        dropout=_check_dropout(dropout_p, dropout_seed, q.device),
        return_lse=return_lse,
    )
    if packed is not None:
        packed.check_totals(q.shape[0], k.shape[0], q.device)
    if not ((joined is None or joined is CAUSAL) and bias is None and sinks is None):
        seqlen_q, seqlen_k = problem.frame_seqlens
        frame = Frame(problem.num_sequences, q.shape[-2], seqlen_q, seqlen_k, q.device)
        check_modifiers(frame, joined, problem.bias, sinks)
    return problem


def autocast(tensor: Tensor) -> Tensor:
    """Within torch.autocast, the cast that torch's scaled_dot_product_attention makes."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return tensor
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return tensor
    if not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _are_plain(q: Any, k: Any, v: Any) -> bool:
    """Whether padded q, k, v pass all checks, and autocast is off: a quick yes, or no answer."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    shape_q, shape_k, shape_v = q.shape, k.shape, v.shape
    if len(shape_q) != 4 or len(shape_k) != 4 or shape_k[:3] != shape_v[:3] or len(shape_v) != 4:
        return False
    dtype, device = q.dtype, q.device
    heads_kv, head_dim = shape_k[2:]
    return (
        not torch.is_autocast_enabled(device.type)
        and dtype in DTYPES
        and k.dtype == dtype == v.dtype
        and k.device == device == v.device
        and shape_q[0] == shape_k[0]
        and shape_q[3] == head_dim
        and 1 <= head_dim <= MAX_HEAD_DIM
        and 1 <= shape_v[3] <= MAX_HEAD_DIM
        and heads_kv > 0
        and shape_q[2] % heads_kv == 0
    )


def join_causal(mask: Mask | Tensor | None, causal: bool) -> Mask | None:
    """The mask that the arguments `mask` and `causal` are together."""
    joined = None if mask is None else masks.as_mask(mask)
    if not causal:
        return joined
    return CAUSAL if joined is None else joined & CAUSAL


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless attention is defined for the tensor's dtype."""
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {describe(tensor)}"
        )


def check_head_dim(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless the last dimension is one that attention takes."""
    if not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim of {name} must be 1 to {MAX_HEAD_DIM}, got {describe(tensor)}")


def check_values_match(k_name: str, k: Tensor, v_name: str, v: Tensor) -> None:
    """Raises ValueError unless keys and values differ in their last dimension at most."""
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"{v_name} must agree with {k_name} ({describe(k)}) in all but its last dimension, "
            f"got {describe(v)}"
        )


def check_softmax_scale(scale: float | None, head_dim: int) -> float:
    """The factor on q @ k.T, with its default filled in."""
    if scale is None:
        return head_dim**-0.5
    return check_number("softmax_scale", scale, "a finite number, or None for head_dim ** -0.5")


def check_softcap(softcap: float) -> float:
    """The softcap as a float, 0 where there is none."""
    if type(softcap) is float and softcap == 0.0:
        return 0.0
    return check_number("softcap", softcap, "0 (off) or a positive number", low=0.0)


def check_modifiers(
    frame: Frame, mask: Mask | None, bias: Bias | None, sinks: Tensor | None
) -> None:
    """Raises TypeError or ValueError unless mask, bias and sinks fit queries and keys."""
    if mask is not None:
        mask.check(frame)
    if bias is not None:
        bias.check(frame)
    if sinks is not None:
        check_sinks(sinks, frame.num_heads, frame.device)


def check_sinks(sinks: Tensor, num_heads: int, device: torch.device) -> None:
    """Raises TypeError or ValueError unless `sinks` are floating (num_heads,) on the device."""
    check_tensor("sinks", sinks)
    if sinks.shape != (num_heads,) or not sinks.is_floating_point():
        raise ValueError(
            f"sinks must be one logit a head, floating point of shape ({num_heads},), got "
            f"{describe(sinks)}"
        )
    if sinks.device != device:
        raise ValueError(f"sinks must be on {device} like q, got {describe(sinks)}")


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
        check_dtype(name, tensor)
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
    check_values_match("k", k, "v", v)
    if packed is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have the batch size of q, {q.shape[0]}, got {describe(k)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have the head_dim of q, {q.shape[-1]}, got {describe(k)}")
    check_head_dim("q", q)
    check_head_dim("v", v)
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"num_heads of q must be a multiple of num_heads of k, got {q.shape[-2]} and "
            f"{k.shape[-2]}"
        )
    return q, k, v


def _check_dropout(p: float, seed: Tensor | None, device: torch.device) -> Dropout | None:
    if type(p) is float and p == 0.0 and seed is None:
        return None
    p = check_number("dropout_p", p, "a probability in [0, 1)", 0.0, 1.0)
    if seed is not None:
        check_tensor("dropout_seed", seed)
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"dropout_seed must be an int64 tensor of one element on {device} like q, got "
                f"{describe(seed)}"
            )
        seed = seed.reshape(1)
    return Dropout(p, seed) if p > 0 else None
