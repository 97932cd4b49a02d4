"""What a run does, and how its time is shared out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.parity import (
    FeatureCheck,
    TileCheck,
    dispatch_checks,
    feature_checks,
    gradient_checks,
)

# Seconds by stage, in order; what one leaves over goes to those after it. Together they are what a
# whole run may take; it is cut short, and says so, on a machine too slow for that.
BUDGETS = {
    "parity": 205.0,
    "ceilings": 10.0,
    "forward": 75.0,
    "backward": 90.0,
    "overhead": 8.0,
    "features": 27.0,
    "sweep": 105.0,
}
TOTAL_SECONDS = sum(BUDGETS.values())
OVERHEAD_CASE = Case(1, 128, 4, 4, 64)


@dataclass(frozen=True)
class Plan:
    """What a run does. `make_plan` fills it in for a GPU; tests take tiny ones.

    Attributes:
        stages: names, in the order of BUDGETS.
        checks: the parity stage's tasks.
        forward, backward, features, sweep: cases of these stages.
        copy_bytes, matmul_size: of the ceilings.
        overhead: the case whose calls are timed on the host.
        workers: processes that check; 0 checks in this one.
        total_seconds: for all stages.
    """

    stages: Sequence[str] = tuple(BUDGETS)
    checks: Sequence[FeatureCheck | TileCheck] = ()
    forward: Sequence[Case] = ()
    backward: Sequence[Case] = ()
    features: Sequence[Case] = ()
    sweep: Sequence[Case] = ()
    copy_bytes: int = 2**31
    matmul_size: int = 8192
    overhead: Case = OVERHEAD_CASE
    workers: int = 0
    total_seconds: float = TOTAL_SECONDS


def make_plan(
    chip: str, stages: Sequence[str], total_seconds: float, *, quick: bool, workers: int
) -> Plan:
    """The plan for a GPU; `quick` takes bf16 and the most telling shapes only."""
    dtypes = ("bf16",) if quick else ("bf16", "fp16", "fp32")
    return Plan(
        stages=[name for name in BUDGETS if name in stages],
        # What is timed first: a dtype at a time, its tiles before its features.
        checks=[check for dtype in dtypes for check in _checks(chip, dtype)],
        forward=cases.forward_cases(quick),
        backward=cases.backward_cases(quick),
        features=cases.feature_cases(quick),
        sweep=cases.sweep_cases(quick),
        workers=workers,
        total_seconds=total_seconds,
    )


def _checks(chip: str, dtype: str) -> list[FeatureCheck | TileCheck]:
    return [
        *dispatch_checks(chip, [dtype]),
        *gradient_checks(chip, [dtype]),
        *feature_checks([dtype]),
    ]


def stage_seconds(stage: str, stages: Sequence[str], remaining: float) -> float:
    """The share of the remaining time for a stage, among it and the stages after it."""
    left = list(stages)[list(stages).index(stage) :]
    return remaining * BUDGETS[stage] / sum(BUDGETS[name] for name in left)
