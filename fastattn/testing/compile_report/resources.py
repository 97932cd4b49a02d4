"""Reads what a compiled kernel uses out of its binary, PTX, AMD assembly and TritonGPU IR."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from fastattn.testing.compile_report.rows import Target

# Matrix instructions of every NVIDIA generation: HMMA, IMMA, DMMA, QMMA, OMMA; HGMMA and its
# kin on sm_90; UTCHMMA and its kin on sm_100. UTCBAR and the like are not among them.
_SASS_MMA = re.compile(r"\b(?:UTC)?[HIDQOX]+G?MMA\b")
_AMD_MMA = re.compile(r"\bv_s?mfma[a-z0-9_]*")
_DOT = re.compile(r"\btt\.dot(?:_scaled)?\b|\bttng\.(?:warp_group_dot|tc_gen5_mma(?:_scaled)?)\b")
# A dot that keeps a blocked layout is computed with scalar multiply-adds.
_FMA_DOT = re.compile(r"\btt\.dot\b.*-> tensor<[^>]*#blocked\d*>")


def measure(kernel: Any, target: Target) -> dict[str, Any]:
    """What a ``triton.compiler.CompiledKernel`` uses, as fields of ``Row``."""
    metadata = kernel.metadata
    ir = kernel.asm["ttgir"]
    found: dict[str, Any] = {
        "num_warps": metadata.num_warps,
        "num_stages": metadata.num_stages,
        "shared_bytes": metadata.shared,
        "tensor_memory_columns": getattr(metadata, "tmem_size", None) or 0,
        "dots": len(_DOT.findall(ir)),
        "fma_dots": len(_FMA_DOT.findall(ir)),
    }
    found |= _measure_amd(kernel) if target.backend == "hip" else _measure_nvidia(kernel, target)
    notes = list(found.pop("notes"))
    names = [name for name, _ in found["tensor_cores"]]
    if names and not any(re.match(target.native_mma, name) for name in names):
        notes.append(f"{'/'.join(names)}, not {target.name}'s own instructions")
    if found["stack_bytes"] and not found["spilled_bytes"]:
        notes.append(f"{found['stack_bytes']} B of stack without spills")
    return found | {"notes": tuple(notes)}


def _measure_amd(kernel: Any) -> dict[str, Any]:
    assembly = kernel.asm["amdgcn"]

    def metadata(name: str) -> int:
        match = re.search(rf"^\s+(?:- )?\.{name}:\s+(\d+)$", assembly, re.MULTILINE)
        if match is None:
            raise ValueError(f"no .{name} in the metadata of the assembly")
        return int(match.group(1))

    stack = metadata("private_segment_fixed_size")
    spilled_sgprs = metadata("sgpr_spill_count")
    # Scalar registers are spilled to lanes of a vector register, and reach memory only when
    # those run out; then, as with AGPRs for VGPRs, the private segment shows it.
    notes = [f"{spilled_sgprs} SGPRs kept in VGPR lanes"] if spilled_sgprs else []
    vgprs = metadata("vgpr_spill_count")
    if vgprs and not stack:
        notes.append(f"{vgprs} VGPRs kept in AGPRs")
    return {
        "registers": metadata("vgpr_count"),
        "spilled_bytes": 4 * vgprs if stack else 0,
        "stack_bytes": stack,
        "tensor_cores": _count(_AMD_MMA, assembly),
        "notes": notes,
    }


def _measure_nvidia(kernel: Any, target: Target) -> dict[str, Any]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", str(cubin))
        # A function that is not inlined has a line of its own.
        registers = max(int(n) for n in re.findall(r"\bREG:(\d+)", usage))
        stack = max(int(n) for n in re.findall(r"\bSTACK:(\d+)", usage))
        tensor_cores = _count(_SASS_MMA, sass)
        spilled, notes = 0, []
        # Spills live on the stack, so without one there are none. With wgmma, ptxas has more to
        # say: it waits after each product where registers run short.
        if stack or any("GMMA" in name for name, _ in tensor_cores):
            log = _ptxas_log(kernel, target, Path(folder))
            counts = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
            if not counts:
                raise ValueError(f"ptxas reports no spills, not even 0:\n{log}")
            spilled = max(map(int, counts))
            notes = re.findall(r"Potential Performance Loss: (.*?)(?: in the function| *$)", log,
                               re.MULTILINE)  # fmt: skip
    return {
        "registers": registers,
        "spilled_bytes": spilled,
        "stack_bytes": stack,
        "tensor_cores": tensor_cores,
        "notes": list(dict.fromkeys(notes)),
    }


def _ptxas_log(kernel: Any, target: Target, folder: Path) -> str:
    """What ``ptxas -v`` says of the PTX, called as Triton 3.6's ``CUDABackend.make_cubin`` does."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    metadata = kernel.metadata
    ptx = folder / "kernel.ptx"
    ptx.write_text(kernel.asm["ptx"])
    options = ["-lineinfo"]
    if knobs.compilation.disable_line_info:
        options.append("-suppress-debug-info")
    if not metadata.enable_fp_fusion:
        options.append("--fmad=false")
    if knobs.nvidia.disable_ptxas_opt:
        options += ["--opt-level", "0"]
    options += (metadata.ptx_options or "").split()
    gpu = f"--gpu-name={sm_arch_from_capability(target.arch)}"
    return _run(
        get_ptxas(target.arch).path,
        *options,
        "-v",
        gpu,
        str(ptx),
        "-o",
        str(folder / "again.cubin"),
    )


def _count(pattern: re.Pattern[str], text: str) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(Counter(pattern.findall(text)).items()))


def _run(*command: str) -> str:
    """Output and diagnostics of a command together; raises if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with status {done.returncode}:\n{done.stdout}")
    return done.stdout
