"""Tables and plots of what `train_t5_bias.py` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

OURS, OTHER, MUTED = "#1864ab", "#e8590c", "#868e96"
HEAD_COLORS = (
    "#1864ab",
    "#e8590c",
    "#2b8a3e",
    "#862e9c",
    "#c92a2a",
    "#5c940d",
    "#0b7285",
    "#495057",
)
SHOWN_DISTANCE = 20  # most messages are no longer


def print_results(results: dict[str, Any], console: Console) -> None:
    """All tables."""
    catalogs = ", ".join(
        f"{name} {part['pairs']} ({part['licence']}, Debian package {part['package']})"
        for name, part in results["catalogs"].items()
    )
    counts = results["pairs"]
    console.print(
        f"English to German from gettext catalogs: {catalogs}\n{counts['train']} pairs to train "
        f"on, {counts['valid']} for the held-out loss, {counts['test']} for the scores; "
        f"{results['model']['parameters'] / 1e6:.2f} M parameters"
    )
    if results["kernel_check"] is not None:
        _print_check(results["kernel_check"], console)
    _print_training(results, console)
    _print_scores(results, console)
    _print_bias(results["bias_by_distance"]["encoder"], console)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    console.print(f"\n{results['seconds']:.0f} s on {results['device']}; {versions}", style="dim")


def _table(console: Console, title: str, *first: str, numbers: tuple[str, ...]) -> Table:
    """Prints a title; returns a table with left-aligned and right-aligned columns."""
    console.print(f"\n[bold]{title}")
    table = Table(box=None)
    for name in first:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _print_check(check: dict[str, Any], console: Console) -> None:
    table = _table(
        console,
        f"1. Trained with impl={check['impl']!r}, beside the reference: the tables' gradients",
        "table",
        numbers=(
            "largest difference\nof the two",
            "largest error\nof the kernels",
            "largest error of\nthe reference",
            "steps within\nthe parity rule",
            "largest entry\nafter training",
            "differs between\ntrainings by",
        ),
    )
    for name, steps in check["table_gradients"].items():
        largest = (max(steps[key]) for key in ("difference", "error", "reference_error"))
        after = check["tables_after"][name]
        table.add_row(
            name.replace("_table", ""),
            *(f"{value:.1e}" for value in largest),
            f"{sum(steps['within_parity_rule']):.0f} of {check['steps']}",
            f"{after['largest_entry']:.3f}",
            f"{after['largest_difference']:.1e}",
        )
    console.print(table)
    ours, other = check["losses"].values()
    gap = max(abs(a - b) for a, b in zip(ours, other, strict=True))
    console.print(
        f"Relative to the gradient's norm; errors are against float64 at the same weights. Loss "
        f"{ours[0]:.4f} to {ours[-1]:.4f} through impl={check['impl']!r}, {other[0]:.4f} to "
        f"{other[-1]:.4f} through the reference; they differ by {gap:.1e} at most. "
        f"{check['seconds']:.0f} s in all."
    )


def _print_training(results: dict[str, Any], console: Console) -> None:
    settings, records = results["settings"], results["training"]
    table = _table(
        console,
        f"2. The long training, {settings['steps']} steps with impl='auto'",
        numbers=("step", "seconds", "training loss", "held-out loss"),
    )
    for record in records:
        train = f"{record['train']:.3f}" if "train" in record else ""
        table.add_row(
            f"{record['step']:.0f}", f"{record['seconds']:.0f}", train, f"{record['valid']:.3f}"
        )
    console.print(table)
    console.print(
        "Nats a token. The training loss is the mean since the row above, with dropout and label "
        f"smoothing ({settings['label_smoothing']}), the held-out loss without."
    )


def _print_scores(results: dict[str, Any], console: Console) -> None:
    total = results["pairs"]["test"]
    table = _table(
        console,
        f"3. {total} messages that were not trained on, by sacrebleu",
        "translation",
        numbers=("BLEU", "chrF", "as in the catalog"),
    )
    for name, scores in results["scores"].items():
        exact = f"{scores['exact']} ({scores['exact'] / total:.0%})"
        table.add_row(name, f"{scores['bleu']:.1f}", f"{scores['chrf']:.1f}", exact)
    console.print(table)
    console.print(
        f"Greedy decoding of all in {results['translation_seconds']:.0f} s. "
        f"{'; '.join(results['scores']['model']['signatures'])}",
        style="dim",
    )
    console.print("\nThe first of them, in the order of a hash, not chosen:")
    for sample in results["samples"]:
        console.print(f"  [bold]{escape(sample['english'])}")
        console.print(f"    catalog: {escape(sample['german'])}")
        console.print(f"    model:   {escape(sample['model'])}")


def _print_bias(heads: list[list[float]], console: Console) -> None:
    middle = len(heads[0]) // 2
    shown = (-8, -3, -2, -1, 0, 1, 2, 3, 8)
    table = _table(
        console,
        "4. What the encoder's table has learned: bias at a distance of so many tokens",
        "head",
        numbers=(*(f"{distance:+d}" if distance else "0" for distance in shown), "most at"),
    )
    for index, values in enumerate(_centered(heads)):
        nearest = range(-SHOWN_DISTANCE, SHOWN_DISTANCE + 1)
        best = max(nearest, key=lambda distance: (values[middle + distance], -abs(distance)))
        cells = (f"{values[middle + distance]:+.2f}" for distance in shown)
        table.add_row(str(index + 1), *cells, f"{best:+d}" if best else "0")
    console.print(table)
    console.print(
        f"Less each head's mean over distances up to {SHOWN_DISTANCE}, which no softmax can see. "
        "Negative: the key stands before the query."
    )


def _centered(heads: list[list[float]], causal: bool = False) -> list[list[float]]:
    """Biases by distance, less their mean over the distances that are shown."""
    middle = len(heads[0]) // 2
    seen = slice(middle - SHOWN_DISTANCE, middle + 1 + (0 if causal else SHOWN_DISTANCE))
    means = (sum(values[seen]) / len(values[seen]) for values in heads)
    return [[v - mean for v in values] for values, mean in zip(heads, means, strict=True)]


def draw(results: dict[str, Any], target: Path) -> list[Path]:
    """Writes TARGET.png, the trainings, and TARGET_tables.png, the biases learned."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paths = []
    check = results["kernel_check"]
    widths = (1, 1, 1) if check is not None else (1,)
    for suffix, columns in (("", len(widths)), ("_tables", 2)):
        figure = Figure(figsize=(4.7 * columns, 4.2), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)  # no window, whatever the user's matplotlib is set up for
        axes = figure.subplots(1, columns, squeeze=False)[0]
        if suffix:
            for place, (name, heads) in zip(axes, results["bias_by_distance"].items(), strict=True):
                _draw_bias(place, name, heads)
        else:
            if check is not None:
                _draw_losses(axes[0], check)
                _draw_errors(axes[1], check)
            _draw_training(axes[-1], results)
        for place in axes:
            place.spines[["top", "right"]].set_visible(False)
            place.grid(color="#e9ecef", linewidth=0.8)
            place.legend(frameon=False, fontsize=8.5)
        paths.append(target.with_name(f"{target.name}{suffix}.png"))
        figure.savefig(paths[-1])
    return paths


