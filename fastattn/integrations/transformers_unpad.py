"""Hugging Face encoders that skip their padding in all they do, not in attention alone.

    from fastattn.integrations.transformers import unpad

    unpadded = unpad(model)       # in place; a task head may be on top
    out = model(**inputs)       # padded in, padded out
    print(unpadded)               # how often tokens were packed, and why not
    unpadded.undo()               # or repad(model)

Where the attention mask leaves something out, the tokens that are there are laid end to end before
the embedding, as one row of the batch: embeddings, linear layers, norms and activations run on them
alone, attention is fastattn's with a `Packed` mask, and the last layer's output is put back into
the padded shape before a pooler or a head sees it. Hidden states at padding are 0.

A token keeps the position that it has in the padded batch, and so the embedding that it had: the
results at real tokens are those of the model as it was, however the padding lies. Only what looks
at padding changes: a pooler that takes the first position finds 0 where the padding is on the left.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastattn.integrations.transformers_report import NAME

__all__ = ["ENCODERS", "PACKED", "UNPADDED", "Unpadding", "repad", "unpad"]

PACKED = "packed"
"""How a call counts that left its padding out."""
UNPADDED = "no padding: as it came"
"""How a call counts that had none."""

_STATE = "fastattn_packing"
"""The keyword argument that takes a call's `_Packing` from the model's inputs to its last layer."""

# What a packed call takes along as it is; another tensor could have an axis of the padded length.
_PACKED_INPUTS = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")


def _columns(model: nn.Module, input_ids: Tensor | None, shape: torch.Size) -> Tensor:
    """Positions that count from the left of the padded batch."""
    device = next(model.parameters()).device if input_ids is None else input_ids.device
    return torch.arange(shape[1], device=device).expand(shape)


def _tokens_before(model: Any, input_ids: Tensor | None, shape: torch.Size) -> Tensor:
    """RoBERTa's positions: of tokens that are not the pad token, starting after its index."""
    start = model.embeddings.padding_idx
    if input_ids is None:
        return _columns(model, input_ids, shape) + (start + 1)
    real = (input_ids != start).long()
    return real.cumsum(1) * real + start


@dataclass(frozen=True)
class _Encoder:
    """Where a family's layers are, and the positions that it gives to tokens by itself."""

    layers: str
    positions: Callable[[nn.Module, Tensor | None, torch.Size], Tensor]


ENCODERS: dict[str, _Encoder] = {
    "BertModel": _Encoder("encoder", _columns),
    "RobertaModel": _Encoder("encoder", _tokens_before),
    "XLMRobertaModel": _Encoder("encoder", _tokens_before),
    "CamembertModel": _Encoder("encoder", _tokens_before),
    "AlbertModel": _Encoder("encoder", _columns),
    "DistilBertModel": _Encoder("transformer", _columns),
    "ElectraModel": _Encoder("encoder", _columns),
}
"""The encoders that can be unpadded, by class name; subclasses of them count too."""


@dataclass(frozen=True, eq=False)
class _Packing:
    """Where the tokens of a packed batch lie in the padded one.

    Attributes:
        indices: (total,) int64, of batch * seqlen; sequence after sequence, the longest first.
        cu_seqlens: (num_sequences + 1,) int32, without the sequences that have no token.
        longest: tokens of the longest sequence.
        batch, seqlen: the padded shape.
        is_empty: whether nothing is visible; then `indices` has one token, since models cannot run
            on none, and `pad` leaves it out.
    """

    indices: Tensor
    cu_seqlens: Tensor
    longest: int
    batch: int
    seqlen: int
    is_empty: bool = False

    @classmethod
    def of(cls, visible: Tensor) -> _Packing | None:
        """Of a bool mask (batch, seqlen); None if nothing is masked. Reads it on the host."""
        batch, seqlen = visible.shape
        lengths = visible.sum(1)
        # Sequences of one length are attended together where they lie side by side.
        lengths, order = lengths.sort(descending=True, stable=True)
        on_host = lengths.tolist()
        if sum(on_host) == batch * seqlen:
            return None
        if not sum(on_host):
            first = order.new_zeros(1)
            one_token = torch.arange(2, dtype=torch.int32, device=visible.device)
            return cls(first, one_token, 1, batch, seqlen, is_empty=True)
        row, column = visible[order].nonzero(as_tuple=True)
        ends = [0]
        for length in on_host:
            if length:
                ends.append(ends[-1] + length)
        return cls(
            indices=order[row] * seqlen + column,
            cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=visible.device),
            longest=on_host[0],
            batch=batch,
            seqlen=seqlen,
        )

    def pack(self, padded: Tensor) -> Tensor:
        """(batch, seqlen, ...), or (1, seqlen, ...), as (1, total, ...)."""
        padded = padded.expand(self.batch, *padded.shape[1:])
        return padded.flatten(0, 1).index_select(0, self.indices)[None]

    def pad(self, packed: Tensor) -> Tensor:
        """(1, total, ...) as (batch, seqlen, ...), 0 where nothing was."""
        padded = packed.new_zeros(self.batch * self.seqlen, *packed.shape[2:])
        kept = slice(0, 0) if self.is_empty else slice(None)
        padded.index_copy_(0, self.indices[kept], packed[0, kept])
        return padded.unflatten(0, (self.batch, self.seqlen))

    def pad_if_packed(self, tensor: Any) -> Any:
        """What `pad` gives, unless it is padded already or no tensor."""
        is_packed = isinstance(tensor, Tensor) and tensor.shape[:2] == (1, self.indices.shape[0])
        return self.pad(tensor) if is_packed else tensor


