"""What the compile report compiles: every kernel with every config that can be selected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from fastattn.testing.compile_report import CompileCase, Target

_SEQLEN = 1024
_HEADS = 4


def attention_cases(target: Target) -> Iterator[CompileCase]:
    """Forward and weights kernels: dtypes x head dimensions x features, on one target."""
    from fastattn.kernels.attention.config import select_forward_config, select_weights_config

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in (64, 128, 256) if dtype != torch.float16 else (64, 128):
            for feature, modifiers in _FEATURES.items():
                if dtype == torch.float16 and feature not in ("bidirectional", "causal"):
                    continue
                count = _modifiers(modifiers, head_dim, dtype).num_modifiers
                config = select_forward_config(target.name, head_dim, dtype, _SEQLEN, count)
                yield CompileCase(
                    kernel="attention_forward",
                    case=_name(dtype, head_dim, feature),
                    config=config,
                    launch=partial(launch_forward, head_dim, dtype, modifiers, config),
                    expect_tensor_cores=dtype != torch.float32,
                )
            short = select_forward_config(target.name, head_dim, dtype, 64, 0)
            yield CompileCase(
                kernel="attention_forward",
                case=_name(dtype, head_dim, "few rows, causal"),
                config=short,
                launch=partial(launch_forward, head_dim, dtype, _FEATURES["causal"], short),
                expect_tensor_cores=dtype != torch.float32,
            )
            weights_config = select_weights_config(head_dim, dtype)
            for feature in ("bidirectional", "everything"):
                yield CompileCase(
                    kernel="attention_weights",
                    case=_name(dtype, head_dim, feature),
                    config=weights_config,
                    launch=partial(
                        _launch_weights, head_dim, dtype, _FEATURES[feature], weights_config
                    ),
                    expect_tensor_cores=dtype != torch.float32,
                )


def attention_backward_cases(target: Target) -> Iterator[CompileCase]:
    """Backward kernels: dtypes x head dimensions x features, on one target."""
    few = ("causal", "T5 bias", "everything")
    for dtype, head_dim, features in (
        (torch.bfloat16, 64, (*_FEATURES, *_TRAINING_FEATURES)),
        (torch.bfloat16, 128, (*_FEATURES, *_TRAINING_FEATURES)),
        (torch.bfloat16, 256, few),
        (torch.float16, 64, few[:1]),
        (torch.float16, 128, few[:1]),
        (torch.float32, 64, few),
        (torch.float32, 128, few),
        (torch.float32, 256, few),
    ):
        for feature in features:
            modifiers = {**_FEATURES, **_TRAINING_FEATURES}[feature]
            config = _backward_config(target, dtype, head_dim, modifiers)
            yield CompileCase(
                kernel="attention_backward",
                case=_name(dtype, head_dim, feature),
                config=config,
                launch=partial(launch_backward, head_dim, dtype, modifiers, config),
                expect_tensor_cores=dtype != torch.float32,
            )


def _backward_config(
    target: Target, dtype: torch.dtype, head_dim: int, modifiers: dict[str, Any]
) -> Any:
    from fastattn.kernels.attention.config import select_backward_config

    count = _modifiers(modifiers, head_dim, dtype).backward_count
    by_distance = "relative_bias" in modifiers
    return select_backward_config(target.name, head_dim, dtype, count, by_distance)


def _name(dtype: torch.dtype, head_dim: int, feature: str) -> str:
    return f"{str(dtype).removeprefix('torch.')} D{head_dim} {feature}"


def _lengths() -> torch.Tensor:
    return torch.zeros(2, dtype=torch.int32)


def _cu_seqlens() -> torch.Tensor:
    return torch.zeros(3, dtype=torch.int32)


# Modifiers by name; callables are given the dtype. Values do not matter, nothing runs.
_FEATURES: dict[str, dict[str, Any]] = {
    "bidirectional": {},
    "causal": {"window_right": 0},
    "window, lengths": {"window_left": 100, "window_right": 0, "seqlens_k": _lengths},
    "packed causal": {
        "window_right": 0,
        "cu_seqlens_q": _cu_seqlens,
        "cu_seqlens_k": _cu_seqlens,
        "max_seqlen_q": _SEQLEN,
        "max_seqlen_k": _SEQLEN,
    },
    "key padding mask": {"mask": lambda: torch.ones(2, 1, 1, _SEQLEN, dtype=torch.bool)},
    "T5 bias": {"relative_bias": lambda: torch.zeros(_HEADS, 257)},
    "T5 bias, window, lengths": {
        "relative_bias": lambda: torch.zeros(_HEADS, 257),
        "window_left": 100,
        "window_right": 0,
        "seqlens_k": _lengths,
    },
    "ALiBi, causal": {"alibi_slopes": lambda: torch.zeros(1, _HEADS), "window_right": 0},
    "softcap, sinks, causal": {
        "softcap": 30.0,
        "sinks": lambda: torch.zeros(_HEADS),
        "window_right": 0,
    },
    "dense bias": {"bias": lambda: torch.zeros(1, _HEADS, _SEQLEN, _SEQLEN)},
    "everything": {
        "softcap": 30.0,
        "sinks": lambda: torch.zeros(_HEADS),
        "window_left": 100,
        "window_right": 0,
        "seqlens_q": _lengths,
        "seqlens_k": _lengths,
        "starts_k": _lengths,
        "mask": lambda: torch.ones(2, 1, _SEQLEN, _SEQLEN, dtype=torch.bool),
        "bias": lambda: torch.zeros(1, _HEADS, _SEQLEN, _SEQLEN),
        "alibi_slopes": lambda: torch.zeros(1, _HEADS),
        "relative_bias": lambda: torch.zeros(_HEADS, 257),
    },
}


_TRAINING_FEATURES: dict[str, dict[str, Any]] = {
    "packed, T5 bias": {
        "relative_bias": lambda: torch.zeros(_HEADS, 257),
        "cu_seqlens_q": _cu_seqlens,
        "cu_seqlens_k": _cu_seqlens,
        "max_seqlen_q": _SEQLEN,
        "max_seqlen_k": _SEQLEN,
    },
    "dropout, causal": {
        "window_right": 0,
        "dropout_p": 0.1,
        "dropout_seed": lambda: torch.zeros(1, dtype=torch.int64),
    },
}


def _modifiers(features: dict[str, Any | Callable[[], Any]], head_dim: int, dtype: Any) -> Any:
    from fastattn.kernels.attention import Modifiers

    made = {name: value() if callable(value) else value for name, value in features.items()}
    return Modifiers(softmax_scale=head_dim**-0.5, **made)


def _operands(head_dim: int, dtype: torch.dtype, packed: bool) -> list[torch.Tensor]:
    shape = (_SEQLEN, _HEADS, head_dim) if packed else (2, _SEQLEN, _HEADS, head_dim)
    return [torch.empty(shape, dtype=dtype) for _ in range(4)]


def launch_forward(
    head_dim: int, dtype: torch.dtype, features: dict[str, Any], config: Any
) -> None:
    """Launches the forward kernel on empty tensors, for a compiler that runs nothing."""
    from fastattn.kernels.attention import launch_attention_forward

    packed = "cu_seqlens_q" in features
    q, k, v, out = _operands(head_dim, dtype, packed)
    lse = torch.empty(_HEADS, _SEQLEN) if packed else torch.empty(2, _HEADS, _SEQLEN)
    modifiers = _modifiers(features, head_dim, dtype)
    launch_attention_forward(q, k, v, out, lse, modifiers, config=config)


def _launch_weights(
    head_dim: int, dtype: torch.dtype, features: dict[str, Any], config: Any
) -> None:
    from fastattn.kernels.attention import launch_attention_weights

    q, k, _, _ = _operands(head_dim, dtype, packed=False)
    lse = torch.empty(2, _HEADS, _SEQLEN)
    weights = torch.empty(2, _HEADS, _SEQLEN, _SEQLEN)
    modifiers = _modifiers(features, head_dim, dtype)
    launch_attention_weights(q, k, lse, weights, modifiers, config=config)


def launch_backward(
    head_dim: int, dtype: torch.dtype, features: dict[str, Any], config: Any
) -> None:
    """Launches the backward kernels on empty tensors, with a gradient of all that has one."""
    from fastattn.kernels.attention import Gradients, launch_attention_backward

    packed = "cu_seqlens_q" in features
    q, k, v, out = _operands(head_dim, dtype, packed)
    lse_shape = (_HEADS, _SEQLEN) if packed else (2, _HEADS, _SEQLEN)
    modifiers = _modifiers(features, head_dim, dtype)

    def like(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else torch.empty_like(tensor)

    wanted = (q, k, v, modifiers.bias, modifiers.relative_bias, modifiers.sinks)
    gradients = Gradients(*map(like, wanted))
    stats, dlse = torch.empty(2, *lse_shape), torch.empty(lse_shape)
    dout = torch.empty_like(out)
    launch_attention_backward(q, k, v, out, stats, dout, dlse, modifiers, gradients, config=config)
