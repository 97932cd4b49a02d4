"""What the device can do now: the rate of a large copy, and of a large matrix product."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from fastattn.profiling.clocks import make_clock
from fastattn.profiling.memory import available_bytes
from fastattn.profiling.results import Ceilings

_COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
_MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
_SAMPLES = 7


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Copies memory larger than any cache, and multiplies two square matrices of `dtype`.

    The median of seven each, after two that are not counted. A copy's bytes are those that it
    reads and those that it writes. Where memory is short, the copy is smaller.
    """
    size = _COPY_BYTES[device.type]
    free = available_bytes(device)
    if free is not None:
        size = max(2**20, min(size, free // 8))
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copy_ms = _median_ms(device, lambda: target.copy_(source))
    side = _MATMUL_SIZE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    matmul_ms = _median_ms(device, lambda: torch.mm(left, right, out=out))
    return Ceilings(
        copy_gb_per_s=2 * size / copy_ms / 1e6,
        matmul_tflops=2 * side**3 / matmul_ms / 1e9,
        dtype=str(dtype).removeprefix("torch."),
        copy_mib=size / 2**20,
        matmul_size=side,
    )


def best(one: Ceilings, other: Ceilings) -> Ceilings:
    """The higher rates of two measurements of the same: a ceiling is what can be reached."""
    return replace(
        one,
        copy_gb_per_s=max(one.copy_gb_per_s, other.copy_gb_per_s),
        matmul_tflops=max(one.matmul_tflops, other.matmul_tflops),
    )


@torch.no_grad()
def _median_ms(device: torch.device, run: Callable[[], object]) -> float:
    for _ in range(2):
        run()
    clock = make_clock(device)
    clock.mark()
    for _ in range(_SAMPLES):
        run()
        clock.mark()
    return statistics.median(clock.intervals_ms())
