"""`replace_attention`: fastattn in a model that is there already, and the truth about it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastattn.nn import MultiheadAttention
from fastattn.nn.attending import Attending
from fastattn.recording import (
    KERNELS,
    CallKind,
    aligned,
    attention_modules,
    calls_of,
    forget,
)

_SDPA = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Layer:
    """One attention module of a model.

    Attributes:
        name: within the model, "" for the model itself.
        module: name of its class, before.
        by: what computes it now; empty if it was left.
        reason: why it was left; empty if it was not.
        layer: the module.
    """

    name: str
    module: str
    by: str
    reason: str
    layer: nn.Module = field(repr=False)

    @property
    def replaced(self) -> bool:
        """Whether fastattn computes it now."""
        return bool(self.by)


@dataclass(frozen=True)
class LayerCalls:
    """What one attention module called since it was replaced.

    Attributes:
        name: of the module within the model.
        calls: number of calls by implementation ("triton", "sdpa", "reference").
        shapes: number of calls by implementation and shapes, in the order of their first call.
        reason: why there were none; empty if there were.
    """

    name: str
    calls: dict[str, int]
    shapes: dict[CallKind, int]
    reason: str


@dataclass(frozen=True)
class CallReport:
    """What every attention module of a model called; `str()` of it is a table."""

    model: str
    layers: tuple[LayerCalls, ...]

    def __str__(self) -> str:
        called = sum(bool(layer.calls) for layer in self.layers)
        head = f"{self.model}: {called} of {len(self.layers)} attention modules called fastattn"
        if not self.layers:
            return head
        rows = [("module", "calls", "ran")]
        for layer in self.layers:
            kinds = [
                f"{KERNELS[kind.implementation]}, {str(kind).partition(': ')[2]}"
                + (f" ({count} times)" if count > 1 else "")
                for kind, count in layer.shapes.items()
            ]
            if len(kinds) > 2:
                kinds = [kinds[0], f"... {len(kinds) - 2} more ...", kinds[-1]]
            count = str(sum(layer.calls.values()))
            rows.append((layer.name or "(model)", count, "; ".join(kinds) or layer.reason))
        return "\n".join([head, *aligned(rows, numbers=1)])


@dataclass(frozen=True)
class Report:
    """Every attention module of a model: replaced by what, or left and why. `str()` is a table.

    Attributes:
        model: name of its class.
        layers: in the model's order.
    """

    model: str
    layers: tuple[Layer, ...]
    _undo: list[Callable[[], Any]] = field(default_factory=list, repr=False)

    @property
    def replaced(self) -> int:
        """How many modules fastattn computes now."""
        return sum(layer.replaced for layer in self.layers)

    def calls(self) -> CallReport:
        """Which kernel really ran in each module since the replacement, how often, on which shapes.

        Calls inside a compiled graph are not seen.
        """
        found = []
        for layer in self.layers:
            calls = calls_of(layer.layer)
            reason = layer.reason or "nothing: it was not run, or in a compiled graph"
            counts = calls.by_implementation
            found.append(
                LayerCalls(layer.name, counts, dict(calls.shapes), "" if counts else reason)
            )
        return CallReport(self.model, tuple(found))

    def undo(self) -> None:
        """Puts everything back as it was. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        head = f"{self.model}: {self.replaced} of {len(self.layers)} attention modules replaced"
        if not self.layers:
            return f"{head}: it has none that fastattn knows"
        rows = [("module", "class", "now")]
        for layer in self.layers:
            now = layer.by or f"left: {layer.reason}"
            rows.append((layer.name or "(model)", layer.module, now))
        return "\n".join([head, *aligned(rows)])


def replace_attention(model: nn.Module) -> Report:
    """Makes fastattn compute the attention of a model, in place.

        report = fastattn.replace_attention(model)
        print(report)           # each attention module: replaced by what, or left and why
        model(inputs)
        print(report.calls())   # which kernel really ran, how often, on which shapes
        report.undo()

    Every `torch.nn.MultiheadAttention`, also within `nn.TransformerEncoderLayer` and its kin,
    becomes a `fastattn.nn.MultiheadAttention`, which shares its parameters. Models of Hugging Face
    transformers, and those within another model, get the attention implementation "fastattn" and
    where they need one an adapter (see `fastattn.integrations.transformers`). Nothing else is
    changed; a module with "Attention" in the name of its class is listed with why it was left.

    Args:
        model: any module, before or after it is moved to its device; not compiled yet.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found: dict[nn.Module, tuple[str, str, str]] = {}  # class, by, reason
    undo: list[Callable[[], Any]] = []
    for pretrained in _pretrained(model):
        found |= _replace_transformers(pretrained, undo)
    for module in model.modules():
        if isinstance(module, Attending):
            found[module] = (type(module).__name__, "fastattn, as before", "")
        elif isinstance(module, nn.MultiheadAttention):
            found[module] = _replace_torch(module, undo)
    layers = []
    for name, module in attention_modules(model, found).items():
        kind = found.get(module) or (type(module).__name__, "", _why_left(module))
        layers.append(Layer(name, *kind, module))
    forget(model)
    return Report(type(model).__name__, tuple(layers), undo)


def _replace_torch(
    module: nn.MultiheadAttention, undo: list[Callable[[], Any]]
) -> tuple[str, str, str]:
    name = type(module).__name__
    try:
        undo.append(MultiheadAttention.convert(module))
    except (TypeError, ValueError) as error:
        return name, "", str(error)
    return name, "fastattn.nn.MultiheadAttention", ""


def _pretrained(model: nn.Module) -> list[Any]:
    """The models of transformers in a model, without their parts; none if it is not loaded."""
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return []
    found: list[Any] = []
    parts: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel) and module not in parts:
            found.append(module)
            parts.update(module.modules())
    return found


def _replace_transformers(
    model: Any, undo: list[Callable[[], Any]]
) -> dict[nn.Module, tuple[str, str, str]]:
    from fastattn.integrations import transformers as integration
    from fastattn.integrations.transformers_report import served_by

    names = {module: type(module).__name__ for module in model.modules()}
    try:
        integration.enable(model)
    except (integration.UnservedModelError, RuntimeError) as error:
        modules = attention_modules(model).values()
        return {module: (names[module], "", str(error)) for module in modules}
    undo.append(lambda: integration.disable(model))
    found = {}
    for module in attention_modules(model).values():
        if not isinstance(module, nn.MultiheadAttention):
            by, reason = served_by(module, model)
            found[module] = (names[module], by, reason)
    return found


def _why_left(module: nn.Module) -> str:
    forward = getattr(type(module), "forward", None)
    names = forward.__code__.co_names if isinstance(forward, types.FunctionType) else ()
    if _SDPA in names:
        return f"it calls {_SDPA}, which fastattn.integrations.sdpa.install() serves"
    return f"a class of {type(module).__module__}, which fastattn does not know"
