"""How much memory there is, and how much of it a run had at its peak."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

_GROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int | None:
    """What can still be allocated on a device; None where that is not known.

    On a CPU: what the system says is available, or what its control group has left, if less.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [value for value in (_status("/proc/meminfo", "MemAvailable"), _group_left()) if value]
    return min(found, default=None)


def _group_left() -> int | None:
    """Of this control group (version 2), its page cache counted as free; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        limit = (_GROUP / "memory.max").read_text().strip()
        used = int((_GROUP / "memory.current").read_text())
        lines = (_GROUP / "memory.stat").read_text().splitlines()
        files = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        return max(int(limit) - used + files, 0)
    return None


def _status(path: str, name: str) -> int | None:
    """A line "name:  123 kB" of a file of Linux, in bytes; None where there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def format_bytes(count: float) -> str:
    """In the unit that suits it: "980 KiB", "1.25 GiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count:.0f} B"


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all memory that tensors lie in, each storage once: views and tied weights are free."""
    found = {
        (storage.data_ptr(), tensor.device): storage.nbytes()
        for tensor in tensors
        if (storage := tensor.untyped_storage()).nbytes()
    }
    return sum(found.values())


class PeakMemory:
    """A context manager around a run.

    Attributes:
        peak: bytes, after the block: torch's CUDA allocator's, or the process's on a CPU.
        source: "allocated", "RSS", or "RSS since start" where the system cannot forget an earlier
            peak.
        before: bytes when the block was entered; on a CPU of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak = self.before = 0
        self.source = "allocated" if device.type == "cuda" else "RSS"

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return self
        try:
            # Linux: the peak of the resident set starts anew from what it is now (proc(5)).
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.source = "RSS since start"
        self.before = _status("/proc/self/status", "VmRSS") or 0
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self.peak = _status("/proc/self/status", "VmHWM") or _max_rss()


def _max_rss() -> int:
    import resource
    import sys

    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else value * 1024
