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

from fastattn import cache_storage, reference, sdpa
from fastattn.biases import ALiBi, Bias, JoinedBias
from fastattn.cache_problem import CacheProblem
from fastattn.merge_problem import MergeProblem
from fastattn.problem import AttentionProblem
from fastattn.sampling import cpu as sampling_cpu
from fastattn.sampling import reference as sampling_reference
from fastattn.sampling.problem import SampleProblem
from fastattn.testing.interpreter import is_interpreting

# What "auto" tries, in order. On CPU, kernels run only in Triton's interpreter, which is for
# verification: they must be asked for by name.
AUTO = {
    "cuda": ("triton", "sdpa", "reference"),
    "cpu": ("sdpa", "cpu", "reference"),
}

listeners: list[Callable[[str, Any], None]] = []
"""Called with the implementation's name and the problem each time that something is attended; how
reports are made."""

Problem = AttentionProblem | CacheProblem | MergeProblem | SampleProblem


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation: what it cannot do, and how it runs."""

    name: str
    unsupported_reasons: Callable[[Any], list[str]]
    run: Callable[[Any], Any]


def _triton_reasons(problem: AttentionProblem) -> list[str]:
    reasons = triton_environment_reasons(problem.device)
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


def _triton_cache_reasons(problem: CacheProblem | MergeProblem | SampleProblem) -> list[str]:
    reasons = triton_environment_reasons(problem.device)
    if _in_function_transform():
        reasons.append("the transforms of torch.func (grad, vmap, ...) are not in the operator")
    if problem.dtype == torch.float64:
        reasons.append("float64 is not in the kernel, which takes float16, bfloat16 and float32")
    return reasons


def _run_triton(problem: AttentionProblem) -> tuple[Tensor, Tensor | None]:
    from fastattn import torch_ops

    return torch_ops.attention_forward(problem)


def _run_triton_cache(problem: CacheProblem) -> tuple[Tensor, Tensor | None]:
    from fastattn import torch_decode_ops

    return torch_decode_ops.attention_with_kv_cache(problem)


def _run_triton_append(problem: CacheProblem) -> None:
    from fastattn import torch_decode_ops

    torch_decode_ops.append_to_kv_cache(problem)


def _run_triton_merge(problem: MergeProblem) -> tuple[Tensor, Tensor]:
    from fastattn import torch_decode_ops

    return torch_decode_ops.merge_attention_states(
        problem.out_a, problem.lse_a, problem.out_b, problem.lse_b
    )


def _run_triton_sample(problem: SampleProblem) -> tuple[Tensor | None, ...]:
    from fastattn import torch_sample_ops

    return torch_sample_ops.sample(problem)


def _run_sdpa(problem: AttentionProblem) -> tuple[Tensor, Tensor | None]:
    return sdpa.run(problem), None


def _run_sdpa_cache(problem: CacheProblem) -> tuple[Tensor, Tensor | None]:
    return sdpa.run_with_cache(problem), None


def _no_reasons(problem: Problem) -> list[str]:
    return []


def _table(*implementations: Implementation) -> dict[str, Implementation]:
    return {implementation.name: implementation for implementation in implementations}


IMPLEMENTATIONS = _table(
    Implementation("triton", _triton_reasons, _run_triton),
    Implementation("sdpa", sdpa.unsupported_reasons, _run_sdpa),
    Implementation("reference", _no_reasons, reference.run),
)
"""Those of attention without a cache."""

CACHE_IMPLEMENTATIONS = _table(
    Implementation("triton", _triton_cache_reasons, _run_triton_cache),
    Implementation("sdpa", sdpa.unsupported_reasons, _run_sdpa_cache),
    Implementation("reference", _no_reasons, reference.run_with_cache),
)
"""Those of attention with a cache."""

APPEND_IMPLEMENTATIONS = _table(
    Implementation("triton", _triton_cache_reasons, _run_triton_append),
    Implementation("reference", _no_reasons, cache_storage.append),
)
"""Those of appending to a cache."""

MERGE_IMPLEMENTATIONS = _table(
    Implementation("triton", _triton_cache_reasons, _run_triton_merge),
    Implementation("reference", _no_reasons, reference.merge),
)
"""Those of merging two attention states."""

SAMPLE_IMPLEMENTATIONS = _table(
    Implementation("triton", _triton_cache_reasons, _run_triton_sample),
    Implementation("cpu", sampling_cpu.unsupported_reasons, sampling_cpu.run),
    Implementation("reference", _no_reasons, sampling_reference.run),
)
"""Those of drawing tokens."""


def implementations_of(problem: Problem) -> dict[str, Implementation]:
    """The implementations of the operation that a problem states."""
    if isinstance(problem, AttentionProblem):
        return IMPLEMENTATIONS
    if isinstance(problem, MergeProblem):
        return MERGE_IMPLEMENTATIONS
    if isinstance(problem, SampleProblem):
        return SAMPLE_IMPLEMENTATIONS
    return APPEND_IMPLEMENTATIONS if problem.q is None else CACHE_IMPLEMENTATIONS


def select(problem: Problem, impl: str = "auto") -> Implementation:
    """The implementation that serves `problem`.

    Raises:
        ValueError: `impl` is unknown.
        NotImplementedError: `impl` was named and cannot serve the problem; lists every reason.
    """
    implementations = implementations_of(problem)
    if impl == "auto":
        for name in auto_candidates(problem.device):
            candidate = implementations.get(name)
            if candidate is not None and not candidate.unsupported_reasons(problem):
                return candidate
    if impl not in implementations:
        raise ValueError(f"impl must be one of {['auto', *implementations]}, got {impl!r}")
    chosen = implementations[impl]
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


def run(problem: Problem, impl: str) -> Any:
    """What the implementation gives: output and log-sum-exp (None or empty where it has none)."""
    chosen = select(problem, impl)
    attends = isinstance(problem, AttentionProblem) or (
        isinstance(problem, CacheProblem) and problem.q is not None
    )
    if attends:
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


def explain(problem: Problem, impl: str = "auto") -> Explanation:
    """What `select` would choose, with every implementation's reasons; runs nothing."""
    reasons = {
        name: implementation.unsupported_reasons(problem)
        for name, implementation in implementations_of(problem).items()
    }
    try:
        chosen = select(problem, impl).name
    except NotImplementedError:
        chosen = "nothing: raises NotImplementedError"
    return Explanation(chosen, impl, describe(problem), reasons)


