"""Gumbel noise of a token, a row's seed and its step: the specification of every implementation.

The token that maximises x + gumbel is a draw from softmax(x) (Gumbel 1954; Maddison et al.,
arXiv:1411.0030). The noise of a token is Philox4x32-10 with the row's seed as its key, counter
(token // 4, step's low word, step's high word, 0), and word token % 4 of what comes out. A uniform
of 32 bits is at least 2**-33, so that no token less likely than 2**-33 could ever win against the
rest: where the word is below 2**12, which one in a million is, 32 bits more are drawn, from the
counter with 1 in its last place. Then u reaches down to 2**-65, the largest noise is 45.05, and
probabilities down to 2**-60 are drawn as they should be, to float32's relative precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.philox import WORD, philox

SMALL_WORD = 2**12
"""Below this, a word is followed by a second one."""

LARGEST = 45.06
"""No noise is above this."""


def gumbel(seed: Tensor, step: Tensor, tokens: Tensor) -> Tensor:
    """Noise float32, of the shape to which the arguments broadcast.

    Args:
        seed: int64, the key of a row.
        step: int64, the step of a row.
        tokens: int64, token ids.
    """
    quad, column = tokens // 4, tokens % 4
    place = (quad, step & WORD, (step >> 32) & WORD)
    zero = torch.zeros((), dtype=torch.int64, device=tokens.device)
    word = _column(philox(seed, (*place, zero)), column)
    more = _column(philox(seed, (*place, zero + 1)), column)
    return gumbel_of(uniform(word, more))


def uniform(word: Tensor, more: Tensor) -> Tensor:
    """float32 in (0, 1] from words of 32 bits; `more` counts only where `word` is small."""
    u = (word.to(torch.float32) + 0.5) * 2.0**-32
    fine = word.to(torch.float32) * 2.0**-32 + (more.to(torch.float32) + 0.5) * 2.0**-64
    return torch.where(word < SMALL_WORD, fine, u)


def gumbel_of(u: Tensor) -> Tensor:
    """-log(-log(1 - u)), precise where u is small, which is where the noise is large."""
    exponential = torch.where(u < 2.0**-10, u + u * u * 0.5, -(1 - u).clamp_min(2.0**-24).log())
    return -exponential.log()


def _column(words: tuple[Tensor, ...], column: Tensor) -> Tensor:
    first, second, third, fourth = words
    even = torch.where(column < 2, first, third)
    odd = torch.where(column < 2, second, fourth)
    return torch.where(column % 2 == 0, even, odd)
