"""A progress bar by rich, for whom a terminal shows it."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastattn.generation.rows import Rows


class Progress:
    """Steps of decoding as a bar on stderr; nothing where that is no terminal.

    Args:
        wanted: whether to show one.
        total: tokens that a row gets at most.

    Raises:
        ImportError: rich is not installed.
    """

    def __init__(self, wanted: bool, total: int) -> None:
        self._bar: Any = None
        if not wanted:
            return
        try:
            import rich.console
            import rich.progress
        except ImportError as error:
            raise ImportError("progress=True needs the package rich: pip install rich") from error
        if sys.stderr.isatty():
            console = rich.console.Console(stderr=True)
            self._bar = rich.progress.Progress(
                "{task.description}",
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("tokens a row", total=total)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, rows: Rows) -> None:
        """Shows how many tokens the longest row has."""
        if self._bar is not None:
            self._bar.update(self._task, completed=int(rows.new_tokens().max()))

    def show_count(self, count: int) -> None:
        """The same where the number is known."""
        if self._bar is not None:
            self._bar.update(self._task, completed=count)
