"""The figures. Each is drawn without a window, returned, and written where a path is given."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastattn.masks import Mask, as_mask
from fastattn.validation import describe
from fastattn.visualize.capture import AttentionMap
from fastattn.visualize.fonts import Lettering, lettering

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Path = str | os.PathLike[str]
Weights = AttentionMap | Tensor

COLORS = "Blues"


class Sizes(NamedTuple):
    """Inches of a place, at most and at least, its labels' points, and how many places get one."""

    cell: float
    least: float
    font: float
    most_labels: int


SINGLE = Sizes(0.27, 0.16, 8.0, 72)
GRID = Sizes(0.15, 0.1, 6.0, 48)
MOST_NUMBERS = 24
"""Of places that have no label but their number, not more are written than this."""


class Side(NamedTuple):
    """One axis: a label for each place, each how many-th is written, inches, points."""

    labels: list[str]
    step: int
    inches: float
    font: float


def heat_map(
    weights: Weights,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    head: int | None = None,
    title: str | None = None,
    marked: Sequence[tuple[int, int]] = (),
    path: Path | None = None,
) -> Figure:
    """One head: a row for each query, a column for each key.

    Args:
        weights: of `capture`, or floating (rows, keys) or (heads, rows, keys).
        tokens: a label for each row. Of an `AttentionMap` also one for each place of the sequence,
            padding included. None: their numbers.
        key_tokens: a label for each column; None: `tokens`, where the rows are the keys.
        head: which one of the heads, by its number in the model; None where there is only one.
        title: above the picture; None says layer and head.
        marked: cells (row, column) that get a frame and their weight as a number.
        path: a file to write; its ending says the format.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    maps, numbers = _maps(weights)
    index = _index_of(head, numbers)
    rows, keys = _sides(weights, maps, tokens, key_tokens)
    title = _title(weights, title, numbers[index])
    letters = _lettering(rows, keys, title)
    for cell in marked:
        if not (0 <= cell[0] < maps.shape[1] and 0 <= cell[1] < maps.shape[2]):
            raise ValueError(f"marked must hold cells of {tuple(maps.shape[1:])}, got {cell}")
    width, height = _extent(rows, keys, letters)
    figure = _figure(width + 1.2, height + 0.4)
    axes = figure.add_subplot()
    image = axes.imshow(maps[index].numpy(), cmap=COLORS, vmin=0.0, interpolation="nearest")
    _label_axes(axes, rows, keys, letters)
    axes.set_xlabel("key", fontsize=9)
    axes.set_ylabel("query", fontsize=9)
    _mark(axes, maps[index], marked)
    _color_bar(figure, image, [axes])
    return _finish(figure, title, letters, path)


def head_grid(
    weights: Weights,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    columns: int = 4,
    title: str | None = None,
    path: Path | None = None,
) -> Figure:
    """The heads of a layer side by side, in one scale of colors.

    Args:
        weights: of `capture`, or floating (heads, rows, keys).
        columns: heads in a row of the figure.
        tokens, key_tokens, title, path: as of `heat_map`.

    Returns, Raises:
        As `heat_map`.
    """
    maps, numbers = _maps(weights)
    if isinstance(columns, bool) or not isinstance(columns, int) or columns < 1:
        raise ValueError(f"columns must be an int of at least 1, got {columns!r}")
    columns = min(columns, len(numbers))
    rows, keys = _sides(weights, maps, tokens, key_tokens, GRID)
    title = _title(weights, title, None)
    letters = _lettering(rows, keys, title)
    lines = -(-len(numbers) // columns)
    width, height = _extent(rows, keys, letters)
    # Labels stand at the left and the top of the figure only.
    figure = _figure(
        width + (columns - 1) * (keys.inches + 0.25) + 0.8,
        height + (lines - 1) * (rows.inches + 0.4) + 0.7,
    )
    largest = maps.max().item()
    grid = figure.subplots(lines, columns, squeeze=False)
    for place in range(lines * columns):
        axes = grid[place // columns][place % columns]
        if place >= len(numbers):
            axes.set_axis_off()
            continue
        image = axes.imshow(
            maps[place].numpy(), cmap=COLORS, vmin=0.0, vmax=largest, interpolation="nearest"
        )
        _label_axes(axes, rows, keys, letters, place % columns == 0, place < columns)
        axes.set_title(_head_name(numbers[place]), fontsize=8, pad=3)
    _color_bar(figure, image, grid.ravel().tolist())
    return _finish(figure, title, letters, path)


def alignment(
    weights: Weights,
    source: Sequence[str] | None = None,
    target: Sequence[str] | None = None,
    *,
    head: int | None = None,
    title: str | None = None,
    path: Path | None = None,
) -> Figure:
    """What each token that a decoder reads looks at in the source, its likeliest place framed.

    Args:
        weights: of `capture(..., kind="cross")`, of one head or averaged, or floating (target
            tokens, source tokens).
        source: labels of the columns, the encoder's tokens.
        target: labels of the rows, the decoder's.
        head, title, path: as of `heat_map`.

    Returns, Raises:
        As `heat_map`.
    """
    maps, numbers = _maps(weights)
    index = _index_of(head, numbers)
    rows, keys = _sides(weights, maps, target, source, names=("target", "source"))
    title = _title(weights, title, numbers[index])
    letters = _lettering(rows, keys, title)
    width, height = _extent(rows, keys, letters)
    figure = _figure(width + 1.2, height + 0.4)
    axes = figure.add_subplot()
    image = axes.imshow(
        maps[index].numpy(), cmap=COLORS, vmin=0.0, vmax=1.0, interpolation="nearest"
    )
    _label_axes(axes, rows, keys, letters)
    axes.set_xlabel("source", fontsize=9)
    axes.set_ylabel("target", fontsize=9)
    if maps.shape[2]:
        for row, column in enumerate(maps[index].argmax(1).tolist()):
            if maps[index, row, column] > 0:  # a row that may see nothing looks nowhere
                axes.add_patch(_frame(row, column))
    _color_bar(figure, image, [axes])
    return _finish(figure, title, letters, path)


def mask_matrix(
    mask: Mask | Tensor,
    seqlen_q: int,
    seqlen_k: int,
    *,
    sequence: int = 0,
    head: int = 0,
    blocks: tuple[int, int] | None = None,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    title: str | None = None,
    path: Path | None = None,
) -> Figure:
    """Who may attend to whom: dark where a query (row) may attend to a key (column).

    Args:
        mask: any of fastattn's, or a bool tensor that broadcasts to (batch, num_heads, seqlen_q,
            seqlen_k).
        seqlen_q, seqlen_k: rows and columns; of a `Packed` mask the totals.
        sequence, head: which one, where the mask has several.
        blocks: rows and keys of a kernel's tile: their grid is drawn, and the title says how many
            are visited and how many of these need no mask.
        tokens, key_tokens, title, path: as of `heat_map`.

    Returns, Raises:
        As `heat_map`.
    """
    for name, size in (("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {size!r}")
    value = as_mask(mask)
    dense = value.dense(seqlen_q, seqlen_k)
    if not 0 <= sequence < dense.shape[0] and not (dense.shape[0] == 1 and sequence >= 0):
        raise ValueError(f"sequence must be in 0..{dense.shape[0] - 1}, got {sequence}")
    if not 0 <= head < dense.shape[1] and not (dense.shape[1] == 1 and head >= 0):
        raise ValueError(f"head must be in 0..{dense.shape[1] - 1}, got {head}")
    visible = dense[min(sequence, dense.shape[0] - 1), min(head, dense.shape[1] - 1)].cpu()
    if title is None:
        title = " & ".join(type(part).__name__ for part in getattr(value, "parts", (value,)))
    if blocks is not None:
        tiles = as_mask(visible).tiles(seqlen_q, seqlen_k, *blocks)[0]
        visited, whole = int((tiles > 0).sum()), int((tiles == 2).sum())
        title += f"\n{visited} of {tiles.numel()} tiles visited, {whole} without a mask"
    rows, keys = _sides(visible, visible[None], tokens, key_tokens)
    letters = _lettering(rows, keys, title)
    width, height = _extent(rows, keys, letters)
    figure = _figure(max(width, 3.2), height + 0.6)
    axes = figure.add_subplot()
    axes.imshow(
        visible.to(torch.uint8).numpy(), cmap=COLORS, vmin=0, vmax=1.3, interpolation="nearest"
    )
    _label_axes(axes, rows, keys, letters)
    axes.set_xlabel("key", fontsize=9)
    axes.set_ylabel("query", fontsize=9)
    if blocks is not None:
        for edge in range(blocks[0], seqlen_q, blocks[0]):
            axes.axhline(edge - 0.5, color="darkorange", linewidth=0.8)
        for edge in range(blocks[1], seqlen_k, blocks[1]):
            axes.axvline(edge - 0.5, color="darkorange", linewidth=0.8)
    return _finish(figure, title, letters, path)


def _maps(weights: Weights) -> tuple[Tensor, tuple[int, ...]]:
    """Maps (heads, rows, keys) on the CPU, and the number of each; -1 of a mean."""
    values = weights.weights if isinstance(weights, AttentionMap) else weights
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = describe(values) if isinstance(values, Tensor) else repr(values)
        raise TypeError(f"weights must be an AttentionMap or a floating tensor, got {got}")
    if values.dim() == 2:
        values = values[None]
    if values.dim() != 3 or values.numel() == 0:
        raise ValueError(
            "weights must be (rows, keys) or (heads, rows, keys), and not empty, got "
            f"{describe(values)}"
        )
    values = values.detach().to("cpu", torch.promote_types(values.dtype, torch.float32))
    if isinstance(weights, AttentionMap):
        return values, weights.heads or (-1,)
    return values, tuple(range(values.shape[0]))


def _index_of(head: int | None, numbers: tuple[int, ...]) -> int:
    if head is None:
        if len(numbers) > 1:
            raise ValueError(f"head must be one of {list(numbers)}, since there are several")
        return 0
    if head not in numbers:
        raise ValueError(f"head must be one of {list(numbers)}, got {head!r}")
    return numbers.index(head)


def _title(weights: Weights, title: str | None, number: int | None) -> str:
    """The title given, or layer and head in words, counted from 1."""
    if title is not None or not isinstance(weights, AttentionMap):
        return title or ""
    if number is None:
        return weights.title
    return f"{weights.title}, {_head_name(number)}"


def _head_name(number: int) -> str:
    return f"head {number + 1}" if number >= 0 else "mean of heads"


def _sides(
    weights: Weights,
    maps: Tensor,
    rows: Sequence[str] | None,
    keys: Sequence[str] | None,
    sizes: Sizes = SINGLE,
    names: tuple[str, str] = ("tokens", "key_tokens"),
) -> tuple[Side, Side]:
    """The axis of the rows and that of the keys."""
    row_places = key_places = None
    if isinstance(weights, AttentionMap):
        row_places, key_places = weights.rows.tolist(), weights.keys.tolist()
    if keys is None and rows is not None and names[1] == "key_tokens":
        square = maps.shape[1] == maps.shape[2]
        keys = rows if square and row_places == key_places else None
    return (
        _side(names[0], rows, maps.shape[1], row_places, sizes),
        _side(names[1], keys, maps.shape[2], key_places, sizes),
    )


def _side(
    name: str, tokens: Sequence[str] | None, count: int, places: list[int] | None, sizes: Sizes
) -> Side:
    largest = sizes.cell * MOST_NUMBERS
    if tokens is None:
        labels = [str(place) for place in (range(count) if places is None else places)]
        # 1, 2, 5, 10, 20, 50, ...
        steps = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
        step = next(step for step in steps if step * MOST_NUMBERS >= count)
        return Side(labels, step, min(max(sizes.cell * count, 0.9), largest), sizes.font)
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        raise TypeError(f"{name} must be a list of strings, got {tokens!r}")
    if len(tokens) != count and places is not None and max(places, default=-1) < len(tokens):
        tokens = [tokens[place] for place in places]
    if len(tokens) != count:
        raise ValueError(f"{name} must be {count} labels, got {len(tokens)}")
    cell = min(max(largest / count, sizes.least), sizes.cell)
    step = -(-count // sizes.most_labels)
    font = min(sizes.font, cell * step * 72 * 0.75)
    return Side(list(tokens), step, max(cell * min(count, sizes.most_labels), 0.9), font)


def _lettering(rows: Side, keys: Side, title: str) -> Lettering:
    _require_matplotlib()
    return lettering([*rows.labels, *keys.labels, title.replace("\n", " ")])


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "fastattn.visualize draws with matplotlib, which is not installed: "
            "pip install matplotlib"
        ) from error


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's matplotlib is set up for
    return figure


def _extent(rows: Side, keys: Side, letters: Lettering) -> tuple[float, float]:
    """Inches of a picture with its labels."""

    def room(side: Side) -> float:
        # A letter is about 0.65 of the font's size wide, one of CJK as wide as it.
        widths = (
            sum(1.0 if ord(letter) > 0x2E7F else 0.65 for letter in letters.label(label))
            for label in side.labels
        )
        return max(widths) * side.font / 72 + 0.3

    return keys.inches + room(rows), rows.inches + room(keys)


def _label_axes(
    axes: Axes,
    rows: Side,
    keys: Side,
    letters: Lettering,
    at_left: bool = True,
    above: bool = True,
) -> None:
    """Labels at the left and above, and white lines between the places."""
    for axis, side, shown in ((axes.yaxis, rows, at_left), (axes.xaxis, keys, above)):
        count = len(side.labels)
        places = range(0, count if shown else 0, side.step)
        axis.set_ticks(places)
        axis.set_ticklabels(
            [letters.label(side.labels[place]) for place in places],
            fontsize=side.font,
            family=letters.families,
            parse_math=False,
        )
        if side.inches / count > 0.08:
            axis.set_ticks([place - 0.5 for place in range(1, count)], minor=True)
            axis.grid(which="minor", color="white", linewidth=3 * side.inches / count)
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", labelrotation=90)
    axes.tick_params(length=0)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _frame(row: int, column: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(
        (column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="darkorange", linewidth=1.6, zorder=3
    )


def _mark(axes: Axes, weights: Tensor, marked: Sequence[tuple[int, int]]) -> None:
    for row, column in marked:
        axes.add_patch(_frame(row, column))
        value = weights[row, column].item()
        color = "white" if value > 0.5 * weights.max().item() else "black"
        label = f"{value:.2f}".removeprefix("0")
        axes.text(column, row, label, ha="center", va="center", fontsize=6.5, color=color)


def _color_bar(figure: Figure, image: Any, axes: list[Any]) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02)
    bar.set_label("attention weight", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _finish(figure: Figure, title: str, letters: Lettering, path: Path | None) -> Figure:
    if title:
        text = "\n".join(letters.label(line) for line in title.split("\n"))
        figure.suptitle(text, fontsize=10, family=letters.families, parse_math=False)
    if path is not None:
        figure.savefig(path, bbox_inches="tight", pad_inches=0.15)
    return figure
