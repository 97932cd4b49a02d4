"""The stages of a run, each within its share of the time, and each row on disk when it is there."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import decode_sweep as configs
from benchmarks.accuracy import Oracle
from benchmarks.cases import Case, make_inputs
from benchmarks.decode_accuracy import DecodeChecker
from benchmarks.decode_cases import DecodeCase, make_decode_inputs
from benchmarks.measure import (
    Checker,
    DeviceLost,
    Row,
    guarded,
    measure,
    measure_ceilings,
    rank,
    timing_fields,
    who_and_what,
)
from benchmarks.parity import (
    ConfigCheck,
    FeatureCheck,
    GradientCheck,
    OwnCheck,
    TileCheck,
    describe_error,
    run_check,
)
from benchmarks.plan import Plan, stage_seconds
from benchmarks.pool import PoolUnavailable, device_works, run_here, run_tasks
from benchmarks.progress import Progress
from benchmarks.providers import Provider, fastattn_provider
from benchmarks.report import first_line, show_row
from benchmarks.results import Results
from benchmarks.sweep import best_tiles, candidate_checks, candidates, check_of, tile_provider
from benchmarks.targets import evaluate, evaluate_decoding
from benchmarks.timing import Run, Timer, input_sets

_CHECK_SHARE = 0.6  # of a sweep's time may go to compiling and checking what it times
_MEMORY_SHARE = 0.8  # of the free memory may go to the inputs of a decoding step


@dataclass
class Bench:
    """All that a stage needs.

    Attributes:
        timer: of calls on the device; `host_timer` of the host's share.
        decode_timer, sweep_timer: of decoding steps, and of their configs, which are many; `timer`
            where there is none.
        providers, decode_providers: who is measured.
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
    sweep_timer: Timer | None = None
    decode_providers: Sequence[Provider] = ()
    deadline: float = 0.0
    not_reached: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def ceilings(self) -> dict[str, float]:
        """As measured in this run; empty before that."""
        return self.results.document["ceilings"]

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


def parity(bench: Bench) -> None:
    """Every feature in every dtype, and every config that dispatch may choose here."""

    def note(task: Any, row: Row) -> None:
        if not row["passed"]:
            bench.failures.append(f"{task}: {row['error']}")

    run_checks(bench, "parity", bench.plan.checks, note)


def ceilings(bench: Bench) -> None:
    """A large copy and a large matmul: what the percentages are of."""
    found, rows = measure_ceilings(
        bench.device, bench.timer, bench.plan.copy_bytes, bench.plan.matmul_size
    )
    bench.results.document["ceilings"] = found
    for row in rows:
        bench.progress.line(show_row(bench.results.add({"stage": "ceilings", **row})))


def forward(bench: Bench) -> None:
    """The forward matrix."""
    measure_cases(bench, "forward", bench.plan.forward)


def backward(bench: Bench) -> None:
    """Forward and backward together: the same matrix, and features in training."""

    def note() -> None:
        bench.results.document["summary"]["targets"] = evaluate(bench.results.rows)

    note()  # a run that is cut short says that nothing was measured
    measure_cases(bench, "backward", bench.plan.backward, note)


def features(bench: Bench) -> None:
    """Biases, padding, grouped heads, a small call."""
    measure_cases(bench, "features", bench.plan.features)


def decode(bench: Bench) -> None:
    """Steps of decoding, by graph replay and between events."""

    def note() -> None:
        found = evaluate_decoding(bench.results.rows)
        bench.results.document["summary"]["decode_targets"] = found

    note()
    measure_cases(bench, "decode", bench.plan.decode, note)


def measure_cases(
    bench: Bench,
    stage: str,
    cases: Sequence[Case | DecodeCase],
    after_case: Callable[[], None] = lambda: None,
) -> None:
    """Each case by each provider. Absent providers are listed in the file's head, not in rows."""
    providers = bench.decode_providers if stage == "decode" else bench.providers
    present: list[tuple[Provider, Row]] = [
        (provider, {}) for provider in providers if not provider.absent
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
    case: Case | DecodeCase,
    providers: Sequence[tuple[Provider, Row]],
    timer: Timer | None = None,
) -> list[Row]:
    """Rows of one case, as many as there is time for; each provider brings fields of its own."""
    if isinstance(case, DecodeCase):
        timer = timer or bench.decode_timer
    timer = timer or bench.timer
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


def _prepare(
    bench: Bench, case: Case | DecodeCase, timer: Timer
) -> tuple[list[Any], Checker | DecodeChecker]:
    """A case's inputs, as many sets as are to be rotated among, and its check.

    Raises:
        TooLarge: a decoding step does not fit.
    """
    sets = input_sets(case.bytes, getattr(timer, "cache_bytes", 0))
    if not isinstance(case, DecodeCase):
        inputs = [make_inputs(case, bench.device, seed) for seed in range(sets)]
        return inputs, Checker(inputs[0])
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()  # what other shapes left does not serve for these
        needed, free = case.memory_bytes * sets, torch.cuda.mem_get_info(bench.device)[0]
        if needed > _MEMORY_SHARE * free:
            raise TooLarge(f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
    steps = [make_decode_inputs(case, bench.device, seed) for seed in range(sets)]
    return steps, DecodeChecker(steps[0])


def overhead(bench: Bench) -> None:
    """The host's time for one call, on a shape whose kernel is shorter than that."""
    from torch.nn.functional import scaled_dot_product_attention

    case = bench.plan.overhead
    inputs = make_inputs(case, bench.device)
    oracle = Oracle(inputs)
    q, k, v = (tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))

    def sdpa() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=case.causal).transpose(1, 2)

    def check_and_time(run: Run) -> Row:
        oracle.check(run())
        return timing_fields(bench.host_timer([run]))

    tile = candidates(bench.chip, case)[0]
    runs: dict[str, Run] = {
        "fastattn.attention": fastattn_provider().prepare(inputs),
        "fastattn launcher": tile_provider(tile).prepare(inputs),
        "SDPA": sdpa,
    }
    rows = []
    for name, run in runs.items():
        row = {"stage": "overhead", "provider": name, "case": case.to_dict()}
        row = guarded(row, functools.partial(check_and_time, run))
        rows.append(bench.results.add(row))
        bench.progress.line(show_row(rows[-1]))
    rank(rows)
    bench.results.save()


