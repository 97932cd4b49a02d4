# mypy: allow-untyped-defs, allow-incomplete-defs
"""The compile report on kernels of this file, some of which are wrong in one known way.

Cases are compiled by workers, which import this file by its path; nothing compiles in pytest's
own process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

triton = pytest.importorskip("triton")
pytest.importorskip("rich")

import torch  # noqa: E402
import triton.language as tl  # noqa: E402

from fastattn.testing.compile_report import (  # noqa: E402
    TARGETS,
    CompileCase,
    Progress,
    Row,
    Target,
    compile_report,
)
from fastattn.testing.compile_report.__main__ import main  # noqa: E402
from fastattn.testing.compile_report.resources import measure  # noqa: E402

FACTORY = f"{Path(__file__).resolve()}:cases"


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, out_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out (M, N) = a (M, K) @ b (K, N), one program."""
    rows = tl.arange(0, M)
    columns = tl.arange(0, N)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + rows[:, None] * K + inner[None, :], mask=inner[None, :] < K, other=0.0)
        b = tl.load(
            b_ptr + inner[:, None] * N + columns[None, :], mask=inner[:, None] < K, other=0.0
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], total.to(out_ptr.dtype.element_ty))


@triton.jit
def _copy_kernel(source_ptr, target_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target_ptr + at, tl.load(source_ptr + at))


@triton.jit
def _refused_kernel(out_ptr, WRONG: tl.constexpr):
    tl.static_assert(WRONG == 0, "this config is refused")
    tl.store(out_ptr, 0.0)


@dataclasses.dataclass(frozen=True)
class Tile:
    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


