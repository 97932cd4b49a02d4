"""Draws tokens on the CPU, without a full sort: what "auto" takes there.

Rows go in chunks whose scores fit into a core's cache, through threads where there are several.
Within a chunk everything is NumPy on the tensors' own memory, whose calls cost little next to what
they do; a row is read once for its blocks' largest scores, and once more where top_p needs the sum
over all tokens.
"""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fastattn.sampling.host_cut import (
    FIRST_BLOCKS,
    GROWTH,
    PROMISING,
    Blocks,
    Head,
    cut_head,
    cut_whole,
)
from fastattn.sampling.host_draw import draw_few, draw_whole
from fastattn.sampling.host_scores import Settings, scores, scratch
from fastattn.sampling.problem import ERROR_TOKEN, Sample, SampleProblem
from fastattn.sampling.state import SamplerState

CHUNK_BYTES = 2**20
"""Scores of as many rows as fit into this are worked on at once: about a core's second cache."""

TINY_VOCABULARY = 4096
"""Up to this, everything is gathered at last: a row is quicker sorted than cut whole."""

SMALL_VOCABULARY = 1024
"""Up to this, everything is gathered at first, and nothing is drawn a row at a time."""

FEW = 8
"""Where one in so many tokens is kept, only these get noise."""


def unsupported_reasons(problem: SampleProblem) -> list[str]:
    """Why this cannot draw; empty if it can."""
    reasons = []
    if problem.device.type != "cpu":
        reasons.append(f"the torch path works in the host's memory, not on {problem.device}")
    if problem.dtype == torch.float64:
        reasons.append("float64 is not in the torch path, which computes in float32")
    return reasons


