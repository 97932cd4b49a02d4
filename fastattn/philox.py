"""Philox in plain torch: random words that follow from a seed and a place.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Nothing is carried from one
draw to the next, so every implementation draws the same words whatever its tiles or batch.
"""

from __future__ import annotations

from torch import Tensor

WORD = 0xFFFFFFFF
KEYS = (0x9E3779B9, 0xBB67AE85)
FACTORS = (0xD2511F53, 0xCD9E8D57)
ROUNDS = 10

# Of the variant with words of 64 bits, as int64 holds them.
KEYS_64 = (0x9E3779B97F4A7C15 - 2**64, 0xBB67AE8584CAA73B - 2**64)
FACTORS_64 = (0xD2E7470EE14C6C93 - 2**64, 0xCA5A826395121157 - 2**64)


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


def philox_64(seed: Tensor, counters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x64-10 with the key (seed, 0): four words of 64 bits, in int64 tensors.

    The same words as NumPy's `Philox(key=[seed, 0])` gives for its counters.

    Args:
        seed: int64, of any shape that broadcasts with the counters.
        counters: four int64 tensors that broadcast.
    """
    a, b, c, d = counters
    low, high = seed, seed * 0
    for _ in range(ROUNDS):
        first, second = (a, FACTORS_64[0]), (c, FACTORS_64[1])
        a, b = _high_product(*second) ^ b ^ low, second[0] * second[1]
        c, d = _high_product(*first) ^ d ^ high, first[0] * first[1]
        low, high = low + KEYS_64[0], high + KEYS_64[1]
    return a, b, c, d


def _high_product(value: Tensor, factor: int) -> Tensor:
    """Bits 64 to 127 of the product of two unsigned numbers of 64 bits, from those of 32."""
    low, high = value & WORD, (value >> 32) & WORD
    factor_low, factor_high = factor & WORD, (factor >> 32) & WORD
    first, second = high * factor_low, low * factor_high
    middle = (((low * factor_low) >> 32) & WORD) + (first & WORD) + (second & WORD)
    carried = ((first >> 32) & WORD) + ((second >> 32) & WORD) + ((middle >> 32) & WORD)
    return high * factor_high + carried
