"""What is made of decoding's rows: best configs, targets, tables, plots. All times are made up."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    decode_checks,
    decode_sweep,
    plots,
    report,
    targets,
)
from benchmarks.decode_accuracy import DecodeOracle
from benchmarks.decode_cases import (
    BATCHES_AND_LENGTHS,
    DecodeCase,
    make_decode_inputs,
)
from benchmarks.measure import rank
from fastattn.kernels.attention.config import TileConfig
from fastattn.kernels.measured import Measured
from tests.bad_arguments import check

CPU = torch.device("cpu")
TINY = DecodeCase(2, 96, 4, 2, 16, dtype="float32")


# --- the sweep


@pytest.mark.interpreter
def test_sweep_tries_todays_config_first_and_around_it() -> None:
    case = DecodeCase(2, 1024, 4, 2, 64)
    today, *others = (decode_checks.as_config(x) for x in decode_sweep.candidates(case, CPU))
    assert dataclasses.astuple(today) == decode_sweep.current_config(case, CPU)
    assert today.num_splits == 2
    tiles = [x for x in others if (x.num_splits, x.last_combines) == (2, False)]
    assert len(tiles) == 16 and all(x.block_n % 64 == 0 for x in tiles)
    splits = [(x.num_splits, x.last_combines) for x in others if x not in tiles]
    assert splits == [(2, True), (1, False), (4, False), (4, True), (8, False), (8, True)]


@pytest.mark.interpreter
@pytest.mark.parametrize("case", [TINY, replace(TINY, block_size=16, seqlen_q=2)], ids=str)
def test_a_config_runs_by_the_launcher(case: DecodeCase) -> None:
    inputs = make_decode_inputs(case, CPU)
    config = decode_checks.as_config(decode_sweep.current_config(case, CPU))
    for splits, last in ((1, False), (3, True), (3, False)):
        values = dataclasses.astuple(replace(config, num_splits=splits, last_combines=last))
        run = decode_sweep.config_provider(values).prepare(inputs)
        for _ in range(2):  # counters are zeros again
            assert DecodeOracle(inputs).check(run()).passed


def sweep_row(case: DecodeCase, ms: float | None, current: bool = False, **config: Any) -> Any:
    from fastattn.kernels.attention.decode_config import DecodeConfig

    fields = {"block_m": 16, "block_n": 64, "num_warps": 4, "num_stages": 3, "num_splits": 8}
    values = dataclasses.astuple(DecodeConfig(**{**fields, **config}))
    row = {"stage": "decode-sweep", "chip": "sm_90", "case": case.to_dict(), "current": current}
    row |= decode_sweep.config_fields(values)
    return {**row, "error": "x"} if ms is None else {**row, "ms": ms, "gb_per_s": 1 / ms}


def swept_rows() -> list[dict[str, Any]]:
    first, second = DecodeCase(1, 8192), DecodeCase(16, 8192)
    rows = []
    for case, factor in ((first, 1.0), (second, 2.0)):
        rows += [
            sweep_row(case, 1.0 * factor, current=True),
            sweep_row(case, 0.8 * factor, last_combines=True),
            sweep_row(case, 0.7 * factor, num_splits=16),
            sweep_row(case, 0.9 * factor, block_n=128),
            sweep_row(case, None, block_n=256),
        ]
    rows.append(sweep_row(first, 0.5, num_warps=8))  # on one of them only
    return rows


def test_best_of_the_sweep_and_what_joining_brings() -> None:
    first, second = decode_sweep.best_configs(swept_rows())
    assert first["config"]["num_warps"] == 8 and first["speedup_over_current"] == 2.0
    assert second["config"]["num_splits"] == 16 and second["ms"] == 1.4
    assert second["last_combines_gain"] == pytest.approx(1.25)
    assert decode_sweep.best_configs([sweep_row(DecodeCase(1, 1024), None)]) == []


def test_fastest_tile_and_fastest_splits_are_tried_together() -> None:
    rows = [row for row in swept_rows() if row["case"]["batch"] == 1]
    joint = decode_checks.as_config(decode_sweep.joint_config(rows))
    assert (joint.num_warps, joint.num_splits, joint.last_combines) == (8, 16, False)
    done = sweep_row(DecodeCase(1, 8192), 0.4, num_warps=8, num_splits=16)
    assert decode_sweep.joint_config([*rows, done]) is None
    assert decode_sweep.joint_config([row for row in rows if not row["current"]]) is None


def swept_file(folder: Path, rows: list[dict[str, Any]]) -> str:
    environment = {"device": "TEST", "date": "2000-01-01T00:00", "torch": "0", "triton": "0"}
    path = folder / "test-2000.json"
    path.write_text(json.dumps({"environment": environment, "rows": rows}))
    return str(path)


def test_winner_becomes_source_that_names_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decode_sweep.main([swept_file(tmp_path, swept_rows())]) == 0
    table = capsys.readouterr().out
    assert "benchmarks/results/test-2000.json" in table
    assert "85% of the fastest on average over 2 cases" in table
    names: dict[str, Any] = {}
    exec(table, {"ProblemClass": tuple, "Measured": Measured, "TileConfig": TileConfig}, names)
    # Not the tile that is best on one case and was not timed on the other.
    key = ("sm_90", "bfloat16", 128, "contiguous")
    assert names["MEASURED_DECODE"] == {key: Measured(TileConfig(16, 64, 4, 3), "test-2000.json")}
    assert decode_sweep.main([swept_file(tmp_path, [])]) == 1
    assert decode_sweep.main([str(tmp_path / "no")]) == 2


@pytest.fixture
def config_source(tmp_path: Path) -> Path:
    """A copy of decode_config.py to write to."""
    from fastattn.kernels.attention import decode_config

    assert decode_config.__file__ is not None
    return Path(shutil.copy(decode_config.__file__, tmp_path / "config.py"))


def test_dispatch_chooses_the_written_winners(config_source: Path) -> None:
    case = DecodeCase(1, 8192)
    paged = replace(case, block_size=16, stored="int8")
    rows = [sweep_row(case, 1.0, block_n=32, num_warps=8, num_stages=5)]
    rows.append(sweep_row(replace(paged, head_dim=256), 1.0, block_n=16, num_stages=4))
    before = runpy.run_path(str(config_source))
    path = swept_file(config_source.parent, rows)
    for _ in range(2):  # in place of the empty table, and of its own
        assert decode_sweep.main([path, "--write", str(config_source)]) == 0
    after = runpy.run_path(str(config_source))
    assert config_source.read_text().count("MEASURED_DECODE: ") == 1
    assert (
        len(after["MEASURED_DECODE"]) == 2 and before["MEASURED_DECODE"] != after["MEASURED_DECODE"]
    )

    half, few = (torch.bfloat16, 4), {"quantized": False, "paged": False, "rotary": False}
    ruled, chosen = before["decode_tile"], after["decode_tile"]
    for head_dim in (65, 128):
        tile = dataclasses.astuple(chosen("sm_90", head_dim, *half, 0, **few))
        assert (
            tile
            == (16, 32, 8, 5, None)
            != dataclasses.astuple(ruled("sm_90", head_dim, *half, 0, **few))
        )
    stored = {**few, "quantized": True, "paged": True}
    assert dataclasses.astuple(chosen("sm_90", 256, *half, 0, **stored))[:4] == (16, 16, 4, 4)
    # What was not measured follows the rules.
    for chip, head_dim, dtype, num_rows, count, flags in (
        ("sm_80", 128, torch.bfloat16, 4, 0, few),
        ("sm_90", 64, torch.bfloat16, 4, 0, few),
        ("sm_90", 128, torch.float16, 4, 0, few),
        ("sm_90", 128, torch.float32, 4, 0, few),
        ("sm_90", 128, torch.bfloat16, 17, 0, few),
        ("sm_90", 128, torch.bfloat16, 4, 1, few),
        ("sm_90", 128, torch.bfloat16, 4, 0, stored),
        ("interpreter", 128, torch.bfloat16, 4, 0, few),
    ):
        arguments = (chip, head_dim, dtype, num_rows, count)
        assert chosen(*arguments, **flags) == ruled(*arguments, **flags)


def test_a_measured_tile_is_the_one_that_a_step_runs_with(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.kernels.attention import decode_config as configs

    monkeypatch.setattr(configs, "chip_of", lambda device: "sm_120")
    monkeypatch.setattr(configs, "program_slots", lambda device: 264)
    case = DecodeCase(4, 8192, block_size=16)
    ruled = decode_sweep.current_config(case, CPU)
    key = ("sm_120", "bfloat16", 128, "paged")
    measured = Measured(TileConfig(16, 64, 8, 4), "some.json")
    monkeypatch.setitem(configs.MEASURED_DECODE, key, measured)
    chosen = decode_sweep.current_config(case, CPU)
    assert chosen[:4] == (16, 64, 8, 4) != ruled[:4]
    assert decode_sweep.current_config(replace(case, block_size=0), CPU)[:4] == (*ruled[:3], 2)


KEY = ("sm_90", "bfloat16", 128, "paged")
GOOD = {"block_m": 16, "block_n": 64, "num_warps": 4, "num_stages": 3}


@pytest.mark.parametrize(
    ("key", "changes", "words"),
    [
        (("sm_99", *KEY[1:]), {}, ("chip must be one of", "'sm_99'")),
        (("sm_90", "float32", 128, "paged"), {}, ("dtype must be one of", "'float32'")),
        (("sm_90", "bfloat16", 96, "paged"), {}, ("head_dim must be one of", "got 96")),
        (("sm_90", "bfloat16", 128, "paged 16"), {}, ("cache must be one of", "'paged 16'")),
        (KEY[:3], {}, ("must be (chip, dtype, head_dim, cache)",)),
        (KEY, {"block_m": 32}, ("block_m must be one of (16,), got 32",)),
        (KEY, {"block_n": 48}, ("block_n must be one of (16, 32, 64, 128, 256), got 48",)),
        (KEY, {"block_n": 64.0}, ("block_n must be one of", "got 64.0")),
        (KEY, {"num_warps": 3}, ("num_warps must be one of (1, 2, 4, 8, 16), got 3",)),
        (KEY, {"num_warps": True}, ("num_warps must be one of", "got True")),
        (KEY, {"num_stages": 0}, ("num_stages must be one of", "got 0")),
        (KEY, {"max_registers": 255}, ("only ['block_m'", "may differ")),
    ],
)
def test_a_bad_measured_tile_is_refused(
    key: Any, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    from fastattn.kernels.attention.decode_config import DECODE_SPACE

    table = {KEY: Measured(TileConfig(**GOOD), "a.json")}
    DECODE_SPACE.check_table(table)
    table = {**table, key: Measured(TileConfig(**{**GOOD, **changes}), "a.json")}
    check(
        lambda: DECODE_SPACE.check_table(table), ValueError, (f"MEASURED_DECODE[{key!r}]: ", *words)
    )


@pytest.mark.parametrize("values", [{"block_m": 16}, {**GOOD, "block_k": 16}])
def test_a_config_has_all_of_its_fields_and_no_others(values: dict[str, Any]) -> None:
    from fastattn.kernels.attention.decode_config import DECODE_SPACE

    words = ("must have ['block_m', 'block_n', 'num_warps', 'num_stages']", str(list(values)))
    check(lambda: DECODE_SPACE.make_config(values), ValueError, words)


def test_what_dispatch_would_refuse_is_not_written(
    config_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = config_source.read_text()
    path = swept_file(config_source.parent, [sweep_row(DecodeCase(1, 8192), 1.0, num_warps=3)])
    assert decode_sweep.main([path, "--write", str(config_source)]) == 2
    assert "num_warps must be one of (1, 2, 4, 8, 16), got 3" in capsys.readouterr().err
    assert config_source.read_text() == before
    config_source.write_text("A = 1\n")
    path = swept_file(config_source.parent, swept_rows())
    assert decode_sweep.main([path, "--write", str(config_source)]) == 2
    assert "must hold a table MEASURED_DECODE" in capsys.readouterr().err


# --- targets, tables and plots, from rows that no device measured


def timed_rows(ours: float = 1.0, sdpa: float = 1.2, **kwargs: Any) -> list[dict[str, Any]]:
    """Rows in which a cache takes so many milliseconds for each 100 MB."""
    rows = []
    for batch, length in BATCHES_AND_LENGTHS:
        for block_size in (0, 16):
            case = DecodeCase(batch, length, block_size=block_size, **kwargs)
            own = []
            for name, factor in (("fastattn", ours), ("SDPA FLASH", sdpa)):
                row = {"stage": "decode", "provider": name, "case": case.to_dict()}
                ms = factor * case.bytes / 1e8
                if name != "fastattn" and block_size:
                    own.append({**row, "skipped": "it takes no block table"})
                else:
                    timing = {"ms": ms, "ms_p20": 0.9 * ms, "ms_p80": 1.1 * ms, "events_ms": ms}
                    row |= {"gb_per_s": 100 / factor, "percent_of_copy": 90 / factor}
                    own.append({**row, **timing})
            rank(own)
            rows += own
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[bool | None]:
    return [target["met"] for target in targets.evaluate_decoding(rows)]


def test_targets_of_decoding() -> None:
    assert verdicts([]) == [None] * 3
    assert verdicts(timed_rows()) == [True, True, True]
    assert verdicts(timed_rows(ours=1.1)) == [False, True, True]
    # Paged rows are set beside SDPA on the contiguous cache.
    assert verdicts(timed_rows(sdpa=0.9)) == [True, False, False]
    assert verdicts(timed_rows(sdpa=1.0)) == [True, True, True]
    for other in ({"seqlen_q": 4}, {"stored": "int8"}):
        assert verdicts(timed_rows(**other)) == [None] * 3
    (bandwidth, contiguous, paged) = targets.evaluate_decoding(timed_rows())
    assert "1 x 8k, contiguous" not in bandwidth["measured"]  # 34 MB
    assert bandwidth["measured"]["1 x 32k, contiguous"] == pytest.approx(0.9)
    assert contiguous["peers"]["1 x 8k, contiguous"] == "SDPA FLASH"
    assert paged["measured"]["1 x 8k, paged 16"] == pytest.approx(1.2)


def test_a_failure_of_ours_meets_no_target() -> None:
    rows = timed_rows()
    for row in rows:
        if row["provider"] == "fastattn" and row["case"]["label"] == "16 x 8k, contiguous":
            del row["ms"], row["percent_of_copy"]
            row["error"] = "wrong"
    found = targets.evaluate_decoding(rows)
    assert [target["met"] for target in found] == [False, False, True]
    assert found[0]["missing"] == {"16 x 8k, contiguous": "fastattn failed"}


def made_up_document() -> dict[str, Any]:
    rows = timed_rows()
    return {
        "environment": {"device": "TEST DATA", "torch": "0", "date": "2000-01-01T00:00"},
        "ceilings": {"copy_gb_per_s": 110.0},
        "stages": {},
        "summary": {
            "decode_targets": targets.evaluate_decoding(rows),
            "best_configs": decode_sweep.best_configs(swept_rows()),
        },
        "rows": [*rows, *swept_rows()],
    }


def test_tables_of_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    found = report.tables(made_up_document())
    steps = next(table for table in found if table.title.startswith("decode: us"))
    assert list(steps.columns[:3]) == ["case", "fastattn", "SDPA FLASH"]
    assert steps.rows[0] == [
        "1 x 1k, contiguous", "41.9", "50.3", "41.9", "100", "90%", "1.20x",
    ]  # fmt: skip
    paged = next(row for row in steps.rows if row[0] == "1 x 1k, paged 16")
    assert paged[2] == "-" and paged[-1] == ""
    verdict = next(table for table in found if table.title.startswith("Targets of decoding"))
    assert [row[1] for row in verdict.rows] == ["met"] * 3
    best = next(table for table in found if table.title.startswith("Best configs"))
    assert best.rows[1][5:] == ["1.429x", "1.250x"]
    for plain in (True, False):
        report.print_tables(found, plain=plain)
        assert "16 x 8k, contiguous" in capsys.readouterr().out


def test_plot_is_time_against_tokens() -> None:
    figure = plots.FIGURES["decode"](made_up_document())
    assert [axis.get_title() for axis in figure.axes] == [
        f"{layout}, batch {batch}"
        for layout in ("contiguous", "paged 16")
        for batch in (1, 4, 16, 64)
    ]
    line = next(line for line in figure.axes[0].lines if line.get_label() == "fastattn")
    assert list(line.get_xdata()) == [1024, 8192, 32768, 131072]
    assert line.get_ydata()[0] == pytest.approx(41.9, rel=0.01)
    floor = next(line for line in figure.axes[0].lines if line.get_label() == "copy")
    assert floor.get_ydata()[0] == pytest.approx(41.9 / 1.1, rel=0.01)
    assert plots.FIGURES["decode"]({**made_up_document(), "rows": []}) is None
