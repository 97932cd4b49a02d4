"""Attention in plain PyTorch: the specification that every kernel is measured against.

Any floating dtype (float64 is the truth in every parity test), any device, no Triton. It builds the
full score matrix, so it is meant for reading, for verification, and for what nothing faster serves:
it is differentiable twice and in forward mode.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastattn import cache_storage
from fastattn.biases import Bias
from fastattn.cache_problem import CacheProblem
from fastattn.masks import Mask
from fastattn.merge_problem import MergeProblem
from fastattn.problem import AttentionProblem, make_problem


def attention(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """The same as `fastattn.attention`, from its definition. See there for the arguments."""
    problem = make_problem(
        q, k, v, causal=causal, mask=mask, bias=bias, softmax_scale=softmax_scale,
        softcap=softcap, sinks=sinks, dropout_p=dropout_p, dropout_seed=dropout_seed,
        return_lse=return_lse,
    )  # fmt: skip
    out, lse = run(problem)
    out = out.reshape(*q.shape[:-1], v.shape[-1])
    return (out, lse) if return_lse else out


def run(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a checked problem."""
    if problem.dropout is not None:
        problem = replace(problem, dropout=problem.dropout.drawn(problem.q.device))
    if problem.packed is None:
        return _attend(problem)
    pieces = [
        _attend(problem.sequence(index, rows, keys))
        for index, (rows, keys) in enumerate(problem.packed.slices())
    ]
    if not pieces:
        return _attend_nothing(problem)
    out = torch.cat([out[0] for out, _ in pieces], 0)
    lse = torch.cat([lse[0] for _, lse in pieces], 1)
    return out, lse


def _attend_nothing(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Without sequences: no rows, but still part of autograd's graph."""
    q = problem.q
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q[..., :1].expand(-1, -1, problem.v.shape[-1]), q[..., 0].t().to(lse_dtype)


def _attend(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """softmax(modified scores) @ v for operands (batch, row, head, dim)."""
    weights, lse = _softmax(problem)
    if problem.dropout is not None:
        keep = problem.dropout.keep(*weights.shape)
        weights = weights * keep / (1.0 - problem.dropout.p)
    v = _repeat_heads(problem.v, problem.q.shape[2])
    return torch.einsum("bhmn,bnhd->bmhd", weights.to(v.dtype), v), lse


def scores(problem: AttentionProblem) -> Tensor:
    """Modified scores (batch, head, row, key), -inf where a query may not attend.

    The order is scale, softcap, biases, masks.
    """
    q, k = problem.q, _repeat_heads(problem.k, problem.q.shape[2])
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    score = torch.einsum("bmhd,bnhd->bhmn", q, k) * problem.softmax_scale
    if problem.softcap > 0:
        score = problem.softcap * torch.tanh(score / problem.softcap)
    if problem.bias is not None:
        score = score + problem.bias.dense(seqlen_q, seqlen_k, score.dtype)
    if problem.mask is not None:
        visible = problem.mask.dense(seqlen_q, seqlen_k, score.device)
        score = score.masked_fill(~visible, float("-inf"))
    return score


def _softmax(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp; at least float32. A sink joins the sum and gets no weight.

    A row that sees nothing has weights 0 and log-sum-exp -inf (with a sink, the sink's logit).
    """
    score = scores(problem)
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    sinks = None
    if problem.sinks is not None:
        sinks = problem.sinks.to(score.dtype)[:, None, None]
    largest = score.detach().amax(-1, keepdim=True) if score.shape[-1] else _no_keys(score)
    if sinks is not None:
        largest = torch.maximum(largest, sinks.detach())
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    exponentials = torch.exp(score - largest)
    total = exponentials.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - largest)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (torch.log(total) + largest).masked_fill(empty, float("-inf"))
    return exponentials / total, lse.squeeze(-1)


def _no_keys(score: Tensor) -> Tensor:
    return score.new_full((*score.shape[:-1], 1), float("-inf"))


def _repeat_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """Grouped heads spelled out: head h of q uses head h // group of k and v."""
    return tensor.repeat_interleave(num_heads // tensor.shape[2], dim=2)


def attention_weights(
    problem: AttentionProblem,
    lse: Tensor | None,
    heads: Tensor | None,
    rows: Tensor | None,
    average_heads: bool,
) -> Tensor:
    """Weights (batch, heads, rows, keys) of chosen heads and rows, or averaged over those heads.

    With `lse`, the weights are exp(score - lse), as the kernel computes them.
    """
    if problem.packed is None:
        return _weights(problem, lse, heads, rows, average_heads)
    seqlen_q, seqlen_k = problem.frame_seqlens
    pieces = []
    for index, (own_rows, own_keys) in enumerate(problem.packed.slices()):
        own_lse = None if lse is None else lse[None, :, own_rows]
        piece = _weights(
            problem.sequence(index, own_rows, own_keys), own_lse, heads, None, average_heads
        )
        padding = (0, seqlen_k - piece.shape[-1], 0, seqlen_q - piece.shape[-2])
        pieces.append(torch.nn.functional.pad(piece, padding))
    weights = torch.cat(pieces, 0)
    return weights if rows is None else weights.index_select(-2, rows)


def _weights(
    problem: AttentionProblem,
    lse: Tensor | None,
    heads: Tensor | None,
    rows: Tensor | None,
    average_heads: bool,
) -> Tensor:
    if lse is None:
        weights, _ = _softmax(problem)
    else:
        score = scores(problem)
        score = score.to(lse.dtype)
        weights = torch.exp(score - lse[..., None]).masked_fill(score == float("-inf"), 0.0)
    if heads is not None:
        weights = weights.index_select(1, heads)
    if rows is not None:
        weights = weights.index_select(2, rows)
    return weights.mean(1) if average_heads else weights


def run_with_cache(problem: CacheProblem) -> tuple[Tensor, Tensor]:
    """Appends the new tokens, then attends row by row; output and log-sum-exp."""
    problem = cache_storage.rotate(problem)
    cache_storage.append(problem)
    q = problem.q
    assert q is not None  # append_to_kv_cache does not come here
    shape = (*q.shape[:-1], problem.cache.v.shape[-1])
    out = q.new_empty(shape)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty((shape[0], shape[2], shape[1]), dtype=lse_dtype)
    for index, total in enumerate(problem.totals()):
        k, v = cache_storage.gather(problem.cache, index, total, q.dtype)
        own, own_lse = _attend(problem.row(index, total, k, v))
        out[index], lse[index] = own[0], own_lse[0]
    return out, lse


def merge(problem: MergeProblem) -> tuple[Tensor, Tensor]:
    """The state over both sets of keys: means weighted by exp(lse), -inf being weight 0."""
    a, b = problem.lse_a, problem.lse_b
    largest = torch.maximum(a, b).detach()
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    weight_a, weight_b = torch.exp(a - largest), torch.exp(b - largest)
    total = weight_a + weight_b
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (torch.log(total) + largest).masked_fill(empty, float("-inf"))
    parts = []
    for out, own, weight in (
        (problem.out_a, a, weight_a), (problem.out_b, b, weight_b),
    ):  # fmt: skip
        weight, absent = (
            x.transpose(-1, -2)[..., None] for x in (weight / total, own == -torch.inf)
        )
        # Not weight * out: what a part without keys holds may be NaN.
        parts.append(out.to(weight.dtype).masked_fill(absent, 0.0) * weight)
    return (parts[0] + parts[1]).to(problem.out_a.dtype), lse
