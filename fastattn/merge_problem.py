"""Two attention states that are to be merged into one, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.problem import DTYPES
from fastattn.validation import check_tensor, describe


@dataclass(frozen=True, eq=False)
class MergeProblem:
    """Two attention states over the same queries, checked."""

    out_a: Tensor
    lse_a: Tensor
    out_b: Tensor
    lse_b: Tensor

    @property
    def device(self) -> torch.device:
        """Where it all lies."""
        return self.out_a.device

    @property
    def dtype(self) -> torch.dtype:
        """Of both outputs."""
        return self.out_a.dtype


def make_merge_problem(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> MergeProblem:
    """Checks the arguments of `fastattn.merge_attention_states`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
    """
    check_tensor("out_a", out_a)
    if out_a.dim() not in (3, 4):
        raise ValueError(
            "out_a must be (batch, seqlen, num_heads, head_dim), packed (total, num_heads, "
            f"head_dim), got {describe(out_a)}"
        )
    if out_a.dtype not in DTYPES:
        raise TypeError(
            f"out_a must be float16, bfloat16, float32 or float64, got {describe(out_a)}"
        )
    check_tensor("out_b", out_b)
    same = out_b.shape == out_a.shape and out_b.dtype == out_a.dtype
    if not same or out_b.device != out_a.device:
        raise ValueError(
            f"out_b must have the shape, dtype and device of out_a ({describe(out_a)}), got "
            f"{describe(out_b)}"
        )
    shape = (*out_a.shape[:-3], out_a.shape[-2], out_a.shape[-3])
    dtype = torch.promote_types(out_a.dtype, torch.float32)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_tensor(name, lse)
        if tuple(lse.shape) != shape or lse.dtype != dtype or lse.device != out_a.device:
            raise ValueError(
                f"{name} must be {str(dtype).removeprefix('torch.')} of shape {shape} on "
                f"{out_a.device}, got {describe(lse)}"
            )
    return MergeProblem(out_a, lse_a, out_b, lse_b)
