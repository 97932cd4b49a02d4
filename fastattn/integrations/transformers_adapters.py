"""Attention classes of transformers that need more than the attention interface.

A module is adapted by giving it a subclass of its class, made of a mixin and that class: weights,
hooks, names and `isinstance` stay as they are, copies and pickles of the model work, and giving
back the class undoes it.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import nn

from fastattn.integrations.transformers_deberta import DebertaAttention, DebertaV2Attention
from fastattn.integrations.transformers_t5 import TableBias
from fastattn.integrations.transformers_xlnet import XLNetAttention

_MODELS = "transformers.models."

# Module and class, by the name that the adapted class is known by.
_BASES: dict[str, tuple[str, str, type[nn.Module]]] = {
    "T5Attention": ("t5.modeling_t5", "T5Attention", TableBias),
    "MT5Attention": ("mt5.modeling_mt5", "MT5Attention", TableBias),
    "UMT5Attention": ("umt5.modeling_umt5", "UMT5Attention", TableBias),
    "SwitchTransformersAttention": (
        "switch_transformers.modeling_switch_transformers",
        "SwitchTransformersAttention",
        TableBias,
    ),
    "Pop2PianoAttention": ("pop2piano.modeling_pop2piano", "Pop2PianoAttention", TableBias),
    "XLNetRelativeAttention": ("xlnet.modeling_xlnet", "XLNetRelativeAttention", XLNetAttention),
    "DebertaV2SelfAttention": (
        "deberta_v2.modeling_deberta_v2",
        "DisentangledSelfAttention",
        DebertaV2Attention,
    ),
    "DebertaSelfAttention": (
        "deberta.modeling_deberta",
        "DisentangledSelfAttention",
        DebertaAttention,
    ),
}
_NAMES = {(_MODELS + module, name): known_as for known_as, (module, name, _) in _BASES.items()}


@functools.cache
def _adapted(known_as: str) -> type[nn.Module]:
    """The subclass of a class of transformers."""
    module, name, mixin = _BASES[known_as]
    base = getattr(importlib.import_module(_MODELS + module), name)
    # Named as its base in reports; pickles find it in this module, by its qualified name.
    names = {"__module__": __name__, "__qualname__": known_as, "__doc__": mixin.__doc__}
    return type(name, (mixin, base), names)


def __getattr__(name: str) -> Any:
    if name in _BASES:
        return _adapted(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def adapt(module: nn.Module) -> bool:
    """Adapts a module in place.

    Returns:
        Whether its class is one that has an adapter; False leaves it as it is.
    """
    if is_adapted(module):
        return True
    # Exactly the class: what a subclass changes is not known.
    known_as = _NAMES.get((type(module).__module__, type(module).__name__))
    if known_as is None:
        return False
    module.__class__ = _adapted(known_as)
    return True


def restore(module: nn.Module) -> None:
    """Undoes `adapt`."""
    if is_adapted(module):
        module.__class__ = type(module).__mro__[2]  # itself, the mixin, the class it had


def is_adapted(module: nn.Module) -> bool:
    """Whether `adapt` changed its class."""
    return type(module).__module__ == __name__


def adapter_of(module: nn.Module) -> type[nn.Module] | None:
    """The mixin that serves modules of this class, adapted or not; None if there is none."""
    cls = type(module)
    known_as = (
        cls.__qualname__ if is_adapted(module) else _NAMES.get((cls.__module__, cls.__name__))
    )
    return None if known_as is None else _BASES[known_as][2]


def replaces_attention(module: nn.Module) -> bool:
    """Whether there is an adapter without which fastattn would never be called by it."""
    return adapter_of(module) not in (None, TableBias)
