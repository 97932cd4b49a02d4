"""Prompts of a batch: padded on either side as they come, on the right as models read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.validation import check_tensor, describe


@dataclass(frozen=True)
class Prompts:
    """Rows of tokens, checked.

    Attributes:
        given: int64 (batch, columns), as they came.
        aligned: int64 (batch, longest), every row's last token in the last column. What lies before
            a row is no token of it.
        lengths: int64 (batch,) on the device, at least 1.
        longest: the largest of them.
        side: where they came padded: "left" or "right", or "none".
    """

    given: Tensor
    aligned: Tensor
    lengths: Tensor
    longest: int
    side: str

    @property
    def batch(self) -> int:
        return self.given.shape[0]

    @property
    def columns(self) -> int:
        """Columns as they came, padding included."""
        return self.given.shape[1]

    def padded_right(self, pad: int) -> tuple[Tensor, Tensor | None]:
        """Tokens (batch, longest) that begin in the first column, and lengths; None: no padding."""
        if self.side == "none":
            return self.given, None
        places = torch.arange(self.longest, device=self.given.device)
        at = places + (self.longest - self.lengths)[:, None]
        rows = self.aligned.gather(1, at.clamp(max=self.longest - 1))
        return rows.masked_fill(places >= self.lengths[:, None], pad), self.lengths

    def append(self, tokens: Tensor, pad: int) -> Tensor:
        """New tokens behind the prompts, in the form in which these came.

        Args:
            tokens: int64 (batch * copies, n), padded with `pad` behind a row's end.

        Returns:
            int64 (batch * copies, columns + n). Where the padding came on the right, a row's new
            tokens stand next to its prompt, and its padding behind both.
        """
        copies = tokens.shape[0] // self.batch
        given = self.given.repeat_interleave(copies, 0)
        if self.side != "right":
            return torch.cat([given, tokens], 1)
        lengths = self.lengths.repeat_interleave(copies, 0)
        places = torch.arange(given.shape[1], device=given.device)
        result = given.new_full((len(tokens), given.shape[1] + tokens.shape[1]), pad)
        result[:, : given.shape[1]] = given.masked_fill(places >= lengths[:, None], pad)
        at = lengths[:, None] + torch.arange(tokens.shape[1], device=given.device)
        return result.scatter(1, at, tokens)


def make_prompts(name: str, ids: Any, mask_name: str, mask: Any, vocab_size: int) -> Prompts:
    """Checks prompts, and finds out on which side they are padded. Waits for the device, once.

    Args:
        name, mask_name: of the arguments, for messages.
        ids: int32 or int64 (batch, columns).
        mask: bool or integer (batch, columns), non-zero for real tokens; None: all are.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
    """
    check_tensor(name, ids)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {describe(ids)}")
    if ids.dim() != 2:
        raise ValueError(f"{name} must have shape (batch, seqlen), got {describe(ids)}")
    batch, columns = ids.shape
    if batch == 0 or columns == 0:
        raise ValueError(f"{name} must hold a token at least, an empty prompt, got {describe(ids)}")
    real = torch.ones(batch, columns, dtype=torch.bool)
    if mask is not None:
        check_tensor(mask_name, mask)
        if mask.is_floating_point() or mask.shape != ids.shape:
            raise ValueError(
                f"{mask_name} must be bool or integer {tuple(ids.shape)} like {name}, got "
                f"{describe(mask)}"
            )
        real = mask.cpu() != 0
    ids = ids.long()
    _check_range(name, ids.cpu(), real, vocab_size)
    counts = real.sum(1)
    if int(counts.min()) == 0:
        row = int(counts.argmin())
        raise ValueError(
            f"{mask_name} must leave each prompt a token, row {row} is empty: 0 of {columns}"
        )
    longest = int(counts.max())
    places = torch.arange(columns)
    side = _side(mask_name, real, counts, places)
    lengths = counts.to(ids.device)
    if side == "right":
        at = torch.arange(longest, device=ids.device) - (longest - lengths)[:, None]
        aligned = ids.gather(1, at.clamp(min=0))
    else:
        aligned = ids[:, columns - longest :]
    return Prompts(ids, aligned, lengths, longest, side)


def _side(name: str, real: Tensor, counts: Tensor, places: Tensor) -> str:
    columns = real.shape[1]
    if int(counts.min()) == columns:
        return "none"
    if bool((real == (places >= columns - counts[:, None])).all()):
        return "left"
    if bool((real == (places < counts[:, None])).all()):
        return "right"
    raise ValueError(
        f"{name} must have its zeros on the left of every row, or on the right of every row, got "
        f"{describe(real)} with others"
    )


def _check_range(name: str, ids: Tensor, real: Tensor, vocab_size: int) -> None:
    outside = real & ((ids < 0) | (ids >= vocab_size))
    if bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{name} must hold token ids in 0..{vocab_size - 1}, the model's vocabulary, got "
            f"{int(ids[row, column])} in row {row}, column {column}"
        )
