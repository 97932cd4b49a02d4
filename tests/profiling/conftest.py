"""Tiny shapes under names of their own, for `random=`."""

from __future__ import annotations

import pytest

from fastattn.profiling.presets import PRESETS
from tests.profiling.tiny import TINY


@pytest.fixture(autouse=True)
def _tiny_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shapes in TINY.items():
        monkeypatch.setitem(PRESETS, f"tiny {name}", shapes)
