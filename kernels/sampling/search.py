"""Searches for a threshold on keys, by bisection: sets are cut by value, and never sorted."""

import triton
import triton.language as tl

from fastattn.kernels.sampling.logits import float_of, relative_weight

# The key of -inf: what may be drawn lies above it.
EMPTY_KEY = tl.constexpr(-2139095041)
NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def highest_threshold(key, weight, target, low, high):
    """The highest key t in [low, high] whose keys from t on weigh `target` or more; else low."""
    while low < high:
        middle = (low + high + 1) >> 1
        reached = tl.sum(tl.where(key >= middle.to(tl.int32), weight, 0.0)) >= target
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return low


@triton.jit
def ratio_threshold(ratio, largest, low, high):
    """The lowest key in [low, high] of a score whose probability is `ratio` of the largest's."""
    while low < high:
        middle = (low + high) >> 1
        reached = relative_weight(float_of(middle.to(tl.int32)), largest) >= ratio
        high = tl.where(reached, middle, high)
        low = tl.where(reached, low, middle + 1)
    return low


@triton.jit
def best_of(score, token):
    """The largest score and its token, the lowest of several."""
    best = tl.max(score)
    return best, tl.min(tl.where(score == best, token, NO_TOKEN))
