"""What a run does, and how its time is shared out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import cases, decode_cases, sampling_cases
from benchmarks.cases import Case
from benchmarks.decode_cases import DecodeCase
from benchmarks.decode_checks import decode_checks, empty_checks
from benchmarks.parity import (
    dispatch_checks,
    feature_checks,
    gradient_checks,
)
from benchmarks.sampling_cases import SamplingCase
from benchmarks.sampling_checks import sampling_checks

# Seconds by stage, in order; what one leaves over goes to those after it. Together they are what a
# whole run may take; it is cut short, and says so, on a machine too slow for that.
BUDGETS = {
    "parity": 228.0,
    "ceilings": 7.0,
    "forward": 40.0,
    "backward": 48.0,
    "decode": 52.0,
    "sampling": 34.0,
    "overhead": 5.0,
    "features": 9.0,
    "sweep": 33.0,
    "decode-sweep": 40.0,
    "sampling-sweep": 24.0,
}
# What a run may be about: its stages, and its checks with them.
SUBJECTS = {
    "attention": [name for name in BUDGETS if not name.startswith(("decode", "sampling"))],
    "decode": ["parity", "ceilings", "decode", "decode-sweep"],
    "sampling": ["parity", "ceilings", "sampling", "sampling-sweep"],
}
TOTAL_SECONDS = sum(BUDGETS.values())
OVERHEAD_CASE = Case(1, 128, 4, 4, 64)


@dataclass(frozen=True)
class Plan:
    """What a run does. `make_plan` fills it in for a GPU; tests take tiny ones.

    Attributes:
        stages: names, in the order of BUDGETS.
        checks: the parity stage's tasks.
        forward, backward, decode, sampling, features, sweep, decode_sweep, sampling_sweep: cases of
            these stages.
        copy_bytes, matmul_size: of the ceilings.
        overhead: the case whose calls are timed on the host.
        workers: processes that check; 0 checks in this one.
        total_seconds: for all stages.
    """

    stages: Sequence[str] = tuple(BUDGETS)
    checks: Sequence[Any] = ()
    forward: Sequence[Case] = ()
    backward: Sequence[Case] = ()
    decode: Sequence[DecodeCase] = ()
    sampling: Sequence[SamplingCase] = ()
    features: Sequence[Case] = ()
    sweep: Sequence[Case] = ()
    decode_sweep: Sequence[DecodeCase] = ()
    sampling_sweep: Sequence[SamplingCase] = ()
    copy_bytes: int = 2**31
    matmul_size: int = 8192
    overhead: Case = OVERHEAD_CASE
    workers: int = 0
    total_seconds: float = TOTAL_SECONDS


def make_plan(
    chip: str,
    stages: Sequence[str],
    total_seconds: float,
    *,
    quick: bool,
    workers: int,
    subjects: Sequence[str] = tuple(SUBJECTS),
) -> Plan:
    """The plan for a GPU; `quick` takes bf16 and the most telling shapes only.

    `subjects` are keys of SUBJECTS: stages and checks of the others are left out.
    """
    dtypes = ("bf16",) if quick else ("bf16", "fp16", "fp32")
    wanted = {name for subject in subjects for name in SUBJECTS[subject]}
    # What is timed first: a dtype at a time, its configs before its features.
    checks = [check for dtype in dtypes for check in _checks(chip, dtype, subjects)]
    decode = decode_cases.decode_cases(quick)
    if "decode" in subjects and "decode" in stages:
        # Behind bf16's checks, of which they are: they compile what the stage is going to time.
        first = sum(check.dtype == dtypes[0] for check in checks)
        checks[first:first] = empty_checks(decode)
    return Plan(
        stages=[name for name in BUDGETS if name in stages and name in wanted],
        checks=checks,
        forward=cases.forward_cases(quick),
        backward=cases.backward_cases(quick),
        decode=decode,
        sampling=sampling_cases.sampling_cases(quick),
        features=cases.feature_cases(quick),
        sweep=cases.sweep_cases(quick),
        decode_sweep=decode_cases.decode_sweep_cases(quick),
        sampling_sweep=sampling_cases.sampling_sweep_cases(quick),
        workers=workers,
        total_seconds=total_seconds,
    )


def _checks(chip: str, dtype: str, subjects: Sequence[str]) -> list[Any]:
    checks: list[Any] = []
    if "attention" in subjects:
        checks += dispatch_checks(chip, [dtype])
        checks += gradient_checks(chip, [dtype])
    if "decode" in subjects:
        checks += decode_checks(chip, dtype)
    if "sampling" in subjects:
        checks += sampling_checks(dtype)
    if "attention" in subjects:
        checks += feature_checks([dtype])
    return checks


def stage_seconds(stage: str, stages: Sequence[str], remaining: float) -> float:
    """The share of the remaining time for a stage, among it and the stages after it."""
    left = list(stages)[list(stages).index(stage) :]
    return remaining * BUDGETS[stage] / sum(BUDGETS[name] for name in left)
