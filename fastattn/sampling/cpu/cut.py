"""Where top_k, top_p and min_p cut a row, found in the head of it where that suffices.

A row is seen as blocks of tokens that lie far apart, and one pass gives each block's largest score.
The count-th largest of these is a bound that at least `count` tokens reach; one more pass finds all
that do. If the cut lies among them it is proven, and nothing else is looked at; if not, the row is
cut whole, still without sorting it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastattn.sampling.cpu.scores import Settings, few_places, scratch

HEAD = 48
"""Blocks whose largest score is above the bound, where top_k does not say how many. Enough for the
nucleus of a language model's distributions at ordinary temperatures."""

SMALL_VOCABULARY = 1024
"""Up to this, the head is all of the row."""

MOST_TIED = 512
"""So many tokens more than blocks may reach the bound: a row of equal scores is cut whole."""

SAMPLE = 2048
"""So many tokens say where about a whole row is to be cut."""

SORTED = 4096
"""Where no more tokens than this are left between two bounds, they are sorted."""

_LOWEST = np.float32(np.finfo(np.float32).min)


@dataclass(frozen=True, eq=False)
class Head:
    """All tokens of some rows whose score reaches the row's bound, by row, then by token."""

    rows: NDArray  # int64 (n,)
    tokens: NDArray  # int64 (n,)
    values: NDArray  # float32 (n,)
    count: NDArray  # int64 (rows,), how many each row has: none where they would be too many
    bound: NDArray  # float32 (rows,)

    def ordered(self) -> NDArray:
        """Each row's scores, descending, -inf behind them: float32 (rows, at least 1)."""
        if len(self.count) == 1:
            width = len(self.values)
            table = np.full((1, max(width, 1)), -np.inf, dtype=np.float32)
            table[0, :width] = self.values
        else:
            starts = np.cumsum(self.count) - self.count
            width = max(int(self.count.max()), 1)
            table = np.full((len(self.count), width), -np.inf, dtype=np.float32)
            table[self.rows, np.arange(len(self.rows)) - starts[self.rows]] = self.values
        table.sort(axis=1)
        return table[:, ::-1]


class Blocks:
    """The largest score of each block: block j holds tokens j, j + num, j + 2 * num, ..."""

    def __init__(self, values: NDArray) -> None:
        rows, vocab_size = values.shape
        size = max(1, min(64, round((vocab_size / 32) ** 0.5)))
        self.num = vocab_size // size
        self.values = values
        self.tail = values[:, self.num * size :]
        if rows == 1 or not self.tail.shape[1]:
            blocks = values[:, : self.num * size].reshape(rows, size, self.num)
        else:
            row_stride, stride = values.strides
            blocks = np.lib.stride_tricks.as_strided(
                values, (rows, size, self.num), (row_stride, self.num * stride, stride)
            )
        self.largest = blocks.max(1)  # (rows, num)

    def row_largest(self) -> NDArray:
        """The largest score of each row, NaN where one is NaN."""
        largest: NDArray = self.largest.max(1)
        if self.tail.shape[1]:
            largest = np.maximum(largest, self.tail.max(1))
        return largest

    def head(self, count: NDArray) -> Head:
        """The tokens that reach the count-th largest of the blocks' largest; of the row, if small.

        Args:
            count: int64 (rows,), at least 1. Rows for which it is 0 get no tokens.
        """
        num_rows, vocab_size = self.values.shape
        if vocab_size <= SMALL_VOCABULARY:
            bound = np.full(num_rows, -np.inf, dtype=np.float32)
        else:
            largest = np.sort(self.largest, axis=1)
            bound = largest[np.arange(num_rows), self.num - np.maximum(count, 1)]
        # Nothing is to be found at -inf, where bans would leave nothing else.
        reached = self.values >= np.maximum(bound, _LOWEST)[:, None]
        if not count.all():
            reached[count < 1] = False
        if vocab_size > SMALL_VOCABULARY:
            most = count + MOST_TIED
            if np.count_nonzero(reached) > most.sum():
                reached[np.count_nonzero(reached, axis=1) > most] = False
        tokens = few_places(reached.ravel())
        if num_rows == 1:
            rows, values = np.zeros_like(tokens), self.values[0, tokens]
            number = np.array([len(tokens)])
        else:
            rows, tokens = np.divmod(tokens, vocab_size)
            values = self.values[rows, tokens]
            number = np.bincount(rows, minlength=num_rows)
        return Head(rows, tokens, values, number, bound)


