"""Attention by torch's own scaled_dot_product_attention: the fast path on CPU.

Masks and biases become the one dense mask that SDPA takes. Padded and packed batches are cut into
their sequences instead, so that padding costs nothing; that reads the lengths on the host. So do
calls on a cache: neighboring rows of one length are attended together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastattn import cache_storage, masks
from fastattn.biases import ALiBi, Bias, DenseBias, JoinedBias, T5Bias
from fastattn.cache_problem import CacheProblem
from fastattn.masks import DenseMask, Joined, Lengths, Mask, MaskParts, Packed, Window
from fastattn.problem import AttentionProblem
from fastattn.validation import values_readable


def unsupported_reasons(problem: AttentionProblem | CacheProblem) -> list[str]:
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
    if isinstance(problem, CacheProblem):
        if problem.batch_invariant:
            reasons.append(
                "torch's scaled_dot_product_attention does not promise the same bits in batches of "
                "other sizes (batch_invariant)"
            )
    else:
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
        pieces = [_attend(one).flatten(0, 1) for one in _packed_runs(problem, problem.packed)]
        # Without sequences there are no rows, but they are still part of autograd's graph.
        no_rows = problem.q[..., :1].expand(-1, -1, problem.v.shape[-1])
        return torch.cat(pieces) if pieces else no_rows
    lengths = _lengths(problem.mask)
    on_host = problem.q.device.type == "cpu" and not torch.compiler.is_compiling()
    if lengths is None or not on_host or problem.num_sequences == 0:
        return _attend(problem)
    return _attend_by_sequence(problem, lengths)


def _packed_runs(problem: AttentionProblem, packed: Packed) -> Iterator[AttentionProblem]:
    """The packed sequences as padded problems: neighbors of equal lengths are one batch.

    Operands are split at once and not sliced one by one: autograd gives each slice a gradient of
    the whole's size.
    """
    others = _without(problem.mask, packed)
    rest: Mask | None = others
    if others is not None and len(others.parts) == 1:
        rest = others.parts[0]
    alike = (rest is None or _same_for_all(rest)) and (
        problem.bias is None or _same_for_all(problem.bias)
    )
    runs: list[tuple[int, int, int, int]] = []  # first sequence, how many, lengths of each
    for index, (rows, keys) in enumerate(packed.slices()):
        lengths = (rows.stop - rows.start, keys.stop - keys.start)
        if alike and runs and runs[-1][2:] == lengths:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, *lengths)
        else:
            runs.append((index, 1, *lengths))
    if not runs:
        return
    rows_of_runs = [count * seqlen_q for _, count, seqlen_q, _ in runs]
    keys_of_runs = [count * seqlen_k for _, count, _, seqlen_k in runs]
    operands = zip(
        problem.q.split(rows_of_runs), problem.k.split(keys_of_runs),
        problem.v.split(keys_of_runs), strict=True,
    )  # fmt: skip
    for (index, count, seqlen_q, seqlen_k), (q, k, v) in zip(runs, operands, strict=True):
        yield replace(
            problem,
            q=q.unflatten(0, (count, seqlen_q)),
            k=k.unflatten(0, (count, seqlen_k)),
            v=v.unflatten(0, (count, seqlen_k)),
            mask=None if rest is None else rest.at(index, seqlen_q, seqlen_k),
            bias=None if problem.bias is None else problem.bias.at(index, seqlen_q, seqlen_k),
            packed=None,
            dropout=None if problem.dropout is None else problem.dropout.at(index),
        )


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


def _without(mask: Mask | None, part: Mask) -> Joined | None:
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


@dataclass(frozen=True)
class _Run:
    """Neighboring rows of a cache that are alike: `total` tokens, of which any query sees `keys`.

    Query rows from `live` on are padding.
    """

    rows: slice
    total: int
    keys: slice
    live: int


def run_with_cache(problem: CacheProblem) -> Tensor:
    """Appends the new tokens, then attends; the output."""
    problem = cache_storage.rotate(problem)
    cache_storage.append(problem)
    q = problem.q
    assert q is not None  # append_to_kv_cache does not come here
    cache, parts = problem.cache, masks.take_apart(problem.mask)
    out_shape = (*q.shape[:-1], cache.v.shape[-1])
    if q.numel() == 0:
        return q.new_zeros(out_shape)
    pieces, runs = [], _runs(problem, parts)
    for run in runs:
        own = q if len(runs) == 1 else q[run.rows]
        if run.keys.start >= run.keys.stop or run.live == 0:
            pieces.append(own.new_zeros((*own.shape[:-1], out_shape[-1])))
            continue
        k, v = cache_storage.gather_rows(cache, run.rows, run.keys, q.dtype)
        pieces.append(_attend_run(problem, parts, run, own, k, v))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).contiguous()


def _runs(problem: CacheProblem, parts: MaskParts) -> list[_Run]:
    seqlen_q = problem.seqlen_q
    totals = problem.totals()
    if problem.mask is None and totals.count(totals[0]) == len(totals):
        return [_Run(slice(0, len(totals)), totals[0], slice(0, totals[0]), seqlen_q)]
    starts, ends, lives = (
        None if tensor is None else tensor.tolist()
        for tensor in (parts.starts_k, parts.seqlens_k, parts.seqlens_q)
    )
    # A prefix cuts nothing off the interval that a row's queries see together: the last sees all.
    left, right = parts.window_left, parts.window_right
    runs: list[_Run] = []
    for index, total in enumerate(totals):
        start = 0 if starts is None else starts[index]
        end = total if ends is None else min(total, ends[index])
        live = seqlen_q if lives is None else lives[index]
        if left >= 0:
            start = max(start, total - seqlen_q - left)
        if right >= 0:
            end = min(end, total - seqlen_q + live + right)
        keys = slice(start, max(start, end))
        if runs and (runs[-1].total, runs[-1].keys, runs[-1].live) == (total, keys, live):
            runs[-1] = _Run(slice(runs[-1].rows.start, index + 1), total, keys, live)
        else:
            runs.append(_Run(slice(index, index + 1), total, keys, live))
    return runs


def _attend_run(
    problem: CacheProblem, parts: MaskParts, run: _Run, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Some rows of the batch; q (rows, seqlen_q, ...), and k and v (rows, run.keys, ...)."""
    seqlen_q, total, keys = q.shape[1], run.total, run.keys
    # What a single query sees is an interval, and its keys are already cut to it.
    cuts = seqlen_q > 1 and (
        0 <= parts.window_left < total or parts.window_right >= 0 or parts.prefix is not None
    )
    bias = None
    if problem.bias is not None:
        bias = _dense_bias(problem.bias, run, seqlen_q, q.dtype)
    if bias is None and parts.mask is None and _is_square_causal(parts, run, seqlen_q):
        # Rows before the first key, of a prompt padded on its left, see nothing.
        out = _cached_scaled_dot_product(
            q[:, keys.start :], k, v, None, problem.softmax_scale, causal=True
        )
        return torch.nn.functional.pad(out, (0, 0, 0, 0, keys.start, 0)) if keys.start else out
    visible = None
    if cuts or parts.mask is not None:
        assert problem.mask is not None  # it has the parts
        visible = _dense_mask(problem.mask, run, seqlen_q, q.device)
    attn_mask = visible if bias is None else _merge(bias, visible)
    out = _cached_scaled_dot_product(
        q[:, : run.live], k, v, attn_mask, problem.softmax_scale, causal=False
    )
    if visible is not None:
        some = visible.any(-1)[..., None].transpose(1, 2)
        if not (values_readable(some) and bool(some.all())):
            out = torch.where(some, out, 0.0)
    padding = seqlen_q - run.live
    return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, padding)) if padding else out


