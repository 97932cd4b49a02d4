"""Where the time of a pass goes, by torch.profiler; what it allocates; and its trace."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile, record_function

from fastattn.profiling.results import OUTSIDE, REST, Share, Shares

LISTED = 12
"""Rows of a table of operators or kernels; the rest is summed up."""

Pass = Callable[[], object]


def _profiler(device: torch.device, memory: bool = False) -> Any:
    # Kineto tells on stdout when it starts and stops, which nobody asked for.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities, profile_memory=memory, acc_events=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_shares(phase: str, run: Pass, passes: int, device: torch.device) -> tuple[Shares, int]:
    """Profiles `passes` calls of `run`.

    Returns:
        The shares of a pass, and the largest number of bytes that torch's allocator held at once
        beyond what it held before; 0 on CUDA, which counts that exactly and without a profiler.
    """
    on_cpu = device.type == "cpu"
    with _profiler(device, memory=on_cpu) as found:
        began = time.perf_counter()
        for _ in range(passes):
            run()
        _wait(device)
        wall_ms = (time.perf_counter() - began) * 1e3
    events = found.events()
    operators = top_operators(events, device)
    whole = wall_ms if on_cpu else max(_device_ms(events), 1e-9)
    shares = Shares(
        phase,
        wall_ms / passes,
        _shares(operators, whole, passes),
        _shares(leaf_kernels(events, device), whole, passes),
    )
    return shares, _peak_bytes(found) if on_cpu else 0


Totals = dict[str, tuple[int, float]]
"""Calls and milliseconds by name."""


def top_operators(events: Iterable[Any], device: torch.device) -> Totals:
    """Operators that no other operator called, with all that they did."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in events:
        if event.device_type != DeviceType.CPU or event.cpu_parent is not None:
            continue
        if event.name == "[memory]" or event.name.startswith(("cuda", "Profiler")):
            continue
        time_us = event.cpu_time_total if device.type == "cpu" else event.device_time_total
        entry = totals[event.name]
        entry[0] += 1
        entry[1] += time_us / 1e3
    return {name: (int(calls), ms) for name, (calls, ms) in totals.items()}


def leaf_kernels(events: Iterable[Any], device: torch.device) -> Totals:
    """On CUDA what ran on the device; on a CPU each operator's own time, without that of others."""
    wanted = DeviceType.CPU if device.type == "cpu" else DeviceType.CUDA
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in events:
        if event.device_type != wanted or event.name == "[memory]":
            continue
        own = event.self_cpu_time_total if device.type == "cpu" else event.device_time_total
        entry = totals[event.name]
        entry[0] += 1
        entry[1] += own / 1e3
    return {name: (int(calls), ms) for name, (calls, ms) in totals.items()}


def _device_ms(events: Iterable[Any]) -> float:
    return sum(e.device_time_total for e in events if e.device_type == DeviceType.CUDA) / 1e3


def _shares(totals: Totals, whole_ms: float, passes: int) -> tuple[Share, ...]:
    """Of a pass, the largest first; the rest, and what belongs to none, in rows of their own."""
    ordered = sorted(totals.items(), key=lambda item: -item[1][1])
    rows = [(name, calls, ms) for name, (calls, ms) in ordered[:LISTED] if ms > 0]
    rest = ordered[LISTED:]
    if rest:
        rows.append((REST, sum(calls for _, (calls, _) in rest), sum(ms for _, (_, ms) in rest)))
    left = whole_ms - sum(ms for _, _, ms in rows)
    if left > 0:
        rows.append((OUTSIDE, 0, left))
    return tuple(
        Share(name, round(calls / passes), ms / passes, 100 * ms / whole_ms)
        for name, calls, ms in rows
    )


def _peak_bytes(found: Any) -> int:
    """From the allocator's events in the trace: the largest sum of what is not freed yet.

    What was allocated before the profiler started, and is freed within, is not in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    return peak_of(trace["traceEvents"])


def peak_of(events: Iterable[dict[str, Any]]) -> int:
    """The largest sum of bytes held at once, by the "[memory]" events of a trace."""
    memory = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    live: dict[int, int] = {}
    for event in sorted(memory, key=lambda one: one["ts"]):
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        if size > 0:
            live[address] = size
            held += size
        else:
            held -= live.pop(address, 0)
        peak = max(peak, held)
    return peak


def write_trace(path: Path, passes: dict[str, Pass], device: torch.device) -> None:
    """Writes a Chrome trace (also Perfetto's) of some passes, each under its name."""
    with _profiler(device) as found:
        for name, run in passes.items():
            with record_function(name):
                run()
                _wait(device)
    found.export_chrome_trace(str(path))
