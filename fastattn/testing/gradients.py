"""What a call gives and what flows back through it, as plain tensors by name.

    case = feature.case(torch.bfloat16)
    starts = feature.output_gradients(case)
    actual = run(fastattn.attention, case, starts)      # out, lse, dq, dk, dv, dbias, ...
    exact = run(reference.attention, case.double(), starts)
    compare(actual["dq"], baseline["dq"], exact["dq"])

The gradients are those of sum(out * start_out) + sum(lse * start_lse) with respect to q, k, v and
every dense bias, T5 table and sinks of the call. A row that may attend to nothing has gradient 0,
whatever flows into its out and lse. ALiBi slopes are constants here, since the kernels give them no
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.testing.features import Case

__all__ = ["DIFFERENTIABLE", "run"]

DIFFERENTIABLE = ("q", "k", "v", "bias", "table", "sinks")


def run(
    attention: Callable[..., Any],
    case: Case,
    output_gradients: tuple[Tensor | None, Tensor | None] | None = None,
    *,
    return_lse: bool = True,
) -> dict[str, Tensor]:
    """Results of a call by name, and gradients if a backward pass is asked for.

    Args:
        attention: called with the arguments of `case` and `return_lse`.
        case: the call. Its tensors are differentiated as they are, with their strides.
        output_gradients: of out and lse, in any floating dtype, which are cast to those of the
            results; None is no part of what is differentiated. Without any, nothing is.
        return_lse: whether the call returns the log-sum-exp. If not, its gradient is not used, and
            without one of out there is no backward pass.

    Returns:
        "out", "lse" if it is returned, and with `output_gradients` "dq", "dk", "dv" and, where the
        call has them, "dbias", "dtable" and "dsinks": each of the shape and dtype of its tensor, 0
        where the result does not depend on it.

    Raises:
        RuntimeError: the results have no gradient.
    """
    leaves: dict[str, Tensor] = {}
    if output_gradients is not None:
        names = [name for name in DIFFERENTIABLE if name in case.tensors()]
        leaves = {name: case.tensors()[name].detach().requires_grad_() for name in names}
        case = case.with_tensors(lambda name, tensor: leaves.get(name, tensor))
    result = case.call(attention, return_lse=return_lse)
    results = dict(zip(("out", "lse"), result if return_lse else (result,), strict=False))
    found = {name: tensor.detach() for name, tensor in results.items()}
    if output_gradients is None:
        return found
    starts = dict(zip(("out", "lse"), output_gradients, strict=True))
    pairs = [
        (results[name], _cast(start, results[name].dtype))
        for name, start in starts.items()
        if name in results and start is not None
    ]
    if not pairs:
        return found
    outputs, grad_outputs = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grad_outputs, allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        found[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """To another dtype; to its own with its strides, which are part of the test."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
