"""The check before a time: an output against float64, by the 2x rule, on a part of it.

The exact result of a whole batch would cost more than all measurements, so a few heads are taken,
the first and the last of the tensor among them, and of a long sequence 1024 of its rows. All of the
output must be finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs
from fastattn import reference
from fastattn.dropout import Dropout
from fastattn.problem import make_problem
from fastattn.testing.tolerance import Comparison, compare


class WrongResult(Exception):
    """An output that breaks the rule; the message says how."""


def sample_rows(count: int, most: int = 1024) -> list[int]:
    """At most `most` of `count` rows: the first and last of them in one piece, others between."""
    if count <= most:
        return list(range(count))
    edge = most // 4
    between = most - 2 * edge
    span = count - 2 * edge
    middle = [edge + index * span // between for index in range(between)]
    return [*range(edge), *middle, *range(count - edge, count)]


def sample_heads(case: Case, most: int = 4) -> list[tuple[int, int]]:
    """At most `most` pairs (sequence, head), spread from the first to the last."""
    return [divmod(index, case.num_heads) for index in spread(case.batch * case.num_heads, most)]


def spread(total: int, most: int) -> list[int]:
    """At most `most` of 0 ... total - 1, from the first to the last."""
    most = min(most, total)
    return list(dict.fromkeys(index * (total - 1) // max(1, most - 1) for index in range(most)))


class Oracle:
    """Exact and plain torch results of parts of a case, computed once for all providers."""

    def __init__(self, inputs: Inputs, *, most_rows: int = 1024, most_heads: int = 4) -> None:
        self.shape = inputs.q.shape
        self.dtype = inputs.q.dtype
        self._parts: list[tuple[int, Tensor, int]] = []
        exact: list[Tensor] = []
        baseline: list[Tensor] = []
        for batch, head in sample_heads(inputs.case, most_heads):
            rows = sample_rows(inputs.case.rows[batch], most_rows)
            if not rows:
                continue
            index = torch.tensor(rows, device=inputs.q.device)
            self._parts.append((batch, index, head))
            for results, dtype in ((exact, torch.float64), (baseline, self.dtype)):
                results.append(_attend(inputs, batch, index, head, dtype))
        self._exact, self._baseline = torch.cat(exact), torch.cat(baseline)

    def check(self, out: Tensor) -> Comparison:
        """Compares an output (batch, seqlen, num_heads, head_dim) by the rule.

        Raises:
            WrongResult: its shape, its dtype or its values are not right.
        """
        if out.shape != self.shape or out.dtype != self.dtype:
            raise WrongResult(
                f"expected {self.dtype} of shape {tuple(self.shape)}, got {out.dtype} of shape "
                f"{tuple(out.shape)}"
            )
        pieces = [out[batch, rows, head] for batch, rows, head in self._parts]
        comparison = compare(torch.cat(pieces), self._baseline, self._exact)
        if not comparison.passed:
            raise WrongResult(str(comparison))
        if broken := int((~torch.isfinite(out)).sum()):
            raise WrongResult(f"{broken} elements of the output are NaN or infinite")
        return comparison


def _attend(inputs: Inputs, batch: int, rows: Tensor, head: int, dtype: torch.dtype) -> Tensor:
    """Rows of one head by the reference, (rows, head_dim)."""
    head_kv = head * inputs.case.num_heads_kv // inputs.case.num_heads
    bias = inputs.dense_bias
    out = attend(
        inputs.case,
        batch,
        rows,
        inputs.q[batch, rows, head][None, :, None].to(dtype),
        inputs.k[batch, :, head_kv][None, :, None].to(dtype),
        inputs.v[batch, :, head_kv][None, :, None].to(dtype),
        None if bias is None else bias[0, head, rows].to(dtype),
    )
    return out[0, :, 0]


def attend(
    case: Case,
    batch: int,
    rows: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """The reference on a part of a case: these rows of sequence `batch`, some heads, all keys.

    Args:
        rows: where the rows of q stand in the sequence.
        q, k, v: (1, rows or keys, heads, head_dim).
        bias: broadcasts to (1, heads, rows, keys).
    """
    keys = torch.arange(case.seqlen, device=rows.device)
    visible = keys[None, :] < case.lengths[batch]
    if case.causal:
        visible = visible & (keys[None, :] <= rows[:, None])
    problem = make_problem(q, k, v, mask=visible, bias=bias)
    return reference.run(replace(problem, dropout=dropout))[0]


def describe(comparison: Comparison) -> Iterator[tuple[str, float]]:
    """What a row keeps of a comparison."""
    yield "max_error", comparison.max_error
    yield "allowed_max_error", comparison.allowed_max_error
    yield "error_ratio", comparison.ratio
