"""What the stages of a run share: checks in workers, and a case measured by its providers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.cases import Case, make_inputs
from benchmarks.decode_accuracy import DecodeChecker
from benchmarks.decode_cases import DecodeCase, make_decode_inputs
from benchmarks.measure import AnyCase, Check, Checker, Row, measure, rank
from benchmarks.parity import (
    ConfigCheck,
    FeatureCheck,
    GradientCheck,
    OwnCheck,
    TileCheck,
    describe_error,
    run_check,
)
from benchmarks.plan import Plan
from benchmarks.pool import PoolUnavailable, device_works, run_here, run_tasks
from benchmarks.progress import Progress
from benchmarks.providers import Provider
from benchmarks.report import first_line, show_row
from benchmarks.results import Results
from benchmarks.sampling_accuracy import SamplingChecker
from benchmarks.sampling_cases import SamplingCase, make_sampling_inputs
from benchmarks.timing import Timer, input_sets

_CHECK_SHARE = 0.6  # of a sweep's time may go to compiling and checking what it times
_MEMORY_SHARE = 0.8  # of the free memory may go to the inputs of a case


@dataclass
class Bench:
    """All that a stage needs.

    Attributes:
        timer: of calls on the device; `host_timer` of the host's share.
        decode_timer, sampling_timer, sweep_timer: of decoding steps, of draws, and of the configs
            of both, which are many; `timer` where there is none.
        providers, decode_providers, sampling_providers: who is measured.
    """

    plan: Plan
    device: torch.device
    chip: str
    timer: Timer
    host_timer: Timer
    providers: Sequence[Provider]
    results: Results
    progress: Progress
    decode_timer: Timer | None = None
    sampling_timer: Timer | None = None
    sweep_timer: Timer | None = None
    decode_providers: Sequence[Provider] = ()
    sampling_providers: Sequence[Provider] = ()
    deadline: float = 0.0
    not_reached: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def ceilings(self) -> dict[str, float]:
        """As measured in this run; empty before that."""
        return self.results.document["ceilings"]

    def providers_of(self, stage: str) -> Sequence[Provider]:
        """Who is measured in a stage."""
        own = {"decode": self.decode_providers, "sampling": self.sampling_providers}
        return own.get(stage, self.providers)

    def timer_of(self, case: AnyCase) -> Timer:
        """What times a case, unless its stage says otherwise."""
        if isinstance(case, DecodeCase):
            return self.decode_timer or self.timer
        if isinstance(case, SamplingCase):
            return self.sampling_timer or self.timer
        return self.timer

    def is_late(self, left: int = 0) -> bool:
        """Whether the stage's time is up; `left` rows are then noted as not reached."""
        late = time.monotonic() >= self.deadline
        if late:
            self.not_reached += left
        return late


def run_checks(
    bench: Bench, stage: str, tasks: Sequence[Any], on_row: Callable[[Any, Row], None]
) -> None:
    """Runs checks in worker processes, or here where there are none."""
    check = functools.partial(run_check, device=str(bench.device))
    seen = set()

    def note(task: Any, result: Row) -> None:
        seen.add(task)
        row = {
            "stage": stage,
            "check": _kind(task),
            "name": str(task),
            "dtype": task.dtype,
            "passed": "error" not in result,
            **result,
        }
        bench.results.add(row)
        verdict = "ok" if row["passed"] else f"FAILED: {first_line(result['error'])}"
        bench.progress.row(f"{len(seen)}/{len(tasks)} {task}: {verdict}", row["passed"])
        on_row(task, row)

    if bench.plan.workers:
        try:
            bench.not_reached += run_tasks(
                tasks, check, bench.deadline, note, workers=bench.plan.workers
            )
            return
        except PoolUnavailable as error:
            bench.progress.line(f"checking in this process, one after the other: {error}")
    rest = [task for task in tasks if task not in seen]
    bench.not_reached += run_here(rest, check, bench.deadline, note)


