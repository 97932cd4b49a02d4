"""Random words by place: a draw follows from the seed, the objective, the row and the column."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.philox import philox

Seed = int | torch.Generator | None

# The third counter of Philox: one seed given to two objectives draws different words.
MASKED, SPANS, PAIRS, REPLACED, PERMUTATION, PREFIX = range(6)

WORDS = 2**32
"""A word is one of this many numbers, 0 to WORDS - 1, equally likely."""


def seed_tensor(seed: Seed, device: torch.device) -> Tensor:
    """The key of Philox, int64 (1,) on `device`; a generator, or torch's for None, draws one."""
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.Generator, type(None))):
        raise TypeError(f"seed must be an int, a torch.Generator or None, got {seed!r}")
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must fit in 64 bits, got {seed}")
        return torch.tensor([seed], dtype=torch.int64, device=device)
    # None stays on the CPU: after torch.manual_seed every device draws the same.
    source = torch.device("cpu") if seed is None else seed.device
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=source, generator=seed).to(
        device
    )


def words(
    seed: Tensor, objective: int, rows: int, columns: int, round_: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words for each place, int64 (rows, columns).

    Args:
        round_: another four for each number.
    """
    row, column, which, count = (
        torch.arange(start, start + size, device=seed.device).view(shape)
        for start, size, shape in (
            (0, rows, (-1, 1)), (0, columns, (1, -1)), (objective, 1, (1, 1)), (round_, 1, (1, 1)),
        )
    )  # fmt: skip
    first, second, third, fourth = philox(seed, torch.broadcast_tensors(column, row, which, count))
    return first, second, third, fourth


def chance(word: Tensor, probability: float) -> Tensor:
    """True with this probability, rounded to a multiple of 2**-32."""
    return word < round(probability * WORDS)


def below(word: Tensor, size: Tensor | int) -> Tensor:
    """A number in 0..size - 1 for each word, equally likely but for size * 2**-32."""
    return (word * size) >> 32


def ranks(word: Tensor, among: Tensor) -> Tensor:
    """Place of each column in a random order of its row's columns `among`, the others behind.

    Equal words keep the order of their columns, so that what shares one stays together.
    """
    order = torch.where(among, word, WORDS).argsort(dim=1, stable=True)
    place = torch.arange(word.shape[1], device=word.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)
