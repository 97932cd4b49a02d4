"""Attention by torch's own scaled_dot_product_attention: the fast path on CPU.

Masks and biases become the one dense mask that SDPA takes. Padded and packed batches are cut into
their sequences instead, so that padding costs nothing; that reads the lengths on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastattn import masks
from fastattn.masks import DenseMask, Joined, Lengths, Mask, Packed
from fastattn.problem import AttentionProblem
from fastattn.validation import values_readable


def unsupported_reasons(problem: AttentionProblem) -> list[str]:
    """Why SDPA cannot serve a problem; empty if it can."""
    reasons = []
    if problem.softmax_scale <= 0:
        # It takes the scale's square root, or scales a causal mask's -inf.
        reasons.append(
            "torch's scaled_dot_product_attention gives NaN where softmax_scale is not positive "
            f"({problem.softmax_scale})"
        )
    if problem.softcap > 0:
        reasons.append("softcap is not in torch's scaled_dot_product_attention")
    if problem.sinks is not None:
        reasons.append("sinks are not in torch's scaled_dot_product_attention")
    if problem.dropout is not None and problem.dropout.seed is not None:
        reasons.append("torch's scaled_dot_product_attention takes no seed for its dropout")
    if problem.has_tangents:
        reasons.append("torch's scaled_dot_product_attention has no forward-mode derivative")
    if problem.return_lse:
        reasons.append("torch's scaled_dot_product_attention does not return the log-sum-exp")
    return reasons


def run(problem: AttentionProblem) -> Tensor:
    """Output of a checked problem."""
    if problem.packed is not None:
        pieces = [_attend(sequence)[0] for sequence in _sequences(problem, problem.packed)]
        # Without sequences there are no rows, but they are still part of autograd's graph.
        no_rows = problem.q[..., :1].expand(-1, -1, problem.v.shape[-1])
        return torch.cat(pieces) if pieces else no_rows
    lengths = _lengths(problem.mask)
    on_host = problem.q.device.type == "cpu" and not torch.compiler.is_compiling()
    if lengths is None or not on_host or problem.num_sequences == 0:
        return _attend(problem)
    return _attend_by_sequence(problem, lengths)


def _sequences(problem: AttentionProblem, packed: Packed) -> Iterator[AttentionProblem]:
    """Each packed sequence as a problem of its own.

    Operands are split at once and not sliced one by one: autograd gives each slice a gradient of
    the whole's size.
    """
    slices = packed.slices()
    if not slices:
        return
    lengths_q, lengths_k = ([s.stop - s.start for s in one] for one in zip(*slices, strict=True))
    operands = zip(
        problem.q.split(lengths_q), problem.k.split(lengths_k), problem.v.split(lengths_k),
        strict=True,
    )  # fmt: skip
    for index, (own, (q, k, v)) in enumerate(zip(slices, operands, strict=True)):
        yield replace(problem.sequence(index, *own), q=q[None], k=k[None], v=v[None])


def _lengths(mask: Mask | None) -> Lengths | None:
    parts = mask.parts if isinstance(mask, Joined) else (mask,)
    return next((part for part in parts if isinstance(part, Lengths)), None)


def _attend_by_sequence(problem: AttentionProblem, lengths: Lengths) -> Tensor:
    """A padded batch, each sequence by itself and without its padding."""
    batch, seqlen_q, seqlen_k = problem.q.shape[0], problem.q.shape[1], problem.k.shape[1]
    parts = masks.take_apart(lengths)
    ends = parts.seqlens_k.tolist()  # type: ignore[union-attr]
    starts = [0] * batch if parts.starts_k is None else parts.starts_k.tolist()
    rows = [seqlen_q] * batch if parts.seqlens_q is None else parts.seqlens_q.tolist()
    mask = _without(problem.mask, lengths)
    # Split at once, as in `_sequences`.
    operands = zip(problem.q.split(1), problem.k.split(1), problem.v.split(1), strict=True)
    pieces = []
    for index, (q, k, v) in enumerate(operands):
        live, live_keys = rows[index], slice(starts[index], max(starts[index], ends[index]))
        # Positions are those of the padded tensors: masks are drawn there, then cut.
        own_mask, own_bias = None, None
        if mask is not None:
            dense = mask.at(index, seqlen_q, seqlen_k).dense(seqlen_q, seqlen_k, problem.q.device)
            own_mask = DenseMask(dense[:, :, :live, live_keys])
        if problem.bias is not None:
            bias = problem.bias.at(index, seqlen_q, seqlen_k)
            dense = bias.dense(seqlen_q, seqlen_k, problem.q.dtype)
            own_bias = dense[:, :, :live, live_keys]
        piece = _scaled_dot_product(
            q[:, :live], k[:, live_keys], v[:, live_keys], own_mask, own_bias, problem
        )
        padding = (0, 0, 0, 0, 0, seqlen_q - live)
        pieces.append(piece if live == seqlen_q else torch.nn.functional.pad(piece, padding))
    return torch.cat(pieces)


def _without(mask: Mask | None, part: Mask) -> Mask | None:
    if not isinstance(mask, Joined):
        return None
    rest = tuple(other for other in mask.parts if other is not part)
    return Joined(rest) if rest else None


def _attend(problem: AttentionProblem) -> Tensor:
    seqlen_q, seqlen_k = problem.q.shape[1], problem.k.shape[1]
    bias = None
    if problem.bias is not None:
        bias = problem.bias.dense(seqlen_q, seqlen_k, problem.q.dtype)
    return _scaled_dot_product(problem.q, problem.k, problem.v, problem.mask, bias, problem)


def _scaled_dot_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    bias: Tensor | None,
    problem: AttentionProblem,
) -> Tensor:
    """SDPA in the public layout (batch, seqlen, num_heads, head_dim)."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    # SDPA's causal flag is aligned top-left: the same as ours only for a square problem.
    causal = isinstance(mask, masks.Causal) and seqlen_q == seqlen_k and bias is None
    if isinstance(mask, masks.Causal) and seqlen_q == 1:
        mask = None
    visible = None
    if mask is not None and not causal:
        visible = mask.dense(seqlen_q, seqlen_k, q.device)
    attn_mask = visible if bias is None else _merge(bias, visible)
    out = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=attn_mask,
        dropout_p=0.0 if problem.dropout is None else problem.dropout.p,
        is_causal=causal,
        scale=problem.softmax_scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
    if visible is None:
        return out
    # What a row without keys gives differs between SDPA's backends; here it is 0.
    some = visible.any(-1)[..., None].transpose(1, 2)
    if values_readable(some) and bool(some.all()):
        return out
    return torch.where(some, out, 0.0)


def _merge(bias: Tensor, visible: Tensor | None) -> Tensor:
    return bias if visible is None else bias.masked_fill(~visible, float("-inf"))