def _is_square_causal(parts: MaskParts, run: _Run, seqlen_q: int) -> bool:
    """Whether all that is masked is what SDPA's own causal flag masks."""
    causal = parts.window_right == 0 and not 0 <= parts.window_left < run.total - 1
    whole = run.total == seqlen_q == run.live == run.keys.stop
    return causal and whole and parts.prefix is None and seqlen_q > 1


def _dense_mask(mask: Mask, run: _Run, seqlen_q: int, device: torch.device) -> Tensor:
    rows = run.rows
    indices = [rows.start] if _same_for_all(mask) else range(rows.start, rows.stop)
    pieces = [
        mask.at(index, seqlen_q, run.total).dense(seqlen_q, run.total, device) for index in indices
    ]
    dense = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return dense[:, :, : run.live, run.keys]


def _dense_bias(bias: Bias, run: _Run, seqlen_q: int, dtype: torch.dtype) -> Tensor:
    rows = run.rows
    indices = [rows.start] if _same_for_all(bias) else range(rows.start, rows.stop)
    pieces = [
        bias.at(index, seqlen_q, run.total).dense(seqlen_q, run.total, dtype) for index in indices
    ]
    dense = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return dense[:, :, : run.live, run.keys]


def _same_for_all(value: Mask | Bias) -> bool:
    """Whether a mask or bias is the same for all rows of equal length, for sure."""
    if isinstance(value, (Joined, JoinedBias)):
        return all(_same_for_all(part) for part in value.parts)
    if isinstance(value, (DenseMask, DenseBias)):
        return value.tensor.dim() < 4 or value.tensor.shape[0] == 1
    if isinstance(value, ALiBi):
        return value.slopes.dim() == 1 or value.slopes.shape[0] == 1
    return isinstance(value, (Window, T5Bias))


def _cached_scaled_dot_product(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """SDPA in the public layout, q (rows, seqlen_q, num_heads, head_dim)."""
    rows, seqlen_q, num_heads, _ = q.shape
    num_heads_kv = k.shape[2]
    group = num_heads // num_heads_kv
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if seqlen_q == 1 and group > 1:
        # The heads that share keys become the query rows of one head: no key is read twice.
        if attn_mask is not None and attn_mask.shape[1] > 1:
            attn_mask = attn_mask.reshape(-1, num_heads_kv, group, attn_mask.shape[-1])
        folded = q.reshape(rows, num_heads_kv, group, -1)
        out = scaled_dot_product_attention(folded, k, v, attn_mask=attn_mask, scale=scale)
        return out.reshape(rows, 1, num_heads, -1)
    return scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=attn_mask, is_causal=causal, scale=scale,
        enable_gqa=group > 1,
    ).transpose(1, 2)  # fmt: skip
