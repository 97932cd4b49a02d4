"""The host's look at a batch: whether all rows have ended, stop strings, the streamer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.generation.plan import Plan
from fastattn.generation.progress import Progress
from fastattn.generation.rows import Rows

Decode = Callable[[list[int]], str]


class Watch:
    """Looks at the rows every few steps: the one place of the loop where the host waits."""

    def __init__(
        self, plan: Plan, rows: Rows, decode: Decode | None, streamer: Any, progress: Progress
    ) -> None:
        self._rows, self._streamer, self._progress = rows, streamer, progress
        self._strings = StopStrings(plan.config.stop_strings, decode)
        self._put: Callable[[Tensor], Any] | None = None
        if streamer is not None:
            self._put = getattr(streamer, "put", streamer)
        # Up to which new token each row was searched, and all rows were given to the streamer.
        self._searched = [0] * len(rows.buffer)
        self._given = 0
        if self._put is not None and self._put is not streamer:
            # As Hugging Face's streamers expect, which can leave the prompt out.
            self._put(plan.prompts.given.cpu())

    def look(self, all_given: bool = True) -> bool:
        """Whether all rows have ended.

        Args:
            all_given: rows go in step, so that the streamer gets what the longest has. Otherwise
                it gets what every row that goes on has.

        Raises:
            ValueError: a row had no distribution to take a token from.
        """
        rows = self._rows
        if not self._strings and self._put is None:
            done, failed = torch.stack([rows.finished.all(), rows.failed.any()]).tolist()
            self._refuse(failed)
            self._progress.show(rows)
            return bool(done)
        block = torch.cat([rows.ends[:, None], rows.finished[:, None], rows.buffer], 1).cpu()
        self._refuse(bool(rows.failed.any()))
        lengths = [end - rows.width for end in block[:, 0].tolist()]
        finished, tokens = block[:, 1].bool(), block[:, 2 + rows.width :].clone()
        if self._strings:
            self._cut(lengths, finished, tokens)
        if self._put is not None:
            self._stream(lengths, finished, tokens, all_given)
        self._progress.show(rows)
        return bool(finished.all())

    def end(self) -> None:
        """The last word to streamer and progress bar."""
        if hasattr(self._streamer, "end"):
            self._streamer.end()

    def _cut(self, lengths: list[int], finished: Tensor, tokens: Tensor) -> None:
        """Ends rows where a stop string first came, on the host and on the device."""
        changed = False
        for row, length in enumerate(lengths):
            ids = tokens[row, :length].tolist()
            found = self._strings.find(ids, self._searched[row] + 1)
            self._searched[row] = length
            if found is not None:
                lengths[row], finished[row], changed = found, True, True
                tokens[row, found:] = self._rows.pad
        if changed:
            rows, device = self._rows, self._rows.ends.device
            rows.buffer[:, rows.width :] = tokens.to(device)
            rows.ends.copy_(torch.tensor(lengths).to(device) + rows.width)
            rows.finished.copy_(finished.to(device))

    def _stream(
        self, lengths: list[int], finished: Tensor, tokens: Tensor, all_given: bool
    ) -> None:
        assert self._put is not None
        upto = max(lengths)
        if not all_given and not bool(finished.all()):
            upto = min(
                length
                for length, ended in zip(lengths, finished.tolist(), strict=True)
                if not ended
            )
        for column in range(self._given, upto):
            self._put(tokens[:, column])
        self._given = max(self._given, upto)

    @staticmethod
    def _refuse(failed: bool) -> None:
        if failed:
            raise ValueError(
                "logits must have a number above -inf and no NaN after penalties and bans, got a "
                "row of the model's without one: nothing is left that may come next"
            )


class StopStrings:
    """Where a text first contains one of some strings."""

    def __init__(self, strings: Sequence[str], decode: Decode | None) -> None:
        self._strings = tuple(strings)
        self._decode = decode

    def __bool__(self) -> bool:
        return bool(self._strings)

    def find(self, ids: list[int], first: int) -> int | None:
        """The least n >= first for which the text of ids[:n] contains a string, or None.

        Every n is tried, since tokenizers may change a text's end when more comes: so the result
        does not depend on how many tokens come at once.
        """
        for n in range(first, len(ids) + 1):
            if self.hit(ids[:n]):
                return n
        return None

    def hit(self, ids: list[int]) -> bool:
        """Whether the text contains a string."""
        if not self._strings:
            return False
        assert self._decode is not None  # checked with the settings
        text = self._decode(ids)
        return any(string in text for string in self._strings)
