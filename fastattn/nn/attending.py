"""What all attention modules share: the one method through which they reach the kernels."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import functional
from fastattn.nn.base_cache import BaseKVCache
from fastattn.problem import MAX_HEAD_DIM
from fastattn.recording import Recording


class Attending(nn.Module):
    """Mixed into attention modules.

    Attributes:
        impl: as for `fastattn.attention`; may be set on a class, or on one module at any time.
    """

    impl: str = "auto"

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, cache: BaseKVCache | None = None, **options: Any
    ) -> Any:
        """`fastattn.attention`, or a cache's, with this module's `impl`: all goes through here."""
        # A graph neither records nor could.
        compiling = torch.compiler.is_compiling()
        record = contextlib.nullcontext() if compiling else Recording(self, self.impl)
        with record:
            if cache is not None:
                return cache.attention(q=q, k=k, v=v, impl=self.impl, **options)
            return functional.attention(q, k, v, impl=self.impl, **options)


def check_head_dim(head_dim: int, origin: str) -> None:
    """Raises ValueError unless the kernels can serve heads of this size."""
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 1 to {MAX_HEAD_DIM}, got {head_dim} ({origin})")
