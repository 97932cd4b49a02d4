"""Padded batches to packed ones and back, with the names and results of flash_attn.bert_padding."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastattn.validation import check_tensor, describe

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` of `input`: (rows, ...) and (n,) to (n, ...). Differentiable.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _check_indices(indices)
    _check_rows("input", input)
    return input.index_select(0, indices)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `indices` of `input`, and `input` itself, so that both have one gradient."""
    return index_first_axis(input, indices), input


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros (first_axis_dim, ...) with `values` (n, ...) in the rows `indices` (n,).

    Differentiable with respect to values.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _check_indices(indices)
    _check_rows("values", values)
    if values.shape[0] != indices.shape[0]:
        raise ValueError(
            f"values must have a row for each of {indices.shape[0]} indices, got {describe(values)}"
        )
    zeros = values.new_zeros(first_axis_dim, *values.shape[1:])
    return zeros.index_copy(0, indices.to(torch.int64), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """A padded batch without its padding. Waits for the device, to know how many tokens there are.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or integer, 1 where there is a token.
        unused_mask: (batch, seqlen), 1 where room is kept for a token; no overlap with the other.

    Returns:
        hidden_states (total, ...); indices (total,), their places in the flattened batch;
        cu_seqlens int32 (batch + 1,); the longest sequence; seqused int32 (batch,), the tokens of
        each sequence by `attention_mask` alone.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    check_tensor("hidden_states", hidden_states)
    _check_like("attention_mask", attention_mask, hidden_states)
    if unused_mask is not None:
        _check_like("unused_mask", unused_mask, hidden_states)
    taken = attention_mask if unused_mask is None else attention_mask + unused_mask
    seqused = attention_mask.sum(-1, dtype=torch.int32)
    lengths = seqused if unused_mask is None else taken.sum(-1, dtype=torch.int32)
    packed, indices, cu_seqlens, longest = _unpad(hidden_states, taken, lengths)
    return packed, indices, cu_seqlens, longest, seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """As `unpad_input`, where a row of the batch holds several sequences one after the other.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: integer (batch, seqlen): the lengths of a row's sequences, in
            order, then zeros.

    Returns:
        hidden_states (total, ...), indices (total,), cu_seqlens int32 (num_sequences + 1,), and
        the longest sequence.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    check_tensor("hidden_states", hidden_states)
    _check_like("attention_mask_in_length", attention_mask_in_length, hidden_states)
    lengths = attention_mask_in_length
    position = torch.arange(lengths.shape[1], device=lengths.device)
    taken = position < lengths.sum(-1, keepdim=True)
    flat = lengths.flatten()
    return _unpad(hidden_states, taken, flat[flat != 0].to(torch.int32))


def _unpad(
    hidden_states: Tensor, taken: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    indices = torch.nonzero(taken.flatten()).flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return hidden_states.flatten(0, 1).index_select(0, indices), indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The padded batch (batch, seqlen, ...) of tokens (total, ...), with zeros for padding.

    Args:
        hidden_states: (total, ...).
        indices: (total,), the places of the tokens in the flattened batch, from `unpad_input`.
        batch, seqlen: sizes of the padded batch.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))


def _check_indices(indices: Tensor) -> None:
    check_tensor("indices", indices)
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"indices must be int32 or int64 with one dimension, got {describe(indices)}"
        )


def _check_like(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    check_tensor(name, mask)
    if mask.dim() != 2 or mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name} must be (batch, seqlen) = {tuple(hidden_states.shape[:2])} like "
            f"hidden_states, got {describe(mask)}"
        )


def _check_rows(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dim() < 1:
        raise ValueError(f"{name} must have rows, got {describe(tensor)}")


def __getattr__(name: str) -> Any:
    # Some libraries import these two from here, where flash_attn itself imports them.
    if name in ("rearrange", "repeat"):
        return getattr(import_module("einops"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
