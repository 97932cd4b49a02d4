"""Tools to verify and measure attention kernels, for this library's tests and for its users.

| from here | it is |
|---|---|
| ``compare``, ``assert_parity`` | the parity rule: at most twice PyTorch's error against float64 |
| ``make_qkv``, ``make_lengths``, ... | inputs that are the same on every device |
| ``repair``, ``is_interpreting``, ``bounds_checked`` | Triton's interpreter, made right |
| ``WorkMeter``, ``roofline_seconds`` | exact counts of bytes and FLOPs, in the interpreter |
| ``FEATURES``, ``Feature``, ``check_feature`` | a table of calls, a row of one's own, its verdict |
| ``debug`` | checks and poisoned outputs that cost too much for every day |
| ``fastattn.testing.verify`` | parity of every feature, forward and backward, as a function |
| ``fastattn.testing.gradients`` | results and gradients of one call, by name |
| ``fastattn.testing.verify_model`` | parity of a Hugging Face model with and without fastattn |
| ``fastattn.testing.compile_report`` | registers, spills and shared memory, without a GPU |

Importing this package imports nothing else, and never Triton: each name is loaded on first use.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastattn.testing.features import FEATURES, Feature
    from fastattn.testing.inputs import (
        make_cu_seqlens,
        make_lengths,
        make_packed_qkv,
        make_qkv,
        poison,
    )
    from fastattn.testing.interpreter import bounds_checked, is_interpreting, repair
    from fastattn.testing.tolerance import Comparison, assert_parity, compare
    from fastattn.testing.verify import check_feature
    from fastattn.testing.work_meter import WorkMeter, roofline_seconds

__all__ = [
    "Comparison",
    "assert_parity",
    "compare",
    "make_cu_seqlens",
    "make_lengths",
    "make_packed_qkv",
    "make_qkv",
    "poison",
    "bounds_checked",
    "is_interpreting",
    "repair",
    "WorkMeter",
    "roofline_seconds",
    "FEATURES",
    "Feature",
    "check_feature",
    "debug",
]

_HOMES = {
    "tolerance": ("Comparison", "assert_parity", "compare"),
    "inputs": ("make_cu_seqlens", "make_lengths", "make_packed_qkv", "make_qkv", "poison"),
    "interpreter": ("bounds_checked", "is_interpreting", "repair"),
    "work_meter": ("WorkMeter", "roofline_seconds"),
    "features": ("FEATURES", "Feature"),
    "verify": ("check_feature",),
}


def debug() -> AbstractContextManager[None]:
    """Within it, arguments are checked by value too, and outputs start as NaN.

        with fastattn.testing.debug():
            out = model(**inputs)

    The *values* of lengths on a GPU are checked too, for which the host waits for the device, and
    kernels write into outputs full of NaN, so that what one forgets to write shows.
    """
    from fastattn.validation import device_checks

    return device_checks()


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
