"""fastattn as an attention implementation of Hugging Face transformers.

    import fastattn.integrations.transformers as fastattn_hf

    model = AutoModel.from_pretrained(name, attn_implementation="fastattn")
    model = fastattn_hf.enable(model)             # or: on a model that is loaded already
    print(fastattn_hf.report(model, **inputs))    # which layers were served, by what, and why

Importing this module registers the attention function and the mask function. Both are needed: with
the first alone, transformers makes no mask, and padding is attended to.

Any model that calls transformers' attention interface is served. XLNet and DeBERTa, which do not,
are served after `enable` gave them adapters; any other such model raises `UnservedModelError`. What
a layer passes that would change the result and is not served raises too (`transformers_arguments`).

Outputs at query positions that are padding are not those of eager attention: there they are 0 or
what the padding's own rows give, never NaN.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastattn.biases import Bias, DenseBias
from fastattn.integrations import transformers_adapters as adapters
from fastattn.integrations.transformers_arguments import (
    UnknownArgumentWarning,
    check_kwargs,
    check_mask_function,
    check_registered,
    register,
)
from fastattn.integrations.transformers_call import attend, current_impl, use_impl, wants_dense
from fastattn.integrations.transformers_masks import LazyMask, attention_mask
from fastattn.integrations.transformers_report import (
    NAME,
    LayerReport,
    Report,
    UnservedModelError,
    report,
    uses_interface,
)
from fastattn.integrations.transformers_t5 import as_bias
from fastattn.integrations.transformers_unpad import unpad
from fastattn.masks import DenseMask, Lengths, Mask, Packed
from fastattn.recording import CallKind, forget

__all__ = [
    "NAME",
    "CallKind",
    "LayerReport",
    "Report",
    "UnknownArgumentWarning",
    "UnservedModelError",
    "attention_forward",
    "attention_mask",
    "disable",
    "enable",
    "report",
    "unpad",
    "use_impl",
]

# On CPU a padded batch is computed sequence by sequence. That costs a call each, with windows also
# a mask each, and must save more than that: 55 and 180 us measured, in floating-point operations
# of a thread that does 55 GFLOP/s; the threads wait for each other once more, hence the surcharge.
_FLOPS_PER_SEQUENCE = 5e6
_FLOPS_PER_WINDOWED_SEQUENCE = 10e6

# What the parts of a model ran before `enable`.
_before: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


def enable(model: PreTrainedModel) -> PreTrainedModel:
    """Sets `attn_implementation="fastattn"` on a loaded model, and starts its report afresh.

    XLNet and DeBERTa, which never ask for an attention implementation, and T5 and its kin, whose
    position bias is better given as a table, get adapters (see `transformers_adapters`). Of a model
    made of parts, those that fastattn cannot serve stay as they are, and the report says so.
    `disable` undoes it; `set_attn_implementation` does not reach adapters of XLNet and DeBERTa.

    Returns:
        The model itself.

    Raises:
        TypeError: not a transformers model.
        UnservedModelError: none of its attention layers uses transformers' attention interface.
        RuntimeError: the name "fastattn" was registered by somebody else.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    check_registered(attention_forward, attention_mask)
    adapted = any(adapters.adapter_of(module) for module in model.modules())
    if not adapted and not uses_interface(model):
        raise UnservedModelError.for_model(model)
    settable = [part for part in _parts(model) if part._can_set_attn_implementation()]
    for part in settable:
        # Some releases do not reach parts whose config is a copy, such as the two stacks of T5.
        if (implementation := part.config._attn_implementation) != NAME:
            _before.setdefault(part, implementation)
    for part in settable:
        if part.config._attn_implementation != NAME:
            part.set_attn_implementation(NAME)
    for module in model.modules():
        adapters.adapt(module)
    forget(model)
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `enable`: every part has the attention that it had before.

    A part that was loaded with `attn_implementation="fastattn"`, or copied since, gets "eager".

    Returns:
        The model itself.
    """
    for module in model.modules():
        adapters.restore(module)
    for part in _parts(model):
        if part._can_set_attn_implementation() and part.config._attn_implementation == NAME:
            part.set_attn_implementation(_before.pop(part, None) or "eager")
    return model


def _parts(model: nn.Module) -> list[PreTrainedModel]:
    """The model and the models in it, each of which has a config."""
    return [part for part in model.modules() if isinstance(part, PreTrainedModel)]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered as "fastattn", with transformers' calling convention.

    Args:
        module: the attention layer; its `is_causal` counts (default True) where no mask is given.
        query: (batch, num_heads, seqlen_q, head_dim).
        key, value: (batch, num_heads_kv, seqlen_k, ...), not repeated for grouped heads.
        attention_mask: from `attention_mask` above, or a bool tensor (True = attend) or a floating
            one (added to the scores) that broadcasts to (batch, num_heads, seqlen_q, seqlen_k).
            None: causal, the last query with the last key, or everything.
        scaling: factor on query @ key.T; default head_dim ** -0.5.
        sliding_window: part of the mask already; without a mask it must not cut anything.
        s_aux, or `sinks`: one logit a head, (num_heads,).
        position_bias: added to the scores, a tensor broadcastable like the mask or a `LazyBias`.
        kwargs: `output_attentions`, `cu_seq_lens_q` and its kin (used where there is no mask);
            what cannot change the result is ignored (see `transformers_arguments`).

    Returns:
        Output (batch, seqlen_q, num_heads, head_dim_v), and None, or the attention weights
        (batch, num_heads, seqlen_q, seqlen_k) where `output_attentions` was asked for.

    Raises:
        NotImplementedError: an argument that changes the result and is not served.
        RuntimeError: registered under another name, for which there is no mask function.
        ValueError, TypeError: as `fastattn.attention`.
    """
    check_kwargs(module, kwargs)
    _check_layer(module, position_bias)
    sinks = s_aux if s_aux is not None else kwargs.get("sinks")
    # Views: fastattn takes any strides.
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if q.shape[0] != k.shape[0]:  # learned queries come with a batch of one
        batch = max(q.shape[0], k.shape[0])
        q, k, v = (t.expand(batch, -1, -1, -1) if t.shape[0] == 1 else t for t in (q, k, v))

    wants_weights = _wants_weights(kwargs)
    mask: Mask | Tensor | None = None
    bias: Bias | None = None if position_bias is None else as_bias(position_bias, q, k)
    causal = False
    if attention_mask is None:
        causal = _is_causal(module) if is_causal is None else bool(is_causal)
        causal = causal and q.shape[1] > 1
        mask = _packed(kwargs)
        if mask is None and sliding_window is not None:
            _check_window(sliding_window, causal, k.shape[1])
    elif isinstance(attention_mask, LazyMask):
        # Of packed sequences a dense bias would be one for each, which (1, heads, N, N) is not.
        whole = wants_weights or (bias is not None and attention_mask.sequences is not None)
        mask = _from_lazy(attention_mask, q, k, v, whole)
    elif attention_mask.is_floating_point():
        added = DenseBias(attention_mask)
        bias = added if bias is None else bias + added
    else:
        mask = _from_tensor(attention_mask)

    return attend(
        module, q, k, v, dropout_p=dropout, weights=wants_weights, causal=causal, mask=mask,
        bias=bias, softmax_scale=scaling, softcap=softcap or 0.0, sinks=sinks,
    )  # fmt: skip


