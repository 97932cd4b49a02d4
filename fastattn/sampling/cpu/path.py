"""Draws tokens on the CPU, without a full sort: what "auto" takes there.

On one core, in NumPy on the tensors' own memory, whose calls cost little next to what they do. Rows
go in chunks whose scores stay in a core's caches: a row is read once for its blocks' largest
scores, once for the tokens that reach a bound, and once more where top_p needs the sum over all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fastattn.sampling.cpu.cut import HEAD, SMALL_VOCABULARY, Blocks, cut_head, cut_whole
from fastattn.sampling.cpu.draw import contenders, draw_few
from fastattn.sampling.cpu.scores import Settings, scores, scratch
from fastattn.sampling.problem import ERROR_TOKEN, Sample, SampleProblem
from fastattn.sampling.state import SamplerState

CHUNK_BYTES = 2**21
"""Scores of as many rows as fit into this are worked on at once."""


def unsupported_reasons(problem: SampleProblem) -> list[str]:
    """Why this cannot draw; empty if it can."""
    reasons = []
    if problem.device.type != "cpu":
        reasons.append(f"the CPU path works in the host's memory, not on {problem.device}")
    if problem.dtype == torch.float64:
        reasons.append("float64 is not in the CPU path, which computes in float32")
    return reasons


@dataclass(frozen=True, eq=False)
class _Output:
    """What the chunks fill."""

    tokens: NDArray  # int64 (batch,)
    logprobs: NDArray  # float32 (batch,)
    top_tokens: NDArray  # int64 (batch, n)
    top_logprobs: NDArray  # float32 (batch, n)

    def report(self, row: int, token: int, tokens: NDArray, values: NDArray) -> None:
        """Writes log-probabilities of a row whose distribution is softmax(values) over tokens."""
        relative = values - values.max()
        logprobs = relative - np.log(np.exp(relative).sum())
        where = np.flatnonzero(tokens == token)
        self.logprobs[row] = logprobs[where[0]] if len(where) else -math.inf
        n = self.top_tokens.shape[1]
        if not n:
            return
        self.top_tokens[row], self.top_logprobs[row] = ERROR_TOKEN, -math.inf
        if len(values) > n:
            least = np.partition(values, len(values) - n)[len(values) - n]
            enough = values >= least
            tokens, logprobs = tokens[enough], logprobs[enough]
        order = np.lexsort((tokens, -logprobs))[:n]
        order = order[logprobs[order] > -math.inf]
        self.top_tokens[row, : len(order)] = tokens[order]
        self.top_logprobs[row, : len(order)] = logprobs[order]


def run(problem: SampleProblem) -> Sample:
    """Draws a token from each row, and marks it in the state."""
    batch, n = problem.batch, problem.params.logprobs or 0
    output = _Output(
        np.full(batch, ERROR_TOKEN, dtype=np.int64),
        np.full(batch, math.nan, dtype=np.float32),
        np.full((batch, n), ERROR_TOKEN, dtype=np.int64),
        np.full((batch, n), math.nan, dtype=np.float32),
    )
    settings = Settings.of(problem)
    size = max(1, CHUNK_BYTES // (4 * problem.vocab_size))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for start in range(0, batch, size):
            rows = slice(start, min(start + size, batch))
            _Chunk(problem, settings, output, rows).draw()
            if problem.params.logprobs is not None and problem.params.logprobs_of == "raw":
                _report_raw(problem, output, rows)
    tokens = torch.from_numpy(output.tokens)
    if problem.state is not None:
        _mark(problem.state, output.tokens)
    if problem.params.logprobs is None:
        return Sample(tokens)
    logprobs = torch.from_numpy(output.logprobs)
    if not n:
        return Sample(tokens, logprobs)
    top = torch.from_numpy(output.top_tokens), torch.from_numpy(output.top_logprobs)
    return Sample(tokens, logprobs, *top)


def _mark(state: SamplerState, tokens: NDArray) -> None:
    """`state.add`, without the cost of torch's calls."""
    rows = np.flatnonzero(tokens != ERROR_TOKEN)
    token = tokens[rows]
    bits = np.left_shift(np.uint32(1), (token & 31).astype(np.uint32)).view(np.int32)
    state.seen.numpy()[rows, token >> 5] |= bits
    if state.counts is not None:
        state.counts.numpy()[rows, token] += 1
    state.step.numpy()[:] += 1


