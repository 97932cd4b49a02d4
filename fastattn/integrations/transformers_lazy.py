"""Tensors that transformers passes around and that are built only if somebody looks into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# What may be asked of a LazyTensor without building it.
_GETTERS = (
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "requires_grad",
    "grad_fn", "is_leaf",
)  # fmt: skip
_METADATA = frozenset(getattr(Tensor, name).__get__ for name in _GETTERS) | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__,
}  # fmt: skip


class LazyTensor(Tensor):
    """Poses as a tensor, and carries a value that says the same.

    fastattn takes the value. Any other operation builds the exact tensor and works on that; from
    then on fastattn takes the tensor too, since the model may have written into it.

    A class of these defines `build`, and makes itself with `posing_as`.
    """

    _built: Tensor | None
    _touched: bool

    @classmethod
    def posing_as(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> LazyTensor:
        """One that has not been built, with the looks of a tensor of this shape."""
        lazy = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        lazy._built, lazy._touched = None, False
        return lazy

    def build(self) -> Tensor:
        """The plain tensor, made anew."""
        raise NotImplementedError

    @property
    def materialized(self) -> bool:
        """Whether the plain tensor was built."""
        return self._built is not None

    @property
    def touched(self) -> bool:
        """Whether anything but fastattn has seen the tensor, which it may have changed."""
        return self._touched

    def built(self) -> Tensor:
        """The plain tensor, built on first use."""
        if self._built is not None:
            return self._built
        built = self.build()
        if not torch.compiler.is_compiling():  # a graph must not leave its tensors behind
            self._built = built
        return built

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)})"

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*_unwrap(args), **_unwrap(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return func(*_unwrap(args), **_unwrap(kwargs or {}))


def _unwrap(tree: Any) -> Any:
    def unwrap(leaf: Any) -> Any:
        if not isinstance(leaf, LazyTensor):
            return leaf
        if not leaf._touched:
            # Views of the tensor may be written into: it gets memory of its own for every element.
            leaf._built, leaf._touched = leaf.built().contiguous(), True
        return leaf._built

    return torch.utils._pytree.tree_map(unwrap, tree)
