import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from fastattn.testing import bounds_checked, is_interpreting, repair
from fastattn.testing.interpreter import accesses, float_formats

pytestmark = pytest.mark.interpreter

ROOT = Path(__file__).parents[2]
CASES_FILE = Path(__file__).with_name("interpreter_cases.py")


def load_cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("interpreter_cases", CASES_FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = load_cases()


def run_cold(*arguments: str, interpret: str | None = "1") -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret is not None:
        env["TRITON_INTERPRET"] = interpret
    return subprocess.run(
        [sys.executable, *arguments],
        env={
            **env,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")])),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def as_released() -> dict[str, bool]:
    process = run_cold("-W", "ignore", str(CASES_FILE))
    assert process.returncode == 0, process.stderr
    verdicts: dict[str, bool] = json.loads(process.stdout)
    return verdicts


@pytest.mark.parametrize("name", cases.CASES)
def test_repaired(name: str) -> None:
    assert cases.CASES[name]()


@pytest.mark.skipif(
    triton.__version__.split("+")[0] != "3.6.0" or np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="other releases have other faults",
)
def test_every_repair_is_needed(as_released: dict[str, bool]) -> None:
    right = {name for name, verdict in as_released.items() if verdict}
    assert right == cases.RIGHT_AS_RELEASED


def test_repair_happens_once() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    before = InterpreterBuilder.binary_op
    repair()
    assert InterpreterBuilder.binary_op is before


def test_unknown_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.10.0+git1234")
    with pytest.raises(RuntimeError, match=r"Triton 3\.10\.0\+git1234 are not known"):
        repair()


def test_switching_after_the_import_is_refused() -> None:
    process = run_cold(
        "-c",
        "import os, triton; os.environ['TRITON_INTERPRET'] = '1'\n"
        "from fastattn.testing import repair\nrepair()",
        interpret=None,
    )
    assert process.returncode != 0
    assert "set it before the first import of triton" in process.stderr


def test_is_interpreting_reads_the_environment_as_triton_does() -> None:
    process = run_cold(
        "-c",
        """
import os, sys
from fastattn.testing import is_interpreting

def read():
    verdicts = []
    for value in ("1", "TRUE", "on", "y", "yes", "t", "0", "off", "2", " 1", ""):
        os.environ["TRITON_INTERPRET"] = value
        verdicts.append(is_interpreting())
    del os.environ["TRITON_INTERPRET"]
    return [*verdicts, is_interpreting()]

cold = read()
assert "triton" not in sys.modules
import triton
assert cold == read() and sum(cold) == 5, cold
""",
    )
    assert process.returncode == 0, process.stderr


@triton.jit
def _twice(x):
    return tl.exp2(x) + tl.load(x)  # a value is no pointer: this raises


@triton.jit
def _calls_helper(x, HELPER_RAISES: tl.constexpr):
    a = tl.load(x)
    if HELPER_RAISES:
        a = _twice(a)
    tl.store(x, cases._first(a, a))


@pytest.mark.parametrize("fails", [False, True])
def test_a_launch_leaves_the_language_as_it_was(fails: bool) -> None:
    before = tl.load, tl.tensor.__add__, tl.range
    if fails:
        with pytest.raises(InterpreterError, match="ValueError"):
            _calls_helper[(1,)](torch.ones(1), True)
    else:
        _calls_helper[(1,)](torch.ones(1), False)
    assert (tl.load, tl.tensor.__add__, tl.range) == before


# What is refused


@triton.jit
def _add_to_itself(x, out, SIZE: tl.constexpr):
    a = tl.load(x + tl.arange(0, SIZE))
    tl.store(out + tl.arange(0, SIZE), a + a)


@triton.jit
def _convert(x, out, SIZE: tl.constexpr):
    a = tl.load(x + tl.arange(0, SIZE))
    tl.store(out + tl.arange(0, SIZE), a.to(out.dtype.element_ty))


@triton.jit
def _accumulate(x, out, SIZE: tl.constexpr):
    tl.atomic_add(out + tl.arange(0, SIZE), tl.load(x + tl.arange(0, SIZE)))


@triton.jit
def _sum_of(x, out, SIZE: tl.constexpr):
    tl.store(out, tl.reduce(tl.load(x + tl.arange(0, SIZE)), 0, tl.standard._sum_combine))


def test_arithmetic_on_fp8_is_refused() -> None:
    x = torch.ones(64).to(torch.float8_e4m3fn)
    for kernel in (_add_to_itself, _sum_of):
        with pytest.raises(NotImplementedError, match="fp8e4nv"):
            kernel[(1,)](x, torch.empty_like(x), 64)


def test_atomic_on_bf16_is_refused() -> None:
    x = torch.ones(64, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="bf16: use fp32"):
        _accumulate[(1,)](x, torch.empty_like(x), 64)


@pytest.mark.parametrize("value", [449.0, -1e9, float("inf")])
def test_fp8_overflow_is_refused(value: float) -> None:
    out = torch.empty(64, dtype=torch.float8_e4m3fn)
    _convert[(1,)](torch.full((64,), 447.0), out, 64)
    assert out.float().eq(448).all()
    with pytest.raises(NotImplementedError, match="past the largest fp8e4nv, 448"):
        _convert[(1,)](torch.full((64,), value), out, 64)


@triton.jit
def _scaled_dot(x, scale, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a = tl.load(x + at[:, None] * SIZE + at[None, :])
    s = tl.load(scale + at[:, None] * (SIZE // 32) + tl.arange(0, SIZE // 32)[None, :])
    c = tl.dot_scaled(a, s, tl.constexpr("e4m3"), a, s, tl.constexpr("e4m3"))
    tl.store(out + at[:, None] * SIZE + at[None, :], c)


def test_dot_scaled_is_refused() -> None:
    x = torch.ones(64, 64).to(torch.float8_e4m3fn)
    scale = torch.full((64, 2), 127, dtype=torch.uint8)
    with pytest.raises(NotImplementedError, match="dot_scaled"):
        _scaled_dot[(1,)](x, scale, torch.empty(64, 64), 64)


@triton.jit
def _fma_of(x, out, SIZE: tl.constexpr):
    a = tl.load(x + tl.arange(0, SIZE))
    tl.store(out + tl.arange(0, SIZE), tl.fma(a, a, -a))


def test_fma_on_fp64_rounds_once_or_is_refused() -> None:
    x, out = torch.full((64,), 1 + 2.0**-30, dtype=torch.float64), torch.empty(64).double()
    if triton.__version__ >= "3.9":
        _fma_of[(1,)](x, out, 64)
        assert out.eq(2.0**-30 + 2.0**-60).all()
    else:
        with pytest.raises(NotImplementedError, match="fma on fp64"):
            _fma_of[(1,)](x, out, 64)


# Rounding


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp8e4nv", "fp8e5"])
def test_narrow_rounds_float64_once(name: str) -> None:
    dtype = {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp8e4nv": torch.float8_e4m3fn,
        "fp8e5": torch.float8_e5m2,
    }[name]
    numbers = cases.every_number(dtype)
    low, high = numbers[:-1], numbers[1:]
    middles = (low + high) / 2
    shift = (high - low) * 2.0**-30  # float32 cannot tell these from the midpoints
    x = torch.cat([numbers, middles, middles + shift, middles - shift])
    stored = float_formats.narrow(x.numpy(), name)
    actual = torch.from_numpy(stored.view(f"i{dtype.itemsize}")).view(dtype)
    assert torch.equal(actual.double(), cases.nearest_even(x, dtype).double())


def test_narrow_rounds_large_integers_once() -> None:
    # Just past the midpoint of two bf16, by less than float64 can tell.
    for middle, up in ((2**62 + 2**54, 2**62 + 2**55), (-(2**62) - 2**54, -(2**62) - 2**55)):
        past = middle + (1 if middle > 0 else -1)
        stored = float_formats.narrow(np.array([middle, past], dtype=np.int64), "bf16")
        assert float_formats.widen(stored, "bf16").tolist() == [float(np.sign(middle)) * 2**62, up]


def test_fma_is_rounded_to_odd() -> None:
    x = np.float32(1 + 2**-23)
    total = float_formats.fused_multiply_add(*(np.array([v], np.float32) for v in (x, x, 2.0**40)))
    exact = int(float(x) * 2**23) ** 2 + 2**86  # in units of 2**-46
    spacing = 2 ** (86 - 52)
    below = exact // spacing
    assert exact % spacing != 0
    assert int(total[0] * 2**46) // spacing == below | 1


# Bounds


@triton.jit
def _gather(x, index, out, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    where = tl.load(index + at, mask=at < n)
    tl.store(out + at, tl.load(x + where, mask=at < n), mask=at < n)


def gather(x: torch.Tensor, indices: list[int], out: torch.Tensor | None = None) -> None:
    index = torch.tensor(indices, dtype=torch.int32)
    out = torch.empty(64, dtype=x.dtype) if out is None else out
    _gather[(1,)](x, index, out, len(indices), 64)


def test_out_of_bounds_names_kernel_tensor_and_offset() -> None:
    x = torch.zeros(10)
    gather(x, [0, 9])
    with pytest.raises(IndexError) as caught:
        gather(x, [0, 10, 3])
    message = str(caught.value)
    assert "_gather program (0, 0, 0): load of 4 bytes" in message
    assert "1 of 3 active lanes" in message
    assert "nearest tensor is x, 40 bytes long, touched at byte offset 40" in message
    with pytest.raises(IndexError, match="byte offset -4"):
        gather(x, [-1])


def test_a_store_out_of_bounds_does_not_happen() -> None:
    memory = torch.zeros(128)
    with (
        bounds_checked(out=memory[:63]),
        pytest.raises(IndexError, match=r"store of 4 bytes.*1 of 64 active.*is out, 252 bytes"),
    ):
        _convert[(1,)](torch.ones(64), memory[:63], 64)
    assert not memory.any()


def test_bounds_checked_sees_the_gaps_of_a_view() -> None:
    packed = torch.zeros(4, 3, 2)
    middle = packed[:, 1]  # elements 2, 3 of every 6
    gather(middle, [-2, 2])  # inside of the storage
    with bounds_checked(middle=middle, absent=None):
        gather(middle, [0, 1, 6, 7, 18, 19])
    for index in (-1, 2, 5, 20):
        with pytest.raises(IndexError, match="middle"), bounds_checked(middle=middle):
            gather(middle, [0, index])
    gather(middle, [2])  # switched off again, also after an exception


def test_bounds_checked_allows_overlapping_views_their_extent() -> None:
    crossing = torch.zeros(11).as_strided((3, 3), (2, 3))
    with bounds_checked(crossing=crossing):
        gather(crossing, list(range(11)))
    broadcast = torch.zeros(10)[4:5].expand(8)
    with bounds_checked(broadcast=broadcast):
        gather(broadcast, [0])
        with pytest.raises(IndexError, match="broadcast, 4 bytes"):
            gather(broadcast, [1])


@triton.jit
def _load_words(x, at):
    tl.load(x.to(tl.pointer_type(tl.int32)) + at)


def test_the_last_byte_of_a_lane_must_be_inside() -> None:
    x = torch.zeros(6, dtype=torch.uint8)
    _load_words[(1,)](x, 0)
    with pytest.raises(IndexError, match=r"load of 4 bytes.*byte offset 4"):
        _load_words[(1,)](x, 1)


def test_bounds_checked_refuses_what_it_cannot_check() -> None:
    with (
        pytest.raises(ValueError, match="x is on meta, expected cpu"),
        bounds_checked(x=torch.zeros(1, device="meta")),
    ):
        pass
    with (
        pytest.raises(TypeError, match="x must be a tensor or None, got int"),
        bounds_checked(
            x=3,  # type: ignore[arg-type]
        ),
    ):
        pass


def test_bounds_checked_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert not is_interpreting()
    with (
        pytest.raises(RuntimeError, match="bounds_checked needs Triton's interpreter"),
        bounds_checked(),
    ):
        pass


def test_region_of_a_transposed_tensor_has_no_gaps() -> None:
    region = accesses.Region.of_tensor("x", torch.zeros(2, 3, 5).transpose(0, 2))
    assert region.levels == () and region.end - region.start == 120
    assert accesses.Region.of_tensor("none", torch.zeros(0, 3)).end == 0
