"""Numerical parity of every feature, as a function: what `fastattn verify` prints.

    results = verify("cpu")
    assert all(result.passed for result in results)

Each row of `fastattn.testing.features` and of `cache_features` runs through the Triton kernels in
each dtype. Output, log-sum-exp and, where the row asks for them, attention weights are measured by
the parity rule of `fastattn.testing.tolerance`: against float64, beside plain torch in the same
dtype. With `grad=True` the gradients are too, each by itself: those of float64 autograd are exact,
those of autograd in the same dtype the measure, both of `fastattn.reference`. Of a cache, what it
holds after the call is verified, and that nothing else in it changed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from fastattn import decoding, functional, reference
from fastattn.dispatch import triton_environment_reasons
from fastattn.testing import gradients
from fastattn.testing.cache_features import CACHE_FEATURES, CacheCase, CacheFeature
from fastattn.testing.features import FEATURES, Case, Feature
from fastattn.testing.interpreter import bounds_checked, is_interpreting
from fastattn.testing.tolerance import Comparison, compare
from fastattn.validation import device_checks

__all__ = ["DTYPES", "Result", "check_feature", "find_features", "verify"]

Row = Feature | CacheFeature

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_GRADIENTS = tuple(f"d{name}" for name in gradients.DIFFERENTIABLE)


@dataclass(frozen=True)
class Result:
    """One feature in one dtype.

    Attributes:
        feature, dtype: which; dtype is "fp32", "fp16" or "bf16".
        parts: comparisons of "out", "lse" and perhaps "weights", and of the gradients where they
            are verified: "dq", "dk", "dv" and, where the row has such a tensor, "dbias", "dtable",
            "dsinks"; of a cache, also what "k_cache" and "v_cache" hold. Empty if the call raised.
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
    def worst_gradient(self) -> str | None:
        """Name of the gradient that uses most of what the rule allows; None without gradients."""
        names = [name for name in self.parts if name in _GRADIENTS]
        return max(names, key=lambda name: _share_of_allowed(self.parts[name]), default=None)

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
    feature: Row,
    dtype: str,
    device: torch.device | str = "cpu",
    impl: str = "triton",
    *,
    grad: bool = False,
    lse: bool = True,
) -> Result:
    """Runs one row in one dtype and measures it. An error of the call is raised, not caught.

    Kernels write into outputs full of NaN and the values of lengths are checked. In the interpreter
    every access outside the elements of the operands raises. All of that holds for the backward
    pass too.

    Args:
        feature: the row; one of `cache_features` has no gradient, and its cache is verified too.
        dtype: "fp32", "fp16" or "bf16".
        device: where to run.
        impl: what is verified, as in `fastattn.attention`.
        grad: run the backward pass too and verify each gradient (`fastattn.testing.gradients`).
        lse: ask for the log-sum-exp; if not, neither it nor weights are verified, nor what flows
            back through it.

    Raises:
        ValueError: the reference itself gives NaN or infinity for a gradient.
    """
    if isinstance(feature, CacheFeature):
        return _check_cache_feature(feature, dtype, device, impl)
    started = time.perf_counter()
    case = feature.case(DTYPES[dtype], device)
    starts = feature.output_gradients(case) if grad else None
    lse = lse and not (grad and feature.gradient == "sum")
    run = partial(gradients.run, output_gradients=starts, return_lse=lse)
    with device_checks(), _bounds_checked(case, starts):
        actual = run(partial(functional.attention, impl=impl), case)
        if feature.weights and lse:
            actual["weights"] = _weights(case, actual["lse"], impl)
    exact = run(reference.attention, case.double())
    baseline = run(reference.attention, case)
    for name in _GRADIENTS:
        if name in exact and not bool(torch.isfinite(exact[name]).all()):
            raise ValueError(f"{name} of the reference in float64 is NaN or infinite somewhere")
    if "weights" in actual:
        # Like the kernel's, the baseline's weights come from the log-sum-exp of a call before.
        baseline["weights"] = _weights(case, baseline["lse"], "reference")
        exact["weights"] = _weights(case.double(), None, "reference")
    parts = {name: compare(actual[name], baseline[name], exact[name]) for name in exact}
    return Result(feature.name, dtype, parts, seconds=time.perf_counter() - started)


