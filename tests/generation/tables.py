"""Models whose next token depends on the last one alone, and chi-square: for distributions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TableSession:
    """Lengths alone: the last token of each row is all that a table reads."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.rows))

    def reorder(self, rows: Sequence[int]) -> None:
        self.rows = [list(self.rows[row]) for row in rows]

    def rollback(self, counts: Sequence[int]) -> None:
        self.rows = [row[: len(row) - n] for n, row in zip(counts, self.rows, strict=True)]


class Table:
    """logits[t] (vocab_size, vocab_size) is what comes after token t."""

    is_encoder_decoder, start_token = False, None

    def __init__(self, logits: Tensor, eos: tuple[int, ...] = ()) -> None:
        self.logits, self.vocab_size, self.max_positions = logits, len(logits), None
        self.eos_tokens, self.pad_token = eos, 0

    def start(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        *,
        max_seqlen: int,
        copies: int = 1,
        decoder_input_ids: Tensor | None = None,
        decoder_lengths: Tensor | None = None,
    ) -> tuple[Tensor, TableSession]:
        ends = [input_ids.shape[1]] * len(input_ids) if lengths is None else lengths.tolist()
        rows = [ids[:n] for ids, n in zip(input_ids.tolist(), ends, strict=True)]
        session = TableSession([list(row) for row in rows for _ in range(copies)])
        return self.logits[[row[-1] for row in session.rows]], session

    def step(
        self,
        tokens: Tensor,
        session: TableSession,
        counts: Sequence[int] | None = None,
        *,
        all_logits: bool = False,
    ) -> Tensor:
        counts = [tokens.shape[1]] * len(tokens) if counts is None else counts
        for row, new, count in zip(session.rows, tokens.tolist(), counts, strict=True):
            row.extend(new[:count])
        if all_logits:
            return self.logits[tokens]
        return self.logits[[row[-1] for row in session.rows]]


def improbability(counts: Tensor, p: Tensor) -> float:
    """Chi-square of counts against probabilities p, as a standard normal deviation.

    Wilson and Hilferty's approximation. Cells that expect fewer than 5 are one.
    """
    expected = counts.sum() * p
    assert counts[p == 0].sum() == 0, "something that cannot be drawn"
    large = expected >= 5
    observed = torch.cat([counts[large], counts[~large].sum()[None]]).double()
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = float(((observed - expected).square() / expected).sum())
    return _deviation(statistic, len(expected) - 1)


def improbability_of_two(first: Tensor, second: Tensor) -> float:
    """The same for two samples of one unknown distribution; counts of the same cells."""
    both = (first + second).double()
    large = both >= 10
    first, second = (torch.cat([x[large], x[~large].sum()[None]]).double() for x in (first, second))
    a, b = first.sum() / (first.sum() + second.sum()), second.sum() / (first.sum() + second.sum())
    both = first + second
    present = both > 0
    statistic = sum(
        float((x - share * both)[present].square().div((share * both)[present]).sum())
        for x, share in ((first, a), (second, b))
    )
    return _deviation(statistic, int(present.sum()) - 1)


def _deviation(statistic: float, freedom: int) -> float:
    assert freedom > 5
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


def count_pairs(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often each pair of first two tokens came, (vocab_size**2,)."""
    return torch.bincount(tokens[:, 0] * vocab_size + tokens[:, 1], minlength=vocab_size**2)
