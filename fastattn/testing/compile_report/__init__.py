"""Compile every kernel config ahead of time, without a GPU, and say what came out.

    python -m fastattn.testing.compile_report --target sm_90 --kernel forward

For each case the real launcher is called with CPU tensors, in a worker process where Triton's
launch is replaced by a compilation. The JIT itself derives signature, specialization and
divisibility from those tensors, so the report is about exactly the kernel that it would launch.

For each kernel the command prints registers, spilled bytes, stack, shared memory against the
chip's limit and the tensor-core instructions in the machine code. The exit status is 1 where a
config spills, asks for more shared memory than the chip has, multiplies fp16 or bf16 without
tensor cores, or does not compile; 2 where the request itself is wrong.

The same as a function: ``compile_report(targets=["sm_90"])`` returns a list of :class:`Row`.

Compiled kernels are kept in Triton's own cache (``TRITON_CACHE_DIR``), so a second report is
quicker. The caller may be in Triton's interpreter mode, or have no Triton imported at all: the
workers are started with ``TRITON_INTERPRET`` unset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from fastattn.testing.compile_report.rows import (
    TARGETS,
    CompileCase,
    CompileReportError,
    Progress,
    Row,
    Target,
)

__all__ = [
    "DEFAULT_FACTORIES",
    "TARGETS",
    "CompileCase",
    "CompileReportError",
    "Progress",
    "Row",
    "Target",
    "compile_report",
]

#: Functions ``(target: Target) -> Iterable[CompileCase]`` that list the cases, "module:function".
DEFAULT_FACTORIES: tuple[str, ...] = (
    "fastattn.testing.compile_cases:attention_cases",
    "fastattn.testing.compile_cases:attention_backward_cases",
    "fastattn.testing.compile_decode_cases:attention_decode_cases",
    "fastattn.testing.compile_sample_cases:sample_cases",
)


def compile_report(
    targets: Iterable[str] | None = None,
    *,
    kernel: str | Sequence[str] = (),
    case: str | Sequence[str] = (),
    factories: Sequence[str] = DEFAULT_FACTORIES,
    jobs: int = 2,
    progress: Callable[[Progress], None] | None = None,
) -> list[Row]:
    """Compile the cases for each target and return one row per kernel, in the order of the cases.

    Args:
        targets: names out of :data:`TARGETS`; None for all of them.
        kernel: keep the cases whose ``kernel`` contains this, or any of these.
        case: the same for ``case``.
        factories: where the cases come from: functions ``(Target) -> Iterable[CompileCase]``
            named "package.module:function" or "path/to/file.py:function". The workers call them,
            and a worker that takes over from one that died calls them again: they must list the
            same cases each time.
        jobs: how many worker processes may run at once.
        progress: called after each step, from several threads but never at the same time.

    Returns:
        Rows in the order of ``targets`` and, within one, of the cases. A case that fails to
        compile, or takes the compiler down with it, is a row with ``error`` set. Empty if the
        filters match nothing.

    Raises:
        ValueError: unknown target, ``jobs`` below 1, or a factory not of the form above.
        CompileReportError: a factory cannot be imported or raises.
    """
    from fastattn.testing.compile_report.pool import run_workers

    if isinstance(targets, str):
        raise ValueError(f"targets must be a collection of names, got the string {targets!r}")
    names = list(dict.fromkeys(TARGETS if targets is None else targets))
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        raise ValueError(f"targets must be out of {sorted(TARGETS)}, got {unknown}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    for factory in factories:
        if not all(factory.rpartition(":")[::2]):
            raise ValueError(f"factories must be 'module:function', got {factory!r}")
    request = {
        "factories": list(factories),
        "kernel": [kernel] if isinstance(kernel, str) else list(kernel),
        "case": [case] if isinstance(case, str) else list(case),
    }
    return run_workers(names, request, jobs, progress)
