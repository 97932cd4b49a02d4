"""The values of the compile report: chips, cases, and what became of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

#: Columns of tensor memory that a thread block can hold on sm_100.
TENSOR_MEMORY_COLUMNS = 512


class CompileReportError(RuntimeError):
    """The report could not be made: the cases could not be listed, or a worker did not start."""


@dataclass(frozen=True)
class Target:
    """A chip to compile for.

    Args:
        name: what ``--target`` takes, e.g. "sm_90".
        backend: Triton's backend, "cuda" or "hip".
        arch: what Triton calls the architecture, e.g. 90 or "gfx942".
        warp_size: threads in a warp (wavefront).
        shared_limit: bytes of shared memory (LDS) that one thread block may use.
        native_mma: regex of the chip's own matrix instructions; a kernel that uses only others
            that the chip also runs, such as HMMA on sm_90, is accepted and noted.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    native_mma: str


#: The limits are "maximum amount of shared memory per thread block" of the CUDA C++ Programming
#: Guide, table "Technical Specifications per Compute Capability", and the 64 KiB LDS of CDNA 3.
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024, r"[HID]MMA"),
        Target("sm_90", "cuda", 90, 32, 227 * 1024, r"[HQI]GMMA"),
        Target("sm_100", "cuda", 100, 32, 227 * 1024, r"UTC\w*MMA"),
        Target("sm_120", "cuda", 120, 32, 99 * 1024, r"[HQOID]MMA"),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024, r"v_mfma"),
    )
}


@dataclass(frozen=True)
class CompileCase:
    """One call of a launcher whose kernels are to be compiled.

    Args:
        kernel: what is compiled, e.g. "attention_forward"; ``--kernel`` matches it.
        case: dtype, head_dim and features, e.g. "bf16 d128 causal"; ``--case`` matches it.
        config: the tile config; a dataclass is shown as "field=value" pairs unless it has a
            ``__str__`` of its own, anything else through ``str``.
        launch: calls the launcher with CPU tensors and this config. Nothing runs and the outputs
            are not written, so it must not depend on their contents.
        expect_tensor_cores: whether every ``tl.dot`` belongs on tensor cores (fp16, bf16). A
            kernel of the case that has no ``tl.dot`` is let off, unless none has one.
    """

    kernel: str
    case: str
    config: object
    launch: Callable[[], object]
    expect_tensor_cores: bool


@dataclass(frozen=True)
class Row:
    """What became of one kernel of one case on one target.

    Args:
        kernel, case, config: of the :class:`CompileCase`, ``config`` as text.
        target: name of the :class:`Target`.
        function: name of the compiled ``@triton.jit`` function, "" if none was reached.
        num_warps, num_stages: the options it was compiled with.
        registers: per thread; on AMD VGPRs, with the AGPRs that share their file.
        spilled_bytes: per thread, spill stores in the code, or spill loads if those are more.
        stack_bytes: per thread, local (scratch) memory; it holds spills and indexed arrays.
        shared_bytes, shared_limit: per thread block: asked for, and what the chip allows.
        tensor_memory_columns: of sm_100's tensor memory; 0 elsewhere.
        tensor_cores: pairs (instruction, how often it stands in the machine code).
        dots: matrix products in the kernel's TritonGPU IR, copies made by pipelining included.
        fma_dots: those among them that are computed with scalar multiply-adds.
        expect_tensor_cores: whether this kernel must use tensor cores.
        seconds: wall time of the compilation, or of reading it from Triton's cache.
        cached: whether Triton's cache had it.
        notes: what is worth knowing and no failure.
        error: text of the compiler's or the launcher's error, else None.
    """

    kernel: str
    case: str
    config: str
    target: str
    function: str = ""
    num_warps: int = 0
    num_stages: int = 0
    registers: int = 0
    spilled_bytes: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    shared_limit: int = 0
    tensor_memory_columns: int = 0
    tensor_cores: tuple[tuple[str, int], ...] = ()
    dots: int = 0
    fma_dots: int = 0
    expect_tensor_cores: bool = False
    seconds: float = 0.0
    cached: bool = False
    notes: tuple[str, ...] = ()
    error: str | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the report fails on this row; empty if it does not."""
        if self.error is not None:
            return (f"error: {headline(self.error)}",)
        found = []
        if self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} B")
        if self.shared_bytes > self.shared_limit:
            found.append(f"shared memory {self.shared_bytes} B > {self.shared_limit} B")
        if self.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
            found.append(
                f"tensor memory {self.tensor_memory_columns} > {TENSOR_MEMORY_COLUMNS} columns"
            )
        if self.expect_tensor_cores and not self.tensor_cores:
            found.append("no tensor cores")
        elif self.expect_tensor_cores and self.fma_dots:
            found.append(f"{self.fma_dots} of {self.dots} dots without tensor cores")
        return tuple(found)

    @property
    def ok(self) -> bool:
        """True if there are no problems."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The fields, and ``problems``, as values that JSON can hold."""
        return {
            **asdict(self),
            "tensor_cores": dict(self.tensor_cores),
            "notes": list(self.notes),
            "problems": list(self.problems),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The inverse of :meth:`to_dict`."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        known["tensor_cores"] = tuple(known.get("tensor_cores", {}).items())
        known["notes"] = tuple(known.get("notes", ()))
        return cls(**known)


@dataclass(frozen=True)
class Progress:
    """How far a report is: ``done`` of ``total`` cases; ``current`` is the one just begun.

    ``total`` grows until every worker has listed its cases.
    """

    done: int
    total: int
    current: str


def headline(error: str) -> str:
    """The part of an error text that says most, in one line."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    if not lines:
        return "unknown"
    # Triton's CompilationErrors open with a position and a listing, and close with the reason.
    return f"{lines[0]} {lines[-1]}" if re.search(r": at \d+:\d+:$", lines[0]) else lines[0]
