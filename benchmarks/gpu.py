"""`make gpu`: parity and speed of the kernels on a CUDA device, in under nine minutes.

    PYTHONPATH=. python -m benchmarks.gpu [--quick] [--only sampling] [--stage NAME ...]
        [--budget-seconds S]

Stages, in order: parity (every feature and every config that can be chosen here, with gradients,
caches, graphs, draws), ceilings (copy and matmul), forward (against torch SDPA and installed
peers), backward (training: forward and backward, and which targets were met), decode (steps over a
cache, and their targets), sampling (draws of a token, and their targets), overhead (host time of a
call), features, sweep (tile configs), decode-sweep and sampling-sweep (configs of these). Rows are
on disk as soon as they exist; an interrupted run keeps them.

Exit status: 0 everything is right; 1 something is wrong, or parity was not completed; 2 the run
cannot start here; 130 it was interrupted. Speed does not change it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode_providers import find_decode_providers
from benchmarks.plan import BUDGETS, SUBJECTS, TOTAL_SECONDS, make_plan
from benchmarks.pool import worker_count
from benchmarks.progress import Progress
from benchmarks.providers import find_providers
from benchmarks.report import print_tables, tables
from benchmarks.results import Results, default_path, describe_environment, read_clocks
from benchmarks.sampling_providers import find_sampling_providers
from benchmarks.stages import Bench, run_plan
from benchmarks.timing import CudaTimer, HostTimer, TwoTimers


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Parity and speed of fastattn's kernels on a CUDA device.",
    )
    parser.add_argument("--quick", action="store_true", help="bf16 and the most telling shapes")
    parser.add_argument(
        "--stage", action="append", choices=list(BUDGETS), help="repeatable; default: all"
    )
    parser.add_argument(
        "--only", choices=list(SUBJECTS), help="stages and checks of one subject; default: all"
    )
    parser.add_argument(
        "--budget-seconds", type=float, default=None, metavar="S",
        help=f"for all stages together (default: {TOTAL_SECONDS:.0f}; their shares are "
        + ", ".join(f"{name} {seconds:.0f}" for name, seconds in BUDGETS.items()) + ")",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="default: a new file in benchmarks/results/")
    parser.add_argument(
        "--workers", type=int, help="processes that check kernels; 0: check in this one"
    )
    options = parser.parse_args(arguments)
    if options.budget_seconds is not None and options.budget_seconds <= 0:
        parser.error(f"--budget-seconds must be positive, got {options.budget_seconds}")
    if options.workers is not None and options.workers < 0:
        parser.error(f"--workers must be >= 0, got {options.workers}")
    return options


def reasons_not_to_start() -> list[str]:
    """Why kernels cannot be measured here; empty if they can."""
    from fastattn.dispatch import triton_environment_reasons
    from fastattn.testing.interpreter import is_interpreting

    if not torch.cuda.is_available():
        return [f"torch {torch.__version__} sees no CUDA device, and this needs one"]
    reasons = triton_environment_reasons(torch.device("cuda"))
    if is_interpreting():
        reasons.append("TRITON_INTERPRET is set, so kernels would run on the CPU: unset it")
    return reasons


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    if reasons := reasons_not_to_start():
        print(f"make gpu: {'; '.join(reasons)}", file=sys.stderr)
        return 2
    # A run that is ended from outside (timeout, a scheduler) leaves as by Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    bench = make_bench(options)
    return finish(bench, run(bench))


def make_bench(options: argparse.Namespace) -> Bench:
    """Plan, timers, providers and results file for the current CUDA device."""
    from fastattn.kernels.attention.config import chip_of

    device = torch.device("cuda", torch.cuda.current_device())
    chip = chip_of(device)
    total = options.budget_seconds or TOTAL_SECONDS
    stages = options.stage or list(BUDGETS)
    workers = options.workers
    if workers is None:
        free_bytes = torch.cuda.mem_get_info(device)[0]
        workers = worker_count(len(os.sched_getaffinity(0)), free_bytes)
    subjects = [options.only] if options.only else list(SUBJECTS)
    plan = make_plan(chip, stages, total, quick=options.quick, workers=workers, subjects=subjects)
    providers, decode_providers = find_providers(), find_decode_providers()
    sampling_providers = find_sampling_providers()
    environment = describe_environment(device)
    path = options.output or default_path(environment)
    results = Results(
        path,
        environment={**environment, "chip": chip, "clocks_before": read_clocks(device)},
        settings={"quick": options.quick, "stages": plan.stages, "budget_seconds": total},
        providers=describe_providers([*providers, *decode_providers, *sampling_providers]),
    )
    replays = CudaTimer(method="graph", target_ms=40.0)
    return Bench(
        plan=plan,
        device=device,
        chip=chip,
        timer=CudaTimer(),
        host_timer=HostTimer(synchronize=torch.cuda.synchronize),
        decode_timer=TwoTimers(replays, CudaTimer(method="events", target_ms=30.0)),
        sampling_timer=CudaTimer(method="graph", target_ms=12.0, least=3),
        sweep_timer=CudaTimer(method="graph", target_ms=20.0, least=5),
        providers=providers,
        decode_providers=decode_providers,
        sampling_providers=sampling_providers,
        results=results,
        progress=Progress(total),
    )


def describe_providers(providers: Sequence[Any]) -> dict[str, str]:
    """Each provider's version, or why it is absent; one that is there for one stage is there."""
    found: dict[str, str] = {}
    for provider in providers:
        if not provider.absent:
            found[provider.name] = provider.version
        else:
            found.setdefault(provider.name, f"absent: {provider.absent}")
    return found


def run(bench: Bench) -> int:
    """Runs the plan; returns the exit status."""
    document = bench.results.document
    environment = document["environment"]
    bench.progress.line(
        f"{environment['device']} ({bench.chip}), torch {environment['torch']}, "
        f"triton {environment['triton']}, {bench.plan.workers} workers -> {bench.results.path}"
    )
    for name, version in document["providers"].items():
        bench.progress.line(f"{name}: {version}")
    try:
        right = run_plan(bench)
    except KeyboardInterrupt:
        bench.progress.line(f"interrupted; the results so far are in {bench.results.path}")
        return 130
    return 0 if right else 1


def finish(bench: Bench, status: int) -> int:
    """Notes the clocks, prints tables and verdict; returns the exit status."""
    document = bench.results.document
    if document["status"] != "device lost":
        document["environment"]["clocks_after"] = read_clocks(bench.device)
    bench.results.save()
    print_tables(tables(document))
    for failure in bench.failures[:20]:
        print(f"WRONG: {failure}")
    if len(bench.failures) > 20:
        print(f"and {len(bench.failures) - 20} more, in the file")
    verdict = {0: "everything that was checked is right", 130: "interrupted"}
    print(f"{verdict.get(status, f'{len(bench.failures)} things are wrong')}: {bench.results.path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
