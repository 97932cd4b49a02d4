"""fastattn where code calls torch's scaled_dot_product_attention: timm, torchvision, diffusers, ...

    import fastattn.integrations.sdpa as fastattn_sdpa

    with fastattn_sdpa.replace_sdpa():      # within it
        out = model(x)
    fastattn_sdpa.install()                 # or everywhere from here on, until uninstall()
    print(fastattn_sdpa.calls())            # what fastattn served, what torch did, and why

There are two ways to reach a call, and neither finds all of them:

| | `F.scaled_dot_product_attention(...)` | a name bound earlier | cost |
|---|---|---|---|
| replacing the attribute of `F` | yes, in all threads | no | none |
| a `TorchFunctionMode` | not in `nn.MultiheadAttention` | yes, in its thread | 2-4 us an op |

F is `torch.nn.functional`; names are bound early by `from torch.nn.functional import ...`. torch
disables a mode while the mode handles a function, so that it does not see the calls inside torch's
own composite functions. `install` replaces the attribute: a switch that stays on must not slow down
every operation. `replace_sdpa` does both. While either is on, the fused inference path of
`nn.MultiheadAttention` and `nn.TransformerEncoderLayer`, which calls no such function, is off
(`torch.backends.mha`); it is as it was afterwards. Both work under torch.compile, which compiles
anew where the switch has been turned.

Not reached are calls that do not come from Python: TorchScript, graphs exported or traced before,
and torch's C++ code.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastattn import dispatch, functional
from fastattn.integrations.impl_choice import chosen_impl, use_impl
from fastattn.integrations.sdpa_operands import (
    ArgumentError,
    check_arguments,
    flatten_mask,
    four_dimensions,
)
from fastattn.masks import Causal, Mask, Window

__all__ = [
    "ArgumentError",
    "Calls",
    "calls",
    "install",
    "installed",
    "replace_sdpa",
    "reset_calls",
    "scaled_dot_product_attention",
    "uninstall",
    "use_impl",
]

_TORCH: Callable[..., Tensor] = torch._C._nn.scaled_dot_product_attention
_MAX_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Calls:
    """Counts since `reset_calls`; `str()` of it is a list.

    Attributes:
        served: calls that fastattn computed, by implementation ("triton", "sdpa", "reference").
        passed_on: calls that went on to torch's own function, by reason.
    """

    served: dict[str, int]
    passed_on: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{sum(self.served.values())} served, {sum(self.passed_on.values())} passed on"]
        lines += [f"  served by {name}: {count}" for name, count in self.served.items()]
        lines += [f"  passed on, {reason}: {count}" for reason, count in self.passed_on.items()]
        return "\n".join(lines)


_lock = threading.Lock()
_served: Counter[str] = Counter()
_passed_on: Counter[str] = Counter()


class _State(threading.local):
    """Of a thread: whether it is within a call of ours, and whether fastattn serves that call."""

    inside = False
    serving = False


_state = _State()


def calls() -> Calls:
    """How many calls were served and passed on, in all threads.

    Calls that are part of a compiled graph are not counted: the graph runs without Python.
    """
    with _lock:
        return Calls(dict(_served), dict(_passed_on))


def reset_calls() -> None:
    """Starts the counts of `calls` at zero."""
    with _lock:
        _served.clear()
        _passed_on.clear()


def _listen(name: str, problem: Any) -> None:
    if not torch.compiler.is_compiling() and _state.serving:
        with _lock:
            _served[name] += 1


dispatch.listeners.append(_listen)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, computed by fastattn where it can be.

    What it cannot serve goes on to torch's function, and `calls()` counts it with the reason:
    tensor subclasses (nested, distributed, fake, CausalBias), torch.func's transforms, tracing by
    torch.jit and torch.fx, devices other than CPU and CUDA, dtypes other than float16, bfloat16,
    float32 and float64, head_dim 0 or above 256, dropout_p = 1, `attn_mask` together with
    `is_causal`, and `enable_gqa` with different numbers of heads in key and value.

    Rows that may attend to nothing give 0. `torch.nn.attention.sdpa_kernel` has no say in what
    fastattn runs. Dropped weights may be other ones than torch would drop.

    Args:
        query: (..., num_heads, seqlen_q, head_dim), of two dimensions or more and any strides. More
            than four are copied where their leading dimensions cannot be viewed as one.
        key: (..., num_heads, seqlen_k, head_dim); leading dimensions broadcast with those of query.
        value: (..., num_heads, seqlen_k, head_dim_v).
        attn_mask: bool (True = attend), or floating, added to the scores; broadcasts to
            (..., num_heads, seqlen_q, seqlen_k).
        dropout_p: probability in [0, 1] with which weights are dropped, in training or not.
        is_causal: query i sees the keys 0..i: aligned at the top left, also where lengths differ.
        scale: factor on query @ key.T; default head_dim ** -0.5.
        enable_gqa: key and value may have fewer heads, which must divide those of query.

    Returns:
        (..., num_heads, seqlen_q, head_dim_v) in the dtype of query, a transposed view of a tensor
        in which heads come after rows.

    Raises:
        ArgumentError: an argument is not as described; the message names it. Both a ValueError
            and a RuntimeError.
        NotImplementedError: `use_impl` names an implementation that cannot serve the call.
    """
    options = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return _serve(_TORCH, query, key, value, *options)


