"""Kernels run with another config than the one that would be chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def changed_choice(
    module: Any, name: str, change: Callable[[Any], Any], what: str
) -> Iterator[list[Any]]:
    """Within it `module.name(...)` gives `change` of the config that it would choose.

    Args:
        what: is chosen, for the error.

    Yields:
        The configs that were used, one a call.

    Raises:
        RuntimeError: nothing was chosen within it, so nothing of it was tested.
    """
    used: list[Any] = []
    select = getattr(module, name)

    def select_changed(*args: Any, **kwargs: Any) -> Any:
        used.append(change(select(*args, **kwargs)))
        return used[-1]

    setattr(module, name, select_changed)
    try:
        yield used
    finally:
        setattr(module, name, select)
    if not used:
        raise RuntimeError(f"no {what} config was chosen: the call did not come to the kernels")