@dataclass(eq=False)
class _Packer:
    """The hooks of one encoder: they pack its inputs, and pad what comes out.

    What belongs to a call travels with it as a keyword argument. Nothing of it is kept here, so
    that threads, errors, and recomputation in the backward pass cannot mix calls up.
    """

    encoder: _Encoder
    attention_before: str
    calls: Counter[str] = field(default_factory=Counter)

    def pack(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the encoder: its arguments with packed tokens; None leaves them as they are."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return None  # how many tokens there are is known only when they are seen
        given = _bind(model, args, kwargs)
        reason = _stock_reason(model, given)
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        tokens: Any = given.get("inputs_embeds") if ids is None else ids
        packing = None
        if not reason and mask is not None:
            packing = _Packing.of(mask.to(tokens.device) != 0)
        self.calls[reason or (UNPADDED if packing is None else PACKED)] += 1
        if packing is None:
            return None
        if given.get("position_ids") is None:
            given["position_ids"] = self.encoder.positions(model, ids, tokens.shape[:2])
        for name in _PACKED_INPUTS:
            if given.get(name) is not None:
                given[name] = packing.pack(given[name])
        given["attention_mask"] = None
        given["cu_seq_lens_q"] = given["cu_seq_lens_k"] = packing.cu_seqlens
        given["max_length_q"] = given["max_length_k"] = packing.longest
        given[_STATE] = packing
        return (), given

    def pad_last(
        self, layers: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """After the last layer: its output padded, for a pooler and the caller."""
        packing = kwargs.get(_STATE)
        if packing is not None:
            output["last_hidden_state"] = packing.pad(output["last_hidden_state"])
        return output

    def pad_rest(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """After the encoder: the hidden states that it collected, padded."""
        packing = kwargs.get(_STATE)
        if packing is None:
            return output
        if isinstance(output, tuple):  # return_dict=False
            return tuple(_padded_all(packing, value) for value in output)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = _padded_all(packing, output["hidden_states"])
        return output


def _padded_all(packing: _Packing, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(packing.pad_if_packed(one) for one in value)
    return value


def _bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _stock_reason(model: Any, given: dict[str, Any]) -> str:
    """Why a call is left as it is; empty if it can be packed."""
    implementation = model.config._attn_implementation
    if implementation != NAME:
        return f'attn_implementation is "{implementation}", no longer "{NAME}"'
    if given.get("output_attentions", model.config.output_attentions):
        return "output_attentions: the weights have the padded shape"
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        return "not exactly one of input_ids and inputs_embeds"
    tokens: Any = embeds if ids is None else ids
    shape = tokens.shape[:2]
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        kind = f"{mask.dim()}-D" if isinstance(mask, Tensor) else type(mask).__name__
        return f"attention_mask is {kind}: only (batch, seqlen) says which tokens are padding"
    for name, value in given.items():
        if name in (*_PACKED_INPUTS, "attention_mask"):
            if value is not None and value.shape[-1 if name != "inputs_embeds" else 1] != shape[1]:
                return f"{name} does not have the length of the tokens, {shape[1]}"
            if value is not None and value.shape[0] not in (1, shape[0]):
                return f"{name} does not have the batch size of the tokens, {shape[0]}"
        elif isinstance(value, Tensor) or (name == "past_key_values" and value is not None):
            return f"{name} is given"
    if mask is not None and mask.shape[0] != shape[0]:
        return f"attention_mask does not have the batch size of the tokens, {shape[0]}"
    return ""


@dataclass(frozen=True)
class Unpadding:
    """What `unpad` did to a model; `str()` of it is a table.

    Attributes:
        model: the model.
        encoders: names of its encoders that run on packed tokens, "" for the model itself.
    """

    model: nn.Module
    encoders: tuple[str, ...]

    def calls(self) -> dict[str, int]:
        """Number of calls since `unpad`: `PACKED`, `UNPADDED`, or why a call was left as it came.

        Calls inside a graph of torch.compile or torch.jit are not seen, nor packed.
        """
        counts: Counter[str] = Counter()
        for name in self.encoders:
            packer = _packer_of(self.model.get_submodule(name))
            if packer is not None:
                counts += packer.calls
        return dict(counts)

    def undo(self) -> None:
        """Makes the model what it was before `unpad`."""
        repad(self.model)

    def __str__(self) -> str:
        found = [
            f"{name or 'the model'} ({type(self.model.get_submodule(name)).__name__})"
            for name in self.encoders
        ]
        lines = [f"{type(self.model).__name__} without padding: {', '.join(found)}"]
        for how, count in self.calls().items():
            lines.append(f"  {count} calls: {how}")
        return "\n".join(lines)


def unpad(model: nn.Module) -> Unpadding:
    """Makes the encoders in a model run on packed tokens, in place; padded tensors in and out.

    Works with and without gradients, on any device, for padding on either side or in between
    (a 2-D `attention_mask`). Also sets `attn_implementation="fastattn"`. Calls that cannot be
    packed run as they come, and `Unpadding.calls()` says why: a mask of four dimensions,
    `output_attentions`, a graph of torch.compile, tensors that the encoder has no packed form of.
    So do calls without a mask, or with one that masks nothing.

    Args:
        model: an encoder of `ENCODERS`, or a module with such in it: a model with a task head, or
            one of sentence-transformers. Done already, nothing happens again.

    Returns:
        What was done, to look at and to undo.

    Raises:
        TypeError: not a module, or without an encoder of `ENCODERS`; the message lists them.
    """
    from fastattn.integrations.transformers import enable

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    found = {}
    decoders = []
    for name, module in model.named_modules():
        encoder = _encoder_of(module)
        if encoder is None:
            continue
        if getattr(module.config, "is_decoder", False):
            decoders.append(type(module).__name__)
        else:
            found[name] = (module, encoder)
    if not found:
        why = f", but {decoders[0]} with config.is_decoder, which is causal" if decoders else ""
        raise TypeError(
            f"model must have an encoder that can run on packed tokens, one of "
            f"{', '.join(ENCODERS)}; {type(model).__name__} has none{why}"
        )
    for module, encoder in found.values():
        if _packer_of(module) is None:
            packer = _Packer(encoder, module.config._attn_implementation)
            enable(module)
            module.register_forward_pre_hook(packer.pack, with_kwargs=True)
            module.register_forward_hook(packer.pad_rest, with_kwargs=True)
            layers = getattr(module, encoder.layers)
            layers.register_forward_hook(packer.pad_last, with_kwargs=True)
    return Unpadding(model, tuple(found))


def repad(model: nn.Module) -> None:
    """Undoes `unpad`, the attention implementation included; without it, does nothing."""
    module: Any
    for module in list(model.modules()):
        packer = _packer_of(module)
        if packer is None:
            continue
        for owner in (module, getattr(module, packer.encoder.layers)):
            for hooks, flags in (
                (owner._forward_pre_hooks, owner._forward_pre_hooks_with_kwargs),
                (owner._forward_hooks, owner._forward_hooks_with_kwargs),
            ):
                for key in [key for key, hook in hooks.items() if _owner(hook) is packer]:
                    del hooks[key]
                    flags.pop(key, None)
        if module.config._attn_implementation == NAME:
            module.set_attn_implementation(packer.attention_before)


def _encoder_of(module: Any) -> _Encoder | None:
    if not isinstance(module, PreTrainedModel):
        return None
    names = (one.__name__ for one in type(module).__mro__)
    return next((ENCODERS[name] for name in names if name in ENCODERS), None)


def _owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)


def _packer_of(module: nn.Module) -> _Packer | None:
    """The packer of a module that was unpadded; copies of a module have copies of it."""
    owners = map(_owner, module._forward_pre_hooks.values())
    return next((one for one in owners if isinstance(one, _Packer)), None)
