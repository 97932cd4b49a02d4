"""One attention call of a transformers layer: run, recorded, with weights where they are wanted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import functional
from fastattn.dispatch import IMPLEMENTATIONS
from fastattn.recording import Recording

_impl = "auto"


@contextlib.contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Within it, models run this implementation: "auto" (default), "triton", "sdpa", "reference".

    One that is named runs or raises, as in `fastattn.attention`.

    Raises:
        ValueError: `impl` is unknown.
    """
    global _impl
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"impl must be one of {['auto', *IMPLEMENTATIONS]}, got {impl!r}")
    before, _impl = _impl, impl
    try:
        yield
    finally:
        _impl = before


def current_impl() -> str:
    """The implementation that `use_impl` named, else "auto"."""
    return _impl


def wants_dense(device: torch.device) -> bool:
    """Whether masks and biases are better handed over as tensors that all layers share.

    So on a CPU, unless kernels were asked for: torch's attention takes nothing else.
    """
    return device.type == "cpu" and _impl != "triton"


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float = 0.0,
    weights: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fastattn.attention` on behalf of a layer, for `report` to count.

    Args:
        module: the layer that the call is of.
        q, k, v, dropout_p, options: as of `fastattn.attention`.
        weights: also compute the attention weights, without dropout.

    Returns:
        Output (batch, seqlen_q, num_heads, head_dim_v), and None or the weights (batch, num_heads,
        seqlen_q, seqlen_k) in the dtype of q.
    """
    # A graph neither records nor could.
    compiling = torch.compiler.is_compiling()
    record = contextlib.nullcontext() if compiling else Recording(module, _impl)
    with record:
        out = functional.attention(q, k, v, dropout_p=dropout_p, impl=_impl, **options)
    assert isinstance(out, Tensor)
    if not weights:
        return out, None
    weights_impl = "auto" if _impl == "sdpa" else _impl
    return out, functional.attention_weights(q, k, impl=weights_impl, **options).to(q.dtype)
