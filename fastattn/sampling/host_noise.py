"""The noise of `fastattn.sampling.noise` in NumPy, for tensors on the CPU.

The same numbers, made faster: NumPy's calls cost a third of torch's on arrays this small, and its
64-bit products are vectorized.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastattn.philox import FACTORS, KEYS, ROUNDS, WORD
from fastattn.sampling.noise import SMALL_WORD

_U64 = np.uint64
_HALF = _U64(32)
_LOW = _U64(WORD)
_FACTORS = np.array(FACTORS, dtype=_U64)[:, None]
_FIRST, _SECOND = (_U64(factor) for factor in FACTORS)
_KEYS = np.array([[i * key for key in KEYS] for i in range(ROUNDS)], dtype=_U64)[:, :, None]

BLOCK = 16384
"""Quads of tokens that are drawn at once: their words stay in a core's cache."""


def words(seed: NDArray, step: NDArray, tokens: NDArray, last: int = 0) -> NDArray:
    """The word of each token, uint64 (n,).

    Args:
        seed, step, tokens: int64 (n,).
        last: the last counter.
    """
    # Two words of 32 bits lie in one of 64, what is multiplied above what is not: (a, b), (c, d).
    keys = (_split(seed[:1] if _same(seed) else seed) + _KEYS) << _HALF  # (ROUNDS, 2, 1 or n)
    state = np.empty((2, len(tokens)), dtype=_U64)
    bits = step.view(_U64)
    state[0] = (tokens.view(_U64) >> _U64(2) << _HALF) | (bits & _LOW)
    state[1] = (bits & ~_LOW) | _U64(last)
    product = np.empty_like(state)
    swapped = product[::-1]
    for key in keys:
        np.right_shift(state, _HALF, out=product)
        np.multiply(product, _FACTORS, out=product)
        np.left_shift(state, _HALF, out=state)
        np.bitwise_xor(state, key, out=state)
        np.bitwise_xor(state, swapped, out=state)
    pair = np.where(tokens & 2, state[1], state[0])
    result: NDArray = np.where(tokens & 1, pair & _LOW, pair >> _HALF)
    return result


def gumbel(seed: NDArray, step: NDArray, tokens: NDArray) -> NDArray:
    """Noise float32 (n,) of tokens; `fastattn.sampling.noise.gumbel` says what it is."""
    word = words(seed, step, tokens)
    u = (word.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    small = word < SMALL_WORD
    if small.any():
        more = words(seed[small], step[small], tokens[small], 1).astype(np.float32)
        u[small] = word[small].astype(np.float32) * np.float32(2.0**-32) + (
            more + np.float32(0.5)
        ) * np.float32(2.0**-64)
    exponential = np.where(
        u < np.float32(2.0**-10),
        u + u * u * np.float32(0.5),
        -np.log(np.maximum(np.float32(1) - u, np.float32(2.0**-24))),
    )
    return -np.log(exponential)


def row_words(seed: int, step: int, num_tokens: int, out: NDArray) -> NDArray:
    """The words of all tokens of a row as float32, each at least 2**-33 and no larger than u says.

    Args:
        seed, step: of the row.
        num_tokens: size of the vocabulary.
        out: float32 (at least num_tokens rounded up to fours), filled and returned up to there.

    Returns:
        float32 (num_tokens,): w such that w * 2**-32 is at most the token's uniform u, but for
        rounding, and for w >= 1 close to it.
    """
    num_quads = -(-num_tokens // 4)
    columns = out[: num_quads * 4].reshape(num_quads, 4)
    low, high = _halves(step)
    keys = [
        tuple((half + i * key) & WORD for half, key in zip(_halves(seed), KEYS, strict=True))
        for i in range(ROUNDS)
    ]
    size = min(BLOCK, num_quads)
    buffers = np.empty((6, size), dtype=_U64)
    for start in range(0, num_quads, size):
        count = min(size, num_quads - start)
        _draw_quads(start, low, high, keys, buffers[:, :count], columns[start : start + count])
    np.maximum(out, np.float32(2.0**-33), out=out)
    return out[:num_tokens]


def _draw_quads(
    start: int,
    low: int,
    high: int,
    keys: list[tuple[int, ...]],
    buffers: NDArray,
    out: NDArray,
) -> None:
    a, b, c, d, first, second = buffers
    # The first two rounds have counters that are the same for all quads.
    a[:] = np.arange(start, start + out.shape[0], dtype=_U64)
    np.multiply(a, _FIRST, out=first)
    product = high * FACTORS[1]
    a_one, b_one = (product >> 32) ^ low ^ keys[0][0], product & WORD
    np.right_shift(first, _HALF, out=c)
    np.bitwise_xor(c, _U64(keys[0][1]), out=c)
    np.multiply(c, _SECOND, out=second)
    product = a_one * FACTORS[0]
    np.right_shift(second, _HALF, out=a)
    np.bitwise_xor(a, _U64(b_one ^ keys[1][0]), out=a)
    np.bitwise_xor(first, _U64((product >> 32) ^ keys[1][1]), out=c)
    np.bitwise_and(c, _LOW, out=c)
    b, second = second, b
    d.fill(product & WORD)
    for key_a, key_c in keys[2:]:
        # b and d keep rubbish above their 32 bits: only what is multiplied must be clean.
        np.multiply(a, _FIRST, out=first)
        np.multiply(c, _SECOND, out=second)
        np.right_shift(second, _HALF, out=a)
        np.bitwise_xor(a, b, out=a)
        np.bitwise_xor(a, _U64(key_a), out=a)
        np.bitwise_and(a, _LOW, out=a)
        np.right_shift(first, _HALF, out=c)
        np.bitwise_xor(c, d, out=c)
        np.bitwise_xor(c, _U64(key_c), out=c)
        np.bitwise_and(c, _LOW, out=c)
        b, second = second, b
        d, first = first, d
    for column, word in enumerate((a, b, c, d)):
        out[:, column] = word.view(np.uint32)[::2] if column % 2 else word


def _same(values: NDArray) -> bool:
    return bool((values == values[0]).all())


def _split(value: NDArray) -> NDArray:
    """Low and high 32 bits, uint64 (2, n)."""
    bits = value.view(_U64)
    return np.stack((bits & _LOW, bits >> _HALF))


def _halves(value: int) -> tuple[int, int]:
    return value & WORD, (value >> 32) & WORD
