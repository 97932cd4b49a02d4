"""The command ``python -m fastattn.testing.compile_report``; see the package for what it does."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastattn.testing.compile_report import (
    DEFAULT_FACTORIES,
    TARGETS,
    CompileReportError,
    Progress,
    Row,
    compile_report,
)


def format_table(rows: Sequence[Row]) -> Any:
    """A ``rich.table.Table`` of the rows, failures in red."""
    from rich.table import Table

    table = Table(title="Compile report", header_style="bold")
    for name in ("target", "kernel", "case", "config"):
        table.add_column(name, overflow="fold")
    for name in ("regs", "spill B", "stack B", "shared KiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("tensor cores", overflow="fold")
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("result", overflow="fold")
    functions: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        functions.setdefault(_case_of(row), set()).add(row.function)
    previous = None
    for row in rows:
        if previous not in (None, row.target):
            table.add_section()
        previous = row.target
        # One name suffices unless the case launched several kernels.
        name = row.function if len(functions[_case_of(row)]) > 1 else ""
        cells = _cells(row, name or row.kernel)
        table.add_row(*(_literal(text) for text in cells), style=None if row.ok else "bold red")
    return table


def _case_of(row: Row) -> tuple[str, ...]:
    return (row.target, row.kernel, row.case, row.config)


def _cells(row: Row, kernel: str) -> tuple[str, ...]:
    seconds = "cached" if row.cached else f"{row.seconds:.1f}"
    if row.error is not None:
        measures: tuple[str, ...] = ("-",) * 5
    else:
        measures = (
            str(row.registers),
            str(row.spilled_bytes),
            str(row.stack_bytes),
            f"{row.shared_bytes / 1024:.4g}/{row.shared_limit // 1024}",
            " ".join(f"{name} x{count}" for name, count in row.tensor_cores) or "none",
        )
    result = "; ".join(row.problems or ("ok", *row.notes))
    return (row.target, kernel, row.case, row.config, *measures, seconds, result)


def _literal(text: str) -> Any:
    from rich.text import Text

    return Text(text)  # brackets in it are not rich's markup


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastattn.testing.compile_report",
        description="Compile every kernel config ahead of time, without a GPU. Exit status 1 "
        "where a config spills, exceeds shared memory, misses tensor cores or fails to compile.",
    )
    add = parser.add_argument
    add("--target", action="append", choices=sorted(TARGETS), help="repeatable; default: all")
    add(
        "--kernel",
        action="append",
        default=[],
        metavar="TEXT",
        help="keep the kernels whose name contains TEXT; repeatable",
    )
    add(
        "--case",
        action="append",
        default=[],
        metavar="TEXT",
        help="keep the cases that contain TEXT; repeatable",
    )
    add("--json", metavar="PATH", help="also write the rows to PATH")
    add("--jobs", type=int, default=2, help="worker processes (default: 2)")
    add("--failures", action="store_true", help="show only the rows that fail")
    add(
        "--factory",
        action="append",
        metavar="MODULE:FUNCTION",
        help="what lists the cases, MODULE may be a .py file; repeatable "
        f"(default: {', '.join(DEFAULT_FACTORIES)})",
    )
    return parser


def _run_with_bar(options: argparse.Namespace) -> list[Row]:
    """:func:`compile_report` under a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    with Bar(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("listing the cases", total=None)

        def show(state: Progress) -> None:
            text = state.current or None  # None keeps what is shown
            bar.update(task, completed=state.done, total=state.total or None, description=text)

        return compile_report(
            options.target,
            kernel=options.kernel,
            case=options.case,
            factories=options.factory or DEFAULT_FACTORIES,
            jobs=options.jobs,
            progress=show,
        )


def _write_json(path: str, rows: Sequence[Row]) -> None:
    try:
        triton: str | None = version("triton")
    except PackageNotFoundError:  # a build under another distribution name
        triton = None
    content = {"triton": triton, "rows": [row.to_dict() for row in rows]}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default ``sys.argv[1:]``); returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        from rich.console import Console
    except ImportError:
        print('compile_report needs rich: pip install "fastattn[cli]"', file=sys.stderr)
        return 2
    try:
        rows = _run_with_bar(options)
        if options.json:
            _write_json(options.json, rows)
    except (ValueError, OSError, CompileReportError) as error:
        print(f"compile_report: {error}", file=sys.stderr)
        return 2
    if not rows:
        print("compile_report: no case matches the filters", file=sys.stderr)
        return 2
    failures = [row for row in rows if not row.ok]
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # rich assumes 80 for a file, too few for this table
    shown = failures if options.failures else rows
    if shown:
        console.print(format_table(shown))
    for row in failures:
        if row.error is not None:
            place = f"{row.target} {row.kernel} {row.case} {row.config}"
            console.print(f"\n{place}\n{row.error}", markup=False, highlight=False)
    targets = ", ".join(dict.fromkeys(row.target for row in rows))
    console.print(
        f"{len(rows)} kernels on {targets}, {len(failures)} with problems", soft_wrap=True
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
