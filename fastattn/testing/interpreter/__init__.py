"""Triton's interpreter, made right.

With ``TRITON_INTERPRET=1`` Triton runs kernels on the CPU, in NumPy. As released (3.6 to 3.9) it
is wrong in ways that tests would not show. :func:`repair` mends these:

- bf16 arithmetic, comparisons, constants, reductions and scans (computed on the raw bits);
- casts between float formats (truncated, or rounded twice) and fp8 (infinities, NaN);
- ``tl.dot`` on bf16 and fp8, and fp32 with ``input_precision="tf32"``, the default, which a GPU
  rounds to 10 mantissa bits and the interpreter did not;
- ``tl.fma`` (rounded twice), ``tl.maximum``/``minimum``/``clamp`` with a NaN, ``tl.umulhi`` on
  signed integers, ``tl.histogram`` with values out of range, arithmetic on int1;
- ``tl.device_assert`` (silent), and ``if`` or ``and`` on a block of more than one element (taken
  for true), which now raises;
- loads and stores outside of the storages of the launch's tensor arguments, which now raise;
- lanes masked off in a load without ``other`` (zeros), which now hold NaN, or a large integer;
- loops with a bound known at run time under NumPy 2.4 and later, and bool arguments (they raised).

It refuses, with NotImplementedError, what it cannot mend: arithmetic on fp8, casts that overflow
fp8, fp8e4b15, ``tl.dot_scaled``, atomics on bf16 and fp8, fma on fp64 before Triton 3.9.

Importing this module does not import Triton.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["bounds_checked", "is_interpreting", "repair"]

_OLDEST, _NEWEST = (3, 6), (3, 9)


def is_interpreting() -> bool:
    """Whether a Triton kernel defined now would run in the interpreter.

    Reads what Triton reads: its own setting where it is imported, else ``TRITON_INTERPRET``.
    """
    knobs = getattr(sys.modules.get("triton"), "knobs", None)
    if knobs is not None:
        return bool(knobs.runtime.interpret)
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def repair() -> None:
    """Repair Triton's interpreter in this process. Calling it again does nothing.

    Raises:
        RuntimeError: the faults of the installed Triton are not known (3.6 to 3.9 are), or
            TRITON_INTERPRET was changed after Triton was imported.
        ImportError: Triton is not installed.
    """
    import triton
    import triton.language as tl

    release = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if release is None or not _OLDEST <= (int(release[1]), int(release[2])) <= _NEWEST:
        raise RuntimeError(
            f"the faults of the interpreter of Triton {triton.__version__} are not known: "
            f"expected Triton {_OLDEST[0]}.{_OLDEST[1]} to {_NEWEST[0]}.{_NEWEST[1]}. "
            "Compile the kernels instead (unset TRITON_INTERPRET)."
        )
    # Triton's own helpers chose when it was imported; kernels defined later choose now.
    interpreted = not isinstance(tl.sum, triton.JITFunction)
    if interpreted != is_interpreting():
        raise RuntimeError(
            f"Triton was imported with TRITON_INTERPRET {'on' if interpreted else 'off'}, and it "
            f"is {'off' if interpreted else 'on'} now: set it before the first import of triton"
        )
    from fastattn.testing.interpreter import repairs

    repairs.install()


@contextmanager
def bounds_checked(**tensors: torch.Tensor | None) -> Iterator[None]:
    """Check every access of the kernels launched inside against the elements of tensors.

    A repaired interpreter always checks that accesses stay within the storages of the tensors
    passed to a launch. This is stricter for the tensors named here: only their elements may be
    touched, and neither the rest of their storage nor the gaps of a strided view. Storages that
    none of them lives in (the scratch of a launcher) stay under the usual check.

        with bounds_checked(q=q, k=k, v=v, out=out):
            launch_attention_forward(q, k, v, out)

    Args:
        tensors: CPU tensors by name; None values are left out.

    Raises:
        IndexError: (OutOfBoundsError) an active lane is out of bounds. Names the kernel, the
            program, the nearest tensor and the offset. Raised before memory is touched.
        RuntimeError: Triton does not interpret here.
    """
    require_interpreting("bounds_checked")
    from fastattn.testing.interpreter.accesses import BoundsCheck, named_tensors, observing

    repair()
    with observing(BoundsCheck(named_tensors(tensors))):
        yield


def require_interpreting(what: str) -> None:
    """Raise RuntimeError, naming ``what`` needs it, unless Triton interprets."""
    if not is_interpreting():
        raise RuntimeError(
            f"{what} needs Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported"
        )
