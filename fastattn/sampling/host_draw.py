"""The draw: argmax of score + Gumbel noise, over a few tokens or over a whole row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastattn.sampling.host_noise import gumbel, row_words
from fastattn.sampling.host_scores import scratch

_SLACK = np.float32(1 - 1e-5)  # for the rounding of a ratio, a logarithm and an exponential


def draw_few(
    rows: NDArray, tokens: NDArray, values: NDArray, seed: NDArray, step: NDArray
) -> NDArray:
    """The drawn token of each row, int64 (num_rows,).

    Args:
        rows: int64 (n,), the row of each candidate: ascending, and each row occurs.
        tokens: int64 (n,).
        values: float32 (n,), scores.
        seed, step: int64 (num_rows,).
    """
    total = values + gumbel(seed[rows], step[rows], tokens)
    if len(seed) == 1:
        return tokens[total == total.max()].min(keepdims=True)
    starts = np.searchsorted(rows, np.arange(len(seed)))
    best = np.maximum.reduceat(total, starts)
    winners = np.where(total == best[rows], tokens, np.iinfo(np.int64).max)
    result: NDArray = np.minimum.reduceat(winners, starts)
    return result


def draw_whole(values: NDArray, weights: NDArray, largest: float, seed: int, step: int) -> int:
    """The token drawn from a row of which much is kept.

    A token's noise is at most -log(u), since -log(1 - u) >= u. So its total is at most the log of
    weight / u, and only tokens for which that reaches a total that some token has need logarithms.

    Args:
        values: float32 (vocab_size,), scores.
        weights: float32 (vocab_size,), exp(score - largest), 0 where cut.
        largest: the largest score.
        seed, step: of the row.
    """
    num_tokens = len(values)
    bits = row_words(seed, step, num_tokens, scratch("words", -(-num_tokens // 4) * 4))
    ratio = np.divide(weights, bits, out=bits)
    first = np.array([ratio.argmax()])
    reached = values[first] + _noise(first, seed, step)
    # weight / w >= 2**-32 * exp(reached - largest), but for rounding
    least = np.exp(reached[0] - np.float32(largest)) * np.float32(2.0**-32) * _SLACK
    tokens = np.flatnonzero(ratio >= max(least, np.finfo(np.float32).tiny))
    total = values[tokens] + _noise(tokens, seed, step)
    return int(tokens[total.argmax()])


def _noise(tokens: NDArray, seed: int, step: int) -> NDArray:
    return gumbel(np.full(len(tokens), seed), np.full(len(tokens), step), tokens)
