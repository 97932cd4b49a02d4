"""What is made of rows: speeds, ratios, the best tiles, tables, plots. All numbers are made up."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cases, plots, report, sweep, targets
from benchmarks.cases import Case
from benchmarks.measure import rank, speed_fields
from benchmarks.progress import Progress


def sweep_row(tile: tuple[int, ...], seqlen: int, ms: float | None, current: bool = False) -> dict:
    case = Case(1, seqlen, 16, 16, 128)
    row = {"stage": "sweep", "chip": "sm_90", "tile": tile, "current": current}
    row |= {"provider": f"fastattn {tile}", "case": case.to_dict()}
    return {**row, "error": "wrong"} if ms is None else {**row, "ms": ms, "tflops": 1 / ms}


def test_speed_is_set_beside_the_ceiling_that_binds() -> None:
    case = Case(1, 4096, 16, 16, 128)
    ceilings = {"matmul_tflops": 100.0, "copy_gb_per_s": 1000.0}
    ideal_ms = case.flops / 100e12 * 1e3
    row = speed_fields(case, 2 * ideal_ms, ceilings)
    assert row["bound"] == "compute"
    assert row["tflops"] == pytest.approx(50) and row["percent_of_ceiling"] == pytest.approx(50)
    row = speed_fields(replace(case, seqlen=16), 1.0, ceilings)
    assert row["bound"] == "memory"
    assert row["percent_of_ceiling"] == pytest.approx(100 * 4 * 16 * 16 * 128 * 2 / 1e12 * 1e3)


def test_rows_are_ranked_against_the_best_peer() -> None:
    rows = [
        {"provider": name, "ms": ms} for name, ms in (("fastattn", 2.0), ("a", 3.0), ("b", 1.0))
    ]
    rows.append({"provider": "c", "error": "wrong"})
    rank(rows)
    assert [row.get("ratio_to_best_peer") for row in rows] == [0.5, pytest.approx(1 / 3), 1.0, None]


def test_best_tile_is_best_over_all_complete_shapes() -> None:
    today, steady, specialist, wrong = (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3), (4, 4, 4, 4)
    rows = [
        *(sweep_row(today, n, 2.0, current=True) for n in (1024, 4096, 16384)),
        *(sweep_row(steady, n, 1.0) for n in (1024, 4096)),
        sweep_row(specialist, 1024, 0.5),
        sweep_row(specialist, 4096, 9.0),
        sweep_row(wrong, 1024, 0.1),
        sweep_row(wrong, 4096, None),
    ]
    (best,) = sweep.best_tiles(rows)
    assert best["tile"] == steady and best["seqlens"] == [1024, 4096]  # 16384 was cut short
    assert best["current_tile"] == today and best["speedup_over_current"] == pytest.approx(2.0)
    assert best["tflops"] == {"1024": 1.0, "4096": 1.0}
    assert wrong not in best["runners_up"]
    assert sweep.best_tiles([sweep_row(wrong, 1024, None)]) == []


def training_rows(flash: float = 1.5, efficient: float = 4.0, factor: float = 1.0) -> list[dict]:
    """Training, where fastattn takes `factor` ms, and peers so many ms."""
    rows: list[dict[str, object]] = []
    for case in cases.backward_cases():
        own = []
        times = {"fastattn": factor, "SDPA FLASH": flash, "SDPA EFFICIENT": efficient}
        for name, ms in times.items():
            row = {"stage": "backward", "provider": name, "case": case.to_dict()}
            if name == "SDPA FLASH" and "bias" in case.feature:
                own.append({**row, "skipped": "it takes no mask and no bias"})
                continue
            row |= {"ms": ms, "ms_p20": 0.95 * ms, "ms_p80": 1.1 * ms}
            row |= {"tflops": case.flops / ms / 1e9, "forward_ms": ms / 4, "backward_ms": ms * 0.75}
            own.append(row)
        rank(own)
        rows += own
    return rows


def made_up_document() -> dict[str, object]:
    """Test data: smooth curves that no device measured."""
    rows: list[dict[str, object]] = []
    for case in cases.forward_cases():
        own = []
        for place, name in enumerate(("fastattn", "SDPA FLASH", "SDPA CUDNN")):
            tflops = (50 + 10 * place) * (1 + math.log2(case.seqlen / 256) / 6)
            ms = case.flops / tflops / 1e9
            timing = {"ms": ms, "ms_p20": 0.95 * ms, "ms_p80": 1.1 * ms, "tflops": tflops}
            row = {"stage": "forward", "provider": name, "case": case.to_dict(), **timing}
            own.append({**row, "percent_of_ceiling": tflops})
        rank(own)
        rows += own
    rows += training_rows()
    for seqlen in (1024, 4096):
        for block in (32, 64, 128):
            tile = (128, block, 8, 3)
            rows.append(sweep_row(tile, seqlen, block / seqlen, current=block == 64))
    rows.append({"stage": "forward", "provider": "odd", "case": rows[0]["case"], "error": "wrong"})
    return {
        "environment": {"device": "TEST DATA", "torch": "0", "date": "2000-01-01T00:00"},
        "ceilings": {"matmul_tflops": 130.0},
        "stages": {"forward": {"status": "done", "budget_seconds": 1.0, "seconds": 1.0}},
        "summary": {
            "best_tiles": sweep.best_tiles(row for row in rows if "tile" in row),
            "targets": targets.evaluate(rows),
        },
        "rows": rows,
    }


def test_plots_are_drawn_from_the_file_alone(tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = tmp_path / "made-up.json"
    path.write_text(json.dumps(made_up_document()))
    assert plots.main([str(path), "--folder", str(tmp_path / "plots")]) == 0
    names = sorted(found.name for found in (tmp_path / "plots").iterdir())
    assert names == ["made-up-backward.png", "made-up-forward.png", "made-up-sweep.png"]
    for name in names[:2]:
        image = imread(tmp_path / "plots" / name)
        assert image.shape[0] > 600 and image.std() > 0.05  # not blank
    figure = plots.FIGURES["forward"](made_up_document())
    assert [axis.get_title() for axis in figure.axes] == [
        f"bfloat16, head_dim {head_dim}, {mask}"
        for head_dim in (64, 128)
        for mask in ("bidirectional", "causal")
    ]
    training = plots.FIGURES["backward"](made_up_document())
    line = next(line for line in training.axes[3].lines if line.get_label() == "fastattn")
    # Not the causal case of grouped heads, which has a length of this panel.
    assert list(line.get_xdata()) == [512, 1024, 2048, 4096, 8192, 16384]
    line = next(line for line in figure.axes[0].lines if line.get_label() == "fastattn")
    assert list(line.get_xdata()) == [512, 1024, 2048, 4096, 8192, 16384]
    assert line.get_ydata()[1] == pytest.approx(50 * (1 + 2 / 6))


def test_plots_refuse_what_they_cannot_draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "empty.json"
    assert plots.main([str(path)]) == 2
    path.write_text(json.dumps({**made_up_document(), "rows": []}))
    assert plots.main([str(path)]) == 1
    assert "no timed rows" in capsys.readouterr().err


def test_tables_show_speeds_ratios_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    found = report.tables(made_up_document())
    forward = next(table for table in found if table.title.startswith("forward"))
    assert list(forward.columns) == ["case", "fastattn", "SDPA FLASH", "SDPA CUDNN", "odd",
                                     "of ceiling", "vs best peer"]  # fmt: skip
    cells = next(row for row in forward.rows if row[0] == "16 x 1024, 32 x 64")
    assert cells[1:4] == ["67", "80", "93"] and cells[-1] == "0.71x"
    training = next(table for table in found if table.title.startswith("backward"))
    cells = next(row for row in training.rows if row[0] == "8 x 2048, 16 x 64, T5 bias")
    assert cells[-1] == "4.00x" and cells[list(training.columns).index("SDPA FLASH")] == "-"
    apart = next(table for table in found if table.title.startswith("Forward and backward"))
    assert ["4 x 4096, 16 x 128", "SDPA FLASH", "0.375", "1.125", "1.500", ""] in apart.rows
    verdicts = next(table for table in found if table.title.startswith("Targets"))
    assert [row[1] for row in verdicts.rows] == ["met"] * 4
    assert "N=4096: 1.50x SDPA FLASH" in verdicts.rows[0][2]
    best = next(table for table in found if table.title.startswith("Best"))
    assert best.rows[0][1:4] == ["128x32 w8 s3", "128x64 w8 s3", "2.000x"]
    errors = next(table for table in found if table.title == "Errors")
    assert errors.rows == [["forward", "odd", "1", "wrong"]]
    for plain in (True, False):
        report.print_tables(found, plain=plain)
        text = capsys.readouterr().out
        assert "16 x 1024, 32 x 64" in text and "128x32 w8 s3" in text and "0.71x" in text


def test_progress_shows_failures_and_the_budget() -> None:
    stream = io.StringIO()
    progress = Progress(500, stream, every=1000)
    progress.stage("parity", 170)
    progress.row("good", True)
    progress.row("bad", False)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and "/500 s]" in lines[0] and "170 s" in lines[0]
    assert lines[1].endswith("bad")
