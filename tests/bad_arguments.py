"""What tests of bad calls share: a call must raise the error that names argument and value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

Case = tuple[dict[str, Any], type[Exception], tuple[str, ...]]
"""Changed arguments, the error, and what the message must say: the argument, the value that it had,
and what was expected."""


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def made(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments with those made that are given as functions: values that check themselves."""
    return {name: value() if callable(value) else value for name, value in given.items()}


def check(call: Callable[[], Any], error: type[Exception], words: tuple[str, ...]) -> None:
    """Calls, and expects an error of exactly this type whose message holds all the words."""
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    for word in words:
        assert word in str(raised.value)
