"""Which attention layers of a transformers model fastattn served, by what, which not and why."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastattn.dispatch import Explanation
from fastattn.recording import (
    KERNELS,
    CallKind,
    aligned,
    attention_modules,
    calls_of,
    forget,
)

NAME = "fastattn"


class UnservedModelError(RuntimeError):
    """No attention layer of a model was served by fastattn; the message says why."""

    @classmethod
    def for_model(cls, model: nn.Module) -> UnservedModelError:
        """The error of a model whose layers compute attention by themselves."""
        from fastattn.integrations.transformers_adapters import adapter_of

        if any(adapter_of(module) for module in model.modules()):
            return cls(
                f"fastattn served no attention layer of {_name(model)} "
                f"({_listed(attention_modules(model))}), which computes attention by itself, "
                "whatever attn_implementation says: enable(model) gives it an adapter"
            )
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
        shapes: number of calls by implementation and shapes, in the order of their first call.
    """

    name: str
    module: str
    calls: dict[str, int]
    explanations: tuple[Explanation, ...]
    reason: str
    shapes: dict[CallKind, int] = field(default_factory=dict)

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
            kernels = ", ".join(f"{name} ({KERNELS.get(name, name)})" for name in layer.calls)
            count = str(sum(layer.calls.values()))
            rows.append((layer.name, layer.module, count, kernels or f"no: {layer.reason}"))
        table = aligned(rows, numbers=2)
        # Layers ask for the same: each kind of call is explained once.
        explained = {str(text): None for layer in self.layers for text in layer.explanations}
        return "\n".join([head, *table, *explained])


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
        calls = calls_of(module)
        layers.append(
            LayerReport(
                name,
                type(module).__name__,
                calls.by_implementation,
                tuple(calls.explanations.values()),
                "" if calls.counts else _reason(module, model),
                dict(calls.shapes),
            )
        )
    result = Report(_name(model), tuple(layers))
    if result.layers_served:
        return result
    if not uses_interface(model) and not _is_adapted(model):
        raise UnservedModelError.for_model(model)
    reasons = "; ".join(dict.fromkeys(layer.reason for layer in layers)) or "no such layer"
    raise UnservedModelError(
        f"fastattn served no attention layer of {_name(model)} "
        f"({_listed(attention_modules(model))}): {reasons}"
    )


def uses_interface(model: nn.Module) -> bool:
    """Whether any module of the model is from a file that asks transformers for its attention."""
    files = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    files.discard("transformers.modeling_utils")  # where the functions themselves are
    return any(hasattr(sys.modules.get(file), "ALL_ATTENTION_FUNCTIONS") for file in files)


def served_by(module: nn.Module, model: nn.Module) -> tuple[str, str]:
    """What computes an attention layer of a model from now on, and if that is not fastattn, why.

    Returns:
        What of fastattn does, empty if nothing; and why not, empty if it does.
    """
    from fastattn.integrations.transformers_adapters import (
        adapter_of,
        is_adapted,
        replaces_attention,
    )

    adapter = adapter_of(module)
    if replaces_attention(module):
        if is_adapted(module) and adapter is not None:
            return f"fastattn, by the adapter {adapter.__name__}", ""
        return "", _reason(module, model)
    if not uses_interface(module):
        return "", f"{type(module).__name__} never calls transformers' attention interface"
    if _implementation(module, model) != NAME:
        return "", _reason(module, model)
    bias = ""
    if is_adapted(module):
        bare = getattr(module, "without_bias", False)
        bias = " (without the zeros for a bias)" if bare else " (position bias as a table)"
    return f'attn_implementation="{NAME}"{bias}', ""


def _is_adapted(model: nn.Module) -> bool:
    from fastattn.integrations.transformers_adapters import is_adapted

    return any(is_adapted(module) for module in model.modules())


def _reason(module: nn.Module, model: nn.Module) -> str:
    from fastattn.integrations.transformers_adapters import is_adapted, replaces_attention

    if replaces_attention(module):
        if not is_adapted(module):
            return "it computes attention by itself; enable(model) gives it an adapter"
        return "it was not run (give report() inputs), or ran what its adapter does not serve"
    implementation = _implementation(module, model)
    if implementation != NAME:
        return f'its attn_implementation is "{implementation}"; enable(model) sets "{NAME}"'
    return (
        "it did not call the attention interface: it was not run (give report() inputs), ran in a "
        "compiled graph, or computes attention by itself"
    )


def _implementation(module: nn.Module, model: nn.Module) -> str | None:
    config = getattr(module, "config", None) or getattr(model, "config", None)
    return getattr(config, "_attn_implementation", None)


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _listed(modules: dict[str, nn.Module]) -> str:
    counts = Counter(type(module).__name__ for module in modules.values())
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "no attention layer"
