"""The tables of `fastattn profile`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fastattn.profiling.memory import format_bytes
from fastattn.profiling.plots import short, shown_case
from fastattn.profiling.results import Phase, Profile, Row, Shares

LISTED = 6
"""Operators of a phase."""


def print_profile(profile: Profile, console: Console) -> None:
    """Prints what was measured, its ceilings, and what is wrong."""
    console.print(
        f"[bold]{profile.model}[/], {profile.parameters / 1e6:,.1f} M parameters in "
        f"{profile.dtype}, on {profile.device}"
    )
    if len(profile.cases) == 1:
        console.print(str(profile.cases[0]))
    console.print(_latency(profile))
    console.print(_utilization(profile))
    if any(row.memory for row in profile.rows):
        console.print(_memory(profile))
    if any(row.shares for row in profile.rows):
        console.print(_operators(profile))
    ceilings = profile.ceilings
    console.print(
        f"Ceilings of this run: copy {ceilings.copy_gb_per_s:.1f} GB/s, {ceilings.dtype} product "
        f"{ceilings.matmul_tflops * 1e3:,.1f} GFLOP/s. Bytes and FLOPs by {profile.counted}.",
        style="dim",
    )
    for note in profile.notes:
        console.print(f"Note: {note}.", style="dim", markup=False)
    for row in profile.rows:
        if row.error is not None:
            console.print(f"{row.provider}, {row.case}: {row.error}", style="red", markup=False)


def _table(profile: Profile, title: str) -> Table:
    table = Table(header_style="bold", title=title, title_justify="left")
    if len(profile.cases) > 1:
        table.add_column("case", no_wrap=True)
    table.add_column("provider", no_wrap=True)
    return table


def _begin(profile: Profile, row: Row) -> list[str]:
    first = row.provider == profile.providers[0]
    case = [short(row.case, profile.cases) if first else ""]
    return [*(case if len(profile.cases) > 1 else []), row.provider]


def _add(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right")


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _parity(row: Row) -> str:
    if row.error is not None:
        return "[bold red]FAILED" if row.parity and not row.parity.passed else "[red]error"
    if row.parity is None:
        return "[dim]the measure" if row.provider == "transformers" else "[dim]not compared"
    same = row.parity.same_tokens
    return "[green]passed" + ("" if same is None else f"[/], {same:.0%}")


def _latency(profile: Profile) -> Table:
    table = _table(profile, "Latency and throughput")
    encodes = profile.kind == "encoder"
    if encodes:
        _add(table, "forward ms", "p20-p80", "p95", "p99", "texts/s", "tokens/s")
    else:
        _add(table, "first token ms", "p20-p80", "per token ms", "p95", "p99")
        _add(table, "tokens/s\na request", "tokens/s\ntotal")
    table.add_column("parity" if encodes else "parity,\nsame tokens", overflow="fold")
    for row in profile.rows:
        cells = _begin(profile, row)
        if row.prefill is None:
            cells += [""] * (6 if encodes else 7)
        else:
            first = row.prefill.timing
            cells += [_ms(first.p50_ms), f"{_ms(first.p20_ms)}-{_ms(first.p80_ms)}"]
            if encodes:
                cells += [_ms(first.p95_ms), _ms(first.p99_ms), _rate(row.texts_per_s)]
            elif row.decode is None:
                cells += [""] * 4
            else:
                timing = row.decode.timing
                cells += [_ms(timing.p50_ms), _ms(timing.p95_ms), _ms(timing.p99_ms)]
                cells.append(_rate(row.tokens_per_s_request))
            cells.append(_rate(row.tokens_per_s))
        table.add_row(*cells, _parity(row))
    return table


def _utilization(profile: Profile) -> Table:
    table = _table(profile, "Utilization of the ceilings")
    encodes = profile.kind == "encoder"
    for phase in ("forward",) if encodes else ("prefill", "decode"):
        _add(table, f"{phase}\ntokens/s", "\nFLOPs", "\nbandwidth")
    for row in profile.rows:
        cells = _begin(profile, row)
        for found in (row.prefill,) if encodes else (row.prefill, row.decode):
            cells += _phase(found)
        table.add_row(*cells)
    return table


def _memory(profile: Profile) -> Table:
    table = _table(profile, "Memory")
    source = next(row.memory.source for row in profile.rows if row.memory)
    _add(table, "weights", "cache", "activations", f"peak ({source})")
    for row in profile.rows:
        cells = _begin(profile, row)
        if row.memory is not None:
            memory = row.memory
            sizes = (memory.weights, memory.cache, memory.activations, memory.peak)
            cells += [format_bytes(size) for size in sizes]
        table.add_row(*cells)
    return table


def _phase(found: Phase | None) -> list[str]:
    if found is None:
        return [""] * 3
    return [_rate(found.tokens_per_s), f"{found.mfu:.1f}%", f"{found.mbu:.1f}%"]


def _operators(profile: Profile) -> Table:
    case = shown_case(profile)
    table = Table(header_style="bold", title=f"Time by operator ({case})", title_justify="left")
    columns: list[Shares] = []
    for provider in profile.providers:
        row = profile.row(provider, case)
        for shares in row.shares if row else ():
            if shares.phase != "prefill":
                columns.append(shares)
                table.add_column(f"{provider}, {shares.phase}", no_wrap=True)
                table.add_column("", justify="right")
    for index in range(LISTED):
        cells: list[str] = []
        for shares in columns:
            ordered = sorted(shares.operators, key=lambda one: -one.percent)
            if index < len(ordered):
                one = ordered[index]
                cells += [one.name.removeprefix("aten::")[:34], f"{one.percent:.1f}%"]
            else:
                cells += ["", ""]
        table.add_row(*cells)
    return table
