"""The tables of sampling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks.decode_report import microseconds
from benchmarks.tables import RATIO, Row, Table, show_number


def sampling_tables(rows: Iterable[Row]) -> Iterator[Table]:
    """A line a draw, a column a provider in microseconds, and how fastattn does."""
    by_case: dict[str, dict[str, Row]] = {}
    names: dict[str, None] = {}
    for row in rows:
        if row["stage"] == "sampling" and "case" in row:
            by_case.setdefault(row["case"]["label"], {})[row["provider"]] = row
            if row["provider"] != "inputs":
                names[row["provider"]] = None
    cells = []
    for label, found in sorted(by_case.items(), key=lambda item: _order(item[1])):
        own = found.get("fastattn", {})
        moved, least = own.get("predicted_bytes"), own.get("case", {}).get("bytes")
        cells.append(
            [
                label,
                *(microseconds(found.get(name)) for name in names),
                show_number(own.get("gb_per_s"), "{:.0f}"),
                show_number(own.get("percent_of_copy"), "{:.0f}%"),
                show_number(moved / least if moved and least else None, "{:.2f}x"),
                show_number(own.get("ratio_to_floor"), "{:.2f}x"),
                show_number(own.get("ratio_to_best_peer"), "{:.2f}x"),
            ]
        )
    title = "sampling: us by graph replay (batch x vocabulary, setting, logits)"
    last = ["logits GB/s", "of copy", "bytes predicted", "of amax", RATIO]
    yield Table(title, ["case", *names, *last], cells)


def _order(rows: dict[str, Row]) -> tuple[object, ...]:
    case = next(iter(rows.values()))["case"]
    return (
        case["dtype"], -case["vocab_size"], case["family"] != "peaked", case["setting"],
        case["batch"],
    )  # fmt: skip


def best_sampling_configs(found: Iterable[Row]) -> Table:
    """The fastest config of each case of the sweep."""
    cells = [
        [
            best["case"],
            best["config_label"],
            best["current_label"] or "none",
            show_number(best["ms"] * 1e3, "{:.1f}"),
            show_number(best["gb_per_s"], "{:.0f}"),
            show_number(best["speedup_over_current"], "{:.3f}x"),
        ]
        for best in found
    ]
    columns = ["case", "best", "today", "us", "logits GB/s", "gain"]
    return Table("Best configs of the sampling sweep", columns, cells)
