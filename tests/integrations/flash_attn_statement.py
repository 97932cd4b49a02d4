"""A plain statement of what flash_attn computes, in torch and in any dtype."""

import math

import torch


def plain(
    q, k, v, *, causal=False, window_size=(-1, -1), softmax_scale=None, softcap=0.0,
    alibi_slopes=None,
):  # fmt: skip
    """flash_attn's semantics for one sequence, q (rows, heads, dim); output and log-sum-exp."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("mhd,nhd->hmn", q, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    row = torch.arange(q.shape[0])[:, None] + (k.shape[0] - q.shape[0])
    column = torch.arange(k.shape[0])
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None].to(q.dtype) * (row - column).abs()
    left, right = window_size
    right = 0 if causal else right
    hidden = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    if left >= 0:
        hidden |= column < row - left
    if right >= 0:
        hidden |= column > row + right
    scores = scores.masked_fill(hidden, -math.inf)
    seen = ~hidden.all(-1)
    weights = scores.softmax(-1).masked_fill(~seen[:, None], 0.0)
    lse = scores.double().logsumexp(-1).to(torch.promote_types(q.dtype, torch.float32))
    return torch.einsum("hmn,nhd->mhd", weights, v), lse


def plain_batch(q, k, v, alibi_slopes=None, **options):
    rows = []
    for index in range(q.shape[0]):
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[index]
        rows.append(plain(q[index], k[index], v[index], alibi_slopes=slopes, **options))
    return torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows])


def plain_varlen(q, k, v, cu_q, cu_k, alibi_slopes=None, **options):
    outs, lses = [], []
    for index, (a, b, c, d) in enumerate(
        zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True)
    ):
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[index]
        out, lse = plain(q[a:b], k[c:d], v[c:d], alibi_slopes=slopes, **options)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, 1)
