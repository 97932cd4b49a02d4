"""Numerical parity of every feature, as a function: what `fastattn verify` prints.

    results = verify("cpu")
    assert all(result.passed for result in results)

Each row of `fastattn.testing.features` runs through the Triton kernels in each dtype. Output,
log-sum-exp and, where the row asks for them, attention weights are measured by the parity rule of
`fastattn.testing.tolerance`: against float64, beside plain torch in the same dtype.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from fastattn import functional, reference
from fastattn.dispatch import triton_environment_reasons
from fastattn.testing.features import FEATURES, Case, Feature
from fastattn.testing.interpreter import bounds_checked, is_interpreting
from fastattn.testing.tolerance import Comparison, compare
from fastattn.validation import device_checks

__all__ = ["DTYPES", "Result", "check_feature", "verify"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Result:
    """One feature in one dtype.

    Attributes:
        feature, dtype: which; dtype is "fp32", "fp16" or "bf16".
        parts: comparisons of "out", "lse" and perhaps "weights"; empty if the call raised.
        error: what it raised, else "".
        seconds: time of the row, its references included.
    """

    feature: str
    dtype: str
    parts: dict[str, Comparison] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it ran, and the parity rule holds for every part."""
        return bool(self.parts) and all(part.passed for part in self.parts.values())

    @property
    def verdict(self) -> str:
        """ "pass", or which parts failed and how."""
        if self.error:
            return f"FAIL: {self.error}"
        failed = [
            f"{name} ({', '.join(part.failures)})"
            for name, part in self.parts.items()
            if not part.passed
        ]
        return f"FAIL: {', '.join(failed)}" if failed else "pass"

    @property
    def worst(self) -> Comparison | None:
        """The part that uses most of what the rule allows."""
        return max(self.parts.values(), key=_share_of_allowed, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        parts = {name: {**asdict(part), "passed": part.passed} for name, part in self.parts.items()}
        return {
            "feature": self.feature,
            "dtype": self.dtype,
            "passed": self.passed,
            "error": self.error,
            "seconds": round(self.seconds, 3),
            "parts": parts,
        }

    def __str__(self) -> str:
        lines = [f"{self.feature}, {self.dtype}: {self.verdict}"]
        lines += [f"  {name} {part}" for name, part in self.parts.items()]
        return "\n".join(lines)


def _share_of_allowed(part: Comparison) -> float:
    if part.mismatches:
        return math.inf
    pairs = (
        (part.max_error, part.allowed_max_error),
        (part.rms_error, part.allowed_rms_error),
    )
    return max(error / allowed if allowed else float(error > 0) for error, allowed in pairs)


def check_feature(
    feature: Feature, dtype: str, device: torch.device | str = "cpu", impl: str = "triton"
) -> Result:
    """Runs one row in one dtype and measures it. An error of the call is raised, not caught.

    Kernels write into outputs full of NaN and the values of lengths are checked. In the interpreter
    every access outside the elements of the operands raises.
    """
    started = time.perf_counter()
    case = feature.case(DTYPES[dtype], device)
    with device_checks(), _bounds_checked(case):
        out, lse = _attention(functional.attention, case, impl=impl)
        weights = None
        if feature.weights:
            weights = functional.attention_weights(case.q, case.k, lse, impl=impl, **case.kwargs)
    exact = _attention(reference.attention, case, *case.double())
    baseline = _attention(reference.attention, case)
    parts = {
        "out": compare(out, baseline[0], exact[0]),
        "lse": compare(lse, baseline[1], exact[1]),
    }
    if weights is not None:
        # Like the kernel's, the baseline's weights come from the log-sum-exp of a call before.
        baseline_weights = functional.attention_weights(
            case.q, case.k, baseline[1], impl="reference", **case.kwargs
        )
        exact_weights = functional.attention_weights(
            *case.double()[:2], impl="reference", **case.kwargs
        )
        parts["weights"] = compare(weights, baseline_weights, exact_weights)
    return Result(feature.name, dtype, parts, seconds=time.perf_counter() - started)


def _attention(
    function: Callable[..., Any], case: Case, *operands: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    operands = operands or (case.q, case.k, case.v)
    out, lse = function(*operands, return_lse=True, **case.kwargs, **options)
    return out, lse


def _bounds_checked(case: Case) -> AbstractContextManager[None]:
    if not is_interpreting() or case.q.device.type != "cpu":
        return nullcontext()
    return bounds_checked(q=case.q, k=case.k, v=case.v)


def verify(
    device: torch.device | str = "cpu",
    dtypes: Iterable[str] = tuple(DTYPES),
    features: Sequence[Feature] | None = None,
    *,
    jobs: int = 1,
    progress: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Checks features in dtypes; what a row raises becomes a failed result.

    Args:
        device: "cuda", or "cpu" for Triton's interpreter (TRITON_INTERPRET=1 must be set before
            triton is imported).
        dtypes: of "fp32", "fp16", "bf16".
        features: rows of `fastattn.testing.features`; default all.
        jobs: processes to share the rows among, on the CPU. They import the main module anew, so a
            script that asks for several needs its `if __name__ == "__main__"`.
        progress: called with each result when it is there.

    Returns:
        The results, feature by feature.

    Raises:
        ValueError: a dtype is unknown, or jobs < 1.
        RuntimeError: kernels cannot run on the device; says why.
    """
    dtypes = list(dtypes)
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}")
    if jobs < 1:
        raise ValueError(f"jobs must be >= 1, got {jobs}")
    device = torch.device(device)
    if reasons := triton_environment_reasons(device):
        raise RuntimeError(f"kernels cannot run on {device}: {'; '.join(reasons)}")
    rows = FEATURES if features is None else features
    tasks = [(feature, dtype) for feature in rows for dtype in dtypes]
    results = []
    for result in _run(tasks, device, min(jobs, len(tasks))):
        results.append(result)
        if progress is not None:
            progress(result)
    return results


def _run(tasks: list[tuple[Feature, str]], device: torch.device, jobs: int) -> Iterator[Result]:
    if jobs <= 1 or device.type != "cpu":
        yield from (_check_or_report(feature, dtype, device) for feature, dtype in tasks)
        return
    if any(feature not in FEATURES for feature, _ in tasks):
        raise ValueError(f"jobs must be 1 for rows that are not in FEATURES, got {jobs}")
    names = [(feature.name, dtype) for feature, dtype in tasks]
    # Spawned, not forked: torch's threads do not survive a fork.
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from pool.map(_check_by_name, names)


def _check_by_name(task: tuple[str, str]) -> Result:
    """In a worker process: the rows hold functions, which do not travel, so their names do."""
    name, dtype = task
    feature = next(row for row in FEATURES if row.name == name)
    return _check_or_report(feature, dtype, torch.device("cpu"))


def _check_or_report(feature: Feature, dtype: str, device: torch.device) -> Result:
    started = time.perf_counter()
    try:
        return check_feature(feature, dtype, device)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - started
        return Result(feature.name, dtype, error=text, seconds=seconds)
