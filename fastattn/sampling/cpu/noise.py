"""The noise of `fastattn.sampling.noise` in NumPy, for tensors on the CPU: the same numbers."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.philox import FACTORS, KEYS, ROUNDS, WORD

_U64 = np.uint64
_HALF = _U64(32)
_LOW = _U64(WORD)
_FACTORS = np.array(FACTORS, dtype=_U64)[:, None]
_KEYS = np.array([[i * key & WORD for key in KEYS] for i in range(ROUNDS)], dtype=_U64)[:, :, None]
_NEAR = np.float32(2.0**-10)

EXPANDED = 512
"""Of fewer tokens, keys are repeated for each: broadcasting costs more than that."""


class _Generator(threading.local):
    """NumPy's Philox4x64-10 with its state at hand: setting one takes a tenth of making one."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)
        self.state: Any = self.philox.state
        self.state["buffer_pos"] = 4  # empty: the next word is the first of the next counter
        self.key, self.counter = (self.state["state"][name] for name in ("key", "counter"))
        self.key[:], self.counter[:] = 0, 0


_generator = _Generator()


def row_bytes(seed: int, step: int, num_tokens: int) -> NDArray:
    """The first byte of each token's uniform, uint8 (num_tokens,)."""
    _generator.key[0], _generator.counter[1] = seed % 2**64, step % 2**64
    _generator.philox.state = _generator.state
    drawn = _generator.philox.random_raw(-(-num_tokens // 8))
    return drawn.astype("<u8", copy=False).view(np.uint8)[:num_tokens]


def words(seed: NDArray, step: NDArray, tokens: NDArray) -> NDArray:
    """The other 32 bits of each token's uniform, uint64 (n,).

    Args:
        seed, step, tokens: int64 (n,), or (1,) where all tokens share them.
    """
    # Two words of 32 bits lie in one of 64, what is multiplied above what is not: (a, b), (c, d).
    bits = seed.view(_U64)
    keys = (np.stack((bits & _LOW, bits >> _HALF)) + _KEYS) << _HALF  # (ROUNDS, 2, 1 or n)
    factors = _FACTORS
    state = np.empty((2, len(tokens)), dtype=_U64)
    if len(tokens) < EXPANDED:
        keys = np.repeat(keys, state[0].size // keys.shape[2], axis=2)
        factors = np.repeat(factors, state[0].size, axis=1)
    bits = step.view(_U64)
    state[0] = (tokens.view(_U64) >> _U64(2) << _HALF) | (bits & _LOW)
    state[1] = bits & ~_LOW
    product = np.empty_like(state)
    swapped = product[::-1]
    for key in keys:
        np.right_shift(state, _HALF, product)
        np.multiply(product, factors, product)
        np.left_shift(state, _HALF, state)
        np.bitwise_xor(state, key, state)
        np.bitwise_xor(state, swapped, state)
    pair = np.where(tokens & 2, state[1], state[0])
    result: NDArray = np.where(tokens & 1, pair & _LOW, pair >> _HALF)
    return result


def gumbel(seed: NDArray, step: NDArray, tokens: NDArray, first: NDArray) -> NDArray:
    """Noise float32 (n,) of tokens whose first bytes are `first`, uint8 (n,)."""
    u = words(seed, step, tokens).astype(np.float32)
    u += np.float32(0.5)
    u *= np.float32(2.0**-40)
    u += first * np.float32(2.0**-8)
    exponential = -np.log(np.maximum(np.float32(1) - u, np.float32(2.0**-24)))
    exponential = np.where(u < _NEAR, u + u * u * np.float32(0.5), exponential)
    return -np.log(exponential)
