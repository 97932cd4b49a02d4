"""What is made of sampling's rows: targets and tables. All times are made up."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import plots, report, targets
from benchmarks.measure import rank
from benchmarks.sampling_cases import SETTINGS, sampling_cases


def timed_rows(
    ours: float = 1.0, chain: float = 5.0, flashinfer: float = 2.0
) -> list[dict[str, Any]]:
    """Rows in which a pass over the logits takes 1, and providers so many times as long."""
    rows = []
    times = {
        "fastattn": ours, "logits.amax": 1.0, "torch sort chain": chain, "FlashInfer": flashinfer
    }  # fmt: skip
    for case in sampling_cases():
        own = []
        for name, factor in times.items():
            row = {"stage": "sampling", "provider": name, "case": case.to_dict()}
            if name == "FlashInfer" and case.has_state:
                own.append({**row, "skipped": "it has no penalties"})
                continue
            ms = factor * case.bytes / 1e9
            row |= {"ms": ms, "ms_p20": ms, "ms_p80": ms, "gb_per_s": 1000 / factor}
            row |= {"role": "floor"} if name == "logits.amax" else {}
            own.append({**row, "percent_of_copy": 90 / factor, "predicted_bytes": 1.1 * case.bytes})
        rank(own)
        rows += own
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[bool | None]:
    return [target["met"] for target in targets.evaluate_sampling(rows)]


def test_targets_of_sampling() -> None:
    assert verdicts([]) == [None] * 3
    assert verdicts(timed_rows()) == [True] * 3
    assert verdicts(timed_rows(ours=1.29)) == [True] * 3
    assert verdicts(timed_rows(ours=1.31)) == [False, True, True]
    assert verdicts(timed_rows(flashinfer=1.0)) == [True, False, True]
    assert verdicts(timed_rows(chain=0.9)) == [True, True, False]
    amax, flashinfer, chain = targets.evaluate_sampling(timed_rows())
    # Rows of many tokens, of as many rows as fill a chip, that are read once.
    assert set(amax["measured"]) == {
        str(case)
        for case in sampling_cases()
        if case.batch >= 64 and case.vocab_size == 128256 and case.family == "peaked"
    }
    assert set(amax["peers"].values()) == {"logits.amax"}
    assert len(chain["measured"]) == 122
    assert set(flashinfer["missing"]) == {str(x) for x in sampling_cases() if x.has_state}


def test_a_failure_of_ours_meets_no_target() -> None:
    rows = timed_rows()
    for row in rows:
        if row["provider"] == "fastattn" and row["case"]["batch"] == 4:
            del row["ms"]
            row["error"] = "wrong"
    assert verdicts(rows) == [True, False, False]


def test_tables_of_sampling(capsys: pytest.CaptureFixture[str]) -> None:
    rows = timed_rows()
    document = {
        "stages": {},
        "summary": {"sampling_targets": targets.evaluate_sampling(rows)},
        "rows": rows,
    }
    found = report.tables(document)
    draws = next(table for table in found if table.title.startswith("sampling: us"))
    assert list(draws.columns[1:5]) == [
        "fastattn", "logits.amax", "torch sort chain", "FlashInfer"
    ]  # fmt: skip
    label = "64 x 128256, top-k + top-p, bf16"
    cells = next(row for row in draws.rows if row[0] == label)
    assert cells[1:] == [
        "16.4", "16.4", "82.1", "32.8", "1000", "90%", "1.10x", "1.00x", "2.00x"
    ]  # fmt: skip
    verdict = next(table for table in found if table.title.startswith("Targets of sampling"))
    assert [row[1] for row in verdict.rows] == ["met"] * 3
    assert "and 90 more" in verdict.rows[1][2]
    assert "24 cases: no peer has a time" in verdict.rows[1][2]
    for plain in (True, False):
        report.print_tables(found, plain=plain)
        assert "top-k + top-p" in capsys.readouterr().out


def test_plot_is_time_against_rows() -> None:
    document = {
        "environment": {"device": "TEST DATA", "torch": "0", "date": "2000-01-01T00:00"},
        "ceilings": {"copy_gb_per_s": 1100.0},
        "rows": timed_rows(),
    }
    figure = plots.FIGURES["sampling"](document)
    assert [axis.get_title() for axis in figure.axes] == list(SETTINGS)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines) == ["fastattn", "logits.amax", "torch sort chain", "FlashInfer", "copy"]
    assert list(lines["fastattn"].get_xdata()) == [1, 4, 16, 64, 256, 512]
    assert lines["fastattn"].get_ydata()[3] == pytest.approx(16.4, rel=0.01)
    assert lines["copy"].get_ydata()[3] == pytest.approx(16.4 / 1.1, rel=0.01)
    assert plots.FIGURES["sampling"]({**document, "rows": []}) is None