def _check_first(bench: Bench, stage: str, checks: Sequence[Any]) -> dict[Any, str]:
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


def sweep(bench: Bench) -> None:
    """Each tile on each shape: checked in a worker, checked again on the shape, then timed."""
    cases = bench.plan.sweep
    wrong = _check_first(bench, "sweep", candidate_checks(bench.chip, cases))
    for index, case in enumerate(cases):
        if bench.is_late(sum(len(candidates(bench.chip, rest)) for rest in cases[index:])):
            return
        providers = []
        for place, tile in enumerate(candidates(bench.chip, case)):
            provider = tile_provider(tile, case.part)
            own = {"chip": bench.chip, "tile": tile, "current": place == 0}
            if error := wrong.get(check_of(bench.chip, case, tile)):
                row = {"stage": "sweep", **own, **who_and_what(provider, case), "error": error}
                bench.results.add(row)
            else:
                providers.append((provider, own))
        measure_case(bench, {"stage": "sweep"}, case, providers)
        found = best_tiles(row for row in bench.results.rows if "tile" in row)
        bench.results.document["summary"]["best_tiles"] = found
        bench.results.save()


def decode_sweep(bench: Bench) -> None:
    """Each config on each decoding step, then the best tile with the best splits together."""
    cases = bench.plan.decode_sweep
    swept = {case: configs.candidates(case, bench.device) for case in cases}
    checks = [
        check
        for case in cases
        for config in swept[case]
        for check in configs.checks_of(case, config)
    ]
    wrong = _check_first(bench, configs.STAGE, list(dict.fromkeys(checks)))
    head = {"stage": configs.STAGE, "chip": bench.chip}
    for index, case in enumerate(cases):
        if bench.is_late(sum(len(swept[rest]) for rest in cases[index:])):
            return
        providers = []
        for place, config in enumerate(swept[case]):
            provider, own = configs.config_provider(config), configs.config_fields(config)
            own["current"] = place == 0
            errors = [wrong[check] for check in configs.checks_of(case, config) if check in wrong]
            if errors:
                row = {**head, **own, **who_and_what(provider, case), "error": errors[0]}
                bench.results.add(row)
            else:
                providers.append((provider, own))
        rows = measure_case(bench, head, case, providers, bench.sweep_timer)
        if len(rows) == len(providers) and (joint := configs.joint_config(rows)):
            own = {**configs.config_fields(joint), "current": False}
            measure_case(
                bench, head, case, [(configs.config_provider(joint), own)], bench.sweep_timer
            )
        bench.results.document["summary"]["best_configs"] = configs.best_configs(bench.results.rows)
        bench.results.save()


def run_plan(bench: Bench) -> bool:
    """Runs all stages; returns whether all that was planned to be right was checked, and is.

    An error in a stage is noted, and the next stage runs; not so after the device is lost.

    Raises:
        KeyboardInterrupt: after the results so far were saved.
    """
    document, began = bench.results.document, time.monotonic()
    for stage in bench.plan.stages:
        now = time.monotonic()
        seconds = stage_seconds(stage, bench.plan.stages, bench.plan.total_seconds - (now - began))
        bench.deadline, bench.not_reached = now + seconds, 0
        bench.progress.stage(stage, seconds)
        noted: Row = {"status": "done", "budget_seconds": seconds}
        document["stages"][stage] = noted
        try:
            STAGES[stage](bench)
        except KeyboardInterrupt:
            noted["status"] = document["status"] = "interrupted"
            raise
        except Exception as error:
            noted |= {"status": "failed", "error": describe_error(error)}
            bench.failures.append(f"stage {stage}: {describe_error(error)}")
            bench.progress.line(f"stage {stage} failed: {first_line(describe_error(error))}")
            if isinstance(error, DeviceLost):
                bench.results.add(error.row)
            if not device_works():
                document["status"] = "device lost"
                break
        finally:
            noted |= {"seconds": time.monotonic() - now, "not_reached": bench.not_reached}
            if bench.not_reached and noted["status"] == "done":
                noted["status"] = "cut short"
            if stage == "parity" and bench.not_reached:
                bench.failures.append(f"{bench.not_reached} checks were not reached")
            document["summary"]["failures"] = bench.failures
            bench.results.save()
    if document["status"] == "running":
        document["status"] = "done"
    bench.results.save()
    return not bench.failures


STAGES: dict[str, Callable[[Bench], None]] = {
    "parity": parity,
    "ceilings": ceilings,
    "forward": forward,
    "backward": backward,
    "decode": decode,
    "overhead": overhead,
    "features": features,
    "sweep": sweep,
    configs.STAGE: decode_sweep,
}
