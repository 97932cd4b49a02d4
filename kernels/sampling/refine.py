"""A row whose thresholds the candidates do not settle: the same searches over its logits.

One program reads the row once for each step of a bisection. Few rows come here, those whose draw is
from more tokens than the tiles keep: flat distributions, top-k in the thousands, ties in masses.
"""

import triton
import triton.language as tl

from fastattn.kernels.sampling.logits import (
    key_of,
    processed_scores,
    relative_weight,
    tile_words,
    tokens_of,
)
from fastattn.kernels.sampling.noise import group_noise
from fastattn.kernels.sampling.search import EMPTY_KEY, NO_TOKEN, best_of, ratio_threshold


@triton.jit
def _weight_above(
    logits,
    processing,
    row,
    threshold,
    largest,
    vocab_size,
    num_tiles,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Number, or sum of relative weights, of a row's tokens whose keys are `threshold` or more."""
    total = tl.zeros([], tl.float32)
    for tile in range(num_tiles):
        words = tile_words(tile, num_tiles, BLOCK)
        x = processed_scores(logits, processing, row, words, vocab_size)
        above = key_of(x) >= threshold.to(tl.int32)
        if COUNT:
            total += tl.sum(above.to(tl.int32)).to(tl.float32)
        else:
            total += tl.sum(tl.where(above, relative_weight(x, largest), 0.0))
    return total


@triton.jit
def _highest_threshold(
    logits,
    processing,
    row,
    target,
    low,
    high,
    largest,
    vocab_size,
    num_tiles,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
):
    """`search.highest_threshold` over a whole row."""
    while low < high:
        middle = (low + high + 1) >> 1
        weight = _weight_above(
            logits, processing, row, middle, largest, vocab_size, num_tiles, BLOCK, COUNT
        )
        low = tl.where(weight >= target, middle, low)
        high = tl.where(weight >= target, high, middle - 1)
    return low


@triton.jit
def refine(
    logits,
    processing,
    row,
    seed,
    step,
    k,
    p,
    least_ratio,
    keep,
    largest,
    mass,
    finite,
    vocab_size,
    num_tiles,
    BLOCK: tl.constexpr,
    JOINT: tl.constexpr,
):
    """The token that a filtered row draws, the weight of its survivors, and their lowest key."""
    lowest = tl.cast(EMPTY_KEY + 1, tl.int64)
    highest = key_of(largest).to(tl.int64)
    threshold = lowest
    whole = mass
    if k < finite:
        threshold = _highest_threshold(
            logits, processing, row, k, lowest, highest, largest, vocab_size, num_tiles, BLOCK, True
        )
        if not JOINT:
            whole = _weight_above(
                logits, processing, row, threshold, largest, vocab_size, num_tiles, BLOCK, False
            )
    by_mass = lowest
    if p < 1.0:
        by_mass = _highest_threshold(
            logits,
            processing,
            row,
            p * whole,
            lowest,
            highest,
            largest,
            vocab_size,
            num_tiles,
            BLOCK,
            False,
        )
    by_ratio = lowest
    if least_ratio > 0:
        by_ratio = ratio_threshold(least_ratio, largest, lowest, highest)
    wanted = tl.maximum(by_mass, by_ratio)
    if (keep > 1) & (wanted > lowest):
        by_count = _highest_threshold(
            logits,
            processing,
            row,
            keep,
            lowest,
            highest,
            largest,
            vocab_size,
            num_tiles,
            BLOCK,
            True,
        )
        wanted = tl.minimum(wanted, by_count)
    threshold = tl.maximum(threshold, wanted)

    best_score = tl.cast(-float("inf"), tl.float32)
    best_token = tl.cast(NO_TOKEN, tl.int32)
    total = tl.zeros([], tl.float32)
    for tile in range(num_tiles):
        words = tile_words(tile, num_tiles, BLOCK)
        x = processed_scores(logits, processing, row, words, vocab_size)
        survives = key_of(x) >= threshold.to(tl.int32)
        total += tl.sum(tl.where(survives, relative_weight(x, largest), 0.0))
        score = tl.where(survives, x + group_noise(seed, step, words), -float("inf"))
        score, token = best_of(score, tokens_of(words))
        equal = tl.minimum(token, best_token)
        best_token = tl.where(score == best_score, equal, best_token)
        best_token = tl.where(score > best_score, token, best_token)
        best_score = tl.maximum(best_score, score)
    return best_token, total, threshold
