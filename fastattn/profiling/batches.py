"""Inputs: random tokens, and lengths that leave a chosen share of a batch to padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.profiling.results import Case


@dataclass(frozen=True, eq=False)
class Batch:
    """What all providers read in a case.

    Attributes:
        ids: int64 (batch, prompt).
        mask: bool, which of them are tokens.
        lengths: tokens of each row, on the host.
    """

    ids: Tensor
    mask: Tensor
    lengths: tuple[int, ...]


def lengths_with_padding(batch: int, seqlen: int, padding: float) -> tuple[int, ...]:
    """Lengths in 1..seqlen, one of them `seqlen`, of which `padding` of the batch is missing.

    Quantiles of seqlen * u ** a with the mean that is asked for: a few long texts and many short
    ones. Rounding, and the one row that is made whole, move the share in small batches; `Case` says
    what was asked for, and tokens a second count what there is.
    """
    if padding == 0:
        return (seqlen,) * batch
    power = padding / (1 - padding)
    shares = [((row + 0.5) / batch) ** power for row in range(batch)]
    lengths = [min(max(round(seqlen * share), 1), seqlen) for share in shares]
    return (*lengths[:-1], seqlen)


def make_batch(
    case: Case, vocab_size: int, pad_token: int | None, device: torch.device, sample: int = 0
) -> Batch:
    """Random tokens: the same for the same case and sample."""
    generator = torch.Generator().manual_seed(case.batch * 100003 + case.prompt + 7919 * sample)
    low = min(3, vocab_size - 1)  # below which special tokens usually are
    ids = torch.randint(low, vocab_size, (case.batch, case.prompt), generator=generator)
    if pad_token is not None:
        ids[ids == pad_token] = pad_token - 1 if pad_token else low
    lengths = lengths_with_padding(case.batch, case.prompt, case.padding)
    mask = torch.arange(case.prompt) < torch.tensor(lengths)[:, None]
    ids = ids.where(mask, torch.tensor(pad_token or 0))
    return Batch(ids.to(device), mask.to(device), lengths)
