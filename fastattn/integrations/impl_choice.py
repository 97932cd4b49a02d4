"""Which implementation the drop-in functions run: those whose own signature has no `impl`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fastattn.dispatch import IMPLEMENTATIONS

_impl = "auto"


def chosen_impl() -> str:
    """What `use_impl` was given; "auto" outside it."""
    return _impl


@contextlib.contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Within it, drop-in functions run this implementation: "auto", "triton", "sdpa", "reference".

    One that is named runs or raises, as in `fastattn.attention`. It holds for
    `fastattn.integrations.sdpa` and `fastattn.integrations.flash_attn`, in all threads.

    Raises:
        ValueError: `impl` is unknown.
    """
    global _impl
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"impl must be one of {['auto', *IMPLEMENTATIONS]}, got {impl!r}")
    before, _impl = _impl, impl
    try:
        yield
    finally:
        _impl = before
