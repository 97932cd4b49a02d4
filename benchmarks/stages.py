"""The stages of a run, each within its share of the time, and each row on disk when it is there."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from benchmarks import decode_sweep as decode_configs
from benchmarks import sampling_sweep as sampling_configs
from benchmarks.accuracy import Oracle
from benchmarks.bench import Bench as Bench
from benchmarks.bench import check_first, measure_case, measure_cases, run_checks
from benchmarks.cases import make_inputs
from benchmarks.measure import (
    DeviceLost,
    Row,
    guarded,
    measure_ceilings,
    rank,
    timing_fields,
    who_and_what,
)
from benchmarks.parity import describe_error
from benchmarks.plan import stage_seconds
from benchmarks.pool import device_works
from benchmarks.providers import fastattn_provider
from benchmarks.report import first_line, show_row
from benchmarks.sweep import best_tiles, candidate_checks, candidates, check_of, tile_provider
from benchmarks.targets import evaluate, evaluate_decoding, evaluate_sampling
from benchmarks.timing import Run


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


def sampling(bench: Bench) -> None:
    """Draws of a token a row, by graph replay."""

    def note() -> None:
        found = evaluate_sampling(bench.results.rows)
        bench.results.document["summary"]["sampling_targets"] = found

    note()
    measure_cases(bench, "sampling", bench.plan.sampling, note)


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


def sweep(bench: Bench) -> None:
    """Each tile on each shape: checked in a worker, checked again on the shape, then timed."""
    cases = bench.plan.sweep
    wrong = check_first(bench, "sweep", candidate_checks(bench.chip, cases))
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


def _sweep_configs(bench: Bench, configs: ModuleType, cases: Sequence[Any], summary: str) -> None:
    """Each config on each case: checked in a worker, checked again on the case, then timed.

    Args:
        configs: `decode_sweep` or `sampling_sweep`.
        summary: the key of the summary that holds the best of them.
    """
    swept = {case: configs.candidates(case, bench.device) for case in cases}
    checks = [
        check
        for case in cases
        for config in swept[case]
        for check in configs.checks_of(case, config)
    ]
    wrong = check_first(bench, configs.STAGE, list(dict.fromkeys(checks)))
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
        bench.results.document["summary"][summary] = configs.best_configs(bench.results.rows)
        bench.results.save()


def decode_sweep(bench: Bench) -> None:
    """Each config on each decoding step, then the best tile with the best splits together."""
    _sweep_configs(bench, decode_configs, bench.plan.decode_sweep, "best_configs")


def sampling_sweep(bench: Bench) -> None:
    """Each config on each draw."""
    cases = bench.plan.sampling_sweep
    _sweep_configs(bench, sampling_configs, cases, "best_sampling_configs")


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
    "sampling": sampling,
    "overhead": overhead,
    "features": features,
    "sweep": sweep,
    decode_configs.STAGE: decode_sweep,
    sampling_configs.STAGE: sampling_sweep,
}
