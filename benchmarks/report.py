"""Tables from a results document: plain text, or rich's where it is installed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.decode_report import best_configs, decode_tables
from benchmarks.parity import show_config
from benchmarks.sampling_report import best_sampling_configs, sampling_tables
from benchmarks.tables import RATIO, Row, Table, is_text, show_number

# Stages with a table of speeds, and what they time.
_SPEEDS = {"forward": "", "backward": "forward + backward, 3.5x forward's FLOPs, ", "features": ""}

_MOST_SHOWN = 8  # figures of a target of sampling, which has a hundred cases


def first_line(error: str, most: int = 110) -> str:
    """The first line of an error, cut to a length that a table bears."""
    line = error.strip().partition("\n")[0]
    return line if len(line) <= most else line[:most] + " ..."


def show_row(row: Row) -> str:
    """One line about a row."""
    where = row["case"]["label"] if "case" in row else ""
    text = f"{where:<28} {row['provider']:<22}"
    if "ms" not in row:
        return f"{text} {first_line(row['error']) if 'error' in row else row['skipped']}"
    text += f" {row['ms']:9.4f} ms"
    for name, unit in (("tflops", "TFLOP/s"), ("gb_per_s", "GB/s"), ("percent_of_ceiling", "%")):
        text += f" {row[name]:7.1f} {unit}" if name in row else ""
    return text


def tables(document: Row) -> list[Table]:
    """All tables of a document that have rows."""
    rows = document["rows"]
    found = [
        _checks(rows),
        *_speeds(rows),
        _backward_alone(rows),
        *decode_tables(rows),
        *sampling_tables(rows),
        _targets("training", document["summary"].get("targets", [])),
        _targets("decoding", document["summary"].get("decode_targets", [])),
        _targets("sampling", document["summary"].get("sampling_targets", [])),
        _overhead(rows),
        _best_tiles(document["summary"].get("best_tiles", [])),
        best_configs(document["summary"].get("best_configs", [])),
        best_sampling_configs(document["summary"].get("best_sampling_configs", [])),
        _errors(rows),
        _stages(document["stages"]),
    ]
    return [table for table in found if table.rows]


def _checks(rows: Iterable[Row]) -> Table:
    counts: dict[tuple[str, str, str], list[bool]] = {}
    for row in rows:
        if "check" in row:
            key = (row["stage"], row["check"], row["dtype"])
            counts.setdefault(key, []).append(row["passed"])
    cells = [[*key, str(sum(passed)), str(len(passed))] for key, passed in counts.items()]
    return Table("Checks", ["stage", "what", "dtype", "right", "of"], cells)


def _speeds(rows: Iterable[Row]) -> Iterable[Table]:
    """A table a stage: a line a case, a column a provider, and how fastattn compares."""
    for stage, what in _SPEEDS.items():
        by_case: dict[str, dict[str, Row]] = {}
        names: dict[str, None] = {}
        for row in rows:
            if row["stage"] == stage and "case" in row:
                by_case.setdefault(row["case"]["label"], {})[row["provider"]] = row
                names[row["provider"]] = None
        cells = []
        for label in sorted(by_case, key=lambda label: _order(by_case[label])):
            own = by_case[label].get("fastattn", {})
            cells.append(
                [
                    label,
                    *(_speed(by_case[label].get(name)) for name in names),
                    show_number(own.get("percent_of_ceiling"), "{:.0f}%"),
                    show_number(own.get("ratio_to_best_peer"), "{:.2f}x"),
                ]
            )
        title = f"{stage}: {what}TFLOP/s (batch x seqlen, heads x head_dim)"
        yield Table(title, ["case", *names, "of ceiling", RATIO], cells)


def _backward_alone(rows: Iterable[Row]) -> Table:
    """Forward and backward of fastattn and of its best peer apart, in milliseconds."""
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        if "backward_ms" in row:
            by_case.setdefault(row["case"]["label"], []).append(row)
    cells = []
    for label in sorted(by_case, key=lambda label: _order({"": by_case[label][0]})):
        own = [row for row in by_case[label] if row["provider"].startswith("fastattn")]
        peers = [row for row in by_case[label] if not row["provider"].startswith("fastattn")]
        best = sorted(peers, key=lambda row: row["ms"])[:1]
        for row in own + best:
            times = [f"{row[name]:.3f}" for name in ("forward_ms", "backward_ms", "ms")]
            speed = show_number(row.get("backward_tflops"), "{:.0f}")
            cells.append([label, row["provider"], *times, speed])
    columns = ["case", "who", "forward ms", "backward ms", "both ms", "backward TFLOP/s"]
    return Table("Forward and backward apart: fastattn and the best peer", columns, cells)


def _targets(subject: str, found: Iterable[Row]) -> Table:
    cells = []
    for target in found:
        # The nearest to its bound first: of many shapes it is what matters.
        shown = sorted(target["measured"], key=lambda shape: target["measured"][shape])
        if subject == "training":
            shown = list(target["measured"])
        measured = [
            f"{shape}: {target['measured'][shape]:.2f}x {target['peers'][shape]}" for shape in shown
        ]
        shapes = [name for name in target["missing"] if "," not in name or subject == "decoding"]
        measured += [f"{shape}: {target['missing'][shape]}" for shape in shapes]
        if subject == "sampling":
            measured = [*measured[:_MOST_SHOWN], *_counted(target, len(measured) - _MOST_SHOWN)]
        verdict = {True: "met", False: "NOT met", None: "not measured"}[target["met"]]
        cells.append([target["target"], verdict, ", ".join(measured)])
    title = f"Targets of {subject}, from this run's rows"
    return Table(title, ["target", "verdict", "what"], cells)


def _counted(target: Row, left: int) -> list[str]:
    """How many figures more there are, and for how many cases there are none, by reason."""
    counts: dict[str, int] = {}
    for reason in target["missing"].values():
        counts[reason] = counts.get(reason, 0) + 1
    found = [f"and {left} more"] if left > 0 else []
    return found + [f"{count} cases: {reason}" for reason, count in counts.items()]


def _order(rows: dict[str, Row]) -> tuple[Any, ...]:
    case = next(iter(rows.values()))["case"]
    return (case["feature"], case["head_dim"], case["causal"], case["seqlen"])


def _speed(row: Row | None) -> str:
    if row is None:
        return ""
    if "error" in row:
        return "error"
    return f"{row['tflops']:.0f}" if "tflops" in row else "-"


def _overhead(rows: Iterable[Row]) -> Table:
    cells = [
        [
            row["provider"],
            show_number(row["ms"] * 1e3, "{:.1f}"),
            show_number(row["ms_p80"] * 1e3, "{:.1f}"),
        ]
        for row in rows
        if row["stage"] == "overhead" and "ms" in row
    ]
    return Table("Host time of one call", ["who", "us", "us, p80"], cells)


def _best_tiles(found: Iterable[Row]) -> Table:
    cells = []
    for best in found:
        speeds = []
        for seqlen, speed in best["tflops"].items():
            today = show_number(best["current_tflops"].get(seqlen), "{:.0f}") or "-"
            speeds.append(f"N={seqlen}: {speed:.0f}/{today}")
        current = best["current_tile"]
        cells.append(
            [
                f"{best['chip']} {best['part']} D{best['head_dim']}"
                + (" causal" if best["causal"] else ""),
                show_config(best["tile"]),
                show_config(current) if current else "none",
                show_number(best["speedup_over_current"], "{:.3f}x"),
                ", ".join(speeds),
            ]
        )
    title = "Best tiles of the sweep (block_m x block_n, warps, stages)"
    return Table(title, ["for", "best", "today", "gain", "TFLOP/s, best/today"], cells)


def _errors(rows: Iterable[Row]) -> Table:
    """Errors that are alike once, with how often they came."""
    counts: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if "error" in row:
            first = first_line(row["error"])
            what = row.get("provider") or row.get("name", "")
            counts[(row["stage"], what, first)] = counts.get((row["stage"], what, first), 0) + 1
    cells = [[stage, what, str(count), text] for (stage, what, text), count in counts.items()]
    return Table("Errors", ["stage", "who", "times", "error"], cells)


def _stages(stages: dict[str, Row]) -> Table:
    cells = [
        [
            name,
            stage["status"],
            show_number(stage.get("seconds"), "{:.0f}"),
            show_number(stage["budget_seconds"], "{:.0f}"),
            str(stage.get("not_reached", "")),
        ]
        for name, stage in stages.items()
    ]
    return Table("Stages", ["stage", "status", "s", "budget s", "not reached"], cells)


def print_tables(found: Iterable[Table], *, plain: bool = False) -> None:
    """Prints tables, with colours where rich is installed."""
    try:
        if plain:
            raise ImportError
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text
    except ImportError:
        for table in found:
            print(f"\n{table}")
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    for table in found:
        shown = RichTable(title=table.title, title_justify="left")
        for place, name in enumerate(table.columns):
            left = is_text(place, name)
            shown.add_column(name, justify="left" if left else "right", overflow="fold")
        for cells in table.rows:
            shown.add_row(
                *(
                    Text(cell, style=_style(name, cell))
                    for name, cell in zip(table.columns, cells, strict=True)
                )
            )
        console.print(shown)


def _style(column: str, cell: str) -> str:
    if column == RATIO and cell:
        return "green" if float(cell.removesuffix("x")) >= 1 else "red"
    return "red" if cell in ("error", "failed", "NOT met") else ""
