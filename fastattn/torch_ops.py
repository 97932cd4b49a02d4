"""The `fastattn::` operators: schemas, fake implementations, and the launch of kernels.

Beside `torch_decode_ops` the only file that imports kernels, and it does so when one is first
needed. torch.compile and torch.export see one opaque operator a call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastattn import biases, masks
from fastattn.cache_problem import CacheProblem
from fastattn.problem import CAUSAL, AttentionProblem
from fastattn.testing.interpreter import is_interpreting
from fastattn.validation import device_checks_enabled

LIBRARY = torch.library.Library("fastattn", "DEF")

# The flat form of masks and biases, in the order of the schemas; names are those of `Modifiers`.
_SCALARS = (
    ("softmax_scale", "float"), ("softcap", "float"), ("dropout_p", "float"),
    ("window_left", "int"), ("window_right", "int"), ("max_seqlen_q", "SymInt"),
    ("max_seqlen_k", "SymInt"),
)  # fmt: skip
_TENSORS = (
    "cu_seqlens_q", "cu_seqlens_k", "seqlens_q", "seqlens_k", "starts_k", "prefix", "mask",
    "bias", "alibi_slopes", "relative_bias", "sinks", "dropout_seed",
)  # fmt: skip
NAMES = tuple(name for name, _ in _SCALARS) + _TENSORS
MODIFIERS = ", ".join(
    [f"{kind} {name}" for name, kind in _SCALARS] + [f"Tensor? {name}" for name in _TENSORS]
)

# What has a gradient, in the order of the backward operator's results.
_DIFFERENTIABLE = ("q", "k", "v", "bias", "relative_bias", "sinks")

LIBRARY.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, bool return_lse, bool save_softmax, "
    f"{MODIFIERS}) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor softmax_stats, bool[] needed, {MODIFIERS}) -> ({', '.join(['Tensor'] * 6)})"
)
LIBRARY.define(
    "attention_weights(Tensor q, Tensor k, Tensor lse, Tensor? heads, Tensor? rows, bool average, "
    f"{MODIFIERS}) -> Tensor"
)


def attention_forward(problem: AttentionProblem) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp (None or empty unless asked for) of a problem, by the forward kernel.

    Where nobody but the kernel needs to see the operator, the kernel is launched without it: torch
    takes longer to dispatch an operator of this many arguments than all the rest here together.
    """
    q, k, v, return_lse = problem.q, problem.k, problem.v, problem.return_lse
    requires_grad = problem.requires_grad
    modifiers = flat_modifiers(problem)
    if _is_eager(q, k, v, *modifiers[len(_SCALARS) :]):
        if requires_grad:
            return _Eager.apply(q, k, v, return_lse, True, *modifiers)  # type: ignore[no-untyped-call]
        out, lse, _ = _forward(q, k, v, return_lse, False, modifiers)
        return out, lse
    out, lse, _ = torch.ops.fastattn.attention_forward(
        q, k, v, return_lse, requires_grad, *modifiers
    )
    return out, lse


def _is_eager(*tensors: Tensor | None) -> bool:
    """Whether nobody but the kernel needs to see the operator: no graph, mode, transform."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    if torch._C._autograd._profiler_enabled():  # profiles name the operator
        return False
    for tensor in tensors:
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not Parameter:
            return False
    return True


def attention_weights(
    problem: AttentionProblem,
    lse: Tensor,
    heads: Tensor | None,
    rows: Tensor | None,
    average: bool,
) -> Tensor:
    """Weights (batch, heads, rows, keys), averaged (batch, rows, keys), by the weights kernel."""
    weights = torch.ops.fastattn.attention_weights(
        problem.q, problem.k, lse, heads, rows, average, *flat_modifiers(problem)
    )
    return weights[:, 0] if average else weights


_NO_MASK = masks.MaskParts()
_CAUSAL = masks.take_apart(CAUSAL)
_NO_BIAS = biases.BiasParts()


def flat_modifiers(problem: AttentionProblem | CacheProblem) -> list[Any]:
    """Masks and biases flattened into the operators' arguments."""
    dropout = problem.dropout if isinstance(problem, AttentionProblem) else None
    if dropout is not None:
        dropout = dropout.drawn(problem.device)
    mask, bias = problem.mask, problem.bias
    if mask is None:
        parts = _NO_MASK
    else:
        parts = _CAUSAL if mask is CAUSAL else masks.take_apart(mask)
    added = _NO_BIAS if bias is None else biases.take_apart(bias)
    return [  # in the order of NAMES
        problem.softmax_scale, problem.softcap, 0.0 if dropout is None else dropout.p,
        parts.window_left, parts.window_right, parts.max_seqlen_q, parts.max_seqlen_k,
        parts.cu_seqlens_q, parts.cu_seqlens_k, parts.seqlens_q, parts.seqlens_k, parts.starts_k,
        parts.prefix, parts.mask, added.bias, added.alibi_slopes, added.relative_bias,
        problem.sinks, None if dropout is None else dropout.seed,
    ]  # fmt: skip