def _serve(
    otherwise: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The call by fastattn, or by `otherwise` with the reason written down."""
    compiling = torch.compiler.is_compiling()
    options = (attn_mask, dropout_p, is_causal)
    operands = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    reason = _reason_by_type(operands, compiling)
    if reason is None:
        check_arguments(query, key, value, attn_mask, dropout_p, enable_gqa)
        reason = _reason_by_value(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if compiling:
        if reason is not None:
            return otherwise(query, key, value, *options, scale=scale, enable_gqa=enable_gqa)
        return _attend(query, key, value, *options, scale)
    # torch's function may be called within, by fastattn or as what serves instead: not caught.
    before = _state.inside, _state.serving
    _state.inside, _state.serving = True, reason is None
    try:
        if reason is None:
            return _attend(query, key, value, *options, scale)
        with _lock:
            _passed_on[reason] += 1
        return otherwise(query, key, value, *options, scale=scale, enable_gqa=enable_gqa)
    finally:
        _state.inside, _state.serving = before


def _reason_by_type(operands: tuple[Any, ...], compiling: bool) -> str | None:
    for operand in operands:
        if type(operand) is not Tensor and type(operand) is not torch.nn.Parameter:
            return f"{type(operand).__name__} is not a plain tensor"
        if operand.is_nested:
            return "a nested tensor"
        if operand.layout != torch.strided:
            return f"layout {operand.layout}"
        if operand.device.type not in ("cpu", "cuda"):
            return f"device {operand.device.type}"
    if not compiling and torch._C._are_functorch_transforms_active():
        return "a transform of torch.func"
    if not compiling and torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "torch.jit.trace"
    return None


def _reason_by_value(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> str | None:
    if query.dtype not in _DTYPES:
        return f"dtype {query.dtype}"
    for size in (query.shape[-1], value.shape[-1]):
        if not 1 <= size <= _MAX_HEAD_DIM:
            return f"head_dim {size}"
    if dropout_p == 1.0:
        return "dropout_p = 1"
    if attn_mask is not None and is_causal:
        return "attn_mask together with is_causal"  # an error by torch's documentation
    if enable_gqa and key.shape[-3] != value.shape[-3]:
        return "different numbers of heads in key and value"
    return None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    seqlen_q, seqlen_k = query.shape[-2], key.shape[-2]
    mask: Mask | Tensor | None = None
    bias: Tensor | None = None
    if is_causal:
        if seqlen_k > seqlen_q:  # no query sees the rest
            key, value = key[..., :seqlen_q, :], value[..., :seqlen_q, :]
        # fastattn aligns the last query with the last key: shifted to align the first ones.
        mask = Window(None, seqlen_q - seqlen_k) if seqlen_k < seqlen_q else Causal()
    lead, q, k, v = four_dimensions(query, key, value)
    if attn_mask is not None:
        flat = flatten_mask(attn_mask, lead)
        mask, bias = (flat, None) if attn_mask.dtype == torch.bool else (None, flat)
    # Views: fastattn takes any strides.
    out = functional.attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask=mask, bias=bias,
        softmax_scale=None if scale is None else float(scale), dropout_p=float(dropout_p),
        impl=chosen_impl(),
    )  # fmt: skip
    assert isinstance(out, Tensor)
    out = out.transpose(1, 2)
    return out if len(lead) == 2 else out.reshape(*lead, *out.shape[2:])


class _Mode(TorchFunctionMode):
    """Catches torch's function under whatever name it is called."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _TORCH and not _is_inside():
            return _serve(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_inside() -> bool:
    # In a graph, torch's function within ours is caught once more, to no effect.
    return not torch.compiler.is_compiling() and _state.inside


class _Switch:
    """The attribute of `torch.nn.functional`, while anyone wants it replaced."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.depth = 0
        self.installed = False
        self.previous: Callable[..., Tensor] = _TORCH
        self.fastpath = True

    def turn(self, by: int) -> None:
        """Counts one more or one less who wants it on."""
        with self.lock:
            before, self.depth = self.depth, self.depth + by
            if before == 0:
                self._turn_on()
            elif self.depth == 0:
                self._turn_off()

    def _turn_on(self) -> None:
        if torch.nn.functional.scaled_dot_product_attention is not _replacement:
            self.previous = torch.nn.functional.scaled_dot_product_attention
            torch.nn.functional.scaled_dot_product_attention = _replacement
        self.fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def _turn_off(self) -> None:
        torch.backends.mha.set_fastpath_enabled(self.fastpath)
        if torch.nn.functional.scaled_dot_product_attention is _replacement:
            torch.nn.functional.scaled_dot_product_attention = self.previous
        else:
            warnings.warn(
                "torch.nn.functional.scaled_dot_product_attention was replaced by something else "
                "after fastattn replaced it, and is left as it is; fastattn serves no more calls",
                RuntimeWarning,
                stacklevel=3,
            )


_switch = _Switch()


def _replacement(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What takes the attribute's place."""
    options = (attn_mask, dropout_p, is_causal)
    if _switch.depth == 0 or _is_inside():
        return _switch.previous(query, key, value, *options, scale=scale, enable_gqa=enable_gqa)
    return _serve(_switch.previous, query, key, value, *options, scale, enable_gqa)


_replacement.__name__ = _replacement.__qualname__ = "scaled_dot_product_attention"
_replacement.__doc__ = scaled_dot_product_attention.__doc__


@contextlib.contextmanager
def replace_sdpa(*, early_bound: bool = True) -> Iterator[None]:
    """Within it, calls of torch's scaled_dot_product_attention are served by fastattn.

    It can be nested, and can be used with `install`. The attribute of `torch.nn.functional` is
    replaced for all threads: a backward pass that computes again runs in a thread of its own.

    Args:
        early_bound: also catch, in this thread, calls by names bound earlier with
            `from torch.nn.functional import scaled_dot_product_attention`. That costs every
            operation of torch 2 to 4 microseconds.
    """
    _switch.turn(+1)
    try:
        with _Mode() if early_bound else contextlib.nullcontext():
            yield
    finally:
        _switch.turn(-1)


def install() -> None:
    """Replaces `torch.nn.functional.scaled_dot_product_attention` until `uninstall`.

    Calls of a name that was bound before are not caught: use `replace_sdpa` for those. Installing
    twice is the same as once.
    """
    if not _switch.installed:
        _switch.installed = True
        _switch.turn(+1)


def uninstall() -> None:
    """Takes back `install`; without one, does nothing."""
    if _switch.installed:
        _switch.installed = False
        _switch.turn(-1)


def installed() -> bool:
    """Whether `install` is in effect."""
    return _switch.installed