def _product(tile: Tile, dtype: torch.dtype = torch.bfloat16, K: int = 512, shift: int = 0) -> None:
    """Launch the product; ``shift`` moves ``a`` off its 16-byte alignment by that many elements."""
    a = torch.empty(tile.m * K + shift, dtype=dtype)[shift:]
    b = torch.empty(K, tile.n, dtype=dtype)
    out = torch.empty(tile.m, tile.n, dtype=dtype)
    _product_kernel[(1,)](
        a, b, out, K, M=tile.m, N=tile.n, BLOCK_K=tile.k, PRECISION="ieee",
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _two_launches(tile: Tile) -> None:
    x = torch.empty(1024)
    _copy_kernel[lambda meta: (1,)](x, x, BLOCK=1024)
    _product(tile)


def _refused_then_good(tile: Tile) -> None:
    _refused_kernel[(1,)](torch.empty(1), WRONG=1)
    _product(tile)


def _fails(_: Tile) -> None:
    raise ValueError("q must have 4 dimensions, got 3")


def cases(target: Target) -> Iterator[CompileCase]:
    def case(
        name: str, tile: Tile, launch: Any = _product, *, tensor_cores: bool = True, **kwargs: Any
    ) -> CompileCase:
        return CompileCase(
            "product", name, tile, lambda: launch(tile, **kwargs), expect_tensor_cores=tensor_cores
        )

    good = Tile(64, 64, 32, 4, 2)
    yield case("good", good)
    if target.name != "sm_90":
        return
    yield case("two launches", good, _two_launches)
    yield case("unaligned", good, shift=1)
    # 256 * 256 fp32 sums on 128 threads are 512 registers a thread; there are 255.
    yield case("spilling", Tile(256, 256, 32, 4, 2))
    # 4 stages of (128 + 128) * 128 bf16 are 256 KiB.
    yield case("too much shared", Tile(128, 128, 128, 8, 4))
    scalar = Tile(32, 32, 16, 4, 1)
    yield case("scalar", scalar, dtype=torch.float32)
    yield case("scalar allowed", scalar, dtype=torch.float32, tensor_cores=False)
    yield case("no dot at all", good, lambda _: _copy_kernel[(1,)](*[torch.empty(64)] * 2, 64))
    yield case("refused", good, _refused_then_good)
    yield case("raising", good, _fails)
    yield case("idle", good, lambda _: None)
    yield case("deadly", good, lambda _: os._exit(0))
    yield CompileCase("last", "after the death", "plain text", lambda: _product(good), True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Triton cache of this module's own, empty at first."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("triton")
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        # A caller in the interpreter's mode is the usual case in this suite.
        patch.setenv("TRITON_INTERPRET", "1")
        yield folder


@pytest.fixture(scope="module")
def report(cache: Path) -> tuple[list[Row], list[Progress]]:
    steps: list[Progress] = []
    rows = compile_report(factories=[FACTORY], jobs=2, progress=steps.append)
    return rows, steps


@pytest.fixture(scope="module")
def rows(report: tuple[list[Row], list[Progress]]) -> list[Row]:
    return report[0]


def _of(rows: list[Row], case: str) -> list[Row]:
    return [row for row in rows if row.target == "sm_90" and row.case == case]


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ("sm_80", "HMMA"),
        ("sm_90", "HGMMA"),
        ("sm_100", "UTCHMMA"),
        ("sm_120", "HMMA"),
        ("gfx942", "v_mfma_f32_"),
    ],
)
def test_a_good_config_passes_on_every_target(
    rows: list[Row], target: str, instruction: str
) -> None:
    (row,) = [row for row in rows if row.target == target and row.case == "good"]
    assert row.ok and row.problems == () and row.error is None
    assert (
        row.function == "_product_kernel"
        and row.config == "m=64 n=64 k=32 num_warps=4 num_stages=2"
    )
    assert (row.num_warps, row.num_stages) == (4, 2)
    assert [name.startswith(instruction) and count > 0 for name, count in row.tensor_cores] == [
        True
    ]
    # 64 * 64 fp32 sums on 128 threads (256 on AMD, whose warps have 64) take that many at least,
    # except where they are in tensor memory.
    threads = 4 * TARGETS[target].warp_size
    assert (64 * 64 // threads if target != "sm_100" else 1) <= row.registers <= 255
    assert (row.tensor_memory_columns > 0) == (target == "sm_100")
    assert row.spilled_bytes == row.stack_bytes == 0
    assert 0 < row.shared_bytes <= row.shared_limit == TARGETS[target].shared_limit
    assert row.seconds > 0 and not row.cached
    assert row.dots >= 1 and row.fma_dots == 0


def test_rows_come_in_the_order_of_targets_and_cases(rows: list[Row]) -> None:
    expected = [(name, case.case) for name, target in TARGETS.items() for case in cases(target)]
    assert list(dict.fromkeys((row.target, row.case) for row in rows)) == expected


def test_a_spill_is_flagged(rows: list[Row]) -> None:
    (row,) = _of(rows, "spilling")
    assert row.registers == 255 and row.stack_bytes > 0
    assert row.problems == (f"spills {row.spilled_bytes} B",)
    # Of the 512 sums at least 512 - 255 must be somewhere else, 4 bytes each.
    assert row.spilled_bytes >= 4 * (512 - 255)


def test_too_much_shared_memory_is_flagged(rows: list[Row]) -> None:
    (row,) = _of(rows, "too much shared")
    assert row.shared_bytes >= 4 * (128 + 128) * 128 * 2
    assert row.problems == (f"shared memory {row.shared_bytes} B > {227 * 1024} B",)


def test_missing_tensor_cores_are_flagged_where_they_are_expected(rows: list[Row]) -> None:
    (row,) = _of(rows, "scalar")
    assert row.tensor_cores == () and row.fma_dots == row.dots == 1
    assert row.problems == ("no tensor cores",)
    (allowed,) = _of(rows, "scalar allowed")
    assert allowed.tensor_cores == () and allowed.ok
    (without,) = _of(rows, "no dot at all")
    assert without.dots == 0 and without.problems == ("no tensor cores",)


def test_a_kernel_without_dots_is_let_off_beside_one_that_has_them(rows: list[Row]) -> None:
    copy, product = _of(rows, "two launches")
    assert (copy.function, product.function) == ("_copy_kernel", "_product_kernel")
    assert copy.ok and not copy.expect_tensor_cores and copy.dots == 0
    assert product.ok and product.expect_tensor_cores


def test_the_report_is_about_the_specialization_of_the_tensors(rows: list[Row]) -> None:
    """An unaligned ``a`` cannot be copied to shared memory asynchronously, so it is not staged."""
    (good,), (unaligned,) = _of(rows, "good"), _of(rows, "unaligned")
    assert unaligned.ok
    assert unaligned.shared_bytes < good.shared_bytes


def test_errors_are_rows_and_the_run_goes_on(rows: list[Row]) -> None:
    refused, good = _of(rows, "refused")
    assert refused.function == "_refused_kernel" and good.ok
    assert "this config is refused" in refused.problems[0]
    (raising,) = _of(rows, "raising")
    assert raising.problems == ("error: ValueError: q must have 4 dimensions, got 3",)
    assert raising.error is not None and "_fails" in raising.error  # the traceback
    (idle,) = _of(rows, "idle")
    assert idle.problems == ("error: the launcher launched no kernel",)
    (deadly,) = _of(rows, "deadly")
    assert deadly.problems == ("error: worker died with status 0",)
    (last,) = _of(rows, "after the death")
    assert last.ok and last.config == "plain text"


def test_progress_counts_every_case_once(report: tuple[list[Row], list[Progress]]) -> None:
    total = sum(len(list(cases(target))) for target in TARGETS.values())
    _, steps = report
    assert (steps[-1].done, steps[-1].total) == (total, total)
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert any(step.current == "sm_90 last after the death plain text" for step in steps)


def test_the_command_fails_on_a_spill_and_reads_the_cache_right(
    rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    status = main(
        [
            *("--target", "sm_90", "--case", "good", "--case", "spill", "--kernel", "prod"),
            *("--factory", FACTORY, "--json", str(path)),
        ]
    )
    assert status == 1
    again = [Row.from_dict(values) for values in json.loads(path.read_text())["rows"]]
    first = _of(rows, "good") + _of(rows, "spilling")
    assert [row.cached for row in again] == [True, True]
    for row, before in zip(again, first, strict=True):
        assert dataclasses.replace(row, seconds=0.0, cached=False) == dataclasses.replace(
            before, seconds=0.0, cached=False
        )
    output = capsys.readouterr().out
    lines = [re.split(r"\s*│\s*", line) for line in output.splitlines() if "│ sm_90" in line]
    assert [line[1:4] for line in lines] == [
        ["sm_90", "product", name] for name in ("good", "spilling")
    ]
    good, spilling = first
    shared = f"{good.shared_bytes / 1024:.4g}/227"
    assert lines[0][5:9] == [str(good.registers), "0", "0", shared]
    assert lines[1][5:8] == ["255", str(spilling.spilled_bytes), str(spilling.stack_bytes)]
    assert "2 kernels on sm_90, 1 with problems" in output


def test_the_command_succeeds_on_good_kernels_only(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--target", "sm_90", "--kernel", "last", "--factory", FACTORY]) == 0
    assert "HGMMA" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"targets": ["sm_90", "sm_1"]}, r"targets must be out of .*'sm_90'.*, got \['sm_1'\]"),
        ({"targets": "sm_90"}, "targets must be a collection of names, got the string 'sm_90'"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"factories": ["cases"]}, "factories must be 'module:function', got 'cases'"),
    ],
)
def test_wrong_requests_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_report(**kwargs)


