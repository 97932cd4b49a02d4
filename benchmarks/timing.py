"""Timers: CUDA events with a cold L2, graph replay for short kernels, and the host's clock.

A timer is called with `runs`, functions that do the same work on different inputs, and returns a
`Timing`. Everything else takes the timer as an argument, so the flow can be tested without a GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median and the 20th and 80th percentiles.

    Attributes:
        repetitions: samples behind them.
        method: how a sample was taken.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    repetitions: int
    method: str


class Timer(Protocol):
    """Times one call of `runs`, which are equal work on different inputs."""

    def __call__(self, runs: Sequence[Run]) -> Timing: ...


def percentile(values: Sequence[float], fraction: float) -> float:
    """The value at a fraction of the sorted values, interpolated between neighbours."""
    if not values or not 0 <= fraction <= 1:
        raise ValueError(f"expected values and a fraction in 0..1, got {len(values)}, {fraction}")
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(samples_ms: Sequence[float], method: str) -> Timing:
    """Median and spread of samples."""
    median, p20, p80 = (percentile(samples_ms, fraction) for fraction in (0.5, 0.2, 0.8))
    return Timing(median, p20, p80, len(samples_ms), method)


def repetitions(estimate_ms: float, target_ms: float, least: int, most: int) -> int:
    """How often to repeat a call of about `estimate_ms` to fill `target_ms`."""
    return max(least, min(most, math.ceil(target_ms / max(estimate_ms, 1e-6))))


def input_sets(case_bytes: float, cache_bytes: float, most: int = 32) -> int:
    """How many sets of inputs to rotate among, so that together they pass twice the cache."""
    return max(1, min(most, math.ceil(2 * cache_bytes / max(case_bytes, 1.0))))


class CudaTimer:
    """Times on the current CUDA device.

    With `method` "events" or "graph" as it says; "auto" chooses. Kernels of 50 µs and more are
    timed one by one between two events, after the L2 cache has been overwritten. Shorter ones, and
    calls whose host side takes longer than the kernel, are captured in a graph of many calls, whose
    replay is timed: else the gaps between launches would be measured too.
    """

    def __init__(
        self, *, method: str = "auto", target_ms: float = 60.0, least: int = 7, most: int = 100
    ) -> None:
        if method not in ("auto", "events", "graph"):
            raise ValueError(f'method must be "auto", "events" or "graph", got {method!r}')
        self.method, self.target_ms, self.least, self.most = method, target_ms, least, most
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.cache_bytes = int(getattr(properties, "L2_cache_size", 64 << 20))
        flush_bytes = max(4 * self.cache_bytes, 128 << 20)
        self._flush = torch.empty(flush_bytes // 4, dtype=torch.int32, device="cuda")

    def __call__(self, runs: Sequence[Run]) -> Timing:
        for run in runs:
            run()
        torch.cuda.synchronize()
        device_ms, host_ms = self._estimate(runs)
        is_short = device_ms < 0.05 or (device_ms < 1.0 and host_ms > 0.8 * device_ms)
        if self.method == "graph" or (self.method == "auto" and is_short):
            try:
                return self._by_graph(runs, device_ms)
            except RuntimeError as error:  # some peers cannot be captured
                torch.cuda.synchronize()
                timing = self._by_events(runs, device_ms)
                note = f"{timing.method} (no graph: {str(error).splitlines()[0][:80]})"
                return Timing(
                    timing.median_ms, timing.p20_ms, timing.p80_ms, timing.repetitions, note
                )
        return self._by_events(runs, device_ms)

    def _estimate(self, runs: Sequence[Run], calls: int = 3) -> tuple[float, float]:
        """Rough milliseconds of a call on the device, and those that the host is busy with it."""
        start, end = _event(), _event()
        began = time.perf_counter()
        start.record()
        for index in range(calls):
            runs[index % len(runs)]()
        end.record()
        host_ms = (time.perf_counter() - began) * 1e3
        torch.cuda.synchronize()
        return start.elapsed_time(end) / calls, host_ms / calls

    def _by_events(self, runs: Sequence[Run], estimate_ms: float) -> Timing:
        for index in range(repetitions(estimate_ms, self.target_ms / 4, 1, 20)):
            runs[index % len(runs)]()
        count = repetitions(estimate_ms, self.target_ms, self.least, self.most)
        pairs = [(_event(), _event()) for _ in range(count)]
        for index, (start, end) in enumerate(pairs):
            # The flush also gives the host the time to queue the call before the device is there.
            self._flush.zero_()
            start.record()
            runs[index % len(runs)]()
            end.record()
        torch.cuda.synchronize()
        return summarize([start.elapsed_time(end) for start, end in pairs], "events, cold L2")

    def _by_graph(self, runs: Sequence[Run], estimate_ms: float) -> Timing:
        fewest = 10 if estimate_ms < 1.0 else 1
        calls = len(runs) * math.ceil(repetitions(estimate_ms, 1.0, fewest, 64) / len(runs))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for run in runs:
                run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for index in range(calls):
                runs[index % len(runs)]()
        for _ in range(3):
            graph.replay()
        count = repetitions(estimate_ms * calls, self.target_ms, self.least, self.most)
        pairs = [(_event(), _event()) for _ in range(count)]
        for start, end in pairs:
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        method = f"graph of {calls} calls over {len(runs)} input sets"
        return summarize([start.elapsed_time(end) / calls for start, end in pairs], method)


@dataclass(frozen=True)
class TwoTimers:
    """One that replays graphs, whose time counts, and one that also sees the gaps of launches.

    Attributes:
        graph, events: the timers.
    """

    graph: Timer
    events: Timer

    @property
    def cache_bytes(self) -> float:
        """Of the cache that inputs are to exceed."""
        return getattr(self.graph, "cache_bytes", 0)

    def __call__(self, runs: Sequence[Run]) -> Timing:
        return self.graph(runs)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class HostTimer:
    """Times with the host's clock: on the CPU, or the host's share of a GPU call.

    Args:
        calls: calls in a sample.
        samples: how many samples; one more comes first, to warm up.
        synchronize: waits for the device before a sample, outside of the time.
    """

    cache_bytes = 0

    def __init__(
        self, calls: int = 20, samples: int = 15, synchronize: Callable[[], object] | None = None
    ) -> None:
        self.calls, self.samples = calls, samples
        self._synchronize = synchronize or (lambda: None)

    def __call__(self, runs: Sequence[Run]) -> Timing:
        samples = []
        for _ in range(self.samples + 1):
            self._synchronize()
            began = time.perf_counter()
            for index in range(self.calls):
                runs[index % len(runs)]()
            samples.append((time.perf_counter() - began) * 1e3 / self.calls)
        self._synchronize()
        return summarize(samples[1:], f"host clock, {self.calls} calls a sample")
