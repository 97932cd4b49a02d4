"""fastattn as an attention implementation of Hugging Face transformers.

    import fastattn.integrations.transformers as fastattn_hf

    model = AutoModel.from_pretrained(name, attn_implementation="fastattn")
    model = fastattn_hf.enable(model)             # or: on a model that is loaded already
    print(fastattn_hf.report(model, **inputs))    # which layers were served, by what, and why

Importing this module registers the attention function and the mask function. Both are needed: with
the first alone, transformers makes no mask, and padding is attended to.

Outputs at query positions that are padding are not those of eager attention: there they are 0 or
what the padding's own rows give, never NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fastattn import functional
from fastattn.dispatch import IMPLEMENTATIONS
from fastattn.integrations.transformers_masks import LazyMask, attention_mask
from fastattn.integrations.transformers_report import (
    LayerReport,
    Recording,
    Report,
    UnservedModelError,
    forget,
    report,
)
from fastattn.masks import DenseMask, Lengths, Mask, Packed

__all__ = [
    "NAME",
    "LayerReport",
    "Report",
    "UnservedModelError",
    "attention_forward",
    "attention_mask",
    "enable",
    "report",
    "use_impl",
]

NAME = "fastattn"
"""The attn_implementation. Without "flash" in it, which transformers takes for flash-attn."""

# Arguments that change the result and that fastattn has nothing for. A model passes them only if
# it counts on the attention function to use them.
_UNSERVED = ("head_mask", "layer_head_mask", "indices", "block_indices", "cache")

# On CPU a padded batch is computed sequence by sequence. That costs a call each, with windows also
# a mask each, and must save more than that: 55 and 180 us measured, in floating-point operations
# of a thread that does 55 GFLOP/s; the threads wait for each other once more, hence the surcharge.
_FLOPS_PER_SEQUENCE = 5e6
_FLOPS_PER_WINDOWED_SEQUENCE = 10e6

_impl = "auto"


@contextlib.contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Within it, models run this implementation: "auto" (default), "triton", "sdpa", "reference".

    One that is named runs or raises, as in `fastattn.attention`.

    Raises:
        ValueError: `impl` is unknown.
    """
    global _impl
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"impl must be one of {['auto', *IMPLEMENTATIONS]}, got {impl!r}")
    before, _impl = _impl, impl
    try:
        yield
    finally:
        _impl = before


def enable(model: PreTrainedModel) -> PreTrainedModel:
    """Sets `attn_implementation="fastattn"` on a loaded model, and starts its report afresh.

    Returns:
        The model itself.

    Raises:
        TypeError: not a transformers model.
        UnservedModelError: its attention layers do not use transformers' attention interface.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    if not model._can_set_attn_implementation():
        raise UnservedModelError.for_model(model)
    for part in model.modules():
        # Some releases do not reach parts whose config is a copy, such as the two stacks of T5.
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation != NAME:
            part.set_attn_implementation(NAME)
    forget(model)
    return model


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
        position_bias: added to the scores, broadcastable like the mask.
        kwargs: `output_attentions`, `cu_seq_lens_q` and its kin (used where there is no mask);
            what cannot change the result is ignored.

    Returns:
        Output (batch, seqlen_q, num_heads, head_dim_v), and None, or the attention weights
        (batch, num_heads, seqlen_q, seqlen_k) where `output_attentions` was asked for.

    Raises:
        NotImplementedError: an argument that changes the result and is not served.
        ValueError, TypeError: as `fastattn.attention`.
    """
    for name in _UNSERVED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{type(module).__name__} passes {name}, which changes the result and which "
                'fastattn does not serve: use attn_implementation="eager" or "sdpa" for this model'
            )
    sinks = s_aux if s_aux is not None else kwargs.get("sinks")
    # Views: fastattn takes any strides.
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if q.shape[0] != k.shape[0]:  # learned queries come with a batch of one
        batch = max(q.shape[0], k.shape[0])
        q, k, v = (t.expand(batch, -1, -1, -1) if t.shape[0] == 1 else t for t in (q, k, v))

    wants_weights = _wants_weights(kwargs)
    mask: Mask | Tensor | None = None
    bias = position_bias
    causal = False
    if attention_mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        causal = causal and q.shape[1] > 1
        mask = _packed(kwargs)
        if mask is None and sliding_window is not None:
            _check_window(sliding_window, causal, k.shape[1])
    elif isinstance(attention_mask, LazyMask):
        mask = _from_lazy(attention_mask, q, k, v, whole_rows=wants_weights)
    elif attention_mask.is_floating_point():
        bias = attention_mask if bias is None else bias + attention_mask
    else:
        mask = _from_tensor(attention_mask)

    options: dict[str, Any] = {
        "causal": causal,
        "mask": mask,
        "bias": bias,
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "sinks": sinks,
    }
    # A graph neither records nor could.
    record = contextlib.nullcontext() if _compiling() else Recording(module, _impl)
    with record:
        out = functional.attention(q, k, v, dropout_p=dropout, impl=_impl, **options)
    assert isinstance(out, Tensor)
    if not wants_weights:
        return out, None
    weights_impl = "auto" if _impl == "sdpa" else _impl
    return out, functional.attention_weights(q, k, impl=weights_impl, **options).to(q.dtype)


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
    if q.device.type != "cpu" or _impl == "triton":
        return lazy.structure
    if lazy.visible is not None and _impl != "reference" and not _compiling():
        pairs_left_out = seqlen_q * (batch * seqlen_k - lazy.keys_within_bounds)
        flops_left_out = 2 * pairs_left_out * q.shape[2] * (q.shape[3] + v.shape[3])
        cost = _FLOPS_PER_WINDOWED_SEQUENCE if lazy.windows else _FLOPS_PER_SEQUENCE
        if flops_left_out > batch * cost * torch.get_num_threads():
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

AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
