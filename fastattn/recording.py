"""Which attention calls a module really made: what ran, on which shapes, how often.

A module that calls fastattn on its own behalf does so within `Recording(module, impl)`. Counts are
kept until `forget`; calls inside a compiled graph are not seen, since a graph runs without Python.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastattn import dispatch
from fastattn.cache_problem import CacheProblem
from fastattn.dispatch import Explanation

KERNELS = {
    "triton": "_attention_forward_kernel",
    "sdpa": "torch scaled_dot_product_attention",
    "reference": "plain torch",
}
"""What an implementation runs."""

_MOST_SHAPES = 256


@dataclass(frozen=True)
class CallKind:
    """Calls of one implementation on one set of shapes.

    Attributes:
        implementation: "triton", "sdpa" or "reference".
        q, k: shapes (batch, seqlen, num_heads, head_dim), packed (total, num_heads, head_dim); of a
            cache, k is its shape; () stands for all shapes after the first 256 of a module.
    """

    implementation: str
    q: tuple[int, ...]
    k: tuple[int, ...]

    def __str__(self) -> str:
        if not self.q:
            return f"{self.implementation}: other shapes"
        return f"{self.implementation}: q {_times(self.q)}, k {_times(self.k)}"


@dataclass
class ModuleCalls:
    """The calls of one module.

    Attributes:
        counts: of each implementation and kind of mask and bias.
        explanations: what ran in the first call of each of these, and why not the others.
        shapes: number of calls by implementation and shapes, in the order of their first call.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    explanations: dict[tuple[str, str], Explanation] = field(default_factory=dict)
    shapes: Counter[CallKind] = field(default_factory=Counter)

    @property
    def by_implementation(self) -> dict[str, int]:
        """Number of calls by implementation."""
        counts: Counter[str] = Counter()
        for (implementation, _), count in self.counts.items():
            counts[implementation] += count
        return dict(counts)


_calls: weakref.WeakKeyDictionary[nn.Module, ModuleCalls] = weakref.WeakKeyDictionary()


class _Current(threading.local):
    owner: tuple[nn.Module, str] | None = None


_current = _Current()


class Recording:
    """Within it, attention calls count as those of `module`."""

    def __init__(self, module: nn.Module, impl: str) -> None:
        self._owner = (module, impl)

    def __enter__(self) -> None:
        self._before = _current.owner
        _current.owner = self._owner

    def __exit__(self, *error: object) -> None:
        _current.owner = self._before


def calls_of(module: nn.Module) -> ModuleCalls:
    """What a module has called since `forget`; empty if nothing."""
    return _calls.get(module) or ModuleCalls()


def forget(model: nn.Module) -> None:
    """Starts the counts of a model's modules at zero."""
    for module in model.modules():
        _calls.pop(module, None)


def attention_modules(model: nn.Module, known: Collection[nn.Module] = ()) -> dict[str, nn.Module]:
    """The attention modules of a model by name: those known, those that called, those named so.

    By convention the class of one has "Attention" in its name, or ends with "Attn". Of classes
    within each other, such as BertSelfAttention in BertAttention, the innermost counts.
    """

    def is_one(module: nn.Module) -> bool:
        name = type(module).__name__
        named = "Attention" in name or name.endswith("Attn")
        return module in known or (named and any(True for _ in module.parameters()))

    found = {}
    for name, module in model.named_modules():
        inner = (other for other in module.modules() if other is not module)
        chosen = module in known or bool(calls_of(module).counts)
        if chosen or (is_one(module) and not any(map(is_one, inner))):
            found[name] = module
    return found


def _record(name: str, problem: Any) -> None:
    if _current.owner is None or torch.compiler.is_compiling():
        return
    module, impl = _current.owner
    calls = _calls.get(module)
    if calls is None:
        calls = _calls[module] = ModuleCalls()
    kind = (name, f"{_kinds(problem.mask)} {_kinds(problem.bias)}")
    calls.counts[kind] += 1
    k = problem.cache.k if isinstance(problem, CacheProblem) else problem.k
    shapes = CallKind(name, tuple(problem.q.shape), tuple(k.shape))
    # Each step of decoding has a length of its own: a server that runs for days must not keep all.
    if shapes not in calls.shapes and len(calls.shapes) >= _MOST_SHAPES:
        shapes = CallKind(name, (), ())
    calls.shapes[shapes] += 1
    # To explain a call costs more than to compute some: done for the first of each kind.
    if kind not in calls.explanations:
        calls.explanations[kind] = dispatch.explain(problem, impl)


dispatch.listeners.append(_record)


def aligned(rows: Iterable[Sequence[str]], numbers: int | None = None) -> list[str]:
    """Rows of a table as indented lines; the column `numbers` is aligned to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if index == numbers else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  " + "  ".join([*cells, row[-1]]).rstrip())
    return lines


def _kinds(value: Any) -> str:
    return " ".join(type(part).__name__ for part in getattr(value, "parts", (value,)))


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
