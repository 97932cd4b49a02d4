"""Draws a results file, apart from measuring it: `python -m benchmarks.plots FILE.json`.

Writes, beside the file or into `--folder`:
    <name>-forward.png   sequence length against TFLOP/s, a line a provider, 20th to 80th percentile
    <name>-backward.png  the same for forward and backward together
    <name>-decode.png    tokens in the cache against time of a step, a panel a batch and layout
    <name>-sampling.png  rows against time of a draw, a panel a setting
    <name>-sweep.png     TFLOP/s of every tile of the sweep, today's tile marked
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.parity import show_config

Row = dict[str, Any]
Panel = tuple[str, int, bool]  # part, head_dim, causal

# Okabe and Ito's palette, told apart by colour-blind readers too; black is fastattn's.
_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#999999", "#F0E442")
_MARKERS = "osD^vPX*"


def panels(rows: Iterable[Row], stage: str) -> dict[Panel, list[Row]]:
    """Timed rows of a stage by part, head_dim and causal, in that order; no feature rows."""
    found: dict[Panel, list[Row]] = {}
    for row in rows:
        if row["stage"] == stage and "ms" in row and "case" in row:
            case = row["case"]
            if case["feature"] == "plain" and case["num_heads"] == case["num_heads_kv"]:
                panel = (case["part"], case["head_dim"], case["causal"])
                found.setdefault(panel, []).append(row)
    return dict(sorted(found.items()))


def lines(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by provider, each from short to long sequences."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["case"]["seqlen"]):
        found.setdefault(row["provider"], []).append(row)
    return found


def title(document: Row) -> str:
    """Where and when the numbers are from, and with what."""
    environment = document["environment"]
    parts = [environment["device"], f"torch {environment['torch']}"]
    parts += [f"triton {environment['triton']}"] if environment.get("triton") else []
    parts += [f"commit {environment['commit']}"] if environment.get("commit") else []
    return ", ".join([*parts, environment["date"][:10]])


def draw_speeds(document: Row, stage: str, what: str) -> Any:
    """A figure with a panel a head_dim and mask, or None where there is nothing to draw."""
    found = panels(document["rows"], stage)
    if not found:
        return None
    figure, axes = _grid(len(found), document, what)
    names = dict.fromkeys(row["provider"] for rows in found.values() for row in rows)
    peers = [name for name in names if not name.startswith("fastattn")]
    ceiling = document["ceilings"].get("matmul_tflops")
    for axis, ((_, head_dim, causal), rows) in zip(axes, found.items(), strict=True):
        for name, own in lines(rows).items():
            _draw_line(axis, name, own, peers)
        if ceiling:
            axis.axhline(ceiling, color="0.6", linestyle="--", linewidth=1, label="bf16 matmul")
        seqlens = sorted({row["case"]["seqlen"] for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_xticks(seqlens, [_thousands(seqlen) for seqlen in seqlens])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        dtype = rows[0]["case"]["dtype"]
        axis.set_title(f"{dtype}, head_dim {head_dim}, {'causal' if causal else 'bidirectional'}")
        axis.set_xlabel("sequence length")
        axis.set_ylabel("TFLOP/s")
    _legend(figure, axes)
    return figure


def _draw_line(axis: Any, name: str, rows: list[Row], peers: list[str]) -> None:
    style = _style(name, peers)
    x = [row["case"]["seqlen"] for row in rows]
    axis.plot(x, [row["tflops"] for row in rows], label=name, markersize=5, **style)
    # Long times are low rates: the 80th percentile of time is the lower edge.
    low, high = (
        [row["case"]["flops"] / row[key] / 1e9 for row in rows] for key in ("ms_p80", "ms_p20")
    )
    axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _style(name: str, peers: list[str]) -> Row:
    """Of a line and its markers."""
    if name not in peers:
        return {"color": "black", "linewidth": 2.5, "zorder": 3, "marker": "o"}
    place = peers.index(name)
    return {
        "color": _COLORS[place % len(_COLORS)],
        "linewidth": 1.5,
        "marker": _MARKERS[place % len(_MARKERS)],
    }


def draw_decode(document: Row) -> Any:
    """A figure with a panel a batch and layout, or None where there is nothing to draw."""
    found: dict[Any, list[Row]] = {}
    for row in document["rows"]:
        if row["stage"] == "decode" and "ms" in row:
            case = row["case"]
            if case["seqlen_q"] == 1 and not case["stored"]:
                found.setdefault((case["block_size"], case["batch"]), []).append(row)
    panels = {
        f"{rows[0]['case']['layout']}, batch {batch}": rows
        for (_, batch), rows in sorted(found.items())
    }
    what = "one step of decoding over a cache"
    return _draw_times(document, panels, what, "length", "tokens in the cache")


def draw_sampling(document: Row) -> Any:
    """A figure with a panel a setting, of the largest vocabulary in bfloat16; None without rows."""
    found = [row for row in document["rows"] if row["stage"] == "sampling" and "ms" in row]
    found = [row for row in found if row["case"]["family"] == "peaked"]
    found = [row for row in found if row["case"]["dtype"] == "bfloat16"]
    largest = max((row["case"]["vocab_size"] for row in found), default=0)
    panels: dict[str, list[Row]] = {}
    for row in found:
        if row["case"]["vocab_size"] == largest:
            panels.setdefault(row["case"]["setting"], []).append(row)
    what = f"one draw of a token from {largest} logits in bfloat16"
    return _draw_times(document, panels, what, "batch", "rows")


def _draw_times(
    document: Row, panels: dict[str, list[Row]], what: str, name: str, label: str
) -> Any:
    """A figure of microseconds against `name` of the case, a line a provider; None without panels.

    The dashed line is what the bytes of the case would take at the copy's rate.
    """
    if not panels:
        return None
    figure, axes = _grid(len(panels), document, what)
    names = dict.fromkeys(row["provider"] for rows in panels.values() for row in rows)
    peers = [provider for provider in names if not provider.startswith("fastattn")]
    rate = document["ceilings"].get("copy_gb_per_s")
    for axis, (heading, rows) in zip(axes, panels.items(), strict=True):
        sizes = {row["case"][name]: row["case"]["bytes"] for row in rows}
        places = sorted(sizes)
        for provider in names:
            own = sorted(
                (row for row in rows if row["provider"] == provider),
                key=lambda row: row["case"][name],
            )
            if not own:
                continue
            x, style = [row["case"][name] for row in own], _style(provider, peers)
            axis.plot(x, [row["ms"] * 1e3 for row in own], label=provider, markersize=5, **style)
            low, high = ([row[key] * 1e3 for row in own] for key in ("ms_p20", "ms_p80"))
            axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        if rate:
            floor = [sizes[place] / rate / 1e3 for place in places]
            axis.plot(places, floor, color="0.6", linestyle="--", linewidth=1, label="copy")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(places, [_thousands(place) for place in places])
        axis.set_title(heading)
        axis.set_xlabel(label)
        axis.set_ylabel("microseconds")
    _legend(figure, axes)
    return figure


def draw_sweep(document: Row) -> Any:
    """A figure with a panel a head_dim and mask: a row a tile, best on top; None without rows."""
    found = panels(document["rows"], "sweep")
    if not found:
        return None
    most = max(len({tuple(row["tile"]) for row in rows}) for rows in found.values())
    figure, axes = _grid(len(found), document, "sweep of tiles", height=1.2 + 0.22 * most)
    seqlens = sorted({row["case"]["seqlen"] for rows in found.values() for row in rows})
    for axis, ((part, head_dim, causal), rows) in zip(axes, found.items(), strict=True):
        best: dict[tuple[int, ...], float] = {}
        for row in rows:
            tile = tuple(row["tile"])
            best[tile] = max(best.get(tile, 0.0), row["tflops"])
        order = sorted(best, key=lambda tile: best[tile])
        current = {tuple(row["tile"]) for row in rows if row["current"]}
        for place, seqlen in enumerate(seqlens):
            own = [row for row in rows if row["case"]["seqlen"] == seqlen]
            axis.scatter(
                [row["tflops"] for row in own],
                [order.index(tuple(row["tile"])) for row in own],
                color=_COLORS[place % len(_COLORS)],
                marker=_MARKERS[place % len(_MARKERS)],
                label=f"N={_thousands(seqlen)}",
            )
        names = [show_config(tile) + (" (today)" if tile in current else "") for tile in order]
        axis.set_yticks(range(len(order)), names, fontsize=8)
        axis.grid(axis="y", alpha=0.3)
        axis.set_xlim(left=0)
        mask = "causal" if causal else "bidirectional"
        axis.set_title(f"{part}, head_dim {head_dim}, {mask}")
        axis.set_xlabel("TFLOP/s")
    _legend(figure, axes)
    return figure


FIGURES: dict[str, Callable[[Row], Any]] = {
    "forward": lambda document: draw_speeds(document, "forward", "attention forward"),
    "backward": lambda document: draw_speeds(
        document, "backward", "attention forward + backward (FLOPs: 3.5x forward's)"
    ),
    "decode": draw_decode,
    "sampling": draw_sampling,
    "sweep": draw_sweep,
}


def _grid(count: int, document: Row, what: str, height: float = 3.6) -> tuple[Any, list[Any]]:
    """A figure of two columns, with its axes."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    columns = min(2, count)
    rows = -(-count // columns)
    size = (6.0 * columns, height * rows + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    figure.suptitle(f"{what}\n{title(document)}", fontsize=11)
    return figure, axes[:count]


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend below all panels."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles))
    )


def _thousands(number: int) -> str:
    return f"{number // 1024}k" if number % 1024 == 0 else str(number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the file named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, help="a file that `make gpu` wrote")
    parser.add_argument("--folder", type=Path, help="where the PNGs go; default: beside the file")
    options = parser.parse_args(arguments)
    try:
        document = json.loads(options.file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"{options.file}: {error}", file=sys.stderr)
        return 2
    folder = options.folder or options.file.parent
    folder.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for name, draw in FIGURES.items():
        figure = draw(document)
        if figure is not None:
            path = folder / f"{options.file.stem}-{name}.png"
            figure.savefig(path, dpi=150)
            print(path)
            drawn += 1
    if not drawn:
        print(f"{options.file} has no timed rows to draw", file=sys.stderr)
    return 0 if drawn else 1


if __name__ == "__main__":
    sys.exit(main())
