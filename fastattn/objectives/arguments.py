"""Checks that the objectives share. Values on a GPU are looked at only where it is free."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.validation import check_lengths, check_tensor, describe, values_readable

IGNORE = -100


def check_ids(name: str, value: Tensor, vocab_size: int | None = None) -> Tensor:
    """`value` as int64 (batch, seqlen); raises unless it holds token ids in that shape."""
    check_tensor(name, value)
    if value.dtype not in (torch.int32, torch.int64) or value.dim() != 2:
        raise ValueError(f"{name} must be int32 or int64 (batch, seqlen), got {describe(value)}")
    if value.numel() and values_readable(value):
        low, high = (int(end) for end in value.aminmax())
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            last = "" if vocab_size is None else vocab_size - 1
            raise ValueError(f"{name} must hold token ids 0..{last}, got {low}..{high}")
    return value.to(torch.int64)


def check_share(name: str, value: float) -> float:
    """`value` as a float; raises unless it is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return float(value)


def check_int(name: str, value: int, low: int, high: int | None = None) -> int:
    """Raises unless `value` is an int in low..high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be {expected}, got {value}")
    return value


def check_flags(name: str, value: Tensor, like: Tensor) -> Tensor:
    """Raises unless `value` is bool, of the shape and on the device of the tokens."""
    check_tensor(name, value)
    if value.dtype != torch.bool or value.shape != like.shape or value.device != like.device:
        raise ValueError(
            f"{name} must be bool {tuple(like.shape)} on {like.device} like input_ids, got "
            f"{describe(value)}"
        )
    return value


def token_set(
    name: str, tokens: Sequence[int], vocab_size: int | None, device: torch.device, *more: int
) -> Tensor:
    """Token ids and `more` of them, without doubles, ascending: int64 on `device`."""
    if not isinstance(tokens, (Sequence, set, frozenset)):
        raise TypeError(f"{name} must be a list of token ids, got {tokens!r}")
    high = None if vocab_size is None else vocab_size - 1
    ids = {check_int(f"{name}[{i}]", token, 0, high) for i, token in enumerate(tokens)}
    return torch.tensor(sorted(ids.union(more)), dtype=torch.int64, device=device)


def row_lengths(lengths: Tensor | None, like: Tensor) -> Tensor:
    """Real tokens of each row, int64 (batch,); None: all."""
    batch, seqlen = like.shape
    if lengths is None:
        return torch.full((batch,), seqlen, dtype=torch.int64, device=like.device)
    check_tensor("lengths", lengths)
    if lengths.device != like.device:
        raise ValueError(
            f"lengths must be on {like.device} like input_ids, got {describe(lengths)}"
        )
    check_lengths("lengths", lengths, batch, seqlen, like.device)
    return lengths.to(torch.int64)


def real_tokens(lengths: Tensor, seqlen: int) -> Tensor:
    """Which places hold tokens, bool (batch, seqlen)."""
    return torch.arange(seqlen, device=lengths.device) < lengths[:, None]
