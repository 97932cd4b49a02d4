"""The `fastattn::` operators of decoding: attention over a cache, appending to it, merging.

Beside `torch_ops` the only file that imports kernels. The operators write into the caches they are
given, which their schemas say, so that torch.compile keeps the order of things.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.cache_problem import CacheProblem
from fastattn.torch_ops import (
    LIBRARY,
    MODIFIERS,
    NAMES,
    empty,
    flat_modifiers,
    input_precision,
    kernels,
    on_device,
    zero_counters,
)

_CACHE = (
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor? k, "
    "Tensor? v, Tensor? cache_seqlens, Tensor? block_table, Tensor? cos, Tensor? sin, "
    "Tensor? positions, bool interleaved"
)
_CACHE_SIZE = _CACHE.count(",") + 1

LIBRARY.define(
    f"attention_with_kv_cache(Tensor q, {_CACHE}, bool batch_invariant, bool return_lse, "
    f"{MODIFIERS}) -> (Tensor, Tensor)"
)
LIBRARY.define(f"append_to_kv_cache({_CACHE}) -> ()")
LIBRARY.define(
    "merge_attention_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) "
    "-> (Tensor, Tensor)"
)


def attention_with_kv_cache(problem: CacheProblem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (empty unless asked for) of a problem, which appends what is new."""
    return torch.ops.fastattn.attention_with_kv_cache(*flat_arguments(problem))


def flat_arguments(problem: CacheProblem) -> tuple[Any, ...]:
    """A problem as the operator takes it."""
    flags = (problem.batch_invariant, problem.return_lse)
    return (problem.q, *_cache(problem), *flags, *flat_modifiers(problem))


def append_to_kv_cache(problem: CacheProblem) -> None:
    """Writes the new keys and values of a problem into its cache."""
    torch.ops.fastattn.append_to_kv_cache(*_cache(problem))


def merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, joined; differentiable."""
    return torch.ops.fastattn.merge_attention_states(out_a, lse_a, out_b, lse_b)


def _cache(problem: CacheProblem) -> list[Any]:
    cache, rotary = problem.cache, problem.rotary
    return [
        cache.k,
        cache.v,
        cache.k_scale,
        cache.v_scale,
        problem.k,
        problem.v,
        cache.seqlens,
        cache.block_table,
        None if rotary is None else rotary.cos,
        None if rotary is None else rotary.sin,
        None if rotary is None else rotary.positions,
        rotary is not None and rotary.interleaved,
    ]


def _cached_keys(cache: tuple[Any, ...]) -> Any:
    """The operators' flat arguments as the launchers take them."""
    k, v, *others = cache
    return kernels().CachedKeys(kernels().readable(k), kernels().readable(v), *others)


def _note_writing(flat: tuple[Any, ...]) -> None:
    """Tells autograd that caches change, should one of them be saved for a backward pass."""
    k_cache, v_cache, _, _, k, *_ = flat
    if k is not None and not k_cache.is_inference():
        torch.autograd.graph.increment_version((k_cache, v_cache))


@torch.library.impl(LIBRARY, "attention_with_kv_cache", "CompositeExplicitAutograd")
def _attention_with_kv_cache(q: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    batch_invariant, return_lse, *modifiers = flat[_CACHE_SIZE:]
    attention = kernels()
    cached = _cached_keys(flat[:_CACHE_SIZE])
    changes = attention.Modifiers(**dict(zip(NAMES, modifiers, strict=True)))
    config = attention.select_decode_config(q, cached, changes, batch_invariant)
    batch, seqlen_q, num_heads, _ = q.shape
    head_dim_v = cached.v.shape[-1]
    out = empty(q, (batch, seqlen_q, num_heads, head_dim_v), q.dtype)
    lse = empty(q, (batch, num_heads, seqlen_q) if return_lse else (0,), torch.float32)
    partial_out = partial_lse = counters = None
    if (parts := config.num_splits * batch) > batch:
        partial_out = empty(q, (parts, seqlen_q, num_heads, head_dim_v), torch.float32)
        partial_lse = empty(q, (parts, num_heads, seqlen_q), torch.float32)
    if config.last_combines:
        counters = zero_counters(q, config.num_counters(q, cached))
    _note_writing(flat)
    with on_device(q):
        attention.launch_attention_decode(
            q,
            cached,
            out,
            lse if return_lse else None,
            changes,
            config,
            partial_out=partial_out,
            partial_lse=partial_lse,
            counters=counters,
            input_precision=input_precision(q.dtype),
        )
    return out, lse


@torch.library.register_fake("fastattn::attention_with_kv_cache")
def _fake_attention_with_kv_cache(q: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    _, return_lse, *_ = flat[_CACHE_SIZE:]
    batch, seqlen_q, num_heads, _ = q.shape
    lse = (batch, num_heads, seqlen_q) if return_lse else (0,)
    return (
        q.new_empty((batch, seqlen_q, num_heads, flat[1].shape[-1])),
        q.new_empty(lse, dtype=torch.float32),
    )


@torch.library.impl(LIBRARY, "append_to_kv_cache", "CompositeExplicitAutograd")
def _append_to_kv_cache(*flat: Any) -> None:
    _note_writing(flat)
    with on_device(flat[0]):
        kernels().launch_append(_cached_keys(flat))


@torch.library.register_fake("fastattn::append_to_kv_cache")
def _fake_append_to_kv_cache(*flat: Any) -> None:
    return None


@torch.library.impl(LIBRARY, "merge_attention_states", "CompositeExplicitAutograd")
def _merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    out = empty(out_a, tuple(out_a.shape), out_a.dtype)
    lse = empty(lse_a, tuple(lse_a.shape), torch.float32)
    with on_device(out_a):
        kernels().launch_merge_states(out_a, lse_a, out_b, lse_b, out, lse)
    return out, lse


@torch.library.register_fake("fastattn::merge_attention_states")
def _fake_merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _save_states(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _merge_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    """With w_i = exp(lse_i - lse): dout_i = w_i dout, dlse_i = w_i (dout (out_i - out) + dlse)."""
    out_a, lse_a, out_b, lse_b, out, lse = ctx.saved_tensors
    gradients: list[Tensor | None] = []
    for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        absent = part_lse == float("-inf")
        weight = torch.exp(part_lse - lse).masked_fill(absent, 0.0)
        dpart, dpart_lse = None, torch.zeros_like(part_lse)
        if dout is not None:
            by_row = weight.transpose(-1, -2)[..., None]
            dpart = (by_row * dout).to(part.dtype)
            difference = (part.float() - out.float()).masked_fill(by_row == 0, 0.0)
            dpart_lse = (dout * difference).sum(-1).transpose(-1, -2)
        if dlse is not None:
            dpart_lse = dpart_lse + dlse
        gradients += [dpart, (weight * dpart_lse).masked_fill(absent, 0.0)]
    return tuple(gradients)


torch.library.register_autograd(
    "fastattn::merge_attention_states", _merge_backward, setup_context=_save_states
)
