"""A picture of attention weights, with the tokens along both axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


def draw_heat_map(
    weights: Tensor,
    tokens: Sequence[str],
    path: Path,
    title: str,
    marked: Sequence[tuple[int, int]] = (),
) -> None:
    """Writes a heat map of one head's attention weights as a PNG.

    Args:
        weights: (seqlen, seqlen); row i is what token i attends to.
        tokens: a label for each row and column.
        path: the file to write.
        title: above the picture.
        marked: cells (row, column) that get a frame and their number.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    size = 1.9 + 0.27 * len(tokens)
    figure = Figure(figsize=(size + 0.7, size), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's matplotlib is set up for
    axes = figure.add_subplot()
    image = axes.imshow(weights.float().cpu().numpy(), cmap="Blues", vmin=0.0)
    positions = range(len(tokens))
    axes.set_xticks(positions, tokens, rotation=90, fontsize=8)
    axes.set_yticks(positions, tokens, fontsize=8)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.set_xlabel("attended to", fontsize=9)
    axes.set_ylabel("token", fontsize=9)
    for side in axes.spines.values():
        side.set_visible(False)
    edges = [position - 0.5 for position in positions][1:]
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    for row, column in marked:
        frame = Rectangle(
            (column - 0.5, row - 0.5),
            1,
            1,
            fill=False,
            edgecolor="darkorange",
            linewidth=1.6,
            zorder=3,
        )
        axes.add_patch(frame)
        value = weights[row, column].item()
        color = "white" if value > 0.5 * weights.max().item() else "black"
        label = f"{value:.2f}".removeprefix("0")
        axes.text(column, row, label, ha="center", va="center", fontsize=6.5, color=color)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02)
    bar.set_label("attention weight", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    axes.set_title(title, fontsize=10, pad=12)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.15)
