"""Which attention layers of a transformers model fastattn served, by what, which not and why."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastattn import dispatch
from fastattn.dispatch import Explanation
from fastattn.masks import Mask
from fastattn.problem import AttentionProblem

NAME = "fastattn"

# What an implementation runs, for the table.
_KERNELS = {
    "triton": "_attention_forward_kernel",
    "sdpa": "torch scaled_dot_product_attention",
    "reference": "plain torch",
}


class UnservedModelError(RuntimeError):
    """No attention layer of a model was served by fastattn; the message says why."""

    @classmethod
    def for_model(cls, model: nn.Module) -> UnservedModelError:
        """The error of a model whose layers compute attention by themselves."""
        return cls(
            f"{_name(model)} never calls transformers' attention interface, so that fastattn "
            f"cannot serve it: {_listed(attention_modules(model))} computes attention by itself, "
            "whatever attn_implementation says"
        )


@dataclass(frozen=True)
class LayerReport:
    """One attention layer.

    Attributes:
        name: of the module within the model.
        module: name of its class.
        calls: number of calls by implementation ("triton", "sdpa", "reference").
        explanations: for each kind of call, what ran, on what, and why not the others.
        reason: why it was not served; empty if it was.
    """

    name: str
    module: str
    calls: dict[str, int]
    explanations: tuple[Explanation, ...]
    reason: str

    @property
    def served(self) -> bool:
        """Whether fastattn computed at least one of its calls."""
        return bool(self.calls)


@dataclass(frozen=True)
class Report:
    """The attention layers of a model; `str()` of it is a table."""

    model: str
    layers: tuple[LayerReport, ...]

    @property
    def layers_total(self) -> int:
        """Number of attention layers."""
        return len(self.layers)

    @property
    def layers_served(self) -> int:
        """Number of attention layers that fastattn served."""
        return sum(layer.served for layer in self.layers)

    def __str__(self) -> str:
        head = f"{self.model}: {self.layers_served} of {self.layers_total} attention layers served"
        rows = [("layer", "module", "calls", "served by")]
        for layer in self.layers:
            kernels = ", ".join(f"{name} ({_KERNELS.get(name, name)})" for name in layer.calls)
            count = str(sum(layer.calls.values()))
            rows.append((layer.name, layer.module, count, kernels or f"no: {layer.reason}"))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        table = [
            f"  {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}"
            for row in rows
        ]
        # Layers ask for the same: each kind of call is explained once.
        explained = {str(text): None for layer in self.layers for text in layer.explanations}
        return "\n".join([head, *table, *explained])


@dataclass
class _Calls:
    """The calls of one module: how many of each kind, and the first of each explained."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    explanations: dict[tuple[str, str], Explanation] = field(default_factory=dict)


_calls: weakref.WeakKeyDictionary[nn.Module, _Calls] = weakref.WeakKeyDictionary()
_current = threading.local()


class Recording:
    """Within it, attention calls count as those of `module`."""

    def __init__(self, module: nn.Module, impl: str) -> None:
        self._owner = (module, impl)

    def __enter__(self) -> None:
        _current.owner = self._owner

    def __exit__(self, *error: object) -> None:
        _current.owner = None


def _record(name: str, problem: AttentionProblem) -> None:
    if torch.compiler.is_compiling():
        return
    owner = getattr(_current, "owner", None)
    if owner is None:
        return
    module, impl = owner
    calls = _calls.get(module)
    if calls is None:
        calls = _calls[module] = _Calls()
    kind = (name, _kinds(problem.mask))
    calls.counts[kind] += 1
    # To explain a call costs more than to compute some: done for the first of each kind.
    if kind not in calls.explanations:
        calls.explanations[kind] = dispatch.explain(problem, impl)


dispatch.listeners.append(_record)


def _kinds(mask: Mask | None) -> str:
    return " ".join(type(part).__name__ for part in getattr(mask, "parts", (mask,)))


def forget(model: nn.Module) -> None:
    """Starts the counts of a model's layers at zero."""
    for module in model.modules():
        _calls.pop(module, None)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention layers of a model by name: those that called fastattn, and those named so.

    By transformers' convention, a layer's class has "Attention" in its name. Of classes within each
    other, such as BertSelfAttention in BertAttention, the innermost counts.
    """

    def looks_like_attention(module: nn.Module) -> bool:
        named = "Attention" in type(module).__name__ or type(module).__name__.endswith("Attn")
        return named and any(True for _ in module.parameters())

    found = {}
    for name, module in model.named_modules():
        inner = (other for other in module.modules() if other is not module)
        if module in _calls or (
            looks_like_attention(module) and not any(looks_like_attention(m) for m in inner)
        ):
            found[name] = module
    return found


def report(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Which attention layers of a model fastattn served, from the calls they really made.

    Args:
        model: a transformers model, or `torch.compile` of one.
        args, kwargs: inputs. If there are any, the counts start at zero and the model is run on
            them once, without gradients and uncompiled. Otherwise the calls since `enable(model)`,
            or since the model was made, are reported; calls inside a compiled graph are not seen.

    Raises:
        UnservedModelError: not a single layer was served: the model computes attention without
            transformers' interface, has another attn_implementation, or was not run.
    """
    model = getattr(model, "_orig_mod", model)
    if args or kwargs:
        forget(model)
        with torch.no_grad():
            model(*args, **kwargs)
    layers = []
    for name, module in attention_modules(model).items():
        calls = _calls.get(module, _Calls())
        counts: Counter[str] = Counter()
        for (implementation, _), count in calls.counts.items():
            counts[implementation] += count
        reason = "" if counts else _reason(module, model)
        layers.append(
            LayerReport(
                name,
                type(module).__name__,
                dict(counts),
                tuple(calls.explanations.values()),
                reason,
            )
        )
    result = Report(_name(model), tuple(layers))
    if result.layers_served:
        return result
    if getattr(type(model), "_can_set_attn_implementation", lambda: True)():
        reasons = "; ".join(dict.fromkeys(layer.reason for layer in layers)) or "no such layer"
        raise UnservedModelError(
            f"fastattn served no attention layer of {_name(model)} "
            f"({_listed(attention_modules(model))}): {reasons}"
        )
    raise UnservedModelError.for_model(model)


def _reason(module: nn.Module, model: nn.Module) -> str:
    config = getattr(module, "config", None) or getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation != NAME:
        return f'its attn_implementation is "{implementation}"; enable(model) sets "{NAME}"'
    return (
        "it did not call the attention interface: it was not run (give report() inputs), ran in a "
        "compiled graph, or computes attention by itself"
    )


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _listed(modules: dict[str, nn.Module]) -> str:
    counts = Counter(type(module).__name__ for module in modules.values())
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "no attention layer"
