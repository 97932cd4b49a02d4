"""Calls whose operands lie elsewhere: kernels run on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


def to(device: str, values: Any) -> Any:
    """All tensors in `values` on a device; the same ones where they are there already."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), values)


def on(device: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` on a device, of arguments and with results on the CPU; gradients pass through."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return to("cpu", function(*to(device, args), **to(device, kwargs)))

    return call
