import math

import pytest
import torch

from fastattn.testing import assert_parity, compare

INF, NAN = math.inf, math.nan


def tensors(
    actual: list[float],
    baseline: list[float],
    exact: list[float],
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.tensor(actual, dtype=dtype),
        torch.tensor(baseline, dtype=dtype),
        torch.tensor(exact, dtype=torch.float64),
    )


def test_errors_and_units() -> None:
    result = compare(*tensors([1, 2.5, -4], [1, 2, -4.25], [1, 2, -4]))
    eps = 2.0**-23
    assert (result.max_error, result.baseline_max_error) == (0.5, 0.25)
    assert result.rms_error == pytest.approx(0.5 / math.sqrt(3))
    assert result.baseline_rms_error == pytest.approx(0.25 / math.sqrt(3))
    assert result.rounding_unit == 4 * eps
    assert result.rms_rounding_unit == pytest.approx(math.sqrt(7) * eps)
    assert result.ratio == pytest.approx(2.0)
    assert result.passed and result.failures == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_rounding_unit_is_allowed_and_no_more(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    exact = [1.0, -1.0]
    one_unit = compare(*tensors([1 + eps, -1 - eps], exact, exact, dtype))
    assert one_unit.passed and one_unit.ratio == INF and one_unit.max_error == eps
    two_units = compare(*tensors([1 + 2 * eps, -1], exact, exact, dtype))
    assert two_units.failures == ("max error", "RMS error")


def test_twice_the_baseline_is_allowed_and_no_more() -> None:
    exact, baseline = [0.0] * 4, [0.25] * 4
    assert compare(*tensors([0.5] * 4, baseline, exact)).passed
    worse = tensors([math.nextafter(0.5, 1) + 1e-7] * 4, baseline, exact)
    assert not compare(*worse).passed
    assert compare(*worse, factor=2.5).passed


def test_one_bad_element_fails_the_maximum_only() -> None:
    exact, baseline = [0.0] * 1000, [0.25] * 1000
    result = compare(*tensors([1.0] + [0.0] * 999, baseline, exact))
    assert result.failures == ("max error",)
    assert str(result).startswith("FAILED (max error): max error 1 (PyTorch 0.25, allowed 0.5), ")


def test_a_small_error_everywhere_fails_the_rms_only() -> None:
    exact, baseline = [0.0] * 1000, [1.0] + [0.0] * 999
    result = compare(*tensors([0.5] * 1000, baseline, exact))
    assert result.failures == ("RMS error",)
    assert "RMS error 0.5 (PyTorch 0.0316, allowed 0.0632)" in str(result)
    assert "\n" not in str(result)


@pytest.mark.parametrize(
    ("actual", "exact", "mismatches"),
    [
        ([-INF, 1], [-INF, 1], 0),
        ([NAN, 1], [NAN, 1], 0),
        ([INF, 1], [-INF, 1], 1),
        ([NAN, 1], [-INF, 1], 1),
        ([0, 1], [-INF, 1], 1),
        ([-INF, 1], [0, 1], 1),
        ([NAN, NAN], [0, 1], 2),
    ],
)
def test_what_is_not_finite_must_match(
    actual: list[float], exact: list[float], mismatches: int
) -> None:
    baseline = [0 if math.isfinite(x) else NAN for x in exact]  # not looked at where exact is not
    result = compare(*tensors(actual, [baseline[0], 1], exact))
    assert result.mismatches == mismatches
    assert result.failures == (("NaN or infinity",) if mismatches else ())
    assert result.max_error == 0 and result.rounding_unit == 2.0**-23
    assert (f"{mismatches} elements NaN or infinite" in str(result)) == bool(mismatches)


def test_a_baseline_that_is_not_finite_is_no_measure() -> None:
    with pytest.raises(ValueError, match="baseline is NaN or infinite where exact is finite"):
        compare(*tensors([0.0], [NAN], [0.0]))


def test_nothing_to_compare_passes() -> None:
    empty = torch.empty(0, 3)
    assert compare(empty, empty, empty.double()).passed
    all_masked = compare(*tensors([-INF], [-INF], [-INF]))
    assert all_masked.passed and all_masked.ratio == 1


def test_assert_parity_names_the_result() -> None:
    good = tensors([1.0], [1.0], [1.0])
    assert assert_parity(*good, name="dq").passed
    with pytest.raises(AssertionError, match=r"^dq FAILED \(max error, RMS error\): "):
        assert_parity(*tensors([2.0], [1.0], [1.0]), name="dq")


def test_bad_arguments() -> None:
    actual, baseline, exact = tensors([1.0, 2.0], [1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"baseline has shape \(1,\), expected actual's \(2,\)"):
        compare(actual, baseline[:1], exact)
    with pytest.raises(ValueError, match=r"exact has shape \(2, 1\)"):
        compare(actual, baseline, exact[:, None])
    with pytest.raises(TypeError, match=r"baseline has dtype torch\.float16, expected actual's"):
        compare(actual, baseline.half(), exact)
    with pytest.raises(TypeError, match=r"exact has dtype torch\.float32, expected torch\.float64"):
        compare(actual, baseline, exact.float())
    with pytest.raises(TypeError, match=r"actual has dtype torch\.int32"):
        compare(actual.int(), baseline.int(), exact)
    for factor in (0.0, -1.0, INF, NAN):
        with pytest.raises(ValueError, match="factor must be positive and finite"):
            compare(actual, baseline, exact, factor=factor)


def test_attention_in_bf16_against_itself() -> None:
    """The rule passes for what PyTorch computes in another order, and fails for a wrong scale."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 128, 32, generator=generator).to(torch.bfloat16) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    scores = (q @ k.mT) * 32**-0.5
    baseline = scores.softmax(-1) @ v
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert assert_parity(fused, baseline, exact).ratio < 2
    wrong = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.18)
    assert not compare(wrong, baseline, exact).passed
