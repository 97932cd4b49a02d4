"""The `fastattn::` operators: schemas, fake implementations, and the launch of kernels.

The only file that imports kernels, and it does so when one is first needed. torch.compile and
torch.export see one opaque operator a call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastattn import biases, masks
from fastattn.problem import AttentionProblem
from fastattn.testing.interpreter import is_interpreting
from fastattn.validation import device_checks_enabled

_LIBRARY = torch.library.Library("fastattn", "DEF")

# The flat form of masks and biases, in the order of the schemas; names are those of `Modifiers`.
_SCALARS = (
    ("softmax_scale", "float"), ("softcap", "float"), ("window_left", "int"),
    ("window_right", "int"), ("max_seqlen_q", "SymInt"), ("max_seqlen_k", "SymInt"),
)  # fmt: skip
_TENSORS = (
    "cu_seqlens_q", "cu_seqlens_k", "seqlens_q", "seqlens_k", "starts_k", "prefix", "mask",
    "bias", "alibi_slopes", "relative_bias", "sinks",
)  # fmt: skip
_NAMES = tuple(name for name, _ in _SCALARS) + _TENSORS
_MODIFIERS = ", ".join(
    [f"{kind} {name}" for name, kind in _SCALARS] + [f"Tensor? {name}" for name in _TENSORS]
)

_LIBRARY.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, bool return_lse, {_MODIFIERS})"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "attention_weights(Tensor q, Tensor k, Tensor lse, Tensor? heads, Tensor? rows, bool average, "
    f"{_MODIFIERS}) -> Tensor"
)


def attention_forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (empty unless asked for) of a problem, by the forward kernel."""
    return torch.ops.fastattn.attention_forward(
        problem.q, problem.k, problem.v, problem.return_lse, *_modifiers(problem)
    )


def attention_weights(
    problem: AttentionProblem,
    lse: Tensor,
    heads: Tensor | None,
    rows: Tensor | None,
    average: bool,
) -> Tensor:
    """Weights (batch, heads, rows, keys), averaged (batch, rows, keys), by the weights kernel."""
    weights = torch.ops.fastattn.attention_weights(
        problem.q, problem.k, lse, heads, rows, average, *_modifiers(problem)
    )
    return weights[:, 0] if average else weights


def _modifiers(problem: AttentionProblem) -> list[Any]:
    """Masks and biases flattened into the operators' arguments."""
    flat = {
        "softmax_scale": problem.softmax_scale,
        "softcap": problem.softcap,
        "sinks": problem.sinks,
        **_fields(masks.take_apart(problem.mask)),
        **_fields(biases.take_apart(problem.bias)),
    }
    return [flat[name] for name in _NAMES]


def _fields(parts: Any) -> dict[str, Any]:
    return {field.name: getattr(parts, field.name) for field in dataclasses.fields(parts)}


@functools.cache
def _kernels() -> ModuleType:
    """The kernel package, imported once; under the interpreter, after it has been repaired."""
    if is_interpreting():
        from fastattn.testing.interpreter import repair

        repair()
    from fastattn.kernels import attention

    return attention


def _input_precision(dtype: torch.dtype) -> str:
    """float32 products are exact float32 unless the user allowed TensorFloat32 in torch."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def _on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = like.new_empty(shape, dtype=dtype)
    return tensor.fill_(float("nan")) if device_checks_enabled() else tensor


def _allocate_forward(
    q: Tensor, v: Tensor, return_lse: bool, packed: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of out and lse."""
    lse_shape: tuple[int, ...] = (0,)
    if return_lse:
        lse_shape = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    return (*q.shape[:-1], v.shape[-1]), lse_shape


@torch.library.impl(_LIBRARY, "attention_forward", "CompositeExplicitAutograd")
def _attention_forward(
    q: Tensor, k: Tensor, v: Tensor, return_lse: bool, *modifiers: Any
) -> tuple[Tensor, Tensor]:
    attention = _kernels()
    flat = attention.Modifiers(**dict(zip(_NAMES, modifiers, strict=True)))
    out_shape, lse_shape = _allocate_forward(q, v, return_lse, flat.cu_seqlens_q is not None)
    out = _empty(q, out_shape, q.dtype)
    lse = _empty(q, lse_shape, torch.float32)
    with _on_device(q):
        attention.launch_attention_forward(
            q,
            k,
            v,
            out,
            lse if return_lse else None,
            flat,
            input_precision=_input_precision(q.dtype),
        )
    return out, lse


@torch.library.register_fake("fastattn::attention_forward")
def _fake_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, return_lse: bool, *modifiers: Any
) -> tuple[Tensor, Tensor]:
    packed = modifiers[_NAMES.index("cu_seqlens_q")] is not None
    out_shape, lse_shape = _allocate_forward(q, v, return_lse, packed)
    return q.new_empty(out_shape), q.new_empty(lse_shape, dtype=torch.float32)


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


@torch.library.impl(_LIBRARY, "attention_weights", "CompositeExplicitAutograd")
def _attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    heads: Tensor | None,
    rows: Tensor | None,
    average: bool,
    *modifiers: Any,
) -> Tensor:
    attention = _kernels()
    flat = dict(zip(_NAMES, modifiers, strict=True))
    weights = _empty(q, _weights_shape(q, k, heads, rows, average, flat), torch.float32)
    with _on_device(q):
        attention.launch_attention_weights(
            q,
            k,
            lse,
            weights,
            attention.Modifiers(**flat),
            heads=heads,
            chosen_rows=rows,
            average=average,
            input_precision=_input_precision(q.dtype),
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
    flat = dict(zip(_NAMES, modifiers, strict=True))
    shape = _weights_shape(q, k, heads, rows, average, flat)
    return q.new_empty(shape, dtype=torch.float32)
