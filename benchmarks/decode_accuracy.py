"""The check before a time of decoding: an output against float64, by the 2x rule, on a part of it.

Exact results of all heads of a large batch would cost more than the measurements: a few key heads
are taken, each with its whole group of query heads. All of the output must be finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import WrongResult, describe, spread
from benchmarks.decode_cases import DecodeCase, DecodeInputs
from benchmarks.providers import Provider
from fastattn import cache_storage, reference
from fastattn.testing.tolerance import Comparison, compare


def sample_key_heads(case: DecodeCase, most: int = 4) -> list[tuple[int, int]]:
    """At most `most` pairs (sequence, key head), spread from the first to the last."""
    heads = case.num_heads_kv
    return [divmod(index, heads) for index in spread(case.batch * heads, most)]


class DecodeOracle:
    """Exact and plain torch results of parts of a step, computed once for all providers."""

    def __init__(self, inputs: DecodeInputs, *, most: int = 4) -> None:
        self.shape, self.dtype = inputs.q.shape, inputs.q.dtype
        self._heads = sample_key_heads(inputs.case, most)
        self._group = inputs.case.num_heads // inputs.case.num_heads_kv
        self._exact, self._baseline = (
            torch.cat([_attend(inputs, *place, dtype) for place in self._heads])
            for dtype in (torch.float64, self.dtype)
        )

    def check(self, out: Tensor) -> Comparison:
        """Compares an output (batch, seqlen_q, num_heads, head_dim) by the rule.

        Raises:
            WrongResult: its shape, its dtype or its values are not right.
        """
        if out.shape != self.shape or out.dtype != self.dtype:
            raise WrongResult(
                f"expected {self.dtype} of shape {tuple(self.shape)}, got {out.dtype} of shape "
                f"{tuple(out.shape)}"
            )
        pieces = [
            out[batch, :, head * self._group : (head + 1) * self._group]
            for batch, head in self._heads
        ]
        comparison = compare(torch.cat(pieces), self._baseline, self._exact)
        if not comparison.passed:
            raise WrongResult(str(comparison))
        if broken := int((~torch.isfinite(out)).sum()):
            raise WrongResult(f"{broken} elements of the output are NaN or infinite")
        return comparison


def _attend(inputs: DecodeInputs, batch: int, head: int, dtype: torch.dtype) -> Tensor:
    """The queries of one key head by the reference, (seqlen_q, group, head_dim)."""
    case = inputs.case
    group = case.num_heads // case.num_heads_kv
    k, v = (
        tokens[None, :, head : head + 1].to(dtype)
        for tokens in cache_storage.gather(inputs.cache, batch, case.length, dtype)
    )
    q = inputs.q[batch : batch + 1, :, head * group : (head + 1) * group].to(dtype)
    return reference.attention(q, k, v, causal=case.seqlen_q > 1)[0]


class DecodeChecker:
    """What is right for a step, computed once for all providers.

    Args:
        inputs: of the case.
    """

    def __init__(self, inputs: DecodeInputs) -> None:
        self._oracle = DecodeOracle(inputs)

    def check(self, provider: Provider, run: Callable[[], Any]) -> dict[str, Any]:
        """Checks what a provider's function gives; returns what a row keeps of it.

        Raises:
            WrongResult: the result is wrong.
        """
        return dict(describe(self._oracle.check(run())))
