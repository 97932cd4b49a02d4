"""What a run says while it runs: elapsed and allowed seconds before every line."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Prints lines; of many alike, one every few seconds where the output is no terminal.

    Args:
        total_seconds: the run's budget.
        stream: where to; default standard output.
        every: seconds between lines of `row` that report success.
    """

    def __init__(
        self, total_seconds: float, stream: TextIO | None = None, every: float = 5.0
    ) -> None:
        self._total, self._stream, self._every = total_seconds, stream or sys.stdout, every
        self._began = self._said = time.monotonic()
        self._stage = ""
        self._open = False  # whether the last line may be written over

    def stage(self, name: str, seconds: float) -> None:
        """Announces a stage and its budget."""
        self._stage = name
        self.line(f"at most {seconds:.0f} s")

    def line(self, text: str) -> None:
        """Prints a line."""
        self._write(text, end="\n")

    def row(self, text: str, passed: bool) -> None:
        """A result among many: a failure stays on the screen, a success is written over."""
        if not passed:
            self.line(text)
        elif self._stream.isatty():
            self._write(text[:90], end="")
        elif time.monotonic() - self._said >= self._every:
            self.line(text)

    def _write(self, text: str, end: str) -> None:
        self._said = time.monotonic()
        elapsed = self._said - self._began
        clear = "\r\x1b[K" if self._open else ""
        head = f"[{elapsed:4.0f}/{self._total:.0f} s] {self._stage:<9}"
        print(f"{clear}{head} {text}", end=end, file=self._stream, flush=True)
        self._open = end == ""
