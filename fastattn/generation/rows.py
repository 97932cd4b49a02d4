"""The rows of a batch while they are decoded: tensors that never move, and no look at them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.generation.plan import Plan


class Rows:
    """Prompts and new tokens of all rows, and which of them have ended.

    Every prompt ends at column `width` of `buffer`, and its new tokens come behind. A row that has
    ended is written to no more: what is behind it is `pad`. All methods work in place and launch
    only, so that a CUDA graph may hold them.

    Attributes:
        buffer: int64 (rows, width + max_new + spare).
        starts, ends: int64 (rows,), where a row's prompt begins, and behind its last token.
        finished: bool (rows,).
        failed: bool (rows,), where there was no distribution to take a token from.
        tokens: int64 (rows, 1), what the model reads next.
    """

    def __init__(self, plan: Plan, spare: int = 1) -> None:
        """Args:
        spare: columns behind the last that a row may have, which are written to and not kept.
        """
        prompts = plan.prompts.aligned.repeat_interleave(plan.copies, 0)
        rows, self.width = prompts.shape
        self.pad = plan.pad
        self.buffer = prompts.new_full((rows, self.width + plan.max_new + spare), plan.pad)
        self.buffer[:, : self.width] = prompts
        self.starts = self.width - plan.prompts.lengths.repeat_interleave(plan.copies, 0)
        self.ends = torch.full_like(self.starts, self.width)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=prompts.device)
        self.failed = torch.zeros_like(self.finished)
        self.tokens = torch.full_like(prompts[:, :1], plan.pad)
        self._stops = torch.tensor(plan.ends, dtype=torch.int64, device=prompts.device)
        self._columns = torch.arange(self.buffer.shape[1], device=prompts.device)

    def take(self, drawn: Tensor) -> None:
        """Appends a token to each row that has not ended.

        Args:
            drawn: int64 (rows,); negative: there was nothing to draw from.
        """
        goes_on = ~self.finished
        self.failed |= (drawn < 0) & goes_on
        new = torch.where(goes_on, drawn.clamp(min=0), self.pad)[:, None]
        self.buffer.scatter_(1, self.ends[:, None], new)
        self.tokens.copy_(new)
        self.ends += goes_on
        if self._stops.numel():
            self.finished |= (new == self._stops).any(1)

    def extend(self, tokens: Tensor, counts: Tensor) -> None:
        """Appends the first `counts[b]` of tokens (rows, n) to row b, whatever these are."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        present = places < counts[:, None]
        # What is absent goes to the last column, which is spare.
        at = torch.where(present, self.ends[:, None] + places, self.buffer.shape[1] - 1)
        self.buffer.scatter_(1, at, tokens)
        self.ends += counts

    def is_stop(self, tokens: Tensor) -> Tensor:
        """Which tokens end a row, bool of the same shape."""
        return (tokens[..., None] == self._stops).any(-1)

    def last(self, n: int) -> tuple[Tensor, Tensor]:
        """The last n tokens of each row (rows, n), and whether it has so many (rows,)."""
        at = self.ends[:, None] - n + torch.arange(n, device=self.ends.device)
        return self.buffer.gather(1, at.clamp(min=0)), at[:, 0] >= self.starts

    def real(self) -> Tensor:
        """Which elements of `buffer` are tokens of their row, bool."""
        return (self._columns >= self.starts[:, None]) & (self._columns < self.ends[:, None])

    def new_tokens(self) -> Tensor:
        """How many tokens each row got, int64 (rows,)."""
        return self.ends - self.width

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row `index[b]` was."""
        for tensor in (self.buffer, self.starts, self.ends):
            tensor.copy_(tensor.index_select(0, index))

    def fork(self) -> Rows:
        """A copy whose text can go on without this one's."""
        other = object.__new__(Rows)
        other.__dict__.update(self.__dict__)
        for name in ("buffer", "ends", "finished", "failed", "tokens"):
            setattr(other, name, getattr(self, name).clone())
        return other
