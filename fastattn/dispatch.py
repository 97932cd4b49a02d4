"""Which implementation serves a problem, and every reason why the others do not.

An implementation asked for by name runs or raises with its reasons. Only "auto" chooses: the first
of its candidates without an objection. Nothing falls back in silence; `explain` prints the choice.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastattn import reference, sdpa
from fastattn.biases import ALiBi, Bias, JoinedBias
from fastattn.problem import AttentionProblem
from fastattn.testing.interpreter import is_interpreting

# What "auto" tries, in order. On CPU, kernels run only in Triton's interpreter, which is for
# verification: they must be asked for by name.
AUTO = {"cuda": ("triton", "sdpa", "reference"), "cpu": ("sdpa", "reference")}

listeners: list[Callable[[str, AttentionProblem], None]] = []
"""Called with the implementation's name and the problem on each run; how reports are made."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention: what it cannot do, and how it runs."""

    name: str
    unsupported_reasons: Callable[[AttentionProblem], list[str]]
    run: Callable[[AttentionProblem], tuple[Tensor, Tensor | None]]


def _triton_reasons(problem: AttentionProblem) -> list[str]:
    reasons = triton_environment_reasons(problem.q.device)
    if torch.is_grad_enabled() and _alibi_requires_grad(problem.bias):
        reasons.append("ALiBi slopes have no gradient in the kernel, and they require grad")
    if problem.has_tangents:
        reasons.append("forward-mode differentiation is not in the kernel (a tensor has a tangent)")
    elif _in_function_transform():
        reasons.append("the transforms of torch.func (grad, vmap, ...) are not in the operator")
    if problem.q.dtype == torch.float64:
        reasons.append("float64 is not in the kernel, which takes float16, bfloat16 and float32")
    return reasons


def _alibi_requires_grad(bias: Bias | None) -> bool:
    parts = bias.parts if isinstance(bias, JoinedBias) else (bias,)
    return any(isinstance(part, ALiBi) and part.slopes.requires_grad for part in parts)


def _in_function_transform() -> bool:
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def triton_environment_reasons(device: torch.device) -> list[str]:
    """Why no Triton kernel can run on `device` here; empty if they can."""
    return list(_environment_reasons(device.type, device.index))


def _environment_reasons(device_type: str, index: int | None) -> tuple[str, ...]:
    if not _has_triton():
        return ("Triton is not installed",)
    if device_type == "cpu" and not is_interpreting():
        return (
            "tensors are on the CPU, where kernels run only in Triton's interpreter: set "
            "TRITON_INTERPRET=1 before fastattn is used",
        )
    if device_type not in ("cpu", "cuda"):
        return (f"kernels run on CUDA and ROCm devices, not on {device_type}",)
    if device_type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(index)
        if major < 8:
            return (f"kernels need compute capability 8.0 or newer, this GPU has {major}.{minor}",)
    return ()


# torch.compile cannot look into Triton's settings. This is what assume_constant_result does, which
# would import torch._dynamo, and with it Triton.
_environment_reasons._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _has_triton() -> bool:
    # Found without importing it: `import fastattn` must work, and be quick, without Triton.
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


def _run_triton(problem: AttentionProblem) -> tuple[Tensor, Tensor | None]:
    from fastattn import torch_ops

    return torch_ops.attention_forward(problem)


def _run_sdpa(problem: AttentionProblem) -> tuple[Tensor, Tensor | None]:
    return sdpa.run(problem), None


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation("triton", _triton_reasons, _run_triton),
        Implementation("sdpa", sdpa.unsupported_reasons, _run_sdpa),
        Implementation("reference", lambda problem: [], reference.run),
    )
}


def select(problem: AttentionProblem, impl: str = "auto") -> Implementation:
    """The implementation that serves `problem`.

    Raises:
        ValueError: `impl` is unknown.
        NotImplementedError: `impl` was named and cannot serve the problem; lists every reason.
    """
    if impl == "auto":
        for name in auto_candidates(problem.q.device):
            if not IMPLEMENTATIONS[name].unsupported_reasons(problem):
                return IMPLEMENTATIONS[name]
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {['auto', *IMPLEMENTATIONS]}, got {impl!r}")
    chosen = IMPLEMENTATIONS[impl]
    if reasons := chosen.unsupported_reasons(problem):
        listed = "".join(f"\n  - {reason}" for reason in reasons)
        raise NotImplementedError(
            f"impl={impl!r} cannot serve this call:{listed}\n"
            'impl="auto" takes one that can; impl="reference" computes everything.'
        )
    return chosen


def auto_candidates(device: torch.device) -> tuple[str, ...]:
    """Names that "auto" tries on a device, in order."""
    return AUTO.get(device.type, AUTO["cpu"])


def run(problem: AttentionProblem, impl: str) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp (None or empty where the implementation has none)."""
    chosen = select(problem, impl)
    for listener in listeners:
        listener(chosen.name, problem)
    return chosen.run(problem)


@dataclass(frozen=True)
class Explanation:
    """What would serve a call, and why not the others. `str()` of it reads well."""

    chosen: str
    impl: str
    problem: str
    reasons: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.problem, f"impl={self.impl!r} -> {self.chosen}"]
        for name, reasons in self.reasons.items():
            if name == self.chosen:
                lines.append(f"  {name}: runs")
            for reason in reasons:
                lines.append(f"  {name}: no, {reason}")
            if not reasons and name != self.chosen:
                lines.append(f'  {name}: could run, with impl="{name}"')
        return "\n".join(lines)


def explain(problem: AttentionProblem, impl: str = "auto") -> Explanation:
    """What `select` would choose, with every implementation's reasons; runs nothing."""
    reasons = {
        name: implementation.unsupported_reasons(problem)
        for name, implementation in IMPLEMENTATIONS.items()
    }
    try:
        chosen = select(problem, impl).name
    except NotImplementedError:
        chosen = "nothing: raises NotImplementedError"
    return Explanation(chosen, impl, describe(problem), reasons)


def describe(problem: AttentionProblem) -> str:
    """One line about a problem: shapes, dtype, device, mask and bias."""

    def names(value: Any) -> str:
        parts = getattr(value, "parts", (value,))
        return " & ".join(type(part).__name__ for part in parts)

    q, k, v = problem.q, problem.k, problem.v
    text = f"q {tuple(q.shape)} k {tuple(k.shape)} v {tuple(v.shape)} "
    text += f"{str(q.dtype).removeprefix('torch.')} on {q.device}"
    if problem.mask is not None:
        text += f", mask {names(problem.mask)}"
    if problem.bias is not None:
        text += f", bias {names(problem.bias)}"
    if problem.softcap:
        text += f", softcap {problem.softcap}"
    if problem.sinks is not None:
        text += ", sinks"
    if problem.dropout is not None:
        text += f", dropout {problem.dropout.p}"
    return text
