"""Gumbel noise of a token, a row's seed and its step: the specification of every implementation.

The token that maximises x + gumbel is a draw from softmax(x) (Gumbel 1954; Maddison et al.,
arXiv:1411.0030). The noise comes from a uniform u of 40 bits, in two parts:

    its first 8 bits   byte token % 32 of Philox4x64-10, key (seed, 0), counter
                       (token // 32 + 1, step, 0, 0): little-endian, as NumPy's generator gives them
    the other 32       word token % 4 of Philox4x32-10, key seed, counter
                       (token // 4, step's low word, step's high word, 0)

Two parts, since a row of V tokens is decided by the few whose first byte is 0: a 32nd of a Philox
a token says for most of them that they cannot win. u reaches down to 2**-41, so the largest noise
is 28.42, and a token of probability 2**-34 is drawn as often as it should be, to one percent; of
24 or 32 bits, u would cut off what a vocabulary of 152k holds together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.philox import WORD, philox, philox_64

LARGEST = 28.43
"""No noise is above this."""


def gumbel(seed: Tensor, step: Tensor, tokens: Tensor) -> Tensor:
    """Noise float32, of the shape to which the arguments broadcast.

    Args:
        seed: int64, the key of a row.
        step: int64, the step of a row.
        tokens: int64, token ids.
    """
    return gumbel_of(uniform(first_bytes(seed, step, tokens), words(seed, step, tokens)))


def first_bytes(seed: Tensor, step: Tensor, tokens: Tensor) -> Tensor:
    """Bits 32 to 39 of a token's uniform, int64 in 0..255."""
    zero = torch.zeros((), dtype=torch.int64, device=tokens.device)
    drawn = philox_64(seed, (tokens // 32 + 1, step, zero, zero))
    return (_of_four(drawn, tokens % 32 // 8) >> (tokens % 8 * 8)) & 255


def words(seed: Tensor, step: Tensor, tokens: Tensor) -> Tensor:
    """Bits 0 to 31 of a token's uniform, int64 in 0..2**32 - 1."""
    zero = torch.zeros((), dtype=torch.int64, device=tokens.device)
    drawn = philox(seed, (tokens // 4, step & WORD, (step >> 32) & WORD, zero))
    return _of_four(drawn, tokens % 4)


def uniform(byte: Tensor, word: Tensor) -> Tensor:
    """float32 in (0, 1], in the middle of its 2**-40."""
    return byte.to(torch.float32) * 2.0**-8 + (word.to(torch.float32) + 0.5) * 2.0**-40


def gumbel_of(u: Tensor) -> Tensor:
    """-log(-log(1 - u)), precise where u is small, which is where the noise is large."""
    exponential = torch.where(u < 2.0**-10, u + u * u * 0.5, -(1 - u).clamp_min(2.0**-24).log())
    return -exponential.log()


def _of_four(words: tuple[Tensor, ...], which: Tensor) -> Tensor:
    first, second, third, fourth = words
    even = torch.where(which < 2, first, third)
    odd = torch.where(which < 2, second, fourth)
    return torch.where(which % 2 == 0, even, odd)
