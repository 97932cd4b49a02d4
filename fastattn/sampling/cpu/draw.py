"""The draw: argmax of score + Gumbel noise, over a few tokens or over whole rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastattn.sampling.cpu.noise import gumbel, row_bytes
from fastattn.sampling.cpu.scores import few_places

# A token whose uniform begins with byte h has at most the noise -log(h / 256), and if that byte is
# 0 at least log(255). The slack is for float32's rounding.
_SLACK = np.float32(1e-4)
_LEAST_OF_ZERO = np.float32(np.log(255.0)) - _SLACK
_MOST = np.full(256, np.inf, dtype=np.float32)
_MOST[1:] = -np.log(np.arange(1, 256) / 256) + _SLACK


def draw_few(
    rows: NDArray,
    tokens: NDArray,
    values: NDArray,
    first: NDArray | None,
    seed: NDArray,
    step: NDArray,
    vocab_size: int,
) -> NDArray:
    """The drawn token of each row, int64 (num_rows,).

    Args:
        rows: int64 (n,), the row of each candidate: ascending, and each row occurs.
        tokens: int64 (n,).
        values: float32 (n,), scores.
        first: uint8 (n,), first bytes of the tokens' uniforms, if they are known.
        seed, step: int64 (num_rows,).
        vocab_size: tokens.
    """
    num_rows = len(seed)
    if num_rows == 1:
        if first is None:
            first = row_bytes(int(seed[0]), int(step[0]), vocab_size)[tokens]
        total = values + gumbel(seed, step, tokens, first)
        best = total.argmax()
        return tokens[best : best + 1]  # the lowest on a tie: they ascend
    starts = np.searchsorted(rows, np.arange(num_rows))
    if first is None:
        ends = np.append(starts[1:], len(rows))
        first = np.concatenate([
            row_bytes(int(seed[row]), int(step[row]), vocab_size)[tokens[starts[row] : ends[row]]]
            for row in range(num_rows)
        ])  # fmt: skip
    same = (seed == seed[0]).all() and (step == step[0]).all()
    seeds, steps = (seed[:1], step[:1]) if same else (seed[rows], step[rows])
    total = values + gumbel(seeds, steps, tokens, first)
    highest = np.maximum.reduceat(total, starts)
    winners = np.where(total == highest[rows], tokens, vocab_size)
    result: NDArray = np.minimum.reduceat(winners, starts)
    return result


def contenders(values: NDArray, threshold: float, seed: int, step: int) -> tuple[NDArray, NDArray]:
    """Tokens of a whole row that can be drawn, int64 (n,), ascending, and their first bytes.

    Those whose byte is 0 are one in 256. The best of them has a total that all others must reach
    with what their own bytes allow.

    Args:
        values: float32 (vocab_size,), scores; one at least is finite and kept.
        threshold: the lowest score that is kept.
        seed, step: of the row.
    """
    first = row_bytes(seed, step, len(values))
    lowest = np.float32(max(threshold, -float(np.finfo(np.float32).max)))
    reached = np.float32(-np.inf)
    zeros = few_places(first == 0)
    zeros = zeros[values[zeros] >= lowest]
    if len(zeros):
        reached = values[zeros].max() + _LEAST_OF_ZERO
    others = few_places(values >= np.maximum(lowest, reached - _MOST[1]))
    bound = values[others] + _MOST[first[others]]
    others = others[(bound >= reached) & (first[others] > 0)]
    tokens = np.concatenate((zeros, others))
    tokens.sort()
    return tokens, first[tokens]
