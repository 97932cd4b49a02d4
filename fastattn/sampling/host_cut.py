"""Where top_k, top_p and min_p cut a row, found in the head of it where that suffices.

A row is seen as blocks of tokens that lie far apart. One pass gives each block's largest score.
The blocks with the largest hold every score above `bound`, the largest of the blocks left out: if
the cut falls above the bound, what is gathered proves it, and nothing else was looked at. If not,
more blocks are gathered, and at last the row is cut whole, still without sorting it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastattn.sampling.host_scores import Settings, scratch

FIRST_BLOCKS = 48
"""Blocks that are gathered at first, where top_k does not say how many. Enough for the nucleus of a
language model's distributions at ordinary temperatures."""

GROWTH = 4
"""How many times more are gathered where they did not suffice."""

PROMISING = 0.5
"""Only where the first had this share of the mass that is wanted; else the row is cut whole."""

SAMPLE = 1024
"""So many tokens say where about a whole row is to be cut."""

SORTED = 2048
"""Where no more tokens than this are left between two bounds, they are sorted."""


@dataclass(frozen=True, eq=False)
class Head:
    """Gathered candidates of some rows, and where those rows are cut."""

    tokens: NDArray  # int64 (rows, gathered)
    values: NDArray  # float32 (rows, gathered)
    threshold: NDArray  # float32 (rows,)
    covered: NDArray  # float64 (rows,), the share of top_p's mass that is gathered
    proven: NDArray  # bool (rows,)


@dataclass(frozen=True, eq=False)
class Blocks:
    """The largest score of each block: block j holds tokens j, j + num, j + 2 * num, ..."""

    values: NDArray  # float32 (rows, vocab_size)
    largest: NDArray  # float32 (rows, num)
    size: int

    @staticmethod
    def of(values: NDArray) -> Blocks:
        """In one pass. The last few tokens, which fill no block, are gathered always."""
        rows, vocab_size = values.shape
        size = max(1, min(64, round((vocab_size / 32) ** 0.5)))
        num = vocab_size // size
        if rows == 1 or num * size == vocab_size:
            blocks = values[:, : num * size].reshape(rows, size, num)
        else:
            row_stride, stride = values.strides
            blocks = np.lib.stride_tricks.as_strided(
                values, (rows, size, num), (row_stride, num * stride, stride), writeable=False
            )
        return Blocks(values, blocks.max(1), size)

    @property
    def num(self) -> int:
        """Blocks."""
        return self.largest.shape[1]

    def row_largest(self) -> NDArray:
        """The largest score of each row, NaN where one is NaN."""
        largest = self.largest.max(1)
        tail = self.values[:, self.num * self.size :]
        return np.maximum(largest, tail.max(1)) if tail.shape[1] else largest


def cut_head(
    blocks: Blocks, rows: NDArray, settings: Settings, mass: NDArray | None, count: int
) -> Head:
    """Gathers `count` blocks of each of `rows` and cuts there.

    Args:
        blocks: of the scores.
        rows: int64, which of the blocks' rows.
        settings: of these rows alone.
        mass: float64, sum of exp(score - largest) over each row where top_p is of all tokens, NaN
            where it is of what top_k left.
        count: how many blocks.
    """
    tokens, bound = _gather(blocks, rows, count)
    values = blocks.values[rows[:, None], tokens]
    ordered = np.sort(values, axis=1)[:, ::-1]
    if count >= blocks.num:
        num_above = np.full(len(rows), values.shape[1])
    else:
        num_above = (ordered > bound[:, None]).sum(1)
        # Nothing follows from scores that are not above the bound, but for where the first ends.
        ordered = ordered[:, : num_above.max() + 1]
    kept, covered, proven = _count_kept(
        ordered, bound, num_above, count >= blocks.num, settings, mass
    )
    threshold = ordered[np.arange(len(rows)), np.minimum(kept, ordered.shape[1]) - 1]
    return Head(tokens, values, threshold, covered, proven)


def _gather(blocks: Blocks, rows: NDArray, count: int) -> tuple[NDArray, NDArray]:
    """Tokens (rows, gathered) of the blocks with the largest scores, and the bound of the rest."""
    num, size = blocks.num, blocks.size
    tail = np.arange(num * size, blocks.values.shape[1])
    if count >= num:
        everything = np.arange(blocks.values.shape[1])
        return np.broadcast_to(everything, (len(rows), len(everything))), np.full(
            len(rows), -np.inf, dtype=np.float32
        )
    largest = blocks.largest[rows]
    order = np.argpartition(largest, num - count - 1, axis=1)
    chosen = order[:, num - count :]
    bound = largest[np.arange(len(rows)), order[:, num - count - 1]]
    tokens = (chosen[:, None, :] + (np.arange(size) * num)[:, None]).reshape(len(rows), -1)
    if len(tail):
        tail = np.broadcast_to(tail, (len(rows), len(tail)))
        tokens = np.concatenate((tokens, tail), axis=1)
    return tokens, bound


