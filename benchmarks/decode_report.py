"""The tables of decoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks.tables import RATIO, Row, Table, show_number


def decode_tables(rows: Iterable[Row]) -> Iterator[Table]:
    """A line a step, a column a provider in microseconds, and how fastattn does."""
    by_case: dict[str, dict[str, Row]] = {}
    names: dict[str, None] = {}
    for row in rows:
        if row["stage"] == "decode" and "case" in row:
            by_case.setdefault(row["case"]["label"], {})[row["provider"]] = row
            if row["provider"] != "inputs":
                names[row["provider"]] = None
    cells = []
    for label, found in sorted(by_case.items(), key=lambda item: _order(item[1])):
        own = found.get("fastattn", {})
        cells.append(
            [
                label,
                *(microseconds(found.get(name)) for name in names),
                show_number(_times_thousand(own.get("events_ms")), "{:.1f}"),
                show_number(own.get("gb_per_s"), "{:.0f}"),
                show_number(own.get("percent_of_copy"), "{:.0f}%"),
                show_number(own.get("ratio_to_best_peer"), "{:.2f}x"),
            ]
        )
    title = "decode: us by graph replay (batch x tokens in the cache; 32/8 heads x 128, bf16)"
    columns = ["case", *names, "by events", "K/V GB/s", "of copy", RATIO]
    yield Table(title, columns, cells)


def _order(rows: dict[str, Row]) -> tuple[object, ...]:
    case = next(iter(rows.values()))["case"]
    return (
        case["seqlen_q"],
        case["stored"],
        case["block_size"],
        case["batch"],
        case["length"],
    )


def _times_thousand(value: float | None) -> float | None:
    return None if value is None else value * 1e3


def microseconds(row: Row | None) -> str:
    """The time of a row as a cell; "error" for one that failed, "-" for one that was skipped."""
    if row is None:
        return ""
    if "error" in row:
        return "error"
    return show_number(_times_thousand(row.get("ms")), "{:.1f}") or "-"


def best_configs(found: Iterable[Row]) -> Table:
    """The fastest config of each case of the sweep, and what the last program's joining brings."""
    cells = [
        [
            best["case"],
            best["config_label"],
            best["current_label"] or "none",
            show_number(best["ms"] * 1e3, "{:.1f}"),
            show_number(best["gb_per_s"], "{:.0f}"),
            show_number(best["speedup_over_current"], "{:.3f}x"),
            show_number(best["last_combines_gain"], "{:.3f}x"),
        ]
        for best in found
    ]
    columns = ["case", "best", "today", "us", "K/V GB/s", "gain", "last combines"]
    return Table("Best configs of the decoding sweep", columns, cells)
