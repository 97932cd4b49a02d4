"""The winners of the sweep of tiles become source, and what attention runs with."""

from __future__ import annotations

import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import sweep
from benchmarks.cases import Case

HALF, CASE = torch.bfloat16, Case(4, 4096, 16, 16, 128, causal=True)


def row(case: Case, tile: tuple[int, ...], ms: float) -> dict[str, Any]:
    return {"stage": "sweep", "chip": "sm_90", "case": case.to_dict(), "tile": tile, "ms": ms}


def swept_rows() -> list[dict[str, Any]]:
    long, rows, keys = (
        replace(CASE, seqlen=16384), replace(CASE, part="rows"), replace(CASE, part="keys")
    )  # fmt: skip
    return [
        row(CASE, (128, 64, 8, 3), 1.0),
        row(CASE, (64, 64, 4, 2), 0.9),
        row(CASE, (64, 128, 4, 2), 0.1),  # on one of the two lengths only
        row(long, (128, 64, 8, 3), 4.0),
        row(long, (64, 64, 4, 2), 3.0),
        row(rows, (128, 64, 8, 3), 1.0),
        row(keys, (64, 64, 8, 2, 255), 1.0),  # the rules' own, with a limit of registers
    ]


def test_dispatch_chooses_the_written_winners(tmp_path: Path) -> None:
    from fastattn.kernels.attention import config

    environment = {"device": "TEST", "date": "2000-01-01T00:00", "torch": "0", "triton": "0"}
    document = {"environment": environment, "rows": swept_rows()}
    path = tmp_path / "test-2000.json"
    path.write_text(json.dumps(document))
    assert config.__file__ is not None
    source = Path(shutil.copy(config.__file__, tmp_path / "config.py"))
    before = runpy.run_path(str(source))
    for _ in range(2):  # in place of the empty table, and of its own
        assert sweep.main([str(path), "--write", str(source)]) == 0
    after = runpy.run_path(str(source))
    assert {key: entry.file for key, entry in after["MEASURED_ATTENTION"].items()} == {
        ("sm_90", "forward", "bfloat16", 128, "causal"): "test-2000.json",
        ("sm_90", "rows", "bfloat16", 128, "causal"): "test-2000.json",
    }
    ruled, chosen = (names["select_forward_config"] for names in (before, after))
    for head_dim in (72, 128):
        tile = chosen("sm_90", head_dim, HALF, 4096, 0, True)
        assert str(tile) == "64x64, 4 warps, 2 stages"
        assert str(tile) != str(ruled("sm_90", head_dim, HALF, 4096, 0, True))
    # What was not measured follows the rules.
    for arguments in (
        ("sm_90", 128, HALF, 4096, 0, False),
        ("sm_90", 128, HALF, 4096, 1, True),
        ("sm_90", 128, HALF, 64, 0, True),
        ("sm_90", 64, HALF, 4096, 0, True),
        ("sm_90", 128, torch.float16, 4096, 0, True),
        ("sm_90", 128, torch.float32, 4096, 0, True),
        ("sm_80", 128, HALF, 4096, 0, True),
        ("interpreter", 128, HALF, 4096, 0, True),
    ):
        assert str(chosen(*arguments)) == str(ruled(*arguments))
    ruled, chosen = (names["select_backward_config"] for names in (before, after))
    backward = chosen("sm_90", 128, HALF, 0, False, True)
    assert str(backward.rows) == "128x64, 8 warps, 3 stages"
    assert str(backward.keys) == str(ruled("sm_90", 128, HALF, 0, False, True).keys)
    assert str(chosen("sm_90", 128, HALF, 0, False)) == str(ruled("sm_90", 128, HALF, 0, False))
