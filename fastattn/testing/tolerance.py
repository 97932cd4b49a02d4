"""The parity rule: at most twice the error of plain PyTorch, plus one rounding unit.

    |actual - exact|  <=  factor * |baseline - exact|  +  eps * |exact|

``exact`` is computed in float64, ``baseline`` by plain PyTorch in the dtype of ``actual`` from the
same inputs, and ``eps`` is the spacing of that dtype at 1. The rule must hold twice: with each
``|x|`` the maximum over all elements, which finds a single bad element, and with each ``|x|`` the
root mean square, which finds a small error everywhere. No tolerance is picked by hand: it follows
from what the dtype can do on these inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["Comparison", "assert_parity", "compare"]


@dataclass(frozen=True)
class Comparison:
    """How far a result is from float64, beside how far plain PyTorch is.

    Attributes:
        max_error, baseline_max_error: largest absolute error of the result and of PyTorch.
        rms_error, baseline_rms_error: their root mean square errors.
        rounding_unit: eps * max |exact|, the unit added to the allowed maximum error.
        rms_rounding_unit: eps * RMS of exact, the unit added to the allowed RMS error.
        factor: multiples of PyTorch's error that are allowed.
        mismatches: elements that are NaN or infinite and should not be, or the other way round.
            They are not part of the errors, and any of them fails.
    """

    max_error: float
    baseline_max_error: float
    rms_error: float
    baseline_rms_error: float
    rounding_unit: float
    rms_rounding_unit: float
    factor: float
    mismatches: int

    @property
    def allowed_max_error(self) -> float:
        """The largest maximum error that passes."""
        return self.factor * self.baseline_max_error + self.rounding_unit

    @property
    def allowed_rms_error(self) -> float:
        """The largest RMS error that passes."""
        return self.factor * self.baseline_rms_error + self.rms_rounding_unit

    @property
    def ratio(self) -> float:
        """The error in multiples of PyTorch's, the worse of maximum and RMS.

        1 where both are exact, infinite where only PyTorch is.
        """
        return max(
            _ratio(self.max_error, self.baseline_max_error),
            _ratio(self.rms_error, self.baseline_rms_error),
        )

    @property
    def failures(self) -> tuple[str, ...]:
        """Which parts of the rule are broken: "max error", "RMS error", "NaN or infinity"."""
        checks = {
            "max error": self.max_error <= self.allowed_max_error,
            "RMS error": self.rms_error <= self.allowed_rms_error,
            "NaN or infinity": self.mismatches == 0,
        }
        return tuple(name for name, holds in checks.items() if not holds)

    @property
    def passed(self) -> bool:
        """Whether the rule holds."""
        return not self.failures

    def __str__(self) -> str:
        verdict = "passed" if self.passed else f"FAILED ({', '.join(self.failures)})"
        text = (
            f"{verdict}: max error {self.max_error:.3g} (PyTorch {self.baseline_max_error:.3g}, "
            f"allowed {self.allowed_max_error:.3g}), RMS error {self.rms_error:.3g} "
            f"(PyTorch {self.baseline_rms_error:.3g}, allowed {self.allowed_rms_error:.3g})"
        )
        if self.mismatches:
            text += f", {self.mismatches} elements NaN or infinite on one side only"
        return text


def compare(
    actual: torch.Tensor, baseline: torch.Tensor, exact: torch.Tensor, *, factor: float = 2.0
) -> Comparison:
    """Measure a result by the parity rule (see the module).

    Where ``exact`` is not finite (the lse of a row that may attend to nothing is -inf), ``actual``
    must be the same, and the element is left out of the errors. A NaN or an infinity anywhere else
    in ``actual`` fails.

    Args:
        actual: the result to judge, any floating dtype.
        baseline: plain PyTorch's result in that dtype from the same inputs. Not looked at where
            ``exact`` is not finite.
        exact: the float64 result from the same inputs.
        factor: multiples of the baseline's error that are allowed.

    All three have one shape; they may live on different devices. An empty result passes.

    Raises:
        TypeError: a dtype is not as described.
        ValueError: the shapes differ, ``factor`` is not positive, or ``baseline`` is NaN or
            infinite where ``exact`` is finite, and so cannot be a measure.
    """
    _check(actual, baseline, exact, factor)
    wide = [t.detach().to(device=exact.device, dtype=torch.float64) for t in (actual, baseline)]
    result, plain, exact = wide[0], wide[1], exact.detach()

    finite = torch.isfinite(exact)
    if not bool(torch.isfinite(plain[finite]).all()):
        raise ValueError(
            "baseline is NaN or infinite where exact is finite, so it cannot be a measure: "
            "compute it so that rows that may attend to nothing give 0"
        )
    same = torch.where(torch.isnan(exact), torch.isnan(result), result == exact)
    right = torch.where(finite, torch.isfinite(result), same)
    measured = finite & right
    eps = torch.finfo(actual.dtype).eps
    max_error, rms_error = _max_and_rms(result[measured] - exact[measured])
    baseline_max_error, baseline_rms_error = _max_and_rms(plain[finite] - exact[finite])
    largest, rms = _max_and_rms(exact[finite])
    return Comparison(
        max_error=max_error,
        baseline_max_error=baseline_max_error,
        rms_error=rms_error,
        baseline_rms_error=baseline_rms_error,
        rounding_unit=eps * largest,
        rms_rounding_unit=eps * rms,
        factor=factor,
        mismatches=int((~right).sum()),
    )


def assert_parity(
    actual: torch.Tensor,
    baseline: torch.Tensor,
    exact: torch.Tensor,
    *,
    name: str = "output",
    factor: float = 2.0,
) -> Comparison:
    """Raise AssertionError unless the parity rule holds; returns the comparison if it does.

    Args:
        actual, baseline, exact, factor: as for :func:`compare`, and with the same errors.
        name: what to call the result in the message.
    """
    comparison = compare(actual, baseline, exact, factor=factor)
    if not comparison.passed:
        raise AssertionError(f"{name} {comparison}")
    return comparison


def _check(
    actual: torch.Tensor, baseline: torch.Tensor, exact: torch.Tensor, factor: float
) -> None:
    if not actual.dtype.is_floating_point:
        raise TypeError(f"actual has dtype {actual.dtype}, expected a floating dtype")
    if baseline.dtype != actual.dtype:
        raise TypeError(f"baseline has dtype {baseline.dtype}, expected actual's {actual.dtype}")
    if exact.dtype != torch.float64:
        raise TypeError(f"exact has dtype {exact.dtype}, expected torch.float64")
    for name, tensor in (("baseline", baseline), ("exact", exact)):
        if tensor.shape != actual.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected actual's {tuple(actual.shape)}"
            )
    if not 0 < factor < math.inf:
        raise ValueError(f"factor must be positive and finite, got {factor}")


def _max_and_rms(values: torch.Tensor) -> tuple[float, float]:
    if values.numel() == 0:
        return 0.0, 0.0
    magnitude = values.abs()
    return magnitude.max().item(), magnitude.square().mean().sqrt().item()


def _ratio(error: float, baseline_error: float) -> float:
    if baseline_error > 0:
        return error / baseline_error
    return math.inf if error > 0 else 1.0