def _count_kept(
    ordered: NDArray,
    bound: NDArray,
    num_above: NDArray,
    is_all: bool,
    settings: Settings,
    mass: NDArray | None,
) -> tuple[NDArray, NDArray, NDArray]:
    """How many of the ordered scores are kept, the share of top_p's mass among them, and whether
    it is proven: whether what is not here could change nothing."""
    rows, gathered = ordered.shape
    index = np.arange(rows)

    def run_end(count: NDArray) -> NDArray:
        """The count, and all that tie with its last."""
        last = ordered[index, np.minimum(count, gathered) - 1]
        result: NDArray = (ordered >= last[:, None]).sum(1)
        return result

    proven = settings.top_k <= num_above
    kept = np.where(proven, run_end(settings.top_k), gathered)
    covered = np.ones(rows)
    if settings.cuts_mass or settings.cuts_ratio:
        relative = np.exp(ordered - ordered[:, :1])
    known = np.ones(rows, dtype=bool)
    if settings.cuts_mass:
        # The mass that top_p is a share of: of what top_k left, which must be here, or of all.
        known = proven | np.isinf(settings.top_p)
        before = np.zeros((rows, gathered + 1))
        relative.cumsum(1, dtype=np.float64, out=before[:, 1:])
        goal = before[index, kept]
        if mass is not None:
            goal = np.where(np.isnan(mass), goal, mass)
            known |= ~np.isnan(mass)
        goal = settings.top_p * goal
        # Only where a run of equal scores ends: they stay or go together.
        cuts = before >= goal[:, None]
        cuts[:, 1:-1] &= ordered[:, 1:] != ordered[:, :-1]
        cuts[:, 0] = False  # the largest stays, also at p = 0
        by_p = np.where(cuts.any(1), cuts.argmax(1), gathered + 1)
        covered = before[:, -1] / goal
        proven = proven | (by_p <= num_above)
        kept = np.minimum(kept, by_p)
    if settings.cuts_ratio:
        by_min = (relative >= settings.min_p[:, None]).sum(1)
        outside = np.exp(bound - ordered[:, 0])
        proven = proven | (by_min < num_above) | (outside < settings.min_p)
        kept = np.minimum(kept, np.maximum(by_min, 1))
    if settings.keeps_several:
        short = kept < settings.least
        kept = np.where(short, run_end(settings.least), kept)
        proven = proven & (~short | (settings.least <= num_above))
    return np.minimum(kept, gathered), covered, (proven & known) | is_all


def cut_whole(
    values: NDArray, weights: NDArray, settings: Settings, row: int, vocab_size: int
) -> None:
    """Sets the weights of a row's tokens that are cut to 0.

    Args:
        values: float32 (vocab_size,), scores.
        weights: float32 (vocab_size,), exp(score - largest); changed in place.
        settings: of all rows.
        row: which of them.
        vocab_size: tokens.
    """
    top_k, least = int(settings.top_k[row]), int(settings.least[row])
    min_p, top_p = settings.min_p[row], float(settings.top_p[row])
    floor = np.float32(-np.inf)
    if least > 1:
        floor = np.partition(values, vocab_size - least)[vocab_size - least]
        stay = values >= floor
        saved = weights[stay]
    joint_weights = weights.copy() if settings.joint and top_k < vocab_size else weights
    if top_k < vocab_size:
        kth = np.partition(values, vocab_size - top_k)[vocab_size - top_k]
        np.multiply(weights, values >= kth, out=weights)
    if top_p < np.inf:
        threshold = _mass_threshold(values, joint_weights, top_p)
        np.multiply(weights, values >= threshold, out=weights)
    if min_p > 0:
        np.multiply(weights, weights >= min_p, out=weights)
    if least > 1:
        weights[stay] = saved


def _mass_threshold(values: NDArray, weights: NDArray, top_p: float) -> float:
    """The least score such that strictly larger ones have less than a share top_p of the weight."""
    goal = top_p * float(weights.sum())
    if goal <= 0:
        return float(values.max())
    above = 0.0
    while len(values) > SORTED:
        low, high = _bracket(values, weights, (goal - above) / float(weights.sum()))
        over = values > high
        # Not a dot product, for which NumPy's library would wake threads of its own.
        masked = np.multiply(weights, over, out=scratch("masked", len(weights)))
        more = above + float(masked.sum())
        inside = np.flatnonzero(~over & (values >= low))
        within = weights[inside]
        if more >= goal or more + float(within.sum()) < goal or len(inside) * 2 > len(values):
            break  # the sample misled, or equal scores cannot be told apart: sort what is left
        values, weights, above = values[inside], within, more
    order = np.argsort(-values)
    ordered = values[order]
    mass = above + weights[order].cumsum(dtype=np.float64)
    ends = np.append(ordered[1:] != ordered[:-1], True)
    cuts = np.flatnonzero(ends & (mass >= goal))
    return float(ordered[cuts[0]] if len(cuts) else ordered[-1])


def _bracket(values: NDArray, weights: NDArray, share: float) -> tuple[float, float]:
    """Scores below and above the one at which larger ones have a share of the weight, likely."""
    stride = -(-len(values) // SAMPLE)
    some = values[::stride]
    order = np.argsort(-some)
    mass = weights[::stride][order].cumsum(dtype=np.float64)
    if not mass[-1] > 0:
        return -np.inf, np.inf
    mass /= mass[-1]
    # Five standard deviations of the sample's share to both sides.
    middle = int(np.searchsorted(mass, share))
    squares = np.diff(mass, prepend=0.0) ** 2
    inner = float(squares[:middle].sum()) * (1 - share) ** 2
    margin = 5 * max(inner + float(squares[middle:].sum()) * share**2, 1e-12) ** 0.5
    first = int(np.searchsorted(mass, share - margin))
    last = int(np.searchsorted(mass, share + margin))
    return (
        float(some[order[last]]) if last < len(some) else -np.inf,
        float(some[order[first - 1]]) if first > 0 else np.inf,
    )