@functools.cache
def kernels() -> ModuleType:
    """The kernel package, imported once; under the interpreter, after it has been repaired."""
    if is_interpreting():
        from fastattn.testing.interpreter import repair

        repair()
    from fastattn.kernels import attention

    return attention


def input_precision(dtype: torch.dtype) -> str:
    """float32 products are exact float32 unless the user allowed TensorFloat32 in torch."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


_NO_DEVICE = contextlib.nullcontext()


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else _NO_DEVICE


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An output, full of NaN where the user asked for checks on the device."""
    tensor = like.new_empty(shape, dtype=dtype)
    return tensor.fill_(float("nan")) if device_checks_enabled() else tensor


def zero_counters(like: Tensor, size: int) -> Tensor:
    """Zeros that a launch leaves as zeros: kept for each stream, whose launches follow each other.

    A graph being captured gets its own, since it may be replayed beside anything.
    """
    if not like.is_cuda or torch.cuda.is_current_stream_capturing():
        return like.new_zeros(size, dtype=torch.int32)
    stream = torch.cuda.current_stream(like.device).cuda_stream
    return _kept_zeros(like.device, stream, 1 << max(size - 1, 4095).bit_length())


@functools.lru_cache(maxsize=64)
def _kept_zeros(device: torch.device, stream: int, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)


def _forward_shapes(
    q: Tensor, v: Tensor, return_lse: bool, save_softmax: bool, packed: bool
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of out, lse and the saved softmax."""
    rows = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    return (
        (*q.shape[:-1], v.shape[-1]),
        rows if return_lse else (0,),
        (2, *rows) if save_softmax else (0,),
    )


@torch.library.impl(LIBRARY, "attention_forward", "CompositeExplicitAutograd")
def _attention_forward(
    q: Tensor, k: Tensor, v: Tensor, return_lse: bool, save_softmax: bool, *modifiers: Any
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, softmax_stats = _forward(q, k, v, return_lse, save_softmax, modifiers)
    # An operator's results must be tensors, no two of them the same.
    lse, softmax_stats = (
        q.new_empty(0, dtype=torch.float32) if tensor is None else tensor
        for tensor in (lse, softmax_stats)
    )
    return out, lse, softmax_stats


def _forward(
    q: Tensor, k: Tensor, v: Tensor, return_lse: bool, save_softmax: bool, modifiers: Sequence[Any]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The launch; out, and lse and the saved softmax where they are asked for."""
    attention = kernels()
    flat = attention.Modifiers(*modifiers)  # its fields are in the order of NAMES
    out = empty(q, (*q.shape[:-1], v.shape[-1]), q.dtype)
    lse = softmax_stats = None
    if return_lse or save_softmax:
        packed = flat.cu_seqlens_q is not None
        _, lse_shape, stats_shape = _forward_shapes(q, v, return_lse, save_softmax, packed)
        lse = empty(q, lse_shape, torch.float32) if return_lse else None
        softmax_stats = empty(q, stats_shape, torch.float32) if save_softmax else None
    with on_device(q):
        attention.launch_attention_forward(
            q,
            k,
            v,
            out,
            lse,
            flat,
            softmax_stats=softmax_stats,
            input_precision=input_precision(q.dtype),
        )
    return out, lse, softmax_stats


@torch.library.register_fake("fastattn::attention_forward")
def _fake_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, return_lse: bool, save_softmax: bool, *modifiers: Any
) -> tuple[Tensor, Tensor, Tensor]:
    packed = modifiers[NAMES.index("cu_seqlens_q")] is not None
    out, lse, stats = _forward_shapes(q, v, return_lse, save_softmax, packed)
    return (
        q.new_empty(out),
        q.new_empty(lse, dtype=torch.float32),
        q.new_empty(stats, dtype=torch.float32),
    )


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, needed: list[bool], modifiers: dict[str, Any]
) -> list[Tensor]:
    """A tensor for each gradient, in the layout of its operand; empty where it is not needed."""
    operands = {"q": q, "k": k, "v": v, **modifiers}
    return [
        torch.empty_like(operands[name]) if need else q.new_empty(0)
        for name, need in zip(_DIFFERENTIABLE, needed, strict=True)
    ]


@torch.library.impl(LIBRARY, "attention_backward", "CompositeExplicitAutograd")
def _attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_stats: Tensor,
    needed: list[bool],
    *modifiers: Any,
) -> tuple[Tensor, ...]:
    attention = kernels()
    flat = dict(zip(NAMES, modifiers, strict=True))
    results = _empty_gradients(q, k, v, needed, flat)
    if device_checks_enabled():
        for result in results:
            result.fill_(float("nan"))
    dq, dk, dv, dbias, drelative, dsinks = (
        result if need else None for result, need in zip(results, needed, strict=True)
    )
    if dbias is not None:
        dbias.zero_()  # tiles that nobody sees are not visited
    with on_device(q):
        attention.launch_attention_backward(
            q,
            k,
            v,
            out,
            softmax_stats,
            dout,
            dlse,
            attention.Modifiers(**flat),
            attention.Gradients(dq, dk, dv, dbias, drelative, dsinks),
            input_precision=input_precision(q.dtype),
        )
    return tuple(results)