def _check_cache_feature(
    feature: CacheFeature, dtype: str, device: torch.device | str, impl: str
) -> Result:
    """A row of `cache_features`: output, log-sum-exp, and what the cache holds afterwards."""
    started = time.perf_counter()
    cases = [feature.case(DTYPES[dtype], device) for _ in range(3)]
    case, plain, exact = cases[0], cases[1], cases[2].double()
    before = case.memory()
    checked: AbstractContextManager[None] = nullcontext()
    if is_interpreting() and case.q.device.type == "cpu":
        checked = bounds_checked(**case.named_tensors())

    def run(one: CacheCase, impl: str) -> dict[str, Tensor]:
        out, lse = one.call(decoding.attention_with_kv_cache, return_lse=True, impl=impl)
        return {"out": out, "lse": lse}

    with device_checks(), checked:
        results = run(case, impl)
    if not all(map(torch.equal, before, case.memory())):
        raise AssertionError("something was written outside the places of the new tokens")
    baseline, truth = run(plain, "reference"), run(exact, "reference")
    for name, *tokens in zip(
        ("k_cache", "v_cache"), case.tokens(), plain.tokens(), exact.tokens(), strict=True
    ):
        results[name], baseline[name], truth[name] = tokens
    if feature.stored is not None:
        # The attention's own error: over what this very cache holds now.
        baseline |= run(case.settled(), "reference")
        truth |= run(case.settled().double(), "reference")
    parts = {name: compare(results[name], baseline[name], truth[name]) for name in results}
    return Result(feature.name, dtype, parts, seconds=time.perf_counter() - started)


def _weights(case: Case, lse: Tensor | None, impl: str) -> Tensor:
    return functional.attention_weights(case.q, case.k, lse, impl=impl, **case.kwargs)


def _bounds_checked(
    case: Case, starts: tuple[Tensor | None, Tensor | None] | None
) -> AbstractContextManager[None]:
    if not is_interpreting() or case.q.device.type != "cpu":
        return nullcontext()
    out, lse = starts or (None, None)
    return bounds_checked(**case.tensors(), grad_out=out, grad_lse=lse)


def find_features(substring: str | None = None, *, grad: bool = False) -> tuple[Row, ...]:
    """All rows, or those whose name contains a substring (upper and lower case are the same).

    With `grad`, only rows that have a gradient: attention over a cache has none.

    Raises:
        ValueError: no name contains it; the message lists all names.
    """
    rows: tuple[Row, ...] = FEATURES if grad else (*FEATURES, *CACHE_FEATURES)
    found = tuple(row for row in rows if (substring or "").lower() in row.name.lower())
    if not found:
        names = "\n  ".join(row.name for row in rows)
        raise ValueError(
            f"feature must be part of one of these names, got {substring!r}:\n  {names}"
        )
    return found


def verify(
    device: torch.device | str = "cpu",
    dtypes: Iterable[str] = tuple(DTYPES),
    features: Sequence[Row] | None = None,
    *,
    grad: bool = False,
    jobs: int = 1,
    progress: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Checks features in dtypes; what a row raises becomes a failed result.

    Args:
        device: "cuda", or "cpu" for Triton's interpreter (TRITON_INTERPRET=1 must be set before
            triton is imported).
        dtypes: of "fp32", "fp16", "bf16".
        features: rows of `fastattn.testing.features` and `cache_features`; default all.
        grad: verify gradients too.
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
    rows = find_features(grad=grad) if features is None else features
    tasks = [(feature, dtype) for feature in rows for dtype in dtypes]
    results = []
    for result in _run(tasks, device, grad, min(jobs, len(tasks))):
        results.append(result)
        if progress is not None:
            progress(result)
    return results


def _run(
    tasks: list[tuple[Row, str]], device: torch.device, grad: bool, jobs: int
) -> Iterator[Result]:
    if jobs <= 1 or device.type != "cpu":
        yield from (_check_or_report(feature, dtype, device, grad) for feature, dtype in tasks)
        return
    known = (*FEATURES, *CACHE_FEATURES)
    if any(feature not in known for feature, _ in tasks):
        raise ValueError(f"jobs must be 1 for rows that are not in FEATURES, got {jobs}")
    names = [(feature.name, dtype, grad) for feature, dtype in tasks]
    # Spawned, not forked: torch's threads do not survive a fork.
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from pool.map(_check_by_name, names)


def _check_by_name(task: tuple[str, str, bool]) -> Result:
    """In a worker process: the rows hold functions, which do not travel, so their names do."""
    name, dtype, grad = task
    feature = next(row for row in find_features() if row.name == name)
    return _check_or_report(feature, dtype, torch.device("cpu"), grad)


def _check_or_report(feature: Row, dtype: str, device: torch.device, grad: bool) -> Result:
    started = time.perf_counter()
    try:
        return check_feature(feature, dtype, device, grad=grad)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - started
        return Result(feature.name, dtype, error=text, seconds=seconds)