def describe(problem: Problem) -> str:
    """One line about a problem: shapes, dtype, device, mask and bias."""
    if isinstance(problem, MergeProblem):
        return f"two states out {_operand(problem.out_a)}"
    if isinstance(problem, SampleProblem):
        return f"logits {_operand(problem.logits)}"
    if isinstance(problem, CacheProblem):
        text = _describe_cache(problem)
    else:
        q, k, v = problem.q, problem.k, problem.v
        text = f"q {tuple(q.shape)} k {tuple(k.shape)} v {_operand(v)}"
    if problem.mask is not None:
        text += f", mask {_part_names(problem.mask)}"
    if problem.bias is not None:
        text += f", bias {_part_names(problem.bias)}"
    if problem.softcap:
        text += f", softcap {problem.softcap}"
    if problem.sinks is not None:
        text += ", sinks"
    if isinstance(problem, AttentionProblem) and problem.dropout is not None:
        text += f", dropout {problem.dropout.p}"
    return text


def _operand(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _part_names(value: Any) -> str:
    parts = getattr(value, "parts", (value,))
    return " & ".join(type(part).__name__ for part in parts)


def _describe_cache(problem: CacheProblem) -> str:
    cache = problem.cache
    text = "" if problem.q is None else f"q {_operand(problem.q)}, "
    for name, values, scale in (("k", cache.k, cache.k_scale), ("v", cache.v, cache.v_scale)):
        text += f"{name}_cache {tuple(values.shape)}"
        if scale is not None:
            per = "head" if scale.dim() == 1 else "token"
            text += f" {str(values.dtype).removeprefix('torch.')} scaled per {per}"
        text += ", "
    text += f"blocks of {cache.block_size}" if cache.is_paged else "contiguous"
    if problem.k is not None:
        text += f", k {_operand(problem.k)}"
    if problem.rotary is not None:
        text += f", rotary {problem.rotary.rotary_dim}"
    return text + (", batch_invariant" if problem.batch_invariant else "")