def cut_head(head: Head, settings: Settings, mass: NDArray | None) -> tuple[NDArray, NDArray]:
    """The lowest score that is kept, float32 (rows,), and whether it is proven, bool (rows,).

    Args:
        head: of the rows.
        settings: of the same rows.
        mass: float64, sum of exp(score - largest) over each row where top_p is of all tokens, NaN
            where it is of what top_k left.
    """
    ordered, num = head.ordered(), head.count
    rows, width = ordered.shape
    index = np.arange(rows)
    is_all = (head.bound < _LOWEST) & (num > 0)

    def run_end(count: NDArray) -> NDArray:
        """The count, and all that tie with its last."""
        last = ordered[index, np.minimum(count, width) - 1]
        result: NDArray = (ordered >= last[:, None]).sum(1)
        return result

    proven = settings.top_k <= num
    kept = np.where(proven, run_end(settings.top_k), width)
    known: NDArray | bool = True
    if settings.cuts_mass or settings.cuts_ratio:
        relative = np.exp(ordered - ordered[:, :1])
    if settings.cuts_mass:
        # The mass that top_p is a share of: of what top_k left, which must be here, or of all.
        known = proven | np.isinf(settings.top_p)
        before = np.zeros((rows, width + 1))
        relative.cumsum(1, dtype=np.float64, out=before[:, 1:])
        goal = before[index, kept]
        if mass is not None:
            here = np.isnan(mass)
            goal = np.where(here, goal, mass)
            known |= ~here
        goal = settings.top_p * goal
        # Only where a run of equal scores ends: they stay or go together.
        cuts = before >= goal[:, None]
        cuts[:, 1:-1] &= ordered[:, 1:] != ordered[:, :-1]
        cuts[:, 0] = False  # the largest stays, also at p = 0
        by_p = np.where(cuts.any(1), cuts.argmax(1), width + 1)
        proven = proven | (by_p <= num)
        kept = np.minimum(kept, by_p)
    if settings.cuts_ratio:
        by_min = (relative >= settings.min_p[:, None]).sum(1)
        proven = proven | (np.exp(head.bound - ordered[:, 0]) < settings.min_p)
        kept = np.minimum(kept, np.maximum(by_min, 1))
    if settings.keeps_several:
        short = kept < settings.least
        kept = np.where(short, run_end(settings.least), kept)
        proven = proven & (~short | (settings.least <= num))
    proven = (proven & known & (num > 0)) | is_all
    return ordered[index, np.minimum(kept, width) - 1], proven


def cut_whole(
    values: NDArray, weights: NDArray | None, largest: float, settings: Settings, row: int
) -> float:
    """The lowest score of a row that is kept.

    Args:
        values: float32 (vocab_size,), scores.
        weights: float32 (vocab_size,), exp(score - largest), if it is known.
        largest: of the values.
        settings: of all rows.
        row: which of them.
    """
    vocab_size = len(values)
    top_k, least = int(settings.top_k[row]), int(settings.least[row])
    min_p, top_p = settings.min_p[row], float(settings.top_p[row])
    lowest = -np.inf
    if weights is None and (top_p < np.inf or min_p > 0):
        weights = np.exp(np.subtract(values, np.float32(largest), out=scratch("row", vocab_size)))
    if top_k < vocab_size:
        lowest = float(np.partition(values, vocab_size - top_k)[vocab_size - top_k])
    if top_p < np.inf:
        assert weights is not None
        if not settings.joint and top_k < vocab_size:
            left = np.flatnonzero(values >= lowest)
            by_mass = _mass_threshold(values[left], weights[left], largest, top_p)
        else:
            by_mass = _mass_threshold(values, weights, largest, top_p)
        lowest = max(lowest, by_mass)
    if min_p > 0:
        assert weights is not None
        lowest = max(lowest, float(values[weights >= min_p].min(initial=largest)))
    if least > 1 and lowest > -np.inf:
        lowest = min(lowest, float(np.partition(values, vocab_size - least)[vocab_size - least]))
    return lowest


def _mass_threshold(values: NDArray, weights: NDArray, largest: float, top_p: float) -> float:
    """The highest score such that strictly larger ones have less than a share top_p of the weight,
    and with it the share is reached."""
    total = float(weights.sum())
    goal, above = top_p * total, 0.0
    if goal <= 0:
        return largest
    while len(values) > SORTED:
        low, high = _bracket(values, largest, (goal - above) / total)
        over = values > high
        # Not a dot product, for which NumPy's library would wake threads of its own.
        more = above + float(np.multiply(weights, over, out=scratch("masked", len(over))).sum())
        inside = np.flatnonzero((values >= low) ^ over)
        weights_inside = weights[inside]
        inner = float(weights_inside.sum())
        if more >= goal or more + inner < goal or len(inside) * 2 > len(values):
            break  # the sample misled, or equal scores cannot be told apart: sort what is left
        values, weights, total, above = values[inside], weights_inside, inner, more
    ordered = np.sort(values)[::-1]
    mass = np.exp(ordered - np.float32(largest)).cumsum(dtype=np.float64)
    # With those that tie with the one that reaches the goal.
    return float(ordered[min(int(mass.searchsorted(goal - above)), len(ordered) - 1)])


def _bracket(values: NDArray, largest: float, share: float) -> tuple[float, float]:
    """Scores below and above the one at which larger ones have a share of the weight, likely."""
    some = np.sort(values[:: -(-len(values) // SAMPLE)])[::-1]
    weight = np.exp(some - np.float32(largest))
    mass = weight.cumsum(dtype=np.float64)
    total = mass[-1]
    if not total > 0:
        return -np.inf, np.inf
    # Three standard deviations of the sample's share to both sides.
    middle = int(np.searchsorted(mass, share * total))
    squares = weight * weight
    inner, outer = float(squares[:middle].sum()), float(squares[middle:].sum())
    margin = 3 * max(inner * (1 - share) ** 2 + outer * share**2, 1e-12) ** 0.5
    first = int(np.searchsorted(mass, share * total - margin))
    last = int(np.searchsorted(mass, share * total + margin))
    return (
        float(some[last]) if last < len(some) else -np.inf,
        float(some[first - 1]) if first > 0 else np.inf,
    )
