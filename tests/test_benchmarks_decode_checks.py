"""What must be right of decoding before it is timed: every check finds what it is for."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import (
    decode_checks,
    decode_replay,
    parity,
    plan,
)
from benchmarks.decode_cases import (
    DecodeCase,
    decode_cases,
)
from benchmarks.decode_checks import DecodeCheck, EmptyCheck
from benchmarks.decode_replay import GraphCheck, InvarianceCheck
from fastattn.testing.cache_features import CACHE_FEATURES

CPU = torch.device("cpu")
TINY = DecodeCase(2, 96, 4, 2, 16, dtype="float32")


BOTH = (False, True)


def _kind(problem: dict[str, Any]) -> tuple[bool, bool]:
    """Whether its cache is quantized, and whether it is paged."""
    return "stored" in problem, "block_size" in problem


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_every_config_that_dispatch_may_choose_is_checked(chip: str) -> None:
    from fastattn.kernels.attention import decode_config as configs

    for name, dtype in parity.DTYPES.items():
        found = decode_checks.decode_config_checks(chip, [name])
        assert len(found) == len(set(found))
        tiles = {
            (check.config[:4], check.head_dim, *_kind(decode_checks.PROBLEMS[check.problem]))
            for check in found
        }
        for head_dim in (64, 128, 256):
            for rows in (1, 16, 17, 32, 33, 64, 65, 4096):
                for modifiers, quantized, paged, rotary in (
                    (0, False, False, False), (1, False, False, False), (0, True, False, False),
                    (0, False, True, False), (1, False, True, False), (0, True, True, False),
                    (0, False, False, True), (0, False, True, True),
                ):  # fmt: skip
                    tile = configs.decode_tile(
                        chip, head_dim, dtype, rows, modifiers, quantized=quantized, paged=paged,
                        rotary=rotary,
                    )  # fmt: skip
                    shape = (tile.block_m, tile.block_n, tile.num_warps, tile.num_stages)
                    # Chunks of a prompt are paged where their tile is chosen for that.
                    kinds = ((quantized, paged),) if rows <= 32 else ((quantized, x) for x in BOTH)
                    assert any((shape, head_dim, *kind) in tiles for kind in kinds)
        ways = {(c.config[4] > 1, c.config[5], c.head_dim) for c in found}
        assert {(splits, last) for splits, last, _ in ways} == {
            (False, False), (True, False), (True, True),
        }  # fmt: skip


def test_parity_holds_every_row_of_caches_in_every_dtype() -> None:
    found = plan.make_plan("sm_90", list(plan.BUDGETS), 500, quick=False, workers=0)
    # They travel to worker processes.
    assert pickle.loads(pickle.dumps(found.checks)) == found.checks
    names = {(check.name, check.dtype) for check in found.checks if hasattr(check, "name")}
    assert {(row.name, dtype) for row in CACHE_FEATURES for dtype in parity.DTYPES} <= names
    graphs = [check for check in found.checks if isinstance(check, GraphCheck)]
    assert {(x.dtype, x.splits, x.last_combines) for x in graphs} == {
        (dtype, *way)
        for dtype in parity.DTYPES
        for way in ((True, False), (True, True), (False, False))
    }
    empty = [check.case for check in found.checks if isinstance(check, EmptyCheck)]
    assert sorted(map(str, empty)) == sorted(map(str, decode_cases()))
    # What needs kernels of its own is compiled first.
    first = [(c.batch, c.block_size, c.stored, c.seqlen_q) for c in empty]
    assert len(set(first[:20])) == 20


def small_check(problem: str, splits: int, last: bool) -> DecodeCheck:
    config = decode_checks.problem_config("interpreter", 32, "fp32", problem, splits, last)
    return DecodeCheck(config, 32, "fp32", problem, (140, 0), 192, (4, 2))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("problem", "splits", "last"),
    [("one token, paged 16", 4, True), ("5 tokens, int8", 1, False), ("12 tokens", 4, False)],
)
def test_check_of_a_config_runs_that_config(problem: str, splits: int, last: bool) -> None:
    from fastattn.kernels import attention as kernels

    task, launched = small_check(problem, splits, last), []
    launch = kernels.launch_attention_decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kernels,
            "launch_attention_decode",
            lambda *args, **kwargs: (launched.append(args[5]), launch(*args, **kwargs)),
        )
        result = parity.run_check(task, "cpu")
    assert "error" not in result and result["error_ratio"] < 2
    assert [dataclasses.astuple(config) for config in launched] == [task.config]
    assert kernels.select_decode_config.__name__ == "select_decode_config"


@pytest.mark.interpreter
def test_check_of_a_config_finds_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.kernels import attention as kernels

    launch = kernels.launch_attention_decode

    def wrong_launch(*args: Any, **kwargs: Any) -> None:
        launch(*args, **kwargs)
        args[2][0, 0, 1, 3] += 0.01

    monkeypatch.setattr(kernels, "launch_attention_decode", wrong_launch)
    assert "out (max error" in parity.run_check(small_check("one token", 1, False), "cpu")["error"]
    empty = parity.run_check(EmptyCheck(TINY), "cpu")
    assert "1 of 128 elements are not 0" in empty["error"]


def test_a_config_that_is_never_chosen_was_not_tested() -> None:
    unused = decode_replay.chosen(lambda config: config)
    with pytest.raises(RuntimeError, match="did not come to the kernels"), unused:
        pass


SMALL_GRAPH = GraphCheck(
    "fp32", head_dim=16, block_size=16, steps=3, capacity=192, lengths=(90, 14)
)


@pytest.mark.interpreter
def test_replays_are_compared_with_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    task = replace(SMALL_GRAPH, last_combines=True)
    result = parity.run_check(task, "cpu")
    assert "error" not in result and result["max_error"] <= result["allowed_max_error"]
    captured = decode_replay._captured

    def stale(case: Any) -> Callable[[], Tensor]:
        """A graph that does not see the lengths on the device advance."""
        step, first = captured(case), case.kwargs["cache_seqlens"].clone()

        def replay() -> Tensor:
            case.kwargs["cache_seqlens"].copy_(first)
            return step()

        return replay

    monkeypatch.setattr(decode_replay, "_captured", stale)
    assert (
        "replay 1 differs" in parity.run_check(replace(SMALL_GRAPH, splits=False), "cpu")["error"]
    )


@pytest.mark.interpreter
def test_a_shape_that_is_not_split_is_no_check_of_splits() -> None:
    task = replace(SMALL_GRAPH, lengths=(20, 14, 9, 3, 1))
    assert "should split" in parity.run_check(task, "cpu")["error"]


@pytest.mark.interpreter
def test_rows_are_compared_between_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    task = InvarianceCheck("fp32", head_dim=16, capacity=40)
    assert "error" not in parity.run_check(task, "cpu")
    call = decode_replay.attention_with_kv_cache

    def depends_on_batch(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, lse = call(q, *args, **kwargs)
        return out, lse + (1e-6 if q.shape[0] == 3 else 0)

    monkeypatch.setattr(decode_replay, "attention_with_kv_cache", depends_on_batch)
    error = parity.run_check(task, "cpu")["error"]
    assert "lse of row 4 differs between batches of 3 and 16" in error
