"""The check before a time, of gradients: against float64 autograd, by the 2x rule, on a part.

Gradients of a key head need all rows of its query heads, so fewer heads are taken than for an
output: the first of the first sequence and the last of the last. That of a bias or a table is a sum
over the sequences: then the first and the last head of all of them. Rows are differentiated in
blocks, whose gradients are added up in float64, in the exact result and in plain torch's alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.accuracy import WrongResult, attend
from benchmarks.cases import Case, Inputs
from fastattn.dropout import Dropout, threshold
from fastattn.philox import philox
from fastattn.testing.tolerance import Comparison, compare

_SHARED = ("dbias", "dtable")  # summed over sequences


@dataclass(frozen=True, eq=False)
class PartOfDropout(Dropout):
    """Dropout of heads and rows that do not start at 0."""

    first_head: int = 0
    first_row: int = 0

    def keep(self, num_sequences: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> Tensor:
        if self.seed is None:
            raise ValueError("seed must be a tensor to say which weights are kept, got None")
        device = self.seed.device
        sequence, head, row = (
            torch.arange(start, start + size, device=device)
            for start, size in (
                (self.first_sequence, num_sequences), (self.first_head, num_heads),
                (self.first_row, seqlen_q),
            )
        )  # fmt: skip
        quads = torch.arange(-(-seqlen_k // 4), device=device)
        counters = torch.broadcast_tensors(
            quads, row[:, None], head[:, None, None], sequence[:, None, None, None]
        )
        words = torch.stack(philox(self.seed, counters), -1).flatten(-2)
        return words[..., :seqlen_k] >= threshold(self.p)


def sample_key_heads(case: Case) -> list[tuple[int, range]]:
    """Key heads, each with the sequences that it is looked at in."""
    last = case.num_heads_kv - 1
    if case.feature in ("T5 bias", "dense bias"):
        return [(head, range(case.batch)) for head in dict.fromkeys((0, last))]
    found = dict.fromkeys(((0, 0), (last, case.batch - 1)))
    return [(head, range(batch, batch + 1)) for head, batch in found]


@dataclass(frozen=True, eq=False)
class _Piece:
    """A piece of a result, result[index], as it should be."""

    index: tuple[int | slice, ...]
    exact: Tensor
    baseline: Tensor


class GradientOracle:
    """Exact and plain torch gradients of parts of a case, computed once for all providers.

    Args:
        inputs: of a case whose part is not "forward".
        most_rows: that are differentiated at a time.
    """

    def __init__(self, inputs: Inputs, *, most_rows: int = 1024) -> None:
        self._inputs, self._most_rows = inputs, most_rows
        self._pieces: dict[str, list[_Piece]] = {}
        for head, batches in sample_key_heads(inputs.case):
            self._add(head, batches)
        names = {"rows": ["dq"], "keys": ["dk", "dv"]}
        self.names = names.get(inputs.case.part, list(self._pieces))

    def _add(self, head: int, batches: Iterable[int]) -> None:
        dtype = self._inputs.q.dtype
        shared: dict[str, list[Tensor]] = {}
        for batch in batches:
            exact, baseline = (
                self._differentiate(batch, head, wanted) for wanted in (torch.float64, dtype)
            )
            for name, index in self._indices(batch, head):
                if name in _SHARED:
                    pair = shared.setdefault(name, [torch.zeros_like(exact[name])] * 2)
                    shared[name] = [pair[0] + exact[name], pair[1] + baseline[name]]
                else:
                    piece = _Piece(index, exact[name], baseline[name].to(dtype))
                    self._pieces.setdefault(name, []).append(piece)
        for name, index in self._indices(0, head):
            if name in shared:
                right, plain = shared[name]
                self._pieces.setdefault(name, []).append(_Piece(index, right, plain.to(dtype)))

    def _indices(self, batch: int, head: int) -> Iterator[tuple[str, tuple[int | slice, ...]]]:
        """Where the piece of a key head lies in each result."""
        heads, rows = self._heads(head), slice(self._inputs.case.rows[batch])
        yield "out", (batch, rows, heads)
        yield "dq", (batch, rows, heads)
        yield "dk", (batch, slice(None), head)
        yield "dv", (batch, slice(None), head)
        if "bias" in self._inputs.leaves:
            yield "dbias", (0, heads)
        if "table" in self._inputs.leaves:
            yield "dtable", (slice(None), heads)

    def _heads(self, head: int) -> slice:
        group = self._inputs.case.num_heads // self._inputs.case.num_heads_kv
        return slice(head * group, (head + 1) * group)

    def _differentiate(self, batch: int, head: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Output and gradients of a key head in one sequence; sums over rows in float64."""
        inputs = self._inputs
        case, heads = inputs.case, self._heads(head)
        assert inputs.dout is not None  # the case is not forward
        found: dict[str, list[Tensor]] = {name: [] for name, _ in self._indices(batch, head)}
        for start in range(0, case.rows[batch], self._most_rows):
            rows = slice(start, min(start + self._most_rows, case.rows[batch]))
            operands = [
                inputs.q[batch : batch + 1, rows, heads],
                inputs.k[batch : batch + 1, :, head : head + 1],
                inputs.v[batch : batch + 1, :, head : head + 1],
            ]
            if inputs.dense_bias is not None:
                operands.append(inputs.dense_bias[:, heads, rows])
            leaves = [operand.detach().to(dtype).requires_grad_() for operand in operands]
            dropout = None
            if case.dropout_p:
                seed = inputs.kwargs["dropout_seed"]
                dropout = PartOfDropout(case.dropout_p, seed, batch, heads.start, start)
            positions = torch.arange(rows.start, rows.stop, device=inputs.q.device)
            q, k, v, *bias = leaves
            out = attend(case, batch, positions, q, k, v, bias[0] if bias else None, dropout)
            start_from = inputs.dout[batch : batch + 1, rows, heads].to(dtype)
            dq, dk, dv, *ds = torch.autograd.grad(out, leaves, start_from)
            found["out"].append(out.detach()[0])
            found["dq"].append(dq[0])
            found["dk"].append(dk[0, :, 0].double())
            found["dv"].append(dv[0, :, 0].double())
            if "dbias" in found:
                found["dbias"].append(ds[0][0].double())
            if "dtable" in found:
                found["dtable"].append(self._by_bucket(ds[0][0].double(), rows))
        joined = {
            name: torch.cat(found.pop(name), axis)
            for name, axis in (("out", 0), ("dq", 0), ("dbias", 1))
            if name in found
        }
        return joined | {name: torch.stack(pieces).sum(0) for name, pieces in found.items()}

    def _by_bucket(self, ds: Tensor, rows: slice) -> Tensor:
        """Sums of dS (heads, rows, keys) over each bucket, (num_buckets, heads)."""
        assert self._inputs.buckets is not None  # there is a table
        own = self._inputs.buckets[rows]
        num_buckets = self._inputs.leaves["table"].shape[0]
        sums = [torch.where(own == bucket, ds, 0.0).sum((1, 2)) for bucket in range(num_buckets)]
        return torch.stack(sums)

    def check(self, results: dict[str, Tensor]) -> Comparison:
        """Compares results by name, and returns the one that uses most of what is allowed.

        Raises:
            WrongResult: one is missing, or its shape, its dtype or its values are not right.
        """
        if set(results) != set(self.names):
            raise WrongResult(f"expected {self.names}, got {list(results)}")
        found = [self._compare(name, results[name]) for name in self.names]
        return max(found, key=lambda comparison: comparison.ratio)

    def _compare(self, name: str, result: Tensor) -> Comparison:
        like = self._inputs.leaves.get(name[1:], self._inputs.q)
        if result.shape != like.shape or result.dtype != like.dtype:
            raise WrongResult(
                f"{name}: expected {like.dtype} of shape {tuple(like.shape)}, got {result.dtype} "
                f"of shape {tuple(result.shape)}"
            )
        pieces = self._pieces[name]
        actual = torch.cat([result[piece.index].flatten() for piece in pieces])
        comparison = compare(
            actual,
            torch.cat([piece.baseline.flatten() for piece in pieces]),
            torch.cat([piece.exact.flatten() for piece in pieces]),
        )
        if not comparison.passed:
            raise WrongResult(f"{name} {comparison}")
        if broken := int((~torch.isfinite(result)).sum()):
            raise WrongResult(f"{broken} elements of {name} are NaN or infinite")
        return comparison