def _draw_losses(axes: Any, check: dict[str, Any]) -> None:
    ours, other = check["losses"].values()
    steps = range(1, check["steps"] + 1)
    axes.plot(steps, other, color=OTHER, linewidth=4, alpha=0.45, label="impl='reference'")
    axes.plot(steps, ours, color=OURS, linewidth=1.3, label=f"impl={check['impl']!r}")
    axes.set_title("Two trainings from the same weights", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats a token")


def _draw_errors(axes: Any, check: dict[str, Any]) -> None:
    for (name, steps), line in zip(check["table_gradients"].items(), ("-", ":"), strict=True):
        stack = name.removesuffix("_table")
        for key, who, color in (
            ("reference_error", "reference", OTHER),
            ("error", check["impl"], OURS),
        ):
            axes.plot(
                range(1, check["steps"] + 1), steps[key], line, color=color, linewidth=1.3,
                label=f"{who}, {stack} table",
            )  # fmt: skip
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 10, high * 4)  # room for the legend; the noise is not the message
    axes.set_title("Gradients of the tables: error against float64", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("relative to the gradient's norm")


def _draw_training(axes: Any, results: dict[str, Any]) -> None:
    records = results["training"]
    trained = records[1:]
    axes.plot(
        [record["step"] for record in records], [record["valid"] for record in records], ".-",
        color=OURS, label="held-out",
    )  # fmt: skip
    axes.plot(
        [record["step"] for record in trained], [record["train"] for record in trained], ".-",
        color=MUTED, label="training, with dropout and\nlabel smoothing",
    )  # fmt: skip
    bleu, chrf = (results["scores"]["model"][name] for name in ("bleu", "chrf"))
    axes.set_title(f"The long training: BLEU {bleu:.1f}, chrF {chrf:.1f} in the end", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")


def _draw_bias(axes: Any, name: str, heads: list[list[float]]) -> None:
    causal = name == "decoder"
    middle = len(heads[0]) // 2
    distances = range(-SHOWN_DISTANCE, 1 if causal else SHOWN_DISTANCE + 1)
    for index, values in enumerate(_centered(heads, causal)):
        axes.plot(
            distances, [values[middle + distance] for distance in distances],
            drawstyle="steps-mid", linewidth=1.4, color=HEAD_COLORS[index % len(HEAD_COLORS)],
            label=f"head {index + 1}",
        )  # fmt: skip
    axes.axhline(0, color="#adb5bd", linewidth=0.8)
    axes.set_title(f"What the {name}'s table has learned", fontsize=10)
    axes.set_xlabel("key position - query position, tokens")
    axes.set_ylabel("bias, less the head's mean")
