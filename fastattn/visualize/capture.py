"""The attention weights of one layer of a model, for one sequence."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.visualize.recording import AttentionCall, AttentionRecord, record_attention

# Whose tokens are rows and keys, as the names of a model's inputs begin.
_STACKS = {
    "self": ("", ""),
    "encoder": ("", ""),
    "decoder": ("decoder_", "decoder_"),
    "cross": ("decoder_", ""),
}

Inputs = Mapping[str, Any] | Sequence[Any] | Tensor | Callable[[], object]


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Attention weights, and where they are from.

    Attributes:
        weights: float32 (heads, rows, keys) on the CPU; a row sums to 1 (less what a sink takes).
        heads: number of each head; () where they are averaged, into a single map.
        rows, keys: places of the rows and keys in the sequence as it was given, int64.
        layer, num_layers: from 0, of the layers of this kind.
        kind: "self", "encoder", "decoder" or "cross".
        module: name of the attention module, "" where it is not known.
    """

    weights: Tensor
    heads: tuple[int, ...]
    rows: Tensor
    keys: Tensor
    layer: int
    num_layers: int
    kind: str
    module: str

    @property
    def title(self) -> str:
        """The layer in words, counted from 1."""
        kind = "" if self.kind == "self" else f"{self.kind}, "
        return f"{kind}layer {self.layer + 1} of {self.num_layers}"


def capture(
    model: nn.Module,
    inputs: Inputs,
    *,
    layer: int,
    kind: str | None = None,
    heads: Sequence[int] | None = None,
    sequence: int = 0,
    average_heads: bool = False,
) -> AttentionMap:
    """Runs a model once, without gradients, and computes the weights of one of its layers.

    A model of transformers that fastattn does not serve yet is served for this run only. Nothing is
    asked for by `output_attentions`: the queries and keys of the one layer and sequence are kept.

    Args:
        model: one of fastattn's, of transformers, or another that calls fastattn.
        inputs: a mapping for `model(**inputs)`, a tensor for `model(inputs)`, a list or tuple for
            `model(*inputs)`, or a function without arguments that runs the model in its own way.
        layer: number of the layer among those of its kind; negative ones count from the last.
        kind: "encoder", "decoder" or "cross" of an encoder-decoder; None where there is only one.
        heads: query heads; None: all.
        sequence: which one of the batch.
        average_heads: the mean over `heads`, in place of each.

    Returns:
        `AttentionMap` of (heads, rows, keys), or (1, rows, keys) of the mean. Rows and keys that
        are padding are left out, as `attention_mask` or `lengths` in `inputs` say, of a decoder
        behind an encoder `decoder_attention_mask` or `decoder_lengths`.

    Raises:
        LookupError: there is no such layer, kind or sequence, or no attention call was seen.
        UnservedModelError: a model of transformers that fastattn cannot serve.
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer must be an int, got {layer!r}")
    model = getattr(model, "_orig_mod", model)  # a compiled graph runs without Python
    # How many layers there are is known afterwards: counted from the end, all are kept until then.
    layers = None if layer < 0 else [layer]
    with (
        _served(model),
        torch.no_grad(),
        record_attention(model, layers=layers, kind=kind, sequences=[sequence]) as record,
    ):
        _run(model, inputs)
    return _map(record, record.find(layer, kind), inputs, heads, sequence, average_heads)


def _run(model: nn.Module, inputs: Inputs) -> None:
    if isinstance(inputs, Tensor):
        model(inputs)
    elif isinstance(inputs, Mapping):
        model(**inputs)
    elif isinstance(inputs, Sequence) and not isinstance(inputs, str):
        model(*inputs)
    elif callable(inputs):
        inputs()
    else:
        raise TypeError(
            f"inputs must be a mapping, a tensor, a list or a function, got {type(inputs).__name__}"
        )


@contextlib.contextmanager
def _served(model: nn.Module) -> Iterator[None]:
    """Within it, fastattn serves the model, if it is one of transformers."""
    transformers = sys.modules.get("transformers")
    pretrained = getattr(transformers, "PreTrainedModel", None)
    if pretrained is None or not any(isinstance(part, pretrained) for part in model.modules()):
        yield
        return
    from fastattn.integrations import transformers as integration
    from fastattn.integrations.transformers_adapters import is_adapted

    parts = [part for part in model.modules() if isinstance(part, pretrained)]
    names = {getattr(part.config, "_attn_implementation", None) for part in parts}
    if integration.NAME in names or any(map(is_adapted, model.modules())):
        yield
        return
    # A model around one of transformers, such as those of sentence-transformers.
    inside = {id(inner) for part in parts for inner in part.modules() if inner is not part}
    outermost: list[Any] = [part for part in parts if id(part) not in inside]
    served: list[Any] = []
    try:
        for part in outermost:
            served.append(part)
            integration.enable(part)
        yield
    finally:
        for part in served:
            integration.disable(part)


def _map(
    record: AttentionRecord,
    call: AttentionCall,
    inputs: Inputs,
    heads: Sequence[int] | None,
    sequence: int,
    average_heads: bool,
) -> AttentionMap:
    if sequence not in call.problems:
        raise LookupError(f"sequence must be one of the batch, got {sequence}")
    problem = call.problems[sequence]
    seqlen_q, seqlen_k = problem.q.shape[1], problem.k.shape[1]
    num_heads = problem.q.shape[2]
    of_rows, of_keys = _STACKS[call.kind]
    rows = _real_places(call, inputs, sequence, of_rows, seqlen_q)
    keys = _real_places(call, inputs, sequence, of_keys, seqlen_k)
    chosen = rows if rows.numel() < seqlen_q else None
    if chosen is not None:
        chosen = chosen.to(problem.q.device)
    weights = call.weights(sequence, heads=heads, rows=chosen, average_heads=average_heads)
    weights = weights.cpu()[..., keys]
    numbers = tuple(range(num_heads)) if heads is None else tuple(int(head) for head in heads)
    return AttentionMap(
        weights=weights[None] if average_heads else weights,
        heads=() if average_heads else numbers,
        rows=rows,
        keys=keys,
        layer=call.layer,
        num_layers=record.num_layers(call),
        kind=call.kind,
        module=call.module,
    )


def _real_places(
    call: AttentionCall, inputs: Inputs, sequence: int, stack: str, seqlen: int
) -> Tensor:
    """Places of a sequence that `inputs` do not say to be padding.

    Args:
        stack: whose tokens they are, "" or "decoder_", as the names of the inputs begin.
        seqlen: how many rows or keys there are, of packed sequences without padding.
    """
    every = torch.arange(seqlen)
    if not isinstance(inputs, Mapping):
        return every
    mask, lengths = inputs.get(f"{stack}attention_mask"), inputs.get(f"{stack}lengths")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        places = mask[sequence].detach().cpu().nonzero()[:, 0]
        fits = places.numel() == seqlen if call.packed else mask.shape[1] == seqlen
        return places if fits else every
    if lengths is not None and not call.packed:
        return every[: int(lengths[sequence])]
    return every
