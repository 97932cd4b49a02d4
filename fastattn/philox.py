"""Philox4x32-10 in plain torch: random words that follow from a seed and a place.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Nothing is carried from one
draw to the next, so every implementation draws the same words whatever its tiles or batch.
"""

from __future__ import annotations

from torch import Tensor

WORD = 0xFFFFFFFF
KEYS = (0x9E3779B9, 0xBB67AE85)
FACTORS = (0xD2511F53, 0xCD9E8D57)
ROUNDS = 10


def philox(seed: Tensor, counters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of 32 random bits, in int64 tensors of the broadcast shape.

    Args:
        seed: int64; its low and high 32 bits are the key. One element, or any shape that
            broadcasts with the counters.
        counters: four int64 tensors that broadcast, with values in 0..2**32 - 1.
    """
    a, b, c, d = counters
    low, high = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        # The 64-bit products wrap around in int64, which keeps their bits.
        first, second = a * FACTORS[0], c * FACTORS[1]
        a, b = ((second >> 32) & WORD) ^ b ^ low, second & WORD
        c, d = ((first >> 32) & WORD) ^ d ^ high, first & WORD
        low, high = (low + KEYS[0]) & WORD, (high + KEYS[1]) & WORD
    return a, b, c, d