def test_a_factory_that_raises_is_reported_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def cases(target):\n    raise LookupError('no config for ' + target.name)\n")
    assert main(["--target", "sm_90", "--factory", f"{path}:cases"]) == 2
    output = capsys.readouterr()
    assert "cannot list the cases for sm_90: LookupError: no config for sm_90" in output.err
    assert output.out == ""


def test_filters_that_match_nothing_give_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "one.py"
    path.write_text(
        "from fastattn.testing.compile_report import CompileCase\n"
        "def cases(target):\n"
        "    yield CompileCase('forward', 'bf16 d64', 'tile', lambda: None, True)\n"
    )
    command = ["--target", "sm_90", "--factory", f"{path}:cases", "--kernel", "forward"]
    assert main([*command, "--case", "d128"]) == 2
    assert "no case matches" in capsys.readouterr().err
    assert main([*command, "--case", "d128", "--case", "d64"]) == 1  # it launches nothing
    assert "launched no kernel" in capsys.readouterr().out


def test_problems_of_a_row() -> None:
    row = Row("k", "c", "", "sm_100", shared_limit=100, tensor_cores=(("UTCHMMA", 1),), dots=3)
    assert row.ok
    over = dataclasses.replace(row, shared_bytes=101, tensor_memory_columns=513)
    assert over.problems == ("shared memory 101 B > 100 B", "tensor memory 513 > 512 columns")
    mixed = dataclasses.replace(row, fma_dots=1, expect_tensor_cores=True)
    assert mixed.problems == ("1 of 3 dots without tensor cores",)
    assert dataclasses.replace(mixed, expect_tensor_cores=False).ok
    assert Row.from_dict(json.loads(json.dumps(mixed.to_dict()))) == mixed


AMD_ASSEMBLY = """
    v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
    v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
  - .agpr_count:     128
    .private_segment_fixed_size: {stack}
    .sgpr_spill_count: {sgprs}
    .vgpr_count:     384
    .vgpr_spill_count: {vgprs}
"""


@pytest.mark.parametrize(
    ("stack", "sgprs", "vgprs", "spilled", "notes"),
    [
        (0, 0, 0, 0, ()),
        (0, 7, 0, 0, ("7 SGPRs kept in VGPR lanes",)),
        (0, 0, 5, 0, ("5 VGPRs kept in AGPRs",)),
        (24, 0, 5, 20, ()),
        (16, 0, 0, 0, ("16 B of stack without spills",)),
    ],
)
def test_amd_spills_count_where_they_reach_memory(
    stack: int, sgprs: int, vgprs: int, spilled: int, notes: tuple[str, ...]
) -> None:
    assembly = AMD_ASSEMBLY.format(stack=stack, sgprs=sgprs, vgprs=vgprs)
    kernel = SimpleNamespace(
        metadata=SimpleNamespace(num_warps=4, num_stages=2, shared=1024),
        asm={"amdgcn": assembly, "ttgir": ""},
    )
    found = measure(kernel, TARGETS["gfx942"])
    assert (found["spilled_bytes"], found["stack_bytes"], found["notes"]) == (spilled, stack, notes)
    assert found["registers"] == 384
    assert found["tensor_cores"] == (("v_mfma_f32_32x32x8_bf16", 2),)
