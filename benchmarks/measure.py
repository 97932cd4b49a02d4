"""From a case and a provider to a row: check, time, and set beside what the hardware can do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.accuracy import Oracle, describe
from benchmarks.cases import Case, Inputs
from benchmarks.decode_cases import DecodeCase
from benchmarks.gradients import GradientOracle
from benchmarks.parity import describe_error
from benchmarks.pool import device_works
from benchmarks.providers import Provider
from benchmarks.sampling_cases import SamplingCase
from benchmarks.timing import Timer, Timing, TwoTimers

Row = dict[str, Any]
AnyCase = Case | DecodeCase | SamplingCase
FLOOR = "floor"  # the "role" of a provider that does less than the others: a bound, no peer


class DeviceLost(RuntimeError):
    """The CUDA context is broken; nothing more can be measured in this process.

    Attributes:
        row: the row that was being measured, with its error.
    """

    def __init__(self, row: Row) -> None:
        super().__init__(f"the CUDA context was lost: {row['error']}")
        self.row = row


def timing_fields(timing: Timing) -> Row:
    """A timing as fields of a row."""
    return {
        "ms": timing.median_ms,
        "ms_p20": timing.p20_ms,
        "ms_p80": timing.p80_ms,
        "repetitions": timing.repetitions,
        "method": timing.method,
    }


def speed_fields(case: AnyCase, ms: float, ceilings: dict[str, float]) -> Row:
    """TFLOP/s, GB/s, and the percentage of the ceiling that binds; of the copy for decoding steps
    and draws.

    The floor is the larger of FLOPs over the matmul rate and bytes over the copy rate, both
    measured in the same run (Williams et al., "Roofline", 2009).
    """
    row: Row = {"tflops": case.flops / ms / 1e9} if case.flops else {}
    row["gb_per_s"] = case.bytes / ms / 1e6
    if ceilings:
        compute_ms = case.flops / ceilings["matmul_tflops"] / 1e9
        memory_ms = case.bytes / ceilings["copy_gb_per_s"] / 1e6
        row["floor_ms"] = max(compute_ms, memory_ms)
        row["bound"] = "compute" if compute_ms >= memory_ms else "memory"
        row["percent_of_ceiling"] = 100 * row["floor_ms"] / ms
        if case.part in ("decode", "sampling"):
            row["percent_of_copy"] = 100 * memory_ms / ms
    return row


class Check(Protocol):
    """What is right for a case."""

    def check(self, provider: Provider, run: Callable[[], Any]) -> Row:
        """Checks what a provider's function gives; returns what a row keeps of it."""