def _is_causal(module: nn.Module) -> bool:
    """Whether a layer without a mask is causal, as it says itself."""
    if getattr(module, "is_causal", True):
        return True
    # UMT5's decoder, in some releases, says that it is not. Cross-attention has no table.
    decoder = getattr(module, "is_decoder", False)
    return bool(decoder) and "relative_attention_bias" in module._modules


def _check_layer(module: nn.Module, position_bias: Tensor | None) -> None:
    """What is looked at in every call, in case `enable` has not seen the model."""
    if _compiling():
        return
    config = getattr(module, "config", None)
    implementation = getattr(config, "_attn_implementation", NAME)
    if implementation != NAME:
        check_mask_function(implementation)
    elif position_bias is not None:
        # Loaded with attn_implementation="fastattn": from the next call on, T5's bias is a table.
        adapters.adapt(module)


def _check_window(sliding_window: int, causal: bool, seqlen_k: int) -> None:
    """Raises where a window would cut keys and no mask says so."""
    # A causal window counts the query's own key, a bidirectional one does not.
    if seqlen_k > sliding_window + (not causal):
        raise ValueError(
            f"sliding_window is {sliding_window} of {seqlen_k} keys and attention_mask is None: "
            "the window is part of the mask, which the model must make"
        )


def _compiling() -> bool:
    return torch.compiler.is_compiling()


