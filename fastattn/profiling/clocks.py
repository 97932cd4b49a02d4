"""Clocks that mark moments of a run: the host's on a CPU, CUDA's events on a GPU.

A clock is marked between passes and read when the run is over, so that no pass waits for a device
because it is timed.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks, and the milliseconds between them."""

    def mark(self) -> None:
        """Now: behind all that was launched so far."""
        ...

    def pause(self) -> None:
        """What follows, up to the next mark, does not count."""
        ...

    def intervals_ms(self) -> list[float]:
        """Between neighboring marks, without those that `pause` set apart. Waits for the device."""
        ...


class HostClock:
    """For a CPU, which has done its work when a call returns."""

    def __init__(self) -> None:
        self._marks: list[float | None] = []

    def mark(self) -> None:
        """Now."""
        self._marks.append(time.perf_counter() * 1e3)

    def pause(self) -> None:
        """Leaves out what follows."""
        self._marks.append(None)

    def intervals_ms(self) -> list[float]:
        """Between neighboring marks."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [
            after - before for before, after in pairs if before is not None and after is not None
        ]


class CudaClock:
    """For a GPU: an event a mark, on the current stream.

    An interval begins when the device gets to the first of its two events. Where it has nothing
    else to do that is when the host records it, so the interval holds the host's time as well, as a
    user sees it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []
        torch.cuda.synchronize(device)  # nothing from before is in the first interval

    def mark(self) -> None:
        """Records an event; does not wait."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def pause(self) -> None:
        """Leaves out what follows."""
        self._marks.append(None)

    def intervals_ms(self) -> list[float]:
        """Between neighboring marks; waits once for all."""
        torch.cuda.synchronize(self._device)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [
            before.elapsed_time(after)
            for before, after in pairs
            if before is not None and after is not None
        ]


def make_clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()