class _Chunk:
    """Some rows, from scores to tokens."""

    def __init__(
        self, problem: SampleProblem, settings: Settings, output: _Output, rows: slice
    ) -> None:
        self.vocab_size = problem.vocab_size
        self.output, self.first = output, rows.start
        self.settings = settings.take(rows)
        self.seed = problem.seeds[rows].numpy()
        self.step = problem.steps[rows].numpy()
        self.values = scores(problem, settings, rows)
        self.blocks = Blocks(self.values)
        self.largest = self.blocks.row_largest()
        params = problem.params
        self.wants_filtered = params.logprobs is not None and params.logprobs_of == "filtered"

    def draw(self) -> None:
        """Fills the output for these rows."""
        settings, largest = self.settings, self.largest
        drawn = np.isfinite(largest) & ~settings.greedy
        if not drawn.all():
            self._take_winners(np.flatnonzero((largest > -np.inf) & ~drawn))
        uncut = settings.uncut
        # A small row's head is the row, and rows go together: a call for each would cost more.
        heads = drawn if self.vocab_size <= SMALL_VOCABULARY else drawn & ~uncut
        weights, mass = self._weigh(drawn, heads)
        whole = np.flatnonzero(drawn & ~heads)
        if heads.any():
            whole = np.concatenate((whole, self._draw_heads(heads, mass)))
        if len(whole):
            self._draw_whole(whole, weights)

    def _take_winners(self, rows: NDArray) -> None:
        """Greedy rows, and those with +inf: the largest, the lowest id on a tie."""
        if not len(rows):
            return
        winners = self.values[rows].argmax(1) if len(rows) < len(self.values) else None
        tokens = self.values.argmax(1) if winners is None else winners
        self.output.tokens[self.first + rows] = tokens
        if self.wants_filtered:
            for row, token in zip(rows, tokens, strict=True):
                self._report(row, int(token), np.array([token]), np.zeros(1, dtype=np.float32))

    def _weigh(self, drawn: NDArray, heads: NDArray) -> tuple[NDArray | None, NDArray | None]:
        """exp(score - largest) of all, and its sum where top_p is a share of that."""
        settings = self.settings
        over_all = settings.cuts_mass_of_all
        if not (drawn & heads & over_all).any():
            return None, None
        weights = scratch("weights", *self.values.shape)
        np.subtract(self.values, self.largest[:, None], out=weights)
        np.exp(weights, out=weights)
        return weights, np.where(over_all, weights.sum(1), math.nan)

    def _draw_heads(self, rows: NDArray, mass: NDArray | None) -> NDArray:
        """Draws rows (bool) whose cut a head proves; returns the others' numbers."""
        settings, num = self.settings, self.blocks.num
        count = np.where(settings.top_k < self.vocab_size, settings.top_k, HEAD)
        if settings.keeps_several:
            count = np.maximum(count, settings.least)
        if self.vocab_size > SMALL_VOCABULARY:
            # Of few blocks that are all in the head nothing is left out to be bounded.
            count = np.where(count < num // 2, count, 0)
        count = np.where(rows, count, 0)
        head = self.blocks.head(count)
        threshold, proven = cut_head(head, settings, mass)
        proven &= rows
        keep = head.values >= threshold[head.rows]
        if not proven.all():
            keep &= proven[head.rows]
        at, tokens, values = head.rows[keep], head.tokens[keep], head.values[keep]
        served = np.flatnonzero(proven)
        if len(served):
            if len(served) < len(rows):
                at = np.searchsorted(served, at)
            seed, step = self.seed[served], self.step[served]
            drawn = draw_few(at, tokens, values, None, seed, step, self.vocab_size)
            self.output.tokens[self.first + served] = drawn
            if self.wants_filtered:
                for index, row in enumerate(served):
                    here = at == index
                    self._report(row, int(drawn[index]), tokens[here], values[here])
        return np.flatnonzero(rows & ~proven)

    def _draw_whole(self, rows: NDArray, weights: NDArray | None) -> None:
        """Draws rows of which much may be kept."""
        found, thresholds = [], []
        for row in rows:
            values = self.values[row]
            threshold = cut_whole(
                values, None if weights is None else weights[row], float(self.largest[row]),
                self.settings, row,
            )  # fmt: skip
            thresholds.append(threshold)
            found.append(contenders(values, threshold, int(self.seed[row]), int(self.step[row])))
        tokens, first = (np.concatenate(parts) for parts in zip(*found, strict=True))
        at = np.repeat(np.arange(len(rows)), [len(part[0]) for part in found])
        values = self.values[rows[at], tokens]
        seed, step = self.seed[rows], self.step[rows]
        drawn = draw_few(at, tokens, values, first, seed, step, self.vocab_size)
        self.output.tokens[self.first + rows] = drawn
        if self.wants_filtered:
            for row, token, threshold in zip(rows, drawn, thresholds, strict=True):
                kept = np.flatnonzero(self.values[row] >= threshold)
                self._report(row, int(token), kept, self.values[row, kept])

    def _report(self, row: int, token: int, tokens: NDArray, values: NDArray) -> None:
        """Log-probabilities of a row among `tokens` with scores `values`."""
        self.output.report(self.first + row, token, tokens, values)


def _report_raw(problem: SampleProblem, output: _Output, rows: slice) -> None:
    tokens = np.arange(problem.vocab_size)
    for row in range(rows.start, rows.stop):
        token = int(output.tokens[row])
        if token == ERROR_TOKEN:
            continue
        values = problem.logits[row].float().numpy()
        if values.max() == np.inf:
            winner = int(values.argmax())
            output.report(row, token, np.array([winner]), np.zeros(1, dtype=np.float32))
        else:
            output.report(row, token, tokens, values)