def _from_lazy(lazy: LazyMask, q: Tensor, k: Tensor, v: Tensor, whole_rows: bool) -> Mask:
    """The mask to compute with: the structure, or the tensor where that is faster or needed."""
    batch, _, seqlen_q, seqlen_k = lazy.sizes
    fits = (q.shape[0], q.shape[1], k.shape[1]) == (batch, seqlen_q, seqlen_k)
    if not fits or lazy.touched or whole_rows:
        return DenseMask(lazy.built())
    if not wants_dense(q.device):
        return lazy.structure
    if lazy.keys_within_bounds >= 0 and current_impl() != "reference" and not _compiling():
        pairs_left_out = seqlen_q * (batch * seqlen_k - lazy.keys_within_bounds)
        flops_left_out = 2 * pairs_left_out * q.shape[2] * (q.shape[3] + v.shape[3])
        cost = _FLOPS_PER_WINDOWED_SEQUENCE if lazy.windows else _FLOPS_PER_SEQUENCE
        if flops_left_out > lazy.pieces * cost * torch.get_num_threads():
            return lazy.structure
    return DenseMask(lazy.built())


def _from_tensor(mask: Tensor) -> Mask:
    """A bool tensor as a mask; in a graph on a GPU, with the lengths behind a padding mask.

    torch.compile gets plain tensors for masks, and a padding mask is expanded along the queries.
    Every layer computes its lengths, which the compiler makes one computation of.
    """
    dense = DenseMask(mask)
    if not _compiling() or mask.device.type == "cpu" or mask.dim() != 4:
        return dense
    if mask.stride(2) != 0 or mask.shape[1] != 1 or mask.dtype != torch.bool:
        return dense
    size = mask.shape[3]
    visible = mask[:, 0, 0]
    position = torch.arange(1, size + 1, device=mask.device, dtype=torch.int32)
    ends = (visible * position).amax(1)
    starts = size - (visible * position.flip(0)).amax(1)
    return DenseMask(mask[:, :, :1]) & Lengths(ends, starts_k=starts)


def _packed(kwargs: dict[str, Any]) -> Packed | None:
    """The packed sequences that flash-attn style arguments describe."""
    cu_seqlens_q = kwargs.get("cu_seq_lens_q")
    if cu_seqlens_q is None:
        return None
    longest_q, longest_k = kwargs.get("max_length_q"), kwargs.get("max_length_k")
    return Packed(
        cu_seqlens_q,
        kwargs.get("cu_seq_lens_k"),  # type: ignore[arg-type]
        None if longest_q is None else int(longest_q),  # type: ignore[arg-type]
        None if longest_k is None else int(longest_k),  # type: ignore[arg-type]
    )


def _wants_weights(kwargs: dict[str, Any]) -> bool:
    """Whether the model is collecting attention weights.

    Some models keep `output_attentions` to themselves, and transformers collects by hooks what the
    layers return; without weights the user would get an empty tuple.
    """
    if kwargs.get("output_attentions"):
        return True
    if _compiling() or _collector is None:
        return False
    collected = _collector.get()
    return bool(collected) and any("attentions" in name for name in collected)


try:  # not public: another release may keep it elsewhere
    from transformers.utils import output_capturing as _output_capturing

    _collector: Any = _output_capturing._active_collector
except (ImportError, AttributeError):
    _collector = None

register(attention_forward, attention_mask)
