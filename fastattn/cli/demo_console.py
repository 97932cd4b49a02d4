"""What the parts of the demo print with, and run kernels in."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def title(text: str) -> None:
    """A rule with a heading."""
    console.print()
    console.rule(f"[bold]{text}", align="left")


def verdict(passed: bool) -> str:
    """ "passed" or "FAILED", in color."""
    return "[green]passed[/]" if passed else "[bold red]FAILED[/]"


def shorten(text: str, width: int) -> str:
    """`text`, cut to `width` characters with an ellipsis."""
    return text if len(text) <= width else text[: width - 1].rstrip(" ,") + "…"


def progress() -> Progress:
    """A progress bar on stderr, which vanishes when it is done; nothing where that is a file."""
    stderr = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    )


def working(text: str) -> Any:
    """A spinner on stderr, as a context manager."""
    return Console(stderr=True).status(text)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For the interpreter on a CPU, whose tiles are too small to share out between threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
