"""Caches in 8 bits: the numbers against their definition, element by element."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import Quantized
from fastattn.quantized import quantize

SHAPE = (2, 6, 3, 16)
FP8 = torch.float8_e4m3fn


def draw(seed: int = 0) -> Tensor:
    """Tokens of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.linspace(-6, 4, 12).reshape(2, 6, 1, 1)
    return torch.randn(SHAPE, generator=generator) * sizes


def fp8_numbers() -> list[float]:
    """All of e4m3 that is finite: 4 bits of exponent with bias 7, 3 of mantissa."""
    numbers = {m / 8 * 2.0**-6 for m in range(8)}
    numbers |= {(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)}
    numbers -= {480.0}  # that code is NaN
    return sorted(numbers | {-number for number in numbers})


def test_int8_rounds_half_to_even_and_clamps() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.4, 200.0, -200.0]).reshape(1, 1, 1, 8)
    values, _ = quantize(x, torch.int8, torch.ones(1))
    assert values.flatten().tolist() == [0, 2, 2, 0, -2, 126, 127, -127]


def test_fp8_takes_the_nearest_number_and_clamps() -> None:
    x = draw()[0].clamp(-1000, 1000)
    values, _ = quantize(x, FP8, torch.ones(3))
    numbers = fp8_numbers()
    assert max(numbers) == 448.0
    for given, got in zip(x.flatten().tolist(), values.float().flatten().tolist(), strict=True):
        wanted = max(-448.0, min(448.0, given))
        assert abs(got - wanted) == min(abs(number - wanted) for number in numbers)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.int8, 127), (FP8, 448)], ids=str)
def test_a_token_is_scaled_to_its_largest_number(dtype: torch.dtype, largest: int) -> None:
    x = draw()
    x[1, 2, 1] = 0
    cache = Quantized.make(x, dtype)
    assert cache.per_token
    assert cache.scale.shape == SHAPE[:-1]
    for place in ((0, 0, 0), (1, 5, 2), (1, 2, 1)):
        biggest = float(x[place].abs().max())
        wanted = torch.tensor(biggest) / largest if biggest else torch.tensor(1.0)
        assert torch.equal(cache.scale[place], wanted)
        if biggest:
            assert float(cache.values[place].float().abs().max()) == largest
    assert cache.dequantize()[1, 2, 1].count_nonzero() == 0


def test_the_error_is_what_the_docstring_says() -> None:
    x = draw()
    # One unit of float32 for the division and one for the product.
    slack = 2 * torch.finfo(torch.float32).eps * x.abs()
    cache = Quantized.make(x, "int8")
    assert ((cache.dequantize() - x).abs() <= cache.scale[..., None] / 2 + slack).all()
    cache = Quantized.make(x, "fp8")
    allowed = torch.maximum(x.abs() / 16, cache.scale[..., None] * 2.0**-10)
    assert ((cache.dequantize() - x).abs() <= allowed + slack).all()


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_head_keeps_its_scale(name: Any) -> None:
    x = draw().clamp(-20, 20)
    scale = torch.tensor([0.5, 0.125, 1.0])
    cache = Quantized.make(x, name, scale)
    assert not cache.per_token
    assert cache.scale is scale
    wanted = cache.values.double() * scale.double()[:, None]
    assert torch.equal(cache.dequantize(torch.float64), wanted)
    assert torch.equal(cache.dequantize(torch.float16), cache.dequantize().half())
    # The first head clamps nothing below its half unit.
    assert ((cache.dequantize() - x)[:, :, 0].abs() <= (0.25 if name == "int8" else 20 / 16)).all()


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_zeros_is_an_empty_cache(name: Any) -> None:
    cache = Quantized.zeros(SHAPE, name)
    assert cache.values.shape == SHAPE
    assert cache.scale.shape == SHAPE[:-1]
    assert cache.values.element_size() == 1
    assert cache.dequantize().count_nonzero() == 0
    per_head = Quantized.zeros(SHAPE, cache.values.dtype, scale=torch.ones(3))
    assert per_head.scale.shape == (3,)
    assert per_head.values.dtype == cache.values.dtype


VALUES = torch.zeros(SHAPE, dtype=torch.int8)
BAD: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "values are a list": (
        lambda: Quantized([1], torch.ones(3)),  # type: ignore[arg-type]
        TypeError,
        ("Quantized values must be a torch.Tensor", "[1]"),
    ),
    "values of float16": (
        lambda: Quantized(VALUES.half(), torch.ones(3)),
        TypeError,
        ("Quantized values must be int8 or float8_e4m3fn", "float16"),
    ),
    "values of rank 3": (
        lambda: Quantized(VALUES[0], torch.ones(3)),
        ValueError,
        ("Quantized values must have the shape of a cache", "(6, 3, 16)"),
    ),
    "scale of another size": (
        lambda: Quantized(VALUES, torch.ones(2)),
        ValueError,
        ("Quantized scale must be float32 of shape (3,)", "(2, 6, 3)", "(2,)"),
    ),
    "scale of float16": (
        lambda: Quantized(VALUES, torch.ones(3).half()),
        ValueError,
        ("Quantized scale must be float32", "float16"),
    ),
    "scale elsewhere": (
        lambda: Quantized(VALUES, torch.ones(3, device="meta")),
        ValueError,
        ("Quantized scale must be on cpu", "meta"),
    ),
    "scale of 0": (
        lambda: Quantized(VALUES, torch.tensor([1.0, 0.0, 2.0])),
        ValueError,
        ("Quantized scale must be positive for each head", "0.0"),
    ),
    "scale of NaN": (
        lambda: Quantized(VALUES, torch.tensor([1.0, math.nan, 2.0])),
        ValueError,
        ("Quantized scale must be positive", "nan"),
    ),
    "zeros of float16": (
        lambda: Quantized.zeros(SHAPE, torch.float16),
        ValueError,
        ('dtype must be torch.int8 or "int8"', "torch.float16"),
    ),
    "zeros of int4": (lambda: Quantized.zeros(SHAPE, "int4"), ValueError, ("dtype", "'int4'")),  # type: ignore[arg-type]
    "per head without a scale": (
        lambda: Quantized.zeros(SHAPE, "int8", "head"),
        ValueError,
        ("scale must be given for per=", "None"),
    ),
    "per row": (
        lambda: Quantized.zeros(SHAPE, "int8", "row"),  # type: ignore[arg-type]
        ValueError,
        ('per must be "token" or "head"', "'row'"),
    ),
    "make from integers": (
        lambda: Quantized.make(VALUES, "int8"),
        ValueError,
        ("x must be floating point", "int8"),
    ),
    "make with a bad scale": (
        lambda: Quantized.make(VALUES.float(), "int8", torch.ones(16)),
        ValueError,
        ("Quantized scale must be float32 of shape (3,)", "(16,)"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name: str) -> None:
    call, error, words = BAD[name]
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    for word in words:
        assert word in str(raised.value)
