"""One small kernel for each repair of the interpreter.

Each case returns whether the interpreter gives what a GPU gives. test_interpreter.py runs them on
the repaired interpreter. Run as a script, this file runs them on the one that Triton ships, and
prints as JSON which of them are right there.
"""

import json
import os
from collections.abc import Callable
from typing import NamedTuple

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
import triton.language as tl

CASES: dict[str, Callable[[], bool]] = {}

# Right without a repair too, in Triton 3.6.0 with NumPy before 2.4: here so that it stays so.
RIGHT_AS_RELEASED = {
    "bf16_maximum",
    "dot_fp32_ieee",
    "dot_float8_e5m2",
    "cast_bf16_to_integers",
    "cast_bf16_to_fp16",
    "loop_with_runtime_bound",
}

SIZE = 64


def case(function: Callable[[], bool]) -> Callable[[], bool]:
    CASES[function.__name__] = function
    return function


def raises(error: type[BaseException], function: Callable[[], object]) -> bool:
    try:
        function()
    except error:
        return True
    return False


def normal(dtype: torch.dtype = torch.bfloat16, seed: int = 0, size: int = SIZE) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    return torch.equal(actual.double().nan_to_num(7e77), expected.double().nan_to_num(7e77))


# bf16


@triton.jit
def _binary(x, y, out, OP: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a = tl.load(x + at)
    b = tl.load(y + at)
    if OP == "add":
        c = a + b
    elif OP == "sub":
        c = a - b
    elif OP == "mul":
        c = a * b
    elif OP == "maximum":
        c = tl.maximum(a, b)
    elif OP == "less":
        c = tl.where(a < b, a, b)
    elif OP == "constant":
        c = a * 1.7
    elif OP == "full":
        c = tl.full([SIZE], 1.7, tl.bfloat16) + tl.zeros([SIZE], tl.bfloat16)
    elif OP == "neg":
        c = -a
    elif OP == "clamp":
        c = tl.clamp(a, b, b + 1.0)
    elif OP == "fma":
        c = tl.fma(a, b, a)
    elif OP == "mask":
        c = (a > 0).to(tl.bfloat16)
    tl.store(out + at, c)


def binary(op: str, expected: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    def run() -> bool:
        x, y = normal(seed=1), normal(seed=2)
        out = torch.empty_like(x)
        _binary[(1,)](x, y, out, op, SIZE)
        return same(out, expected(x, y).to(torch.bfloat16))

    CASES[f"bf16_{op}"] = run


# Products of two bf16 fit float64, and so do these sums: one rounding, to bf16, is left.
binary("add", torch.add)
binary("sub", torch.sub)
binary("mul", torch.mul)
binary("maximum", torch.maximum)
binary("less", torch.minimum)
binary("constant", lambda x, y: x * torch.tensor(1.7, dtype=torch.bfloat16))
binary("full", lambda x, y: torch.full_like(x, 1.7))
binary("neg", lambda x, y: -x)
binary("clamp", lambda x, y: torch.minimum(torch.maximum(x, y), y + 1))
binary("fma", lambda x, y: (x.double() * y.double() + x.double()).float())
binary("mask", lambda x, y: x > 0)


@triton.jit
def _first(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _reductions(x, out, OP: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a = tl.load(x + at)
    if OP == "sum":
        tl.store(out + at, tl.reduce(a, 0, tl.standard._sum_combine))
    elif OP == "max":
        tl.store(out + at, tl.reduce(a, 0, tl.standard._elementwise_max))
    elif OP == "custom":
        tl.store(out + at, tl.reduce(a, 0, _first))
    elif OP == "scan":
        tl.store(out + at, tl.associative_scan(a, 0, tl.standard._sum_combine))
    elif OP == "product":
        tl.store(out + at, tl.associative_scan(a, 0, tl.standard._prod_combine))
    elif OP == "promoted":
        tl.store(out + at, tl.sum(a, 0).to(tl.bfloat16))


def reduction(op: str, expected: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def run() -> bool:
        # Multiples of 1/8 below 4: their sums are exact in fp32, in any order.
        x = (normal(torch.float32, seed=3).clamp(-3, 3) * 8).round().div(8).to(torch.bfloat16)
        out = torch.empty_like(x)
        _reductions[(1,)](x, out, op, SIZE)
        return same(out, expected(x.float()).to(torch.bfloat16).expand(SIZE))

    CASES[f"bf16_reduce_{op}"] = run


reduction("sum", torch.sum)
reduction("max", torch.max)
reduction("custom", torch.max)
reduction("scan", lambda x: x.cumsum(0))
reduction("product", lambda x: x.cumprod(0))
reduction("promoted", torch.sum)


@triton.jit
def _dot(x, y, out, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    square = at[:, None] * SIZE + at[None, :]
    a = tl.load(x + square)
    b = tl.load(y + square)
    tl.store(out + square, tl.dot(a, b.T, input_precision=PRECISION))


def dot(name: str, x: torch.Tensor, y: torch.Tensor, precision: str) -> None:
    def run() -> bool:
        out = torch.empty(SIZE, SIZE)
        _dot[(1,)](x, y, out, precision, SIZE)
        left, right = (to_tf32(t).double() if precision == "tf32" else t.double() for t in (x, y))
        exact = left @ right.T
        # The products are exact, or rounded once; then SIZE of them are added up in fp32.
        allowed = (SIZE + 1) * torch.finfo(torch.float32).eps * (left.abs() @ right.abs().T)
        return bool(torch.where(exact.isnan(), out.isnan(), (out - exact).abs() <= allowed).all())

    CASES[f"dot_{name}"] = run


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent).float()


def square(dtype: torch.dtype, seed: int) -> torch.Tensor:
    return normal(torch.float32, seed, SIZE * SIZE).view(SIZE, SIZE).to(dtype)


def with_nan(x: torch.Tensor) -> torch.Tensor:
    x[3, 5] = torch.nan
    return x


dot("bf16", square(torch.bfloat16, 4), square(torch.bfloat16, 5), "ieee")
dot("fp32_tf32", square(torch.float32, 4), square(torch.float32, 5), "tf32")
dot("fp32_ieee", square(torch.float32, 4), square(torch.float32, 5), "ieee")
for _float8 in (torch.float8_e4m3fn, torch.float8_e5m2):
    _operands = with_nan(square(torch.float32, 4)).to(_float8), square(_float8, 5)
    dot(str(_float8).removeprefix("torch."), *_operands, "ieee")


# Casts


@triton.jit
def _cast(x, out, SIZE: tl.constexpr, ROUNDING: tl.constexpr = None):
    at = tl.arange(0, SIZE)
    a = tl.load(x + at)
    tl.store(out + at, a.to(out.dtype.element_ty, fp_downcast_rounding=ROUNDING))


def run_cast(x: torch.Tensor, dtype: torch.dtype, rounding: str | None = None) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    _cast[(1,)](x, out, x.numel(), rounding)
    return out


def awkward(low: torch.dtype, size: int = 512) -> torch.Tensor:
    """float32: numbers of ``low``, its midpoints, what lies next to them, and the specials."""
    numbers = every_number(low)
    numbers = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(6))]
    numbers = numbers[: size // 8].sort().values
    middles = (
        numbers[1:] + every_number(low)[torch.searchsorted(every_number(low), numbers[1:]) - 1]
    ) / 2
    middles = middles.float()
    infinity = torch.full_like(middles, torch.inf)
    near = [torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity)]
    random = normal(torch.float32, 7, size // 2)
    special = torch.tensor([0.0, -0.0, torch.nan])
    values = torch.cat([special, numbers.float(), middles, *near, random])
    return values[values.abs().nan_to_num(0) <= torch.finfo(low).max][: size // 2]


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """All finite numbers of a format of 8 or 16 bits, ascending, in float64."""
    if dtype.itemsize == 1:
        stored = torch.arange(256, dtype=torch.uint8)
    else:
        stored = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    numbers = stored.view(dtype).double()
    return numbers[numbers.isfinite()].unique()


def nearest_even(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to a format by looking at all of its numbers."""
    numbers = every_number(dtype)
    x = x.double()
    above = torch.searchsorted(numbers, x.nan_to_num(0)).clamp(1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    # In a format without gaps, of two neighbors one is even: zero is, so count from there.
    zero = int(torch.searchsorted(numbers, torch.zeros((), dtype=torch.float64)))
    low_is_even = (above - 1 - zero) % 2 == 0
    closer_low = (x - low < high - x) | ((x - low == high - x) & low_is_even)
    return torch.where(x.isnan(), x, torch.where(closer_low, low, high)).to(dtype)


def cast(name: str, source: torch.dtype, low: torch.dtype) -> None:
    def run() -> bool:
        largest = min(torch.finfo(low).max, torch.finfo(source).max)
        x = awkward(low).clamp(-largest, largest).to(source)
        return same(run_cast(x, low), nearest_even(x, low))

    CASES[f"cast_{name}"] = run


cast("fp32_bf16", torch.float32, torch.bfloat16)
cast("fp16_bf16", torch.float16, torch.bfloat16)
cast("bf16_fp8e4nv", torch.bfloat16, torch.float8_e4m3fn)
cast("fp32_fp8e4nv", torch.float32, torch.float8_e4m3fn)
cast("fp32_fp8e5", torch.float32, torch.float8_e5m2)
cast("fp16_fp8e5", torch.float16, torch.float8_e5m2)


@case
def cast_bf16_overflows_to_infinity() -> bool:
    x = torch.tensor([3.4e38, -3.4e38, torch.inf, -torch.inf])
    return same(
        run_cast(x, torch.bfloat16),
        torch.tensor([1, -1, 1, -1]) * torch.tensor(torch.inf, dtype=torch.bfloat16),
    )


def cast_twice(name: str, dtype: torch.dtype) -> None:
    """From float64, where rounding through float32 would round twice."""

    def run() -> bool:
        one = torch.finfo(dtype).eps / 2
        # Just past a midpoint, by less than float32 can tell: up, and not to the even neighbor.
        x = torch.tensor(
            [1 + one + 2.0**-40, 1 + one - 2.0**-40, 1 + one, -1 - 3 * one], dtype=torch.float64
        )
        return same(run_cast(x, dtype), nearest_even(x, dtype))

    CASES[f"cast_fp64_{name}"] = run


cast_twice("bf16", torch.bfloat16)
cast_twice("fp8e4nv", torch.float8_e4m3fn)


@case
def cast_integers_to_bf16() -> bool:
    x = torch.tensor([0, 1, -1, 255, 257, 259, -(2**31), 2**24 + 2**16 + 1], dtype=torch.int32)
    return same(run_cast(x, torch.bfloat16), nearest_even(x, torch.bfloat16))


@case
def cast_bf16_to_integers() -> bool:
    x = normal() * 100
    return torch.equal(run_cast(x, torch.int32), x.to(torch.int32))


@case
def cast_bf16_to_fp16() -> bool:
    x = normal()
    return same(run_cast(x, torch.float16), x.to(torch.float16))


@case
def cast_fp8_specials_to_fp32() -> bool:
    x = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2)
    return same(run_cast(x, torch.float32), x.float())


@case
def cast_toward_zero() -> bool:
    x = torch.tensor([1.999, -1.999, 3.4e38, torch.inf, torch.nan, -1e-41, 1.0, -0.0])
    largest = torch.finfo(torch.bfloat16).max
    down = torch.tensor([1.9921875, -1.9921875, largest, torch.inf, torch.nan, 0, 1, 0])
    tiny = run_cast(x, torch.bfloat16, "rtz")
    # bf16 has fp32's exponents, so -1e-41 keeps its leading bits.
    down[5] = -(2.0**-137)
    return same(tiny, down.to(torch.bfloat16))


@triton.jit
def _comparison_cast(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, (tl.load(x + at) > 0).to(tl.bfloat16))


@case
def comparison_of_fp32_is_a_bit() -> bool:
    x = normal(torch.float32)
    out = torch.empty(SIZE, dtype=torch.bfloat16)
    _comparison_cast[(1,)](x, out, SIZE)
    return same(out, (x > 0).to(torch.bfloat16))


# Other arithmetic


@triton.jit
def _fma(x, y, z, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.fma(tl.load(x + at), tl.load(y + at), tl.load(z + at)))


@case
def fma_rounds_once() -> bool:
    x = torch.full((SIZE,), 1 + 2.0**-12)
    out = torch.empty(SIZE)
    _fma[(1,)](x, x, torch.full((SIZE,), -(1 + 2.0**-11)), out, SIZE)
    return bool((out == 2.0**-24).all())


@triton.jit
def _ordered(x, y, out, OP: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a = tl.load(x + at)
    b = tl.load(y + at)
    if OP == "maximum":
        c = tl.maximum(a, b)
    elif OP == "minimum":
        c = tl.minimum(a, b)
    else:
        c = tl.clamp(a, b, b)
    tl.store(out + at, c)


def drops_nan(op: str) -> None:
    def run() -> bool:
        x, out = normal(torch.float32), torch.empty(SIZE)
        _ordered[(1,)](torch.full((SIZE,), torch.nan), x, out, op, SIZE)
        return same(out, x)

    CASES[f"{op}_drops_nan"] = run


drops_nan("maximum")
drops_nan("minimum")
drops_nan("clamp")


@triton.jit
def _umulhi(x, y, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.umulhi(tl.load(x + at), tl.load(y + at)))


@case
def umulhi_takes_bits_as_unsigned() -> bool:
    right = []
    for dtype, bits in ((torch.int32, 32), (torch.int64, 64)):
        x = torch.tensor([-1, -2, 3, -(2 ** (bits - 1))], dtype=dtype)
        out = torch.empty_like(x)
        _umulhi[(1,)](x, x, out, 4)
        high = [((int(v) % 2**bits) ** 2 >> bits) for v in x]
        right.append([int(v) % 2**bits for v in out] == high)
    return all(right)


@triton.jit
def _histogram(x, out, SIZE: tl.constexpr, BINS: tl.constexpr):
    counts = tl.histogram(tl.load(x + tl.arange(0, SIZE)), BINS)
    tl.store(out + tl.arange(0, BINS), counts)


@case
def histogram_drops_what_is_out_of_range() -> bool:
    x = torch.arange(SIZE, dtype=torch.int32)
    out = torch.empty(16, dtype=torch.int32)
    _histogram[(1,)](x, out, SIZE, 16)
    return out.tolist() == [1] * 16


@triton.jit
def _bits(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    bit = tl.load(x + at) != 0
    tl.store(out + at, (bit + bit).to(tl.int32))


@case
def int1_wraps() -> bool:
    x = torch.arange(SIZE, dtype=torch.int32) % 2
    out = torch.empty_like(x)
    _bits[(1,)](x, out, SIZE)
    return not out.any()


# Control flow, assertions, memory


@triton.jit
def _loop(x, out, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for i in range(tl.minimum(n, 3)):
        total += tl.load(x + at) * i
    tl.store(out + at, total)


@case
def loop_with_runtime_bound() -> bool:
    x, out = normal(torch.float32), torch.empty(SIZE)
    _loop[(1,)](x, out, 7, SIZE)
    return torch.equal(out, x + x * 2)


@triton.jit
def _flag(out, flag):
    if flag:
        tl.store(out, 3)


@case
def bool_argument() -> bool:
    out = torch.zeros(1, dtype=torch.int32)
    _flag[(1,)](out, False)
    untouched = out.item() == 0
    _flag[(1,)](out, True)
    return untouched and out.item() == 3


@triton.jit
def _block_condition(out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    if at < 0:
        tl.store(out + at, at)


@case
def condition_on_a_block_raises() -> bool:
    out = torch.zeros(SIZE, dtype=torch.int32)
    return raises(Exception, lambda: _block_condition[(1,)](out, SIZE))


@triton.jit
def _assert(x, ASSUME: tl.constexpr, SIZE: tl.constexpr):
    below = tl.load(x + tl.arange(0, SIZE)) < 1.0
    if ASSUME:
        tl.assume(below)
    else:
        tl.device_assert(below, "below one")


def assertion(name: str, assume: bool) -> None:
    def run() -> bool:
        _assert[(1,)](torch.zeros(SIZE), assume, SIZE)
        one_above = torch.eye(SIZE)[3]
        return raises(AssertionError, lambda: _assert[(1,)](one_above, assume, SIZE))

    CASES[name] = run


assertion("device_assert_raises", False)
assertion("assume_raises", True)


class View(NamedTuple):
    ptr: torch.Tensor | None
    stride: int


@triton.jit
def _copy(source, out, n, extra, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(source.ptr + at * source.stride, mask=at < n)
    if extra.ptr is not None:
        x += tl.load(extra.ptr)
    tl.store(out + at, x, mask=at < n)


@case
def load_out_of_bounds_raises() -> bool:
    source, out = torch.zeros(SIZE), torch.zeros(SIZE)
    nothing = View(None, 0)
    _copy[(1,)](View(source, 1), out, SIZE, nothing, SIZE)
    return raises(
        IndexError, lambda: _copy[(1,)](View(source[:1], 2), out, SIZE // 2 + 1, nothing, SIZE)
    )


@case
def masked_lanes_are_undefined() -> bool:
    source, out = torch.zeros(SIZE), torch.zeros(SIZE)
    _unmasked_store[(1,)](source, out, SIZE)
    return out[: SIZE // 2].eq(0).all().item() and out[SIZE // 2 :].isnan().all().item()


@triton.jit
def _unmasked_store(source, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(source + at, mask=at < SIZE // 2))


def judge(function: Callable[[], bool]) -> bool:
    """Whether a case is right; an exception counts as wrong."""
    try:
        return bool(function())
    except Exception:
        return False


if __name__ == "__main__":
    np.seterr(all="ignore")
    print(json.dumps({name: judge(function) for name, function in CASES.items()}))