@torch.library.register_fake("fastattn::attention_backward")
def _fake_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_stats: Tensor,
    needed: list[bool],
    *modifiers: Any,
) -> tuple[Tensor, ...]:
    return tuple(_empty_gradients(q, k, v, needed, dict(zip(NAMES, modifiers, strict=True))))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, return_lse, save_softmax, *modifiers = inputs
    out, _, softmax_stats = output
    tensors = modifiers[len(_SCALARS) :]
    ctx.save_for_backward(q, k, v, out, softmax_stats, *tensors)
    ctx.scalars = modifiers[: len(_SCALARS)]
    ctx.saved_softmax, ctx.returned_lse = save_softmax, return_lse
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, dstats: Tensor | None
) -> tuple[Any, ...]:
    q, k, v, out, softmax_stats, *tensors = ctx.saved_tensors
    if not ctx.saved_softmax:
        raise RuntimeError(
            "fastattn::attention_forward must be called with save_softmax=True to have gradients; "
            "fastattn.attention does so"
        )
    positions = {"q": 0, "k": 1, "v": 2}
    for name in _DIFFERENTIABLE[3:]:
        positions[name] = 5 + NAMES.index(name)
    needed = [ctx.needs_input_grad[positions[name]] for name in _DIFFERENTIABLE]
    gradients: list[Tensor | None] = [None] * (5 + len(NAMES))
    if dout is None:
        dout = out.new_zeros(()).expand_as(out)
    results = torch.ops.fastattn.attention_backward(
        dout,
        dlse if ctx.returned_lse else None,
        q,
        k,
        v,
        out,
        softmax_stats,
        needed,
        *ctx.scalars,
        *tensors,
    )
    for name, need, result in zip(_DIFFERENTIABLE, needed, results, strict=True):
        if need:
            gradients[positions[name]] = result
    return tuple(gradients)


class _Eager(torch.autograd.Function):
    """What `register_autograd` makes of the operator, without its bookkeeping."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        q, k, v, return_lse, save_softmax, *modifiers = inputs
        out, lse, softmax_stats = _forward(q, k, v, return_lse, save_softmax, modifiers)
        assert softmax_stats is not None  # save_softmax is set
        _save_for_backward(ctx, inputs, (out, softmax_stats, softmax_stats))
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        return _backward(ctx, dout, dlse, None)


def _no_double_backward(ctx: Any, *gradients: Tensor | None) -> None:
    raise NotImplementedError(
        "fastattn's Triton kernels have no gradient of their gradient (double backward): pass "
        'impl="reference" to fastattn.attention, plain torch that is differentiable twice'
    )


torch.library.register_autograd(
    "fastattn::attention_forward", _backward, setup_context=_save_for_backward
)
torch.library.register_autograd("fastattn::attention_backward", _no_double_backward)


def _weights_shape(
    q: Tensor,
    k: Tensor,
    heads: Tensor | None,
    rows: Tensor | None,
    average: bool,
    modifiers: dict[str, Any],
) -> tuple[int, ...]:
    if modifiers["cu_seqlens_q"] is None:
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    else:
        batch = modifiers["cu_seqlens_q"].shape[0] - 1
        seqlen_q, seqlen_k = modifiers["max_seqlen_q"], modifiers["max_seqlen_k"]
    num_heads = q.shape[-2] if heads is None else heads.shape[0]
    num_rows = seqlen_q if rows is None else rows.shape[0]
    return (batch, 1 if average else num_heads, num_rows, seqlen_k)


@torch.library.impl(LIBRARY, "attention_weights", "CompositeExplicitAutograd")
def _attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    heads: Tensor | None,
    rows: Tensor | None,
    average: bool,
    *modifiers: Any,
) -> Tensor:
    attention = kernels()
    flat = dict(zip(NAMES, modifiers, strict=True))
    weights = empty(q, _weights_shape(q, k, heads, rows, average, flat), torch.float32)
    with on_device(q):
        attention.launch_attention_weights(
            q,
            k,
            lse,
            weights,
            attention.Modifiers(**flat),
            heads=heads,
            chosen_rows=rows,
            average=average,
            input_precision=input_precision(q.dtype),
        )
    return weights


@torch.library.register_fake("fastattn::attention_weights")
def _fake_attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    heads: Tensor | None,
    rows: Tensor | None,
    average: bool,
    *modifiers: Any,
) -> Tensor:
    flat = dict(zip(NAMES, modifiers, strict=True))
    shape = _weights_shape(q, k, heads, rows, average, flat)
    return q.new_empty(shape, dtype=torch.float32)
