"""Steps of decoding that must agree with themselves: replays of a graph, rows of any batch.

Tasks for the pool, like those of `parity.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.accuracy import WrongResult, describe
from benchmarks.chosen import changed_choice
from benchmarks.parity import DTYPES, Row
from fastattn import Rotary, attention_with_kv_cache
from fastattn.testing.cache_features import CacheCase, CacheFeature
from fastattn.testing.features import Draw
from fastattn.testing.tolerance import compare
from fastattn.torch_ops import kernels


def chosen(change: Callable[[Any], Any]) -> contextlib.AbstractContextManager[list[Any]]:
    """Within it decoding runs with `change` of the config that it would choose."""
    return changed_choice(kernels(), "select_decode_config", change, "decoding")


def causal(draw: Draw) -> dict[str, Any]:
    """Keyword arguments of a CacheFeature: a causal mask."""
    return {"causal": True}


@dataclass(frozen=True)
class GraphCheck:
    """One step with rotation and appending, captured once and replayed as the rows grow.

    Attributes:
        dtype, head_dim, block_size: of the cache; 0 is contiguous.
        splits: whether the keys are split, as often as dispatch does.
        last_combines: whether the last program joins the splits.
        steps: replays.
        capacity, lengths: of the cache.
    """

    dtype: str
    splits: bool = True
    last_combines: bool = False
    block_size: int = 0
    head_dim: int = 128
    steps: int = 8
    capacity: int = 4096
    lengths: tuple[int, ...] = (1000, 37)
    kind: ClassVar[str] = "graph"

    def __str__(self) -> str:
        joined = "last combines" if self.last_combines else "combined by a launch"
        how = f"splits, {joined}" if self.splits else "one split"
        layout = f"paged {self.block_size}" if self.block_size else "contiguous"
        return f"{self.steps} replays of a step, {self.dtype}, D{self.head_dim}, {layout}, {how}"

    def run(self, device: torch.device) -> Row:
        """Replays give the bits of calls, and calls follow the 2x rule.

        Raises:
            WrongResult: a bit differs, or the rule is broken.
            RuntimeError: dispatch does not split this shape.
        """

        def change(config: Any) -> Any:
            if self.splits and config.num_splits < 2:
                raise RuntimeError(f"dispatch should split the keys here, got {config}")
            splits = config.num_splits if self.splits else 1
            return dataclasses.replace(
                config, num_splits=splits, last_combines=self.last_combines and self.splits
            )

        tokens = self._tokens(device)
        with chosen(change):
            called, replayed = self._case(device), self._case(device)
            outs = _decode(called, tokens, _step(called, "triton"))
            replay = _captured(replayed)
            found = _decode(replayed, tokens, replay)
        for number, (out, own) in enumerate(zip(outs, found, strict=True)):
            if not _same_bits(out, own):
                difference = float((out.float() - own.float()).abs().max())
                raise WrongResult(f"replay {number} differs from the call by up to {difference:g}")
        states = zip(_state(called), _state(replayed), strict=True)
        if not all(_same_bits(*pair) for pair in states):
            raise WrongResult("the cache after replays differs from that after calls")
        plain, exact = self._case(device), self._case(device).double()
        baseline = _decode(plain, tokens, _step(plain, "reference"))
        doubled = [tuple(x.double() for x in new) for new in tokens]
        truth = _decode(exact, doubled, _step(exact, "reference"))
        comparison = compare(*(torch.stack(part) for part in (found, baseline, truth)))
        if not comparison.passed:
            raise WrongResult(str(comparison))
        return dict(describe(comparison))

    def _case(self, device: torch.device) -> CacheCase:
        feature = CacheFeature(
            str(self), causal, lengths=self.lengths, capacity=self.capacity, num_heads=8,
            num_heads_kv=2, head_dim=self.head_dim, block_size=self.block_size or None,
        )  # fmt: skip
        case = feature.case(DTYPES[self.dtype], device)
        if self.block_size:
            # Rows own their blocks in turns, so that they have all that they grow into.
            rows, columns = case.kwargs["block_table"].shape
            table = torch.arange(rows * columns, dtype=torch.int32, device=device)
            case.kwargs["block_table"] = table.view(columns, rows).T.contiguous()
            draw = Draw(DTYPES[self.dtype], device)
            shape = (rows * columns, self.block_size, 2, self.head_dim)
            k, v = (draw.normal(*shape) for _ in range(2))
            case = dataclasses.replace(case, k_cache=k, v_cache=v)
        rotary = Rotary.make(self.head_dim, self.capacity, device=device)
        return dataclasses.replace(case, kwargs={**case.kwargs, "rotary": rotary})

    def _tokens(self, device: torch.device) -> list[tuple[Tensor, ...]]:
        """q, k and v of each step."""
        draw, batch = Draw(DTYPES[self.dtype], device), len(self.lengths)
        return [
            tuple(draw.normal(batch, 1, heads, self.head_dim) for heads in (8, 2, 2))
            for _ in range(self.steps)
        ]


def _state(case: CacheCase) -> list[Tensor]:
    """What a step changes."""
    return [case.cache.k, case.cache.v, case.kwargs["cache_seqlens"]]


def _step(case: CacheCase, impl: str) -> Callable[[], Tensor]:
    """One step of decoding, after which the rows are one longer."""

    def run() -> Tensor:
        out = case.call(attention_with_kv_cache, impl=impl)
        case.kwargs["cache_seqlens"].add_(1)
        return out

    return run


def _decode(
    case: CacheCase, tokens: list[tuple[Tensor, ...]], step: Callable[[], Tensor]
) -> list[Tensor]:
    """The outputs of a step for each of the tokens, which are put where the step looks."""
    outs = []
    for new in tokens:
        for target, source in zip((case.q, case.k, case.v), new, strict=True):
            assert target is not None  # each step appends a token
            target.copy_(source)
        outs.append(step().clone())
    return outs


def _captured(case: CacheCase) -> Callable[[], Tensor]:
    """A step as a graph; on a CPU, which has none, the step."""
    return captured(_step(case, "triton"), _state(case))


def captured(step: Callable[[], Tensor], state: list[Tensor]) -> Callable[[], Tensor]:
    """A function as a graph, after which `state` is as before; on a CPU the function itself.

    Args:
        step: gives the tensor that the replays fill.
        state: what it changes.
    """
    if not state[0].is_cuda:
        return step
    before = [tensor.clone() for tensor in state]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for tensor, own in zip(state, before, strict=True):
        tensor.copy_(own)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Also where both are NaN."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def graph_checks(dtype: str) -> list[GraphCheck]:
    """Each way to join splits, and none, contiguous and paged."""
    return [
        GraphCheck(dtype, splits, last, block_size)
        for block_size in (0, 16)
        for splits, last in ((True, False), (True, True), (False, False))
    ]


# --- batches


@dataclass(frozen=True)
class InvarianceCheck:
    """batch_invariant=True: the bits of a row in batches of 1, 3 and 16.

    Attributes:
        dtype, head_dim, seqlen_q, block_size: of the problem; 0 is contiguous.
    """

    dtype: str
    head_dim: int = 128
    seqlen_q: int = 1
    block_size: int = 0
    capacity: int = 1024
    kind: ClassVar[str] = "batch invariance"

    def __str__(self) -> str:
        layout = f"paged {self.block_size}" if self.block_size else "contiguous"
        return (
            f"a row in batches of 1, 3 and 16, {self.dtype}, D{self.head_dim}, "
            f"{self.seqlen_q} queries, {layout}"
        )

    def run(self, device: torch.device) -> Row:
        """Rows alone and among others.

        Raises:
            WrongResult: a bit differs.
        """
        largest = self.capacity - self.seqlen_q
        lengths = tuple((97 * index * index + 211) % largest for index in range(16))
        feature = CacheFeature(
            str(self), _invariant, lengths=lengths, seqlen_q=self.seqlen_q, capacity=self.capacity,
            num_heads=8, num_heads_kv=2, head_dim=self.head_dim,
            block_size=self.block_size or None,
        )  # fmt: skip
        case = feature.case(DTYPES[self.dtype], device)
        whole = _rows_of(case, range(16))
        for batch in ((3,), (4, 3, 7), (11,), (2, 9, 11)):
            part = _rows_of(case, batch)
            for name in whole:
                for place, row in enumerate(batch):
                    if not _same_bits(part[name][place], whole[name][row]):
                        raise WrongResult(
                            f"{name} of row {row} differs between batches of {len(batch)} and 16"
                        )
        return {}


def _invariant(draw: Draw) -> dict[str, Any]:
    return {"causal": True, "batch_invariant": True}


def _rows_of(case: CacheCase, batch: Iterable[int]) -> dict[str, Tensor]:
    """Output and log-sum-exp of some rows, called by themselves on caches of their own."""
    rows = torch.tensor(list(batch), device=case.q.device)
    pages = "block_table" in case.kwargs
    kwargs = {
        name: value[rows] if name in ("cache_seqlens", "block_table") else value
        for name, value in case.kwargs.items()
    }
    k_cache, v_cache = (x.clone() if pages else x[rows] for x in (case.cache.k, case.cache.v))
    k, v = (None if x is None else x[rows] for x in (case.k, case.v))
    own = CacheCase(case.q[rows], k_cache, v_cache, k, v, kwargs)
    out, lse = own.call(attention_with_kv_cache, impl="triton", return_lse=True)
    return {"out": out, "lse": lse}


def invariance_checks(dtype: str) -> list[InvarianceCheck]:
    """One token and several, contiguous and paged."""
    return [
        InvarianceCheck(dtype),
        InvarianceCheck(dtype, block_size=16),
        InvarianceCheck(dtype, seqlen_q=4),
        InvarianceCheck(dtype, head_dim=64, seqlen_q=4, block_size=16),
    ]