class Checker:
    """What is right for a case, computed once for all providers.

    Args:
        inputs: of the case.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._oracle = _make_oracle(inputs)

    @functools.cached_property
    def _without_dropout(self) -> tuple[Inputs, Oracle | GradientOracle]:
        kwargs = {"causal": self._inputs.case.causal}
        case = replace(self._inputs.case, feature="plain")
        inputs = replace(self._inputs, case=case, kwargs=kwargs)
        return inputs, _make_oracle(inputs)

    def check(self, provider: Provider, run: Callable[[], Any]) -> Row:
        """Checks what a provider's function gives; returns what a row keeps of it.

        Which weights a peer drops is not known, so it is checked without dropout.

        Raises:
            WrongResult: the result is wrong.
        """
        if not self._inputs.case.dropout_p or provider.is_ours:
            return dict(describe(self._oracle.check(run())))
        inputs, oracle = self._without_dropout
        run = with_gradients(provider.prepare(inputs), inputs)
        return {**dict(describe(oracle.check(run()))), "checked": "without dropout"}


def _make_oracle(inputs: Inputs) -> Oracle | GradientOracle:
    return Oracle(inputs) if inputs.case.part == "forward" else GradientOracle(inputs)


def with_gradients(run: Callable[[], Any], inputs: Any) -> Callable[[], Any]:
    """What is timed: `run` itself or, in training, its output and the gradients of the leaves."""
    if inputs.case.part != "training":
        return run
    names = ["out", *(f"d{name}" for name in inputs.leaves)]
    leaves = list(inputs.leaves.values())

    def run_and_differentiate() -> dict[str, Tensor]:
        out = run()
        gradients = torch.autograd.grad(out, leaves, inputs.dout)
        return dict(zip(names, (out.detach(), *gradients), strict=True))

    return run_and_differentiate


def measure(
    head: Row,
    provider: Provider,
    inputs: list[Any],
    checker: Check,
    timer: Timer,
    ceilings: dict[str, float],
) -> Row:
    """`head` as a whole row. A provider that raises, or that is wrong, gets no time.

    Raises:
        DeviceLost: the provider took the CUDA context down.
    """
    case = inputs[0].case
    row = {**head, **who_and_what(provider, case)}
    if reason := provider.reason_to_skip(case):
        return {**row, "skipped": reason}
    return guarded(row, lambda: _check_and_time(provider, inputs, checker, timer, ceilings))


def who_and_what(provider: Provider, case: AnyCase) -> Row:
    """The fields that every row has."""
    version = provider.version or None
    return {"provider": provider.name, "version": version, "case": case.to_dict()}


def _check_and_time(
    provider: Provider,
    inputs: list[Any],
    checker: Check,
    timer: Timer,
    ceilings: dict[str, float],
) -> Row:
    case = inputs[0].case
    forward = [provider.prepare(own) for own in inputs]
    runs = [with_gradients(run, own) for run, own in zip(forward, inputs, strict=True)]
    row = checker.check(provider, runs[0]) | provider.note(inputs[0])
    timing = timer(runs)
    row |= {**timing_fields(timing), **speed_fields(case, timing.median_ms, ceilings)}
    if case.part == "training":
        row |= _backward_fields(case, timing, timer(forward))
    if isinstance(timer, TwoTimers):
        events = timer.events(runs)
        row |= {"events_ms": events.median_ms, "events_method": events.method}
    return row


def _backward_fields(case: Case, both: Timing, forward: Timing) -> Row:
    """Backward alone: what forward, which saves for it, leaves of the whole."""
    ms = both.median_ms - forward.median_ms
    row: Row = {"forward_ms": forward.median_ms, "backward_ms": ms}
    row["forward_method"] = forward.method
    if ms > 0:
        flops = case.flops - replace(case, part="forward").flops
        row["backward_tflops"] = flops / ms / 1e9
    return row


def guarded(row: Row, work: Callable[[], Row]) -> Row:
    """`row` with the fields of `work()`, or with the error that it raised.

    Raises:
        DeviceLost: the CUDA context did not survive it.
    """
    try:
        return {**row, **work()}
    except Exception as error:
        row = {**row, "error": describe_error(error)}
        if not device_works():
            raise DeviceLost(row) from error
        if isinstance(error, torch.cuda.OutOfMemoryError):
            torch.cuda.empty_cache()
        return row


def rank(rows: Iterable[Row]) -> None:
    """Adds to each timed row of one case how many times faster it is than the best peer.

    Where a provider is the floor, also how many times longer than that it takes.
    """
    timed = [row for row in rows if "ms" in row]
    floors = [row["ms"] for row in timed if row.get("role") == FLOOR]
    timed = [row for row in timed if row.get("role") != FLOOR]
    peers = [row["ms"] for row in timed if not row["provider"].startswith("fastattn")]
    for row in timed if floors else []:
        row["ratio_to_floor"] = row["ms"] / min(floors)
    for row in timed if peers else []:
        row["ratio_to_best_peer"] = min(peers) / row["ms"]


def measure_ceilings(
    device: torch.device, timer: Timer, copy_bytes: int, matmul_size: int
) -> tuple[dict[str, float], list[Row]]:
    """The copy and the bf16 matmul rate of this device now: {"copy_gb_per_s", "matmul_tflops"}."""
    if device.type == "cuda":
        copy_bytes = min(copy_bytes, torch.cuda.mem_get_info(device)[0] // 4)
    moved, copy = _time_copy(device, timer, copy_bytes)
    generator = torch.Generator(device).manual_seed(0)
    shape = (matmul_size, matmul_size)
    left, right = (
        torch.randn(shape, generator=generator, device=device).to(torch.bfloat16) for _ in range(2)
    )
    out = torch.empty_like(left)
    matmul = timer([lambda: torch.mm(left, right, out=out)])
    ceilings = {
        "copy_gb_per_s": moved / copy.median_ms / 1e6,
        "matmul_tflops": 2.0 * matmul_size**3 / matmul.median_ms / 1e9,
    }
    rows: list[Row] = [
        {"provider": f"copy of {moved / 2 / 2**20:.0f} MiB", "gb_per_s": ceilings["copy_gb_per_s"]},
        {"provider": f"bf16 matmul of {matmul_size}", "tflops": ceilings["matmul_tflops"]},
    ]
    for row, timing in zip(rows, (copy, matmul), strict=True):
        row |= timing_fields(timing)
    return ceilings, rows


def _time_copy(device: torch.device, timer: Timer, size: int) -> tuple[float, Timing]:
    """Bytes read and written by a copy of `size` bytes, and its time."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    timing = timer([lambda: target.copy_(source)])
    return 2.0 * source.numel() * 4, timing