def _kind(task: FeatureCheck | TileCheck | OwnCheck) -> str:
    if isinstance(task, FeatureCheck):
        return "feature"
    if isinstance(task, ConfigCheck):
        return "tile"
    return "backward tiles" if isinstance(task, GradientCheck) else task.kind


def measure_cases(
    bench: Bench,
    stage: str,
    cases: Sequence[AnyCase],
    after_case: Callable[[], None] = lambda: None,
) -> None:
    """Each case by each provider. Absent providers are listed in the file's head, not in rows."""
    present: list[tuple[Provider, Row]] = [
        (provider, {}) for provider in bench.providers_of(stage) if not provider.absent
    ]
    for index, case in enumerate(cases):
        if bench.is_late(len(present) * (len(cases) - index)):
            return
        rows = measure_case(bench, {"stage": stage}, case, present)
        rank(rows)
        after_case()
        bench.results.save()
        for row in rows:
            if "error" in row and row["provider"].startswith("fastattn"):
                bench.failures.append(f"{stage}, {case}: {row['error']}")


def measure_case(
    bench: Bench,
    head: Row,
    case: AnyCase,
    providers: Sequence[tuple[Provider, Row]],
    timer: Timer | None = None,
) -> list[Row]:
    """Rows of one case, as many as there is time for; each provider brings fields of its own."""
    timer = timer or bench.timer_of(case)
    try:
        inputs, checker = _prepare(bench, case, timer)
    except Exception as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            torch.cuda.empty_cache()
        row = {**head, "provider": "inputs", "case": case.to_dict()}
        key = "skipped" if isinstance(error, TooLarge) else "error"
        bench.progress.line(show_row(bench.results.add({**row, key: describe_error(error)})))
        if not device_works():
            raise
        bench.not_reached += 0 if key == "skipped" else len(providers)
        return []
    rows: list[Row] = []
    for index, (provider, own) in enumerate(providers):
        if bench.is_late(len(providers) - index):
            break
        row = measure({**head, **own}, provider, inputs, checker, timer, bench.ceilings)
        rows.append(bench.results.add(row))
        bench.progress.line(show_row(rows[-1]))
    return rows


class TooLarge(Exception):
    """A case whose inputs do not fit into the memory that is free."""


def _prepare(bench: Bench, case: AnyCase, timer: Timer) -> tuple[list[Any], Check]:
    """A case's inputs, as many sets as are to be rotated among, and its check.

    Raises:
        TooLarge: a step of decoding, or its logits, do not fit.
    """
    sets = input_sets(case.bytes, getattr(timer, "cache_bytes", 0))
    if isinstance(case, Case):
        inputs = [make_inputs(case, bench.device, seed) for seed in range(sets)]
        return inputs, Checker(inputs[0])
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()  # what other shapes left does not serve for these
        needed, free = case.memory_bytes * sets, torch.cuda.mem_get_info(bench.device)[0]
        if needed > _MEMORY_SHARE * free:
            raise TooLarge(f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
    if isinstance(case, SamplingCase):
        draws = [make_sampling_inputs(case, bench.device, seed) for seed in range(sets)]
        return draws, SamplingChecker(draws[0])
    steps = [make_decode_inputs(case, bench.device, seed) for seed in range(sets)]
    return steps, DecodeChecker(steps[0])


def check_first(bench: Bench, stage: str, checks: Sequence[Any]) -> dict[Any, str]:
    """Runs a sweep's checks in a share of its time; returns the errors of those that failed.

    What was not reached is compiled when it is timed, and checked there anyway.
    """
    wrong: dict[Any, str] = {}

    def note(task: Any, row: Row) -> None:
        if not row["passed"]:
            wrong[task] = row["error"]

    end, now = bench.deadline, time.monotonic()
    bench.deadline = now + _CHECK_SHARE * (end - now)
    run_checks(bench, stage, checks, note)
    bench.deadline, bench.not_reached = end, 0
    return wrong
