"""Wrong uses that would change results in silence, told instead.

What a layer passes to its attention function beyond what all functions take is one of four:

- served: used by fastattn (`position_bias`, `sliding_window`, `softcap`, `s_aux`, `cu_seq_lens_q`);
- known to change the result, and not served: an error;
- known not to change it: ignored;
- unknown: an error if the model's own `eager_attention_forward` names it, since the model counts on
  it; ignored if that function takes it among its `**kwargs` and never looks; a warning, once for
  each class and name, if there is no such function to judge by.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from fastattn.integrations.transformers_report import NAME

SERVED = frozenset(
    {
        "attention_mask", "cu_seq_lens_k", "cu_seq_lens_q", "dropout", "is_causal", "max_length_k",
        "max_length_q", "output_attentions", "position_bias", "s_aux", "scaling", "sinks",
        "sliding_window", "softcap",
    }
)  # fmt: skip

# They select keys, scale heads, or stand for keys that are not among the tensors.
UNSERVED = frozenset({"block_indices", "cache", "head_mask", "indices", "layer_head_mask"})

# Positions are in queries, keys and mask already; the rest is for the model, its loss, or the way
# in which flash-attn runs.
HARMLESS = frozenset(
    {
        "cache_position", "deterministic", "fastattn_packing", "logits_to_keep",
        "mm_token_type_ids", "num_items_in_batch", "output_hidden_states", "output_router_logits",
        "position_embeddings",
        "position_ids", "return_dict", "seq_idx", "token_type_ids", "use_cache",
    }
)  # fmt: skip

_KNOWN = SERVED | HARMLESS


class UnknownArgumentWarning(UserWarning):
    """A layer passes an argument that fastattn does not know and could not judge."""


def check_kwargs(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raises or warns where a layer passes what fastattn would leave out of the result.

    Raises:
        NotImplementedError: an argument is known to change the result, or the model's own eager
            attention uses it.
    """
    cls: Any = type(module)
    for name, value in kwargs.items():
        if value is None or name in _KNOWN:
            continue
        # A graph cannot look into source code.
        if name in UNSERVED or not torch.compiler.is_compiling():
            _judge(cls, name)


@functools.cache
def _judge(cls: Any, name: str) -> None:
    """Raises for an argument that changes results; warns, once, where that is not known."""
    eager = None if name in UNSERVED else _eager_attention(cls)
    if name in UNSERVED or (eager is not None and name in _names_used(eager)):
        raise NotImplementedError(
            f"{cls.__name__} passes {name}, which changes the result and which fastattn does not "
            'serve: use attn_implementation="eager" or "sdpa" for this model'
        )
    if eager is None:
        warnings.warn(
            f"{cls.__name__} passes {name} to its attention function, which fastattn does not know "
            "and leaves out: compare the results with eager attention",
            UnknownArgumentWarning,
            stacklevel=2,
        )


def _eager_attention(cls: type[nn.Module]) -> Callable | None:
    """`eager_attention_forward` of the file that a class, or one that it derives from, is in."""
    for base in cls.__mro__:
        module = sys.modules.get(base.__module__)
        function = getattr(module, "eager_attention_forward", None)
        if inspect.isfunction(function) and base is not nn.Module:
            return function
    return None


def _names_used(function: Callable) -> set[str]:
    """Parameters of a function, and every string in it: it may look into its kwargs."""
    parameters = inspect.signature(function).parameters.values()
    names = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return names | set(_strings(inspect.unwrap(function).__code__))


def _strings(code: types.CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _strings(constant)


# --- the names that are registered ----------------------------------------------------------------


def register(attention: Callable, mask: Callable) -> None:
    """Registers both functions under "fastattn".

    Raises:
        RuntimeError: somebody else's function is registered under that name.
    """
    check_registered(attention, mask, missing_is_fine=True)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def check_registered(attention: Callable, mask: Callable, missing_is_fine: bool = False) -> None:
    """Checks that the functions behind "fastattn" are these.

    Raises:
        RuntimeError: the name is another function's, or has no function.
    """
    for interface, ours in ((AttentionInterface, attention), (AttentionMaskInterface, mask)):
        found = interface._global_mapping.get(NAME)
        if found is None and missing_is_fine:
            continue
        if found is None or _origin(found) != _origin(ours):
            raise RuntimeError(
                f'"{NAME}" of transformers\' {interface.__name__} is '
                f"{'missing' if found is None else _origin(found)}, not {_origin(ours)}: models "
                f'with attn_implementation="{NAME}" would not compute what fastattn does. Register '
                "other functions under another name"
            )


def _origin(function: Any) -> str:
    # By name, so that a module that is loaded anew may register its functions again.
    name = getattr(function, "__qualname__", repr(function))
    return f"{getattr(function, '__module__', '?')}.{name}"


def check_mask_function(implementation: str | None) -> None:
    """Checks that models with this attn_implementation make masks.

    transformers makes none for a name without a mask function, and padding is attended to.

    Raises:
        RuntimeError: the name has none.
    """
    # A name before "|" says how kernels are cached, and none at all that a layer stands alone.
    if implementation in (None, NAME) or implementation in AttentionMaskInterface._global_mapping:
        return
    raise RuntimeError(
        f'fastattn\'s attention function is registered as "{implementation}", and no mask function '
        "is: transformers makes no mask for it, and padding would be attended to. Use "
        f'attn_implementation="{NAME}", or register the mask function too: '
        f'AttentionMaskInterface.register("{implementation}", '
        "fastattn.integrations.transformers.attention_mask)"
    )