@dataclass(frozen=True, eq=False)
class _Output:
    """What the chunks fill."""

    tokens: NDArray  # int64 (batch,)
    logprobs: NDArray  # float32 (batch,)
    top_tokens: NDArray  # int64 (batch, n)
    top_logprobs: NDArray  # float32 (batch, n)


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
    threads = torch.get_num_threads()
    size = max(1, CHUNK_BYTES // (4 * problem.vocab_size))
    size = max(1, min(size, -(-batch // threads)))
    chunks = [slice(start, min(start + size, batch)) for start in range(0, batch, size)]
    work = functools.partial(_draw_chunk, problem, settings, output)
    if len(chunks) > 1 and threads > 1:
        list(_pool(threads).map(work, chunks))
    else:
        for chunk in chunks:
            work(chunk)
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


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fastattn-sample")


class _Chunk:
    """Some rows, from scores to tokens."""

    def __init__(
        self, problem: SampleProblem, settings: Settings, output: _Output, rows: slice
    ) -> None:
        self.problem, self.output = problem, output
        self.first = rows.start
        self.settings = settings.take(np.arange(rows.start, rows.stop))
        self.seed = problem.seeds[rows].numpy()
        self.step = problem.steps[rows].numpy()
        self.values = scores(problem, settings, rows)
        self.blocks = Blocks.of(self.values)
        self.largest = self.blocks.row_largest()
        self.wants_filtered = (
            problem.params.logprobs is not None and problem.params.logprobs_of == "filtered"
        )

    def draw(self) -> None:
        """Fills the output for these rows."""
        settings, vocab_size = self.settings, self.problem.vocab_size
        failed = np.isnan(self.largest) | (self.largest == -np.inf)
        alone = ~failed & (settings.greedy | (self.largest == np.inf))
        for row in np.flatnonzero(alone):
            self._finish(row, int(self.values[row].argmax()), np.zeros(1, dtype=np.float32))
        drawn = ~failed & ~alone
        uncut = (settings.top_k >= vocab_size) & ~np.isfinite(settings.top_p)
        uncut &= settings.min_p <= 0
        over_all = np.isfinite(settings.top_p) & (settings.joint | (settings.top_k >= vocab_size))
        weights: NDArray | None = None
        mass: NDArray | None = None
        if (drawn & (uncut | over_all)).any():
            with np.errstate(invalid="ignore"):
                weights = np.subtract(
                    self.values, self.largest[:, None], out=scratch("weights", *self.values.shape)
                )
            np.exp(weights, out=weights)
            if over_all.any():
                mass = np.where(over_all, weights.sum(1), math.nan)
        # Rows of few tokens go together: a call for each would cost more than the noise of all.
        heads = drawn if vocab_size <= SMALL_VOCABULARY else drawn & ~uncut
        whole = list(np.flatnonzero(drawn & ~heads))
        whole += self._draw_heads(np.flatnonzero(heads), mass)
        for row in whole:
            self._draw_whole(int(row), weights)

    def _draw_heads(self, rows: NDArray, mass: NDArray | None) -> list[int]:
        """Draws rows whose cut a head proves; returns the others."""
        blocks, vocab_size = self.blocks, self.problem.vocab_size
        most = blocks.num if vocab_size <= TINY_VOCABULARY else blocks.num // 4
        top_k = self.settings.top_k[rows]
        count = np.where(top_k < vocab_size, top_k, FIRST_BLOCKS)
        if self.settings.keeps_several:
            count = np.maximum(count, self.settings.least[rows])
        if most == blocks.num:
            small = vocab_size <= SMALL_VOCABULARY
            count = np.full_like(count, most) if small else np.minimum(count, most)
        whole = []
        while len(rows):
            tried = count <= most
            whole += [int(row) for row in rows[~tried]]
            rows, count = rows[tried], count[tried]
            if not len(rows):
                break
            settings = self.settings.take(rows)
            head = cut_head(
                blocks, rows, settings, None if mass is None else mass[rows], int(count.max())
            )
            if head.proven.any():
                self._draw_head(rows, head)
            # Four times the blocks, or none: a flat row is not to be gathered piece by piece.
            rows, count = rows[~head.proven], count[~head.proven] * GROWTH
            if most == blocks.num:
                count = np.minimum(count, most)
            else:
                count[head.covered[~head.proven] < PROMISING] = most + 1
        return whole

    def _draw_head(self, rows: NDArray, head: Head) -> None:
        proven = head.proven
        rows, values, tokens = rows[proven], head.values[proven], head.tokens[proven]
        keep = (values >= head.threshold[proven][:, None]) & (values > -np.inf)
        at, column = np.nonzero(keep)
        few_tokens, few_values = tokens[at, column], values[at, column]
        drawn = draw_few(at, few_tokens, few_values, self.seed[rows], self.step[rows])
        self.output.tokens[self.first + rows] = drawn
        if not self.wants_filtered:
            return
        for index, row in enumerate(rows):
            here = at == index
            self._report(row, drawn[index], few_tokens[here], few_values[here])

    def _draw_whole(self, row: int, weights: NDArray | None) -> None:
        values, largest = self.values[row], self.largest[row]
        if weights is None:
            own = np.subtract(values, largest, out=scratch("row", len(values)))
            np.exp(own, out=own)
        else:
            own = weights[row]
        cut_whole(values, own, self.settings, row, len(values))
        seed, step = self.seed[row : row + 1], self.step[row : row + 1]
        kept = None
        if self.wants_filtered or np.count_nonzero(own) * FEW < len(own):
            kept = np.flatnonzero(own)
        if kept is not None and len(kept) * FEW < len(own):
            token = int(draw_few(np.zeros_like(kept), kept, values[kept], seed, step)[0])
        else:
            token = draw_whole(values, own, float(largest), int(seed[0]), int(step[0]))
        self.output.tokens[self.first + row] = token
        if self.wants_filtered and kept is not None:
            self._report(row, token, kept, values[kept])

    def _finish(self, row: int, token: int, value: NDArray) -> None:
        self.output.tokens[self.first + row] = token
        if self.wants_filtered:
            self._report(row, token, np.array([token]), value)

    def _report(self, row: int, token: int, tokens: NDArray, values: NDArray) -> None:
        """Log-probabilities of a row among `tokens` with scores `values`."""
        report(self.output, self.first + row, token, tokens, values)


def report(output: _Output, row: int, token: int, tokens: NDArray, values: NDArray) -> None:
    """Writes log-probabilities of a row whose distribution is softmax(values) over tokens."""
    relative = values - values.max()
    logprobs = relative - np.log(np.exp(relative).sum())
    where = np.flatnonzero(tokens == token)
    output.logprobs[row] = logprobs[where[0]] if len(where) else -math.inf
    n = output.top_tokens.shape[1]
    if not n:
        return
    output.top_tokens[row], output.top_logprobs[row] = ERROR_TOKEN, -math.inf
    if len(values) > n:
        least = np.partition(values, len(values) - n)[len(values) - n]
        enough = values >= least
        tokens, logprobs = tokens[enough], logprobs[enough]
    order = np.lexsort((tokens, -logprobs))[:n]
    order = order[logprobs[order] > -math.inf]
    output.top_tokens[row, : len(order)] = tokens[order]
    output.top_logprobs[row, : len(order)] = logprobs[order]


def _draw_chunk(problem: SampleProblem, settings: Settings, output: _Output, rows: slice) -> None:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        _Chunk(problem, settings, output, rows).draw()
        if problem.params.logprobs is not None and problem.params.logprobs_of == "raw":
            _report_raw(problem, output, rows)


def _report_raw(problem: SampleProblem, output: _Output, rows: slice) -> None:
    tokens = np.arange(problem.vocab_size)
    for row in range(rows.start, rows.stop):
        token = int(output.tokens[row])
        if token == ERROR_TOKEN:
            continue
        values = problem.logits[row].float().numpy()
        if values.max() == np.inf:
            winner = int(values.argmax())
            report(output, row, token, np.array([winner]), np.zeros(1, dtype=np.float32))
        else:
            report(output, row, token, tokens, values)
