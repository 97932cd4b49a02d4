"""The table and the plot of finetune_classifier.py, from its results."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OURS, STOCK, INK, GRID = "#d9480f", "#a5b1bd", "#495057", "#e9ecef"


def print_results(results: dict[str, Any], console: Console) -> None:
    """The data, a row for each run, and how the runs of each pair compare."""
    data = results["data"]
    console.print(
        f"MiniLM learns which of {len(data['labels'])} packages a docstring is from. Texts: "
        f"{data['source']}, licence {data['license']}; {data['training_passages']} to train on, "
        f"{data['held_out_passages']} held out by file. Always answering "
        f"{data['majority_class']!r} is right for {data['majority_accuracy']:.1%} of these.\n"
    )
    memory = "peak memory, MiB\n" + results["memory_measure"]
    table = Table("trained", "attention", box=None, pad_edge=False, header_style="bold")
    for name in ("first\nloss", "mean of\nlast 10", "held-out\naccuracy", memory):
        table.add_column(name, justify="right")
    table.add_column("step, ms: median\n(p20 to p80)", justify="right")
    for mode in results["modes"]:
        for run in mode["runs"]:
            peak = run["peak_memory_bytes"]
            median, p20, p80 = (f"{s * 1e3:,.0f}" for s in run["step_seconds"].values())
            table.add_row(
                mode["mode"],
                run["attention"],
                f"{run['losses'][0]:.4f}",
                f"{statistics.mean(run['losses'][-10:]):.4f}",
                f"{run['held_out_accuracy']:.1%}",
                "not measured" if peak is None else f"{peak / 2**20:,.0f}",
                f"{median} ({p20} to {p80})",
            )
    console.print(table)
    for mode in results["modes"]:
        ratio, names = mode["paired_time_ratio"], [run["attention"] for run in mode["runs"]]
        console.print(
            f"\n[bold]{mode['mode']}[/]: losses differ by {mode['largest_loss_difference']:.1e} at "
            f"most; {mode['predictions_agreed']} of {data['held_out_passages']} predictions are "
            f"the same; {' / '.join(names)} time of a step, {results['timing']}: "
            f"{ratio['median']:.2f} (p20 {ratio['p20']:.2f}, p80 {ratio['p80']:.2f})"
        )
        served_by = mode["runs"][0]["served_by"]
        # The ways to train ask for the same attention: the whole report once, all in the JSON.
        whole = mode is results["modes"][0]
        text = served_by if whole else served_by.splitlines()[0]
        console.print(text, markup=False, style="dim")


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes a PNG of the loss curves and their differences, step times and memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modes, settings = results["modes"], results["settings"]
    figure = Figure(figsize=(4.7 * len(modes) + 3.1, 6.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's matplotlib is set up for
    grid = figure.add_gridspec(
        2, len(modes) + 1, width_ratios=[4.7] * len(modes) + [3.0], height_ratios=(1.7, 1)
    )
    left: list[Any] = []
    for column, mode in enumerate(modes):
        curves, gaps = (
            figure.add_subplot(grid[row, column], sharey=left[row] if left else None)
            for row in (0, 1)
        )
        _draw_losses(mode, curves, gaps)
        left = left or [curves, gaps]
    left[0].set_ylabel("training loss")
    left[1].set_ylabel("difference of the losses")
    times, memory = (figure.add_subplot(grid[row, -1]) for row in (0, 1))
    spans = [
        [run["step_seconds"][name] * 1e3 for name in ("p20", "median", "p80")]
        for _, run in _places(modes)
    ]
    _draw_bars(modes, times, [median for _, median, _ in spans], [top for *_, top in spans])
    for (place, _), (low, _, high) in zip(_places(modes), spans, strict=True):
        times.plot([place, place], [low, high], color=INK, linewidth=1.5, solid_capstyle="butt")
    times.set_title(f"time of a step, ms (p20 to p80)\n{results['timing']}", fontsize=10)
    memory.set_title(f"peak memory, MiB\n{results['memory_measure']}", fontsize=10)
    peaks = [run["peak_memory_bytes"] for _, run in _places(modes)]
    if None not in peaks:
        sizes = [peak / 2**20 for peak in peaks]
        _draw_bars(modes, memory, sizes, sizes)
    else:
        memory.text(0.5, 0.5, "not measured", ha="center", transform=memory.transAxes)
    figure.suptitle(
        "Fine-tuning MiniLM to tell which package a docstring is from\n"
        f"{settings['steps']} batches of {settings['batch_size']}, {results['device']}; "
        f"always answering {results['data']['majority_class']!r}: "
        f"{results['data']['majority_accuracy']:.1%} of held-out passages right",
        fontsize=11,
    )
    figure.savefig(path)


def _draw_losses(mode: dict[str, Any], curves: Any, gaps: Any) -> None:
    """The losses of a pair, one over the other, and below how far they are apart."""
    ours, stock = mode["runs"]
    steps = range(1, len(ours["losses"]) + 1)
    for run, width, color in ((stock, 5, STOCK), (ours, 1.4, OURS)):
        label = f"{run['attention']}: {run['held_out_accuracy']:.1%} of held-out passages right"
        curves.plot(steps, run["losses"], label=label, linewidth=width, color=color)
    curves.set_title(mode["mode"], fontsize=11, fontweight="bold")
    curves.legend(frameon=False, fontsize=9, loc="upper right")
    top = max(*ours["losses"], *stock["losses"], curves.get_ylim()[1])
    curves.set_ylim(0, top)
    pairs = list(zip(ours["losses"], stock["losses"], strict=True))
    # A logarithmic axis has no place for 0: equal losses leave a gap.
    apart = [abs(a - b) or math.nan for a, b in pairs]
    unit = [2**-23 * b for _, b in pairs]
    gaps.plot(steps, apart, ".", markersize=5, color=OURS, label="|fastattn - stock|")
    gaps.plot(steps, unit, color=INK, linewidth=1.1, linestyle=":", label="float32 rounding unit")
    seen = [value for value in (*apart, *unit) if value > 0]
    low, high = (10.0 ** math.floor(math.log10(value)) for value in (min(seen), max(seen)))
    before = gaps.get_ylim() if gaps.get_yscale() == "log" else (low, 20 * high)
    gaps.set_yscale("log")
    gaps.set_ylim(min(low, before[0]), max(20 * high, before[1]))
    gaps.legend(frameon=False, fontsize=9, loc="upper right", ncols=2)
    gaps.set_xlabel(f"step ({sum(a == b for a, b in pairs)} of {len(pairs)} losses are equal)")
    for axes in (curves, gaps):
        axes.grid(color=GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)


def _places(modes: list[dict[str, Any]]) -> list[tuple[float, dict[str, Any]]]:
    """Where along the axis each run's bar stands: in pairs."""
    pairs = enumerate(mode["runs"] for mode in modes)
    return [(2.5 * group + index, run) for group, runs in pairs for index, run in enumerate(runs)]


def _draw_bars(
    modes: list[dict[str, Any]], axes: Any, heights: list[float], tops: list[float]
) -> None:
    """A bar for each run, with its name and height above `tops`."""
    for index, (place, run) in enumerate(_places(modes)):
        axes.bar(place, heights[index], width=0.92, color=STOCK if index % 2 else OURS)
        text = f"{run['attention']}\n{heights[index]:,.0f}"
        options = {"ha": "center", "va": "bottom", "textcoords": "offset points"}
        axes.annotate(text, (place, tops[index]), (0, 3), fontsize=8.5, **options)
    names = [mode["mode"] for mode in modes]
    axes.set_xticks([2.5 * group + 0.5 for group in range(len(modes))], names, fontsize=9)
    axes.set_ylim(0, 1.25 * max(tops))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelleft=False)
