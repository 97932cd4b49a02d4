"""What may not come next, or must: n-grams, bad words, lengths, forced and suppressed tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.generation.plan import Plan
from fastattn.generation.rows import Rows
from fastattn.sampling import ban_repeated_ngrams_


class Bans:
    """Changes scores in place before a token is chosen: -inf for what may not come.

    What Hugging Face's processors of the same names do, in an order of which only this matters:
    what is forced comes last. Nothing here waits for the device.
    """

    def __init__(self, plan: Plan) -> None:
        config, device = plan.config, plan.device
        self._ngram = config.no_repeat_ngram
        self._min_new, self._max_new = plan.min_new if plan.ends else 0, plan.max_new
        self._ends = _tensor(plan.ends, device)
        single = {word[0] for word in config.bad_words if len(word) == 1}
        self._never = _tensor(sorted({*single, *config.suppress_tokens}), device)
        self._at_first = _tensor(sorted(set(config.begin_suppress_tokens)), device)
        self._first, self._final = config.forced_bos, config.forced_eos
        self._begin = 0 if config.forced_bos is None else 1
        by_length: dict[int, list[list[int]]] = {}
        for word in config.bad_words:
            if len(word) > 1:
                by_length.setdefault(len(word), []).append(list(word))
        # Words of one length are compared with the rows' ends at once.
        self._words = [torch.tensor(words, device=device) for words in by_length.values()]

    @property
    def always(self) -> bool:
        """Whether something may be changed at every step."""
        return bool(self._ngram or self._words or len(self._never))

    def changes(self, least: int, most: int) -> bool:
        """Whether `apply_` does anything.

        Args:
            least, most: numbers of new tokens that the rows have.
        """
        return self.always or self.by_length(least, most)

    def apply_(self, scores: Tensor, rows: Rows, least: int, most: int) -> Tensor:
        """Changes scores (rows, vocab_size) of any floating dtype, and returns them.

        Args:
            rows: what there is already.
            least, most: as for `changes`.
        """
        if len(self._never):
            scores.index_fill_(1, self._never, -math.inf)
        if self._ngram:
            ban_repeated_ngrams_(scores, rows.buffer, self._ngram, mask=rows.real())
        for words in self._words:
            self._ban_words(scores, rows, words)
        if self.by_length(least, most):
            self._apply_by_length(scores, rows.new_tokens()[:, None], least, most)
        return scores

    def _ban_words(self, scores: Tensor, rows: Rows, words: Tensor) -> None:
        before, enough = rows.last(words.shape[1] - 1)
        hit = (before[:, None] == words[:, :-1]).all(-1) & enough[:, None]
        # The minimum with +inf changes nothing, whichever words end alike.
        ceiling = torch.where(hit, -math.inf, math.inf).to(scores.dtype)
        scores.scatter_reduce_(1, words[:, -1].expand(len(scores), -1), ceiling, "amin")

    def by_length(self, least: int, most: int) -> bool:
        """Whether a ban depends on how many tokens there are, at these numbers."""
        return (
            least < self._min_new
            or (self._first is not None and least == 0)
            or (len(self._at_first) > 0 and least <= self._begin)
            or (self._final is not None and most >= self._max_new - 1)
        )

    def _apply_by_length(self, scores: Tensor, count: Tensor, least: int, most: int) -> None:
        if least < self._min_new:
            _ban_where(scores, self._ends, count < self._min_new)
        if len(self._at_first) and least <= self._begin:
            _ban_where(scores, self._at_first, count == self._begin)
        if self._first is not None and least == 0:
            _force_where(scores, self._first, count == 0)
        if self._final is not None and most >= self._max_new - 1:
            _force_where(scores, self._final, count == self._max_new - 1)


def _ban_where(scores: Tensor, tokens: Tensor, where: Tensor) -> None:
    scores[:, tokens] = scores[:, tokens].masked_fill(where, -math.inf)


def _force_where(scores: Tensor, token: int, where: Tensor) -> None:
    scores.masked_fill_(where, -math.inf)
    scores[:, token] = scores[:, token].masked_fill(where[:, 0], 0.0)


def _tensor(tokens: list[int] | tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=device)
